package admit

import (
	"context"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/sluicegate/sluice/interceptors"
	"github.com/sluicegate/sluice/interceptors/dialect"
	configv1 "github.com/sluicegate/sluice/proto/gen/sluice/config/v1"
)

func TestNewRefusesPoliciesThatCannotWork(t *testing.T) {
	with := func(f func(*configv1.Pool)) []*configv1.Pool {
		c := of(4, 4)
		c.Models = []*configv1.PoolModel{{Model: "x", Weight: 2}}
		f(c)
		return []*configv1.Pool{c}
	}
	tenants := func(list ...*configv1.PoolTenant) []*configv1.Pool {
		return with(func(c *configv1.Pool) { c.Tenants = list })
	}
	principals := func(list ...string) []*configv1.Pool {
		return with(func(c *configv1.Pool) { c.Priorities = []*configv1.PoolPriority{{Principals: list}} })
	}
	for _, test := range []struct {
		name  string
		pools []*configv1.Pool
		want  string
	}{
		{"tenant twice", tenants(&configv1.PoolTenant{Tenant: "a"}, &configv1.PoolTenant{Tenant: "a"}), `pools[0].tenants[1].tenant: "a" is named twice`},
		{"reserve for all", tenants(&configv1.PoolTenant{Tenant: "*", Reserved: 1}), "pools[0].tenants[0].reserved: name the tenant"},
		{"reserve over cap", tenants(&configv1.PoolTenant{Tenant: "a", Permits: 1, Reserved: 2}), "pools[0].tenants[0].reserved: 2 permits are kept"},
		{"reserves over capacity", tenants(&configv1.PoolTenant{Tenant: "a", Reserved: 2}, &configv1.PoolTenant{Tenant: "b", Reserved: 3}), "pools[0].tenants[1].reserved: 5 permits are reserved, and there are 4"},
		{"weight over what is not reserved", tenants(&configv1.PoolTenant{Tenant: "a", Reserved: 3}), `pools[0].models[0]: "x" weighs 2 of 1 permits`},
		{"weight over a cap", tenants(&configv1.PoolTenant{Tenant: "a", Permits: 1}), `pools[0].models[0]: "x" weighs 2 of 1 permits`},
		{"weight over a principal's cap", with(func(c *configv1.Pool) { c.PrincipalPermits = 1 }), `weighs 2 of 1 permits`},
		{"two weights", with(func(c *configv1.Pool) { c.Models[0].TokensPerPermit = 5 }), `pools[0].models[0]: "x" has a weight and tokens_per_permit`},
		{"no time to age", with(func(c *configv1.Pool) { c.Ageing = durationpb.New(0) }), "pools[0].ageing"},
		{"no target", with(func(c *configv1.Pool) { c.Adaptive = &configv1.PoolAdaptive{} }), "pools[0].adaptive.first_response: say"},
		{"least over capacity", with(func(c *configv1.Pool) {
			c.Adaptive = &configv1.PoolAdaptive{FirstResponse: durationpb.New(1), MinCapacity: 5}
		}), "pools[0].adaptive.min_capacity: it is 5"},
		{"method", with(func(c *configv1.Pool) { c.Priorities = []*configv1.PoolPriority{{Methods: []string{"inference"}}} }), `pools[0].priorities[0].methods[0]: "inference"`},
		{"no SPIFFE ID", principals("alice"), `pools[0].priorities[0].principals[0]: "alice" is no SPIFFE ID`},
		{"trust domain", principals("spiffe://*/x"), "principals[0]"},
		{"no path", principals("spiffe://a"), "has no path"},
		{"part of a segment", principals("spiffe://a/b*"), "whole segment"},
		{"rest in the middle", principals("spiffe://a/**/b"), "whole segment"},
		{"empty segment", principals("spiffe://a/"), "empty"},
		{"dots", principals("spiffe://a/.."), "principals[0]"},
		{"together in part", []*configv1.Pool{
			{Name: "a", Capacity: 1, Models: []*configv1.PoolModel{{Model: "x", Together: true}}},
			{Name: "b", Capacity: 1, Models: []*configv1.PoolModel{{Model: "x"}}}}, `pools[1].models[0]: "x" is in pool "a" already`},
		{"together twice in one", []*configv1.Pool{
			{Name: "a", Capacity: 1, Models: []*configv1.PoolModel{{Model: "x", Together: true}, {Model: "x", Together: true}}}}, `pools[0].models[1]: "x" is in pool "a" already`},
	} {
		t.Run(test.name, func(t *testing.T) {
			if _, err := New(test.pools); err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("error %v, want %q", err, test.want)
			}
		})
	}
}

func TestPatterns(t *testing.T) {
	for _, test := range []struct {
		pattern, principal string
		want               bool
	}{
		{"spiffe://a/b", "spiffe://a/b", true},
		{"spiffe://a/b", "spiffe://a/b/c", false},
		{"spiffe://a/b/c", "spiffe://a/b", false},
		{"spiffe://a/b", "spiffe://other/b", false},
		{"spiffe://a/*", "spiffe://a/b", true},
		{"spiffe://a/*", "spiffe://a", false},
		{"spiffe://a/*/c", "spiffe://a/b/c", true},
		{"spiffe://a/**", "spiffe://a/b/c", true},
		{"spiffe://a/b/**", "spiffe://a/b/c/d", true},
		{"spiffe://a/b/**", "spiffe://a/b", false},
		{"spiffe://a/**", "anonymous", false},
		{"anonymous", "anonymous", true},
		{"anonymous", "spiffe://a/anonymous", false},
		{"anonymous", "", false},
	} {
		p, err := parsePattern(test.pattern)
		if err != nil {
			t.Fatal(err)
		}
		if got := matches(p, test.principal); got != test.want {
			t.Errorf("%s matches %q: %t, want %t", test.pattern, test.principal, got, test.want)
		}
	}
}

// as is an inference of model "1" that is not refused.
func as(t *testing.T, p *Policy, tenant, principal string) *part {
	t.Helper()
	v, d := begin(t, p, context.Background(), &interceptors.Inference{Model: "1"}, tenant, principal)
	if d != nil {
		t.Fatal(d)
	}
	check(t, p.pools[0])
	return v
}

// order ends what runs, one after the other, and returns the names of those that
// were granted, as they were.
func order(t *testing.T, running *part, waiting map[string]*part) (names string) {
	t.Helper()
	for {
		running.End(well)
		running = nil
		for name, v := range waiting {
			if v.Ready() {
				if running != nil {
					t.Error("two were granted")
				}
				names += name
				running = v
				delete(waiting, name)
			}
		}
		if running == nil {
			return names
		}
	}
}

func TestPriorities(t *testing.T) {
	pool := func() *configv1.Pool {
		c := of(1, 10)
		c.Priorities = []*configv1.PoolPriority{
			{Priority: 5, Principals: []string{"spiffe://a/urgent/*"}},
			{Priority: -1, Principals: []string{"spiffe://a/batch/**", "anonymous"}},
		}
		return c
	}
	bubble("the higher goes first", t, func(t *testing.T) {
		p := policy(t, pool())
		held := as(t, p, "", "spiffe://a/x")
		waiting := map[string]*part{
			"c": as(t, p, "", "spiffe://a/batch/x"), "b": as(t, p, "", "spiffe://a/x"), "a": as(t, p, "", "spiffe://a/urgent/x")}
		if got := order(t, held, waiting); got != "abc" {
			t.Errorf("order %s", got)
		}
		atRest(t, p)
	})
	bubble("who waits grows older", t, func(t *testing.T) {
		p := policy(t, pool())
		held := as(t, p, "", "spiffe://a/x")
		batch := as(t, p, "", "anonymous")
		out := waits(batch, context.Background())
		time.Sleep(defaultQueueTimeout/4 + 1)
		batchSoon := as(t, p, "", "spiffe://a/x") // the same level by now
		time.Sleep(defaultQueueTimeout/4 + 1)
		urgent := as(t, p, "", "spiffe://a/urgent/x") // and again
		pending(t, out)
		if got := order(t, held, map[string]*part{"a": batch, "b": urgent, "c": batchSoon}); got != "abc" {
			t.Errorf("order %s", got)
		}
		if err := <-out; err != nil && denial(t, err).Reason != interceptors.Draining { // the grant, or the end, as it came to see it
			t.Error(err)
		}
		atRest(t, p)
	})
	bubble("a lower one gives its place", t, func(t *testing.T) {
		c := pool()
		c.QueueLength = 1
		p := policy(t, c)
		held, batch := as(t, p, "", "spiffe://a/x"), as(t, p, "", "anonymous")
		out := waits(batch, context.Background())
		urgent := as(t, p, "", "spiffe://a/urgent/x")
		if d := denial(t, ended(t, out)); d == nil || d.Reason != interceptors.QueueFull {
			t.Errorf("%v, want QUEUE_FULL", d)
		}
		if _, d := begin(t, p, context.Background(), &interceptors.Inference{Model: "1"}, "", "anonymous"); d == nil || d.Reason != interceptors.QueueFull {
			t.Errorf("%v, want QUEUE_FULL", d)
		}
		batch.End(cancelled)
		urgent.End(cancelled)
		held.End(well)
		atRest(t, p)
	})
	bubble("an urgent small one does not wait for a large one", t, func(t *testing.T) {
		c := pool()
		c.Capacity, c.Models[2].Weight = 3, 3
		p := policy(t, c)
		held, large := must(t, p, "1"), must(t, p, "3")
		urgent := as(t, p, "", "spiffe://a/urgent/x")
		if large.Ready() || !urgent.Ready() {
			t.Error("the urgent one waits, and there is room")
		}
		held.End(well)
		urgent.End(well)
		large.End(well)
		atRest(t, p)
	})
	bubble("by model and method", t, func(t *testing.T) {
		c := of(1, 10)
		c.Priorities = []*configv1.PoolPriority{{Priority: 1, Models: []string{"2"}}, {Priority: 2, Methods: []string{"/a.B/C"}}}
		l := policy(t, c).pools[0]
		for want, i := range []*interceptors.Inference{
			{Model: "1", Call: &interceptors.Call{CallInfo: interceptors.CallInfo{FullMethod: "/a.B/C"}}},
			{Model: "2", Call: &interceptors.Call{CallInfo: interceptors.CallInfo{FullMethod: "/a.B/C"}}}, // the first rule
			{Model: "1", Call: &interceptors.Call{}},
		} {
			if got := l.levelOf(i); got != want {
				t.Errorf("level %d, want %d", got, want)
			}
		}
	})
}

func TestCapsAndReserves(t *testing.T) {
	bubble("a tenant at its cap stands in nobody's way", t, func(t *testing.T) {
		c := of(3, 10)
		c.Models = c.Models[:1]
		c.Tenants = []*configv1.PoolTenant{{Tenant: "a", Permits: 1}}
		p := policy(t, c)
		a1, a2 := as(t, p, "a", ""), as(t, p, "a", "")
		b := as(t, p, "b", "")
		if !a1.Ready() || a2.Ready() || !b.Ready() {
			t.Error("want the second of a to wait alone")
		}
		a1.End(well)
		if !a2.Ready() {
			t.Error("the second of a waits though nothing of a runs")
		}
		a2.End(well)
		b.End(well)
		atRest(t, p)
	})
	bubble("a principal at its cap stands in nobody's way", t, func(t *testing.T) {
		c := of(3, 10)
		c.Models, c.PrincipalPermits = c.Models[:1], 1
		p := policy(t, c)
		a1, a2 := as(t, p, "t", "a"), as(t, p, "t", "a")
		b := as(t, p, "t", "b")
		if !a1.Ready() || a2.Ready() || !b.Ready() {
			t.Error("want the second of a to wait alone")
		}
		b.End(well)
		if a2.Ready() {
			t.Error("over the cap")
		}
		a1.End(well)
		if !a2.Ready() {
			t.Error("the second of a waits though nothing of a runs")
		}
		a2.End(well)
		atRest(t, p)
	})
	bubble("a cap without a queue", t, func(t *testing.T) {
		c := of(3, 0)
		c.Models, c.PrincipalPermits = c.Models[:1], 1
		p := policy(t, c)
		v := as(t, p, "t", "a")
		if _, d := begin(t, p, context.Background(), &interceptors.Inference{Model: "1"}, "t", "a"); d == nil || d.Reason != interceptors.ConcurrencyLimit {
			t.Errorf("%v, want CONCURRENCY_LIMIT", d)
		}
		v.End(well)
		atRest(t, p)
	})
	bubble("a reserve is kept, and used at once", t, func(t *testing.T) {
		c := of(3, 10)
		c.Models = c.Models[:1]
		c.Tenants = []*configv1.PoolTenant{{Tenant: "a", Reserved: 1}}
		p := policy(t, c)
		b := []*part{as(t, p, "b", ""), as(t, p, "b", ""), as(t, p, "b", "")}
		if b[2].Ready() {
			t.Error("took what is reserved for another")
		}
		a := as(t, p, "a", "")
		if !a.Ready() {
			t.Error("the reserve is not there")
		}
		more := as(t, p, "a", "") // beyond the reserve it is one among others
		b[0].End(well)
		if !b[2].Ready() || more.Ready() {
			t.Error("want the turn to go round")
		}
		a.End(well)
		if !more.Ready() {
			t.Error("the reserve is free, and its tenant waits")
		}
		more.End(well)
		b[1].End(well)
		b[2].End(well)
		atRest(t, p)
	})
}

func TestWeightByTokens(t *testing.T) {
	c := of(10, 10)
	c.Models = []*configv1.PoolModel{{Model: "1", TokensPerPermit: 100, DefaultOutputTokens: 150}}
	for _, test := range []struct {
		name string
		i    *interceptors.Inference
		want int64
	}{
		{"nothing known", &interceptors.Inference{}, 2},
		{"input and output", &interceptors.Inference{InputTokens: 100, MaxOutputTokens: 100}, 2},
		{"rounded up", &interceptors.Inference{InputTokens: 100, MaxOutputTokens: 101}, 3},
		{"at least one", &interceptors.Inference{MaxOutputTokens: 1}, 1},
		{"at most all", &interceptors.Inference{InputTokens: 1 << 62, MaxOutputTokens: 1 << 62}, 10},
		{"the server's own count of the input", &interceptors.Inference{InputTokens: 900, ReportedInput: 50, MaxOutputTokens: 50}, 1},
		{"it writes more than it may", &interceptors.Inference{MaxOutputTokens: 50, OutputTokens: 350}, 4},
	} {
		i := test.i
		i.Model = "1"
		p := policy(t, c)
		v, d := begin(t, p, context.Background(), i, "", "")
		if d != nil || v.permit().weight != test.want {
			t.Errorf("%s: %v, weight %d; want %d", test.name, d, v.permit().weight, test.want)
		}
		v.End(well)
		atRest(t, p)
	}
	bubble("corrected while it runs", t, func(t *testing.T) {
		p := policy(t, c)
		i := &interceptors.Inference{Model: "1", InputTokens: 100, MaxOutputTokens: 200}
		v, _ := begin(t, p, context.Background(), i, "a", "")
		rest := &interceptors.Inference{Model: "1", InputTokens: 400, MaxOutputTokens: 300}
		other, _ := begin(t, p, context.Background(), rest, "a", "")
		next, _ := begin(t, p, context.Background(), &interceptors.Inference{Model: "1", MaxOutputTokens: 100}, "b", "")
		last, _ := begin(t, p, context.Background(), &interceptors.Inference{Model: "1", MaxOutputTokens: 100}, "b", "")
		expect(t, p, 10, 2) // 3 + 7
		respond := func(v *part) {
			t.Helper()
			if err := v.Response(nil); err != nil {
				t.Error(err)
			}
			check(t, p.pools[0])
		}
		i.OutputTokens = 390 // two permits more than it was given
		respond(v)
		expect(t, p, 12, 2)
		rest.ReportedInput = 100 // four less, with what it may write: two of them are owed
		rest.MaxOutputTokens = 200
		respond(other)
		expect(t, p, 10, 0)
		if !last.Ready() {
			t.Error("there is room, and it waits")
		}
		for _, v := range []*part{v, other, next, last} {
			v.End(well)
		}
		atRest(t, p)
	})
}

func TestQueueBytes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d, err := dialect.KServe(dialect.Options{})
		if err != nil {
			t.Fatal(err)
		}
		c := of(1, 10)
		c.QueueBytes = 1000
		p := policy(t, c)
		chain := interceptors.New([]*interceptors.Backend{{Name: "b", Dialect: d}}, p)
		infer := func(id int) (*interceptors.Call, error) {
			call, err := chain.Begin(context.Background(), interceptors.CallInfo{FullMethod: "/inference.GRPCInferenceService/ModelInfer"})
			if err != nil {
				t.Fatal(err)
			}
			raw := protowire.AppendString(protowire.AppendTag(nil, 1, protowire.BytesType), "1")
			raw = protowire.AppendString(protowire.AppendTag(raw, 3, protowire.BytesType), strings.Repeat("x", id))
			e := interceptors.RawEnvelope(mem.BufferSlice{mem.SliceBuffer(raw)})
			defer e.Release()
			_, err = call.Request(e)
			return call, err
		}
		running, err := infer(2000)
		if err != nil {
			t.Fatal(err)
		}
		first, err := infer(600)
		if err != nil {
			t.Error(err)
		}
		if s := p.Snapshot()[0]; s.WaitingBytes != 606 {
			t.Errorf("%d bytes wait", s.WaitingBytes)
		}
		for _, size := range []int{600, 2000} {
			if _, err := infer(size); denial(t, err).Reason != interceptors.QueueFull {
				t.Errorf("%v, want QUEUE_FULL", err)
			}
			expect(t, p, 1, 1)
		}
		small, err := infer(100)
		if err != nil {
			t.Error(err)
		}
		for _, c := range []*interceptors.Call{running, first, small} {
			c.End(nil)
		}
		atRest(t, p)
	})
}

// Who cannot end in time any more leaves the queue, before its deadline.
func TestWhoCannotMakeItLeaves(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := policy(t, of(2, 4))
		v := must(t, p, "1")
		time.Sleep(time.Second)
		v.End(well)
		held := must(t, p, "2")
		ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
		defer cancel()
		w, d := start(t, p, ctx, "1")
		if d != nil {
			t.Fatal(d)
		}
		out := waits(w, ctx)
		time.Sleep(time.Second - 1)
		pending(t, out)
		time.Sleep(1)
		if d := denial(t, ended(t, out)); d == nil || d.Reason != interceptors.DeadlineUnreachable {
			t.Errorf("%v, want DEADLINE_UNREACHABLE", d)
		}
		w.End(cancelled)
		held.End(cancelled)
		atRest(t, p)
	})
}

// Each model has its own estimate, and an old one is forgotten.
func TestEstimates(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := of(1, 10)
		c.Models = []*configv1.PoolModel{{Model: "slow"}, {Model: "quick"}}
		p := policy(t, c)
		run := func(model string, d time.Duration) {
			v := must(t, p, model)
			time.Sleep(d)
			v.End(well)
		}
		run("slow", 10*time.Second)
		run("quick", time.Second)
		held := must(t, p, "slow")
		ctx, cancel := context.WithTimeout(context.Background(), 12*time.Second)
		defer cancel()
		if _, d := start(t, p, ctx, "slow"); d == nil || d.Reason != interceptors.DeadlineUnreachable {
			t.Errorf("slow: %v, want DEADLINE_UNREACHABLE", d)
		}
		w, d := start(t, p, ctx, "quick")
		if d != nil {
			t.Errorf("quick: %v", d)
		}
		w.End(cancelled)
		held.End(cancelled)
		time.Sleep(2 * time.Minute)
		held = must(t, p, "slow")
		late, cancel := context.WithTimeout(context.Background(), 12*time.Second)
		defer cancel()
		if w, d = start(t, p, late, "slow"); d != nil {
			t.Fatalf("after two minutes: %v", d)
		}
		w.End(cancelled)
		held.End(cancelled)
		atRest(t, p)
	})
}
