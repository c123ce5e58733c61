package budget

import (
	"fmt"
	"math"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/sluicegate/sluice/interceptors"
	adminv1 "github.com/sluicegate/sluice/proto/gen/sluice/admin/v1"
	configv1 "github.com/sluicegate/sluice/proto/gen/sluice/config/v1"
)

// spend has a tenant use tokens.
func spend(t *testing.T, l *Ledger, tenant string, n int64) {
	t.Helper()
	if got, d := serve(t, l, tenant, n, 0); d != nil || got != n {
		t.Fatalf("%d of %d: %v", got, n, d)
	}
}

func TestAccountsCanBeGrantedAndReset(t *testing.T) {
	l := ledger(t, &configv1.Budget{Name: "day", Tokens: 100, Window: durationpb.New(time.Hour), DefaultOutputTokens: 1,
		Per: []configv1.BudgetKey{perTenant}})
	name := Name{Budget: "day", Tenant: "a"}
	see := func(what string, a Account, err error, limit, remaining, spent int64) {
		t.Helper()
		if err != nil || a.Name() != name || a.Limit != limit || a.Remaining != remaining || a.Spent != spent {
			t.Fatalf("%s: %+v, %v; want %d of %d left, %d spent", what, a, err, remaining, limit, spent)
		}
	}
	a, err := l.Account(t.Context(), name)
	see("untouched", a, err, 100, 100, 0)
	if len(l.Snapshot()) != 0 {
		t.Error("to look at an account made it")
	}
	spend(t, l, "a", 90)
	if _, d := serve(t, l, "a", 20, 0); d == nil || d.Quota.Limit != 100 {
		t.Fatalf("20 of 10: %+v", d)
	}
	a, err = l.Grant(t.Context(), name, 50)
	see("granted", a, err, 150, 60, 90)
	if a.Granted != 50 || a.WindowEnds.IsZero() {
		t.Errorf("%+v", a)
	}
	spend(t, l, "a", 55)
	if _, d := serve(t, l, "a", 20, 0); d == nil || d.Quota.Limit != 150 || d.Metadata["limit"] != "150" {
		t.Fatalf("20 of 5: %+v", d)
	}
	spend(t, l, "b", 90) // has nothing of it
	a, err = l.Account(t.Context(), name)
	see("spent", a, err, 150, 5, 145)
	a, err = l.Reset(t.Context(), name)
	see("reset", a, err, 100, 100, 0)
	if b, _ := l.Account(t.Context(), Name{Budget: "day", Tenant: "b"}); b.Spent != 90 {
		t.Errorf("another account: %+v", b)
	}
	atRest(t, l)
}

func TestNamesThatAreNoAccount(t *testing.T) {
	l := ledger(t, &configv1.Budget{Name: "day", Tokens: 100, Overdraft: 1, Per: []configv1.BudgetKey{perTenant, perModel}})
	for name, tc := range map[string]struct {
		name   Name
		amount int64
		code   codes.Code
		text   string
	}{
		"no such budget":       {Name{Budget: "night"}, 1, codes.NotFound, `no budget "night"`},
		"no tenant":            {Name{Budget: "day", Model: "m"}, 1, codes.InvalidArgument, "tenant: budget"},
		"a name too many":      {Name{Budget: "day", Tenant: "a", Principal: "p"}, 1, codes.InvalidArgument, "principal: budget"},
		"nothing":              {Name{Budget: "day", Tenant: "a"}, 0, codes.InvalidArgument, "amount: "},
		"less than nothing":    {Name{Budget: "day", Tenant: "a"}, -1, codes.InvalidArgument, "amount: "},
		"more than can be":     {Name{Budget: "day", Tenant: "a"}, math.MaxInt64 - 100, codes.InvalidArgument, "amount: "},
		"as much as there can": {Name{Budget: "day", Tenant: "a", Model: "m"}, math.MaxInt64 - 101, codes.OK, ""},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := l.Grant(t.Context(), tc.name, tc.amount)
			if status.Code(err) != tc.code || !strings.Contains(fmt.Sprint(err), tc.text) {
				t.Errorf("%v, want %v with %q", err, tc.code, tc.text)
			}
		})
	}
	spend(t, l, "a", 1000) // the arithmetic holds
}

// A grant outlives the process in which it was made; one that cannot be written down
// is not made.
func TestGrantsAreWrittenDown(t *testing.T) {
	for kind, budget := range map[string]*configv1.Budget{
		"life":     {},
		"window":   {Window: durationpb.New(time.Hour)},
		"calendar": {Calendar: month},
		"bucket":   {Window: durationpb.New(1000 * time.Hour), Burst: 100},
	} {
		t.Run(kind, func(t *testing.T) {
			file := filepath.Join(t.TempDir(), "state")
			budget.Name, budget.Tokens, budget.DefaultOutputTokens = kind, 100, 1
			budgets, name := []*configv1.Budget{budget}, Name{Budget: kind}
			l := ledger(t, budgets...)
			if err := l.Open(file); err != nil {
				t.Fatal(err)
			}
			spend(t, l, "a", 90)
			if _, err := l.Grant(t.Context(), name, 30); err != nil {
				t.Fatal(err)
			}
			// A block, and the token that was held meanwhile.
			restored(t, l, file, budgets, func(after, before int64) bool { return after <= before && after >= before-2 && before == 40 })
			if _, err := l.Reset(t.Context(), name); err != nil {
				t.Fatal(err)
			}
			restored(t, l, file, budgets, func(after, before int64) bool { return after == before && after == 100 })
			spend(t, l, "a", 90)
			_ = l.journal.file.Close()
			if _, err := l.Grant(t.Context(), name, 30); status.Code(err) != codes.Unavailable {
				t.Errorf("without a file: %v", err)
			}
			if a := only(t, l); a.Limit != 100 || a.Spent != 90 {
				t.Errorf("it was granted all the same: %+v", a)
			}
			_ = l.Close()
		})
	}
}

// Where gateways share a store a grant is for all of them, and so is a reset.
func TestGrantsAreShared(t *testing.T) {
	s := newServer(t)
	for kind, budget := range map[string]*configv1.Budget{
		"life":     {},
		"window":   {Window: durationpb.New(time.Hour)},
		"calendar": {Calendar: month},
		"bucket":   {Window: durationpb.New(1000 * time.Hour), Burst: 100},
	} {
		t.Run(kind, func(t *testing.T) {
			budget.Name, budget.Tokens, budget.Share, budget.DefaultOutputTokens = kind, 100, 10, 1
			budget.Per = []configv1.BudgetKey{perTenant}
			a, b := s.gateway(t, time.Minute, long, budget), s.gateway(t, time.Minute, long, budget)
			name := Name{Budget: kind, Tenant: "a"}
			all := func(l *Ledger, tenant string) (n int64) {
				for {
					got, d := serve(t, l, tenant, 1, 0)
					if d != nil {
						return n
					}
					n += got
				}
			}
			if n := all(a, "a") + all(b, "a"); n > 100 || n < 98 { // two times one that is too little for an input and an output
				t.Fatalf("%d of 100", n)
			}
			if _, err := a.Grant(t.Context(), name, 30); err != nil {
				t.Fatal(err)
			}
			seen, err := b.Account(t.Context(), name)
			if err != nil || !seen.Shared || seen.SharedLeft < 25 || seen.SharedLeft > 31 {
				t.Errorf("the other gateway sees %+v, %v", seen, err)
			}
			if n := all(b, "a") + all(a, "a"); n > 32 || n < 28 {
				t.Errorf("%d of 30", n)
			}
			if _, err := b.Reset(t.Context(), name); err != nil {
				t.Fatal(err)
			}
			if n := all(a, "a") + all(b, "a"); n > 102 || n < 95 {
				t.Errorf("%d of 100 after the reset", n)
			}
			// What gateways hold at a reset they can spend, and nothing for it.
			for _, l := range []*Ledger{a, b} {
				spend(t, l, "b", 1)
			}
			if _, err := b.Reset(t.Context(), Name{Budget: kind, Tenant: "b"}); err != nil {
				t.Fatal(err)
			}
			if n := all(a, "b") + all(b, "b"); n > 100 || n < 95 {
				t.Errorf("%d of 100 after a reset with shares out", n)
			}
			s.cut(true)
			if _, err := a.Grant(t.Context(), name, 30); status.Code(err) != codes.Unavailable {
				t.Errorf("without the store: %v", err)
			}
			s.down.Store(false)
			if _, err := a.Grant(t.Context(), name, 1<<52); status.Code(err) != codes.InvalidArgument {
				t.Errorf("more than the store can count: %v", err)
			}
			_, _ = a.Close(), b.Close()
		})
	}
}

func TestAccountsAreListedInPages(t *testing.T) {
	l := ledger(t,
		&configv1.Budget{Name: "b", Tokens: 100, Per: []configv1.BudgetKey{perTenant, perModel}},
		&configv1.Budget{Name: "a", Tokens: 5, Models: []string{"m"}, Per: []configv1.BudgetKey{perTenant}})
	for n := range 40 {
		i := infer(caller(fmt.Sprintf("t%02d\xff", n), "p"), fmt.Sprint("n", n%2), 1, 1)
		i.Handed = true
		v, d := start(t, l.Tokens(), i)
		if d != nil {
			t.Fatal(d)
		}
		v.End(interceptors.Outcome{})
	}
	api := l.Admin()
	for name, tc := range map[string]struct {
		filter  *adminv1.AccountName
		size    int32
		want    int
		invalid bool
	}{
		"all":           {nil, 7, 40, false},
		"one budget":    {&adminv1.AccountName{Budget: "b"}, 1, 40, false},
		"another":       {&adminv1.AccountName{Budget: "a"}, 7, 0, false},
		"one model":     {&adminv1.AccountName{Model: "n1"}, 20, 20, false},
		"one tenant":    {&adminv1.AccountName{Tenant: "t03\xff"}, 0, 1, false},
		"no such":       {&adminv1.AccountName{Tenant: "x"}, 0, 0, false},
		"below nothing": {nil, -1, 0, true},
	} {
		t.Run(name, func(t *testing.T) {
			seen, last, token := 0, "", ""
			for {
				r, err := api.ListAccounts(t.Context(), &adminv1.ListAccountsRequest{Filter: tc.filter, PageSize: tc.size, PageToken: token})
				if tc.invalid {
					if status.Code(err) != codes.InvalidArgument {
						t.Errorf("%v", err)
					}
					return
				}
				if err != nil || tc.size > 0 && len(r.GetAccounts()) > int(tc.size) {
					t.Fatalf("%d accounts, %v", len(r.GetAccounts()), err)
				}
				for _, a := range r.GetAccounts() {
					this := a.GetName().GetTenant()
					if seen++; this <= last || a.GetMetric() != adminv1.Metric_METRIC_TOKENS || a.GetSpent() != 1 || a.GetRemaining() != 99 {
						t.Fatalf("%v after %q", a, last)
					}
					last = this
				}
				if token = r.GetNextPageToken(); token == "" {
					break
				}
			}
			if seen != tc.want {
				t.Errorf("%d accounts, want %d", seen, tc.want)
			}
		})
	}
	for _, token := range []string{"%", "YQ", "WzFd", "W10"} {
		if _, err := api.ListAccounts(t.Context(), &adminv1.ListAccountsRequest{PageToken: token}); status.Code(err) != codes.InvalidArgument {
			t.Errorf("token %q: %v", token, err)
		}
	}
}

// Without budgets the API says so.
func TestAdminWithoutBudgets(t *testing.T) {
	api := (*Ledger)(nil).Admin()
	_, list := api.ListAccounts(t.Context(), &adminv1.ListAccountsRequest{})
	_, get := api.GetAccount(t.Context(), &adminv1.GetAccountRequest{})
	_, grant := api.Grant(t.Context(), &adminv1.GrantRequest{})
	_, reset := api.Reset(t.Context(), &adminv1.ResetRequest{})
	for _, err := range []error{list, get, grant, reset} {
		if status.Code(err) != codes.FailedPrecondition {
			t.Errorf("%v", err)
		}
	}
}

// FuzzPageToken holds that a token is refused or is one of ours.
func FuzzPageToken(f *testing.F) {
	f.Add("")
	f.Add(token(Name{"a", "b", "c\xff", "", "e", "f"}))
	f.Add("W10")
	f.Fuzz(func(t *testing.T, s string) {
		n, err := readToken(s)
		if err != nil {
			if status.Code(err) != codes.InvalidArgument || n != (Name{}) {
				t.Errorf("%v, %v", n, err)
			}
			return
		}
		if again, err := readToken(token(n)); err != nil || again != n {
			t.Errorf("%q becomes %q, %v", n, again, err)
		}
	})
}
