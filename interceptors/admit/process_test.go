package admit

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	configv1 "github.com/sluicegate/sluice/proto/gen/sluice/config/v1"
)

// A gateway that was killed is missed for its lease, and no longer.
func TestKilledGatewayGivesBackAfterItsLease(t *testing.T) {
	s := store(t)
	c := common(16, 100, 2*time.Second, whileHeld)
	lost := process(t, s.Proxy(t).Address(), c)
	if got := lost.say("take 16"); got != "16" {
		t.Fatalf("the first took %s", got)
	}
	p, _ := gatewayOf(t, s, c)
	waiting := take(t, p, 16)
	eventually(t, "it knows of the other", func() bool {
		s := p.Snapshot()[0].Sharing
		return s.Gateways == 2 && s.InUse == 16
	})
	began := time.Now()
	lost.kill()
	if got := p.Snapshot()[0].InUse; got != 0 {
		t.Errorf("%d begun at once", got)
	}
	eventually(t, "the permits are back", func() bool { return p.Snapshot()[0].InUse == 16 })
	t.Logf("back after %v, with a lease of 2 s", time.Since(began).Round(time.Millisecond))
	endAll(waiting)
	atRest(t, p)
}

// A gateway that is cut off while both are full of short inferences: all that it began
// has ended before the other has its permits, so that never more run than there are.
func TestPartitionUnderLoad(t *testing.T) {
	const capacity = 8
	s := store(t)
	c := common(capacity, 100, 2*time.Second, whileHeld)
	a, way := gatewayOf(t, s, c)
	b, _ := gatewayOf(t, s, c)
	var inUse, most, other atomic.Int64
	stop := make(chan struct{})
	var all sync.WaitGroup
	load := func(p *Policy, mine *atomic.Int64) {
		for range 2 * capacity {
			all.Go(func() {
				for {
					select {
					case <-stop:
						return
					default:
					}
					v, d := start(t, p, context.Background(), "1")
					if d != nil { // it is cut off
						<-time.After(time.Millisecond)
						continue
					}
					if v.Wait(context.Background()) == nil {
						now := inUse.Add(1)
						for old := most.Load(); now > old && !most.CompareAndSwap(old, now); old = most.Load() {
						}
						mine.Add(1)
						<-time.After(5 * time.Millisecond)
						mine.Add(-1)
						inUse.Add(-1)
					}
					v.End(well)
				}
			})
		}
	}
	load(a, new(atomic.Int64))
	load(b, &other)
	eventually(t, "both work", func() bool { return a.Snapshot()[0].InUse == 4 && b.Snapshot()[0].InUse == 4 })
	way.Cut(true)
	eventually(t, "the other has all", func() bool { return other.Load() == capacity })
	way.Cut(false)
	eventually(t, "both work again", func() bool { return a.Snapshot()[0].InUse == 4 })
	close(stop)
	all.Wait()
	if most.Load() != capacity {
		t.Errorf("%d ran at once, want %d", most.Load(), capacity)
	}
	atRest(t, a)
	atRest(t, b)
}

// A gateway that stood still for longer than its lease begins nothing with what it
// held before.
func TestPausedGatewayCannotUseALapsedLease(t *testing.T) {
	s := store(t)
	c := common(16, 0, time.Second, whileHeld)
	slept := process(t, s.Proxy(t).Address(), c)
	p, _ := gatewayOf(t, s, c)
	eventually(t, "both have half", func() bool {
		return p.Snapshot()[0].Sharing.Gateways == 2 && p.Snapshot()[0].Capacity == 8 && slept.say("capacity") == "8"
	})
	slept.signal(syscall.SIGSTOP)
	var all []*part
	eventually(t, "all are ours", func() bool {
		all = append(all, take(t, p, 16)...)
		return len(all) == 16
	})
	slept.write("take 16") // it reads this first when it goes on
	slept.signal(syscall.SIGCONT)
	if got := slept.read(); got != "0" {
		t.Errorf("it began %s, and 16 of 16 run elsewhere", got)
	}
	if got := slept.say("take 16"); got != "0" {
		t.Errorf("later it began %s", got)
	}
	endAll(all)
	eventually(t, "it has a lease again", func() bool { return slept.say("take 1") == "1" })
	atRest(t, p)
}

// child is a gateway in a process of its own.
type child struct {
	t   *testing.T
	cmd *exec.Cmd
	in  io.Writer
	out *bufio.Scanner
}

func process(t *testing.T, address string, c *configv1.Pool) *child {
	t.Helper()
	cmd := exec.Command(os.Args[0], "-test.run=^TestGatewayProcess$")
	cmd.Env = append(os.Environ(), "GATEWAY_STORE="+address, fmt.Sprintf("GATEWAY_POOL=%d %d %s", c.Capacity, c.QueueLength, c.Share.Lease.AsDuration()))
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	g := &child{t, cmd, in, bufio.NewScanner(out)}
	t.Cleanup(g.kill)
	if got := g.read(); got != "ready" {
		t.Fatalf("the process says %q", got)
	}
	return g
}

func (g *child) write(line string) { _, _ = io.WriteString(g.in, line+"\n") }

func (g *child) read() string {
	g.t.Helper()
	if !g.out.Scan() {
		g.t.Fatal("the process has ended")
	}
	return g.out.Text()
}

func (g *child) say(line string) string {
	g.t.Helper()
	g.write(line)
	return g.read()
}

func (g *child) signal(s os.Signal) {
	if err := g.cmd.Process.Signal(s); err != nil {
		g.t.Fatal(err)
	}
}

func (g *child) kill() {
	_ = g.cmd.Process.Kill()
	_ = g.cmd.Wait()
}

// TestGatewayProcess is the other process.
func TestGatewayProcess(t *testing.T) {
	address := os.Getenv("GATEWAY_STORE")
	if address == "" {
		t.Skip("it is for other tests")
	}
	f := strings.Fields(os.Getenv("GATEWAY_POOL"))
	capacity, _ := strconv.Atoi(f[0])
	queue, _ := strconv.Atoi(f[1])
	lease, _ := time.ParseDuration(f[2])
	p := shareAt(t, address, common(uint32(capacity), uint32(queue), lease, whileHeld))
	fmt.Println("ready")
	for in := bufio.NewScanner(os.Stdin); in.Scan(); {
		switch f := strings.Fields(in.Text()); f[0] {
		case "take":
			n, _ := strconv.Atoi(f[1])
			begun := 0
			for _, v := range take(t, p, n) {
				if v.Ready() {
					begun++
				}
			}
			fmt.Println(begun)
		case "capacity":
			fmt.Println(p.Snapshot()[0].Capacity)
		}
	}
}
