package budget

import (
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"testing"

	"google.golang.org/grpc/metadata"

	"github.com/sluicegate/sluice/interceptors"
	configv1 "github.com/sluicegate/sluice/proto/gen/sluice/config/v1"
)

// team is a call with a header that budgets go by.
func team(name string) *interceptors.Call {
	c := caller("a", "p")
	if name != "" {
		c.Metadata = metadata.MD{"x-team": {name}}
	}
	return c
}

const byTeam = `metadata["x-team"][0]`

// A budget with a key of its own has an account for each text that it gives, beside
// the levels that it names.
func TestOwnKey(t *testing.T) {
	l := ledger(t, &configv1.Budget{Name: "team", Tokens: 100, Key: byTeam, Per: []configv1.BudgetKey{perTenant}})
	for _, name := range []string{"blue", "red", "blue"} {
		i := infer(team(name), "m", 10, 20)
		v, d := start(t, l.Tokens(), i)
		if d != nil {
			t.Fatal(d)
		}
		i.Handed = true
		v.End(interceptors.Outcome{})
	}
	spent := map[string]int64{}
	for _, a := range l.Accounts(Name{}, Name{}, 10) {
		spent[a.Tenant+"/"+a.Key] = a.Spent
	}
	if fmt.Sprint(spent) != "map[a/blue:20 a/red:10]" {
		t.Error(spent)
	}
	_, d := start(t, l.Tokens(), infer(team("blue"), "m", 90, 20))
	if d == nil || d.Quota.Subject != "tenant:a,key:blue" {
		t.Errorf("%+v", d)
	}
	if a, err := l.Reset(t.Context(), Name{Budget: "team", Tenant: "a", Key: "blue"}); err != nil || a.Spent != 0 || a.Key != "blue" {
		t.Errorf("%+v, %v", a, err)
	}
	atRest(t, l)
}

// An inference whose account cannot be told is refused, whether it would spend a
// request or tokens, and holds nothing.
func TestOwnKeyThatCannotBeTold(t *testing.T) {
	l := ledger(t, &configv1.Budget{Name: "all", Tokens: 100}, &configv1.Budget{Name: "team", Tokens: 100, Key: byTeam},
		&configv1.Budget{Name: "rate", Requests: 100, Key: `string(parameters["user"])`})
	for name, p := range map[string]interceptors.Policy{"team": l.Tokens(), "rate": l.Rates()} {
		_, d := start(t, p, infer(team(""), "m", 1, 1))
		if d == nil || d.Reason != interceptors.PolicyUnavailable || d.RetryAfter != interceptors.NoRetry || d.Cause == nil ||
			!strings.Contains(d.Message, name) || d.Metadata["budget"] != name {
			t.Errorf("%s: %+v", name, d)
		}
	}
	for _, a := range l.Snapshot() {
		if a.Remaining != 100 {
			t.Errorf("%+v", a)
		}
	}
	atRest(t, l)
}

// Keys are bounded as names are: in number, and in length.
func TestOwnKeysAreBounded(t *testing.T) {
	l := ledger(t, &configv1.Budget{Name: "team", Tokens: 100, Key: byTeam})
	l.table.max = 10
	refused := 0
	for n := range 20 {
		i := infer(team(strings.Repeat("x", 1000)+fmt.Sprint(n)), "m", 1, 1)
		v, d := start(t, l.Tokens(), i)
		switch {
		case d == nil:
			i.Handed = true
			v.End(interceptors.Outcome{})
		case !errors.Is(d.Cause, errFull):
			t.Fatal(d)
		default:
			refused++
		}
	}
	if refused != 10 {
		t.Errorf("%d refused", refused)
	}
	for _, a := range l.Snapshot() {
		if len(a.Key) > maxName {
			t.Errorf("a key of %d bytes", len(a.Key))
		}
	}
}

func TestOwnKeyInTheStateFile(t *testing.T) {
	file := filepath.Join(t.TempDir(), "state")
	budget := &configv1.Budget{Name: "team", Tokens: 100, Key: byTeam}
	for n := range 3 {
		l := ledger(t, budget)
		if err := l.Open(file); err != nil {
			t.Fatal(err)
		}
		a, err := l.Account(t.Context(), Name{Budget: "team", Key: "blue"})
		if err != nil || a.Spent != int64(10*n) {
			t.Errorf("%+v, %v", a, err)
		}
		i := infer(team("blue"), "m", 10, 10)
		v, d := start(t, l.Tokens(), i)
		if d != nil {
			t.Fatal(d)
		}
		i.Handed = true
		v.End(interceptors.Outcome{})
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

func TestOwnKeyErrors(t *testing.T) {
	_, err := New([]*configv1.Budget{{Name: "b", Tokens: 1, Key: "principal.segments"}})
	if err == nil || !strings.HasPrefix(err.Error(), "budgets[0].key: it is a list(string); a key must be a string") {
		t.Error(err)
	}
	l := ledger(t, &configv1.Budget{Name: "b", Tokens: 1})
	if _, err := l.Account(t.Context(), Name{Budget: "b", Key: "x"}); err == nil || !strings.Contains(err.Error(), "key: ") {
		t.Error(err)
	}
}

// Where all budgets have the same key, its texts may be in other slots of a cluster.
func TestOwnKeyInTheStore(t *testing.T) {
	for name, test := range map[string]struct {
		other string
		same  bool
	}{"of all budgets": {byTeam, false}, "of one": {"", true}} {
		l := ledger(t, &configv1.Budget{Name: "a", Tokens: 1, Key: byTeam}, &configv1.Budget{Name: "b", Tokens: 1, Key: test.other})
		at := map[string]bool{}
		for _, who := range []string{"blue", "red"} {
			for _, m := range l.limits {
				k, err := m.key(infer(team(who), "m", 0, 0))
				if err != nil {
					t.Fatal(err)
				}
				at[l.tag(k)] = true
			}
		}
		if (len(at) == 1) != test.same {
			t.Errorf("%s: %v", name, at)
		}
	}
}
