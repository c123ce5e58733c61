package identity

import (
	"strings"
	"testing"
	"time"

	"github.com/sluicegate/sluice/interceptors"
	"github.com/sluicegate/sluice/interceptors/dialect"
	configv1 "github.com/sluicegate/sluice/proto/gen/sluice/config/v1"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/metadata"
)

// That the explanation agrees with the decision is tested wherever decisions
// are: see decision. This is about the words.
func TestExplain(t *testing.T) {
	const id = "spiffe://a/team/x"
	night := when(deny("spiffe://a/**", "inference", ""), `time.getHours() < 6`)
	night.Name = "night"
	rules := []*configv1.Rule{
		night,
		versions(allow(id, "inference", "m"), "1"),
		when(allow(id, "inference", "*"), `metadata["x-job"][0] == "batch" && parameters["max_tokens"] <= 10`),
		allow("spiffe://a/other", "inference", "*"),
		allow(id, "metadata", "m"),
	}
	day, dark := time.Date(2026, 1, 1, 12, 0, 0, 0, time.UTC), time.Date(2026, 1, 1, 3, 0, 0, 0, time.UTC)
	for _, c := range []struct {
		name   string
		q      Question
		reason interceptors.Reason
		rule   int
		why    string
		rules  []string // "" if it matches
	}{
		{"allowed", Question{Method: infer, Model: "m", Version: "1", Time: day}, "", 1, "a rule allows it",
			[]string{"condition is false", "", "cannot be decided: no such key: x-job", "principal is another", "method is another"}},
		{"allowed by its condition", Question{Method: infer, Model: "n", Time: day, Metadata: metadata.Pairs("x-job", "batch"),
			Parameters: map[string]any{"max_tokens": int64(10)}}, "", 2, "a rule allows it",
			[]string{"condition is false", "model is another", "", "principal is another", "method is another"}},
		{"another version", Question{Method: infer, Model: "m", Version: "2", Time: day}, interceptors.ModelDenied, -1, "no rule allows it",
			[]string{"condition is false", "version is another", "no such key", "principal", "method"}},
		{"no version", Question{Method: infer, Model: "m", Time: day}, interceptors.ModelDenied, -1, "no rule allows it",
			[]string{"condition is false", "leaves the version", "no such key", "principal", "method"}},
		{"no model", Question{Method: infer, Time: day}, interceptors.ModelDenied, -1, "no rule allows it",
			[]string{"condition is false", "names no model", "no such key", "principal", "method"}},
		{"denied", Question{Method: infer, Model: "m", Version: "1", Time: dark}, interceptors.MethodDenied, 0, "a rule denies the method",
			[]string{"", "", "no such key", "principal", "method"}},
		{"no rule", Question{Method: load, Model: "m", Time: day}, interceptors.MethodDenied, -1, "no rule allows the method",
			[]string{"method", "method", "method", "method", "method"}},
		{"no method", Question{Time: day}, interceptors.MethodUnknown, -1, "no back end has the method", nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			config := secure(rules...)
			config.Tenant = "{1}"
			p := newPolicy(t, config)
			c.q.Principal = spiffeid.RequireFromString(id)
			x := p.Explain(c.q)
			if x.Allowed != (c.reason == "") || x.Reason != c.reason || x.Rule != c.rule || !strings.HasPrefix(x.Why, c.why) ||
				x.Principal != id || x.Tenant != "team" {
				t.Errorf("%+v", x)
			}
			if len(x.Rules) != len(c.rules) {
				t.Fatalf("%d rules are explained, not %d", len(x.Rules), len(c.rules))
			}
			for n, want := range c.rules {
				got := x.Rules[n]
				if got.Matches != (want == "") || !strings.Contains(got.Why, want) || got.Index != n ||
					got.Deny != rules[n].GetDeny() || got.Name != rules[n].GetName() {
					t.Errorf("%d: %+v, want %q", n, got, want)
				}
			}
		})
	}
}

func TestExplainDenialThatCannotBeDecided(t *testing.T) {
	p := newPolicy(t, secure(allow("spiffe://a/x", "inference", "m"), when(deny("spiffe://a/x", "inference", "m"), `parameters["seed"] == 1`)))
	x := p.Explain(Question{Principal: spiffeid.RequireFromString("spiffe://a/x"), Method: infer, Model: "m"})
	if x.Allowed || x.Reason != interceptors.ModelDenied || x.Rule != 1 || !x.Rules[1].Matches || !strings.Contains(x.Rules[1].Why, "cannot be decided") {
		t.Errorf("%+v", x)
	}
}

func TestExplainAnonymous(t *testing.T) {
	for name, c := range map[string]*configv1.Identity{"secure": secure(), "open": open(allow("anonymous", "health", ""))} {
		for _, m := range []*dialect.Method{infer, nil} {
			want := interceptors.IdentityMissing
			if name == "open" && m == nil {
				want = interceptors.MethodUnknown
			}
			if x := newPolicy(t, c).Explain(Question{Method: m, Model: "m"}); x.Allowed || x.Reason != want || x.Principal != "anonymous" {
				t.Errorf("%s: %+v, want %s", name, x, want)
			}
		}
	}
	if x := newPolicy(t, open(allow("anonymous", "health", ""))).Explain(Question{Method: live}); !x.Allowed {
		t.Errorf("%+v", x)
	}
}
