package config

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"testing"

	"go.opentelemetry.io/otel/attribute"
	sdkmetric "go.opentelemetry.io/otel/sdk/metric"
	"go.opentelemetry.io/otel/sdk/metric/metricdata"
	"google.golang.org/protobuf/proto"

	"github.com/sluicegate/sluice/interceptors"
	"github.com/sluicegate/sluice/interceptors/dialect"
	"github.com/sluicegate/sluice/interceptors/internal/redistest"
	"github.com/sluicegate/sluice/interceptors/telemetry"
)

// What a budget of GPU time counts is what an inference holds of all pools.
func TestPermitsOfAnInference(t *testing.T) {
	const text = `
identity: {insecure: {}, rules: [{principals: [anonymous], methods: [inference], models: ["*"]}]}
backends: [{name: gpu, dialect: DIALECT_TRITON}]
budgets: [{name: gpu-time, gpu_seconds: 100}]
pools:
- name: a
  capacity: 16
  models:
  - {model: fixed, weight: 3}
  - {model: tokens, tokens_per_permit: 100, default_output_tokens: 150}
  - {model: both, weight: 4, together: true}
  - {model: mixed, tokens_per_permit: 50, together: true}
  - {model: alone}
  - {model: "*", weight: 2}
- name: b
  capacity: 8
  models:
  - {model: both, together: true}
  - {model: mixed, weight: 5, together: true}
`
	g := build(t, parse(t, text), nil, Options{})
	defer g.Close()
	for _, tt := range []struct {
		i    *interceptors.Inference
		want int64
	}{
		{&interceptors.Inference{Model: "fixed"}, 3},
		{&interceptors.Inference{Model: "anything"}, 2},
		{&interceptors.Inference{Model: "tokens"}, 2},
		{&interceptors.Inference{Model: "tokens", InputTokens: 500, MaxOutputTokens: 101}, 7},
		{&interceptors.Inference{Model: "both"}, 5},
		{&interceptors.Inference{Model: "mixed", InputTokens: 100, MaxOutputTokens: 100}, 9},
	} {
		if got := g.Pools().Permits(tt.i); got != tt.want {
			t.Errorf("%s: %d permits, want %d", tt.i.Model, got, tt.want)
		}
		// And the budget reserves a second of each, or so.
		if got := reserves(t, g, tt.i); got%tt.want != 0 || got/tt.want != reserves(t, g, &interceptors.Inference{Model: "alone"}) {
			t.Errorf("%s: %d reserved, want %d for each permit", tt.i.Model, got, reserves(t, g, &interceptors.Inference{Model: "alone"}))
		}
	}
}

// reserves is what a budget reserves for an inference.
func reserves(t *testing.T, g *Guard, i *interceptors.Inference) (n int64) {
	t.Helper()
	i.Call = &interceptors.Call{Method: &dialect.Method{Kind: dialect.Inference}}
	i.Call.SetContext(context.Background())
	p, err := g.Budgets().Tokens().Begin(i.Call)
	if err != nil {
		t.Fatal(err)
	}
	v, err := p.Start(i)
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range g.Budgets().Snapshot() {
		n += a.Reserved
	}
	v.End(interceptors.Outcome{})
	return n
}

func TestStores(t *testing.T) {
	const share = "pools: [{name: gpu, capacity: 4, models: [{model: \"*\"}], share: {}}]\n"
	const spend = "budgets: [{name: day, tokens: 10}]\n"
	for name, tt := range map[string]struct{ text, want string }{
		"a share without Redis":       {share, "redis: a pool has a share"},
		"a share with Redis":          {share + "redis: {addresses: [\"127.0.0.1:1\"]}", ""},
		"equal parts":                 {strings.Replace(share, "{}", "{replicas: 2}", 1), ""},
		"too many":                    {strings.Replace(share, "{}", "{replicas: 5}", 1), "pools[0].share.replicas: 4 permits are not enough"},
		"a reserve":                   {strings.Replace(share, "share", "tenants: [{tenant: a, reserved: 1}], share", 1), "pools[0].tenants[0].reserved: gateways that share"},
		"Redis without an address":    {"redis: {timeout: 1s}", "redis.addresses: there are none"},
		"budgets in the same":         {spend + "budget_store: {redis: {}}\nredis: {addresses: [\"127.0.0.1:1\"]}", ""},
		"budgets in none":             {spend + "budget_store: {redis: {}}", "budget_store.redis.addresses: there are none, and"},
		"half a Redis for budgets":    {spend + "budget_store: {redis: {username: a}}\nredis: {addresses: [\"127.0.0.1:1\"]}", "budget_store.redis.addresses: there are none, so"},
		"budgets in one of their own": {spend + "budget_store: {redis: {addresses: [\"127.0.0.1:1\"]}}", ""},
	} {
		t.Run(name, func(t *testing.T) {
			err := Check(parse(t, strings.ReplaceAll(whole, "pools: [{name: gpu-0, capacity: 1, models: [{model: llama}]}]\n", "")[:strings.Index(whole, "budgets:")]+tt.text))
			if (err == nil) != (tt.want == "") || err != nil && !strings.HasPrefix(err.Error(), tt.want) {
				t.Errorf("%v, want %q", err, tt.want)
			}
		})
	}
}

// One Redis for budgets and pools; a reload goes on with both, and the last to close
// gives back what was leased.
func TestOneRedisForAll(t *testing.T) {
	s := redistest.New(t, "../budget/testdata/redis.sh")
	text := whole[:strings.Index(whole, "budgets:")] + fmt.Sprintf(`
redis: {addresses: [%q], timeout: 1s}
budget_store: {redis: {}}
budgets: [{name: hour, tokens: 100}]
pools: [{name: gpu, capacity: 4, models: [{model: llama}], share: {}}]
`, s.Proxy(t).Address())
	first := build(t, parse(t, text), nil, Options{})
	second := build(t, parse(t, text), first, Options{})
	if first.Pools() != second.Pools() {
		t.Error("the reload did not take the pools over")
	}
	first.Close()
	other := parse(t, text)
	other.Pools[0].QueueLength = 3
	third := build(t, other, second, Options{})
	if third.Pools() == second.Pools() {
		t.Error("pools that changed are the old ones")
	}
	if got := third.Pools().Snapshot()[0].Sharing.Gateways; got != 2 {
		t.Errorf("%d gateways, want the pools before and after", got)
	}
	second.Close()
	fourth := build(t, proto.CloneOf(parse(t, text)), nil, Options{})
	if got := fourth.Pools().Snapshot()[0].Sharing.Gateways; got != 2 {
		t.Errorf("%d gateways, want those that are not closed", got)
	}
	if got := fourth.samples()[0].Gateways; got != 2 {
		t.Errorf("the metrics have %d gateways", got)
	}
	third.Close()
	fourth.Close()
}

// Pools are seen as metrics, tenants that no configuration names as one; after a
// reload only those of the new configuration.
func TestMetricsOfPools(t *testing.T) {
	reader := sdkmetric.NewManualReader()
	o := Options{Telemetry: []telemetry.Option{telemetry.WithMeterProvider(sdkmetric.NewMeterProvider(sdkmetric.WithReader(reader)))}}
	text := strings.Replace(whole, "capacity: 1, models", "capacity: 2, queue_length: 1, tenants: [{tenant: a}], models", 1)
	g := build(t, parse(t, text), nil, o)
	begin := func(tenant string) interceptors.InferencePolicy {
		call := &interceptors.Call{Method: &dialect.Method{Kind: dialect.Inference}, Tenant: tenant}
		call.SetContext(context.Background())
		p, err := g.Pools().Begin(call)
		if err != nil {
			t.Fatal(err)
		}
		v, err := p.Start(&interceptors.Inference{Call: call, Model: "llama"})
		if err != nil {
			return nil
		}
		return v
	}
	var all []interceptors.InferencePolicy
	for _, tenant := range []string{"a", "b", "c"} {
		all = append(all, begin(tenant))
	}
	if begin("c") != nil {
		t.Error("not refused")
	}
	got := collect(t, reader)
	want := []string{
		"sluice.pool.gateways sluice.pool=gpu-0 1",
		"sluice.pool.permits.capacity sluice.pool=gpu-0 2",
		"sluice.pool.permits.in_use sluice.pool=gpu-0 2",
		"sluice.pool.queue.length sluice.pool=gpu-0,sluice.priority=0 1",
		"sluice.pool.refused sluice.pool=gpu-0,sluice.reason=QUEUE_FULL 1",
		"sluice.pool.tenant.permits.in_use sluice.pool=gpu-0,sluice.tenant=_OTHER 1",
		"sluice.pool.tenant.permits.in_use sluice.pool=gpu-0,sluice.tenant=a 1",
		"sluice.pool.tenant.queue.length sluice.pool=gpu-0,sluice.tenant=_OTHER 1",
		"sluice.pool.tenant.queue.length sluice.pool=gpu-0,sluice.tenant=a 0",
		"sluice.pool.tenant.served sluice.pool=gpu-0,sluice.tenant=_OTHER 1",
		"sluice.pool.tenant.served sluice.pool=gpu-0,sluice.tenant=a 1",
	}
	if !slices.Equal(got, want) {
		t.Errorf("metrics\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
	all[0].End(interceptors.Outcome{})
	if got := collect(t, reader); !slices.ContainsFunc(got, func(s string) bool {
		return strings.HasPrefix(s, "sluice.pool.queue.wait sluice.pool=gpu-0,sluice.priority=0 ")
	}) {
		t.Errorf("no wait in\n%s", strings.Join(got, "\n"))
	}
	for _, v := range all[1:] {
		v.End(interceptors.Outcome{})
	}
	other := parse(t, text)
	other.Pools[0].Name = "gpu-1"
	after := build(t, other, g, o)
	if got := collect(t, reader); len(got) == 0 || strings.Contains(strings.Join(got, "\n"), "gpu-0") {
		t.Errorf("after a reload\n%s", strings.Join(got, "\n"))
	}
	g.Close()
	after.Close()
	if got := collect(t, reader); len(got) > 0 {
		t.Errorf("after the last was closed\n%s", strings.Join(got, "\n"))
	}
}

// collect are the metrics of pools, as lines.
func collect(t *testing.T, r sdkmetric.Reader) (lines []string) {
	t.Helper()
	var all metricdata.ResourceMetrics
	if err := r.Collect(context.Background(), &all); err != nil {
		t.Fatal(err)
	}
	add := func(name string, labels attribute.Set, value any) {
		var parts []string
		for _, kv := range labels.ToSlice() {
			parts = append(parts, fmt.Sprintf("%s=%s", kv.Key, kv.Value.String()))
		}
		lines = append(lines, fmt.Sprintf("%s %s %v", name, strings.Join(parts, ","), value))
	}
	for _, scope := range all.ScopeMetrics {
		for _, m := range scope.Metrics {
			if !strings.HasPrefix(m.Name, "sluice.pool.") {
				continue
			}
			switch d := m.Data.(type) {
			case metricdata.Gauge[int64]:
				for _, p := range d.DataPoints {
					add(m.Name, p.Attributes, p.Value)
				}
			case metricdata.Gauge[float64]:
				for _, p := range d.DataPoints {
					add(m.Name, p.Attributes, p.Value)
				}
			case metricdata.Sum[int64]:
				for _, p := range d.DataPoints {
					add(m.Name, p.Attributes, p.Value)
				}
			}
		}
	}
	slices.Sort(lines)
	return lines
}
