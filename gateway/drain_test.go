package gateway

import (
	"net"
	"strings"
	"sync"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"

	"github.com/sluicegate/sluice/proto/gen/inference"
)

const quick = limited + "listener: {address: x, drain_timeout: 0.2s}\n"

// begin starts streams that each have got a first message.
func (g *gate) begin(c inference.GRPCInferenceServiceClient, n, length int) []inference.GRPCInferenceService_ModelStreamInferClient {
	g.t.Helper()
	var out []inference.GRPCInferenceService_ModelStreamInferClient
	for range n {
		s, err := c.ModelStreamInfer(ctx(g.t))
		if err == nil {
			err = s.Send(ask("words", "a", words(length), number("delay_ms", 1)))
		}
		if err == nil {
			_, err = s.Recv()
		}
		if err != nil {
			g.t.Fatal(err)
		}
		out = append(out, s)
	}
	return out
}

// Streams that end while the gateway drains end well.
func TestDrainLetsCallsEnd(t *testing.T) {
	_, behind := modelServer(t)
	g := open(t, limited, behind) // 30 s
	g.eventually("it is ready", func() bool { return g.Ready() == nil })
	streams := g.begin(g.client(), 20, 50)
	down := make(chan struct{})
	go func() {
		defer close(down)
		g.Shutdown()
	}()
	g.eventually("it is not ready", func() bool { return g.Ready() != nil })
	var wg sync.WaitGroup
	for _, s := range streams {
		wg.Go(func() {
			_ = s.CloseSend()
			if n, err := drainStream(s); n != 49 || err != nil {
				t.Errorf("%d messages, %v", n, err)
			}
		})
	}
	wg.Wait()
	<-down
	if _, err := net.Dial("tcp", g.address); err == nil {
		t.Error("it still takes connections")
	}
	g.Shutdown() // again, and nothing happens
}

// Those that go on for longer are told why they end, and are charged.
func TestDrainEndsTheRest(t *testing.T) {
	m, behind := modelServer(t)
	g := open(t, quick, behind)
	g.pool.abandoned = true
	c := g.client()
	streams := g.begin(c, 20, 100_000)
	unary := make(chan error, 1)
	go func() {
		_, err := c.ModelInfer(ctx(t), ask("echo", "a", "hello", number("delay_ms", 60_000)))
		unary <- err
	}()
	g.eventually("the unary call is at work", func() bool { return m.Stats("echo").Active == 1 })
	// One sends its request for ever, one does not read.
	slow := g.raw()
	if id, err := slow.begin(modelInfer, false); err != nil || slow.WriteData(id, false, []byte{0, 0, 0, 1, 0, 1}) != nil {
		t.Fatal("the slow call", err)
	}
	g.eventually("all calls are at work", func() bool { return g.Guard().Live().Len() == 22 })
	var both sync.WaitGroup
	both.Go(g.Shutdown)
	both.Go(g.Shutdown)
	for _, s := range streams {
		_, err := drainStream(s)
		expect(t, "a stream", err, "Unavailable DRAINING")
	}
	expect(t, "the unary call", <-unary, "Unavailable DRAINING")
	expect(t, "the slow call", slow.end(1).err, "Unavailable DRAINING")
	both.Wait()
	g.nothingHeld()
	for _, a := range g.Guard().Budgets().Snapshot() {
		if a.Metric == "tokens" && a.Spent < 20*100_000 {
			t.Errorf("%d tokens were charged; the prompts alone were 2000000", a.Spent)
		}
	}
	g.eventually("the model server is idle", func() bool { return m.Stats("words").Active+m.Stats("echo").Active == 0 })
}

// Nothing of these may keep the gateway from going down: connections that never
// said a word, clients that read nothing, watchers of its health, and calls that
// come after the first GOAWAY from a client that does not answer it.
func TestDrainIsNotHeldUp(t *testing.T) {
	_, behind := modelServer(t)
	flood := script(t, func(_ string, ss grpc.ServerStream) error {
		var b []byte
		if err := ss.RecvMsg(&b); err != nil {
			return err
		}
		for answer := encode(t, chunk("flood", "a", strings.Repeat("x", 8<<10))); ; {
			if err := ss.SendMsg(answer); err != nil {
				return err
			}
		}
	})
	for name, hold := range map[string]func(*testing.T, *gate){
		"silent connection": func(t *testing.T, g *gate) {
			conn, err := net.Dial("tcp", g.address)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = conn.Close() })
			g.eventually("it is being shaken hands with", func() bool {
				g.edge.mu.Lock()
				defer g.edge.mu.Unlock()
				return len(g.edge.young) == 1
			})
		},
		"client that does not read": func(t *testing.T, g *gate) {
			s, err := g.client().ModelStreamInfer(ctx(t))
			if err == nil {
				err = s.Send(ask("flood", "a", "go"))
			}
			if err == nil {
				_, err = s.Recv()
			}
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() {
				// Its status comes behind what it did not read, and is cut off with it.
				if _, err := drainStream(s); status.Code(err) != codes.Unavailable {
					t.Errorf("the stream: %v", err)
				}
			})
		},
		"watcher": func(t *testing.T, g *gate) {
			s, err := healthpb.NewHealthClient(g.dial()).Watch(ctx(t), &healthpb.HealthCheckRequest{})
			if err != nil {
				t.Fatal(err)
			}
			if r, err := s.Recv(); err != nil || r.GetStatus() != healthpb.HealthCheckResponse_SERVING {
				t.Fatal(r, err)
			}
			t.Cleanup(func() {
				if r, err := s.Recv(); err != nil || r.GetStatus() != healthpb.HealthCheckResponse_NOT_SERVING {
					t.Errorf("got %v, %v; want the end of service", r, err)
				}
				_, err := s.Recv()
				expect(t, "the watcher", err, "Unavailable DRAINING")
			})
		},
		"client that begins more calls": func(t *testing.T, g *gate) {
			p := g.raw()
			if _, err := p.begin(modelInfer, false); err != nil {
				t.Fatal(err)
			}
			g.eventually("it has begun", func() bool { return g.Guard().Live().Len() == 1 })
			go func() { // reads nothing, so that it does not know
				for {
					if _, err := p.begin(modelInfer, false); err != nil {
						return
					}
					pause()
				}
			}()
		},
	} {
		t.Run(name, func(t *testing.T) {
			address := behind
			if name == "client that does not read" {
				address = flood
			}
			g := open(t, strings.Replace(quick, "drain_timeout", "handshake_timeout: 60s, drain_timeout", 1), address)
			g.pool.abandoned = true
			hold(t, g)
			down := make(chan struct{})
			go func() {
				defer close(down)
				g.Shutdown()
			}()
			g.eventually("it is down", func() bool {
				select {
				case <-down:
					return true
				default:
					return false
				}
			})
			if n := g.Guard().Live().Len(); n != 0 {
				t.Errorf("%d calls are at work", n)
			}
		})
	}
}

// Without Serve there is nothing to drain.
func TestShutdownWithoutServe(t *testing.T) {
	g, err := New(parse(t, base, "127.0.0.1:1"), quietOptions())
	if err != nil {
		t.Fatal(err)
	}
	if g.Ready() == nil {
		t.Error("ready, and it does not serve")
	}
	g.Shutdown()
	l := listen(t)
	if err := g.Serve(l); err != nil {
		t.Errorf("Serve after Shutdown: %v", err)
	}
	if g.Ready() == nil {
		t.Error("ready after Shutdown")
	}
	if _, err := l.Accept(); err == nil {
		t.Error("the listener is open")
	}
}
