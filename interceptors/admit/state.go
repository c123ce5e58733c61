package admit

import (
	"cmp"
	"maps"
	"slices"
	"time"

	"github.com/sluicegate/sluice/interceptors"
)

// PoolState is a pool at one moment.
type PoolState struct {
	Name string
	// Capacity and InUse are permits. InUse is more than Capacity where running
	// inferences turned out heavier than they looked, or the capacity was lowered.
	Capacity, InUse int64
	// Ceiling is the capacity that there is, as configured or as Resize set it:
	// Capacity is less while an adaptive pool is slow, and where gateways share the
	// pool. Configured is what the configuration says; the gateway's part, where it
	// is divided into equal ones.
	Ceiling, Configured int64
	// Draining is after Drain.
	Draining bool
	// Waiting is the number of inferences in the queue, at most Length; WaitingBytes the size of
	// their messages; 0 where the pool has no bound for it.
	Waiting, Length int
	WaitingBytes    int64
	// Hold is how long an inference that ended well held its permits, as a
	// moving average; 0 if that is not known.
	Hold time.Duration
	// Refused are the inferences that were refused so far, by reason.
	Refused map[interceptors.Reason]uint64
	// Tenants are those that the pool knows, by name. It forgets those that have
	// neither permits nor places, and are ahead of nobody, when they are many.
	Tenants []TenantState
	// Forgotten are the weighted tokens that tenants were served whom it forgot.
	Forgotten int64
	// Priorities are those of the queue, the highest first.
	Priorities []PriorityState
	// Sharing is nil if no other gateway uses the pool.
	Sharing *SharingState
}

// PriorityState is a priority of a pool at one moment.
type PriorityState struct {
	Priority int32
	Waiting  int
	// Wait is how long those that queued in it and were granted had waited, as a
	// moving average; 0 if that is not known.
	Wait time.Duration
}

// SharingState is what a gateway knows of others that share a pool.
type SharingState struct {
	// Gateways are as many as the store last knew, or as configured; 0 if it never answered.
	Gateways int64
	// InUse are the permits in use in all gateways, as the store last knew.
	InUse int64
	// Lost is that the store has not answered for half a lease.
	Lost bool
}

// TenantState is a tenant in a pool at one moment.
type TenantState struct {
	Tenant string
	// Named is that the configuration of the pool names it.
	Named  bool
	Weight int64
	// InUse are permits; Reserved are those that are kept for it.
	InUse, Reserved int64
	// Waiting is the number of its inferences in the queue.
	Waiting int
	// Wait is how long those that queued and were granted had waited, as a moving
	// average; 0 if that is not known.
	Wait time.Duration
	// Served are the weighted tokens that it was served, and Share its part of
	// those of all tenants, 0 to 1.
	Served int64
	Share  float64
	// Refused are its inferences that were refused.
	Refused uint64
}

// Snapshot is the state of every pool, in the order of the configuration. At
// rest, InUse and Waiting are 0.
func (p *Policy) Snapshot() []PoolState {
	out := make([]PoolState, len(p.pools))
	for n, l := range p.pools {
		out[n] = l.snapshot()
	}
	return out
}

func (l *pool) snapshot() PoolState {
	now := time.Now()
	l.mu.Lock()
	defer l.mu.Unlock()
	l.settle(now)
	s := PoolState{
		Name: l.name, Capacity: l.capacity, Ceiling: l.ceiling.Load(), Configured: l.configured, Draining: l.draining,
		InUse: l.inUse, Waiting: l.waiting, Length: l.length, WaitingBytes: l.bytes,
		Hold: durationOf(l.hold.known(now)), Refused: maps.Clone(l.refused), Tenants: make([]TenantState, 0, len(l.tenants)),
	}
	for _, v := range l.levels {
		s.Priorities = append(s.Priorities, PriorityState{Priority: v.priority, Waiting: v.size, Wait: durationOf(v.wait.known(now))})
	}
	switch {
	case l.shared != nil:
		s.Sharing = &SharingState{Gateways: l.shared.gateways, InUse: l.shared.running, Lost: l.shared.over(now)}
	case l.replicas > 0:
		s.Sharing = &SharingState{Gateways: l.replicas}
	}
	s.Forgotten = l.forgotten
	var all int64
	for _, t := range l.tenants {
		served := t.served.Load()
		all += served
		s.Tenants = append(s.Tenants, TenantState{
			Tenant: t.name, Named: l.names(t), Weight: t.weight, InUse: t.used, Reserved: t.reserve, Waiting: t.waiting,
			Wait: durationOf(t.wait.known(now)), Served: served, Refused: t.refused,
		})
	}
	for n := range s.Tenants {
		if all > 0 {
			s.Tenants[n].Share = float64(s.Tenants[n].Served) / float64(all)
		}
	}
	slices.SortFunc(s.Tenants, func(a, b TenantState) int { return cmp.Compare(a.Tenant, b.Tenant) })
	return s
}
