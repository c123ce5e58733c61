package budget

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// toxiproxy is a real one, between gateways and a store.
type toxiproxy struct {
	api     string
	address string // where the store seems to be
}

func newToxiproxy(t testing.TB, upstream string) *toxiproxy {
	t.Helper()
	out, err := exec.Command(filepath.Join("testdata", "toxiproxy.sh")).Output()
	if exit := new(exec.ExitError); errors.As(err, &exit) && exit.ExitCode() == 77 {
		t.Skipf("%s", exit.Stderr)
	}
	if err != nil {
		t.Fatal(err)
	}
	port := freePort(t)
	cmd := exec.Command(strings.TrimSpace(string(out)), "-host", "127.0.0.1", "-port", fmt.Sprint(port))
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	p := &toxiproxy{api: fmt.Sprintf("http://127.0.0.1:%d", port)}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		http.DefaultClient.CloseIdleConnections()
	})
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(20 * time.Second); ; <-tick.C {
		if r, err := http.Get(p.api + "/version"); err == nil {
			_ = r.Body.Close()
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("toxiproxy does not come up")
		}
	}
	p.address = p.post(t, "/proxies", map[string]any{"name": "store", "listen": "127.0.0.1:0", "upstream": upstream, "enabled": true})
	return p
}

// post tells toxiproxy something, and gives the address that it answers with.
func (p *toxiproxy) post(t testing.TB, path string, what map[string]any) string {
	t.Helper()
	text, err := json.Marshal(what)
	if err != nil {
		t.Fatal(err)
	}
	r, err := http.Post(p.api+path, "application/json", bytes.NewReader(text))
	if err != nil {
		t.Fatal(err)
	}
	defer r.Body.Close()
	reply, _ := io.ReadAll(r.Body)
	if r.StatusCode >= 300 {
		t.Fatalf("toxiproxy, %s: %s", path, reply)
	}
	var answer struct{ Listen string }
	_ = json.Unmarshal(reply, &answer)
	return answer.Listen
}

// toxic is a way in which a connection fails. The zero one is that nobody listens.
type toxic struct {
	kind, stream string
	attributes   map[string]any
}

// faults are the ways in which the connection to a store fails.
var faults = map[string]toxic{
	"down":                  {},
	"half a second late":    {"latency", "downstream", map[string]any{"latency": 500}},
	"late by chance":        {"latency", "downstream", map[string]any{"latency": 40, "jitter": 40}},
	"requests are late":     {"latency", "upstream", map[string]any{"latency": 200, "jitter": 150}},
	"no answer":             {"timeout", "downstream", map[string]any{"timeout": 0}},
	"nothing arrives":       {"timeout", "upstream", map[string]any{"timeout": 0}},
	"reset":                 {"reset_peer", "downstream", map[string]any{"timeout": 0}},
	"reset after the reply": {"reset_peer", "upstream", map[string]any{"timeout": 5}},
	"cut in a reply":        {"limit_data", "downstream", map[string]any{"bytes": 700}},
	"cut in a request":      {"limit_data", "upstream", map[string]any{"bytes": 900}},
	"slow to close":         {"slow_close", "downstream", map[string]any{"delay": 300}},
	"a thin line":           {"bandwidth", "downstream", map[string]any{"rate": 1}},
	"in small pieces":       {"slicer", "downstream", map[string]any{"average_size": 20, "size_variation": 10, "delay": 500}},
}

func (p *toxiproxy) set(t testing.TB, f toxic) {
	t.Helper()
	if f.kind == "" {
		p.post(t, "/proxies/store", map[string]any{"enabled": false})
		return
	}
	p.post(t, "/proxies/store/toxics", map[string]any{"name": "fault", "type": f.kind, "stream": f.stream, "attributes": f.attributes})
}

// heal takes all faults away.
func (p *toxiproxy) heal(t testing.TB) {
	t.Helper()
	p.post(t, "/reset", nil)
}
