package budget

import (
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
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
	books   map[string]*book
	grants  []*grant
}

// book is an account of the model.
type book struct {
	name   string
	budget *configv1.Budget
	window int
	began  time.Time // the window
	base   int64     // taken off the window for debts
	owed   int64
	extra  int64 // granted beyond the amount, in this window
	level  int64 // of a bucket, in units × nanoseconds of its window
}

type grant struct {
	book      *book
	window    int
	inference int
	units     int64
	charged   int64
	settled   bool
}

// length is the window of a budget; in the machine the only calendar is the minute.
func length(b *configv1.Budget) time.Duration {
	if b.GetCalendar() == configv1.Calendar_CALENDAR_MINUTE {
		return time.Minute
	}
	return b.GetWindow().AsDuration()
}

func capacity(b *configv1.Budget) int64 {
	switch {
	case b.GetMoneyMicros() > 0:
		return int64(b.GetMoneyMicros()) * 1000
	case b.GetBurst() > 0:
		return int64(b.GetBurst())
	}
	return int64(b.GetTokens())
}

// cost is what usage costs: 0.1225 and 0.35 micros a token, where it is money.
func cost(b *configv1.Budget, in, out int64) int64 {
	switch {
	case b.GetMoneyMicros() > 0:
		return (in*122_500 + out*350_000 + 999) / 1000
	case b.OutputWeight != nil:
		return in + int64(b.GetOutputWeight())*out
	}
	return in + out
}

var machinePrices = []*configv1.Price{{Model: "*", InputMicrosPerMillion: 122_500, OutputMicrosPerMillion: 350_000}}

func (m *model) book(b *configv1.Budget, i *interceptors.Inference) *book {
	names := [5]string{}
	for _, k := range b.GetPer() {
		names[k] = map[configv1.BudgetKey]string{
			perTrustDomain: "example.org", perTenant: i.Call.Tenant, perPrincipal: i.Call.Principal, perModel: i.Model,
		}[k]
	}
	name := fmt.Sprintf("%s%q", b.GetName(), names[1:])
	if m.books[name] == nil {
		m.books[name] = &book{name: name, budget: b, began: time.Now(), level: capacity(b) * int64(length(b))}
	}
	return m.books[name]
}

// sums are what is reserved and spent of a window, and held of those before.
func (m *model) sums(k *book, window int) (reserved, spent, carried int64) {
	spent = k.base
	for _, g := range m.grants {
		switch {
		case g.book.name != k.name:
		case g.window != window && !g.settled:
			carried += g.units
		case g.window != window:
		case g.settled:
			spent += g.charged
		default:
			reserved += g.units
		}
	}
	return reserved, spent, carried
}

// now is a book at this moment.
func (m *model) now(k book) *book {
	l := length(k.budget)
	if l == 0 {
		return &k
	}
	if k.budget.GetBurst() > 0 {
		full := capacity(k.budget) * int64(l)
		k.level = min(full, k.level+int64(time.Since(k.began))*int64(k.budget.GetTokens()))
		k.began = time.Now()
		return &k
	}
	passed := int64(time.Since(k.began) / l)
	if k.budget.GetCalendar() != 0 {
		passed = int64(time.Now().Truncate(l).Sub(k.began.Truncate(l)) / l)
	}
	reserved, spent, _ := m.sums(&k, k.window)
	if passed == 0 && (reserved+spent+k.owed+k.extra > 0 || k.budget.GetCalendar() != 0) {
		return &k
	}
	k.window++
	k.began = time.Now()
	k.base = 0
	if passed > 0 && k.budget.GetDebt() {
		k.base = max(0, max(0, spent-capacity(k.budget)-k.extra)+k.owed-(passed-1)*capacity(k.budget))
		k.owed = 0
	}
	k.extra = 0
	return &k
}

func (m *model) remaining(k *book) int64 {
	if k.budget.GetBurst() > 0 {
		return int64(math.Floor(float64(k.level) / float64(length(k.budget))))
	}
	reserved, spent, _ := m.sums(k, k.window)
	return capacity(k.budget) + k.extra - reserved - spent
}

// give is what Ledger.Grant must do.
func (m *model) give(k *book, n int64) {
	*k = *m.now(*k)
	if k.budget.GetBurst() > 0 {
		l := int64(length(k.budget))
		k.level = min(capacity(k.budget)*l, k.level+n*l)
	} else {
		k.extra += n
	}
}

// reset is what Ledger.Reset must do.
func (m *model) reset(k *book) {
	*k = *m.now(*k)
	reserved, spent, _ := m.sums(k, k.window)
	k.base -= spent
	k.owed, k.extra = 0, min(k.extra, max(0, reserved-capacity(k.budget)))
	k.level = max(k.level, (capacity(k.budget)-reserved)*int64(length(k.budget)))
}

// demand is what an inference asks of one budget.
type demand struct{ want, least int64 }

// take is what Ledger.take must do; false if nothing is granted.
func (m *model) take(id int, i *interceptors.Inference, begun bool, asks func(*configv1.Budget) demand) bool {
	all := true
	for _, b := range m.budgets {
		k := m.book(b, i)
		*k = *m.now(*k)
	}
	for _, b := range m.budgets {
		a, room := asks(b), m.remaining(m.book(b, i))
		if begun {
			room += int64(b.GetOverdraft())
		}
		if b.GetSoft() {
			room = math.MaxInt64
		}
		if a.least > 0 && a.least > room {
			return false
		}
		all = all && a.want <= room
	}
	for _, b := range m.budgets {
		k, a := m.book(b, i), asks(b)
		if !all {
			a.want = a.least
		}
		k.level -= a.want * int64(length(b))
		m.grants = append(m.grants, &grant{book: k, window: k.window, inference: id, units: a.want})
	}
	return true
}

// granted is what an inference has of a budget.
func (m *model) granted(id int, b *configv1.Budget) (sum int64) {
	for _, g := range m.grants {
		if g.inference == id && g.book.budget == b {
			sum += g.units
		}
	}
	return sum
}

func (m *model) settle(id int, used func(*configv1.Budget) int64) {
	left := map[*book]int64{}
	for _, g := range m.grants { // the oldest first
		if g.inference != id {
			continue
		}
		k := g.book
		if _, ok := left[k]; !ok {
			left[k] = used(k.budget)
			excess := left[k] - m.granted(id, k.budget)
			switch {
			case excess <= 0 || !k.budget.GetDebt():
			case k.budget.GetBurst() > 0:
				k.level -= excess * int64(length(k.budget))
			default:
				k.owed += excess
			}
		}
		g.charged = min(left[k], g.units)
		left[k] -= g.charged
		g.settled = true
		k.level = min(capacity(k.budget)*int64(length(k.budget)), k.level+(g.units-g.charged)*int64(length(k.budget)))
	}
}

// check compares every account with the model.
func (m *model) check(t *testing.T, l *Ledger) {
	t.Helper()
	seen := map[string]bool{}
	for _, a := range l.Snapshot() {
		name := fmt.Sprintf("%s%q", a.Budget, []string{a.TrustDomain, a.Tenant, a.Principal, a.Model})
		seen[name] = true
		if a.Remaining+a.Reserved+a.Spent != a.Limit || min(a.Reserved, a.Spent, a.Carried) < 0 {
			t.Fatalf("units were lost or minted: %+v", a)
		}
		k := m.now(*m.books[name])
		if b := k.budget; a.Remaining < -int64(b.GetOverdraft()) && !b.GetSoft() && !b.GetDebt() {
			t.Fatalf("overspent: %+v", a)
		}
		reserved, spent, carried := m.sums(k, k.window)
		want := Account{Remaining: m.remaining(k), Reserved: reserved, Spent: spent, Carried: carried, Owed: k.owed, Granted: k.extra}
		if k.budget.GetBurst() > 0 {
			want.Reserved = min(reserved, a.Limit-want.Remaining)
			want.Carried = reserved - want.Reserved
			want.Spent = a.Limit - want.Remaining - want.Reserved
		}
		if got := (Account{Remaining: a.Remaining, Reserved: a.Reserved, Spent: a.Spent, Carried: a.Carried, Owed: a.Owed,
			Granted: a.Granted}); got != want {
			t.Fatalf("%s:\ngot  %+v\nwant %+v", name, got, want)
		}
		var ends time.Time
		switch b := k.budget; {
		case b.GetCalendar() != 0:
			ends = time.Now().Truncate(time.Minute).Add(time.Minute)
		case b.GetBurst() == 0 && length(b) > 0 && reserved+spent+k.owed+k.extra > 0:
			ends = k.began.Add(length(b))
		}
		if !a.WindowEnds.Equal(ends) {
			t.Fatalf("%s: the window ends at %v, want %v", name, a.WindowEnds, ends)
		}
	}
	for name, book := range m.books { // one that is gone must be as good as new
		k := m.now(*book)
		reserved, _, carried := m.sums(k, k.window)
		if !seen[name] && (reserved+carried+k.owed+k.extra > 0 || m.remaining(k) < capacity(k.budget)) {
			t.Fatalf("account %s was evicted in use", name)
		}
	}
}

// Whatever happens in whatever order, every account is what the model says,
// and remaining + reserved + spent = limit.
func TestConservation(t *testing.T) {
	minute := durationpb.New(time.Minute)
	two := uint32(2)
	domain, tenant := []configv1.BudgetKey{perTrustDomain}, []configv1.BudgetKey{perTrustDomain, perTenant}
	principal := append(slices.Clone(tenant), perPrincipal)
	leaf := append(slices.Clone(principal), perModel)
	amounts := []*configv1.Budget{
		{Name: "domain", Tokens: 400, Window: durationpb.New(10 * time.Minute), DefaultOutputTokens: 20, Per: domain},
		{Name: "tenant", Tokens: 200, Window: durationpb.New(3 * time.Minute), DefaultOutputTokens: 9, Per: tenant},
		{Name: "principal", Tokens: 100, Window: minute, DefaultOutputTokens: 12, Per: principal},
		{Name: "leaf", Tokens: 80, Window: minute, DefaultOutputTokens: 64, Per: leaf},
		{Name: "life", Tokens: 4000, DefaultOutputTokens: 64},
	}
	kinds := []*configv1.Budget{
		{Name: "bucket", Tokens: 70, Window: minute, Burst: 120, DefaultOutputTokens: 11, Per: principal},
		{Name: "minute", Tokens: 130, Calendar: configv1.Calendar_CALENDAR_MINUTE, DefaultOutputTokens: 30, Per: principal},
		{Name: "weighted", Tokens: 300, Window: minute, OutputWeight: &two, DefaultOutputTokens: 64, Per: tenant},
		{Name: "money", MoneyMicros: 60, Window: minute, DefaultOutputTokens: 64, Per: tenant},
		{Name: "overdraft", Tokens: 110, Window: minute, Overdraft: 25, DefaultOutputTokens: 64, Per: principal},
		{Name: "debt", Tokens: 90, Window: minute, Overdraft: 30, Debt: true, DefaultOutputTokens: 64, Per: leaf},
		{Name: "bucket-debt", Tokens: 50, Window: minute, Burst: 90, Debt: true, DefaultOutputTokens: 64, Per: leaf},
		{Name: "soft", Tokens: 40, Window: minute, Soft: true, DefaultOutputTokens: 64, Per: leaf},
	}
	seeds := 100
	if testing.Short() {
		seeds = 20
	}
	outcomes := map[string]int{}
	for _, all := range [][]*configv1.Budget{amounts, kinds} {
		for seed := range seeds {
			t.Run(fmt.Sprint(seed), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					r := rand.New(rand.NewPCG(uint64(seed), 7))
					chosen := slices.Clone(all)
					if all[0] == kinds[0] {
						r.Shuffle(len(chosen), func(a, b int) { chosen[a], chosen[b] = chosen[b], chosen[a] })
					}
					runMachine(t, r, chosen[:1+r.IntN(len(chosen))], seed%8 == 3, outcomes)
				})
			})
		}
	}
	for _, o := range []string{"served", "refused", "topped up", "cut", "unhanded", "rolled", "more input", "excess", "crashed", "granted", "reset"} {
		if outcomes[o] < seeds/2 {
			t.Errorf("%q happened %d times: the machine does not reach it", o, outcomes[o])
		}
	}
}

// restored makes a ledger of a copy of the state file, and compares what is left
// of each account with what the ledger has that wrote it.
func restored(t *testing.T, l *Ledger, file string, budgets []*configv1.Budget, right func(after, before int64) bool) {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	again := filepath.Join(t.TempDir(), "state")
	if err := os.WriteFile(again, b, 0o600); err != nil {
		t.Fatal(err)
	}
	after, err := New(budgets, WithPrices(machinePrices))
	if err != nil {
		t.Fatal(err)
	}
	after.clock = l.clock
	if err := after.Open(again); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = after.Close() }()
	accounts := map[Name]int64{}
	for _, a := range after.Snapshot() {
		accounts[a.Name()] = a.Remaining
	}
	for _, a := range l.Snapshot() {
		left, known := accounts[a.Name()]
		if !known {
			left = a.Limit - a.Granted
		}
		if !right(left, a.Remaining) {
			t.Fatalf("after a restart %d is left of %+v", left, a)
		}
	}
}

// accountName is the name of an account of the model, which is that of the ledger's.
func accountName(s string) Name {
	budget, rest, _ := strings.Cut(s, "[")
	var names [4]string
	for n := range names {
		quoted, _ := strconv.QuotedPrefix(strings.TrimLeft(rest, " "))
		names[n], _ = strconv.Unquote(quoted)
		rest = strings.TrimLeft(rest, " ")[len(quoted):]
	}
	return Name{budget, names[0], names[1], names[2], names[3], ""}
}

func runMachine(t *testing.T, r *rand.Rand, budgets []*configv1.Budget, written bool, outcomes map[string]int) {
	l, err := New(budgets, WithPrices(machinePrices))
	if err != nil {
		t.Fatal(err)
	}
	file := ""
	if written { // in a state file
		file = filepath.Join(t.TempDir(), "state")
		if err := l.Open(file); err != nil {
			t.Fatal(err)
		}
		defer func() {
			if err := l.Close(); err != nil {
				t.Error(err)
			}
			restored(t, l, file, budgets, func(after, before int64) bool { return after == before })
		}()
	}
	m := &model{budgets: budgets, books: map[string]*book{}}
	step := int64(1 << 40)
	for _, b := range budgets {
		step = min(step, int64(b.GetDefaultOutputTokens()))
	}
	type running struct {
		id        int
		i         *interceptors.Inference
		p         interceptors.InferencePolicy
		input     int64
		delivered [2]int64 // of all that was let through, input and output
		cut       bool
	}
	var all []*running
	use := func(v *running) (in, out int64) {
		return max(v.input, v.i.ReportedInput), max(v.i.OutputTokens, v.i.ReportedOutput)
	}
	sameGrants := func(v *running) {
		t.Helper()
		for _, h := range v.p.(*reservation).holds {
			for _, b := range budgets {
				if b.GetName() == h.account.limit.name && h.granted() != m.granted(v.id, b) {
					t.Fatalf("inference %d: granted %d of %s, want %d", v.id, h.granted(), b.GetName(), m.granted(v.id, b))
				}
			}
		}
	}
	cover := func(v *running, call func() error) bool {
		in, out := use(v)
		missing := func(b *configv1.Budget) demand {
			n := max(0, cost(b, in, out)-m.granted(v.id, b))
			if n == 0 {
				return demand{}
			}
			return demand{max(n, cost(b, 0, step)), n}
		}
		want := true
		if slices.ContainsFunc(budgets, func(b *configv1.Budget) bool { return missing(b).least > 0 }) {
			asks := map[*configv1.Budget]demand{}
			for _, b := range budgets {
				asks[b] = missing(b)
			}
			want = m.take(v.id, v.i, true, func(b *configv1.Budget) demand { return asks[b] })
			outcomes["topped up"]++
		}
		d := denial(t, call())
		if (d == nil) != want {
			t.Fatalf("inference %d needs %d and %d: %v, want let through %t", v.id, in, out, d, want)
		}
		sameGrants(v)
		if want {
			v.delivered = [2]int64{in, out}
		} else {
			v.cut = true
			outcomes["cut"]++
		}
		return want
	}
	for n := range 150 {
		op := r.IntN(10)
		switch {
		case r.IntN(15) == 0 && len(all) > 0:
			b := budgets[r.IntN(len(budgets))]
			k := m.book(b, all[r.IntN(len(all))].i)
			name := accountName(k.name)
			if r.IntN(2) == 0 {
				n := 1 + r.Int64N(capacity(b)/2)
				m.give(k, n)
				if _, err := l.Grant(t.Context(), name, n); err != nil {
					t.Fatal(err)
				}
				outcomes["granted"]++
			} else {
				m.reset(k)
				if _, err := l.Reset(t.Context(), name); err != nil {
					t.Fatal(err)
				}
				outcomes["reset"]++
			}
		case op < 3 || len(all) == 0:
			c := caller(fmt.Sprint("t", r.IntN(2)), fmt.Sprint("p", r.IntN(2)))
			i := infer(c, fmt.Sprint("m", r.IntN(2)), r.Int64N(20), max(0, r.Int64N(60)-30))
			v := &running{id: n, i: i, input: i.InputTokens}
			ok := m.take(n, i, false, func(b *configv1.Budget) demand {
				if out := i.MaxOutputTokens; out > 0 {
					return demand{cost(b, i.InputTokens, out), cost(b, i.InputTokens, out)}
				}
				return demand{cost(b, i.InputTokens, step), cost(b, i.InputTokens, 1)}
			})
			var d *interceptors.Denial
			if v.p, d = start(t, l.Tokens(), i); (d == nil) != ok {
				t.Fatalf("%v, want a grant: %t", d, ok)
			}
			if d != nil {
				outcomes["refused"]++
				break
			}
			sameGrants(v)
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
			in, out := use(v)
			used := func(b *configv1.Budget) int64 {
				if !v.i.Handed {
					return 0
				}
				return cost(b, in, out)
			}
			for _, b := range budgets {
				charge := min(used(b), m.granted(v.id, b))
				if v.i.Handed && cost(b, v.delivered[0], v.delivered[1]) > charge {
					t.Fatalf("%s: delivered %d, charged %d", b.GetName(), v.delivered, charge)
				}
				if used(b) > charge {
					outcomes["excess"]++
				}
			}
			if !v.i.Handed {
				outcomes["unhanded"]++
			}
			m.settle(v.id, used)
			v.p.End(interceptors.Outcome{})
		}
		m.check(t, l)
		if file != "" && n%25 == 0 {
			outcomes["crashed"]++
			restored(t, l, file, budgets, func(after, before int64) bool { return after <= before })
		}
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
					charge = min(v.(*reservation).holds[0].granted(), i.InputTokens+i.OutputTokens)
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
