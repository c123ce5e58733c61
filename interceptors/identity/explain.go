package identity

import (
	"fmt"
	"maps"
	"time"

	"github.com/sluicegate/sluice/interceptors"
	"github.com/sluicegate/sluice/interceptors/dialect"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/metadata"
)

// Question is a request that nobody made, to be judged.
type Question struct {
	// Principal is who would call; zero for a caller without an identity.
	Principal spiffeid.ID
	// Method is nil if no back end has it.
	Method *dialect.Method
	// Model and Version are what the request would name; "" if it names none.
	Model, Version string
	// Parameters of the request: strings, int64, float64 and bool.
	Parameters map[string]any
	Metadata   metadata.MD
	// Time of the call; zero is now.
	Time time.Time
}

// Explanation is a decision and its reasons.
type Explanation struct {
	Allowed bool `json:"allowed"`
	// Reason is that of the denial; "" if it is allowed.
	Reason interceptors.Reason `json:"reason,omitempty"`
	// Why says it for people.
	Why string `json:"why"`
	// Principal and Tenant are as the other policies would know them.
	Principal string `json:"principal"`
	Tenant    string `json:"tenant"`
	// Rule is the index of the rule that decided, -1 if it is that none allows.
	Rule int `json:"rule"`
	// Rules are all rules, in order.
	Rules []RuleExplanation `json:"rules"`
}

// RuleExplanation is what one rule says of the request.
type RuleExplanation struct {
	Index int `json:"index"`
	// Name is the configured name, or "".
	Name string `json:"name,omitempty"`
	Deny bool   `json:"deny"`
	// Matches says that the rule allows, or denies, the request.
	Matches bool `json:"matches"`
	// Why it does not match, or why it does although its condition could not be
	// decided; else "".
	Why string `json:"why,omitempty"`
}

// Explain decides as the policy would about a caller that came with mutual TLS,
// and says why.
func (p *Policy) Explain(q Question) Explanation {
	g := p.rules.grant(q.Principal, q.Method)
	x := Explanation{Principal: g.principal, Tenant: g.tenant, Rule: -1}
	call := &interceptors.Call{
		CallInfo: interceptors.CallInfo{Peer: interceptors.Peer{ID: q.Principal}, Metadata: q.Metadata},
		Method:   q.Method, Principal: g.principal, ID: q.Principal, Tenant: g.tenant,
	}
	begin := environment{Call: call, Via: viaMTLS, Peer: q.Principal, Now: q.Time}
	if q.Principal.IsZero() {
		begin.Via = anonymous
	}
	asked := begin
	asked.Inference = &interceptors.Inference{Call: call, Model: q.Model, Version: q.Version}
	asked.Parameters = make(parameters, len(q.Parameters)) // not nil: there are no others
	maps.Copy(asked.Parameters, q.Parameters)

	switch {
	case q.Principal.IsZero() && !p.callers.insecure:
		x.deny(interceptors.IdentityMissing, "every caller needs an identity")
		return x
	case q.Method == nil:
		x.deny(interceptors.MethodUnknown, "no back end has the method")
		return x
	}
	by, allowed := g.decide(q.Model, q.Version, &asked)
	if closing := g.closing(&begin); closing != nil {
		by = closing
	}
	switch {
	case g.call(&begin) && allowed:
		x.Allowed, x.Why = true, "a rule allows it"
	case g.call(&begin) && by != nil:
		x.deny(interceptors.ModelDenied, "a rule denies it")
	case g.call(&begin):
		x.deny(interceptors.ModelDenied, "no rule allows it, though one allows the method")
	case by != nil && !allowed:
		x.deny(interceptors.MethodDenied, "a rule denies the method")
	case q.Principal.IsZero():
		x.deny(interceptors.IdentityMissing, "no rule lets a caller without an identity use the method")
	default:
		x.deny(interceptors.MethodDenied, "no rule allows the method")
	}
	if by != nil {
		x.Rule = by.index
	}
	for n := range p.rules.list {
		x.Rules = append(x.Rules, p.rules.list[n].explain(g, &asked))
	}
	return x
}

func (x *Explanation) deny(reason interceptors.Reason, why string) {
	x.Allowed, x.Reason, x.Why = false, reason, why
}

// explain says whether the rule matches, and why not.
func (r *rule) explain(g *grant, e *environment) RuleExplanation {
	x := RuleExplanation{Index: r.index, Name: r.name, Deny: r.deny}
	model, version := e.Inference.Model, e.Inference.Version
	said := r.concerns(g.id, g.method)
	if said == matches {
		said = r.covers(g.method, model, version)
	}
	var reason error
	if said == matches && r.when != nil {
		said, reason = g.holds(r.when, e)
	}
	x.Matches = said == matches
	switch said {
	case otherPrincipal:
		x.Why = "the principal is another"
	case otherMethod:
		x.Why = "the method is another"
	case otherModel:
		x.Why = "the model is another"
		if model == "" {
			x.Why = "the request names no model, and the rule is not for every model"
		}
	case otherVersion:
		x.Why = "the version is another"
		if version == "" {
			x.Why = "the request leaves the version to the model server, and the rule is not for every version"
		}
	case conditionFalse:
		x.Why = "the condition is false"
	case undecided, unknown:
		x.Matches = r.deny
		x.Why = fmt.Sprintf("the condition cannot be decided: %v", reason)
	}
	return x
}
