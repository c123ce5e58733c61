package gateway

import (
	"context"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	adminv1 "github.com/sluicegate/sluice/proto/gen/sluice/admin/v1"
)

const adminPool = "pools: [{name: gpu, capacity: 1, queue_length: 10, queue_timeout: 60s, models: [{model: \"*\"}]}]\n"

// A pool is seen, resized, drained and resumed while calls run; by whom a rule names it
// for, and the log says by whom.
func TestAdminChangesPools(t *testing.T) {
	m, behind := modelServer(t)
	const all = "/sluice.admin.v1.PoolsService/"
	text := strings.Replace(base, "methods: [", "methods: ["+all+"ListPools, "+all+"GetPool, "+all+"ResizePool, "+all+"DrainPool, ", 1) +
		"listener: {address: x, admin_api: true}\n"
	g := open(t, text+adminPool, behind)
	g.pool.abandoned = true
	api := adminv1.NewPoolsServiceClient(g.dial())
	c, cancel := context.WithCancel(ctx(t))
	begin := func(n string) {
		t.Helper()
		s, err := g.client().ModelStreamInfer(c)
		if err != nil {
			t.Fatal(err)
		}
		if err := s.Send(ask("words", n, words(100_000), number("delay_ms", 1))); err != nil {
			t.Fatal(err)
		}
	}
	begin("a")
	g.eventually("one runs", func() bool { return m.Stats("words").Active == 1 })
	begin("b")
	pool := func() *adminv1.Pool {
		t.Helper()
		r, err := api.GetPool(ctx(t), &adminv1.GetPoolRequest{Name: "gpu"})
		if err != nil {
			t.Fatal(err)
		}
		return r.GetPool()
	}
	g.eventually("one waits", func() bool { return pool().GetInUse() == 1 && pool().GetWaiting() == 1 })
	if n := pool().GetTenants(); len(n) != 1 || n[0].GetTenant() != "anonymous" || n[0].GetWaiting() != 1 {
		t.Errorf("%v", n)
	}
	if _, err := api.ResizePool(ctx(t), &adminv1.ResizePoolRequest{Name: "gpu", Capacity: 2}); err != nil {
		t.Fatal(err)
	}
	g.eventually("both run", func() bool { return m.Stats("words").Active == 2 })
	if _, err := api.ResizePool(ctx(t), &adminv1.ResizePoolRequest{Name: "gpu", Capacity: 1}); err != nil {
		t.Fatal(err)
	}
	if p := pool(); p.GetInUse() != 2 || p.GetCapacity() != 1 || m.Stats("words").Active != 2 {
		t.Errorf("%v", p)
	}
	if _, err := api.DrainPool(ctx(t), &adminv1.DrainPoolRequest{Name: "gpu"}); err != nil {
		t.Fatal(err)
	}
	_, err := g.client().ModelInfer(ctx(t), ask("echo", "a", "hello"))
	expect(t, "ModelInfer", err, "Unavailable DRAINING")
	_, err = api.ResumePool(ctx(t), &adminv1.ResumePoolRequest{Name: "gpu"})
	expect(t, "a method that no rule names", err, "Unauthenticated IDENTITY_MISSING")
	list, err := api.ListPools(ctx(t), &adminv1.ListPoolsRequest{})
	if err != nil || len(list.GetPools()) != 1 || !list.GetPools()[0].GetDraining() {
		t.Errorf("%v, %v", list, err)
	}
	if _, err := api.GetPool(ctx(t), &adminv1.GetPoolRequest{Name: "cpu"}); status.Code(err) != codes.NotFound {
		t.Errorf("%v", err)
	}
	cancel()
	g.eventually("it is empty", func() bool { return pool().GetInUse() == 0 })
	g.Shutdown()
	for _, want := range []string{`"a pool was resized" capacity=2 pool=gpu`, `"a pool is being drained" pool=gpu`, "peer=127.0.0.1"} {
		if !strings.Contains(g.log.String(), want) {
			t.Errorf("the log has no %s:\n%s", want, g.log)
		}
	}
}
