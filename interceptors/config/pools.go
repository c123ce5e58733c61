package config

import (
	"errors"

	"google.golang.org/protobuf/proto"

	"github.com/sluicegate/sluice/interceptors/admit"
	"github.com/sluicegate/sluice/interceptors/telemetry"
	configv1 "github.com/sluicegate/sluice/proto/gen/sluice/config/v1"
)

// makePools makes the pools, or goes on with those of the guard before.
func (g *Guard) makePools(before *Guard) (err error) {
	pools, redis := g.config.GetPools(), g.config.GetRedis()
	switch {
	case before.pools != nil && sameList(pools, before.config.GetPools()) &&
		(!before.pools.Shared() || proto.Equal(redis, before.config.GetRedis())):
		g.pools = before.pools
	case len(pools) > 0:
		if g.pools, err = admit.New(pools); err != nil {
			return err
		}
	default:
		return nil
	}
	if g.pools.Shared() && redis == nil {
		return errors.New("redis: a pool has a share, and there is no Redis to share it through; configure one, or set replicas")
	}
	return nil
}

// openPools connects pools that gateways share.
func (g *Guard) openPools() error {
	if g.pools == nil {
		return nil
	}
	return g.pools.Share(g.config.GetRedis())
}

func (g *Guard) closePools() {
	if g.unwatch != nil {
		g.unwatch()
	}
	if g.pools != nil {
		g.pools.Close()
	}
}

// otherTenants is the label of tenants that no pool's configuration names: those that
// there are are the callers' doing.
const otherTenants = "_OTHER"

// samples are the pools as metrics show them.
func (g *Guard) samples() (out []telemetry.Pool) {
	for _, s := range g.pools.Snapshot() {
		p := telemetry.Pool{Name: s.Name, Capacity: s.Capacity, InUse: s.InUse, Refused: s.Refused, Gateways: 1}
		if s.Sharing != nil {
			p.Gateways = s.Sharing.Gateways
			if s.Sharing.Lost {
				p.Gateways = 0
			}
		}
		for _, q := range s.Priorities {
			p.Priorities = append(p.Priorities, telemetry.PoolPriority{Priority: q.Priority, Waiting: int64(q.Waiting), Wait: q.Wait})
		}
		others := telemetry.PoolTenant{Tenant: otherTenants, Served: s.Forgotten}
		for _, t := range s.Tenants {
			if t.Named {
				p.Tenants = append(p.Tenants, telemetry.PoolTenant{Tenant: t.Tenant, InUse: t.InUse, Waiting: int64(t.Waiting), Wait: t.Wait, Served: t.Served})
				continue
			}
			others.InUse += t.InUse
			others.Waiting += int64(t.Waiting)
			others.Wait = max(others.Wait, t.Wait)
			others.Served += t.Served
		}
		p.Tenants = append(p.Tenants, others)
		out = append(out, p)
	}
	return out
}

// budgetRedis is the Redis of the budgets: the one for all, if they name none.
func budgetRedis(cfg *configv1.Config) *configv1.Redis {
	r := cfg.GetBudgetStore().GetRedis()
	if r != nil && len(r.GetAddresses()) == 0 {
		return cfg.GetRedis()
	}
	return r
}

// stores says what is wrong with the stores that gateways share.
func stores(cfg *configv1.Config) error {
	switch store := cfg.GetBudgetStore().GetRedis(); {
	case cfg.GetRedis() != nil && len(cfg.GetRedis().GetAddresses()) == 0:
		return errors.New("redis.addresses: there are none; say host:port")
	case store != nil && len(store.GetAddresses()) == 0 && cfg.GetRedis() == nil:
		return errors.New("budget_store.redis.addresses: there are none, and no Redis for all; say host:port here or in redis.addresses")
	case store != nil && len(store.GetAddresses()) == 0 && !proto.Equal(store, new(configv1.Redis)):
		return errors.New("budget_store.redis.addresses: there are none, so that it is the Redis for all; set everything there")
	}
	return nil
}
