package admit

import (
	"context"
	"errors"
	"maps"
	"slices"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"go.uber.org/goleak"

	"github.com/sluicegate/sluice/interceptors"
	"github.com/sluicegate/sluice/interceptors/dialect"
	configv1 "github.com/sluicegate/sluice/proto/gen/sluice/config/v1"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func policy(t testing.TB, pools ...*configv1.Pool) *Policy {
	t.Helper()
	p, err := New(pools)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// of is a pool for the models "1", "2" and "3", which weigh that much.
func of(capacity, queue uint32) *configv1.Pool {
	return &configv1.Pool{Name: "gpu", Capacity: capacity, QueueLength: queue, Models: []*configv1.PoolModel{
		{Model: "1"}, {Model: "2", Weight: min(2, capacity)}, {Model: "3", Weight: min(3, capacity)}}}
}

// start begins an inference as the chain does.
func start(t testing.TB, p *Policy, ctx context.Context, model string) (*part, *interceptors.Denial) {
	t.Helper()
	return begin(t, p, ctx, &interceptors.Inference{Model: model}, "", "")
}

// begin begins an inference of a tenant and principal.
func begin(t testing.TB, p *Policy, ctx context.Context, i *interceptors.Inference, tenant, principal string) (*part, *interceptors.Denial) {
	t.Helper()
	c := &interceptors.Call{Method: &dialect.Method{Kind: dialect.Inference}, Tenant: tenant, Principal: principal}
	c.ID, _ = spiffeid.FromString(principal) // zero for anonymous
	c.SetContext(ctx)
	i.Call = c
	of, err := p.Begin(c)
	if err != nil {
		t.Fatalf("Begin refused: %v", err)
	}
	if of == nil {
		return nil, nil
	}
	v, err := of.Start(i)
	if err != nil {
		if v != nil {
			t.Error("a refusal leaves something open")
		}
		return nil, denial(t, err)
	}
	if v == nil {
		return nil, nil
	}
	return &part{v, p}, nil
}

// inference is what Start returns.
type inference = interceptors.InferencePolicy

// part is an inference's part, as the chain sees it.
type part struct {
	inference
	policy *Policy
}

func (v *part) Ready() bool {
	w, ok := v.inference.(interceptors.Waiter)
	return !ok || w.Ready()
}

func (v *part) Wait(ctx context.Context) error {
	if w, ok := v.inference.(interceptors.Waiter); ok {
		return w.Wait(ctx)
	}
	return nil
}

// permit is the part of a single pool.
func (v *part) permit() *permit {
	switch p := v.inference.(type) {
	case *permit:
		return p
	case *waiter:
		return &p.permit
	}
	return nil
}

// must is start of an inference that is not refused.
func must(t testing.TB, p *Policy, model string) *part {
	t.Helper()
	v, d := start(t, p, context.Background(), model)
	if d != nil {
		t.Fatal(d)
	}
	return v
}

func denial(t testing.TB, err error) *interceptors.Denial {
	t.Helper()
	if err == nil {
		return nil
	}
	var d *interceptors.Denial
	if !errors.As(err, &d) {
		t.Fatalf("error is no denial: %v", err)
	}
	return d
}

var (
	well      = interceptors.Outcome{}
	cancelled = interceptors.Outcome{Err: context.Canceled}
)

// expect compares the only pool.
func expect(t testing.TB, p *Policy, inUse int64, waiting int) {
	t.Helper()
	if s := p.Snapshot()[0]; s.InUse != inUse || s.Waiting != waiting {
		t.Errorf("%d permits in use and %d inferences waiting, want %d and %d", s.InUse, s.Waiting, inUse, waiting)
	}
}

// atRest fails if a permit or a place in a queue is left.
func atRest(t testing.TB, p *Policy) {
	t.Helper()
	for _, l := range p.pools {
		check(t, l)
		if l.inUse != 0 || l.waiting != 0 {
			t.Errorf("pool %s: %d permits and %d waiting are left", l.name, l.inUse, l.waiting)
		}
	}
}

// check fails if what a pool keeps contradicts itself.
func check(t testing.TB, l *pool) {
	t.Helper()
	l.mu.Lock()
	defer l.mu.Unlock()
	var used, kept, bytes int64
	var inQueue, ready int
	for _, tn := range l.tenants {
		var of, lines int
		var held int64
		for _, pr := range append(slices.Collect(maps.Values(tn.principals)), tn.all) {
			held += pr.used
			var n int
			for k := range pr.lanes {
				c := &pr.lanes[k]
				n += int(c.waiters.size)
				may := c.waiters.first != nil && pr.may(c.waiters.first.weight, l.principalPermits)
				if may != (c.place > 0) {
					t.Errorf("tenant %q, principal %q, level %d: may go is %t, and the place of the lane %d", tn.name, pr.name, k, may, c.place)
				}
				for w := c.waiters.first; w != nil; w = w.links[byLane].next {
					bytes += w.bytes
					if w.state != waiting {
						t.Errorf("state %d in the queue", w.state)
					}
				}
			}
			if n != pr.waiting {
				t.Errorf("principal %q: %d wait, and it counts %d", pr.name, n, pr.waiting)
			}
			if pr != tn.all && n == 0 && pr.used == 0 {
				t.Errorf("principal %q is at rest and not forgotten", pr.name)
			}
		}
		for k := range tn.lines {
			s := &tn.lines[k]
			of += int(s.all.size)
			may := s.lanes.top() != nil && tn.may(s.lanes.top().waiters.first.weight)
			if may != (s.ready > 0) || s.all.size > 0 != (s.long > 0) {
				t.Errorf("tenant %q, level %d: may go is %t, with %d waiting, in places %d and %d", tn.name, k, may, s.all.size, s.ready, s.long)
			}
			if may {
				lines++
			}
			if s.all.size == 0 && s.work != 0 {
				t.Errorf("tenant %q, level %d: work %v of nobody", tn.name, k, s.work)
			}
		}
		if of != tn.waiting || held != tn.used || lines != tn.ready {
			t.Errorf("tenant %q: %d wait, %d held, %d lines ready; it counts %d, %d, %d", tn.name, of, held, lines, tn.waiting, tn.used, tn.ready)
		}
		used, kept, inQueue, ready = used+held, kept+tn.kept(), inQueue+of, ready+lines
	}
	if used != l.inUse || kept != l.kept || inQueue != l.waiting || ready != l.ready || bytes != l.bytes {
		t.Errorf("pool: %d held, %d kept, %d waiting, %d ready, %d bytes; it counts %d, %d, %d, %d, %d",
			used, kept, inQueue, ready, bytes, l.inUse, l.kept, l.waiting, l.ready, l.bytes)
	}
	if w := l.first(); w != nil && !w.expired(time.Now()) && l.fits(w.tenant, w.weight) {
		t.Error("a wake-up was lost: the first could go")
	}
	for _, v := range l.levels {
		var weights int64
		for _, s := range v.longest.items {
			weights += s.tenant.weight
		}
		if weights != v.weights {
			t.Errorf("weights %d of a level, it counts %d", weights, v.weights)
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
