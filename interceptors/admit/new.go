package admit

import (
	"fmt"
	"slices"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/sluicegate/sluice/interceptors"
	configv1 "github.com/sluicegate/sluice/proto/gen/sluice/config/v1"
)

const (
	// defaultQueueTimeout is how long an inference waits where the configuration
	// does not say: as long as people wait for an answer to begin. Chosen.
	defaultQueueTimeout = 5 * time.Second
	// agings is how often an inference rises before its wait is over, where the
	// configuration does not say: from the lowest of five priorities to the first.
	// Chosen.
	agings = 4
	// defaultOutput is what a model may write where nobody says. Chosen: an answer
	// of some paragraphs.
	defaultOutput = 256
	// A token of the output takes a model server about twice the time of one of the
	// input: the weights of the paper on Virtual Token Counters, and of prices.
	defaultInputWeight, defaultOutputWeight = 1, 2
	// anyTenant stands for every tenant that is not named.
	anyTenant = "*"
)

// New makes the policy of the configured pools. An error begins with the field
// that is at fault.
func New(pools []*configv1.Pool) (*Policy, error) {
	p := &Policy{models: make(map[string]*share)}
	names := make(map[string]bool, len(pools))
	for n, c := range pools {
		if names[c.GetName()] {
			return nil, fmt.Errorf("pools[%d].name: there are two pools named %q; rename one", n, c.GetName())
		}
		names[c.GetName()] = true
		if err := p.add(c); err != nil {
			return nil, fmt.Errorf("pools[%d].%w", n, err)
		}
	}
	return p, nil
}

func (p *Policy) add(c *configv1.Pool) error {
	l, err := newPool(c)
	if err != nil {
		return err
	}
	for n, m := range c.GetModels() {
		if err := p.join(l, m); err != nil {
			return fmt.Errorf("models[%d]: %w", n, err)
		}
	}
	p.pools = append(p.pools, l)
	return nil
}

// join puts a model into a pool.
func (p *Policy) join(l *pool, m *configv1.PoolModel) error {
	s := &share{
		pool: l, weight: max(1, int64(m.GetWeight())), tokens: int64(m.GetTokensPerPermit()),
		output: int64(m.GetDefaultOutputTokens()), together: m.GetTogether(),
	}
	if s.output == 0 {
		s.output = defaultOutput
	}
	if s.tokens > 0 && m.GetWeight() > 0 {
		return fmt.Errorf("%q has a weight and tokens_per_permit; set one of them", m.GetModel())
	}
	if most := l.least(); s.weight > most {
		return fmt.Errorf("%q weighs %d of %d permits and could never run; lower its weight or raise the capacity",
			m.GetModel(), s.weight, most)
	}
	first := p.models[m.GetModel()]
	if m.GetModel() == anyModel {
		first = p.others
	}
	if first == nil {
		if m.GetModel() == anyModel {
			p.others = s
		} else {
			p.models[m.GetModel()] = s
		}
		return nil
	}
	for other := first; ; other = other.next {
		if other.pool == l || !other.together || !s.together {
			return fmt.Errorf("%q is in pool %q already; a model is in one pool, once, or in several where all entries say together: true",
				m.GetModel(), other.pool.name)
		}
		if other.next == nil {
			other.next = s
			return nil
		}
	}
}

func newPool(c *configv1.Pool) (*pool, error) {
	if c.GetCapacity() == 0 {
		return nil, fmt.Errorf("capacity: it is 0, so that nothing could run; set the permits there are")
	}
	if len(c.GetModels()) == 0 {
		return nil, fmt.Errorf("models: the pool names none and would limit nothing; name models, or \"*\" for all others")
	}
	l := &pool{
		name: c.GetName(), configured: int64(c.GetCapacity()), limit: int64(c.GetCapacity()),
		length: int(c.GetQueueLength()), maxBytes: int64(min(c.GetQueueBytes(), 1<<62)), principalPermits: int64(c.GetPrincipalPermits()),
		inputWeight: defaultInputWeight, outputWeight: defaultOutputWeight,
		rules: make(map[string]rule), others: rule{weight: 1},
		tenants: make(map[string]*tenant), sweepAt: firstSweep, refused: make(map[interceptors.Reason]uint64),
	}
	l.ceiling.Store(l.configured)
	if c.GetShare() != nil {
		if err := l.share(c.GetShare()); err != nil {
			return nil, fmt.Errorf("share.%w", err)
		}
	}
	l.settle(time.Now())
	l.queued = interceptors.Event{Policy: name, Name: "queued", Attributes: []string{"pool", l.name}}
	if c.InputWeight != nil {
		l.inputWeight = int64(c.GetInputWeight())
	}
	if c.OutputWeight != nil {
		l.outputWeight = int64(c.GetOutputWeight())
	}
	var err error
	if l.timeout, err = positive("queue_timeout", c.GetQueueTimeout(), defaultQueueTimeout); err != nil {
		return nil, err
	}
	if l.ageing, err = positive("ageing", c.GetAgeing(), max(1, l.timeout/agings)); err != nil {
		return nil, err
	}
	if err := l.addTenants(c.GetTenants()); err != nil {
		return nil, err
	}
	if err := l.addPriorities(c.GetPriorities()); err != nil {
		return nil, err
	}
	if a := c.GetAdaptive(); a != nil {
		if err := l.adapt(a); err != nil {
			return nil, fmt.Errorf("adaptive.%w", err)
		}
	}
	for name, r := range l.rules {
		if r.reserve > 0 {
			l.reserves = append(l.reserves, l.tenant(name))
			l.kept += r.reserve
		}
	}
	slices.SortFunc(l.reserves, func(a, b *tenant) int { return int(b.reserve - a.reserve) })
	return l, nil
}

// positive is a duration above 0, or its default.
func positive(field string, d *durationpb.Duration, otherwise time.Duration) (time.Duration, error) {
	if d == nil {
		return otherwise, nil
	}
	if err := d.CheckValid(); err != nil {
		return 0, fmt.Errorf("%s: %w", field, err)
	}
	if d.AsDuration() <= 0 {
		return 0, fmt.Errorf("%s: it is %v; it must be above 0, or absent for %v", field, d.AsDuration(), otherwise)
	}
	return d.AsDuration(), nil
}

func (l *pool) addTenants(tenants []*configv1.PoolTenant) error {
	seen := make(map[string]bool, len(tenants))
	for n, c := range tenants {
		r := rule{weight: max(1, int64(c.GetWeight())), cap: int64(c.GetPermits()), reserve: int64(c.GetReserved())}
		switch {
		case seen[c.GetTenant()]:
			return fmt.Errorf("tenants[%d].tenant: %q is named twice", n, c.GetTenant())
		case c.GetTenant() == anyTenant && r.reserve > 0:
			return fmt.Errorf("tenants[%d].reserved: name the tenant; a reserve for everybody is for nobody", n)
		case l.shared != nil && r.reserve > 0:
			return fmt.Errorf("tenants[%d].reserved: gateways that share a pool through redis cannot keep permits for a tenant; leave it out", n)
		case r.cap > 0 && r.reserve > r.cap:
			return fmt.Errorf("tenants[%d].reserved: %d permits are kept for %q, which may hold %d; lower reserved or raise permits",
				n, r.reserve, c.GetTenant(), r.cap)
		}
		seen[c.GetTenant()] = true
		if l.reservedAll += r.reserve; l.reservedAll > l.ceiling.Load() {
			return fmt.Errorf("tenants[%d].reserved: %d permits are reserved, and there are %d", n, l.reservedAll, l.ceiling.Load())
		}
		if c.GetTenant() == anyTenant {
			l.others = r
		} else {
			l.rules[c.GetTenant()] = r
		}
	}
	return nil
}

// least is what an inference can weigh at most, so that it can run for every tenant.
func (l *pool) least() int64 {
	least := l.ceiling.Load() - l.reservedAll
	if l.others.cap > 0 {
		least = min(least, l.others.cap)
	}
	for _, r := range l.rules {
		if r.cap > 0 {
			least = min(least, r.cap)
		}
	}
	if l.principalPermits > 0 {
		least = min(least, l.principalPermits)
	}
	return least
}
