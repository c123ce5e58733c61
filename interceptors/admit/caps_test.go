package admit

import (
	"context"
	"testing"

	"github.com/sluicegate/sluice/interceptors"
	configv1 "github.com/sluicegate/sluice/proto/gen/sluice/config/v1"
)

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
