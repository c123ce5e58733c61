//go:build unix

package budget

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/redis/rueidis"
	"google.golang.org/grpc"

	"github.com/sluicegate/sluice/proto/gen/inference"
	"github.com/sluicegate/sluice/test/model"
)

// tool runs a script that prints the path of a program, and skips the test where there
// is none and it cannot be made.
func tool(t *testing.T, script string) string {
	t.Helper()
	out, err := exec.Command("../../interceptors/budget/testdata/" + script).Output()
	if exit := new(exec.ExitError); errors.As(err, &exit) && exit.ExitCode() == 77 {
		t.Skipf("%s", exit.Stderr)
	}
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(out))
}

// freePort is a port of this machine that nobody has at the moment.
func freePort(t *testing.T) int {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port
}

// within polls until something is so.
func within(t *testing.T, most time.Duration, what string, is func() bool) {
	t.Helper()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(most); !is(); <-tick.C {
		if time.Now().After(deadline) {
			t.Fatalf("waited in vain for %s", what)
		}
	}
}

// run starts a program that is killed with the test, and waits until it listens. Its
// errors go to a file.
func run(t *testing.T, log string, port int, program string, args ...string) *exec.Cmd {
	t.Helper()
	out, err := os.OpenFile(log, os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	cmd := exec.Command(program, args...)
	cmd.Stdout, cmd.Stderr = out, out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	within(t, 30*time.Second, filepath.Base(program)+" to listen", func() bool {
		c, err := net.DialTimeout("tcp", fmt.Sprint("127.0.0.1:", port), time.Second)
		if err == nil {
			_ = c.Close()
		}
		return err == nil
	})
	return cmd
}

// gateway is sluice serve, which can be killed and started again.
type gateway struct {
	t       *testing.T
	program string
	folder  string
	port    int
	mu      sync.Mutex
	cmd     *exec.Cmd
}

func newGateway(t *testing.T, program, model, more string) *gateway {
	t.Helper()
	g := &gateway{t: t, program: program, folder: t.TempDir(), port: freePort(t)}
	config := fmt.Sprintf(`
listener: {address: "127.0.0.1:%d"}
identity:
  insecure: {}
  rules:
  - {principals: [anonymous], methods: [inference], models: ["*"]}
backends:
- {name: model, dialect: DIALECT_TRITON, address: %q, plaintext: true}
usage: {file: usage.jsonl}
`, g.port, model) + more
	if err := os.WriteFile(filepath.Join(g.folder, "sluice.yaml"), []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	g.start()
	return g
}

func (g *gateway) address() string { return fmt.Sprint("127.0.0.1:", g.port) }

func (g *gateway) start() {
	cmd := run(g.t, filepath.Join(g.folder, "log"), g.port, g.program, "serve", "--config", filepath.Join(g.folder, "sluice.yaml"))
	g.mu.Lock()
	defer g.mu.Unlock()
	g.cmd = cmd
}

// kill ends it as if the machine had.
func (g *gateway) kill() {
	_ = g.cmd.Process.Kill()
	_ = g.cmd.Wait()
}

// stop has it end in peace: everything is settled, written down and told.
func (g *gateway) stop() {
	g.t.Helper()
	_ = g.cmd.Process.Signal(os.Interrupt)
	if err := g.cmd.Wait(); err != nil {
		log, _ := os.ReadFile(filepath.Join(g.folder, "log"))
		g.t.Errorf("the gateway ended with %v\n%s", err, log[max(0, len(log)-2000):])
	}
}

// charges is the sum of what the usage records say was charged, and of inferences.
func (g *gateway) charges() (tokens int64, records int) {
	text, err := os.ReadFile(filepath.Join(g.folder, "usage.jsonl"))
	if err != nil {
		g.t.Fatal(err)
	}
	for line := range bytes.Lines(text) {
		var r struct {
			Charges []struct {
				Budget string
				Amount json.Number
			}
		}
		if err := json.Unmarshal(line, &r); err != nil {
			continue // torn by a SIGKILL
		}
		records++
		for _, c := range r.Charges {
			n, _ := strconv.ParseInt(c.Amount.String(), 10, 64)
			if c.Budget == "team" {
				tokens += n
			}
		}
	}
	return tokens, records
}

// newModel serves a model until the test ends.
func newModel(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := grpc.NewServer()
	inference.RegisterGRPCInferenceServiceServer(s, model.New(model.Options{}))
	done := make(chan struct{})
	go func() { defer close(done); _ = s.Serve(l) }()
	t.Cleanup(func() { s.Stop(); <-done })
	return l.Addr().String()
}

// store is a real Redis or Valkey, and a connection straight to it.
type store struct {
	t       *testing.T
	address string
	client  rueidis.Client
}

func newStore(t *testing.T) *store {
	t.Helper()
	program, port := tool(t, "redis.sh"), freePort(t)
	dir := t.TempDir()
	run(t, filepath.Join(dir, "log"), port, program, "--bind", "127.0.0.1", "--port", strconv.Itoa(port), "--save", "", "--appendonly", "no", "--dir", dir)
	s := &store{t: t, address: fmt.Sprint("127.0.0.1:", port)}
	var err error
	if s.client, err = rueidis.NewClient(rueidis.ClientOption{InitAddress: []string{s.address}, DisableCache: true}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.client.Close)
	return s
}

// holding is what one gateway was granted of an account, used of it as it told, and
// until when that is its own, in Unix milliseconds.
type holding struct{ granted, used, until int64 }

// books are all accounts: what is gone of each, and what gateways hold, by account and
// gateway.
func (s *store) books() (gone int64, held map[string]map[string]holding) {
	s.t.Helper()
	ctx := context.Background()
	keys, err := s.client.Do(ctx, s.client.B().Keys().Pattern("sluice:*").Build()).AsStrSlice()
	if err != nil {
		s.t.Fatal(err)
	}
	held = map[string]map[string]holding{}
	for _, key := range keys {
		h, err := s.client.Do(ctx, s.client.B().Hgetall().Key(key).Build()).AsStrMap()
		if err != nil {
			s.t.Fatal(err)
		}
		n := func(field string) int64 { v, _ := strconv.ParseFloat(h[field], 64); return int64(v) }
		gone += n("d")
		held[key] = map[string]holding{}
		for field := range h {
			if who, is := strings.CutPrefix(field, "a:"); is {
				held[key][who] = holding{n("a:" + who), n("u:" + who), n("t:" + who)}
			}
		}
	}
	return gone, held
}

// toxiproxy stands before the store.
type toxiproxy struct {
	t            *testing.T
	api, address string
}

func newToxiproxy(t *testing.T, upstream string) *toxiproxy {
	t.Helper()
	port := freePort(t)
	run(t, filepath.Join(t.TempDir(), "log"), port, tool(t, "toxiproxy.sh"), "-host", "127.0.0.1", "-port", strconv.Itoa(port))
	p := &toxiproxy{t: t, api: fmt.Sprint("http://127.0.0.1:", port), address: fmt.Sprint("127.0.0.1:", freePort(t))}
	p.post("/proxies", map[string]any{"name": "store", "listen": p.address, "upstream": upstream, "enabled": true})
	return p
}

func (p *toxiproxy) post(path string, what map[string]any) {
	p.t.Helper()
	text, _ := json.Marshal(what)
	r, err := http.Post(p.api+path, "application/json", bytes.NewReader(text)) //nolint:noctx // it answers at once
	if err != nil {
		p.t.Fatal(err)
	}
	defer r.Body.Close()
	if reply, _ := io.ReadAll(r.Body); r.StatusCode >= 300 {
		p.t.Fatalf("toxiproxy, %s: %s", path, reply)
	}
}

// fault is a way in which the connection to the store fails.
type fault struct {
	name, kind, stream string
	attributes         map[string]any
}

var faults = []fault{
	{"down", "", "", nil},
	{"500 ms late", "latency", "downstream", map[string]any{"latency": 500}},
	{"no answer", "timeout", "downstream", map[string]any{"timeout": 0}},
	{"reset", "reset_peer", "downstream", map[string]any{"timeout": 0}},
	{"cut in a reply", "limit_data", "downstream", map[string]any{"bytes": 2000}},
	{"1 KB/s", "bandwidth", "downstream", map[string]any{"rate": 1}},
}

func (p *toxiproxy) set(f fault) {
	if f.kind == "" {
		p.post("/proxies/store", map[string]any{"enabled": false})
		return
	}
	p.post("/proxies/store/toxics", map[string]any{"name": "f", "type": f.kind, "stream": f.stream, "attributes": f.attributes})
}

func (p *toxiproxy) heal() { p.post("/reset", nil) }
