package telemetry

import (
	"context"
	"time"

	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/metric"

	"github.com/sluicegate/sluice/interceptors"
)

// Pool is a GPU pool at one moment. Its names become labels: they must be of a
// bounded set.
type Pool struct {
	Name            string
	Capacity, InUse int64 // permits
	Gateways        int64 // that share it; 0 while the store is lost through which they do
	Priorities      []PoolPriority
	Tenants         []PoolTenant
	Refused         map[interceptors.Reason]uint64 // inferences so far
}

// PoolPriority is a priority of a pool's queue.
type PoolPriority struct {
	Priority int32
	Waiting  int64         // inferences
	Wait     time.Duration // of those that were granted last; 0: not known
}

// PoolTenant is a tenant of a pool, or all that are not named.
type PoolTenant struct {
	Tenant         string
	InUse, Waiting int64
	Wait           time.Duration
	Served         int64 // weighted tokens so far
}

// WatchPools has metrics of the pools read whenever metrics are collected, until it is
// told to stop. read must be safe for concurrent use and must not block.
func (p *Policy) WatchPools(read func() []Pool) (stop func()) {
	m := p.meter
	gauge := func(name, unit, what string) metric.Int64ObservableGauge {
		return must(m.Int64ObservableGauge(name, metric.WithUnit(unit), metric.WithDescription(what)))
	}
	seconds := func(name, what string) metric.Float64ObservableGauge {
		return must(m.Float64ObservableGauge(name, metric.WithUnit(unitSeconds), metric.WithDescription(what)))
	}
	counter := func(name, unit, what string) metric.Int64ObservableCounter {
		return must(m.Int64ObservableCounter(name, metric.WithUnit(unit), metric.WithDescription(what)))
	}
	capacity := gauge(poolCapacity, unitPermit, "Permits of a pool that may be in use now.")
	inUse := gauge(poolInUse, unitPermit, "Permits of a pool in use.")
	gateways := gauge(poolGateways, unitGateway, "Gateways that share a pool; 0 while their store is lost.")
	length := gauge(poolQueueLength, unitInference, "Inferences in a pool's queue, by priority.")
	wait := seconds(poolQueueWait, "How long those that were granted last had waited in a pool's queue, by priority.")
	refused := counter(poolRefused, unitInference, "Inferences that a pool refused, by reason.")
	tenantInUse := gauge(poolTenantInUse, unitPermit, "Permits of a pool that a tenant holds.")
	tenantLength := gauge(poolTenantLength, unitInference, "Inferences of a tenant in a pool's queue.")
	tenantWait := seconds(poolTenantWait, "How long a tenant's inferences that were granted last had waited in a pool's queue.")
	tenantServed := counter(poolTenantServed, unitTokens, "Weighted tokens that a tenant was served by a pool.")
	with := func(kv ...attribute.KeyValue) metric.MeasurementOption {
		return metric.WithAttributeSet(attribute.NewSet(kv...))
	}
	registered, err := m.RegisterCallback(func(_ context.Context, o metric.Observer) error {
		for _, l := range read() {
			pool := poolKey.String(l.Name)
			o.ObserveInt64(capacity, l.Capacity, with(pool))
			o.ObserveInt64(inUse, l.InUse, with(pool))
			o.ObserveInt64(gateways, l.Gateways, with(pool))
			for _, q := range l.Priorities {
				labels := with(pool, priorityKey.Int(int(q.Priority)))
				o.ObserveInt64(length, q.Waiting, labels)
				if q.Wait > 0 {
					o.ObserveFloat64(wait, q.Wait.Seconds(), labels)
				}
			}
			for reason, n := range l.Refused {
				o.ObserveInt64(refused, int64(min(n, 1<<62)), with(pool, reasonKey.String(string(reason))))
			}
			for _, t := range l.Tenants {
				labels := with(pool, tenantKey.String(t.Tenant))
				o.ObserveInt64(tenantInUse, t.InUse, labels)
				o.ObserveInt64(tenantLength, t.Waiting, labels)
				if t.Wait > 0 {
					o.ObserveFloat64(tenantWait, t.Wait.Seconds(), labels)
				}
				o.ObserveInt64(tenantServed, t.Served, labels)
			}
		}
		return nil
	}, capacity, inUse, gateways, length, wait, refused, tenantInUse, tenantLength, tenantWait, tenantServed)
	if err != nil {
		otel.Handle(err)
		return func() {}
	}
	return func() { _ = registered.Unregister() }
}
