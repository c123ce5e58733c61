//go:build linux

package mesh

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"runtime"
	"syscall"
	"testing"
	"time"
)

const (
	patience = 30 * time.Second // for what takes a second or two on an idle machine
	pause    = 20 * time.Millisecond
)

// process is a program that runs beside the test.
type process struct {
	log    string // the file with its output and errors
	pid    *os.Process
	exited chan struct{}
	err    error // of the program, once it has exited
}

// start runs a program. It does not outlive the test, however that ends.
func start(t *testing.T, log, program string, args ...string) *process {
	t.Helper()
	file, err := os.OpenFile(log, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	p := &process{log: log, exited: make(chan struct{})}
	cmd := exec.Command(program, args...)
	cmd.Stdout, cmd.Stderr = file, file
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	started := make(chan error)
	go func() {
		// Pdeathsig means the death of the thread that started the process.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		defer close(p.exited)
		err := cmd.Start()
		started <- err
		if err == nil {
			p.err = cmd.Wait()
		}
	}()
	if err := <-started; err != nil {
		t.Fatal(err)
	}
	p.pid = cmd.Process
	return p
}

// stop ends the program and waits until it has ended. It may be called twice.
func (p *process) stop() {
	_ = p.pid.Signal(syscall.SIGTERM)
	select {
	case <-p.exited:
	case <-time.After(patience):
		_ = p.pid.Kill()
		<-p.exited
	}
}

// text is what the program has said so far.
func (p *process) text() []byte {
	text, _ := os.ReadFile(p.log)
	return text
}

// says waits until the program has said something.
func (p *process) says(t *testing.T, what string) {
	t.Helper()
	waitFor(t, fmt.Sprintf("%s to say %q", p.log, what), func() error {
		if !bytes.Contains(p.text(), []byte(what)) {
			return errors.New("it has not")
		}
		return nil
	})
}

// waitFor waits until try succeeds, and returns how long that took.
func waitFor(t *testing.T, what string, try func() error) time.Duration {
	t.Helper()
	began := time.Now()
	tick := time.NewTicker(pause)
	defer tick.Stop()
	for {
		err := try()
		if err == nil {
			return time.Since(began)
		}
		if time.Since(began) > patience {
			t.Fatalf("waited %v for %s: %v", patience, what, err)
		}
		<-tick.C
	}
}

// waitUntil waits until a time has come.
func waitUntil(t *testing.T, when time.Time) {
	t.Helper()
	timer := time.NewTimer(time.Until(when))
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-t.Context().Done():
	}
}

// freePort returns a loopback port below the range from which the kernel gives ports away, so that
// nobody takes it by chance before the program that is to listen there does.
func freePort(t *testing.T) int {
	t.Helper()
	for range 100 {
		port := 20000 + rand.IntN(12000)
		if l, err := net.Listen("tcp", fmt.Sprint("127.0.0.1:", port)); err == nil {
			_ = l.Close()
			return port
		}
	}
	t.Fatal("no free port between 20000 and 32000")
	return 0
}
