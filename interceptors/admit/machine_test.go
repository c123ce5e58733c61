package admit

import (
	"context"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/sluicegate/sluice/interceptors"
	configv1 "github.com/sluicegate/sluice/proto/gen/sluice/config/v1"
)

// everything is a pool with every limit there is.
func everything(r *rand.Rand) *configv1.Pool {
	c := of(4+r.Uint32N(6), r.Uint32N(12))
	c.Models = append(c.Models[:2], &configv1.PoolModel{Model: "3", TokensPerPermit: 10})
	c.Tenants = []*configv1.PoolTenant{
		{Tenant: "0", Weight: 1 + r.Uint32N(3), Reserved: 2},
		{Tenant: "1", Weight: 1 + r.Uint32N(3), Permits: 2 + r.Uint32N(2)}}
	if r.IntN(2) == 0 {
		c.PrincipalPermits = 2 + r.Uint32N(2)
	}
	c.Priorities = []*configv1.PoolPriority{
		{Priority: 1, Principals: []string{"spiffe://a/*/0"}}, {Priority: -1, Principals: []string{"spiffe://a/*/1"}}}
	return c
}

// Whatever comes in whatever order, what the pool keeps agrees with itself, no
// more is granted than there is, nobody waits who could go, everybody who leaves
// hears of it, and nothing is left.
func TestEveryLimitTogether(t *testing.T) {
	seeds := 200
	if testing.Short() {
		seeds = 30
	}
	reached := map[string]int{}
	for seed := range seeds {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := rand.New(rand.NewPCG(uint64(seed), 13))
				c := everything(r)
				p := policy(t, c)
				l := p.pools[0]
				type one struct {
					*part
					i      *interceptors.Inference
					out    <-chan error // nil once it is granted, or over
					cancel context.CancelFunc
				}
				var all []*one
				drop := func(n int) {
					all[n].cancel()
					all = append(all[:n], all[n+1:]...)
				}
				defer func() {
					for len(all) > 0 {
						all[0].End(cancelled)
						drop(0)
					}
					synctest.Wait()
					atRest(t, p)
				}()
				for range 150 {
					switch op := r.IntN(10); {
					case op < 5:
						ctx, cancel := context.WithCancel(context.Background())
						if r.IntN(4) == 0 {
							cancel()
							ctx, cancel = context.WithTimeout(context.Background(), time.Duration(r.Int64N(int64(5*time.Second))))
						}
						tenant := fmt.Sprint(r.IntN(4))
						i := &interceptors.Inference{Model: fmt.Sprint(1 + r.IntN(3)), InputTokens: r.Int64N(20), MaxOutputTokens: 1 + r.Int64N(30)}
						free := l.capacity - l.inUse
						v, d := begin(t, p, ctx, i, tenant, fmt.Sprintf("spiffe://a/%s/%d", tenant, r.IntN(3)))
						if d != nil {
							cancel()
							reached[string(d.Reason)]++
							break
						}
						if v.Ready() && v.permit().weight > free {
							t.Fatalf("granted %d of %d permits", v.permit().weight, free)
						}
						o := &one{part: v, i: i, cancel: cancel}
						if v.Ready() {
							reached["granted"]++
						} else {
							o.out = waits(v, ctx)
							reached["queued"]++
						}
						all = append(all, o)
					case op < 8 && len(all) > 0:
						n := r.IntN(len(all))
						switch o := all[n]; {
						case o.out != nil && r.IntN(2) == 0:
							o.cancel()
							synctest.Wait()
							if <-o.out == nil {
								t.Fatal("granted what was cancelled")
							}
							reached["cancelled"]++
						case o.out == nil && r.IntN(4) == 0:
							o.i.OutputTokens += r.Int64N(40)
							o.i.ReportedInput = 1 + r.Int64N(20)
							_ = o.Response(nil)
							reached["reweighed"]++
							continue
						}
						all[n].End([]interceptors.Outcome{well, cancelled}[r.IntN(2)])
						drop(n)
					case op < 9:
						time.Sleep(time.Duration(r.Int64N(int64(2 * time.Second))))
					}
					synctest.Wait()
					for n := len(all) - 1; n >= 0; n-- {
						select {
						case err := <-all[n].out:
							if all[n].out = nil; err != nil {
								if d, ok := err.(*interceptors.Denial); ok {
									reached["while waiting: "+string(d.Reason)]++
								}
								all[n].End(interceptors.Outcome{Err: err})
								drop(n)
							}
						default:
							if all[n].out != nil && all[n].Ready() {
								t.Fatal("granted, and not told")
							}
						}
					}
					check(t, l)
				}
			})
		})
	}
	t.Log(reached)
	for _, what := range []string{"granted", "queued", "cancelled", "reweighed", "QUEUE_FULL", "CONCURRENCY_LIMIT", "DEADLINE_UNREACHABLE",
		"while waiting: QUEUE_FULL", "while waiting: QUEUE_TIMEOUT", "while waiting: DEADLINE_UNREACHABLE"} {
		if reached[what] < seeds/10 {
			t.Errorf("%q happened %d times: the test does not reach it", what, reached[what])
		}
	}
}

// A storm of real goroutines: waits that are cancelled, parts that are ended
// while they wait, and permits that are given back, all at once.
func TestStormOfEveryLimit(t *testing.T) {
	c := everything(rand.New(rand.NewPCG(1, 17)))
	c.Models, c.QueueLength = c.Models[:2], 24
	p := policy(t, c)
	var all sync.WaitGroup
	for n := range 32 {
		all.Go(func() {
			r := rand.New(rand.NewPCG(uint64(n), 19))
			for range 300 {
				ctx, cancel := context.WithCancel(context.Background())
				i := &interceptors.Inference{Model: fmt.Sprint(1 + r.IntN(2)), InputTokens: r.Int64N(50)}
				v, d := begin(t, p, ctx, i, fmt.Sprint(r.IntN(4)), fmt.Sprintf("spiffe://a/x/%d", r.IntN(3)))
				if d != nil {
					cancel()
					continue
				}
				switch r.IntN(4) {
				case 0:
					go cancel()
				case 1:
					if !v.Ready() {
						out := make(chan struct{})
						go func() { _ = v.Wait(ctx); close(out) }()
						v.End(cancelled)
						<-out
						cancel()
						continue
					}
				}
				if v.Wait(ctx) == nil {
					if s := p.Snapshot()[0]; s.InUse > s.Capacity {
						t.Errorf("%d permits are in use, of %d", s.InUse, s.Capacity)
					}
					i.OutputTokens++
					_ = v.Response(nil)
				}
				v.End(well)
				cancel()
			}
		})
	}
	all.Wait()
	atRest(t, p)
}
