package budget

import (
	"math"
	"sync"
	"sync/atomic"
	"time"

	"github.com/sluicegate/sluice/interceptors"
)

// account is what one key of one limit has used. In each window
// remaining + used = the capacity; so remaining is not stored.
type account struct {
	key
	pins atomic.Int64 // reservations that point here; gone

	mu       sync.Mutex
	window   int64 // the number of the window
	ends     int64 // when it ends, as the limit's window counts; of a bucket when it was last refilled
	used     int64 // of this window: spent, or reserved by inferences that have not ended
	reserved int64 // of that, reserved
	carried  int64 // reserved in windows that are over, by inferences that have not ended
	owed     int64 // to take off the next window
	extra    int64 // granted beyond the amount, in this window; a bucket has none
	left     int64 // of the last refill: less than a unit
	mark     int64 // how far it may be used, as the journal says

	lease *lease // of a store that others share; nil: the account is ours alone
}

// capacity is what a full account has.
func (m *limit) capacity() int64 {
	if m.window.burst > 0 {
		return m.window.burst
	}
	return m.amount
}

// capacity is what the account has when it is full; a share of it, if it is shared.
func (a *account) capacity() int64 {
	if a.lease != nil {
		return a.lease.granted
	}
	return a.limit.capacity() + a.extra
}

// full reports whether nothing of an account is used, granted or owed.
func (a *account) full() bool { return a.used == 0 && a.owed == 0 && a.extra == 0 }

func (a *account) remaining() int64 { return a.capacity() - a.used }

// roll brings an account up to a moment: it refills a bucket, or begins a new
// window if the old one is over. What is still reserved stays with those who
// hold it and never comes back: it belongs to a window that is no more. Of a
// full account a window with a length begins anew too, so that it makes no
// difference whether the account was evicted meanwhile.
func (a *account) roll(now instant) {
	w := &a.limit.window
	switch {
	case a.lease != nil:
		a.rollShared(now)
	case !w.ends():
	case w.burst > 0:
		if d := now.mono - time.Duration(a.ends); d > 0 {
			var gain int64
			gain, a.left = w.refill(a.limit.amount, d, a.left, max(0, a.used))
			a.mark -= gain
			if a.used -= gain; a.used <= 0 {
				a.used, a.left, a.mark = 0, 0, 0
			}
			a.ends = int64(now.mono)
		}
	case w.zone != nil:
		// A clock that goes back by less than a window changes nothing: the window
		// lasts until the clock has passed its end. One that goes back further was
		// wrong before; nothing is given a second time for it.
		if now.wall >= a.ends {
			a.next(1 + (now.wall-a.ends)/int64(w.length))
			a.ends = w.end(now.wall)
		} else if a.ends-now.wall > 2*int64(w.length) {
			a.ends = w.end(now.wall)
		}
	case int64(now.mono) >= a.ends:
		a.next(1 + (int64(now.mono)-a.ends)/int64(w.length))
		a.ends = int64(now.mono + w.length)
	case a.full():
		a.window++
		a.mark = 0
		a.ends = int64(now.mono + w.length)
	}
}

// next begins a window, the last of so many that have passed. Of a limit with
// debts, what was used beyond the amount is taken off, window by window.
func (a *account) next(windows int64) {
	a.window++
	spent := a.used - a.reserved
	a.carried += a.reserved
	a.used, a.reserved, a.mark = 0, 0, 0
	if a.limit.debt {
		a.used = max(0, add(max(0, spent-a.limit.amount-a.extra), a.owed)-times(windows-1, a.limit.amount))
		a.owed = 0
	}
	a.extra = 0
}

// fresh reports whether an account is as good as a new one. One of a calendar
// must outlast its window by another, in case the clock goes back.
func (a *account) fresh(now instant) bool {
	w := &a.limit.window
	switch {
	case a.limit.retired.Load():
		return true
	case a.lease != nil:
		a.roll(now)
		return a.quiet()
	case a.full():
		return true
	case !w.ends():
		return false
	case w.burst > 0:
		a.roll(now)
		return a.used == 0
	case a.limit.debt:
		return false // as long as there is one to be remembered
	case w.zone != nil:
		return now.wall >= a.ends+int64(w.length)
	}
	return int64(now.mono) >= a.ends
}

// until is how long it takes until the account has need more units than now;
// NoRetry if it never does.
func (a *account) until(now instant, need, least int64) time.Duration {
	w := &a.limit.window
	switch {
	case least > a.limit.capacity() || !w.ends():
		return interceptors.NoRetry
	case w.burst > 0:
		return max(1, w.wait(a.limit.amount, need, a.left))
	case a.lease != nil && a.lease.ends > 0:
		return max(1, a.lease.ends-now.mono)
	case a.lease != nil:
		return breakFor
	case w.zone != nil:
		return max(1, time.Duration(a.ends-now.wall))
	}
	return max(1, time.Duration(a.ends)-now.mono)
}

// fill makes an account a new one of a limit.
func (m *limit) fill(now instant) func(*account) {
	return func(a *account) {
		switch w := &m.window; {
		case w.burst > 0:
			a.ends = int64(now.mono)
		case w.zone != nil:
			a.ends = w.end(now.wall)
		case w.ends():
			a.ends = int64(now.mono + w.length)
		}
	}
}

// hold is what one reservation took of one account.
type hold struct {
	account *account
	tariff  tariff
	want    int64 // of the take in hand
	least   int64
	window  int64 // the window that now is of
	now     int64 // taken of that window
	past    int64 // taken of windows before it
	mark    int64 // of the take in hand
	free    bool  // the store is lost, and the budget open
}

// granted is all that was taken.
func (h *hold) granted() int64 { return h.past + h.now }

// age moves what was taken of a window that is over.
func (h *hold) age() {
	if h.window != h.account.window {
		h.past, h.now, h.window = h.past+h.now, 0, h.account.window
	}
}

// room is what may be taken of an account now. An inference that has begun may
// go into the overdraft.
func (a *account) room(begun bool) int64 {
	switch {
	case a.limit.soft:
		return math.MaxInt64 - a.used
	case begun && a.lease == nil: // else the store gives it
		return a.remaining() + a.limit.overdraft
	}
	return a.remaining()
}

// settle ends a hold: of what it took, charge is spent and the rest goes back to
// the window it came from, if that still is. The oldest is spent first, for it
// was granted first. The excess is what was used beyond the grant.
func (h *hold) settle(charge, excess int64) spending {
	a := h.account
	a.mu.Lock()
	defer a.mu.Unlock()
	h.age()
	before := a.used - a.reserved
	back := h.now - min(max(0, charge-h.past), h.now)
	a.carried -= h.past
	a.reserved -= h.now
	a.used -= back
	if a.limit.window.burst > 0 && a.lease == nil && a.used <= 0 {
		a.used, a.left, a.mark = 0, 0, 0 // what comes back to a full bucket is lost
	}
	if a.limit.debt {
		if a.limit.window.burst > 0 {
			a.used = add(a.used, excess)
		} else {
			a.owed = add(a.owed, excess)
		}
	}
	h.past, h.now = 0, 0
	if a.lease != nil {
		// What all have spent the store knows.
		percent := a.lease.passed
		a.lease.passed = ""
		return spending{a.limit, add(a.held(), max(0, a.lease.left)), percent}
	}
	return spending{a.limit, max(0, a.remaining()), passed(a.capacity(), before, a.used-a.reserved)}
}

// Account is one account at one moment. Remaining + Reserved + Spent is Limit.
type Account struct {
	// Budget is the configured name; Metric what it counts: "tokens", "requests",
	// "money" in thousandths of a millionth of the currency, "gpu_time" in
	// microseconds of one permit.
	Budget, Metric string
	// The names that the budget tells apart; "" for those that it does not.
	TrustDomain, Tenant, Principal, Model, Key string
	// Limit is what a full account has; of one that gateways share, what this one
	// was granted.
	Limit int64
	// Remaining, Reserved and Spent are of the present window. Of a token bucket,
	// Spent is what was spent and is not refilled yet. Remaining is below zero
	// where more was used than there is: of a soft budget, in the overdraft, or in debt.
	Remaining, Reserved, Spent int64
	// Carried is what inferences still hold that began in windows before, or that
	// was refilled since.
	Carried int64
	// Owed is what will be taken off the next window.
	Owed int64
	// Granted is what [Ledger.Grant] added to the present window; it is in Limit. Of
	// a token bucket, and in a shared store, it is 0.
	Granted int64
	// WindowEnds is when the window ends; zero if it never does, or has not begun,
	// and of a token bucket.
	WindowEnds time.Time
	// Shared says that gateways share the account; SharedLeft is what none of them
	// had taken when this one last asked.
	Shared     bool
	SharedLeft int64
}

func (a *account) snapshot(now instant) Account {
	a.mu.Lock()
	defer a.mu.Unlock()
	// What the next use will find.
	var e *lease
	if a.lease != nil {
		of := *a.lease
		e = &of
	}
	b := account{lease: e, key: key{limit: a.limit}, window: a.window, ends: a.ends, used: a.used, reserved: a.reserved,
		carried: a.carried, owed: a.owed, extra: a.extra, left: a.left}
	b.roll(now)
	reserved := min(b.reserved, b.used) // the rest was refilled
	out := Account{
		Budget: a.limit.name, Metric: string(a.limit.metric),
		TrustDomain: a.key.trustDomain, Tenant: a.key.tenant, Principal: a.key.principal, Model: a.key.model, Key: a.key.own,
		Limit: b.capacity(), Remaining: b.remaining(), Reserved: reserved, Spent: b.used - reserved,
		Carried: b.carried + b.reserved - reserved, Owed: b.owed, Granted: b.extra,
	}
	switch w := &a.limit.window; {
	case e != nil:
		out.Shared, out.SharedLeft = true, max(0, e.left)
		if e.ends > 0 {
			out.WindowEnds = time.Unix(0, now.wall+int64(e.ends-now.mono))
		}
	case w.zone != nil:
		out.WindowEnds = time.Unix(0, b.ends)
	case w.ends() && w.burst == 0 && !b.full():
		out.WindowEnds = time.Unix(0, now.wall+b.ends-int64(now.mono))
	}
	return out
}
