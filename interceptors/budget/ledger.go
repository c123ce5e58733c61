package budget

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math"
	"slices"
	"strings"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/sluicegate/sluice/interceptors"
	configv1 "github.com/sluicegate/sluice/proto/gen/sluice/config/v1"
)

// Ledger is the accounts of all configured budgets. It is safe for concurrent
// use.
type Ledger struct {
	limits  []*limit // most levels first: the order in which accounts are locked
	prices  map[string]price
	permits func(*interceptors.Inference) int64
	charges bool // observers are told what was charged
	clock   clock
	table   *table
	journal *journal // nil: accounts end with the process
	shared  *shared  // nil: no other gateway shares them

	earlier       *journal // of the ledger before
	earlierShared *shared
}

// Option is something that a ledger needs to know beside its budgets.
type Option func(*options)

type options struct {
	prices  []*configv1.Price
	permits func(*interceptors.Inference) int64
	before  *Ledger
	charges bool
}

// WithPrices sets what tokens cost, for budgets of money.
func WithPrices(prices []*configv1.Price) Option { return func(o *options) { o.prices = prices } }

// WithPermits sets how many permits an inference holds, by what is known as it begins, for budgets of
// GPU time. Default: 1.
func WithPermits(of func(*interceptors.Inference) int64) Option {
	return func(o *options) { o.permits = of }
}

// WithCharges has observers of an inference told what each budget was charged, by the
// event "charged": "budget" its name, "unit" what it counts, "amount" and, if more was
// used than granted, "excess", in tokens, requests, the currency, or seconds of one
// permit. Default: they are told the excess only.
func WithCharges() Option { return func(o *options) { o.charges = true } }

// WithBefore has the ledger go on with the accounts of the one that it follows,
// of those budgets that are the same in both. Inferences that began under the one
// before are in the same books. Both must keep them in the same store. It may be nil.
func WithBefore(l *Ledger) Option { return func(o *options) { o.before = l } }

// New makes the ledger of the configured budgets, with every account full. An
// error begins with the field that is at fault.
func New(budgets []*configv1.Budget, opts ...Option) (*Ledger, error) {
	o := options{permits: func(*interceptors.Inference) int64 { return 1 }}
	for _, opt := range opts {
		opt(&o)
	}
	l := &Ledger{permits: o.permits, charges: o.charges, clock: systemClock(), table: newTable()}
	var known []*limit
	if o.before != nil {
		l.clock, l.table, known = o.before.clock, o.before.table, o.before.limits
		l.earlier, l.earlierShared = o.before.journal, o.before.shared
	}
	var err error
	if l.prices, err = readPrices(o.prices); err != nil {
		return nil, err
	}
	names := make(map[string]bool, len(budgets))
	for n, b := range budgets {
		if names[b.GetName()] {
			return nil, fmt.Errorf("budgets[%d].name: there are two budgets named %q; rename one", n, b.GetName())
		}
		names[b.GetName()] = true
		var m *limit
		if same := slices.IndexFunc(known, func(m *limit) bool { return proto.Equal(m.config, b) }); same >= 0 {
			m = known[same]
		} else if m, err = newLimit(b); err != nil {
			return nil, fmt.Errorf("budgets[%d].%w", n, err)
		}
		if err := m.priced(l.prices); err != nil {
			return nil, fmt.Errorf("budgets[%d].%w", n, err)
		}
		l.limits = append(l.limits, m)
	}
	// The order must be the same in ledgers that share accounts.
	slices.SortFunc(l.limits, func(a, b *limit) int {
		return cmp.Or(b.levels()-a.levels(), strings.Compare(a.name, b.name))
	})
	return l, nil
}

// Retire has the accounts dropped of those budgets that a ledger which follows
// this one does not have.
func (l *Ledger) Retire(next *Ledger) {
	for _, m := range l.limits {
		m.retired.Store(next == nil || !slices.Contains(next.limits, m))
	}
}

// perRequest tells the limits that are spent when an inference begins from those
// that follow its usage.
func perRequest(m *limit) bool { return m.metric == requests }

func perUsage(m *limit) bool { return m.metric != requests }

// errFull says that no further account can be opened. It is not a matter of who
// calls: the reply is that the policy cannot decide.
var errFull = errors.New("the ledger holds as many accounts as it may")

// open appends the accounts that an inference needs for some limits, and pins
// them. They must be settled, or let go.
func (l *Ledger) open(which func(*limit) bool, i *interceptors.Inference, holds []hold) ([]hold, error) {
	var now instant
	for _, m := range l.limits {
		if !which(m) || !m.applies(i) {
			continue
		}
		k, err := m.key(i)
		if err != nil {
			letGo(holds)
			return nil, err
		}
		a := l.table.find(k)
		if a == nil {
			if now.wall == 0 {
				now = l.clock()
			}
			a = l.table.open(k, now, l.fill(m, now))
		}
		if a == nil {
			letGo(holds)
			d := interceptors.Deny(name, interceptors.PolicyUnavailable, "no further budget account can be opened; try again later")
			d.Cause = errFull
			return nil, d
		}
		holds = append(holds, hold{account: a, tariff: l.tariff(m, i)})
	}
	return holds, nil
}

// fill makes an account a new one of a limit.
func (l *Ledger) fill(m *limit, now instant) func(*account) {
	return func(a *account) {
		m.fill(now)(a)
		if l.shared != nil {
			a.lease = newLease()
		}
	}
}

func letGo(holds []hold) {
	for n := range holds {
		holds[n].account.pins.Add(-1)
	}
}

// shortage is the account that has too little.
type shortage struct {
	account                  *account
	limit, remaining, wanted int64 // limit is what a full account has
	retryAfter               time.Duration
}

// lock locks the accounts of all holds and brings them up to now. The order is
// always that of Ledger.limits, so that nobody waits in a circle.
func (l *Ledger) lock(holds []hold) instant {
	now := l.clock()
	for n := range holds {
		a := holds[n].account
		a.mu.Lock()
		a.roll(now)
	}
	return now
}

func unlock(holds []hold) {
	for n := range holds {
		holds[n].account.mu.Unlock()
	}
}

// take moves what every hold wants into the reservation; if any account has less
// than that, the least of every one; and if any has less than that, nothing
// from any. begun says that it is for an inference that has begun. The shortage, if
// there is one, is the worst of them: that which takes longest to go away. An
// error says that the policy cannot decide.
func (l *Ledger) take(holds []hold, begun bool) (shortage, error) {
	now := l.lock(holds)
	defer unlock(holds)
	return l.taken(holds, begun, now)
}

// taken is take with the accounts locked.
func (l *Ledger) taken(holds []hold, begun bool, now instant) (short shortage, err error) {
	all := true
	for n := range holds {
		h := &holds[n]
		room := h.account.room(begun)
		if h.free {
			room = math.MaxInt64 - h.account.used
		}
		if h.account.limit.soft {
			h.want, h.least = min(h.want, room), min(h.least, room)
		}
		all = all && h.want <= room
		if h.least > 0 && h.least > room {
			short = worse(short, h, room, now)
		}
	}
	if short.account != nil {
		return short, nil
	}
	if l.journal != nil {
		if err := l.journal.ahead(holds, all, now); err != nil {
			d := interceptors.Deny(name, interceptors.PolicyUnavailable, "what is spent cannot be written down; try again later")
			d.Cause = err
			return shortage{}, d
		}
	}
	for n := range holds {
		h := &holds[n]
		took := h.want
		if !all {
			took = h.least
		}
		h.age()
		h.now += took
		h.account.used += took
		h.account.reserved += took
	}
	if l.shared != nil {
		l.shared.prefetch(l, holds, now)
	}
	return shortage{}, nil
}

// store asks the store for what holds lack, and says what follows if it does not
// answer: those who may go on without it get what they want.
func (l *Ledger) store(ctx context.Context, holds []hold, begun bool) (lost error) {
	if err := l.shared.acquire(ctx, l, holds, begun); err != nil {
		d := interceptors.Deny(name, interceptors.PolicyUnavailable, "the budget store cannot be reached; try again later")
		d.RetryAfter, d.Cause = breakFor, err
		for n := range holds {
			holds[n].free = holds[n].account.limit.config.GetStoreLost() == configv1.StoreLost_STORE_LOST_OPEN
		}
		return d
	}
	return nil
}

// closed is the refusal of an inference that must not begin while the store is lost.
func (l *Ledger) closed(holds []hold) error {
	if l.shared == nil || !l.shared.lost() {
		return nil
	}
	for n := range holds {
		if holds[n].account.limit.config.GetStoreLost() == configv1.StoreLost_STORE_LOST_CLOSED && !l.shared.due(l.clock().wall) {
			d := interceptors.Deny(name, interceptors.PolicyUnavailable, "the budget store cannot be reached; try again later")
			d.RetryAfter, d.Cause = breakFor, errStore
			return d
		}
	}
	return nil
}

// worse is the worse of a shortage and that of a hold.
func worse(than shortage, h *hold, room int64, now instant) shortage {
	s := shortage{h.account, h.account.limit.capacity() + h.account.extra, room, h.least, h.account.until(now, h.least-room, h.least)}
	if e := h.account.lease; e != nil {
		s.remaining = add(room, max(0, e.left))
	}
	if than.account == nil || than.retryAfter > 0 && (s.retryAfter < 0 || s.retryAfter > than.retryAfter) {
		return s
	}
	return than
}

// empty finds an account that follows usage and has nothing left for an inference.
// What a shared store has left is not known here.
func (l *Ledger) empty(i *interceptors.Inference) shortage {
	if l.shared != nil {
		return shortage{}
	}
	for _, m := range l.limits {
		if !perUsage(m) || m.soft || !m.applies(i) {
			continue
		}
		k, err := m.key(i)
		if err != nil { // reserving it says so
			continue
		}
		a := l.table.find(k)
		if a == nil { // full
			continue
		}
		h := []hold{{account: a, least: 1}}
		now := l.lock(h)
		room := a.remaining()
		var short shortage
		if room <= 0 {
			short = worse(short, &h[0], room, now)
		}
		unlock(h)
		letGo(h)
		if short.account != nil {
			return short
		}
	}
	return shortage{}
}

// Snapshot is every account that there is, in no order; one that is not there
// is full. Each is consistent in itself. At rest, Reserved and Carried are 0.
func (l *Ledger) Snapshot() []Account {
	out := make([]Account, 0, l.table.size.Load())
	now := l.clock()
	l.table.all(func(a *account) {
		if slices.Contains(l.limits, a.limit) {
			out = append(out, a.snapshot(now))
		}
	})
	return out
}
