// Package redistest runs a real Redis or Valkey for tests, behind a proxy that can be
// out of order.
package redistest

import (
	"errors"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// Server is a server of its own, without a port and without a file.
type Server struct {
	cmd       *exec.Cmd
	path, dir string
	socket    string
}

// New runs a server until the test ends. The script is redis.sh, which prints the
// path of the program; the test is skipped where there is none.
func New(t testing.TB, script string) *Server {
	t.Helper()
	out, err := exec.Command(script).Output()
	if exit := new(exec.ExitError); errors.As(err, &exit) && exit.ExitCode() == 77 {
		t.Skipf("%s", exit.Stderr)
	}
	if err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp("", "redis") //nolint:usetesting // a socket's path must be short
	if err != nil {
		t.Fatal(err)
	}
	s := &Server{path: strings.TrimSpace(string(out)), dir: dir, socket: filepath.Join(dir, "s")}
	s.Start(t)
	t.Cleanup(func() {
		s.Kill()
		_ = os.RemoveAll(dir)
	})
	return s
}

// Start runs the server again, empty.
func (s *Server) Start(t testing.TB) {
	t.Helper()
	_ = os.Remove(s.socket)
	s.cmd = exec.Command(s.path, "--port", "0", "--unixsocket", s.socket, "--save", "", "--appendonly", "no", "--dir", s.dir) //nolint:gosec // a test's own
	out, err := s.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := s.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	log := make([]byte, 0, 1<<16)
	for !strings.Contains(string(log), "accept connections at") {
		n, err := out.Read(log[len(log):cap(log)])
		if err != nil {
			t.Fatalf("%v\n%s", err, log)
		}
		log = log[:len(log)+n]
	}
	go func() { _, _ = io.Copy(io.Discard, out) }()
}

// Kill ends the server by SIGKILL.
func (s *Server) Kill() {
	_ = s.cmd.Process.Kill()
	_ = s.cmd.Wait()
}

// Proxy passes connections on to the server, or late, or not at all.
type Proxy struct {
	// Delay is of every answer, in nanoseconds. Mute has questions arrive, and answers not.
	Delay atomic.Int64
	Mute  atomic.Bool
	// Answers counts them.
	Answers atomic.Int64

	listener net.Listener
	down     atomic.Bool
	mu       sync.Mutex
	conns    []net.Conn
	all      sync.WaitGroup
}

// Proxy is a way to the server, until the test ends.
func (s *Server) Proxy(t testing.TB) *Proxy {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p := &Proxy{listener: l}
	p.all.Go(func() {
		for {
			in, err := l.Accept()
			if err != nil {
				return
			}
			out, err := net.Dial("unix", s.socket)
			if err != nil || p.down.Load() {
				_ = in.Close()
				continue
			}
			p.mu.Lock()
			p.conns = append(p.conns, in, out)
			p.mu.Unlock()
			p.all.Go(func() { _, _ = io.Copy(out, in); _ = out.Close() })
			p.all.Go(func() { p.answer(in, out) })
		}
	})
	t.Cleanup(func() {
		_ = l.Close()
		p.Cut(true)
		p.all.Wait()
	})
	return p
}

func (p *Proxy) answer(in, out net.Conn) {
	defer func() { _ = in.Close() }()
	b := make([]byte, 1<<16)
	for {
		n, err := out.Read(b)
		if err != nil {
			return
		}
		if d := p.Delay.Load(); d > 0 {
			<-time.After(time.Duration(d))
		}
		p.Answers.Add(1)
		if p.Mute.Load() {
			continue
		}
		if _, err := in.Write(b[:n]); err != nil {
			return
		}
	}
}

// Address is where the proxy listens.
func (p *Proxy) Address() string { return p.listener.Addr().String() }

// Cut ends all connections, and takes no more while it is down.
func (p *Proxy) Cut(down bool) {
	p.down.Store(down)
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, c := range p.conns {
		_ = c.Close()
	}
	p.conns = nil
}
