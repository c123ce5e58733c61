package admit

import (
	"context"
	"fmt"
	"math"
	"math/rand/v2"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/sluicegate/sluice/interceptors"
	configv1 "github.com/sluicegate/sluice/proto/gen/sluice/config/v1"
)

// engine runs inferences a token at a time, all that hold a permit at once.
type engine struct {
	t       *testing.T
	p       *Policy
	running []*job
	waiting []*job
	served  map[string]float64 // weighted tokens over the tenant's weight
	backlog map[string]int
	weights map[string]int64
}

type job struct {
	*part
	i      *interceptors.Inference
	tenant string
	output int64
}

func newEngine(t *testing.T, c *configv1.Pool) *engine {
	e := &engine{t: t, p: policy(t, c), served: map[string]float64{}, backlog: map[string]int{}, weights: map[string]int64{}}
	for _, tn := range c.GetTenants() {
		e.weights[tn.GetTenant()] = int64(tn.GetWeight())
	}
	return e
}

func (e *engine) count(tenant string, tokens int64) {
	e.served[tenant] += float64(tokens) / float64(max(1, e.weights[tenant]))
}

// ask queues an inference. It reports whether it was not refused.
func (e *engine) ask(tenant string, input, output int64) bool {
	i := &interceptors.Inference{Model: "1", InputTokens: input}
	v, d := begin(e.t, e.p, context.Background(), i, tenant, "")
	if d != nil {
		return false
	}
	e.waiting = append(e.waiting, &job{v, i, tenant, output})
	e.backlog[tenant]++
	e.begin()
	return true
}

// begin finds who was granted.
func (e *engine) begin() {
	left := e.waiting[:0]
	for _, j := range e.waiting {
		if !j.Ready() {
			left = append(left, j)
			continue
		}
		e.backlog[j.tenant]--
		e.count(j.tenant, j.i.InputTokens)
		e.running = append(e.running, j)
	}
	e.waiting = left
}

// step has each that runs write a token, and ends those that are done.
func (e *engine) step() {
	left := e.running[:0]
	for _, j := range e.running {
		if j.i.OutputTokens == j.output {
			j.End(well)
			continue
		}
		j.i.OutputTokens++
		e.count(j.tenant, defaultOutputWeight)
		if err := j.Response(nil); err != nil {
			e.t.Fatal(err)
		}
		left = append(left, j)
	}
	e.running = left
	e.begin()
}

func (e *engine) end() {
	for _, j := range append(e.running, e.waiting...) {
		j.End(cancelled)
	}
	atRest(e.t, e.p)
}

// The bound of the paper on Virtual Token Counters (theorem 4.4): what two
// tenants are served in any interval in which both have something waiting differs
// by at most 2 max(wp L, wq M), where L is the longest input and M what fits
// into the server, here as many inferences as there are permits. With weights it
// is of what they are served over their weights, and the least weight divides.
func TestTenantsAreServedWithinTheBoundOfVirtualTokenCounters(t *testing.T) {
	seeds := 60
	if testing.Short() {
		seeds = 10
	}
	tightest := 0.0
	for seed := range seeds {
		bubble(fmt.Sprint(seed), t, func(t *testing.T) {
			r := rand.New(rand.NewPCG(uint64(seed), 7))
			permits, input, output := 1+r.Int64N(8), 1+r.Int64N(200), 1+r.Int64N(100)
			c := of(uint32(permits), 1000)
			least := int64(math.MaxInt64)
			names := make([]string, 2+r.IntN(4))
			for n := range names {
				names[n] = fmt.Sprint(n)
				w := 1 + r.Int64N(4)
				least = min(least, w)
				c.Tenants = append(c.Tenants, &configv1.PoolTenant{Tenant: names[n], Weight: uint32(w)})
			}
			e := newEngine(t, c)
			defer e.end()
			bound := 2 * float64(max(defaultInputWeight*input, defaultOutputWeight*permits*(input+output))) / float64(least)
			length := func(of int64, n int) int64 { // tenants differ in what they ask
				return 1 + r.Int64N(max(1, of*int64(n+1)/int64(len(names))))
			}
			idle := make([]int, len(names)) // steps that a tenant stays away, but for the first two
			low, high := 0.0, 0.0
			for range 3000 {
				for n, name := range names {
					switch {
					case n >= 2 && idle[n] > 0:
						idle[n]--
						continue
					case n >= 2 && r.IntN(200) == 0:
						idle[n] = r.IntN(400)
					}
					for int64(e.backlog[name]) <= permits { // more than can go in a step
						if !e.ask(name, length(input, n), length(output, len(names)-1-n)) {
							t.Fatal("refused")
						}
					}
				}
				e.step()
				gap := e.served[names[0]] - e.served[names[1]]
				low, high = min(low, gap), max(high, gap)
			}
			if high-low > bound {
				t.Errorf("%d permits, inputs to %d, outputs to %d: served %.0f apart, over the bound of %.0f", permits, input, output, high-low, bound)
			}
			tightest = max(tightest, (high-low)/bound)
		})
	}
	t.Logf("at most %.0f %% of the bound", 100*tightest)
}

func TestShares(t *testing.T) {
	weighted := func(of *configv1.Pool, weights ...uint32) *configv1.Pool {
		for n, w := range weights {
			of.Tenants = append(of.Tenants, &configv1.PoolTenant{Tenant: string(rune('a' + n)), Weight: w})
		}
		return of
	}
	// all have a and b ask for the same, without end.
	all := func(e *engine) {
		for _, name := range []string{"a", "b"} {
			for e.backlog[name] < 5 && e.ask(name, 10, 20) {
			}
		}
	}
	for _, test := range []struct {
		name string
		pool *configv1.Pool
		ask  func(*engine)
		want float64 // b's tokens for one of a's
	}{
		{"equal", of(4, 100), all, 1},
		{"by weight", weighted(of(4, 100), 1, 3), all, 3},
		{"by tokens, not by inferences", of(4, 100), func(e *engine) {
			for e.backlog["a"] < 5 && e.ask("a", 100, 1) {
			}
			for e.backlog["b"] < 5 && e.ask("b", 1, 5) {
			}
		}, 1},
		{"without text, by permits", &configv1.Pool{Name: "gpu", Capacity: 4, QueueLength: 100,
			Models: []*configv1.PoolModel{{Model: "1", Weight: 2}}, OutputWeight: proto.Uint32(0)}, func(e *engine) {
			for e.backlog["a"] < 5 && e.ask("a", 0, 3) {
			}
			for e.backlog["b"] < 5 && e.ask("b", 0, 3) {
			}
		}, 1},
		{"one floods, and the queue is full", of(4, 16), func(e *engine) {
			for range 100 {
				e.ask("a", 10, 20)
			}
			for e.backlog["b"] < 5 && e.ask("b", 10, 20) {
			}
		}, 1},
	} {
		bubble(test.name, t, func(t *testing.T) {
			e := newEngine(t, test.pool)
			for range 5000 {
				test.ask(e)
				e.forgetLapsed()
				e.step()
			}
			s := e.p.Snapshot()[0]
			a, b := s.Tenants[0], s.Tenants[1]
			if got := float64(b.Served) / float64(a.Served); math.Abs(got/test.want-1) > .05 {
				t.Errorf("b was served %.3f times what a was, want %v: %+v %+v", got, test.want, a, b)
			}
			if math.Abs(a.Share+b.Share-1) > 1e-9 {
				t.Errorf("shares %v and %v", a.Share, b.Share)
			}
			e.end()
		})
	}
}

// forgetLapsed drops who lost its place in the queue.
func (e *engine) forgetLapsed() {
	left := e.waiting[:0]
	for _, j := range e.waiting {
		if j.permit().state == lapsed {
			e.backlog[j.tenant]--
			j.End(cancelled)
			continue
		}
		left = append(left, j)
	}
	e.waiting = left
}

// To be away earns nothing: who comes back does not get what it did not ask for.
func TestWhoComesBackHasNoCredit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEngine(t, of(2, 100))
		defer e.end()
		fill := func(names ...string) {
			for _, name := range names {
				for e.backlog[name] < 5 {
					e.ask(name, 10, 20)
				}
			}
		}
		for range 2000 { // b is away
			fill("a")
			e.step()
		}
		a, b := e.served["a"], e.served["b"]
		for range 500 {
			fill("a", "b")
			e.step()
		}
		if a, b = e.served["a"]-a, e.served["b"]-b; b > 1.1*a+200 {
			t.Errorf("b was served %.0f and a %.0f after b was away", b, a)
		}
	})
}

// A flood fills the queue, and who asks for less than its share finds a place
// and is not told to wait for the flood.
func TestAFloodTakesNoPlacesFromOthers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := policy(t, of(1, 4))
		infer := func(ctx context.Context, tenant string) (*part, *interceptors.Denial) {
			return begin(t, p, ctx, &interceptors.Inference{Model: "1"}, tenant, "")
		}
		bg := context.Background()
		v, _ := infer(bg, "flood")
		time.Sleep(time.Second)
		v.End(well) // one takes a second
		var flood []*part
		for range 5 {
			v, d := infer(bg, "flood")
			if d != nil {
				t.Fatal(d)
			}
			flood = append(flood, v)
		}
		if _, d := infer(bg, "flood"); d == nil || d.Reason != interceptors.QueueFull {
			t.Errorf("%v, want QUEUE_FULL", d)
		}
		newest := waits(flood[4], bg)
		// Two take turns: it begins after two seconds at the most, and takes one.
		ctx, cancel := context.WithTimeout(bg, 3*time.Second)
		defer cancel()
		quiet, d := infer(ctx, "quiet")
		if d != nil {
			t.Fatalf("%v", d)
		}
		if d := denial(t, ended(t, newest)); d == nil || d.Reason != interceptors.QueueFull {
			t.Errorf("the newest of the flood got %v, want QUEUE_FULL", d)
		}
		flood[0].End(well)
		flood[1].End(well) // whichever of them ran
		if !quiet.Ready() {
			t.Error("the flood goes first")
		}
		quiet.End(well)
		for _, v := range flood[2:] {
			v.End(cancelled)
		}
		s := p.Snapshot()[0]
		if s.Refused[interceptors.QueueFull] != 2 || s.Tenants[0].Refused != 2 || s.Tenants[1].Refused != 0 || s.Tenants[1].Served == 0 {
			t.Errorf("%+v", s)
		}
		atRest(t, p)
	})
}

// Tenants of whom nothing is left to know are forgotten; what they owe is not.
func TestTenantsAreForgotten(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := policy(t, of(4, 4))
		l := p.pools[0]
		for n := range 20 * firstSweep {
			v, d := begin(t, p, context.Background(), &interceptors.Inference{Model: "1", InputTokens: 5}, fmt.Sprint(n), "")
			if d != nil {
				t.Fatal(d)
			}
			v.End(well)
		}
		if len(l.tenants) > 2*firstSweep {
			t.Errorf("%d tenants are known", len(l.tenants))
		}
		heavy, _ := begin(t, p, context.Background(), &interceptors.Inference{Model: "1", InputTokens: 1 << 30}, "heavy", "")
		v, _ := begin(t, p, context.Background(), &interceptors.Inference{Model: "1", InputTokens: 5}, "light", "")
		heavy.permit().inference.OutputTokens = 1 << 40
		heavy.End(well)
		v.End(well)
		l.mu.Lock()
		l.sweep()
		_, known := l.tenants["heavy"]
		l.mu.Unlock()
		if !known {
			t.Error("what the tenant was served is forgotten")
		}
		atRest(t, p)
	})
}
