package budget

import (
	"fmt"
	"maps"
	"math"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/sluicegate/sluice/interceptors"
	"github.com/sluicegate/sluice/interceptors/dialect"
	configv1 "github.com/sluicegate/sluice/proto/gen/sluice/config/v1"
)

func TestNewRefusesWhatCannotWork(t *testing.T) {
	for _, test := range []struct {
		name    string
		budgets []*configv1.Budget
		want    string // "" for none
	}{
		{"none", nil, ""},
		{"tokens", []*configv1.Budget{{Name: "a", Tokens: 1}}, ""},
		{"requests", []*configv1.Budget{{Name: "a", Requests: 1}}, ""},
		{"neither", []*configv1.Budget{{Name: "a"}}, "budgets[0].tokens: set tokens or requests"},
		{"both", []*configv1.Budget{{Name: "a", Tokens: 1, Requests: 1}}, "not both"},
		{"same name", []*configv1.Budget{{Name: "a", Tokens: 1}, {Name: "a", Tokens: 1}}, `budgets[1].name: there are two budgets named "a"`},
		{"same key", []*configv1.Budget{{Name: "a", Tokens: 1, Per: []configv1.BudgetKey{perTenant, perTenant}}}, "budgets[0].per[1]: BUDGET_KEY_TENANT is there twice"},
		{"no key", []*configv1.Budget{{Name: "a", Tokens: 1, Per: []configv1.BudgetKey{0}}}, "is no key"},
		{"unknown key", []*configv1.Budget{{Name: "a", Tokens: 1, Per: []configv1.BudgetKey{99}}}, "is no key"},
		{"negative window", []*configv1.Budget{{Name: "a", Tokens: 1, Window: durationpb.New(-1)}}, "budgets[0].window: it is"},
		{"window of ten thousand years", []*configv1.Budget{{Name: "a", Tokens: 1, Window: &durationpb.Duration{Seconds: 315_576_000_000}}}, "146 years"},
		{"invalid window", []*configv1.Budget{{Name: "a", Tokens: 1, Window: &durationpb.Duration{Nanos: -1, Seconds: 1}}}, "window"},
		{"more than can be counted", []*configv1.Budget{{Name: "a", Tokens: math.MaxUint64}}, "above"},
	} {
		t.Run(test.name, func(t *testing.T) {
			_, err := New(test.budgets)
			switch {
			case err == nil && test.want != "":
				t.Errorf("no error, want %q", test.want)
			case err != nil && (test.want == "" || !strings.Contains(err.Error(), test.want)):
				t.Errorf("error %q, want %q", err, test.want)
			}
		})
	}
}

func TestInterest(t *testing.T) {
	l := ledger(t, &configv1.Budget{Name: "b", Tokens: 100, Models: []string{"m"}})
	for _, test := range []struct {
		name   string
		method *dialect.Method
		client bool
		want   bool
	}{
		{"inference", &dialect.Method{Kind: dialect.Inference}, false, true},
		{"inference that we ask for", &dialect.Method{Kind: dialect.Inference}, true, true},
		{"metadata", &dialect.Method{Kind: dialect.Metadata}, false, false},
		{"management", &dialect.Method{}, false, false},
		{"unknown method", nil, false, false},
	} {
		t.Run(test.name, func(t *testing.T) {
			c := caller("a", "p")
			c.Method, c.Client = test.method, test.client
			for _, p := range []interceptors.Policy{l.Rates(), l.Tokens()} {
				got, err := p.Begin(c)
				if err != nil || (got != nil) != test.want {
					t.Errorf("Begin = %v, %v; want interest %t", got, err, test.want)
				}
			}
		})
	}
	t.Run("model without a budget", func(t *testing.T) {
		v, d := start(t, l.Tokens(), infer(caller("a", "p"), "other", 1000, 1000))
		if v != nil || d != nil || len(l.Snapshot()) != 0 {
			t.Errorf("Start = %v, %v with accounts %v; want no interest", v, d, l.Snapshot())
		}
	})
	t.Run("no tokens are limited", func(t *testing.T) {
		l := ledger(t, &configv1.Budget{Name: "b", Requests: 1})
		if c, _ := l.Tokens().Begin(caller("a", "p")); c != nil {
			t.Error("Tokens wants to see calls")
		}
	})
}

// What is granted, used and charged, for one budget of 100 tokens.
func TestLife(t *testing.T) {
	type step struct {
		out, reportedIn, reportedOut int64 // of a response
		in                           int64 // or of a later request, more input
		cut                          bool
	}
	for _, test := range []struct {
		name     string
		in, max  int64
		steps    []step
		unhanded bool
		refused  bool
		grant    int64 // at the end
		spent    int64
	}{
		{name: "declared and used up", in: 10, max: 20, steps: []step{{out: 20}}, grant: 30, spent: 30},
		{name: "declared, the rest refunded", in: 10, max: 20, steps: []step{{out: 5}}, grant: 30, spent: 15},
		{name: "declared, all or nothing", in: 10, max: 91, refused: true},
		{name: "declared, exactly all", in: 10, max: 90, steps: []step{{out: 90}}, grant: 100, spent: 100},
		{name: "declared, the server writes more", in: 10, max: 20, steps: []step{{out: 20}, {out: 5}}, grant: 46, spent: 35},
		{name: "declared as more than can be counted", in: 10, max: math.MaxInt64, refused: true},
		{name: "undeclared", in: 10, steps: []step{{out: 5}}, grant: 26, spent: 15},
		{name: "undeclared, topped up by the step", in: 10, steps: []step{{out: 16}, {out: 1}}, grant: 42, spent: 27},
		{name: "topped up by what is missing, if that is more", in: 10, steps: []step{{out: 60}}, grant: 70, spent: 70},
		{name: "topped up by what is missing, if the step does not fit", in: 10, steps: []step{{out: 85}, {out: 2}}, grant: 97, spent: 97},
		{name: "cut", in: 10, steps: []step{{out: 85}, {out: 6, cut: true}}, grant: 95, spent: 95},
		{name: "cut by the first message", in: 10, steps: []step{{out: 91, cut: true}}, grant: 26, spent: 26},
		{name: "undeclared, the default does not fit", in: 90, steps: []step{{out: 10}}, grant: 100, spent: 100},
		{name: "undeclared, no room for one token", in: 100, refused: true},
		{name: "never handed", in: 10, max: 20, unhanded: true, grant: 30, spent: 0},
		{name: "handed, no answer", in: 10, max: 20, grant: 30, spent: 10},
		{name: "the server reports more output", in: 10, max: 20, steps: []step{{out: 5, reportedOut: 18}}, grant: 30, spent: 28},
		{name: "the server reports less", in: 10, max: 20, steps: []step{{out: 5, reportedOut: 1, reportedIn: 1}}, grant: 30, spent: 15},
		{name: "the server reports more input", in: 10, max: 20, steps: []step{{out: 5, reportedIn: 15}}, grant: 30, spent: 20},
		{name: "the server reports more than was granted", in: 10, max: 20, steps: []step{{out: 5, reportedOut: 91, cut: true}}, grant: 30, spent: 30},
		{name: "the server lies beyond all measure", in: 10, max: 20, steps: []step{{out: 5, reportedIn: math.MaxInt64, reportedOut: math.MaxInt64, cut: true}}, grant: 30, spent: 30},
		{name: "the server reports less than nothing", in: 10, max: 20, steps: []step{{out: 5, reportedIn: math.MinInt64, reportedOut: math.MinInt64}}, grant: 30, spent: 15},
		{name: "more input", in: 10, steps: []step{{out: 5}, {in: 20}, {out: 5}}, grant: 42, spent: 40},
		{name: "more input than there is", in: 10, steps: []step{{out: 5}, {in: 86, cut: true}}, grant: 26, spent: 15},
	} {
		t.Run(test.name, func(t *testing.T) {
			l := ledger(t, &configv1.Budget{Name: "b", Tokens: 100, DefaultOutputTokens: 16})
			i := infer(caller("a", "p"), "m", test.in, test.max)
			p, d := start(t, l.Tokens(), i)
			if (d != nil) != test.refused {
				t.Fatalf("Start: %v, want refused %t", d, test.refused)
			}
			if test.refused {
				if d.Reason != interceptors.BudgetExhausted {
					t.Errorf("reason %s", d.Reason)
				}
				atRest(t, l)
				return
			}
			i.Handed = !test.unhanded
			for n, s := range test.steps {
				var err error
				if i.InputTokens += s.in; s.in > 0 {
					err = p.Request(nil)
				} else {
					i.OutputTokens += s.out
					i.ReportedInput, i.ReportedOutput = s.reportedIn, s.reportedOut
					err = p.Response(nil)
				}
				d := denial(t, err)
				if (d != nil) != s.cut {
					t.Fatalf("step %d: %v, want cut %t", n, d, s.cut)
				}
				if d != nil && d.Reason != interceptors.BudgetCut {
					t.Errorf("reason %s", d.Reason)
				}
			}
			if got := p.(*reservation).holds[0].granted(); got != test.grant {
				t.Errorf("granted %d, want %d", got, test.grant)
			}
			for range 2 { // the second must change nothing
				p.End(interceptors.Outcome{})
				if got := only(t, l); got.Spent != test.spent || got.Remaining != 100-test.spent {
					t.Errorf("%+v, want spent %d", got, test.spent)
				}
			}
			atRest(t, l)
		})
	}
}

func TestDenials(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := ledger(t,
			&configv1.Budget{Name: "rate", Requests: 2, Window: durationpb.New(time.Minute), Per: []configv1.BudgetKey{perPrincipal}},
			&configv1.Budget{Name: "hour", Tokens: 100, Window: durationpb.New(time.Hour), DefaultOutputTokens: 8,
				Per: []configv1.BudgetKey{perTenant, perModel}, Models: []string{"m"}},
			&configv1.Budget{Name: "life", Tokens: 50, Per: []configv1.BudgetKey{perTrustDomain}, Models: []string{"once"}},
		)
		c := caller("acme", "p")
		check := func(d *interceptors.Denial, reason interceptors.Reason, retry time.Duration, q interceptors.Quota, metadata map[string]string) {
			t.Helper()
			if d == nil {
				t.Fatal("not refused")
			}
			if d.Policy != "budget" || d.Reason != reason || d.RetryAfter != retry || *d.Quota != q || !maps.Equal(d.Metadata, metadata) {
				t.Errorf("denial %+v\nwith quota %+v\nwant %s, %v, %+v, %v", d, *d.Quota, reason, retry, q, metadata)
			}
		}
		hour := interceptors.Quota{Subject: "tenant:acme,model:m", Metric: "tokens", ID: "hour", Limit: 100}
		life := interceptors.Quota{Subject: "trust_domain:example.org", Metric: "tokens", ID: "life", Limit: 50}

		first := infer(c, "m", 10, 60)
		v, d := start(t, l.Tokens(), first)
		if d != nil {
			t.Fatal(d)
		}
		time.Sleep(20 * time.Minute)
		_, d = start(t, l.Tokens(), infer(c, "m", 1, 30))
		check(d, interceptors.BudgetExhausted, 40*time.Minute, hour,
			map[string]string{"budget": "hour", "limit": "100", "remaining": "30", "requested": "31"})
		_, d = start(t, l.Tokens(), infer(c, "m", 1, 100))
		check(d, interceptors.BudgetExhausted, interceptors.NoRetry, hour,
			map[string]string{"budget": "hour", "limit": "100", "remaining": "30", "requested": "101"})
		_, d = start(t, l.Tokens(), infer(c, "once", 60, 0))
		check(d, interceptors.BudgetExhausted, interceptors.NoRetry, life,
			map[string]string{"budget": "life", "limit": "50", "remaining": "50", "requested": "61"})

		first.Handed, first.OutputTokens = true, 70
		if err := v.Response(nil); err != nil {
			t.Fatal(err)
		}
		first.OutputTokens = 95
		d = denial(t, v.Response(nil))
		check(d, interceptors.BudgetCut, 40*time.Minute, hour,
			map[string]string{"budget": "hour", "limit": "100", "remaining": "20", "requested": "25", "tokensGranted": "70", "tokensDelivered": "70"})
		v.End(interceptors.Outcome{Err: d})
		last, d := start(t, l.Tokens(), infer(c, "m", 10, 10))
		if d != nil {
			t.Fatal(d)
		}

		_, d = start(t, l.Rates(), infer(c, "m", 1, 1))
		check(d, interceptors.BudgetExhausted, 40*time.Minute, hour,
			map[string]string{"budget": "hour", "limit": "100", "remaining": "0", "requested": "1"})
		if _, d = start(t, l.Rates(), infer(c, "once", 1, 1)); d != nil {
			t.Error(d)
		}
		time.Sleep(time.Second)
		_, d = start(t, l.Rates(), infer(c, "once", 1, 1))
		check(d, interceptors.RateExceeded, 59*time.Second, interceptors.Quota{Subject: "principal:p", Metric: "requests", ID: "rate", Limit: 2},
			map[string]string{"budget": "rate", "limit": "2", "remaining": "0", "requested": "1"})
		last.End(interceptors.Outcome{})
		atRest(t, l)
	})
}

func TestOneAccountForEveryoneHasASubject(t *testing.T) {
	l := ledger(t, &configv1.Budget{Name: "b", Tokens: 10})
	_, d := start(t, l.Tokens(), infer(caller("a", "p"), "m", 10, 1))
	if d == nil || d.Quota.Subject != "everyone" {
		t.Errorf("%+v", d)
	}
}

// The denial that a caller can act on is that of the budget that stays short longest.
func TestTheWorstShortageIsTold(t *testing.T) {
	short := func(windows ...time.Duration) string {
		var budgets []*configv1.Budget
		for n, w := range windows {
			budgets = append(budgets, &configv1.Budget{Name: fmt.Sprint(n), Tokens: 10, Window: durationpb.New(w)})
		}
		l := ledger(t, budgets...)
		if _, d := start(t, l.Tokens(), infer(caller("a", "p"), "m", 1, 9)); d != nil {
			t.Fatal(d)
		}
		_, d := start(t, l.Tokens(), infer(caller("a", "p"), "m", 1, 1))
		return d.Quota.ID
	}
	for _, test := range []struct {
		windows []time.Duration
		want    string
	}{
		{[]time.Duration{time.Hour, time.Minute}, "0"},
		{[]time.Duration{time.Minute, time.Hour}, "1"},
		{[]time.Duration{time.Minute, 0, time.Hour}, "1"},
		{[]time.Duration{0, time.Hour}, "0"},
	} {
		if got := short(test.windows...); got != test.want {
			t.Errorf("windows %v: told of budget %s, want %s", test.windows, got, test.want)
		}
	}
	t.Run("and of equal ones the narrowest", func(t *testing.T) {
		l := ledger(t, &configv1.Budget{Name: "all", Tokens: 10}, &configv1.Budget{Name: "each", Tokens: 10, Per: []configv1.BudgetKey{perModel}})
		_, d := start(t, l.Tokens(), infer(caller("a", "p"), "m", 10, 1))
		if d == nil || d.Quota.ID != "each" {
			t.Errorf("%+v", d)
		}
	})
}

func TestAllBudgetsOrNothing(t *testing.T) {
	for _, test := range []struct {
		name    string
		metric  string
		budgets []*configv1.Budget
	}{
		{"tokens", "tokens", []*configv1.Budget{
			{Name: "wide", Tokens: 1000}, {Name: "narrow", Tokens: 10, Per: []configv1.BudgetKey{perPrincipal}}}},
		{"tokens, the last is short", "tokens", []*configv1.Budget{
			{Name: "wide", Tokens: 1000, Per: []configv1.BudgetKey{perPrincipal}}, {Name: "narrow", Tokens: 10}}},
		{"requests", "requests", []*configv1.Budget{
			{Name: "wide", Requests: 1000}, {Name: "narrow", Requests: 1, Per: []configv1.BudgetKey{perPrincipal}}}},
		{"requests, the last is short", "requests", []*configv1.Budget{
			{Name: "wide", Requests: 1000, Per: []configv1.BudgetKey{perPrincipal}}, {Name: "narrow", Requests: 1}}},
	} {
		t.Run(test.name, func(t *testing.T) {
			l := ledger(t, test.budgets...)
			p := l.Tokens()
			if test.metric == "requests" {
				p = l.Rates()
			}
			for range 3 {
				if v, _ := start(t, p, infer(caller("a", "p"), "m", 4, 6)); v != nil {
					v.End(interceptors.Outcome{Err: fmt.Errorf("not handed")})
				}
			}
			used := int64(0) // tokens: all refunded
			if test.metric == "requests" {
				used = 1
			}
			if _, d := start(t, p, infer(caller("a", "p"), "m", 4, 60)); d == nil {
				t.Fatal("not refused")
			}
			for _, a := range l.Snapshot() {
				if a.Limit-a.Remaining != used {
					t.Errorf("%+v, want %d used", a, used)
				}
			}
			atRest(t, l)
		})
	}
}

func TestRequestIsSpentEvenIfRefusedLater(t *testing.T) {
	l := ledger(t,
		&configv1.Budget{Name: "rate", Requests: 2},
		&configv1.Budget{Name: "tokens", Tokens: 10})
	i := infer(caller("a", "p"), "m", 1, 100)
	for n, want := range []interceptors.Reason{interceptors.BudgetExhausted, interceptors.BudgetExhausted, interceptors.RateExceeded} {
		_, d := start(t, l.Rates(), i)
		if d == nil {
			_, d = start(t, l.Tokens(), i)
		}
		if d == nil || d.Reason != want {
			t.Errorf("inference %d: %v, want %s", n, d, want)
		}
	}
}

func TestWindows(t *testing.T) {
	window := func(tokens uint64) *configv1.Budget {
		return &configv1.Budget{Name: "b", Tokens: tokens, Window: durationpb.New(time.Minute), DefaultOutputTokens: 5}
	}
	begin := func(t *testing.T, l *Ledger, in, max int64) (*interceptors.Inference, interceptors.InferencePolicy) {
		t.Helper()
		i := infer(caller("a", "p"), "m", in, max)
		v, d := start(t, l.Tokens(), i)
		if d != nil {
			t.Fatal(d)
		}
		i.Handed = true
		return i, v
	}
	expect := func(t *testing.T, l *Ledger, want Account) {
		t.Helper()
		want.Budget, want.Metric, want.Limit = "b", "tokens", 100
		got := only(t, l)
		if got.WindowEnds = (time.Time{}); got != want { // the machine knows when
			t.Errorf("got  %+v\nwant %+v", got, want)
		}
	}
	t.Run("refilled whole at its end", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			l := ledger(t, window(100))
			time.Sleep(45 * time.Second) // a window begins with its first use
			i, v := begin(t, l, 40, 60)
			i.OutputTokens = 60
			v.End(interceptors.Outcome{})
			time.Sleep(time.Minute - 1)
			expect(t, l, Account{Spent: 100})
			_, d := start(t, l.Tokens(), infer(caller("a", "p"), "m", 1, 1))
			if d == nil || d.RetryAfter != 1 {
				t.Errorf("%+v, want a refusal for 1 ns", d)
			}
			time.Sleep(1)
			expect(t, l, Account{Remaining: 100})
			_, v = begin(t, l, 40, 60)
			expect(t, l, Account{Reserved: 100})
			v.End(interceptors.Outcome{})
		})
	})
	t.Run("a refund does not mint tokens in the next", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			l := ledger(t, window(100))
			_, old := begin(t, l, 40, 60)
			time.Sleep(time.Minute)
			expect(t, l, Account{Remaining: 100, Carried: 100})
			i, v := begin(t, l, 10, 40)
			expect(t, l, Account{Remaining: 50, Reserved: 50, Carried: 100})
			old.End(interceptors.Outcome{})
			expect(t, l, Account{Remaining: 50, Reserved: 50})
			i.OutputTokens = 1
			v.End(interceptors.Outcome{})
			expect(t, l, Account{Remaining: 89, Spent: 11})
		})
	})
	t.Run("a refund between the end and the next use is not minted either", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			l := ledger(t, window(100))
			_, old := begin(t, l, 40, 60)
			time.Sleep(2 * time.Minute)
			old.End(interceptors.Outcome{})
			expect(t, l, Account{Remaining: 100})
			_, v := begin(t, l, 40, 60)
			expect(t, l, Account{Reserved: 100})
			v.End(interceptors.Outcome{})
		})
	})
	t.Run("a top-up is of the window that it comes in", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			l := ledger(t, window(100))
			i, v := begin(t, l, 40, 10)
			time.Sleep(time.Minute)
			i.OutputTokens = 30 // 20 beyond
			if err := v.Response(nil); err != nil {
				t.Fatal(err)
			}
			expect(t, l, Account{Remaining: 80, Reserved: 20, Carried: 50})
			time.Sleep(time.Minute)
			i.OutputTokens = 37 // 7 beyond
			if err := v.Response(nil); err != nil {
				t.Fatal(err)
			}
			expect(t, l, Account{Remaining: 93, Reserved: 7, Carried: 70})
			i.OutputTokens = 38 // of a step of 5
			if err := v.Response(nil); err != nil {
				t.Fatal(err)
			}
			expect(t, l, Account{Remaining: 88, Reserved: 12, Carried: 70})
			v.End(interceptors.Outcome{})
			expect(t, l, Account{Remaining: 92, Spent: 8})
		})
	})
	t.Run("without one nothing comes back", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			l := ledger(t, &configv1.Budget{Name: "b", Tokens: 100})
			_, v := begin(t, l, 40, 60)
			v.End(interceptors.Outcome{})
			time.Sleep(1000 * time.Hour)
			expect(t, l, Account{Remaining: 60, Spent: 40})
			_, d := start(t, l.Tokens(), infer(caller("a", "p"), "m", 1, 60))
			if d == nil || d.RetryAfter != interceptors.NoRetry {
				t.Errorf("%+v", d)
			}
		})
	})
}

func TestAccountsAreOfTheirKeys(t *testing.T) {
	l := ledger(t, &configv1.Budget{Name: "b", Tokens: 10, Per: []configv1.BudgetKey{perTenant, perPrincipal, perModel}})
	fits := func(tenant, principal, model string) bool {
		_, d := start(t, l.Tokens(), infer(caller(tenant, principal), model, 4, 6))
		return d == nil
	}
	long := strings.Repeat("x", 1<<20)
	for _, k := range [][3]string{{"a", "p", "m"}, {"b", "p", "m"}, {"a", "q", "m"}, {"a", "p", "n"}, {"a", "p", long}, {"a", "p", long + "y"}} {
		if !fits(k[0], k[1], k[2]) {
			t.Errorf("%.20q has no account of its own", k)
		}
		if fits(k[0], k[1], k[2]) {
			t.Errorf("%.20q has more than one account", k)
		}
	}
	for _, a := range l.Snapshot() {
		if len(a.Model) > maxName {
			t.Errorf("an account keeps a name of %d bytes", len(a.Model))
		}
	}
}

func TestIdleAccountsAreEvicted(t *testing.T) {
	const n = 20_000
	for _, test := range []struct {
		name        string
		window      time.Duration
		handed      bool
		most, least int
	}{
		{"refunded whole", 0, false, 2000, 0},
		{"spent, no window", 0, true, n + 1, n},
		{"spent, in the window", 100 * time.Hour, true, n + 1, n},
		{"spent, the window is over", 10 * time.Second, true, 2000, 0},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				l := ledger(t, &configv1.Budget{Name: "b", Tokens: 10, Window: durationpb.New(test.window), Per: []configv1.BudgetKey{perModel}})
				c := caller("a", "p")
				held, d := start(t, l.Tokens(), infer(c, "held", 4, 6)) // all the while
				if d != nil {
					t.Fatal(d)
				}
				for k := range n {
					i := infer(c, fmt.Sprint(k), 4, 6)
					i.Handed = test.handed
					v, d := start(t, l.Tokens(), i)
					if d != nil {
						t.Fatal(d)
					}
					v.End(interceptors.Outcome{})
					time.Sleep(100 * time.Millisecond)
				}
				if got := int(l.table.size.Load()); got > test.most || got < test.least || got != len(l.Snapshot()) {
					t.Errorf("%d accounts (%d in the tables), want %d to %d", got, len(l.Snapshot()), test.least, test.most)
				}
				if a := held.(*reservation).holds[0].account; l.table.find(key{limit: a.limit, model: "held"}) != a {
					t.Error("an account in use was evicted")
				}
				held.End(interceptors.Outcome{})
			})
		})
	}
}

func TestAFullLedgerFailsClosed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := ledger(t,
			&configv1.Budget{Name: "all", Tokens: 1000, Window: durationpb.New(time.Minute), Per: []configv1.BudgetKey{perTenant}},
			&configv1.Budget{Name: "each", Tokens: 10, Window: durationpb.New(time.Minute), Per: []configv1.BudgetKey{perTenant, perModel}})
		l.table.max = 3
		ask := func(model string) *interceptors.Denial {
			i := infer(caller("a", "p"), model, 4, 6)
			i.Handed = true
			v, d := start(t, l.Tokens(), i)
			if v != nil {
				v.End(interceptors.Outcome{})
			}
			return d
		}
		for _, model := range []string{"1", "2"} {
			if d := ask(model); d != nil {
				t.Fatal(d)
			}
		}
		if d := ask("3"); d == nil || d.Reason != interceptors.PolicyUnavailable {
			t.Errorf("%v, want POLICY_UNAVAILABLE", d)
		}
		if d := ask("1"); d == nil || d.Reason != interceptors.BudgetExhausted {
			t.Errorf("%v, want BUDGET_EXHAUSTED", d)
		}
		time.Sleep(time.Minute)
		n := 0
		for n < 5000 && ask(fmt.Sprint("later", n)) != nil { // until one meets an account that can go
			n++
		}
		if n == 5000 {
			t.Error("no account can be opened though all others are idle")
		}
		atRest(t, l)
	})
	t.Run("and keeps nothing of an inference whose second account cannot be opened", func(t *testing.T) {
		l := ledger(t, &configv1.Budget{Name: "all", Tokens: 10}, &configv1.Budget{Name: "each", Tokens: 10, Per: []configv1.BudgetKey{perModel}})
		l.table.max = 1
		if _, d := start(t, l.Tokens(), infer(caller("a", "p"), "m", 1, 1)); d == nil || d.Reason != interceptors.PolicyUnavailable {
			t.Errorf("%v, want POLICY_UNAVAILABLE", d)
		}
		atRest(t, l)
	})
}

func TestConcurrentCallersGetExactlyWhatFits(t *testing.T) {
	const callers, fit = 500, 37
	for _, test := range []struct {
		name   string
		budget *configv1.Budget
		policy func(*Ledger) interceptors.Policy
	}{
		{"tokens", &configv1.Budget{Name: "b", Tokens: fit*30 + 29, Per: []configv1.BudgetKey{perTenant}}, (*Ledger).Tokens},
		{"requests", &configv1.Budget{Name: "b", Requests: fit, Per: []configv1.BudgetKey{perTenant}}, (*Ledger).Rates},
	} {
		t.Run(test.name, func(t *testing.T) {
			l := ledger(t, test.budget, &configv1.Budget{Name: "wide", Tokens: 1e9}, &configv1.Budget{Name: "rate", Requests: 1e9})
			p := test.policy(l)
			var served atomic.Int64
			var all sync.WaitGroup
			for range callers {
				all.Go(func() {
					i := infer(caller("a", "p"), "m", 10, 20)
					v, d := start(t, p, i)
					if d != nil {
						return
					}
					served.Add(1)
					if v != nil {
						i.Handed, i.OutputTokens = true, 20
						v.End(interceptors.Outcome{})
					}
				})
			}
			all.Wait()
			if served.Load() != fit {
				t.Errorf("%d were served, want %d", served.Load(), fit)
			}
			atRest(t, l)
		})
	}
}

func TestExcessIsNotCharged(t *testing.T) {
	l := ledger(t, &configv1.Budget{Name: "b", Tokens: 30})
	i := infer(caller("a", "p"), "m", 10, 20)
	v, d := start(t, l.Tokens(), i)
	if d != nil {
		t.Fatal(d)
	}
	i.Handed, i.OutputTokens = true, 25
	if denial(t, v.Response(nil)) == nil {
		t.Fatal("not cut")
	}
	v.End(interceptors.Outcome{})
	if got := only(t, l); got.Spent != 30 {
		t.Errorf("%+v, want 30 spent", got)
	}
}
