// Package identity decides who calls, and who may do what.
//
// A caller is known by the X.509-SVID that it proved in the TLS handshake
// ([ServerCredentials]); where the configuration says so, by a JWT-SVID, or by
// what a trusted proxy says of the client that it speaks for. The [Policy] asks
// the rules for every call and every inference: no rule, no access. A [Watch]
// asks again for the calls in flight.
//
// Who we are ourselves, and whom we know, comes from a [Source]: the SPIFFE
// Workload API, files, or an [Authority] inside the process.
package identity

import (
	"sync/atomic"
	"time"

	"github.com/sluicegate/sluice/interceptors"
	"github.com/sluicegate/sluice/interceptors/dialect"
	"github.com/sluicegate/sluice/interceptors/fields"
	"github.com/sluicegate/sluice/interceptors/internal/expression"
	configv1 "github.com/sluicegate/sluice/proto/gen/sluice/config/v1"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/types/known/durationpb"
)

const (
	policyName = "identity"
	// anonymous is the principal, and the tenant, of a caller without identity.
	anonymous = "anonymous"

	// defaultRecheck is how often calls in flight are judged again. Chosen: people
	// who take access away do not wait for longer, and ten thousand calls cost about
	// a hundredth of a core.
	defaultRecheck = time.Second
	// defaultGrace is how long a call in flight may outlive its caller's SVID.
	// Chosen: most generations of text end by then.
	defaultGrace = 5 * time.Minute
)

// Policy is the identity part of a configuration. It is immutable, apart from
// caches, and safe for concurrent use; it never waits.
type Policy struct {
	rules   *rules
	callers callers
	// How often calls in flight are judged again, and how long they may outlive
	// the SVID of their caller.
	recheck, grace time.Duration
	watch          *Watch // nil: nobody judges again
}

var (
	_ interceptors.Policy = (*Policy)(nil)
	_ interceptors.Gate   = (*Policy)(nil)
)

// New compiles what the configuration says of callers. An error names the field
// and says how to mend it. Rules that cannot do what they seem to say are errors
// too. Where JWT-SVIDs count the policy needs a source: see Use.
func New(c *configv1.Identity) (*Policy, error) {
	if c.GetSource() != nil { // else Open says so
		if err := checkSource(c); err != nil {
			return nil, err
		}
	}
	p := &Policy{recheck: or(c.GetRecheck(), defaultRecheck), grace: or(c.GetExpiryGrace(), defaultGrace)}
	var err error
	if p.callers, err = compileCallers(c); err != nil {
		return nil, err
	}
	p.rules, err = compileRules(c)
	return p, err
}

func or(d *durationpb.Duration, def time.Duration) time.Duration {
	if d == nil {
		return def
	}
	return d.AsDuration()
}

// Use gives the policy the source with whose keys JWT-SVIDs are verified, and
// who judges its calls again. Before any call; either may be nil.
func (p *Policy) Use(source *Source, watch *Watch) {
	p.watch = watch
	if source != nil && p.callers.audiences != nil {
		p.callers.tokens = newTokens(p.callers.audiences, source, source.Generation)
	}
}

// Name is "identity".
func (p *Policy) Name() string { return policyName }

// Begin refuses a call whose caller has no identity, whose identity has expired
// or is not trusted any more, or whom no rule lets call the method. It sets the
// call's Principal, ID and Tenant. A method that nobody knows is left to the
// chain, and on the client side the credentials have decided already.
func (p *Policy) Begin(c *interceptors.Call) (interceptors.CallPolicy, error) {
	if c.Client {
		return nil, nil
	}
	who, g, err := p.allow(c)
	if g != nil {
		c.Principal, c.ID, c.Tenant, c.Via = g.principal, g.id, g.tenant, who.via
	}
	if err != nil {
		return nil, err
	}
	if who.via == viaJWT { // it is a key to whatever takes it, and was for us
		if c.Outgoing == nil {
			c.Outgoing = make(map[string][]string)
		}
		c.Outgoing[tokenHeader] = nil
	}
	if c.Method == nil {
		return nil, nil
	}
	return (*callPart)(p), nil
}

// Allow is Begin without its effects.
func (p *Policy) Allow(c *interceptors.Call) error {
	if c.Client {
		return nil
	}
	_, _, err := p.allow(c)
	return err
}

// allow decides about a new call. The grant is nil if the caller has no valid
// identity.
func (p *Policy) allow(c *interceptors.Call) (caller, *grant, error) {
	who, err := p.callers.identify(c)
	if err == nil {
		err = who.current(c, 0)
	}
	if err != nil {
		return who, nil, err
	}
	g := p.rules.grant(who.id, c.Method)
	if c.Method == nil {
		return who, g, nil
	}
	return who, g, who.mayCall(c, g)
}

// mayCall refuses a method that no rule lets the caller use.
func (who *caller) mayCall(c *interceptors.Call, g *grant) error {
	e := environment{Call: c, Via: who.via, Peer: c.Peer.ID}
	switch {
	case g.call(&e):
		return nil
	case who.id.IsZero() && !g.denied(&e):
		return interceptors.Deny(policyName, interceptors.IdentityMissing,
			"no rule lets a caller without an identity use this method, and this door takes no identities").
			With("method", g.method.Name)
	}
	return interceptors.Deny(policyName, interceptors.MethodDenied,
		"no rule lets %s use this method; ask whoever runs this door for one", g.principal).
		With("method", g.method.Name).With("principal", g.principal)
}

// Tenant is who pays for what the principal does, by the configured template.
func (p *Policy) Tenant(id spiffeid.ID) string {
	return p.rules.tenants.tenant(id)
}

// inForce is the policy of the day: a call may have begun under an older one.
func (p *Policy) inForce() *Policy {
	if p.watch != nil {
		if now := p.watch.policy.Load(); now != nil {
			return now
		}
	}
	return p
}

// stays decides about a call that has begun, as if it began now, but for the
// grace. It must still be the same caller's.
func (p *Policy) stays(c *interceptors.Call, m *dialect.Method) (caller, *grant, error) {
	who, err := p.callers.identify(c)
	if err == nil {
		err = who.current(c, p.grace)
	}
	if err == nil && who.id != c.ID {
		err = untrusted("by the present configuration the caller is another one than when the call began; call again")
	}
	if err != nil {
		return who, nil, err
	}
	return who, p.rules.grant(who.id, m), nil
}

// callPart is the policy's part in every call.
type callPart Policy

// Authorize refuses an inference of a model that no rule lets the caller use, by
// the rules of the day.
func (p *callPart) Authorize(i *interceptors.Inference, m *fields.Message) error {
	c := i.Call
	who, g, err := (*Policy)(p).inForce().stays(c, c.Method)
	if err != nil {
		return err
	}
	e := environment{Call: c, Via: who.via, Peer: c.Peer.ID, Inference: i, Message: m}
	if !g.allows(i.Model, i.Version, &e) {
		return interceptors.NoModel(policyName, i.Model)
	}
	return nil
}

// Start takes models that the caller may not use out of lists of models, and
// keeps the parameters of an inference if some condition asks for them.
func (p *callPart) Start(i *interceptors.Inference) (interceptors.InferencePolicy, error) {
	c := i.Call
	g := (*Policy)(p).inForce().rules.grant(c.ID, c.Method)
	switch {
	case c.Method.ListsModels:
		who, _, err := (*Policy)(p).inForce().stays(c, c.Method)
		if err != nil {
			return nil, err
		}
		return g.start(&environment{Call: c, Via: who.via, Peer: c.Peer.ID, Inference: i}), nil
	case g.asksParameters:
		return &asked{part: p, inference: i}, nil
	}
	return nil, nil
}

// End has nothing to give back.
func (p *callPart) End(interceptors.Outcome) {}

// asked is an inference with what its parameters were.
type asked struct {
	part      *callPart
	inference *interceptors.Inference
	kept      atomic.Pointer[parameters]
}

// Request keeps the parameters. Those of later messages must be allowed too.
func (a *asked) Request(m *fields.Message) error {
	if a.kept.Load() != nil {
		if err := a.part.Authorize(a.inference, m); err != nil {
			return err
		}
	}
	kept := expression.ReadParameters(a.inference, m)
	a.kept.Store(&kept)
	return nil
}

// Response has nothing to see.
func (a *asked) Response(*fields.Message) error { return nil }

// Deaf says so.
func (a *asked) Deaf() bool { return true }

// End has nothing to give back.
func (a *asked) End(interceptors.Outcome) {}
