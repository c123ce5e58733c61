package admit

import (
	"context"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/sluicegate/sluice/interceptors"
	adminv1 "github.com/sluicegate/sluice/proto/gen/sluice/admin/v1"
	configv1 "github.com/sluicegate/sluice/proto/gen/sluice/config/v1"
)

func TestResize(t *testing.T) {
	background := context.Background()
	bubble("up: who waits goes on", t, func(t *testing.T) {
		p := policy(t, of(3, 4))
		a, b := must(t, p, "3"), must(t, p, "2")
		if err := p.Resize(background, "gpu", 5); err != nil || !b.Ready() {
			t.Errorf("%v, and who waited goes on: %t", err, b.Ready())
		}
		if s := p.Snapshot()[0]; s.Ceiling != 5 || s.Capacity != 5 || s.Configured != 3 {
			t.Errorf("%+v", s)
		}
		a.End(well)
		b.End(well)
		atRest(t, p)
	})
	bubble("down: what runs goes on, and nothing begins until it fits", t, func(t *testing.T) {
		p := policy(t, of(6, 4))
		a, b := must(t, p, "3"), must(t, p, "3")
		if err := p.Resize(background, "gpu", 3); err != nil {
			t.Error(err)
		}
		c := must(t, p, "1")
		expect(t, p, 6, 1)
		a.End(well)
		expect(t, p, 3, 1)
		b.End(well)
		if !c.Ready() {
			t.Error("there is room, and it waits")
		}
		c.End(well)
		atRest(t, p)
	})
	bubble("an adaptive one stays where it is, and may go as far", t, func(t *testing.T) {
		p := policy(t, adapting())
		l := p.pools[0]
		l.mu.Lock()
		l.limit = 10
		l.settle(time.Now())
		l.mu.Unlock()
		for size, want := range map[int64]int64{64: 10, 40: 10} {
			if err := p.Resize(background, "gpu", size); err != nil || p.Snapshot()[0].Capacity != want {
				t.Errorf("%d: %v, %+v", size, err, p.Snapshot()[0])
			}
		}
		if err := p.Resize(background, "gpu", 5); err != nil || p.Snapshot()[0].Capacity != 5 {
			t.Errorf("%v, %+v", err, p.Snapshot()[0])
		}
	})
	for name, test := range map[string]struct {
		pool     string
		capacity int64
		want     codes.Code
	}{
		"nothing":                  {"gpu", 0, codes.InvalidArgument},
		"less than a model weighs": {"gpu", 4, codes.InvalidArgument}, // 3, and 2 are reserved
		"just enough":              {"gpu", 5, codes.OK},
		"no such pool":             {"cpu", 5, codes.NotFound},
	} {
		t.Run(name, func(t *testing.T) {
			c := of(6, 4)
			c.Tenants = []*configv1.PoolTenant{{Tenant: "a", Reserved: 2}}
			p := policy(t, c)
			if err := p.Resize(background, test.pool, test.capacity); status.Code(err) != test.want {
				t.Errorf("%v, want %v", err, test.want)
			}
		})
	}
	// What a tenant's inference can weigh follows, so that none waits for ever.
	bubble("what inferences weigh", t, func(t *testing.T) {
		c := of(10, 10)
		c.Models = []*configv1.PoolModel{{Model: "1", TokensPerPermit: 1}}
		p := policy(t, c)
		heavy := func() *part {
			v, d := begin(t, p, background, &interceptors.Inference{Model: "1", InputTokens: 100, MaxOutputTokens: 1}, "a", "")
			if d != nil {
				t.Fatal(d)
			}
			return v
		}
		heavy().End(well)
		if err := p.Resize(background, "gpu", 5); err != nil {
			t.Fatal(err)
		}
		v := heavy()
		if s := p.Snapshot()[0]; s.InUse != 5 {
			t.Errorf("%d permits are in use", s.InUse)
		}
		v.End(well)
		atRest(t, p)
	})
	bubble("what inferences weigh beside a reserve", t, func(t *testing.T) {
		c := of(10, 10)
		c.Models = []*configv1.PoolModel{{Model: "1", TokensPerPermit: 1}}
		c.Tenants = []*configv1.PoolTenant{{Tenant: "b", Reserved: 4}}
		p := policy(t, c)
		for size, want := range map[int64]int64{20: 12, 10: 6} {
			if err := p.Resize(background, "gpu", size); err != nil {
				t.Fatal(err)
			}
			v, d := begin(t, p, background, &interceptors.Inference{Model: "1", InputTokens: 11, MaxOutputTokens: 1}, "a", "")
			if d != nil || p.Snapshot()[0].InUse != want {
				t.Errorf("of %d permits: %v, %d in use, want %d", size, d, p.Snapshot()[0].InUse, want)
			}
			v.End(well)
		}
		atRest(t, p)
	})
}

func TestDrain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		background := context.Background()
		p := policy(t, of(1, 4))
		running, waiting := must(t, p, "1"), must(t, p, "1")
		if err := p.Drain(background, "gpu"); err != nil {
			t.Fatal(err)
		}
		if _, d := start(t, p, background, "1"); d == nil || d.Reason != interceptors.Draining || d.RetryAfter <= 0 || d.Quota != nil {
			t.Errorf("%+v, want DRAINING", d)
		}
		running.End(well)
		if !waiting.Ready() {
			t.Error("who waited before does not go on")
		}
		waiting.End(well)
		if s := p.Snapshot()[0]; !s.Draining || s.InUse != 0 || s.Refused[interceptors.Draining] != 1 {
			t.Errorf("%+v", s)
		}
		if _, d := start(t, p, background, "1"); d == nil || d.Reason != interceptors.Draining {
			t.Errorf("an empty pool: %+v, want DRAINING", d)
		}
		if err := p.Resume(background, "gpu"); err != nil {
			t.Fatal(err)
		}
		must(t, p, "1").End(well)
		if status.Code(p.Drain(background, "cpu")) != codes.NotFound || status.Code(p.Resume(background, "cpu")) != codes.NotFound {
			t.Error("a pool that there is not")
		}
		atRest(t, p)
	})
}

// In a pool that gateways share, a change holds for all of them.
func TestChangesOfSharedPools(t *testing.T) {
	s := store(t)
	c := common(16, 0, time.Minute, whileHeld)
	a, way := gatewayOf(t, s, c)
	b, _ := gatewayOf(t, s, c)
	if err := a.Resize(t.Context(), "gpu", 6); err != nil {
		t.Fatal(err)
	}
	eventually(t, "both have half of the new capacity", func() bool {
		x, y := a.Snapshot()[0], b.Snapshot()[0]
		return x.Capacity == 3 && y.Capacity == 3 && x.Ceiling == 6 && y.Ceiling == 6
	})
	if err := b.Drain(t.Context(), "gpu"); err != nil {
		t.Fatal(err)
	}
	eventually(t, "both drain", func() bool { return a.Snapshot()[0].Draining && b.Snapshot()[0].Draining })
	if err := a.Resume(t.Context(), "gpu"); err != nil {
		t.Fatal(err)
	}
	eventually(t, "both go on", func() bool { return !a.Snapshot()[0].Draining && !b.Snapshot()[0].Draining })
	late, _ := gatewayOf(t, s, c)
	if got := late.Snapshot()[0].Ceiling; got != 6 {
		t.Errorf("one that comes later has %d permits", got)
	}
	way.Cut(true)
	if err := a.Resize(t.Context(), "gpu", 8); status.Code(err) != codes.Unavailable {
		t.Errorf("without the store: %v", err)
	}
}

// Equal parts of a pool, without a store.
func TestReplicas(t *testing.T) {
	c := of(10, 0)
	c.Share = &configv1.PoolShare{Replicas: 3}
	p := policy(t, c)
	if s := p.Snapshot()[0]; p.Shared() || s.Capacity != 3 || s.Configured != 3 || s.Sharing == nil || s.Sharing.Gateways != 3 {
		t.Errorf("%+v", s)
	}
	endAll(take(t, p, 3))
	if n := len(take(t, p, 10)); n != 3 {
		t.Errorf("%d of 10 permits for one of three gateways", n)
	}
}

func TestAdminAPI(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		background := context.Background()
		c := of(2, 4)
		c.Tenants = []*configv1.PoolTenant{{Tenant: "a", Weight: 3}}
		c.Priorities = []*configv1.PoolPriority{{Priority: 5, Models: []string{"2"}}}
		p := policy(t, c)
		api := p.Admin()
		running := as(t, p, "a", "")
		other := as(t, p, "b\xff", "")
		time.Sleep(time.Second)
		waiting := as(t, p, "b\xff", "")
		time.Sleep(time.Second)
		running.End(well)
		for range 5 {
			_, _ = begin(t, p, background, &interceptors.Inference{Model: "3"}, "a", "")
		}
		r, err := api.GetPool(background, &adminv1.GetPoolRequest{Name: "gpu"})
		l := r.GetPool()
		if err != nil || l.GetConfigured() != 2 || l.GetCapacity() != 2 || l.GetAvailable() != 2 || l.GetInUse() != 2 || l.GetWaiting() != 4 ||
			l.GetQueueLength() != 4 || l.GetHold().AsDuration() != 2*time.Second || l.GetSharing() != nil || l.GetTenantCount() != 2 {
			t.Errorf("%v, %v", l, err)
		}
		if p := l.GetPriorities(); len(p) != 2 || p[0].GetPriority() != 5 || p[1].GetWaiting() != 4 || p[1].GetWait().AsDuration() != time.Second {
			t.Errorf("priorities %v", p)
		}
		if r := l.GetRefused(); len(r) != 1 || r[0].GetReason() != "QUEUE_FULL" || r[0].GetCount() != 1 {
			t.Errorf("refused %v", r)
		}
		if n := l.GetTenants(); len(n) != 2 || n[0].GetTenant() != "a" || n[0].GetWeight() != 3 || n[0].GetWaiting() != 4 || n[0].GetRefused() != 1 ||
			n[1].GetTenant() != "b\uFFFD" || n[1].GetInUse() != 2 || n[1].GetServed() != 2 {
			t.Errorf("tenants %v", n)
		}
		list, err := api.ListPools(background, &adminv1.ListPoolsRequest{})
		if err != nil || len(list.GetPools()) != 1 || list.GetPools()[0].GetTenants() != nil || list.GetPools()[0].GetInUse() != 2 {
			t.Errorf("%v, %v", list, err)
		}
		resized, err := api.ResizePool(background, &adminv1.ResizePoolRequest{Name: "gpu", Capacity: 8})
		if err != nil || resized.GetPool().GetCapacity() != 8 || resized.GetPool().GetInUse() != 8 {
			t.Errorf("%v, %v", resized, err)
		}
		drained, err := api.DrainPool(background, &adminv1.DrainPoolRequest{Name: "gpu"})
		if err != nil || !drained.GetPool().GetDraining() {
			t.Errorf("%v, %v", drained, err)
		}
		resumed, err := api.ResumePool(background, &adminv1.ResumePoolRequest{Name: "gpu"})
		if err != nil || resumed.GetPool().GetDraining() {
			t.Errorf("%v, %v", resumed, err)
		}
		if _, err := api.GetPool(background, &adminv1.GetPoolRequest{Name: "cpu"}); status.Code(err) != codes.NotFound {
			t.Errorf("%v", err)
		}
		var none *Policy
		if list, err := none.Admin().ListPools(background, &adminv1.ListPoolsRequest{}); err != nil || len(list.GetPools()) != 0 {
			t.Errorf("%v, %v", list, err)
		}
		_, _ = other, waiting
	})
}
