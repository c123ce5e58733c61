package admit

import (
	"context"
	"math/rand/v2"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/encoding/protowire"

	"github.com/sluicegate/sluice/interceptors"
	"github.com/sluicegate/sluice/interceptors/dialect"
	configv1 "github.com/sluicegate/sluice/proto/gen/sluice/config/v1"
)

// twoPools are pools of which "both" needs permits.
func twoPools(queue uint32) []*configv1.Pool {
	both := &configv1.PoolModel{Model: "both", Together: true}
	return []*configv1.Pool{
		{Name: "a", Capacity: 1, QueueLength: queue, Models: []*configv1.PoolModel{{Model: "a"}, both}},
		{Name: "b", Capacity: 1, QueueLength: queue, Models: []*configv1.PoolModel{{Model: "b"}, both}},
	}
}

func TestSeveralPools(t *testing.T) {
	background := context.Background()
	bubble("at once", t, func(t *testing.T) {
		p := policy(t, twoPools(0)...)
		v := must(t, p, "both")
		if s := p.Snapshot(); !v.Ready() || s[0].InUse != 1 || s[1].InUse != 1 {
			t.Errorf("%+v", s)
		}
		if err := v.Wait(background); err != nil {
			t.Error(err)
		}
		v.End(well)
		v.End(well)
		atRest(t, p)
	})
	bubble("one after the other", t, func(t *testing.T) {
		p := policy(t, twoPools(2)...)
		a, b := must(t, p, "a"), must(t, p, "b")
		v := must(t, p, "both")
		out := waits(v, background)
		a.End(well)
		pending(t, out)
		if s := p.Snapshot(); v.Ready() || s[0].InUse != 1 || s[1].Waiting != 1 {
			t.Errorf("%+v", s)
		}
		b.End(well)
		granted(t, out)
		if !v.Ready() {
			t.Error("granted and not ready")
		}
		v.End(well)
		atRest(t, p)
	})
	bubble("a refusal by the second leaves nothing of the first", t, func(t *testing.T) {
		p := policy(t, twoPools(0)...)
		b := must(t, p, "b")
		if _, d := start(t, p, background, "both"); d == nil || d.Reason != interceptors.ConcurrencyLimit || d.Metadata["pool"] != "b" {
			t.Errorf("%v, want CONCURRENCY_LIMIT of b", d)
		}
		b.End(well)
		atRest(t, p)
	})
	bubble("cancelled while it holds the first", t, func(t *testing.T) {
		p := policy(t, twoPools(2)...)
		b := must(t, p, "b")
		ctx, cancel := context.WithCancel(background)
		v, _ := start(t, p, ctx, "both")
		out := waits(v, ctx)
		cancel()
		if err := ended(t, out); err != context.Canceled {
			t.Errorf("Wait: %v", err)
		}
		b.End(well)
		v.End(cancelled)
		atRest(t, p)
	})
	bubble("ended from outside between the two", t, func(t *testing.T) {
		p := policy(t, twoPools(2)...)
		a := must(t, p, "a")
		v := must(t, p, "both")
		out := waits(v, background)
		v.End(cancelled)
		if ended(t, out) == nil {
			t.Error("granted after its end")
		}
		a.End(well)
		atRest(t, p)
	})
}

func TestTheTimeoutIsForAllPools(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := policy(t, twoPools(2)...)
		a, b := must(t, p, "a"), must(t, p, "b")
		out := waits(must(t, p, "both"), context.Background())
		time.Sleep(defaultQueueTimeout - time.Second)
		a.End(well)
		pending(t, out)
		time.Sleep(time.Second)
		if d := denial(t, ended(t, out)); d == nil || d.Reason != interceptors.QueueTimeout {
			t.Errorf("%v, want QUEUE_TIMEOUT", d)
		}
		b.End(well)
		atRest(t, p)
	})
}

// An observer that panics leaves nothing in any pool.
func TestSeveralPoolsWithAPanic(t *testing.T) {
	d, err := dialect.KServe(dialect.Options{})
	if err != nil {
		t.Fatal(err)
	}
	p := policy(t, twoPools(2)...)
	chain := interceptors.New([]*interceptors.Backend{{Name: "b", Dialect: d}}, &watcher{panic: true}, p)
	b := must(t, p, "b")
	call, err := chain.Begin(context.Background(), interceptors.CallInfo{FullMethod: "/inference.GRPCInferenceService/ModelInfer"})
	if err != nil {
		t.Fatal(err)
	}
	e := interceptors.RawEnvelope(mem.BufferSlice{mem.SliceBuffer(protowire.AppendString(protowire.AppendTag(nil, 1, protowire.BytesType), "both"))})
	defer e.Release()
	if _, err := call.Request(e); err == nil || denial(t, err).Reason != interceptors.Internal {
		t.Errorf("%v, want INTERNAL", err)
	}
	b.End(well)
	call.End(nil)
	atRest(t, p)
}

// Nobody waits for ever, whatever the order in which streams ask.
func TestSeveralPoolsDoNotDeadlock(t *testing.T) {
	p := policy(t, twoPools(1000)...)
	var all sync.WaitGroup
	for n := range 16 {
		all.Go(func() {
			r := rand.New(rand.NewPCG(uint64(n), 11))
			for range 200 {
				ctx, cancel := context.WithCancel(context.Background())
				v, d := start(t, p, ctx, []string{"both", "b", "a"}[r.IntN(3)])
				if d != nil {
					t.Error(d)
					cancel()
					return
				}
				if r.IntN(3) == 0 {
					go cancel()
				}
				_ = v.Wait(ctx)
				v.End(cancelled)
				cancel()
			}
		})
	}
	all.Wait()
	atRest(t, p)
}
