package identity

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/sluicegate/sluice/interceptors"
	"github.com/sluicegate/sluice/interceptors/dialect"
	configv1 "github.com/sluicegate/sluice/proto/gen/sluice/config/v1"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/types/known/durationpb"
)

const service = "/inference.GRPCInferenceService/"

var (
	infer  = &dialect.Method{Name: service + "ModelInfer", Kind: dialect.Inference}
	stream = &dialect.Method{Name: service + "ModelStreamInfer", Kind: dialect.Inference, Multiplexed: true}
	meta   = &dialect.Method{Name: service + "ModelMetadata", Kind: dialect.Metadata}
	ready  = &dialect.Method{Name: service + "ModelReady", Kind: dialect.Health}
	live   = &dialect.Method{Name: service + "ServerLive", Kind: dialect.Health}
	load   = &dialect.Method{Name: service + "RepositoryModelLoad", Kind: dialect.Management}
	known  = []*dialect.Method{infer, stream, meta, ready, live, load}
)

func secure(rules ...*configv1.Rule) *configv1.Identity {
	return &configv1.Identity{Source: &configv1.Identity_Development{}, Rules: rules}
}

func open(rules ...*configv1.Rule) *configv1.Identity {
	return &configv1.Identity{Source: &configv1.Identity_Insecure{Insecure: &configv1.Insecure{}}, Rules: rules}
}

func words(s string) []string { return strings.Fields(s) }

func allow(principals, methods, models string) *configv1.Rule {
	return &configv1.Rule{Principals: words(principals), Methods: words(methods), Models: words(models)}
}

func deny(principals, methods, models string) *configv1.Rule {
	r := allow(principals, methods, models)
	r.Deny = true
	return r
}

func newPolicy(t testing.TB, c *configv1.Identity) *Policy {
	t.Helper()
	p, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func callOf(id string, m *dialect.Method) *interceptors.Call {
	c := &interceptors.Call{Method: m}
	if id != "" {
		c.Peer.ID = spiffeid.RequireFromString(id)
		c.Peer.Expires = time.Now().Add(time.Hour)
	}
	if m != nil {
		c.FullMethod = m.Name
	}
	return c
}

// ask runs a call with one inference past the policy. The answer is the reason
// of the denial, or "".
func ask(t testing.TB, p *Policy, c *interceptors.Call, model string) interceptors.Reason {
	t.Helper()
	gate := reason(t, p.Allow(c))
	part, err := p.Begin(c)
	begin := reason(t, err)
	if gate != begin {
		t.Errorf("Allow says %q and Begin %q", gate, begin)
	}
	if part == nil {
		return begin
	}
	defer part.End(interceptors.Outcome{})
	i := &interceptors.Inference{Call: c, Model: model}
	if part, err := part.Start(i); part != nil || err != nil {
		t.Error("the policy has no interest in messages")
	}
	return reason(t, authorize(part, i))
}

func authorize(part interceptors.CallPolicy, i *interceptors.Inference) error {
	return part.(interceptors.Authorizer).Authorize(i, nil)
}

func reason(t testing.TB, err error) interceptors.Reason {
	t.Helper()
	if err == nil {
		return ""
	}
	var d *interceptors.Denial
	if !errors.As(err, &d) {
		t.Fatalf("%v is no denial", err)
	}
	if d.Policy != "identity" || d.Message == "" {
		t.Errorf("denial %+v", d)
	}
	return d.Reason
}

func TestRules(t *testing.T) {
	const (
		ok       = interceptors.Reason("")
		missing  = interceptors.IdentityMissing
		noMethod = interceptors.MethodDenied
		noModel  = interceptors.ModelDenied

		alice = "spiffe://sluice.test/alice"
		bob   = "spiffe://sluice.test/bob"
		all   = "spiffe://sluice.test/**"
	)
	for _, c := range []struct {
		name   string
		config *configv1.Identity
		id     string
		method *dialect.Method
		model  string
		want   interceptors.Reason
	}{
		{"no rules", secure(), alice, infer, "m", noMethod},
		{"listed", secure(allow(alice, "inference", "m")), alice, infer, "m", ok},
		{"listed, streamed", secure(allow(alice, "inference", "m")), alice, stream, "m", ok},
		{"another principal", secure(allow(alice, "inference", "m")), bob, infer, "m", noMethod},
		{"another model", secure(allow(alice, "inference", "m")), alice, infer, "n", noModel},
		{"a model in another case", secure(allow(alice, "inference", "m")), alice, infer, "M", noModel},
		{"a model with a space", secure(allow(alice, "inference", "m")), alice, infer, "m ", noModel},
		{"a model called *", secure(allow(alice, "inference", "m")), alice, infer, "*", noModel},
		{"any model", secure(allow(alice, "inference", "*")), alice, infer, "n", ok},
		{"the exact method", secure(allow(alice, infer.Name, "m")), alice, infer, "m", ok},
		{"not its neighbour", secure(allow(alice, infer.Name, "m")), alice, stream, "m", noMethod},
		{"a group is not another", secure(allow(alice, "inference", "*")), alice, meta, "m", noMethod},
		{"health", secure(allow(alice, "health", "")), alice, live, "", ok},
		{"health of a model needs a model", secure(allow(alice, "health", "")), alice, ready, "m", noModel},
		{"health of a model", secure(allow(alice, "health", "m")), alice, ready, "m", ok},
		{"health without a model, with models", secure(allow(alice, "health", "m")), alice, live, "", ok},
		{"metadata of a model", secure(allow(alice, "metadata", "m")), alice, meta, "m", ok},
		{"metadata of another model", secure(allow(alice, "metadata", "m")), alice, meta, "n", noModel},
		{"management by no group", secure(allow(alice, "inference metadata health", "*")), alice, load, "m", noMethod},
		{"management by name", secure(allow(alice, load.Name, "m")), alice, load, "m", ok},
		{"management by name, another model", secure(allow(alice, load.Name, "m")), alice, load, "n", noModel},
		{"an inference without a model", secure(allow(alice, "inference", "m")), alice, infer, "", noModel},
		{"an inference without a model, by exact method", secure(allow(alice, infer.Name, "")), alice, infer, "", noModel},
		{"an inference without a model, any model", secure(allow(alice, "inference", "*")), alice, infer, "", ok},
		{"an inference without a model, one is denied", secure(allow(alice, "inference", "*"), deny(alice, "inference", "n")),
			alice, infer, "", noModel},

		{"two rules add up", secure(allow(alice, "inference", "m"), allow(all, "inference", "n")), alice, infer, "n", ok},
		{"models of two methods do not mix", secure(allow(alice, "inference", "m"), allow(alice, "metadata", "n")), alice, infer, "n", noModel},
		{"deny wins, before", secure(deny(alice, "inference", ""), allow(all, "inference", "*")), alice, infer, "m", noMethod},
		{"deny wins, after", secure(allow(all, "inference", "*"), deny(alice, "inference", "")), alice, infer, "m", noMethod},
		{"deny is of its principal", secure(allow(all, "inference", "*"), deny(alice, "inference", "")), bob, infer, "m", ok},
		{"deny every model", secure(allow(all, "inference", "*"), deny(alice, "inference", "*")), alice, infer, "m", noMethod},
		{"deny a model, before", secure(deny(alice, "inference", "m"), allow(all, "inference", "*")), alice, infer, "m", noModel},
		{"deny a model, after", secure(allow(all, "inference", "m n"), deny(alice, "inference", "m")), alice, infer, "m", noModel},
		{"deny a model, not another", secure(allow(all, "inference", "*"), deny(alice, "inference", "m")), alice, infer, "n", ok},
		{"deny a method, not another", secure(allow(all, "inference", "*"), deny(alice, stream.Name, "")), alice, infer, "m", ok},
		{"deny a model of health, no model", secure(allow(all, "health", "*"), deny(alice, "health", "m")), alice, live, "", ok},
		{"deny alone allows nothing", secure(deny(alice, "inference", "m")), alice, infer, "n", noMethod},

		{"no identity", secure(allow(all, "inference", "*")), "", infer, "m", missing},
		{"no identity, unknown method", secure(allow(all, "inference", "*")), "", nil, "", missing},
		{"unknown method is the chain's", secure(), alice, nil, "", ok},

		{"anonymous", open(allow("anonymous", "inference", "m")), "", infer, "m", ok},
		{"anonymous, another model", open(allow("anonymous", "inference", "m")), "", infer, "n", noModel},
		{"anonymous, another method", open(allow("anonymous", "inference", "m")), "", live, "", missing},
		{"anonymous, denied", open(allow("anonymous", "inference", "m"), deny("anonymous", infer.Name, "")), "", infer, "m", noMethod},
		{"anonymous is nobody", open(allow(all, "inference", "*")), "", infer, "m", missing},
		{"anonymous, unknown method", open(allow("anonymous", "inference", "m")), "", nil, "", ok},
		{"an identity is not anonymous", open(allow("anonymous", "inference", "m")), alice, infer, "m", noMethod},
	} {
		t.Run(c.name, func(t *testing.T) {
			p := newPolicy(t, c.config)
			for _, cached := range []bool{false, true} {
				if got := ask(t, p, callOf(c.id, c.method), c.model); got != c.want {
					t.Errorf("cached %v: got %q, want %q", cached, got, c.want)
				}
			}
		})
	}
}

func TestErrorsNameTheField(t *testing.T) {
	const id = "spiffe://a/b"
	fine := allow(id, "inference", "m")
	for _, c := range []struct {
		name   string
		config *configv1.Identity
		want   []string
	}{
		{"no principals", secure(allow("", "inference", "m")), words("identity.rules[0].principals: at least")},
		{"bad principal", secure(fine, allow(id+" alice", "inference", "m")), words("identity.rules[1].principals[1]: spiffe://")},
		{"anonymous with identities", secure(allow("anonymous", "inference", "m")), words("identity.rules[0].principals[0]: identity.insecure")},
		{"no methods", secure(allow(id, "", "m")), words("identity.rules[0].methods: at least")},
		{"unknown group", secure(fine, fine, allow(id, "infer", "m")), words("identity.rules[2].methods[0]: inference, health")},
		{"management", secure(allow(id, "inference management", "m")), words("identity.rules[0].methods[1]: full")},
		{"wildcard method", secure(allow(id, "/inference.GRPCInferenceService/*", "m")), words("identity.rules[0].methods[0]: wildcards")},
		{"method without method", secure(allow(id, "/a.B", "m")), words("identity.rules[0].methods[0]: /package.Service/Method")},
		{"method with a double slash", secure(allow(id, "//a.B/C", "m")), words("identity.rules[0].methods[0]: /package.Service/Method")},
		{"inference without models", secure(allow(id, "inference", "")), words("identity.rules[0].models: every")},
		{"model pattern", secure(allow(id, "inference", "m llama-*")), words("identity.rules[0].models[1]: exactly")},
		{"empty model", secure(&configv1.Rule{Principals: words(id), Methods: words("inference"), Models: []string{""}}),
			words("identity.rules[0].models[0]: empty")},
		{"tenant", &configv1.Identity{Tenant: "{x}"}, words("identity.tenant: {trust_domain}")},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, err := New(c.config)
			if err == nil {
				t.Fatal("no error")
			}
			for _, want := range c.want {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("%q lacks %q", err, want)
				}
			}
		})
	}
}

// What no rule lists is refused, whatever the rules are: an oracle written from
// the rules' words agrees with the policy for every principal, method and model.
func TestDefaultDeny(t *testing.T) {
	r := rand.New(rand.NewPCG(3, 4))
	pick := func(of ...string) string { return of[r.IntN(len(of))] }
	some := func(n int, of ...string) (out []string) {
		for range n {
			out = append(out, pick(of...))
		}
		return out
	}
	kinds := map[dialect.Kind]string{dialect.Inference: "inference", dialect.Metadata: "metadata", dialect.Health: "health"}
	matches := func(rule *configv1.Rule, id string, m *dialect.Method) bool {
		principal, method := false, false
		for _, p := range rule.Principals {
			principal = principal || p == id || p == "spiffe://a/**" && strings.HasPrefix(id, "spiffe://a/") ||
				p == "spiffe://a/*" && strings.HasPrefix(id, "spiffe://a/") && strings.Count(id, "/") == 3
		}
		for _, name := range rule.Methods {
			method = method || name == m.Name || name == kinds[m.Kind] && name != ""
		}
		return principal && method
	}
	names := func(rule *configv1.Rule, model string) bool {
		for _, m := range rule.Models {
			if m == model || m == "*" {
				return true
			}
		}
		return false
	}
	allowed, refused := 0, 0
	for range 2000 {
		var rules []*configv1.Rule
		for range r.IntN(5) {
			rules = append(rules, &configv1.Rule{
				Principals: some(1+r.IntN(2), "spiffe://a/x", "spiffe://a/x/y", "spiffe://b/x", "spiffe://a/*", "spiffe://a/**"),
				Methods:    some(1+r.IntN(2), infer.Name, load.Name, live.Name, "inference", "metadata", "health"),
				Models:     some(1+r.IntN(2), "m", "n", "*"),
				Deny:       r.IntN(4) == 0,
			})
		}
		p := newPolicy(t, secure(rules...))
		for range 20 {
			id := pick("spiffe://a/x", "spiffe://a/x/y", "spiffe://b/x", "spiffe://b/z", "spiffe://a/x/y/z", "spiffe://c/x")
			m, model := known[r.IntN(len(known))], pick("m", "n", "o")
			want := false
			for _, rule := range rules {
				if matches(rule, id, m) && names(rule, model) {
					want = true
				}
			}
			for _, rule := range rules {
				if rule.Deny && matches(rule, id, m) && names(rule, model) {
					want = false
				}
			}
			// An allow rule must be among those that matched.
			granted := false
			for _, rule := range rules {
				granted = granted || !rule.Deny && matches(rule, id, m) && names(rule, model)
			}
			want = want && granted
			got := ask(t, p, callOf(id, m), model)
			if (got == "") != want {
				t.Fatalf("%s %s %s: %q, want allowed %v by %v", id, m.Name, model, got, want, rules)
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

func TestPrincipalAndTenant(t *testing.T) {
	c := secure(allow("spiffe://a/team/x", "inference", "m"))
	c.Tenant = "{1}"
	p := newPolicy(t, c)
	for _, m := range []*dialect.Method{infer, load, nil} { // allowed, refused, unknown
		call := callOf("spiffe://a/team/x", m)
		_, _ = p.Begin(call)
		if call.Principal != "spiffe://a/team/x" || call.Tenant != "team" {
			t.Errorf("principal %q, tenant %q", call.Principal, call.Tenant)
		}
	}
	call := callOf("", infer)
	if _, err := p.Begin(call); err == nil || call.Principal != "" || call.Tenant != "" {
		t.Errorf("%v: a missing identity is principal %q, tenant %q", err, call.Principal, call.Tenant)
	}
	call = callOf("", infer)
	if _, err := newPolicy(t, open(allow("anonymous", "inference", "m"))).Begin(call); err != nil ||
		call.Principal != "anonymous" || call.Tenant != "anonymous" {
		t.Errorf("%v: anonymous is principal %q, tenant %q", err, call.Principal, call.Tenant)
	}
	call = callOf("spiffe://a/team/x", infer)
	if err := p.Allow(call); err != nil || call.Principal != "" {
		t.Errorf("%v: Allow changed the call", err)
	}
}

func TestClientCallsAreTheCredentialsBusiness(t *testing.T) {
	p := newPolicy(t, secure())
	call := callOf("", infer)
	call.Client = true
	if part, err := p.Begin(call); part != nil || err != nil {
		t.Errorf("Begin: %v, %v", part, err)
	}
	if err := p.Allow(call); err != nil {
		t.Errorf("Allow: %v", err)
	}
}

// "No such model" and "not yours" cannot be told apart.
func TestModelDenialsAreEqual(t *testing.T) {
	p := newPolicy(t, secure(allow("spiffe://a/x", "inference", "m")))
	call := callOf("spiffe://a/x", infer)
	part, err := p.Begin(call)
	if err != nil {
		t.Fatal(err)
	}
	err = authorize(part, &interceptors.Inference{Call: call, Model: "n"})
	notYours := err.(*interceptors.Denial).GRPCStatus().Proto().String()
	noSuch := interceptors.NoModel("chain", "n").GRPCStatus().Proto().String()
	if notYours != noSuch {
		t.Errorf("%s and %s differ", notYours, noSuch)
	}
}

// A connection outlives the certificate that it was made with. New calls on it
// are refused at once, calls in flight and what begins in them after the grace.
func TestExpiredDuringTheConnection(t *testing.T) {
	for _, grace := range []time.Duration{-1, 0, time.Minute} {
		synctest.Test(t, func(t *testing.T) {
			c := secure(allow("spiffe://a/x", "inference", "m"))
			if grace >= 0 {
				c.ExpiryGrace = durationpb.New(grace)
			}
			p := newPolicy(t, c)
			call := callOf("spiffe://a/x", stream)
			part, err := p.Begin(call)
			if err != nil {
				t.Fatal(err)
			}
			time.Sleep(time.Hour)
			later := &interceptors.Call{CallInfo: call.CallInfo, Method: infer}
			if got := ask(t, p, later, "m"); got != interceptors.IdentityExpired {
				t.Errorf("a call on an old connection: %q", got)
			}
			if later.Principal != "" {
				t.Errorf("an expired identity is principal %q", later.Principal)
			}
			if grace < 0 {
				grace = defaultGrace
			}
			time.Sleep(grace - time.Nanosecond)
			if grace > 0 {
				if err := authorize(part, &interceptors.Inference{Call: call, Model: "m"}); err != nil {
					t.Error(err)
				}
			}
			time.Sleep(time.Nanosecond)
			err = authorize(part, &interceptors.Inference{Call: call, Model: "m"})
			if got := reason(t, err); got != interceptors.IdentityExpired {
				t.Errorf("an inference on an old stream: %q", got)
			}
		})
	}
}

func TestDecisionsKeptAreBounded(t *testing.T) {
	p := newPolicy(t, secure(allow("spiffe://a/**", "inference", "m")))
	for n := range maxGrants + 100 {
		if got := ask(t, p, callOf(fmt.Sprintf("spiffe://a/%d", n), infer), "m"); got != "" {
			t.Fatal(got)
		}
	}
	if got := len(p.rules.grants); got != maxGrants {
		t.Errorf("%d decisions are kept, not %d", got, maxGrants)
	}
}

func TestAllowPathDoesNotAllocate(t *testing.T) {
	p := newPolicy(t, secure(allow("spiffe://a/**", "inference", "m")))
	call := callOf("spiffe://a/x", infer)
	inference := &interceptors.Inference{Call: call, Model: "m"}
	if n := testing.AllocsPerRun(100, func() { pass(t, p, call, inference) }); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

func pass(t testing.TB, p *Policy, call *interceptors.Call, inference *interceptors.Inference) {
	if err := p.Allow(call); err != nil {
		t.Fatal(err)
	}
	part, err := p.Begin(call)
	if err != nil {
		t.Fatal(err)
	}
	if err := authorize(part, inference); err != nil {
		t.Fatal(err)
	}
	part.End(interceptors.Outcome{})
}

func manyRules() *configv1.Identity {
	var rules []*configv1.Rule
	for n := range 500 {
		rules = append(rules, allow(fmt.Sprintf("spiffe://a/ns/%d/**", n), "inference health", fmt.Sprintf("m%d shared", n)))
	}
	return secure(rules...)
}

// One call with one inference under 500 rules: the gate, the call, the model.
func BenchmarkPolicy(b *testing.B) {
	b.ReportAllocs()
	p := newPolicy(b, manyRules())
	call := callOf("spiffe://a/ns/400/sa/x", infer)
	inference := &interceptors.Inference{Call: call, Model: "m400"}
	for b.Loop() {
		pass(b, p, call, inference)
	}
}

// The same from every core at once.
func BenchmarkPolicyParallel(b *testing.B) {
	b.ReportAllocs()
	p := newPolicy(b, manyRules())
	b.RunParallel(func(pb *testing.PB) {
		call := callOf("spiffe://a/ns/400/sa/x", infer)
		inference := &interceptors.Inference{Call: call, Model: "m400"}
		for pb.Next() {
			pass(b, p, call, inference)
		}
	})
}

// The gate alone, which runs before a stream is made.
func BenchmarkAllow(b *testing.B) {
	b.ReportAllocs()
	p := newPolicy(b, manyRules())
	call := callOf("spiffe://a/ns/400/sa/x", infer)
	for b.Loop() {
		if err := p.Allow(call); err != nil {
			b.Fatal(err)
		}
	}
}

// A principal that is seen for the first time.
func BenchmarkDecide(b *testing.B) {
	b.ReportAllocs()
	p := newPolicy(b, manyRules())
	id := spiffeid.RequireFromString("spiffe://a/ns/400/sa/x")
	for b.Loop() {
		p.rules.newGrant(id, infer)
	}
}
