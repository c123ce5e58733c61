package identity

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"github.com/sluicegate/sluice/interceptors"
	"github.com/sluicegate/sluice/interceptors/dialect"
	configv1 "github.com/sluicegate/sluice/proto/gen/sluice/config/v1"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

func when(r *configv1.Rule, text string) *configv1.Rule {
	r.When = text
	return r
}

func versions(r *configv1.Rule, list string) *configv1.Rule {
	r.Versions = words(list)
	return r
}

// decision is what the rules say of a request, past the caller's identity: as
// Policy asks them, and as it explains.
func decision(t testing.TB, p *Policy, id string, m *dialect.Method, model, version string, params parameters) interceptors.Reason {
	t.Helper()
	call := callOf(id, m)
	g := p.rules.grant(call.Peer.ID, m)
	e := environment{Call: call, Via: viaMTLS, Peer: call.Peer.ID}
	said := interceptors.Reason("")
	if !g.call(&e) {
		said = interceptors.MethodDenied
	}
	e.Inference, e.Parameters = &interceptors.Inference{Call: call, Model: model, Version: version}, params
	allowed := g.allows(model, version, &e)
	switch {
	case said != "" && allowed:
		t.Errorf("%s may not be called, but %q of %q is allowed", m.Name, version, model)
	case said == "" && !allowed:
		said = interceptors.ModelDenied
	}
	x := p.Explain(Question{Principal: call.Peer.ID, Method: m, Model: model, Version: version, Parameters: params})
	if x.Reason != said || x.Allowed != (said == "") {
		t.Errorf("the decision is %q, its explanation %+v", said, x)
	}
	if x.Allowed && (x.Rule < 0 || p.rules.list[x.Rule].deny || !x.Rules[x.Rule].Matches) {
		t.Errorf("allowed by rule %d of %+v", x.Rule, x.Rules)
	}
	return said
}

var (
	loads = &dialect.Method{Name: service + "RepositoryModelLoad", Kind: dialect.Management, NamesModel: true}
	stats = &dialect.Method{Name: service + "ModelStatistics", Kind: dialect.Management, NamesModel: true}
	index = &dialect.Method{Name: service + "RepositoryIndex", Kind: dialect.Management, ListsModels: true}
	shm   = &dialect.Method{Name: service + "SystemSharedMemoryStatus", Kind: dialect.Management}
)

func TestVersionsAndManagement(t *testing.T) {
	const (
		ok       = interceptors.Reason("")
		noMethod = interceptors.MethodDenied
		noModel  = interceptors.ModelDenied
		id       = "spiffe://a/x"
	)
	all := allow(id, "inference metadata health", "*")
	for _, c := range []struct {
		name           string
		rules          []*configv1.Rule
		method         *dialect.Method
		model, version string
		want           interceptors.Reason
	}{
		{"the version", []*configv1.Rule{versions(allow(id, "inference", "m"), "1 2")}, infer, "m", "2", ok},
		{"another version", []*configv1.Rule{versions(allow(id, "inference", "m"), "1 2")}, infer, "m", "3", noModel},
		{"the version as another server reads it", []*configv1.Rule{versions(allow(id, "inference", "m"), "1")}, infer, "m", "01", noModel},
		{"no version", []*configv1.Rule{versions(allow(id, "inference", "m"), "1")}, infer, "m", "", noModel},
		{"no version, every version", []*configv1.Rule{allow(id, "inference", "m")}, infer, "m", "", ok},
		{"the version of another model", []*configv1.Rule{versions(allow(id, "inference", "m"), "1"), versions(allow(id, "inference", "n"), "2")},
			infer, "m", "2", noModel},
		{"a version of every model", []*configv1.Rule{versions(allow(id, "inference", "*"), "1")}, infer, "any", "1", ok},
		{"a version of no model", []*configv1.Rule{versions(allow(id, "inference", "*"), "1")}, infer, "", "1", ok},
		{"denied version", []*configv1.Rule{all, versions(deny(id, "inference", "m"), "1")}, infer, "m", "1", noModel},
		{"not the denied version", []*configv1.Rule{all, versions(deny(id, "inference", "m"), "1")}, infer, "m", "2", ok},
		{"not the denied model", []*configv1.Rule{all, versions(deny(id, "inference", "m"), "1")}, infer, "n", "1", ok},
		{"maybe the denied version", []*configv1.Rule{all, versions(deny(id, "inference", "m"), "1")}, infer, "m", "", noModel},
		{"the denied version, zeros", []*configv1.Rule{all, versions(deny(id, "inference", "m"), "1")}, infer, "m", "001", noModel},
		{"the denied version, space and letters", []*configv1.Rule{all, versions(deny(id, "inference", "m"), "1")}, infer, "m", "\t +1x", noModel},
		{"denied zeros", []*configv1.Rule{all, versions(deny(id, "inference", "m"), "01")}, infer, "m", "1", noModel},
		{"a longer number", []*configv1.Rule{all, versions(deny(id, "inference", "m"), "1")}, infer, "m", "11", ok},
		{"denied name of a version", []*configv1.Rule{all, versions(deny(id, "inference", "m"), "v1")}, infer, "m", "v2", ok},
		{"a denied version of every model leaves the method", []*configv1.Rule{all, versions(deny(id, "inference", ""), "1")}, infer, "m", "2", ok},
		{"a denied version of every model", []*configv1.Rule{all, versions(deny(id, "inference", ""), "1")}, infer, "m", "1", noModel},
		{"versions do not matter without a model", []*configv1.Rule{versions(allow(id, "health", "m"), "1")}, live, "", "", ok},

		{"a name with a NUL, which C ends at", []*configv1.Rule{all, deny(id, "inference", "m")}, infer, "m\x00n", "", noModel},

		{"load, by its group", []*configv1.Rule{all}, loads, "m", "", noMethod},
		{"load the model", []*configv1.Rule{allow(id, loads.Name, "m")}, loads, "m", "", ok},
		{"load another model", []*configv1.Rule{allow(id, loads.Name, "m")}, loads, "n", "", noModel},
		{"load without a model", []*configv1.Rule{allow(id, loads.Name, "m")}, loads, "", "", noModel},
		{"load, no models are named", []*configv1.Rule{allow(id, loads.Name, "")}, loads, "m", "", noModel},
		{"loading concerns each version", []*configv1.Rule{allow(id, loads.Name, "m"), versions(deny(id, loads.Name, "m"), "1")}, loads, "m", "", noModel},
		{"statistics of all models", []*configv1.Rule{allow(id, stats.Name, "m n")}, stats, "", "", noModel},
		{"statistics of all models, all are granted", []*configv1.Rule{allow(id, stats.Name, "*")}, stats, "", "", ok},
		{"statistics of all models, one is denied", []*configv1.Rule{allow(id, stats.Name, "*"), deny(id, stats.Name, "n")}, stats, "", "", noModel},
		{"the index names no model", []*configv1.Rule{allow(id, index.Name, "")}, index, "", "", ok},
		{"shared memory, by name", []*configv1.Rule{allow(id, shm.Name, "")}, shm, "", "", ok},
		{"shared memory, not by name", []*configv1.Rule{all, allow(id, index.Name, "")}, shm, "", "", noMethod},
	} {
		t.Run(c.name, func(t *testing.T) {
			if got := decision(t, newPolicy(t, secure(c.rules...)), id, c.method, c.model, c.version, parameters{}); got != c.want {
				t.Errorf("got %q, want %q", got, c.want)
			}
		})
	}
}

func TestTenants(t *testing.T) {
	c := open(allow("anonymous", "health", ""))
	c.Tenant = "{1}"
	c.Tenants = []*configv1.TenantRule{
		{Principals: words("spiffe://a/x/one spiffe://b/**"), Tenant: "first"},
		{Principals: words("spiffe://a/x/* anonymous"), Tenant: "second"},
	}
	p := newPolicy(t, c)
	for id, want := range map[string]string{
		"spiffe://a/x/one": "first", "spiffe://b/any": "first", "spiffe://a/x/two": "second", "spiffe://a/y/z": "y", "": "second",
	} {
		var who spiffeid.ID
		if id != "" {
			who = spiffeid.RequireFromString(id)
		}
		if got := p.Tenant(who); got != want {
			t.Errorf("%q is of tenant %q, want %q", id, got, want)
		}
	}
	for want, bad := range map[string]*configv1.TenantRule{
		"identity.tenants[0].principals[0]: ":       {Principals: words("x"), Tenant: "t"},
		"identity.tenants[0].principals: name":      {Tenant: "t"},
		"identity.tenants[0].tenant: it is empty":   {Principals: words("spiffe://a/x")},
		"identity.tenants[0].principals[0]: every ": {Principals: words("anonymous"), Tenant: "t"},
	} {
		c := secure()
		c.Tenants = []*configv1.TenantRule{bad}
		if _, err := New(c); err == nil || !strings.HasPrefix(err.Error(), want) {
			t.Errorf("got %v, want %q", err, want)
		}
	}
}

// reference decides from the words of the rules, naively: some allow rule covers
// the request, and no deny rule touches it.
func reference(list []*configv1.Rule, id string, m *dialect.Method, model, version string, tokens int64) bool {
	kind := map[dialect.Kind]string{dialect.Inference: "inference", dialect.Metadata: "metadata", dialect.Health: "health"}[m.Kind]
	about := m.NamesModel || m.Kind == dialect.Inference
	hit := func(r *configv1.Rule) bool {
		who := slices.ContainsFunc(r.Principals, func(p string) bool {
			prefix, tail := strings.CutSuffix(p, "/**")
			return p == id || tail && strings.HasPrefix(id, prefix+"/")
		})
		what := slices.Contains(r.Methods, m.Name) || kind != "" && slices.Contains(r.Methods, kind)
		holds := r.When == "" || map[string]bool{"few": tokens >= 0 && tokens <= 5, "many": tokens > 5, "broken": r.Deny}[r.Name]
		if r.Deny && tokens < 0 && r.When != "" {
			holds = true // it asks for what is not there
		}
		every := slices.Contains(r.Models, "*") || r.Deny && len(r.Models) == 0
		which := every || model != "" && slices.Contains(r.Models, model) || model == "" && r.Deny
		version := len(r.Versions) == 0 || slices.Contains(r.Versions, version) || version == "" && r.Deny
		if !about {
			which, version = !r.Deny || every, true
		}
		return who && what && holds && which && version
	}
	allowed := false
	for _, r := range list {
		if r.Deny && hit(r) {
			return false
		}
		allowed = allowed || !r.Deny && hit(r)
	}
	return allowed
}

// Only what the rules list is allowed, whatever the rules are.
func TestDefaultDenyWithConditions(t *testing.T) {
	conditions := map[string]string{
		"few": `parameters["max_tokens"] <= 5`, "many": `parameters["max_tokens"] > 5`, "broken": `metadata["absent"][0] == ""`,
	}
	methods := []*dialect.Method{infer, stream, {Name: meta.Name, Kind: meta.Kind, NamesModel: true}, live, loads, stats, index, shm}
	r := rand.New(rand.NewPCG(5, 6))
	some := func(most int, of ...string) (out []string) {
		for range r.IntN(most + 1) {
			out = append(out, of[r.IntN(len(of))])
		}
		return out
	}
	one := func(of ...string) string { return of[r.IntN(len(of))] }
	allowed, refused := 0, 0
	for range 3000 {
		var list []*configv1.Rule
		for range 1 + r.IntN(5) {
			rule := &configv1.Rule{
				Principals: append(some(1, "spiffe://a/x", "spiffe://b/**"), one("spiffe://a/x", "spiffe://a/**", "spiffe://a/x/y", "spiffe://b/x")),
				Methods:    append(some(2, loads.Name, stats.Name, index.Name), one("inference", "health", "metadata", infer.Name, loads.Name, index.Name)),
				Models:     some(2, "m", "n", "*"),
				Versions:   some(1, "1", "2"),
				Deny:       r.IntN(4) == 0,
			}
			if !rule.Deny && len(rule.Models) == 0 {
				rule.Models = []string{one("m", "*")}
			}
			if r.IntN(3) == 0 {
				rule.Name = one("few", "many", "broken")
				rule.When = conditions[rule.Name]
			}
			list = append(list, rule)
		}
		p := newPolicy(t, secure(list...))
		for range 10 {
			id, m := one("spiffe://a/x", "spiffe://a/x/y", "spiffe://a/z", "spiffe://b/x", "spiffe://c/x"), methods[r.IntN(len(methods))]
			model, version, tokens := "", "", int64(-1)
			if m.NamesModel || m.Kind == dialect.Inference {
				model, version = one("m", "n", "o", ""), one("1", "2", "3", "")
			}
			params := parameters{}
			if r.IntN(3) > 0 {
				tokens = int64(r.IntN(10))
				params["max_tokens"] = tokens
			}
			want := reference(list, id, m, model, version, tokens)
			if got := decision(t, p, id, m, model, version, params); (got == "") != want {
				t.Fatalf("%s %s %q %q %d: got %q, want allowed %t by\n%v", id, m.Name, model, version, tokens, got, want, list)
			}
			if want {
				allowed++
			} else {
				refused++
			}
		}
	}
	if allowed < 1000 || refused < 1000 {
		t.Errorf("%d allowed, %d refused: the test says little", allowed, refused)
	}
}

func TestVersionErrorsNameTheField(t *testing.T) {
	for bad, want := range map[string]string{"": "identity.rules[0].versions[1]: ", "1*": "identity.rules[0].versions[1]: "} {
		rule := allow("spiffe://a/x", "inference", "m")
		rule.Versions = []string{"1", bad}
		if _, err := New(secure(rule)); err == nil || !strings.HasPrefix(err.Error(), want) {
			t.Errorf("%q: %v", bad, err)
		}
	}
}

// One decision about a model among many rules that concern the caller.
func BenchmarkManyModels(b *testing.B) {
	b.ReportAllocs()
	var list []*configv1.Rule
	for n := range 500 {
		list = append(list, allow("spiffe://a/**", "inference", fmt.Sprint("m", n)))
	}
	p := newPolicy(b, secure(list...))
	call := callOf("spiffe://a/x", infer)
	i := &interceptors.Inference{Call: call, Model: "m400"}
	for b.Loop() {
		pass(b, p, call, i)
	}
}
