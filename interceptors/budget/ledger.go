package budget

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash/maphash"
	"math"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/sluicegate/sluice/interceptors"
	configv1 "github.com/sluicegate/sluice/proto/gen/sluice/config/v1"
)

const (
	// defaultOutput is the output reserved for an inference that does not say
	// how much it wants, where the configuration does not say either: a
	// paragraph, so that a stream tops up about once in a paragraph. Chosen.
	defaultOutput = 64
	// maxAccounts bounds the memory of a ledger. An account is about 180 bytes
	// and its names: 250 MB with names of 60 bytes (BenchmarkAccounts). Chosen.
	maxAccounts = 1 << 20
	// maxName is the longest name that an account keeps as it is. Chosen: SPIFFE
	// IDs and model names are shorter as a rule, and may be far longer.
	maxName = 256
	// sweep is how many other accounts the making of one looks at, to evict
	// what is idle and full: with four, the idle settle at a third of the others.
	// In a ledger that is full it looks harder.
	sweep, sweepFull = 4, 64
	// shards are locks of the tables of accounts. A lock is held for a look-up.
	shards = 64
)

// Ledger is the accounts of all configured budgets. It is safe for concurrent
// use.
type Ledger struct {
	limits []*limit // most levels first: the order in which accounts are locked
	began  time.Time
	seed   maphash.Seed
	max    int64 // accounts
	size   atomic.Int64
	shards [shards]shard
}

type shard struct {
	mu       sync.Mutex
	accounts map[key]*account
	_        [48]byte // to a cache line
}

// limit is one configured budget.
type limit struct {
	name   string
	index  int // in Ledger.limits
	metric metric
	amount int64
	window time.Duration // 0: never refilled
	models map[string]bool
	output int64 // to reserve for an inference that does not say
	by     [configv1.BudgetKey_BUDGET_KEY_MODEL + 1]bool
}

// metric is what a limit limits.
type metric string

const (
	tokens   metric = "tokens"
	requests metric = "requests"
)

// key names an account: a limit and those names that the limit tells apart.
type key struct {
	limit                                 int
	trustDomain, tenant, principal, model string
}

// New makes the ledger of the configured budgets, with every account full. An
// error begins with the field that is at fault.
func New(budgets []*configv1.Budget) (*Ledger, error) {
	l := &Ledger{began: time.Now(), seed: maphash.MakeSeed(), max: maxAccounts}
	levels := make(map[*limit]int, len(budgets))
	names := make(map[string]bool, len(budgets))
	for n, b := range budgets {
		if names[b.GetName()] {
			return nil, fmt.Errorf("budgets[%d].name: there are two budgets named %q; rename one", n, b.GetName())
		}
		names[b.GetName()] = true
		m, err := newLimit(b)
		if err != nil {
			return nil, fmt.Errorf("budgets[%d].%w", n, err)
		}
		levels[m] = len(b.GetPer())
		l.limits = append(l.limits, m)
	}
	slices.SortStableFunc(l.limits, func(a, b *limit) int { return levels[b] - levels[a] })
	for n, m := range l.limits {
		m.index = n
	}
	for n := range l.shards {
		l.shards[n].accounts = make(map[key]*account)
	}
	return l, nil
}

func newLimit(b *configv1.Budget) (*limit, error) {
	if (b.GetTokens() > 0) == (b.GetRequests() > 0) {
		return nil, errors.New("tokens: set tokens or requests, not both and not neither")
	}
	m := &limit{name: b.GetName(), metric: tokens, output: defaultOutput}
	amount := b.GetTokens()
	if amount == 0 {
		m.metric, amount = requests, b.GetRequests()
	}
	if amount > math.MaxInt64 || b.GetDefaultOutputTokens() > math.MaxInt64 {
		return nil, fmt.Errorf("tokens: an amount is above %d", int64(math.MaxInt64))
	}
	m.amount = int64(amount)
	if n := b.GetDefaultOutputTokens(); n > 0 {
		m.output = int64(n)
	}
	if w := b.GetWindow(); w != nil {
		if err := w.CheckValid(); err != nil {
			return nil, fmt.Errorf("window: %w", err)
		}
		m.window = w.AsDuration()
		if m.window < 0 || m.window > math.MaxInt64/2 { // so that the end of a window is a Duration too
			return nil, fmt.Errorf("window: it is %v; it must be positive and under 146 years, or absent for one that never ends", m.window)
		}
	}
	for n, k := range b.GetPer() {
		switch {
		case k <= configv1.BudgetKey_BUDGET_KEY_UNSPECIFIED || int(k) >= len(m.by):
			return nil, fmt.Errorf("per[%d]: %v is no key", n, k)
		case m.by[k]:
			return nil, fmt.Errorf("per[%d]: %v is there twice", n, k)
		}
		m.by[k] = true
	}
	if len(b.GetModels()) > 0 {
		m.models = make(map[string]bool, len(b.GetModels()))
		for _, name := range b.GetModels() {
			m.models[name] = true
		}
	}
	return m, nil
}

// has reports whether there is any budget of a metric.
func (l *Ledger) has(of metric) bool {
	return slices.ContainsFunc(l.limits, func(m *limit) bool { return m.metric == of })
}

func (m *limit) applies(i *interceptors.Inference) bool { return m.models == nil || m.models[i.Model] }

// key is the account that an inference belongs to.
func (m *limit) key(i *interceptors.Inference) key {
	k := key{limit: m.index}
	if m.by[configv1.BudgetKey_BUDGET_KEY_TRUST_DOMAIN] {
		k.trustDomain = i.Call.Peer.ID.TrustDomain().Name()
	}
	if m.by[configv1.BudgetKey_BUDGET_KEY_TENANT] {
		k.tenant = short(i.Call.Tenant)
	}
	if m.by[configv1.BudgetKey_BUDGET_KEY_PRINCIPAL] {
		k.principal = short(i.Call.Principal)
	}
	if m.by[configv1.BudgetKey_BUDGET_KEY_MODEL] {
		k.model = short(i.Model)
	}
	return k
}

// short is a name, or what stands for one that is too long to keep.
func short(name string) string {
	if len(name) <= maxName {
		return name
	}
	sum := sha256.Sum256([]byte(name))
	return "sha256:" + hex.EncodeToString(sum[:])
}

// subject says whose account it is, for people.
func (m *limit) subject(k key) string {
	var parts []string
	for level, part := range [...]string{
		configv1.BudgetKey_BUDGET_KEY_TRUST_DOMAIN: "trust_domain:" + k.trustDomain,
		configv1.BudgetKey_BUDGET_KEY_TENANT:       "tenant:" + k.tenant,
		configv1.BudgetKey_BUDGET_KEY_PRINCIPAL:    "principal:" + k.principal,
		configv1.BudgetKey_BUDGET_KEY_MODEL:        "model:" + k.model,
	} {
		if m.by[level] {
			parts = append(parts, part)
		}
	}
	if parts == nil {
		return "everyone"
	}
	return strings.Join(parts, ",")
}

// account is what one key of one limit has left. In each window
// remaining + reserved + spent = the limit's amount; so remaining is not stored.
type account struct {
	limit *limit
	// pins are the reservations that point here. They grow under the shard's
	// lock only, so that under it none means that none can come.
	pins atomic.Int64

	mu       sync.Mutex
	window   int64         // the number of the window
	ends     time.Duration // when it ends, since the ledger began
	reserved int64         // of this window, by inferences that have not ended
	spent    int64         // of this window
	carried  int64         // reserved in windows that are over, by inferences that have not ended
}

// roll begins a new window, full, if the old one is over. What is still
// reserved stays with those who hold it and never comes back: it belongs to a
// window that is no more. Of a full account the window begins anew too, so that
// it makes no difference whether the account was evicted meanwhile.
func (a *account) roll(now time.Duration) {
	if a.limit.window == 0 || now < a.ends && a.reserved+a.spent > 0 {
		return
	}
	a.window++
	a.ends = now + a.limit.window
	a.carried += a.reserved
	a.reserved, a.spent = 0, 0
}

func (a *account) remaining() int64 { return a.limit.amount - a.reserved - a.spent }

// hold is what one reservation took of one account.
type hold struct {
	account *account
	window  int64 // the window that now is of
	now     int64 // taken of that window
	past    int64 // taken of windows before it
}

func (l *Ledger) now() time.Duration { return time.Since(l.began) }

func (l *Ledger) shard(k key) *shard {
	return &l.shards[maphash.Comparable(l.seed, k)%shards]
}

// errFull says that no further account can be opened. It is not a matter of who
// calls: the reply is that the policy cannot decide.
var errFull = errors.New("the ledger holds as many accounts as it may")

// open appends the accounts that an inference needs for a metric, and pins
// them. They must be settled, or let go.
func (l *Ledger) open(of metric, i *interceptors.Inference, holds []hold) ([]hold, error) {
	for _, m := range l.limits {
		if m.metric != of || !m.applies(i) {
			continue
		}
		a := l.pin(m, m.key(i))
		if a == nil {
			letGo(holds)
			d := interceptors.Deny(name, interceptors.PolicyUnavailable, "no further budget account can be opened; try again later")
			d.Cause = errFull
			return nil, d
		}
		holds = append(holds, hold{account: a})
	}
	return holds, nil
}

// pin finds an account or makes it; nil if there are too many.
func (l *Ledger) pin(m *limit, k key) *account {
	s := l.shard(k)
	s.mu.Lock()
	defer s.mu.Unlock()
	a := s.accounts[k]
	if a == nil {
		now := l.now()
		l.evict(s, now)
		if l.size.Add(1) > l.max {
			l.size.Add(-1)
			return nil
		}
		// The names may be parts of a large message, which must not stay for them.
		k.trustDomain, k.tenant = strings.Clone(k.trustDomain), strings.Clone(k.tenant)
		k.principal, k.model = strings.Clone(k.principal), strings.Clone(k.model)
		a = &account{limit: m, ends: now + m.window}
		s.accounts[k] = a
	}
	a.pins.Add(1)
	return a
}

// evict looks at some accounts of a shard, other ones each time, and drops
// those that are as good as new: nobody holds them, and they are full or will
// be at the next use.
func (l *Ledger) evict(s *shard, now time.Duration) {
	seen, most := 0, sweep
	if l.size.Load() >= l.max {
		most = sweepFull
	}
	for k, a := range s.accounts { // begins anywhere
		if a.pins.Load() == 0 && a.fresh(now) {
			delete(s.accounts, k)
			l.size.Add(-1)
		}
		if seen++; seen == most {
			return
		}
	}
}

func (a *account) fresh(now time.Duration) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.spent == 0 || a.limit.window > 0 && now >= a.ends
}

// shortage is the account that has too little.
type shortage struct {
	account           *account
	remaining, wanted int64
	retryAfter        time.Duration
}

// take moves want tokens from every account into the reservation; if any of
// them has less than that, least from every one; and if any has less than that,
// nothing from any. The shortage, if there is one, is the worst of them: that
// which takes longest to go away.
func (l *Ledger) take(holds []hold, want, least int64) (took int64, short shortage) {
	now := l.now()
	took = want
	for n := range holds { // always in the order of Ledger.limits, so no deadlock
		a := holds[n].account
		a.mu.Lock()
		a.roll(now)
		remaining := a.remaining()
		if remaining < want {
			took = min(took, least)
		}
		if remaining < least {
			s := shortage{a, remaining, least, a.ends - now}
			if a.limit.window == 0 || least > a.limit.amount {
				s.retryAfter = interceptors.NoRetry
			}
			if short.account == nil || short.retryAfter > 0 && (s.retryAfter < 0 || s.retryAfter > short.retryAfter) {
				short = s
			}
		}
	}
	if short.account != nil {
		took = 0
	}
	for n := range holds {
		h := &holds[n]
		a := h.account
		if took > 0 {
			if h.window != a.window {
				h.past, h.now, h.window = h.past+h.now, 0, a.window
			}
			h.now += took
			a.reserved += took
		}
		a.mu.Unlock()
	}
	return took, short
}

// settle ends a reservation: of what it took, charge is spent and the rest goes
// back to the window it came from, if that still is. The oldest is spent first,
// for it was granted first.
func settle(holds []hold, charge int64) {
	for n := range holds {
		h := &holds[n]
		a := h.account
		a.mu.Lock()
		if h.window != a.window {
			h.past, h.now, h.window = h.past+h.now, 0, a.window
		}
		a.carried -= h.past
		a.reserved -= h.now
		a.spent += min(max(0, charge-h.past), h.now)
		a.mu.Unlock()
	}
	letGo(holds)
}

func letGo(holds []hold) {
	for n := range holds {
		holds[n].account.pins.Add(-1)
	}
}

// empty finds an account of a metric that has nothing left for an inference.
func (l *Ledger) empty(of metric, i *interceptors.Inference) (short shortage) {
	for _, m := range l.limits {
		if m.metric != of || !m.applies(i) {
			continue
		}
		k := m.key(i)
		s := l.shard(k)
		s.mu.Lock()
		a := s.accounts[k]
		s.mu.Unlock()
		if a == nil { // full
			continue
		}
		now := l.now()
		a.mu.Lock()
		a.roll(now)
		if a.remaining() <= 0 {
			short = shortage{a, 0, 1, a.ends - now}
			if m.window == 0 {
				short.retryAfter = interceptors.NoRetry
			}
		}
		a.mu.Unlock()
		if short.account != nil {
			return short
		}
	}
	return shortage{}
}

// Account is one account at one moment. Remaining + Reserved + Spent is Limit.
type Account struct {
	// Budget is the configured name, Metric "tokens" or "requests".
	Budget, Metric string
	// The names that the budget tells apart; "" for those that it does not.
	TrustDomain, Tenant, Principal, Model string
	// Limit is what a window has.
	Limit int64
	// Remaining, Reserved and Spent are of the present window.
	Remaining, Reserved, Spent int64
	// Carried is what inferences still hold that began in windows before.
	Carried int64
}

// Snapshot is every account that there is, in no order; one that is not there
// is full. Each is consistent in itself. At rest, Reserved and Carried are 0.
func (l *Ledger) Snapshot() []Account {
	out := make([]Account, 0, l.size.Load())
	now := l.now()
	for n := range l.shards {
		s := &l.shards[n]
		s.mu.Lock()
		for k, a := range s.accounts {
			out = append(out, a.snapshot(k, now))
		}
		s.mu.Unlock()
	}
	return out
}

func (a *account) snapshot(k key, now time.Duration) Account {
	a.mu.Lock()
	defer a.mu.Unlock()
	reserved, spent, carried := a.reserved, a.spent, a.carried
	if a.limit.window > 0 && now >= a.ends { // what the next use will find
		reserved, spent, carried = 0, 0, carried+reserved
	}
	return Account{
		Budget: a.limit.name, Metric: string(a.limit.metric),
		TrustDomain: k.trustDomain, Tenant: k.tenant, Principal: k.principal, Model: k.model,
		Limit: a.limit.amount, Remaining: a.limit.amount - reserved - spent,
		Reserved: reserved, Spent: spent, Carried: carried,
	}
}
