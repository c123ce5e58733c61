package budget

import (
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/sluicegate/sluice/interceptors"
	configv1 "github.com/sluicegate/sluice/proto/gen/sluice/config/v1"
)

// model says what a ledger must do, in the simplest way: it remembers every
// grant ever made and works everything out anew.
type model struct {
	budgets []*configv1.Budget
	windows map[string][]time.Time // when each window of an account began
	grants  []*grant
}

type grant struct {
	account   string
	window    int
	inference int
	tokens    int64
	charged   int64
	settled   bool
}

func (m *model) account(b *configv1.Budget, i *interceptors.Inference) string {
	names := [5]string{}
	for _, k := range b.GetPer() {
		names[k] = map[configv1.BudgetKey]string{
			perTrustDomain: "example.org", perTenant: i.Call.Tenant, perPrincipal: i.Call.Principal, perModel: i.Model,
		}[k]
	}
	return fmt.Sprintf("%s%q", b.GetName(), names[1:])
}

// window is the number of the present window, which begins now if the last is
// over or nothing of it is used.
func (m *model) window(account string, length time.Duration) int {
	w := m.windows[account]
	if len(w) == 0 || length > 0 && (time.Since(w[len(w)-1]) >= length || m.remaining(account, 0, len(w)-1) == 0) {
		m.windows[account] = append(w, time.Now())
	}
	return len(m.windows[account]) - 1
}

func (m *model) remaining(account string, limit int64, window int) int64 {
	for _, g := range m.grants {
		switch {
		case g.account != account || g.window != window:
		case g.settled:
			limit -= g.charged
		default:
			limit -= g.tokens
		}
	}
	return limit
}

// take is what Ledger.take must do.
func (m *model) take(id int, i *interceptors.Inference, want, least int64) int64 {
	for _, b := range m.budgets {
		a := m.account(b, i)
		if m.remaining(a, int64(b.GetTokens()), m.window(a, b.GetWindow().AsDuration())) < want {
			want = least
		}
	}
	for _, b := range m.budgets {
		a := m.account(b, i)
		if m.remaining(a, int64(b.GetTokens()), m.window(a, b.GetWindow().AsDuration())) < want {
			return 0
		}
	}
	for _, b := range m.budgets {
		a := m.account(b, i)
		m.grants = append(m.grants, &grant{account: a,
			window: m.window(a, b.GetWindow().AsDuration()), inference: id, tokens: want})
	}
	return want
}

func (m *model) settle(id int, charge int64) {
	left := map[string]int64{}
	for _, g := range m.grants { // the oldest first
		if g.inference != id {
			continue
		}
		if _, ok := left[g.account]; !ok {
			left[g.account] = charge
		}
		g.charged = min(left[g.account], g.tokens)
		left[g.account] -= g.charged
		g.settled = true
	}
}

// check compares every account with the model.
func (m *model) check(t *testing.T, l *Ledger) {
	t.Helper()
	seen := map[string]bool{}
	lengths := map[string]time.Duration{}
	for _, b := range m.budgets {
		lengths[b.GetName()] = b.GetWindow().AsDuration()
	}
	for _, a := range l.Snapshot() {
		name := fmt.Sprintf("%s%q", a.Budget, []string{a.TrustDomain, a.Tenant, a.Principal, a.Model})
		seen[name] = true
		if a.Remaining+a.Reserved+a.Spent != a.Limit || min(a.Remaining, a.Reserved, a.Spent, a.Carried) < 0 {
			t.Fatalf("tokens were lost or minted: %+v", a)
		}
		want := Account{Remaining: a.Limit}
		now := len(m.windows[name]) - 1
		if now >= 0 && lengths[a.Budget] > 0 && time.Since(m.windows[name][now]) >= lengths[a.Budget] {
			now++ // a window that nobody has used yet
		}
		for _, g := range m.grants {
			switch {
			case g.account != name:
			case g.window != now && !g.settled:
				want.Carried += g.tokens
			case g.window != now:
			case g.settled:
				want.Spent += g.charged
				want.Remaining -= g.charged
			default:
				want.Reserved += g.tokens
				want.Remaining -= g.tokens
			}
		}
		if got := (Account{Remaining: a.Remaining, Reserved: a.Reserved, Spent: a.Spent, Carried: a.Carried}); got != want {
			t.Fatalf("%s:\ngot  %+v\nwant %+v", name, got, want)
		}
	}
	for _, g := range m.grants { // one that is gone must be as good as new
		now := len(m.windows[g.account]) - 1
		length := lengths[g.account[:strings.Index(g.account, "[")]]
		over := length > 0 && time.Since(m.windows[g.account][now]) >= length
		if !seen[g.account] && (!g.settled || !over && m.remaining(g.account, 0, now) < 0) {
			t.Fatalf("account %s was evicted in use", g.account)
		}
	}
}

// Whatever happens in whatever order, every account is what the model says,
// and remaining + reserved + spent = limit.
func TestConservation(t *testing.T) {
	minute := durationpb.New(time.Minute)
	budgets := []*configv1.Budget{
		{Name: "domain", Tokens: 400, Window: durationpb.New(10 * time.Minute), DefaultOutputTokens: 20, Per: []configv1.BudgetKey{perTrustDomain}},
		{Name: "tenant", Tokens: 200, Window: durationpb.New(3 * time.Minute), DefaultOutputTokens: 9, Per: []configv1.BudgetKey{perTrustDomain, perTenant}},
		{Name: "principal", Tokens: 100, Window: minute, DefaultOutputTokens: 12, Per: []configv1.BudgetKey{perTrustDomain, perTenant, perPrincipal}},
		{Name: "leaf", Tokens: 80, Window: minute, Per: []configv1.BudgetKey{perTrustDomain, perTenant, perPrincipal, perModel}},
		{Name: "life", Tokens: 4000},
	}
	seeds := 150
	if testing.Short() {
		seeds = 20
	}
	outcomes := map[string]int{}
	for seed := range seeds {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := rand.New(rand.NewPCG(uint64(seed), 7))
				chosen := budgets[:1+r.IntN(len(budgets))]
				runMachine(t, r, chosen, outcomes)
			})
		})
	}
	for _, o := range []string{"served", "refused", "topped up", "cut", "unhanded", "rolled", "more input"} {
		if outcomes[o] < seeds/2 {
			t.Errorf("%q happened %d times: the machine does not reach it", o, outcomes[o])
		}
	}
}

func runMachine(t *testing.T, r *rand.Rand, budgets []*configv1.Budget, outcomes map[string]int) {
	l := ledger(t, budgets...)
	m := &model{budgets: budgets, windows: map[string][]time.Time{}}
	step := int64(1 << 40)
	for _, b := range budgets {
		if n := int64(b.GetDefaultOutputTokens()); n > 0 {
			step = min(step, n)
		} else {
			step = min(step, defaultOutput)
		}
	}
	type running struct {
		id        int
		i         *interceptors.Inference
		p         interceptors.InferencePolicy
		grant     int64
		input     int64
		delivered int64 // of all that was let through, input and output
		cut       bool
	}
	var all []*running
	use := func(v *running) int64 {
		return max(v.input, v.i.ReportedInput) + max(v.i.OutputTokens, v.i.ReportedOutput)
	}
	cover := func(v *running, call func() error) bool {
		need := use(v)
		want := true
		if missing := need - v.grant; missing > 0 {
			took := m.take(v.id, v.i, max(missing, step), missing)
			v.grant += took
			want = took > 0
			outcomes["topped up"]++
		}
		d := denial(t, call())
		if (d == nil) != want {
			t.Fatalf("inference %d needs %d: %v, want let through %t", v.id, need, d, want)
		}
		if got := v.p.(*reservation).grant; got != v.grant {
			t.Fatalf("inference %d: grant %d, want %d", v.id, got, v.grant)
		}
		if want {
			v.delivered = need
		} else {
			v.cut = true
			outcomes["cut"]++
		}
		return want
	}
	for n := range 150 {
		op := r.IntN(10)
		switch {
		case op < 3 || len(all) == 0:
			c := caller(fmt.Sprint("t", r.IntN(2)), fmt.Sprint("p", r.IntN(2)))
			i := infer(c, fmt.Sprint("m", r.IntN(2)), r.Int64N(20), max(0, r.Int64N(60)-30))
			v := &running{id: n, i: i, input: i.InputTokens}
			want, least := i.InputTokens+i.MaxOutputTokens, i.InputTokens+i.MaxOutputTokens
			if i.MaxOutputTokens == 0 {
				want, least = i.InputTokens+step, i.InputTokens+1
			}
			v.grant = m.take(n, i, want, least)
			var d *interceptors.Denial
			if v.p, d = start(t, l.Tokens(), i); (d == nil) != (v.grant > 0) {
				t.Fatalf("%v, want a grant of %d", d, v.grant)
			}
			if d != nil {
				outcomes["refused"]++
				break
			}
			outcomes["served"]++
			all = append(all, v)
		case op < 6:
			v := all[r.IntN(len(all))]
			if v.cut {
				break
			}
			v.i.Handed = true
			v.i.OutputTokens += r.Int64N(12)
			if r.IntN(4) == 0 {
				v.i.ReportedOutput += r.Int64N(25)
				v.i.ReportedInput += r.Int64N(10)
			}
			cover(v, func() error { return v.p.Response(nil) })
		case op < 7:
			v := all[r.IntN(len(all))]
			if v.cut {
				break
			}
			outcomes["more input"]++
			before := v.input
			v.i.InputTokens += r.Int64N(10)
			v.input = v.i.InputTokens
			if !cover(v, func() error { return v.p.Request(nil) }) {
				v.input = before
			}
		case op < 8:
			time.Sleep(time.Duration(r.Int64N(int64(40 * time.Second))))
			outcomes["rolled"]++
		default:
			k := r.IntN(len(all))
			v := all[k]
			all = append(all[:k], all[k+1:]...)
			charge := int64(0)
			if v.i.Handed {
				charge = min(v.grant, use(v))
				if v.delivered > charge || charge > v.grant {
					t.Fatalf("delivered %d, charged %d, granted %d", v.delivered, charge, v.grant)
				}
			} else {
				outcomes["unhanded"]++
			}
			m.settle(v.id, charge)
			v.p.End(interceptors.Outcome{})
		}
		m.check(t, l)
	}
	for _, v := range all {
		v.p.End(interceptors.Outcome{})
	}
	atRest(t, l)
}

// Under a storm of callers whose accounts overlap in every way, nobody waits
// for ever, and what is spent is what was charged.
func TestConservationUnderRaces(t *testing.T) {
	const workers, rounds = 16, 300
	l := ledger(t,
		&configv1.Budget{Name: "all", Tokens: 60_000},
		&configv1.Budget{Name: "tenant", Tokens: 40_000, Per: []configv1.BudgetKey{perTenant}},
		&configv1.Budget{Name: "principal", Tokens: 30_000, Per: []configv1.BudgetKey{perPrincipal}},
		&configv1.Budget{Name: "model", Tokens: 35_000, Per: []configv1.BudgetKey{perModel}},
		&configv1.Budget{Name: "leaf", Tokens: 20_000, Per: []configv1.BudgetKey{perTenant, perPrincipal, perModel}, DefaultOutputTokens: 7},
	)
	var mu sync.Mutex
	charged := map[string]int64{}
	var all sync.WaitGroup
	for w := range workers {
		all.Go(func() {
			r := rand.New(rand.NewPCG(uint64(w), 9))
			for range rounds {
				tenant, principal, name := fmt.Sprint("t", r.IntN(2)), fmt.Sprint("p", r.IntN(3)), fmt.Sprint("m", r.IntN(2))
				i := infer(caller(tenant, principal), name, r.Int64N(10), 0)
				if r.IntN(2) == 0 {
					i.MaxOutputTokens = 1 + r.Int64N(30)
				}
				v, d := start(t, l.Tokens(), i)
				if d != nil {
					continue
				}
				i.Handed = r.IntN(5) > 0
				for range r.IntN(6) {
					if !i.Handed {
						break
					}
					i.OutputTokens += r.Int64N(15)
					if v.Response(nil) != nil {
						break
					}
				}
				charge := int64(0)
				if i.Handed {
					charge = min(v.(*reservation).grant, i.InputTokens+i.OutputTokens)
				}
				v.End(interceptors.Outcome{})
				mu.Lock()
				for _, a := range []string{"all", "tenant" + tenant, "principal" + principal, "model" + name, "leaf" + tenant + principal + name} {
					charged[a] += charge
				}
				mu.Unlock()
			}
		})
	}
	all.Wait()
	atRest(t, l)
	for _, a := range l.Snapshot() {
		if want := charged[a.Budget+a.Tenant+a.Principal+a.Model]; a.Spent != want || a.Spent > a.Limit {
			t.Errorf("%+v, want %d spent", a, want)
		}
	}
}
