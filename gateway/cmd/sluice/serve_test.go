package main

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"github.com/sluicegate/sluice/interceptors/identity"
	"github.com/sluicegate/sluice/proto/gen/inference"
	configv1 "github.com/sluicegate/sluice/proto/gen/sluice/config/v1"
	"github.com/sluicegate/sluice/test/model"
)

// patience bounds every wait: far more than a loaded machine needs.
const patience = time.Minute

// transcript is what a program says, line by line.
type transcript struct {
	mu    sync.Mutex
	rest  string
	lines []string
	more  chan struct{} // closed and made anew when there is more
}

func newTranscript() *transcript { return &transcript{more: make(chan struct{})} }

func (s *transcript) Write(b []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.rest += string(b)
	for {
		line, rest, ok := strings.Cut(s.rest, "\n")
		if !ok {
			break
		}
		s.lines, s.rest = append(s.lines, line), rest
	}
	close(s.more)
	s.more = make(chan struct{})
	return len(b), nil
}

// await is the next line that holds all the words, after the line that it
// returned before.
func (s *transcript) await(t *testing.T, words ...string) string {
	t.Helper()
	late := time.After(patience)
	for {
		s.mu.Lock()
		for n, line := range s.lines {
			holds := true
			for _, w := range words {
				holds = holds && strings.Contains(line, w)
			}
			if holds {
				s.lines = s.lines[n+1:]
				s.mu.Unlock()
				return line
			}
		}
		more, lines := s.more, strings.Join(s.lines, "\n")
		s.mu.Unlock()
		select {
		case <-more:
		case <-late:
			t.Fatalf("it did not say %q, but\n%s", words, lines)
		}
	}
}

// served is a running sluice serve.
type served struct {
	file, address, admin string
	log                  *transcript
	signal               func(os.Signal)
	ended                func(*testing.T) int // waits for its end, and gives the exit status
}

// words is the model server that the gateways of these tests guard.
func words(t *testing.T) (address string) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := grpc.NewServer()
	inference.RegisterGRPCInferenceServiceServer(s, model.New(model.Options{}))
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = s.Serve(l)
	}()
	t.Cleanup(func() {
		s.Stop()
		<-done
	})
	return l.Addr().String()
}

// addresses reads where it listens.
func (s *served) addresses(t *testing.T, out *transcript) {
	t.Helper()
	line := s.log.await(t, `"msg":"admin"`)
	_, rest, _ := strings.Cut(line, `"address":"`)
	s.admin, _, _ = strings.Cut(rest, `"`)
	s.address = strings.TrimPrefix(out.await(t, "sluice: serving on "), "sluice: serving on ")
}

// inProcess runs sluice serve in this process.
func inProcess(t *testing.T, file string) *served {
	t.Helper()
	out, errs := newTranscript(), newTranscript()
	done := make(chan int, 1)
	go func() { done <- run([]string{"serve", "--config", file}, nil, out, errs) }()
	over := false
	s := &served{file: file, log: errs}
	s.signal = func(sig os.Signal) {
		if err := syscall.Kill(os.Getpid(), sig.(syscall.Signal)); err != nil {
			t.Error(err)
		}
	}
	s.ended = func(t *testing.T) int {
		t.Helper()
		over = true
		select {
		case rc := <-done:
			return rc
		case <-time.After(patience):
			t.Fatal("it does not end")
			return -1
		}
	}
	s.addresses(t, out)
	t.Cleanup(func() {
		if !over {
			s.signal(syscall.SIGTERM)
			s.ended(t)
		}
	})
	return s
}

// asProcess runs sluice serve as a process of its own.
func asProcess(t *testing.T, file string) *served {
	t.Helper()
	out, errs := newTranscript(), newTranscript()
	cmd := exec.Command(os.Args[0], "serve", "--config", file)
	cmd.Env = append(os.Environ(), asProgram+"=1")
	cmd.Stdout, cmd.Stderr = out, errs
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cmd.Process.Kill() })
	s := &served{file: file, log: errs}
	s.signal = func(sig os.Signal) {
		if err := cmd.Process.Signal(sig); err != nil {
			t.Error(err)
		}
	}
	s.ended = func(t *testing.T) int {
		t.Helper()
		stuck := time.AfterFunc(patience, func() { _ = cmd.Process.Kill() })
		defer stuck.Stop()
		_ = cmd.Wait()
		return cmd.ProcessState.ExitCode()
	}
	s.addresses(t, out)
	return s
}

func get(t *testing.T, url string) (int, string) {
	t.Helper()
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: patience}
	r, err := client.Get(url)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = r.Body.Close() }()
	body, err := io.ReadAll(r.Body)
	if err != nil {
		t.Fatal(err)
	}
	return r.StatusCode, string(body)
}

func reasonOf(err error) string {
	for _, d := range status.Convert(err).Details() {
		if info, ok := d.(*errdetails.ErrorInfo); ok {
			return info.GetReason()
		}
	}
	return ""
}

// insecureGateway is a gateway without identity, in front of a model server.
func insecureGateway(t *testing.T) (file, text string) {
	t.Helper()
	text = strings.Replace(plain, "127.0.0.1:1\"", words(t)+"\"", 1) + "admin: {address: \"127.0.0.1:0\"}\n"
	return write(t, filepath.Join(t.TempDir(), "sluice.yaml"), text), text
}

func dial(t *testing.T, address string) inference.GRPCInferenceServiceClient {
	t.Helper()
	conn, err := grpc.NewClient(address, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return inference.NewGRPCInferenceServiceClient(conn)
}

// The whole of it: identities from "sluice issue", mutual TLS, health and
// metrics, and the end.
func TestServe(t *testing.T) {
	dir := t.TempDir()
	if rc, _, errs := said("", "issue", "--directory", filepath.Join(dir, "keys"), "/gateway", "/alice", "/bob"); rc != 0 {
		t.Fatal(errs)
	}
	files := func(name string) string {
		return "files: {certificate: keys/" + name + ".pem, key: keys/" + name + "-key.pem, bundle: keys/bundle.pem}"
	}
	text := strings.NewReplacer("insecure: {}", files("gateway"), "anonymous", "spiffe://sluice.dev/alice", "[words]", "[echo]",
		"127.0.0.1:1\"", words(t)+"\"").Replace(plain) + "admin: {address: \"127.0.0.1:0\"}\n"
	s := inProcess(t, write(t, filepath.Join(dir, "sluice.yaml"), text))

	for path, want := range map[string]string{"/livez": "ok", "/readyz": "ok"} {
		if code, body := get(t, "http://"+s.admin+path); code != http.StatusOK || strings.TrimSpace(body) != want {
			t.Errorf("%s: %d %q", path, code, body)
		}
	}
	if code, _ := get(t, "http://"+s.admin+"/secrets"); code != http.StatusNotFound {
		t.Errorf("/secrets: %d", code)
	}
	for name, want := range map[string]string{"alice": "", "bob": "METHOD_DENIED"} {
		key := filepath.Join(dir, "keys", name)
		source, err := identity.Open(t.Context(), &configv1.Identity{Source: &configv1.Identity_Files{Files: &configv1.IdentityFiles{
			Certificate: key + ".pem", Key: key + "-key.pem", Bundle: filepath.Join(dir, "keys", "bundle.pem"),
		}}}, nil)
		if err != nil {
			t.Fatal(err)
		}
		gateway := spiffeid.MatchID(spiffeid.RequireFromString("spiffe://sluice.dev/gateway"))
		conn, err := grpc.NewClient(s.address, grpc.WithTransportCredentials(identity.ClientCredentials(source, gateway, nil)))
		if err != nil {
			t.Fatal(err)
		}
		_, err = inference.NewGRPCInferenceServiceClient(conn).ModelInfer(t.Context(), prompt("echo", "a private question"))
		if reasonOf(err) != want || (err != nil) != (want != "") {
			t.Errorf("%s: %v, want %q", name, err, want)
		}
		_ = conn.Close()
		_ = source.Close()
	}
	code, body := get(t, "http://"+s.admin+"/metrics")
	for _, want := range []string{"gen_ai_server_request_duration", "sluice_denials", "METHOD_DENIED"} {
		if code != http.StatusOK || !strings.Contains(body, want) {
			t.Errorf("/metrics: %d, without %s:\n%s", code, want, body)
		}
	}
	s.log.await(t, "WARN", "METHOD_DENIED", "spiffe://sluice.dev/bob")
	s.signal(syscall.SIGTERM)
	if rc := s.ended(t); rc != 0 {
		t.Errorf("exit status %d", rc)
	}
	s.log.await(t, "draining")
	s.log.await(t, "stopped")
	if _, err := net.Dial("tcp", s.admin); err == nil {
		t.Error("the admin listener is still there")
	}
}

func TestReload(t *testing.T) {
	file, text := insecureGateway(t)
	s := inProcess(t, file)
	c := dial(t, s.address)
	ask := func(want string) {
		t.Helper()
		_, err := c.ModelInfer(t.Context(), prompt("echo", "hi"))
		if reasonOf(err) != want {
			t.Errorf("got %v, want %q", err, want)
		}
	}
	ask("MODEL_DENIED")

	allowed := strings.Replace(text, "[words]", "[words, echo]", 1)
	write(t, file, allowed)
	s.log.await(t, `"msg":"reloaded"`, file)
	ask("")

	s.signal(syscall.SIGHUP)
	s.log.await(t, `"msg":"reloaded"`)
	ask("")

	// Bad ones change nothing, and the log says where they are bad.
	write(t, file, strings.Replace(allowed, "[inference]", "[inference, 7]", 1))
	s.log.await(t, "ERROR", "the old one stays in force", file+`:6:26 identity.rules[0].methods[1]: `)
	write(t, file, strings.Replace(allowed, "insecure:", "insecurity:", 1))
	s.log.await(t, "ERROR", "the old one stays in force", file+`:3:3 unknown field`)
	ask("")

	// As Kubernetes does with a mounted ConfigMap: the folder's link is turned.
	folder := filepath.Dir(file)
	write(t, filepath.Join(folder, "next.yaml"), text)
	if err := os.Symlink("next.yaml", filepath.Join(folder, "link")); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(filepath.Join(folder, "link"), file); err != nil {
		t.Fatal(err)
	}
	s.log.await(t, `"msg":"reloaded"`)
	ask("MODEL_DENIED")
}

// SIGTERM lets the calls in flight end.
func TestDrain(t *testing.T) {
	file, _ := insecureGateway(t)
	s := inProcess(t, file)
	stream, err := dial(t, s.address).ModelStreamInfer(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	exchange := func() {
		t.Helper()
		if err := stream.Send(prompt("words", "one")); err != nil {
			t.Fatal(err)
		}
		if r, err := stream.Recv(); err != nil || r.GetErrorMessage() != "" {
			t.Fatalf("%v, %v", r, err)
		}
	}
	exchange()
	s.signal(syscall.SIGTERM)
	s.log.await(t, "draining")
	late := time.After(patience)
	for { // until it is known that it takes no more
		code, _ := get(t, "http://"+s.admin+"/readyz")
		if code == http.StatusServiceUnavailable {
			break
		}
		select {
		case <-late:
			t.Fatal("it stays ready")
		default:
		}
	}
	if code, _ := get(t, "http://"+s.admin+"/livez"); code != http.StatusOK {
		t.Errorf("while draining it is alive: %d", code)
	}
	exchange()
	if err := stream.CloseSend(); err != nil {
		t.Fatal(err)
	}
	for err == nil {
		_, err = stream.Recv()
	}
	if !errors.Is(err, io.EOF) {
		t.Errorf("the stream ended with %v", err)
	}
	if rc := s.ended(t); rc != 0 {
		t.Errorf("exit status %d", rc)
	}
}

// A second signal does not wait for them.
func TestSecondSignal(t *testing.T) {
	file, _ := insecureGateway(t)
	s := asProcess(t, file)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	stream, err := dial(t, s.address).ModelStreamInfer(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if err := stream.Send(prompt("words", "one")); err != nil {
		t.Fatal(err)
	}
	if _, err := stream.Recv(); err != nil {
		t.Fatal(err)
	}
	s.signal(syscall.SIGTERM)
	s.log.await(t, "draining")
	s.signal(os.Interrupt)
	if rc := s.ended(t); rc != 1 {
		t.Errorf("exit status %d, want 1", rc)
	}
	for err == nil {
		_, err = stream.Recv()
	}
	if status.Code(err) != codes.Unavailable {
		t.Errorf("the stream ended with %v", err)
	}
}

// SIGHUP may come as soon as the program does.
func TestHangupDoesNotEndIt(t *testing.T) {
	file, _ := insecureGateway(t)
	s := asProcess(t, file)
	s.signal(syscall.SIGHUP)
	s.log.await(t, `"msg":"reloaded"`)
	s.signal(syscall.SIGTERM)
	if rc := s.ended(t); rc != 0 {
		t.Errorf("exit status %d", rc)
	}
}

func TestServeRefusesToStart(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	taken := l.Addr().String()
	file := filepath.Join(t.TempDir(), "sluice.yaml")
	tests := []struct{ name, old, new, want string }{
		{"port in use", "127.0.0.1:0", taken, file + ":1:21 listener.address: listen tcp " + taken},
		{"admin port in use", "backends:", "admin: {address: \"" + taken + "\"}\nbackends:", file + ":8:18 admin.address: listen tcp " + taken},
		{"no listener", `listener: {address: "127.0.0.1:0"}`, "", file + ": listener: the gateway needs an address"},
		{"no address of a model server", `address: "127.0.0.1:1", `, "", file + ":9:3 backends[0]"},
		{"bad rule", "[inference]", "[inferring]", file + ":6:15 identity.rules[0].methods[0]: "},
		{"certificates that are not there", "insecure: {}\n  rules:\n  - principals: [anonymous]",
			"files: {certificate: a, key: b, bundle: c}\n  rules:\n  - principals: [\"spiffe://a/b\"]", file + ":3:24 identity.files.certificate: open "},
		{"telemetry", "backends:", "telemetry: {otlp_address: \"\\x7f\"}\nbackends:", file + ":8:"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			write(t, file, strings.Replace(plain, tt.old, tt.new, 1))
			rc, out, errs := said("", "serve", "--config", file)
			if rc != 1 || out != "" || !strings.Contains(errs, "sluice serve: "+tt.want) {
				t.Errorf("exit status %d, %q, %q; want 1, %q", rc, out, errs, tt.want)
			}
		})
	}
}
