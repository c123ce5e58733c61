package main

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime/debug"
	"runtime/pprof"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// child is a process that serves at address.
type child struct {
	cmd     *exec.Cmd
	in      io.WriteCloser
	out     *bufio.Reader // nil if it is not one of ours: those end with their standard input
	address string
	done    chan error
}

// startChild runs this program again as role: "backend", "passthrough",
// "passthrough+tuned", "sluice" or "sluice+responses". With a folder of certificates it serves mTLS.
// The child ends when its standard input does, so it cannot outlive us.
func startChild(role, backend, certs, profile string) (*child, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	cmd := exec.Command(self, "child", role, backend, certs, profile)
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	c, err := spawn(cmd)
	if err != nil {
		return nil, err
	}
	c.out = bufio.NewReader(out)
	line, err := c.out.ReadString('\n')
	if err != nil {
		c.stop()
		return nil, fmt.Errorf("%s: did not start", role)
	}
	c.address = strings.TrimSpace(line)
	return c, nil
}

// startProgram runs somebody else's proxy, which is to listen at address.
func startProgram(address string, argv ...string) (*child, error) {
	c, err := spawn(exec.Command(argv[0], argv[1:]...))
	if err != nil {
		return nil, err
	}
	c.address = address
	for range 200 {
		conn, err := net.DialTimeout("tcp", address, time.Second)
		if err == nil {
			return c, conn.Close()
		}
		select {
		case err := <-c.done:
			c.done <- err
			return nil, fmt.Errorf("%s ended: %w", argv[0], err)
		case <-time.After(50 * time.Millisecond):
		}
	}
	c.stop()
	return nil, fmt.Errorf("%s does not listen at %s", argv[0], address)
}

func spawn(cmd *exec.Cmd) (*child, error) {
	in, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	c := &child{cmd: cmd, in: in, done: make(chan error, 1)}
	go func() {
		err := cmd.Wait()
		if err != nil && stderr.Len() > 0 {
			err = fmt.Errorf("%w: %s", err, bytes.TrimSpace(stderr.Bytes()))
		}
		c.done <- err
	}()
	return c, nil
}

// stop ends the process, and waits until it has ended.
func (c *child) stop() {
	_ = c.in.Close()
	if c.out == nil {
		_ = c.cmd.Process.Signal(syscall.SIGTERM)
	}
	select {
	case err := <-c.done:
		c.done <- err
	case <-time.After(5 * time.Second):
		_ = c.cmd.Process.Kill()
		c.done <- <-c.done
	}
}

// cpu is the processor time that the process has used: that of its threads, of
// which a Go program ends none. /proc/PID/stat counts in steps of 10 ms only.
func (c *child) cpu() (time.Duration, error) {
	tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/schedstat", c.cmd.Process.Pid))
	if err != nil || len(tasks) == 0 {
		return 0, errors.New("the processor time of a process: there is no /proc/PID/task/TID/schedstat (only Linux has it)")
	}
	var sum time.Duration
	for _, task := range tasks {
		text, err := os.ReadFile(task)
		if err != nil {
			return 0, err
		}
		var ns int64
		if _, err := fmt.Sscan(string(text), &ns); err != nil {
			return 0, fmt.Errorf("%s: %w", task, err)
		}
		sum += time.Duration(ns)
	}
	return sum, nil
}

// rss is the resident memory of the process in bytes. One of ours first collects its
// garbage and gives back what is free: else what it needs more of would come out of
// what its start has left.
func (c *child) rss() (int, error) {
	if c.out != nil {
		if _, err := io.WriteString(c.in, "collect\n"); err != nil {
			return 0, err
		}
		if _, err := c.out.ReadString('\n'); err != nil {
			return 0, err
		}
	}
	statm, err := os.ReadFile(fmt.Sprintf("/proc/%d/statm", c.cmd.Process.Pid))
	if err != nil {
		return 0, fmt.Errorf("the memory of a process: %w (only Linux has it)", err)
	}
	pages, err := strconv.Atoi(strings.Fields(string(statm))[1])
	return pages * os.Getpagesize(), err
}

// runChild is what a child does. The arguments are those of startChild.
func runChild(args []string) error {
	if len(args) != 4 {
		return errors.New("child is for the program's own use")
	}
	role, backend, certs, profile := args[0], args[1], args[2], args[3]
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	var stop func()
	switch role {
	case "backend":
		stop = serveBackend(l)
	case "passthrough":
		stop, err = servePassThrough(l, backend, certs)
	case "passthrough+tuned":
		stop, err = serveTuned(l, backend, certs)
	case "sluice":
		stop, err = serveGateway(l, backend, certs, false)
	case "sluice+responses":
		stop, err = serveGateway(l, backend, certs, true)
	default:
		err = fmt.Errorf("no role %q", role)
	}
	if err != nil {
		return err
	}
	defer stop()
	if profile != "" {
		if err := os.MkdirAll(filepath.Dir(profile), 0o755); err != nil {
			return err
		}
		f, err := os.Create(profile)
		if err != nil {
			return err
		}
		defer func() { _ = f.Close() }()
		if err := pprof.StartCPUProfile(f); err != nil {
			return err
		}
		defer pprof.StopCPUProfile()
	}
	fmt.Println(l.Addr())
	for in := bufio.NewScanner(os.Stdin); in.Scan(); { // see rss
		debug.FreeOSMemory()
		fmt.Println("collected")
	}
	return nil
}
