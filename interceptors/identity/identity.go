// Package identity decides who may do what.
//
// A caller is known by the X.509-SVID that it proved in the TLS handshake
// ([ServerCredentials]) and by nothing else. The [Policy] asks the rules for
// every call and every inference: no rule, no access.
//
// Who we are ourselves comes from a [Source]: PEM files, or an [Authority]
// inside the process.
package identity

import (
	"fmt"
	"regexp"
	"strings"
	"sync"
	"time"

	"github.com/sluicegate/sluice/interceptors"
	"github.com/sluicegate/sluice/interceptors/dialect"
	configv1 "github.com/sluicegate/sluice/proto/gen/sluice/config/v1"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

const (
	policyName = "identity"
	// anonymous is the principal, and the tenant, of a caller without identity.
	anonymous = "anonymous"
	// maxGrants bounds the decisions that are kept. Chosen: some hundred
	// principals with some ten methods each, in about 1 MiB. Beyond it a decision is
	// computed again, which costs a walk over the rules.
	maxGrants = 4096
)

// Policy is the rules of a configuration. It is immutable, apart from a cache
// of its decisions, and safe for concurrent use; it never waits.
type Policy struct {
	rules    []rule
	tenants  template
	insecure bool

	mu     sync.RWMutex
	grants map[grantKey]*grant
}

var (
	_ interceptors.Policy = (*Policy)(nil)
	_ interceptors.Gate   = (*Policy)(nil)
)

// rule is a configured rule, ready to be matched.
type rule struct {
	patterns  []pattern
	anonymous bool
	methods   map[string]bool
	kinds     map[dialect.Kind]bool
	models    map[string]bool
	anyModel  bool
	deny      bool
}

// groups are the methods that can be named together. There is none for
// management.
var groups = map[string]dialect.Kind{
	"inference": dialect.Inference,
	"metadata":  dialect.Metadata,
	"health":    dialect.Health,
}

var fullMethod = regexp.MustCompile(`^/[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z_][A-Za-z0-9_]*)*/[A-Za-z_][A-Za-z0-9_]*$`)

// New compiles the rules. An error names the field and says how to mend it.
// Rules that cannot do what they seem to say are errors too.
func New(c *configv1.Identity) (*Policy, error) {
	p := &Policy{insecure: c.GetInsecure() != nil, grants: make(map[grantKey]*grant)}
	var err error
	if p.tenants, err = parseTemplate(c.GetTenant()); err != nil {
		return nil, fmt.Errorf("identity.tenant: %w", err)
	}
	if d := c.GetDevelopment(); d != nil {
		if _, _, err := checkDevelopment(d); err != nil {
			return nil, err
		}
	}
	for n, r := range c.GetRules() {
		compiled, err := p.compile(r)
		if err != nil {
			return nil, fmt.Errorf("identity.rules[%d].%w", n, err)
		}
		p.rules = append(p.rules, compiled)
	}
	return p, nil
}

func (p *Policy) compile(c *configv1.Rule) (rule, error) {
	r := rule{
		methods: make(map[string]bool),
		kinds:   make(map[dialect.Kind]bool),
		models:  make(map[string]bool),
		deny:    c.GetDeny(),
	}
	if len(c.GetPrincipals()) == 0 {
		return r, fmt.Errorf("principals: name at least one")
	}
	for n, text := range c.GetPrincipals() {
		if text == anonymous {
			if !p.insecure {
				return r, fmt.Errorf("principals[%d]: every caller has an identity here; %q goes with identity.insecure only", n, anonymous)
			}
			r.anonymous = true
			continue
		}
		pattern, err := parsePattern(text)
		if err != nil {
			return r, fmt.Errorf("principals[%d]: %w", n, err)
		}
		r.patterns = append(r.patterns, pattern)
	}
	if len(c.GetMethods()) == 0 {
		return r, fmt.Errorf("methods: name at least one")
	}
	for n, text := range c.GetMethods() {
		kind, group := groups[text]
		switch {
		case group:
			r.kinds[kind] = true
		case fullMethod.MatchString(text):
			r.methods[text] = true
		case strings.HasPrefix(text, "/"):
			return r, fmt.Errorf(`methods[%d]: %q is no full method; it looks like "/package.Service/Method", without wildcards`, n, text)
		default:
			return r, fmt.Errorf("methods[%d]: %q is no group of methods; there are inference, metadata and health, "+
				"and management methods must be named in full", n, text)
		}
	}
	for n, text := range c.GetModels() {
		switch {
		case text == "*":
			r.anyModel = true
		case text == "":
			return r, fmt.Errorf(`models[%d]: it is empty; name a model, or "*" for every model`, n)
		case strings.Contains(text, "*"):
			return r, fmt.Errorf(`models[%d]: %q is no pattern, because models are named exactly; "*" alone stands for every model`, n, text)
		default:
			r.models[text] = true
		}
	}
	if len(c.GetModels()) == 0 && r.kinds[dialect.Inference] && !r.deny {
		return r, fmt.Errorf(`models: an inference needs a model; name models, or "*" for every model`)
	}
	return r, nil
}

func (r *rule) matches(id spiffeid.ID, m *dialect.Method) bool {
	if !r.kinds[m.Kind] && !r.methods[m.Name] {
		return false
	}
	if id.IsZero() {
		return r.anonymous
	}
	for n := range r.patterns {
		if r.patterns[n].match(id) {
			return true
		}
	}
	return false
}

// Name is "identity".
func (p *Policy) Name() string { return policyName }

// Begin refuses a call whose caller has no identity, whose identity has
// expired, or whom no rule lets call the method. It sets the call's Principal
// and Tenant. A method that nobody knows is left to the chain, and on the client
// side the credentials have decided already.
func (p *Policy) Begin(c *interceptors.Call) (interceptors.CallPolicy, error) {
	if c.Client {
		return nil, nil
	}
	g, err := p.allow(c)
	if g != nil {
		c.Principal, c.Tenant = g.principal, g.tenant
	}
	if err != nil {
		return nil, err
	}
	if c.Method == nil {
		return nil, nil
	}
	return g, nil
}

// Allow is Begin without its effects.
func (p *Policy) Allow(c *interceptors.Call) error {
	if c.Client {
		return nil
	}
	_, err := p.allow(c)
	return err
}

// allow decides. The grant is nil if the caller has no valid identity.
func (p *Policy) allow(c *interceptors.Call) (*grant, error) {
	id := c.Peer.ID
	if id.IsZero() && !p.insecure {
		return nil, interceptors.Deny(policyName, interceptors.IdentityMissing,
			"the caller has no identity; connect with mutual TLS and an X.509-SVID")
	}
	if err := current(&c.Peer); err != nil {
		return nil, err
	}
	g := p.grant(id, c.Method)
	switch {
	case c.Method == nil || g.method:
		return g, nil
	case id.IsZero() && !g.denied:
		return g, interceptors.Deny(policyName, interceptors.IdentityMissing,
			"no rule lets a caller without an identity use this method, and this door takes no identities").
			With("method", c.Method.Name)
	}
	return g, interceptors.Deny(policyName, interceptors.MethodDenied,
		"no rule lets %s use this method; ask whoever runs this door for one", g.principal).
		With("method", c.Method.Name).With("principal", g.principal)
}

// current refuses a peer whose certificate has expired since the handshake.
func current(peer *interceptors.Peer) error {
	if peer.Expires.IsZero() || time.Now().Before(peer.Expires) {
		return nil
	}
	return interceptors.Deny(policyName, interceptors.IdentityExpired,
		"the certificate that this connection was made with expired at %s; connect again with a new one",
		peer.Expires.UTC().Format(time.RFC3339))
}

// Tenant is who pays for what the principal does, by the configured template.
func (p *Policy) Tenant(id spiffeid.ID) string {
	if id.IsZero() {
		return anonymous
	}
	return p.tenants.tenant(id)
}

// grantKey is a principal, zero for anonymous, and a method, nil for one that
// nobody knows. Callers choose neither freely: identities are issued, and
// methods come from the dialects.
type grantKey struct {
	id     spiffeid.ID
	method *dialect.Method
}

// grant is what one principal may do with one method. It is immutable, and the
// policy's part in every call that it allows.
type grant struct {
	principal, tenant string
	method            bool // the method may be called, for some model at least
	denied            bool // a deny rule says no, whatever the model
	inference         bool // the method does model work
	anyModel          bool
	models            map[string]bool // by name: allowed (true) or denied (false)
	anyDenied         bool            // some model is denied by name
}

// grant finds the decision, or makes it.
func (p *Policy) grant(id spiffeid.ID, m *dialect.Method) *grant {
	key := grantKey{id, m}
	p.mu.RLock()
	g := p.grants[key]
	p.mu.RUnlock()
	if g != nil {
		return g
	}
	g = p.decide(id, m)
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.grants) >= maxGrants {
		for other := range p.grants { // whichever comes first
			delete(p.grants, other)
			break
		}
	}
	p.grants[key] = g
	return g
}

// decide asks the rules.
func (p *Policy) decide(id spiffeid.ID, m *dialect.Method) *grant {
	g := &grant{principal: id.String(), tenant: p.Tenant(id)}
	if id.IsZero() {
		g.principal = anonymous
	}
	if m == nil {
		return g
	}
	g.inference = m.Kind == dialect.Inference
	g.models = make(map[string]bool)
	for n := range p.rules {
		r := &p.rules[n]
		if !r.matches(id, m) {
			continue
		}
		switch {
		case !r.deny:
			g.method = true
			g.anyModel = g.anyModel || r.anyModel
			for model := range r.models {
				if _, known := g.models[model]; !known {
					g.models[model] = true
				}
			}
		case r.anyModel || len(r.models) == 0:
			g.denied = true
		default:
			g.anyDenied = true
			for model := range r.models {
				g.models[model] = false
			}
		}
	}
	g.method = g.method && !g.denied
	return g
}

// allows decides about a model, "" for a message that names none. Such an
// inference may run on any model, by the model server's choice: it needs the
// right to every model, and no denial of one.
func (g *grant) allows(model string) bool {
	if model == "" {
		return !g.inference || g.anyModel && !g.anyDenied
	}
	allowed, named := g.models[model]
	if named {
		return allowed
	}
	return g.anyModel
}

// Authorize refuses an inference of a model that no rule lets the caller use,
// and, on a stream that outlived it, of a caller whose certificate has expired.
func (g *grant) Authorize(i *interceptors.Inference) error {
	if err := current(&i.Call.Peer); err != nil {
		return err
	}
	if !g.allows(i.Model) {
		return interceptors.NoModel(policyName, i.Model)
	}
	return nil
}

// Start has nothing to add to Authorize.
func (g *grant) Start(*interceptors.Inference) (interceptors.InferencePolicy, error) {
	return nil, nil
}

// End has nothing to give back.
func (g *grant) End(interceptors.Outcome) {}
