package gateway

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	goruntime "runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/grpc-ecosystem/go-grpc-middleware/v2/interceptors/recovery"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/sluicegate/sluice/interceptors/config"
	"github.com/sluicegate/sluice/interceptors/telemetry"
	"github.com/sluicegate/sluice/proto/gen/inference"
)

// stormy is a model server that answers at once, late, in pieces, never, or by a panic,
// as the name of the model says.
type stormy struct {
	inference.UnimplementedGRPCInferenceServiceServer
	active atomic.Int64
}

func (s *stormy) ModelInfer(ctx context.Context, r *inference.ModelInferRequest) (*inference.ModelInferResponse, error) {
	s.active.Add(1)
	defer s.active.Add(-1)
	return reply(r.GetModelName(), r.GetId(), "word"), s.behave(ctx, r.GetModelName())
}

func (s *stormy) ModelStreamInfer(ss inference.GRPCInferenceService_ModelStreamInferServer) error {
	s.active.Add(1)
	defer s.active.Add(-1)
	for {
		r, err := ss.Recv()
		if err != nil {
			return nil //nolint:nilerr // the caller's end
		}
		for range 5 {
			if err := ss.Send(chunk(r.GetModelName(), r.GetId(), "word ")); err != nil {
				return err
			}
			if err := s.behave(ss.Context(), r.GetModelName()); err != nil {
				return err
			}
		}
	}
}

func (s *stormy) behave(ctx context.Context, model string) error {
	switch model {
	case "panics":
		panic("a handler's own")
	case "fails":
		return status.Error(codes.ResourceExhausted, "out of memory")
	case "hangs":
		<-ctx.Done()
		return ctx.Err()
	case "late":
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(5 * time.Millisecond):
		}
	}
	return nil
}

// serveAt serves at an address until it is stopped at once, with all its connections.
func (s *stormy) serveAt(t *testing.T, address string) (stop func(), at string) {
	t.Helper()
	var l net.Listener
	if !until(func() (ok bool) {
		var err error
		l, err = net.Listen("tcp", address)
		return err == nil
	}) {
		t.Fatalf("%s cannot be listened on", address)
	}
	r := recovery.WithRecoveryHandler(func(any) error { return status.Error(codes.Internal, "it panicked") })
	server := grpc.NewServer(grpc.UnaryInterceptor(recovery.UnaryServerInterceptor(r)), grpc.StreamInterceptor(recovery.StreamServerInterceptor(r)))
	inference.RegisterGRPCInferenceServiceServer(server, s)
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = server.Serve(l)
	}()
	return func() { server.Stop(); <-done }, l.Addr().String()
}

// tripping is a span processor that panics now and then: a bug in the chain itself.
type tripping struct{ n atomic.Int64 }

func (p *tripping) OnStart(context.Context, sdktrace.ReadWriteSpan) {
	if p.n.Add(1)%37 == 0 {
		panic("in a policy")
	}
}
func (*tripping) OnEnd(sdktrace.ReadOnlySpan)      {}
func (*tripping) Shutdown(context.Context) error   { return nil }
func (*tripping) ForceFlush(context.Context) error { return nil }

// Whatever ends inferences, and whenever: callers that go away while they wait, before
// the first byte, in mid-stream; handlers and policies that panic; a model server that
// is killed and comes back. When it is over no permit is held, nobody waits, the books
// balance, and the model server works on nothing.
func TestStorm(t *testing.T) {
	calls := 1200
	if testing.Short() {
		calls = 300
	}
	m := new(stormy)
	stop, address := m.serveAt(t, "127.0.0.1:0")
	traces := sdktrace.NewTracerProvider(sdktrace.WithSpanProcessor(new(tripping)))
	g := openWith(t, base+`
pools:
- name: gpu
  capacity: 8
  queue_length: 40
  queue_timeout: 200ms
  principal_permits: 6
  models: [{model: "*", tokens_per_permit: 4, default_output_tokens: 5}, {model: late, weight: 2, together: true}]
- {name: other, capacity: 3, queue_length: 10, queue_timeout: 100ms, models: [{model: late, together: true}]}
budgets: [{name: day, tokens: 100000000}]
`, config.Options{Telemetry: []telemetry.Option{telemetry.WithTracerProvider(traces)}}, address)
	g.pool.abandoned = true
	var clients []inference.GRPCInferenceServiceClient
	for range 4 {
		c := g.client()
		if _, err := c.ModelInfer(ctx(t), ask("quick", "a", "hello")); err != nil {
			t.Fatal(err)
		}
		clients = append(clients, c)
	}
	before := goruntime.NumGoroutine()
	var reached sync.Map
	count := func(err error) {
		n, _ := reached.LoadOrStore(reasonOf(err), new(atomic.Int64))
		n.(*atomic.Int64).Add(1)
	}
	models := []string{"quick", "late", "late", "hangs", "panics", "fails"}
	one := func(n int) {
		r := rand.New(rand.NewPCG(uint64(n), 29))
		name := models[r.IntN(len(models))]
		c, cancel := context.WithTimeout(ctx(t), time.Duration(r.Int64N(int64(400*time.Millisecond))))
		defer cancel()
		client := clients[n%len(clients)]
		if n%3 == 0 {
			_, err := client.ModelInfer(c, ask(name, "a", words(r.IntN(8))))
			count(err)
			return
		}
		s, err := client.ModelStreamInfer(c)
		for k := range 1 + r.IntN(4) { // several inferences at once
			if err == nil {
				err = s.Send(ask(models[r.IntN(len(models))], fmt.Sprint(k), words(r.IntN(8))))
			}
		}
		switch {
		case err != nil && !errors.Is(err, io.EOF):
		case r.IntN(3) == 0: // gone while it is being answered
			_, err = s.Recv()
			cancel()
		default:
			_ = s.CloseSend()
			_, err = drainStream(s)
		}
		count(err)
	}
	var all sync.WaitGroup
	for n := range calls {
		all.Go(func() { one(n) })
		if n%40 == 0 {
			all.Wait()
		}
		if n == calls/3+17 || n == 2*calls/3+17 { // while calls are at work
			stop()
			stop, _ = m.serveAt(t, address)
		}
	}
	all.Wait()
	g.idle()
	g.eventually("the model server is idle", func() bool { return m.active.Load() == 0 })
	g.eventually("the goroutines have ended", func() bool { return goruntime.NumGoroutine() <= before+8 })
	for _, s := range g.Guard().Pools().Snapshot() {
		if s.InUse != 0 || s.Waiting != 0 || s.WaitingBytes != 0 {
			t.Errorf("pool %s: %+v", s.Name, s)
		}
	}
	for _, want := range []string{"OK", "DeadlineExceeded", "ResourceExhausted QUEUE_TIMEOUT", "Internal INTERNAL", "Unavailable UPSTREAM_LOST"} {
		if _, ok := reached.Load(want); !ok {
			t.Errorf("the storm never reached %q", want)
		}
	}
	reached.Range(func(what, n any) bool {
		t.Logf("%v: %d", what, n.(*atomic.Int64).Load())
		return true
	})
	g.Shutdown()
	stop()
}
