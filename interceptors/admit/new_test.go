package admit

import (
	"strings"
	"testing"

	"google.golang.org/protobuf/types/known/durationpb"

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
		{"targets and a gradient", with(func(c *configv1.Pool) {
			c.Adaptive = &configv1.PoolAdaptive{Gradient: true, OutputToken: durationpb.New(1)}
		}), "pools[0].adaptive.gradient: it has no targets"},
		{"a target of nothing", with(func(c *configv1.Pool) {
			c.Adaptive = &configv1.PoolAdaptive{OutputToken: durationpb.New(0)}
		}), "pools[0].adaptive.output_token: it is 0s"},
		{"no target", with(func(c *configv1.Pool) { c.Adaptive = &configv1.PoolAdaptive{} }), "pools[0].adaptive.first_response: say"},
		{"least over capacity", with(func(c *configv1.Pool) {
			c.Adaptive = &configv1.PoolAdaptive{FirstResponse: durationpb.New(1), MinCapacity: 5}
		}), "pools[0].adaptive.min_capacity: it is 5"},
		{"method", with(func(c *configv1.Pool) { c.Priorities = []*configv1.PoolPriority{{Methods: []string{"inference"}}} }), `pools[0].priorities[0].methods[0]: "inference"`},
		{"no SPIFFE ID", principals("alice"), `pools[0].priorities[0].principals[0]: "alice" is no SPIFFE ID`},
		{"trust domain", principals("spiffe://*/x"), "principals[0]"},
		{"no path", principals("spiffe://a"), "has no path"},
		{"part of a segment", principals("spiffe://a/b*"), "whole segment"},
		{"rest in the middle", principals("spiffe://a/**/b"), "last segment"},
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
