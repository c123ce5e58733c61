package admit

import (
	"context"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/sluicegate/sluice/interceptors"
	"github.com/sluicegate/sluice/interceptors/dialect"
	configv1 "github.com/sluicegate/sluice/proto/gen/sluice/config/v1"
)

func TestNewRefusesWhatCannotWork(t *testing.T) {
	models := func(names ...string) (out []*configv1.PoolModel) {
		for _, n := range names {
			out = append(out, &configv1.PoolModel{Model: n})
		}
		return out
	}
	for _, test := range []struct {
		name  string
		pools []*configv1.Pool
		want  string // "" for no error
	}{
		{"none", nil, ""},
		{"one", []*configv1.Pool{of(3, 0)}, ""},
		{"two", []*configv1.Pool{{Name: "a", Capacity: 1, Models: models("x")}, {Name: "b", Capacity: 1, Models: models("y", "*")}}, ""},
		{"no capacity", []*configv1.Pool{{Name: "a", Models: models("x")}}, "pools[0].capacity: it is 0"},
		{"no models", []*configv1.Pool{{Name: "a", Capacity: 1}}, "pools[0].models: the pool names none"},
		{"same name", []*configv1.Pool{{Name: "a", Capacity: 1, Models: models("x")}, {Name: "a", Capacity: 1, Models: models("y")}}, `pools[1].name: there are two pools named "a"`},
		{"model in two pools", []*configv1.Pool{{Name: "a", Capacity: 1, Models: models("x")}, {Name: "b", Capacity: 1, Models: models("x")}}, `pools[1].models[0]: "x" is in pool "a" already`},
		{"model twice in a pool", []*configv1.Pool{{Name: "a", Capacity: 1, Models: models("x", "x")}}, `pools[0].models[1]: "x" is in pool "a" already`},
		{"two pools for the others", []*configv1.Pool{{Name: "a", Capacity: 1, Models: models("*")}, {Name: "b", Capacity: 1, Models: models("*")}}, `pools[1].models[0]: "*" is in pool "a" already`},
		{"weight over capacity", []*configv1.Pool{{Name: "a", Capacity: 2, Models: []*configv1.PoolModel{{Model: "x", Weight: 3}}}}, "weighs 3 of 2"},
		{"no time to wait", []*configv1.Pool{{Name: "a", Capacity: 1, Models: models("x"), QueueTimeout: durationpb.New(0)}}, "queue_timeout"},
		{"invalid time", []*configv1.Pool{{Name: "a", Capacity: 1, Models: models("x"), QueueTimeout: &durationpb.Duration{Seconds: 1, Nanos: -1}}}, "queue_timeout"},
	} {
		t.Run(test.name, func(t *testing.T) {
			_, err := New(test.pools)
			switch {
			case err == nil && test.want != "":
				t.Errorf("no error, want %q", test.want)
			case err != nil && (test.want == "" || !strings.Contains(err.Error(), test.want)):
				t.Errorf("error %q, want %q", err, test.want)
			}
		})
	}
}

func TestInterest(t *testing.T) {
	p := policy(t, of(1, 0))
	inference := &dialect.Method{Kind: dialect.Inference}
	for _, test := range []struct {
		name   string
		policy *Policy
		call   *interceptors.Call
		want   bool
	}{
		{"inference", p, &interceptors.Call{Method: inference}, true},
		{"inference that we ask for", p, &interceptors.Call{Method: inference, CallInfo: interceptors.CallInfo{Client: true}}, false},
		{"health", p, &interceptors.Call{Method: &dialect.Method{Kind: dialect.Health}}, false},
		{"management", p, &interceptors.Call{Method: &dialect.Method{}}, false},
		{"unknown method", p, &interceptors.Call{}, false},
		{"no pools", policy(t), &interceptors.Call{Method: inference}, false},
	} {
		if got, err := test.policy.Begin(test.call); err != nil || (got != nil) != test.want {
			t.Errorf("%s: Begin = %v, %v; want interest %t", test.name, got, err, test.want)
		}
	}
}

func TestModelsFindTheirPool(t *testing.T) {
	a := &configv1.Pool{Name: "a", Capacity: 4, Models: []*configv1.PoolModel{{Model: "x", Weight: 2}, {Model: "y"}}}
	b := &configv1.Pool{Name: "b", Capacity: 4, Models: []*configv1.PoolModel{{Model: "*", Weight: 3}}}
	for _, test := range []struct {
		name, model string
		pools       []*configv1.Pool
		pool        string // "" for none
		weight      int64
	}{
		{"weighed", "x", []*configv1.Pool{a}, "a", 2},
		{"default weight", "y", []*configv1.Pool{a}, "a", 1},
		{"in no pool", "z", []*configv1.Pool{a}, "", 0},
		{"without a name", "", []*configv1.Pool{a}, "", 0},
		{"others", "z", []*configv1.Pool{a, b}, "b", 3},
		{"others before", "x", []*configv1.Pool{b, a}, "a", 2},
		{"without a name, others", "", []*configv1.Pool{a, b}, "b", 3},
	} {
		t.Run(test.name, func(t *testing.T) {
			v := must(t, policy(t, test.pools...), test.model)
			switch {
			case v == nil && test.pool != "":
				t.Errorf("no interest, want pool %s", test.pool)
			case v != nil && (v.permit().pool.name != test.pool || v.permit().weight != test.weight):
				t.Errorf("pool %s with weight %d, want %q with %d", v.permit().pool.name, v.permit().weight, test.pool, test.weight)
			}
		})
	}
}

func TestPermitIsReleasedExactlyOnce(t *testing.T) {
	for _, o := range []interceptors.Outcome{well, cancelled, {Err: interceptors.Deny("x", interceptors.BudgetCut, "cut")}} {
		p := policy(t, of(3, 0))
		a, b := must(t, p, "2"), must(t, p, "1")
		if !a.Ready() || !b.Ready() {
			t.Error("not ready")
		}
		expect(t, p, 3, 0)
		a.End(o)
		a.End(o)
		expect(t, p, 1, 0)
		b.End(o)
		atRest(t, p)
	}
}

// waits runs Wait and returns its error when it comes.
func waits(v *part, ctx context.Context) <-chan error {
	out := make(chan error, 1)
	go func() { out <- v.Wait(ctx) }()
	synctest.Wait()
	return out
}

func pending(t *testing.T, out <-chan error) {
	t.Helper()
	synctest.Wait()
	select {
	case err := <-out:
		t.Errorf("Wait returned %v, want it to block", err)
	default:
	}
}

// ended is what Wait returned, and fails if it has not.
func ended(t *testing.T, out <-chan error) error {
	t.Helper()
	synctest.Wait()
	select {
	case err := <-out:
		return err
	default:
		t.Fatal("Wait blocks, want it to return")
		return nil
	}
}

func granted(t *testing.T, out <-chan error) {
	t.Helper()
	if err := ended(t, out); err != nil {
		t.Errorf("Wait: %v, want a grant", err)
	}
}

func bubble(name string, t *testing.T, f func(*testing.T)) {
	t.Run(name, func(t *testing.T) { synctest.Test(t, f) })
}

func TestQueue(t *testing.T) {
	background := context.Background()
	bubble("is first in, first out", t, func(t *testing.T) {
		p := policy(t, of(1, 3))
		first := must(t, p, "1")
		var waiters []*part
		var outs []<-chan error
		for range 3 {
			w := must(t, p, "1")
			if w.Ready() {
				t.Error("ready without a permit")
			}
			waiters, outs = append(waiters, w), append(outs, waits(w, background))
		}
		expect(t, p, 1, 3)
		first.End(well)
		for n, w := range waiters {
			granted(t, outs[n])
			if !w.Ready() {
				t.Error("granted and not ready")
			}
			for _, later := range outs[n+1:] {
				pending(t, later)
			}
			expect(t, p, 1, 2-n)
			w.End(well)
		}
		atRest(t, p)
	})
	bubble("a small inference does not overtake a large one", t, func(t *testing.T) {
		p := policy(t, of(3, 3))
		a, b := must(t, p, "1"), must(t, p, "1")
		large := must(t, p, "3")
		largeOut := waits(large, background)
		small := must(t, p, "1") // one permit is free
		smallOut := waits(small, background)
		expect(t, p, 2, 2)
		a.End(well)
		pending(t, largeOut)
		pending(t, smallOut)
		b.End(well)
		granted(t, largeOut)
		pending(t, smallOut)
		large.End(well)
		granted(t, smallOut)
		small.End(well)
		atRest(t, p)
	})
	bubble("a cancelled waiter at the front does not block those behind", t, func(t *testing.T) {
		p := policy(t, of(3, 3))
		held := must(t, p, "2")
		ctx, cancel := context.WithCancel(background)
		largeOut := waits(must(t, p, "3"), ctx)
		small := must(t, p, "1")
		smallOut := waits(small, background)
		pending(t, smallOut)
		cancel()
		if err := ended(t, largeOut); err != context.Canceled {
			t.Errorf("Wait: %v", err)
		}
		granted(t, smallOut)
		held.End(well)
		small.End(well)
		atRest(t, p)
	})
	bubble("one release may grant many", t, func(t *testing.T) {
		p := policy(t, of(3, 3))
		large := must(t, p, "3")
		a, b, c := must(t, p, "1"), must(t, p, "2"), must(t, p, "1")
		large.End(well)
		if !a.Ready() || !b.Ready() || c.Ready() {
			t.Error("want the first two ready")
		}
		expect(t, p, 3, 1)
		for _, v := range []*part{a, b, c} {
			v.End(well)
		}
		atRest(t, p)
	})
	bubble("leaving from the middle keeps the order", t, func(t *testing.T) {
		p := policy(t, of(1, 4))
		held := must(t, p, "1")
		a, b, c, d := must(t, p, "1"), must(t, p, "1"), must(t, p, "1"), must(t, p, "1")
		b.End(cancelled)
		d.End(cancelled)
		expect(t, p, 1, 2)
		held.End(well)
		if !a.Ready() {
			t.Error("the first is not ready")
		}
		a.End(well)
		if !c.Ready() {
			t.Error("the second is not ready")
		}
		c.End(well)
		atRest(t, p)
	})
	bubble("pools do not hold each other up", t, func(t *testing.T) {
		p := policy(t,
			&configv1.Pool{Name: "a", Capacity: 1, QueueLength: 1, Models: []*configv1.PoolModel{{Model: "a"}}},
			&configv1.Pool{Name: "b", Capacity: 1, QueueLength: 1, Models: []*configv1.PoolModel{{Model: "b"}}})
		a1, b1 := must(t, p, "a"), must(t, p, "b")
		a2, b2 := must(t, p, "a"), must(t, p, "b") // of streams that hold the other's pool
		aOut, bOut := waits(a2, background), waits(b2, background)
		a1.End(well)
		granted(t, aOut)
		pending(t, bOut)
		b1.End(well)
		granted(t, bOut)
		a2.End(well)
		b2.End(well)
		atRest(t, p)
	})
	bubble("an inference that ends while it waits wakes its waiter", t, func(t *testing.T) {
		p := policy(t, of(1, 1))
		held, w := must(t, p, "1"), must(t, p, "1")
		out := waits(w, background)
		w.End(cancelled)
		if d := denial(t, ended(t, out)); d == nil {
			t.Error("granted")
		}
		held.End(well)
		atRest(t, p)
	})
}

func TestCancelRacingWithGrantGivesThePermitBack(t *testing.T) {
	bubble("cancelled, then granted, then seen", t, func(t *testing.T) {
		p := policy(t, of(1, 2))
		held, w, next := must(t, p, "1"), must(t, p, "1"), must(t, p, "1")
		ctx, cancel := context.WithCancel(context.Background())
		cancel()
		held.End(well) // grants w
		if err := w.Wait(ctx); err == nil {
			w.End(cancelled) // as the chain does, which looks at the context too
		}
		if !next.Ready() {
			t.Error("the permit was not passed on")
		}
		w.End(cancelled)
		next.End(well)
		atRest(t, p)
	})
	t.Run("at once", func(t *testing.T) {
		p := policy(t, of(1, 2))
		var grants, cancels int
		for range 2000 {
			held, w := must(t, p, "1"), must(t, p, "1")
			ctx, cancel := context.WithCancel(context.Background())
			var all sync.WaitGroup
			all.Go(func() {
				if err := w.Wait(ctx); err != nil {
					cancels++
					if s := p.pools[0].snapshot(); s.Waiting != 0 {
						t.Error("left in the queue")
					}
				} else {
					grants++
				}
				w.End(cancelled)
			})
			all.Go(cancel)
			all.Go(func() { held.End(well) })
			all.Wait()
			expect(t, p, 0, 0)
		}
		t.Logf("%d grants, %d cancels", grants, cancels)
		atRest(t, p)
	})
}

// Whatever comes in whatever order, the pool is what a list of who holds and
// who waits says.
func TestPoolAgainstAModel(t *testing.T) {
	seeds := 200
	if testing.Short() {
		seeds = 30
	}
	reached := map[string]int{}
	for seed := range seeds {
		bubble(fmt.Sprint(seed), t, func(t *testing.T) {
			r := rand.New(rand.NewPCG(uint64(seed), 3))
			capacity, length := 3+r.Int64N(4), r.IntN(6)
			p := policy(t, of(uint32(capacity), uint32(length)))
			type one struct {
				v      *part
				until  time.Time
				out    <-chan error
				cancel context.CancelFunc
			}
			var holding, waiting []*one
			used := func() (n int64) {
				for _, h := range holding {
					n += h.v.permit().weight
				}
				return n
			}
			pass := func() {
				for len(waiting) > 0 && used()+waiting[0].v.permit().weight <= capacity {
					granted(t, waiting[0].out)
					holding, waiting = append(holding, waiting[0]), waiting[1:]
				}
			}
			defer func() {
				for _, o := range append(holding, waiting...) {
					o.cancel()
					o.v.End(cancelled)
				}
				atRest(t, p)
			}()
			for range 120 {
				switch op := r.IntN(8); {
				case op < 4:
					ctx, cancel := context.WithCancel(context.Background())
					weight := 1 + r.Int64N(3)
					v, d := start(t, p, ctx, fmt.Sprint(weight))
					o := &one{v: v, cancel: cancel, until: time.Now().Add(defaultQueueTimeout)}
					switch {
					case len(waiting) == 0 && used()+weight <= capacity:
						if d != nil || !v.Ready() {
							t.Fatalf("%v, want a grant", d)
						}
						holding = append(holding, o)
					case len(waiting) < length:
						if d != nil || v.Ready() {
							t.Fatalf("%v, want a place in the queue", d)
						}
						o.out = waits(v, ctx)
						waiting = append(waiting, o)
						reached["queued"]++
					case d == nil:
						t.Fatal("neither permit nor place, and no refusal")
					default:
						cancel()
						reached["refused"]++
					}
				case op < 6 && len(holding) > 0:
					n := r.IntN(len(holding))
					holding[n].v.End(interceptors.Outcome{})
					holding[n].cancel()
					holding = append(holding[:n], holding[n+1:]...)
					pass()
				case op < 7 && len(waiting) > 0:
					n := r.IntN(len(waiting))
					o := waiting[n]
					waiting = append(waiting[:n], waiting[n+1:]...)
					if r.IntN(2) == 0 {
						o.cancel()
					} else {
						o.v.End(cancelled)
					}
					if ended(t, o.out) == nil {
						t.Fatal("granted what was given up")
					}
					o.v.End(cancelled)
					o.cancel()
					reached["cancelled"]++
					pass()
				default:
					time.Sleep(time.Duration(r.Int64N(int64(3 * time.Second))))
					synctest.Wait()
					for len(waiting) > 0 && !time.Now().Before(waiting[0].until) {
						if d := denial(t, ended(t, waiting[0].out)); d == nil || d.Reason != interceptors.QueueTimeout {
							t.Fatalf("%v, want QUEUE_TIMEOUT", d)
						}
						until := waiting[0].until
						waiting[0].cancel()
						waiting = waiting[1:]
						reached["timed out"]++
						if len(waiting) == 0 || !waiting[0].until.Equal(until) {
							pass() // at that moment, not now
						}
					}
				}
				expect(t, p, used(), len(waiting))
			}
		})
	}
	for _, what := range []string{"queued", "refused", "cancelled", "timed out"} {
		if reached[what] < seeds/2 {
			t.Errorf("%q happened %d times: the model does not reach it", what, reached[what])
		}
	}
}

// Under a storm nobody runs over capacity, and nothing is left.
func TestNeverOverCapacity(t *testing.T) {
	const capacity, workers, rounds = 7, 32, 300
	p := policy(t, of(capacity, 16))
	var running, served, lost atomic.Int64
	var all sync.WaitGroup
	for w := range workers {
		all.Go(func() {
			r := rand.New(rand.NewPCG(uint64(w), 5))
			for range rounds {
				ctx, cancel := context.WithCancel(context.Background())
				v, d := start(t, p, ctx, fmt.Sprint(1+r.IntN(3)))
				if d != nil {
					cancel()
					lost.Add(1)
					continue
				}
				if r.IntN(4) == 0 {
					go cancel()
				}
				if err := v.Wait(ctx); err == nil {
					if n := running.Add(v.permit().weight); n > capacity {
						t.Errorf("%d permits are in use", n)
					}
					served.Add(1)
					running.Add(-v.permit().weight)
				}
				v.End(cancelled)
				cancel()
			}
		})
	}
	all.Wait()
	if served.Load() == 0 {
		t.Error("nothing was served")
	}
	t.Logf("%d served, %d refused", served.Load(), lost.Load())
	atRest(t, p)
}
