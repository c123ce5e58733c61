package admit

import (
	"context"
	"errors"
	"testing"

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
func start(t testing.TB, p *Policy, ctx context.Context, model string) (*permit, *interceptors.Denial) {
	t.Helper()
	c := &interceptors.Call{Method: &dialect.Method{Kind: dialect.Inference}}
	c.SetContext(ctx)
	part, err := p.Begin(c)
	if err != nil {
		t.Fatalf("Begin refused: %v", err)
	}
	if part == nil {
		return nil, nil
	}
	v, err := part.Start(&interceptors.Inference{Call: c, Model: model})
	if err != nil {
		if v != nil {
			t.Error("a refusal leaves something open")
		}
		return nil, denial(t, err)
	}
	if v == nil {
		return nil, nil
	}
	return v.(*permit), nil
}

// must is start of an inference that is not refused.
func must(t testing.TB, p *Policy, model string) *permit {
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
		if l.inUse != 0 || l.waiting != 0 || l.ahead != 0 || l.head != nil || l.tail != nil {
			t.Errorf("pool %s: %d permits, %d waiting with %d ahead, queue %p to %p are left", l.name, l.inUse, l.waiting, l.ahead, l.head, l.tail)
		}
	}
}
