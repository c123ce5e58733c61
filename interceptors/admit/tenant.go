package admit

import "sync/atomic"

// scale is what a weighted token adds to the counter of a tenant of weight 1. It
// is much above the largest weight, so that a share of it is exact enough, and
// small enough for 10^14 tokens.
const scale = 1 << 16

// tenant is what a pool knows of a tenant. Beside the atomics it is guarded by
// pool.mu.
//
// Tenants are served in the order of Virtual Token Counters (Sheng et al.,
// "Fairness in Serving Large Language Models", OSDI '24): the counter grows by
// the weighted tokens that a tenant was served, over its weight, and the tenant
// with the least counter goes next. One that comes back is lifted to the least
// counter of those that wait: to be away earns nothing.
type tenant struct {
	name    string
	weight  int64
	cap     int64 // permits that it may hold; 0: all
	reserve int64 // permits that are kept for it
	most    int64 // that one inference can weigh

	counter atomic.Int64 // only grows
	served  atomic.Int64 // weighted tokens

	used       int64 // permits that it holds
	waiting    int
	ready      int // lines among those whose turn may be next
	refused    uint64
	wait       estimate // of those that queued
	lines      []line   // by level
	all        *principal
	principals map[string]*principal // only if the pool has caps for them
}

// principal is what a pool knows of a principal of a tenant.
type principal struct {
	name    string
	used    int64
	waiting int
	lanes   []lane // by level
}

// tenant finds a tenant, or begins to know it.
func (l *pool) tenant(name string) *tenant {
	if t := l.tenants[name]; t != nil {
		return t
	}
	if len(l.tenants) >= l.sweepAt {
		l.sweep()
	}
	rule, ok := l.rules[name]
	if !ok {
		rule = l.others
	}
	t := &tenant{name: name, weight: rule.weight, cap: rule.cap, reserve: rule.reserve}
	t.most = l.most(t)
	t.lines = make([]line, len(l.levels))
	for n, v := range l.levels {
		t.lines[n].init(v, t)
	}
	t.all = t.newPrincipal("")
	l.tenants[name] = t
	return t
}

// most is what one inference of a tenant can weigh.
func (l *pool) most(t *tenant) int64 {
	most := l.ceiling.Load() - l.reservedAll + t.reserve
	if t.cap > 0 {
		most = min(most, t.cap)
	}
	if l.principalPermits > 0 {
		most = min(most, l.principalPermits)
	}
	return most
}

func (t *tenant) newPrincipal(name string) *principal {
	p := &principal{name: name, lanes: make([]lane, len(t.lines))}
	for n := range p.lanes {
		p.lanes[n].line, p.lanes[n].principal = &t.lines[n], p
	}
	return p
}

// principal finds a principal; where they have no caps, all are the same.
func (l *pool) principal(t *tenant, name string) *principal {
	if l.principalPermits == 0 {
		return t.all
	}
	p := t.principals[name]
	if p == nil {
		if t.principals == nil {
			t.principals = make(map[string]*principal)
		}
		p = t.newPrincipal(name)
		t.principals[name] = p
	}
	return p
}

// forget drops a principal that is at rest.
func (t *tenant) forget(p *principal) {
	if p != t.all && p.used == 0 && p.waiting == 0 {
		delete(t.principals, p.name)
	}
}

// firstSweep is how many tenants are known before those of whom nothing is left
// to know are forgotten. Chosen.
const firstSweep = 1024

// sweep forgets tenants that are at rest, and would come back just as they went.
func (l *pool) sweep() {
	floor := l.floor()
	for name, t := range l.tenants {
		if t.used == 0 && t.waiting == 0 && t.reserve == 0 && t.counter.Load() <= floor {
			l.forgotten += t.served.Load()
			delete(l.tenants, name)
		}
	}
	l.sweepAt = max(firstSweep, 2*len(l.tenants))
}

// names reports whether the configuration names a tenant.
func (l *pool) names(t *tenant) bool {
	_, named := l.rules[t.name]
	return named
}

// lift raises the counter to a floor.
func (t *tenant) lift(floor int64) {
	for {
		c := t.counter.Load()
		if c >= floor || t.counter.CompareAndSwap(c, floor) {
			return
		}
	}
}

// serve counts weighted tokens.
func (t *tenant) serve(cost int64) {
	t.counter.Add(cost * scale / t.weight)
	t.served.Add(cost)
}

// may reports whether the tenant's cap lets it have so many permits more.
func (t *tenant) may(weight int64) bool {
	return t.cap == 0 || t.used == 0 || t.used+weight <= t.cap
}

func (p *principal) may(weight, cap int64) bool {
	return cap == 0 || p.used == 0 || p.used+weight <= cap
}

// kept is what is left of the tenant's reserve.
func (t *tenant) kept() int64 { return max(0, t.reserve-t.used) }

// use counts permits that are taken or given back.
func (l *pool) use(p *permit, weight int64) {
	t := p.tenant
	l.kept -= t.kept()
	l.inUse += weight
	t.used += weight
	p.principal.used += weight
	l.kept += t.kept()
	switch {
	case t.waiting == 0:
	case p.principal.waiting > 0 && l.principalPermits > 0:
		for n := range p.principal.lanes {
			l.update(&p.principal.lanes[n])
		}
		fallthrough
	case t.cap > 0:
		for n := range t.lines {
			l.updateLine(&t.lines[n])
		}
	}
	if weight < 0 {
		t.forget(p.principal)
	}
}
