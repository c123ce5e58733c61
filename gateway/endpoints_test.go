package gateway

import (
	"context"
	"fmt"
	"net"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/sluicegate/sluice/gateway/endpoints"
	"github.com/sluicegate/sluice/interceptors/config"
	"github.com/sluicegate/sluice/interceptors/identity"
	"github.com/sluicegate/sluice/proto/gen/inference"
	"github.com/sluicegate/sluice/test/model"
)

// several is a back end with these servers, and books that can be checked.
func several(more string, addresses ...string) string {
	return fmt.Sprintf(strings.Replace(limited, "plaintext: true", `plaintext: true, addresses: ["%s"]%s`, 1), strings.Join(addresses, `", "`), more)
}

// restarting is a model server that can be ended and begun again where it was.
type restarting struct {
	t       *testing.T
	address string
	model   *model.Server

	server *grpc.Server
	done   chan struct{}
}

func newRestarting(t *testing.T) *restarting {
	l := listen(t)
	r := &restarting{t: t, address: l.Addr().String(), model: model.New(model.Options{})}
	r.begin(l)
	t.Cleanup(func() { r.end((*grpc.Server).Stop) })
	return r
}

func (r *restarting) begin(l net.Listener) {
	r.server, r.done = grpc.NewServer(grpc.WaitForHandlers(true)), make(chan struct{})
	inference.RegisterGRPCInferenceServiceServer(r.server, r.model)
	go func(s *grpc.Server, done chan struct{}) {
		defer close(done)
		_ = s.Serve(l)
	}(r.server, r.done)
}

func (r *restarting) end(how func(*grpc.Server)) {
	how(r.server)
	<-r.done
}

func (r *restarting) again() {
	l, err := net.Listen("tcp", r.address)
	if err != nil {
		r.t.Fatal(err)
	}
	r.begin(l)
}

// load makes calls of both kinds until it is stopped, and gives what came of them.
func (g *gate) load(callers int, o ...grpc.DialOption) (stop func() (ok, failed int64, errs []error)) {
	ctx, cancel := context.WithCancel(ctx(g.t))
	var wg sync.WaitGroup
	var good, bad atomic.Int64
	var mu sync.Mutex
	var errs []error
	over := make(chan struct{})
	for n := range callers {
		c := g.client(o...)
		kind := []string{"unary", "stream"}[n%2]
		wg.Go(func() {
			for {
				select {
				case <-over:
					return
				default:
				}
				if _, _, err := kinds[kind](ctx, c); err != nil {
					bad.Add(1)
					mu.Lock()
					errs = append(errs, fmt.Errorf("%s: %w", kind, err))
					mu.Unlock()
				} else {
					good.Add(1)
				}
			}
		})
	}
	return func() (int64, int64, []error) {
		close(over)
		wg.Wait()
		cancel()
		return good.Load(), bad.Load(), errs
	}
}

// unloaded checks that no server is held to have something of ours.
func (g *gate) unloaded() {
	g.t.Helper()
	g.eventually("no server is loaded", func() bool {
		for _, servers := range g.Servers() {
			for _, s := range servers {
				if s.Load != 0 {
					return false
				}
			}
		}
		return true
	})
}

func (g *gate) ready(n int) {
	g.t.Helper()
	g.eventually(fmt.Sprint(n, " servers are ready"), func() bool {
		ready := 0
		for _, s := range g.Servers()["model"] {
			if s.Ready {
				ready++
			}
		}
		return ready == n
	})
}

// charged is how many requests the budget has counted.
func (g *gate) charged() int64 {
	for _, a := range g.Guard().Budgets().Snapshot() {
		if a.Metric == "requests" {
			return a.Spent
		}
	}
	return -1
}

// Servers end one after the other, as they should, and come back: no call fails.
func TestRollingRestart(t *testing.T) {
	servers := []*restarting{newRestarting(t), newRestarting(t), newRestarting(t)}
	g := open(t, several("", servers[0].address, servers[1].address, servers[2].address))
	g.pool.abandoned = true
	stop := g.load(8)
	g.ready(3)
	for range 2 {
		for _, s := range servers {
			before := g.charged()
			s.end((*grpc.Server).GracefulStop)
			g.ready(2)
			g.eventually("calls go on", func() bool { return g.charged() > before+100 })
			s.again()
			g.ready(3)
		}
	}
	ok, failed, errs := stop()
	if failed != 0 || ok < 500 {
		t.Errorf("%d calls were served, %d failed: %v", ok, failed, errs[:min(3, len(errs))])
	}
	if got := g.charged(); got != ok {
		t.Errorf("%d were charged, %d were served", got, ok)
	}
	g.unloaded()
}

// A server is killed under load: what it was at work on fails, or is made again if
// the configuration says so and nothing was answered; everything is charged once and
// given back.
func TestAServerIsKilled(t *testing.T) {
	for _, config := range []string{"", ", retries: 2"} {
		t.Run(config, func(t *testing.T) {
			a, b := newRestarting(t), newRestarting(t)
			g := open(t, several(config, a.address, b.address))
			g.pool.abandoned = true
			stop := g.load(8)
			g.ready(2)
			for _, s := range []*restarting{a, b} {
				before := g.charged()
				s.end((*grpc.Server).Stop)
				g.ready(1)
				g.eventually("calls go on", func() bool { return g.charged() > before+200 })
				s.again()
				g.ready(2)
			}
			ok, failed, errs := stop()
			if failed > 2*8 || ok < 400 { // callers, for each kill
				t.Errorf("%d calls were served, %d failed: %v", ok, failed, errs[:min(3, len(errs))])
			}
			for _, err := range errs {
				if status.Code(err) != codes.Unavailable {
					t.Error(err)
				}
				noAddress(t, err, a.address)
				noAddress(t, err, b.address)
			}
			if got := g.charged(); got != ok+failed {
				t.Errorf("%d were charged of %d", got, ok+failed)
			}
			g.unloaded()
		})
	}
}

// A server that fails is left alone; its callers have no part in it.
func TestAServerThatFailsIsLeftAlone(t *testing.T) {
	for name, c := range map[string]struct {
		do    func(ss grpc.ServerStream) error
		alone bool
	}{
		"unavailable":         {func(grpc.ServerStream) error { return status.Error(codes.Unavailable, "") }, true},
		"too much to do":      {func(grpc.ServerStream) error { return status.Error(codes.ResourceExhausted, "") }, false},
		"a bad prompt":        {func(grpc.ServerStream) error { return status.Error(codes.InvalidArgument, "") }, false},
		"an error of a model": {func(grpc.ServerStream) error { return status.Error(codes.Internal, "") }, false},
		"slow, and given up": {func(ss grpc.ServerStream) error {
			<-ss.Context().Done()
			return ss.Context().Err()
		}, false},
	} {
		for kind, call := range kinds {
			t.Run(name+", "+kind, func(t *testing.T) {
				bad, good, _ := failing(t, c.do)
				g := open(t, several("", bad, good))
				g.pool.abandoned = true
				client := g.client()
				once := func() {
					ctx, cancel := context.WithCancel(ctx(t))
					defer cancel()
					if name == "slow, and given up" {
						ctx, cancel = context.WithTimeout(ctx, 20*time.Millisecond)
						defer cancel()
					}
					_, _, _ = call(ctx, client)
				}
				once()
				g.ready(2)
				for range 40 {
					once()
				}
				left := slices.ContainsFunc(g.Servers()["model"], func(s endpoints.State) bool { return s.Ejected && s.Address == bad })
				if left != c.alone {
					t.Errorf("left alone: %v, want %v", left, c.alone)
				}
			})
		}
	}
}

// Each of several servers has to prove who it is.
func TestEachServerProvesWhoItIs(t *testing.T) {
	authority, err := identity.NewAuthority(spiffeid.RequireTrustDomainFromString("gate.test"))
	if err != nil {
		t.Fatal(err)
	}
	source := func(path string) *identity.Source {
		s, err := authority.SourceFor(time.Hour, path)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = s.Close() })
		return s
	}
	one, first := modelServer(t, grpc.Creds(identity.ServerCredentials(source("/models/one"), nil)))
	two, second := modelServer(t, grpc.Creds(identity.ServerCredentials(source("/models/two"), nil)))
	other, third := modelServer(t, grpc.Creds(identity.ServerCredentials(source("/other"), nil)))
	g := openWith(t, fmt.Sprintf(`
identity: {development: {trust_domain: gate.test}, rules: [{principals: ["spiffe://gate.test/client"], methods: [inference], models: ["*"]}]}
backends: [{name: model, dialect: DIALECT_TRITON, spiffe_id: "spiffe://gate.test/models/*", addresses: ["%s", "%s", "%s"]}]
`, first, second, third), config.Options{Source: source("/gateway")})
	c := g.client(grpc.WithTransportCredentials(identity.ClientCredentials(source("/client"), spiffeid.MatchAny(), nil)))
	for range 2 {
		for range 40 {
			if _, err := c.ModelInfer(ctx(t), ask("echo", "a", "hello")); err != nil {
				t.Fatal(err)
			}
		}
		g.ready(2)
	}
	if one.Seen() == 0 || two.Seen() == 0 || other.Seen() != 0 {
		t.Errorf("asked %d, %d and %d times", one.Seen(), two.Seen(), other.Seen())
	}
}

// What waits at the model servers lowers the capacity of their pool.
func TestServersThatReportAQueueLowerThePool(t *testing.T) {
	text := strings.Replace(several("", script(t, func(method string, ss grpc.ServerStream) error {
		ss.SetTrailer(metadata.Pairs("endpoint-load-metrics", "TEXT named_metrics.num_requests_waiting=9"))
		return answerOne(method, ss)
	})), "capacity: 1000", "capacity: 1000, adaptive: {max_waiting: 8}", 1)
	for kind, call := range kinds {
		g := open(t, text)
		if _, _, err := call(ctx(t), g.client()); err != nil {
			t.Fatal(err)
		}
		g.eventually(kind+": the capacity is lower", func() bool { return g.Guard().Pools().Snapshot()[0].Capacity == 900 })
		if got := g.Servers()["model"][0].Reported; got.Waiting != 9 {
			t.Errorf("%s: reported %+v", kind, got)
		}
	}
}

// A stream loads its server with the inferences that are at work, each with its
// permits; one that is only open is no load.
func TestAStreamLoadsItsServer(t *testing.T) {
	m, behind := modelServer(t)
	text := strings.Replace(several("", behind), `models: [{model: "*"}]`, `models: [{model: words, weight: 3}, {model: "*"}]`, 1)
	g := open(t, text)
	s, err := g.client().ModelStreamInfer(ctx(t))
	if err != nil {
		t.Fatal(err)
	}
	load := func() int64 {
		servers := g.Servers()["model"]
		if len(servers) != 1 {
			return -1
		}
		return servers[0].Load
	}
	for round := range 2 {
		for n := range 2 {
			if err := s.Send(ask("words", fmt.Sprint(n), words(2), number("delay_ms", 200))); err != nil {
				t.Fatal(err)
			}
		}
		g.eventually("both are at work", func() bool { return load() == 6 })
		for range 4 {
			if _, err := s.Recv(); err != nil {
				t.Fatal(err)
			}
		}
		g.eventually("none is", func() bool { return load() == 0 })
		if round == 0 && m.Seen() == 0 {
			t.Error("the model saw nothing")
		}
	}
	_ = s.CloseSend()
	if _, err := drainStream(s); err != nil {
		t.Error(err)
	}
	g.unloaded()
}
