package budget

import (
	"cmp"
	"context"
	"math"
	"slices"
	"strings"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	configv1 "github.com/sluicegate/sluice/proto/gen/sluice/config/v1"
)

// Name names an account: the budget, and those names that the budget tells apart.
// The others are "".
type Name struct{ Budget, TrustDomain, Tenant, Principal, Model, Key string }

// Name names the account.
func (a Account) Name() Name {
	return Name{a.Budget, a.TrustDomain, a.Tenant, a.Principal, a.Model, a.Key}
}

// compare orders names.
func (n Name) compare(o Name) int {
	return cmp.Or(strings.Compare(n.Budget, o.Budget), strings.Compare(n.TrustDomain, o.TrustDomain),
		strings.Compare(n.Tenant, o.Tenant), strings.Compare(n.Principal, o.Principal), strings.Compare(n.Model, o.Model), strings.Compare(n.Key, o.Key))
}

// within reports whether a name is one that a filter lets through: "" is any.
func (n Name) within(filter Name) bool {
	any := func(want, have string) bool { return want == "" || want == have }
	return any(filter.Budget, n.Budget) && any(filter.TrustDomain, n.TrustDomain) &&
		any(filter.Tenant, n.Tenant) && any(filter.Principal, n.Principal) && any(filter.Model, n.Model) && any(filter.Key, n.Key)
}

func (k key) name() Name {
	return Name{k.limit.name, k.trustDomain, k.tenant, k.principal, k.model, k.own}
}

// Accounts are those that there are which the filter lets through (of which "" is
// any), in the order of their names, after the one named, and no more than most. It
// takes memory for these alone. Each account is consistent in itself.
func (l *Ledger) Accounts(filter, after Name, most int) []Account {
	mine := make(map[*limit]bool, len(l.limits))
	for _, m := range l.limits {
		mine[m] = true
	}
	filter.Tenant, filter.Principal, filter.Model, filter.Key = short(filter.Tenant), short(filter.Principal), short(filter.Model), short(filter.Key)
	var found []*account
	first := func() {
		slices.SortFunc(found, func(a, b *account) int { return a.name().compare(b.name()) })
		found = found[:min(len(found), most)]
	}
	l.table.all(func(a *account) {
		if n := a.name(); mine[a.limit] && n.within(filter) && n.compare(after) > 0 {
			if found = append(found, a); len(found) >= 2*most {
				first()
			}
		}
	})
	first()
	now := l.clock()
	out := make([]Account, len(found))
	for n, a := range found {
		out[n] = a.snapshot(now)
	}
	return out
}

// Account is one account, which may be full and unused. With a shared store it asks
// the store. Errors are gRPC statuses: NOT_FOUND for a budget that there is not,
// INVALID_ARGUMENT for names that the budget does not tell apart, UNAVAILABLE if the
// store does not answer.
func (l *Ledger) Account(ctx context.Context, n Name) (Account, error) {
	return l.change(ctx, n, 0)
}

// Grant adds to the present window of one account, in the unit of the account. To a
// token bucket it is a refill, of what the bucket lacks at most. Where gateways share
// a store it is for all of them. Errors are as of Account; after UNAVAILABLE of a
// shared store it may have been done all the same.
func (l *Ledger) Grant(ctx context.Context, n Name, amount int64) (Account, error) {
	if amount <= 0 {
		return Account{}, status.Error(codes.InvalidArgument, "amount: it must be above 0")
	}
	return l.change(ctx, n, amount)
}

// Reset makes an account full, as at the beginning of a window: what was spent,
// granted and owed is forgotten. What inferences hold stays theirs, and is charged
// when they end. Errors are as of Grant.
func (l *Ledger) Reset(ctx context.Context, n Name) (Account, error) {
	return l.change(ctx, n, reset)
}

// change gives an account something, or makes it full, or leaves it as it is.
func (l *Ledger) change(ctx context.Context, n Name, gift int64) (Account, error) {
	k, err := l.named(n)
	if err != nil {
		return Account{}, err
	}
	now := l.clock()
	a := l.table.find(k)
	if a == nil && gift == 0 && l.shared == nil { // it need not be made to be seen
		a = &account{key: k}
		k.limit.fill(now)(a)
		return a.snapshot(now), nil
	}
	if a == nil {
		a = l.table.open(k, now, l.fill(k.limit, now))
	}
	if a == nil {
		return Account{}, status.Error(codes.ResourceExhausted, errFull.Error())
	}
	defer a.pins.Add(-1)
	if l.shared != nil {
		if gift > maxShared-a.limit.capacity() {
			return Account{}, tooMuch(n)
		}
		err := l.shared.exchange(ctx, l, []hold{{account: a}}, func(asks []ask) bool {
			asks[0].gift = gift
			return true
		})
		if err != nil {
			return Account{}, status.Error(codes.Unavailable, "the budget store gave no answer; look at the account before you try again")
		}
		return a.snapshot(l.clock()), nil
	}
	if err := l.give(a, gift); err != nil {
		return Account{}, err
	}
	return a.snapshot(l.clock()), nil
}

func tooMuch(n Name) error {
	return status.Errorf(codes.InvalidArgument, "amount: with it budget %q would have more than can be counted", n.Budget)
}

// give changes an account that is ours alone. It is written down first.
func (l *Ledger) give(a *account, gift int64) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	now := l.clock()
	a.roll(now)
	next := account{key: a.key, ends: a.ends, used: a.used, owed: a.owed, extra: a.extra, left: a.left, mark: max(a.mark, a.used)}
	switch {
	case gift == 0:
		return nil
	case gift == reset:
		if a.used > a.reserved {
			next.used, next.left = a.reserved, 0
		}
		next.owed, next.extra = 0, min(a.extra, max(0, next.used-a.limit.capacity())) // less would take what is held
		next.mark = next.used
	case a.limit.window.burst > 0:
		gain := min(gift, max(0, a.used))
		next.used -= gain
		next.mark -= gain
		if next.used <= 0 {
			next.used, next.left, next.mark = 0, 0, 0
		}
	case gift > math.MaxInt64-a.limit.overdraft-a.capacity():
		return tooMuch(a.name())
	default:
		next.extra += gift
	}
	next.mark = max(0, next.mark)
	if l.journal != nil {
		if err := l.journal.append([]line{next.line(now, next.mark)}); err != nil {
			return status.Error(codes.Unavailable, "it cannot be written to the state file; nothing was changed")
		}
	}
	a.used, a.owed, a.extra, a.left, a.mark = next.used, next.owed, next.extra, next.left, next.mark
	return nil
}

// named is the key of a name.
func (l *Ledger) named(n Name) (key, error) {
	at := slices.IndexFunc(l.limits, func(m *limit) bool { return m.name == n.Budget })
	if at < 0 {
		return key{}, status.Errorf(codes.NotFound, "there is no budget %q", n.Budget)
	}
	m := l.limits[at]
	var bad error
	refuse := func(format string, what string) {
		if bad == nil {
			bad = status.Errorf(codes.InvalidArgument, format, what, n.Budget)
		}
	}
	part := func(level configv1.BudgetKey, what, name string) string {
		switch {
		case m.by[level] && name == "" && (level == configv1.BudgetKey_BUDGET_KEY_TENANT || level == configv1.BudgetKey_BUDGET_KEY_PRINCIPAL):
			// The others may be empty: a request need not name a model.
			refuse("%s: budget %q has an account for each; say which", what)
		case !m.by[level] && name != "":
			refuse("%s: budget %q does not tell them apart; leave it out", what)
		}
		return name
	}
	k := key{
		limit:       m,
		trustDomain: part(configv1.BudgetKey_BUDGET_KEY_TRUST_DOMAIN, "trust_domain", n.TrustDomain),
		tenant:      short(part(configv1.BudgetKey_BUDGET_KEY_TENANT, "tenant", n.Tenant)),
		principal:   short(part(configv1.BudgetKey_BUDGET_KEY_PRINCIPAL, "principal", n.Principal)),
		model:       short(part(configv1.BudgetKey_BUDGET_KEY_MODEL, "model", n.Model)),
		own:         short(n.Key),
	}
	if m.own == nil && n.Key != "" {
		refuse("%s: budget %q does not tell them apart; leave it out", "key")
	}
	return k, bad
}
