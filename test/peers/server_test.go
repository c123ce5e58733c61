//go:build linux

package peers

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/types/known/emptypb"
)

const (
	readyIn = 2 * time.Minute  // a server starts in 2 to 8 s when the machine is idle
	stopIn  = 15 * time.Second // Triton unloads its models first
	pause   = 50 * time.Millisecond
)

// outOfReach is setup.sh's exit status where there is nothing to test with.
const outOfReach = 77

// environments returns the folder of each server's Python environment, which setup.sh makes where
// it is not there yet.
var environments = sync.OnceValues(func() (map[string]string, error) {
	cmd := exec.Command("bash", "setup.sh")
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		return nil, err
	}
	folders := map[string]string{}
	for line := range strings.Lines(string(out)) {
		name, folder, _ := strings.Cut(strings.TrimSpace(line), " ")
		folders[name] = folder
	}
	return folders, nil
})

// server is a real model server: servers/NAME/serve.py, for which clients/drive_NAME.py has cases.
type server struct {
	name   string
	models []string // ready before the server counts as ready

	once    sync.Once
	err     error // why it could not be started
	python  string
	port    int
	metrics int // the port of Triton's metrics
	address string
	log     string
	process *os.Process
	exited  chan struct{}
}

var servers = map[string]*server{
	"triton":   {name: "triton", models: []string{"add_sub", "bytes_echo", "codes_echo", "identity_fp32", "slow", "trtllm_like", "vllm_like"}},
	"mlserver": {name: "mlserver", models: []string{"text"}},
	"kserve":   {name: "kserve", models: []string{"text", "double"}},
	"tgis":     {name: "tgis"},
	"vllm":     {name: "vllm"},
}

// python returns the interpreter of a server's environment. It skips the test where there is none.
func python(t *testing.T, name string) string {
	t.Helper()
	if testing.Short() {
		t.Skip("real servers and clients are not run with -short")
	}
	folders, err := environments()
	var exit *exec.ExitError
	if errors.As(err, &exit) && exit.ExitCode() == outOfReach {
		t.Skip("SKIPPED: real servers and clients cannot be installed here, setup.sh says why")
	}
	if err != nil {
		t.Fatalf("setup.sh: %v", err)
	}
	return filepath.Join(folders[name], "bin", "python")
}

// running returns a server, started if this is its first use. It stays until TestMain ends.
func running(t *testing.T, name string) *server {
	t.Helper()
	s := servers[name]
	interpreter := python(t, name)
	s.once.Do(func() {
		s.python = interpreter
		s.err = s.start()
	})
	if s.err != nil {
		t.Fatalf("%s: %v\n%s", name, s.err, s.tail())
	}
	return s
}

// start starts the server, the first time or after it ended, and waits until it is ready.
func (s *server) start() error {
	program, err := filepath.Abs(filepath.Join("servers", s.name, "serve.py"))
	if err != nil {
		return err
	}
	folder := filepath.Join(scratch, s.name)
	if err := os.MkdirAll(folder, 0o700); err != nil {
		return err
	}
	s.log = filepath.Join(folder, "log")
	log, err := os.OpenFile(s.log, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	defer log.Close()
	if s.port == 0 {
		if s.port, err = freePort(); err != nil {
			return err
		}
		s.address = fmt.Sprint("127.0.0.1:", s.port)
		if s.metrics, err = freePort(); err != nil {
			return err
		}
	}
	args := []string{program, "--grpc-port", fmt.Sprint(s.port)}
	if s.name == "triton" {
		args = append(args, "--metrics-port", fmt.Sprint(s.metrics))
	}

	cmd := exec.Command(s.python, args...)
	cmd.Dir, cmd.Env, cmd.Stdout, cmd.Stderr = folder, pythonEnv(), log, log
	// A group of its own, so that what it starts can be ended with it; and if the test binary dies
	// without a word, so does the server.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGTERM}
	started := make(chan error)
	s.exited = make(chan struct{})
	go func() {
		// Pdeathsig means the death of the thread that started the process.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		defer close(s.exited)
		err := cmd.Start()
		started <- err
		if err == nil {
			_ = cmd.Wait()
			_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) // what it left behind, if it crashed
		}
	}()
	if err := <-started; err != nil {
		return err
	}
	s.process = cmd.Process
	return s.ready()
}

// ready waits until the server and its models say that they are.
func (s *server) ready() error {
	ctx, cancel := context.WithTimeout(context.Background(), readyIn)
	defer cancel()
	go func() {
		select {
		case <-s.exited:
			cancel()
		case <-ctx.Done():
		}
	}()
	conn, err := grpc.NewClient(s.address,
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: pause, Multiplier: 1, MaxDelay: pause},
			MinConnectTimeout: readyIn,
		}))
	if err != nil {
		return err
	}
	defer conn.Close()
	for _, model := range append([]string{""}, s.models...) {
		for !isReady(ctx, conn, model) {
			select {
			case <-s.exited:
				return errors.New("it ended before it was ready")
			case <-ctx.Done():
				return fmt.Errorf("not ready after %v (model %q)", readyIn, model)
			case <-time.After(pause):
			}
		}
	}
	return nil
}

// isReady asks whether a model is ready, or with "" the server. Request and response are so small
// that they are read here: {name: 1 string} and {ready: 1 bool}.
func isReady(ctx context.Context, conn *grpc.ClientConn, model string) bool {
	method, request, response := "ServerReady", new(emptypb.Empty), new(emptypb.Empty)
	if model != "" {
		method = "ModelReady"
		name := protowire.AppendTag(nil, 1, protowire.BytesType)
		request.ProtoReflect().SetUnknown(protowire.AppendString(name, model))
	}
	err := conn.Invoke(ctx, "/inference.GRPCInferenceService/"+method, request, response, grpc.WaitForReady(true))
	return err == nil && bytes.Equal(response.ProtoReflect().GetUnknown(), []byte{1 << 3, 1})
}

// crashed says whether the server has ended, or does so in a moment.
func (s *server) crashed() bool {
	select {
	case <-s.exited:
		return true
	case <-time.After(5 * time.Second):
		return false
	}
}

// stop ends the server and whatever it started.
func (s *server) stop() {
	if s.process == nil {
		return
	}
	_ = s.process.Signal(syscall.SIGTERM)
	select {
	case <-s.exited:
	case <-time.After(stopIn):
		_ = s.process.Kill()
		<-s.exited
	}
}

// logged waits until a text is in what the server logged from an offset on.
func (s *server) logged(ctx context.Context, offset int64, text string) error {
	for {
		log, err := os.ReadFile(s.log)
		if err != nil {
			return err
		}
		if bytes.Contains(log[offset:], []byte(text)) {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%s logged no %q", s.name, text)
		case <-time.After(pause):
		}
	}
}

// logSize is the offset at which the server's next log line begins.
func (s *server) logSize(t *testing.T) int64 {
	t.Helper()
	info, err := os.Stat(s.log)
	if err != nil {
		t.Fatal(err)
	}
	return info.Size()
}

// tail returns the end of the server's log.
func (s *server) tail() string {
	log, _ := os.ReadFile(s.log)
	return string(log[max(0, len(log)-4000):])
}

// freePort returns a loopback port below the range from which the kernel gives ports away, so that
// nobody takes it by chance before the server does.
func freePort() (int, error) {
	for range 100 {
		port := 20000 + rand.IntN(12000)
		l, err := net.Listen("tcp", fmt.Sprint("127.0.0.1:", port))
		if err == nil {
			return port, l.Close()
		}
	}
	return 0, errors.New("no free port between 20000 and 32000")
}

// pythonEnv is the environment of the Python programs here: they leave no bytecode in the source
// tree, and never go through a proxy.
func pythonEnv() []string {
	return append(os.Environ(), "PYTHONDONTWRITEBYTECODE=1", "no_grpc_proxy=127.0.0.1,localhost")
}
