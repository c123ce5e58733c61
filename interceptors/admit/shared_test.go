package admit

import (
	"context"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/sluicegate/sluice/interceptors"
	"github.com/sluicegate/sluice/interceptors/internal/redistest"
	configv1 "github.com/sluicegate/sluice/proto/gen/sluice/config/v1"
)

func store(t testing.TB) *redistest.Server { return redistest.New(t, "../budget/testdata/redis.sh") }

const (
	whileHeld   = configv1.StoreLost_STORE_LOST_HELD
	whileClosed = configv1.StoreLost_STORE_LOST_CLOSED
	whileOpen   = configv1.StoreLost_STORE_LOST_OPEN
)

// common is a pool that gateways share. What they wait for the store is long, since
// the machine may be slow.
func common(capacity, queue uint32, lease time.Duration, lost configv1.StoreLost) *configv1.Pool {
	c := of(capacity, queue)
	c.Share = &configv1.PoolShare{Lease: durationpb.New(lease), StoreLost: lost}
	return c
}

func shareAt(t testing.TB, address string, pools ...*configv1.Pool) *Policy {
	t.Helper()
	p := policy(t, pools...)
	err := p.Share(&configv1.Redis{Addresses: []string{address}, Timeout: durationpb.New(time.Second)})
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// gatewayOf is a gateway that shares a pool, and its own way to the store.
func gatewayOf(t testing.TB, s *redistest.Server, c *configv1.Pool) (*Policy, *redistest.Proxy) {
	t.Helper()
	way := s.Proxy(t)
	p := shareAt(t, way.Address(), c)
	t.Cleanup(p.Close)
	return p, way
}

// eventually waits for something that takes as long as it takes.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); !ok(); {
		if time.Now().After(end) {
			t.Fatalf("not within 20 s: %s", what)
		}
		<-time.After(time.Millisecond)
	}
}

// take begins inferences of weight 1 until one is refused, at most so many.
func take(t testing.TB, p *Policy, most int) (all []*part) {
	t.Helper()
	for range most {
		v, d := start(t, p, context.Background(), "1")
		if d != nil {
			break
		}
		all = append(all, v)
	}
	return all
}

func endAll(all []*part) {
	for _, v := range all {
		v.End(well)
	}
}

// Gateways under load at random use all of a pool and never more, whatever weighs
// what, and nothing is left.
func TestSharedPoolIsNeverExceeded(t *testing.T) {
	const capacity, gateways = 16, 3
	s := store(t)
	var inUse, most, served atomic.Int64
	var all sync.WaitGroup
	var policies []*Policy
	for range gateways {
		p, _ := gatewayOf(t, s, common(capacity, 100, time.Minute, whileHeld))
		policies = append(policies, p)
	}
	for n, p := range policies {
		for k := range 12 {
			all.Go(func() {
				r := rand.New(rand.NewPCG(uint64(n), uint64(k)))
				for range 60 {
					weight := 1 + r.Int64N(3)
					ctx, cancel := context.WithCancel(context.Background())
					v, d := start(t, p, ctx, fmt.Sprint(weight))
					if d != nil {
						t.Error(d)
						cancel()
						return
					}
					if r.IntN(8) == 0 {
						go cancel()
					}
					if v.Wait(ctx) == nil {
						now := inUse.Add(weight)
						for old := most.Load(); now > old && !most.CompareAndSwap(old, now); old = most.Load() {
						}
						<-time.After(time.Duration(r.Int64N(int64(4 * time.Millisecond))))
						inUse.Add(-weight)
						served.Add(1)
					}
					v.End(well)
					cancel()
				}
			})
		}
	}
	all.Wait()
	if most.Load() > capacity || most.Load() < capacity-2 {
		t.Errorf("at most %d permits in use at once, want %d", most.Load(), capacity)
	}
	t.Logf("%d served, %d permits in use at most", served.Load(), most.Load())
	for _, p := range policies {
		atRest(t, p)
	}
}

// Permits go where inferences are: an idle gateway does not sit on them, and when
// both want all, each has half.
func TestPermitsFollowTheLoad(t *testing.T) {
	s := store(t)
	c := common(16, 100, time.Minute, whileHeld)
	a, _ := gatewayOf(t, s, c)
	b, _ := gatewayOf(t, s, c)
	eventually(t, "the idle ones share alike", func() bool {
		return a.Snapshot()[0].Capacity == 8 && b.Snapshot()[0].Capacity == 8
	})
	busy := take(t, a, 40)
	eventually(t, "all permits are where the load is", func() bool { return a.Snapshot()[0].InUse == 16 })
	if got := b.Snapshot()[0].Capacity; got != 0 {
		t.Errorf("the idle one holds %d", got)
	}
	more := take(t, b, 40)
	eventually(t, "each has half", func() bool {
		for n := range busy { // what ends goes to the other
			if a.Snapshot()[0].InUse > 8 && busy[n].Ready() {
				busy[n].End(well)
				busy = append(busy[:n], busy[n+1:]...)
				break
			}
		}
		return a.Snapshot()[0].InUse == 8 && b.Snapshot()[0].InUse == 8
	})
	sharing := b.Snapshot()[0].Sharing
	if sharing == nil || sharing.Gateways != 2 || sharing.Lost {
		t.Errorf("%+v", sharing)
	}
	endAll(busy)
	endAll(more)
	atRest(t, a)
	atRest(t, b)
}

// A gateway that was idle for a lease holds nothing, and has what it needs when it
// needs it; one without a queue keeps its part.
func TestIdleGatewayHoldsNothing(t *testing.T) {
	s := store(t)
	p, _ := gatewayOf(t, s, common(16, 4, time.Second, whileHeld))
	eventually(t, "it sleeps", func() bool { return p.Snapshot()[0].Capacity == 0 })
	v := must(t, p, "3")
	if err := v.Wait(context.Background()); err != nil {
		t.Error(err)
	}
	v.End(well)
	atRest(t, p)
	c := common(16, 0, time.Second, whileHeld)
	c.Name = "other"
	p, _ = gatewayOf(t, s, c)
	eventually(t, "it was idle for a lease", func() bool {
		l := p.pools[0]
		l.mu.Lock()
		defer l.mu.Unlock()
		return l.shared.number > 15
	})
	if v := take(t, p, 20); len(v) != 16 {
		t.Errorf("%d of 16 could begin at once", len(v))
	} else {
		endAll(v)
	}
	atRest(t, p)
}

// A heavy inference begins though every gateway's equal part is too small for it,
// at each gateway in its turn.
func TestHeavyInferencesOfSharedPools(t *testing.T) {
	s := store(t)
	c := common(4, 100, time.Minute, whileHeld)
	c.Models[0].Weight = 4
	var all sync.WaitGroup
	var inUse atomic.Int64
	for range 3 {
		p, _ := gatewayOf(t, s, c)
		all.Go(func() {
			for range 5 {
				v := must(t, p, "1")
				if err := v.Wait(context.Background()); err != nil {
					t.Error(err)
				}
				if n := inUse.Add(4); n > 4 {
					t.Errorf("%d permits in use", n)
				}
				inUse.Add(-4)
				v.End(well)
			}
		})
	}
	all.Wait()
}

// What a gateway does that is cut off from the store: by its pool's setting, at the
// latest after half a lease. The other has all that it does not use after a lease,
// and when it is back both have what there is.
func TestPartition(t *testing.T) {
	for lost, want := range map[configv1.StoreLost]struct {
		begun  int
		reason interceptors.Reason
	}{
		whileHeld:   {0, interceptors.PolicyUnavailable},
		whileClosed: {0, interceptors.PolicyUnavailable},
		whileOpen:   {8, interceptors.ConcurrencyLimit},
	} {
		t.Run(lost.String(), func(t *testing.T) {
			s := store(t)
			c := common(16, 0, time.Second, lost)
			a, way := gatewayOf(t, s, c)
			b, _ := gatewayOf(t, s, c)
			eventually(t, "both have half", func() bool {
				return a.Snapshot()[0].Capacity == 8 && b.Snapshot()[0].Capacity == 8
			})
			way.Cut(true)
			eventually(t, "it knows", func() bool { return a.Snapshot()[0].Sharing.Lost })
			began := take(t, a, 16)
			_, d := start(t, a, context.Background(), "1")
			if len(began) != want.begun || d == nil || d.Reason != want.reason || d.RetryAfter <= 0 {
				t.Errorf("cut off it began %d, then %v; want %d, %s", len(began), d, want.begun, want.reason)
			}
			var all []*part
			eventually(t, "the other has what is left", func() bool {
				all = append(all, take(t, b, 16)...)
				return len(all) == 16
			})
			way.Cut(false)
			eventually(t, "it is back", func() bool { return !a.Snapshot()[0].Sharing.Lost })
			if more := take(t, a, 16); len(more) > 0 {
				t.Errorf("back, it began %d though there are none", len(more))
				endAll(more)
			}
			endAll(began)
			endAll(all)
			eventually(t, "both have half again", func() bool {
				return a.Snapshot()[0].Capacity == 8 && b.Snapshot()[0].Capacity == 8
			})
			atRest(t, a)
			atRest(t, b)
		})
	}
}

// Closed is at once, though the lease is long; held is not.
func TestClosedDoesNotWaitForTheLease(t *testing.T) {
	s := store(t)
	c := common(16, 0, time.Hour, whileHeld)
	goesOn, way := gatewayOf(t, s, c)
	way.Cut(true)
	c = common(16, 0, time.Hour, whileClosed)
	c.Name = "closed"
	stops, way := gatewayOf(t, s, c)
	way.Cut(true)
	eventually(t, "nothing begins", func() bool {
		v, d := start(t, stops, context.Background(), "1")
		if d == nil {
			v.End(well)
		}
		return d != nil && d.Reason == interceptors.PolicyUnavailable
	})
	must(t, goesOn, "1").End(well)
}

// Who waits while the store is lost is told so at the end.
func TestWhoWaitsWhileTheStoreIsLost(t *testing.T) {
	s := store(t)
	c := common(1, 4, time.Second, whileHeld)
	c.Models, c.QueueTimeout = c.Models[:1], durationpb.New(time.Second)
	p, way := gatewayOf(t, s, c)
	running := must(t, p, "1")
	way.Cut(true)
	v := must(t, p, "1")
	if d := denial(t, v.Wait(context.Background())); d == nil || d.Reason != interceptors.PolicyUnavailable {
		t.Errorf("%v, want POLICY_UNAVAILABLE", d)
	}
	running.End(well)
	atRest(t, p)
}

// A store that lost its memory is told what there is before it gives more.
func TestStoreThatComesBackEmpty(t *testing.T) {
	s := store(t)
	c := common(16, 0, 2*time.Second, whileHeld)
	a, first := gatewayOf(t, s, c)
	b, second := gatewayOf(t, s, c)
	eventually(t, "both have half", func() bool {
		return a.Snapshot()[0].Capacity == 8 && b.Snapshot()[0].Capacity == 8
	})
	running := take(t, b, 8)
	first.Cut(true)
	second.Cut(true)
	s.Kill()
	s.Start(t)
	first.Cut(false) // the other is not heard of yet
	eventually(t, "the first is back", func() bool {
		sharing := a.Snapshot()[0].Sharing
		return sharing.Gateways == 1 && !sharing.Lost
	})
	more := take(t, a, 16)
	if n := len(more) + len(running); n > 16 {
		t.Errorf("%d of 16 run", n)
	}
	second.Cut(false)
	eventually(t, "the second is back", func() bool { return b.Snapshot()[0].Sharing.Gateways == 2 })
	endAll(running)
	endAll(more)
	eventually(t, "both have half again", func() bool {
		return a.Snapshot()[0].Capacity == 8 && b.Snapshot()[0].Capacity == 8
	})
	atRest(t, a)
	atRest(t, b)
}

// Random faults: answers that are lost, connections that break, while gateways come
// and go. No more runs than there is, since no lease ends.
func TestSharedPoolWithFaults(t *testing.T) {
	seeds := 4
	if testing.Short() {
		seeds = 1
	}
	for seed := range seeds {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			r := rand.New(rand.NewPCG(uint64(seed), 23))
			s := store(t)
			c := common(10, 0, time.Minute, whileHeld)
			type gateway struct {
				*Policy
				way     *redistest.Proxy
				running []*part
			}
			var all []*gateway
			join := func() {
				way := s.Proxy(t)
				p := policy(t, c)
				if err := p.Share(&configv1.Redis{Addresses: []string{way.Address()}, Timeout: durationpb.New(100 * time.Millisecond)}); err != nil {
					t.Fatal(err)
				}
				all = append(all, &gateway{Policy: p, way: way})
			}
			join()
			join()
			for range 600 {
				g := all[r.IntN(len(all))]
				switch r.IntN(12) {
				case 0:
					g.way.Mute.Store(true)
				case 1, 2:
					g.way.Mute.Store(false)
				case 3:
					g.way.Cut(false)
				case 4:
					if len(all) < 4 {
						join()
					}
				case 5:
					if len(all) > 1 && len(g.running) == 0 && !g.way.Mute.Load() {
						g.Close()
						for n := range all {
							if all[n] == g {
								all = append(all[:n], all[n+1:]...)
								break
							}
						}
					}
				case 6, 7:
					<-time.After(time.Duration(r.Int64N(int64(5 * time.Millisecond))))
				case 8, 9:
					endAll(g.running)
					g.running = nil
				default:
					g.running = append(g.running, take(t, g.Policy, 1+r.IntN(10))...)
				}
				n := 0
				for _, g := range all {
					n += len(g.running)
				}
				if n > 10 {
					t.Fatalf("%d of 10 run", n)
				}
			}
			for _, g := range all {
				g.way.Mute.Store(false)
				g.way.Cut(false)
				endAll(g.running)
				atRest(t, g.Policy)
			}
			var last []*part
			eventually(t, "one can have all of it", func() bool {
				last = append(last, take(t, all[0].Policy, 10)...)
				return len(last) == 10
			})
			endAll(last)
			for _, g := range all {
				g.Close()
			}
		})
	}
}
