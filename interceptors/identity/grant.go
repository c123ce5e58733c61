package identity

import (
	"strings"

	"github.com/sluicegate/sluice/interceptors/dialect"
	"github.com/sluicegate/sluice/interceptors/internal/expression"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// maxGrants bounds the grants that are kept. Chosen: some hundred principals
// with some ten methods each, in about 1 MiB. Beyond it a grant is made again,
// which costs a walk over the rules.
const maxGrants = 4096

// grantKey is a principal, zero for anonymous, and a method, nil for one that
// nobody knows. Callers choose neither freely: identities are issued, and
// methods come from the dialects.
type grantKey struct {
	id     spiffeid.ID
	method *dialect.Method
}

// grant is what one principal may do with one method: the rules that are about
// the two. It is immutable.
type grant struct {
	id                spiffeid.ID
	principal, tenant string
	method            *dialect.Method
	rules             *rules
	denials, permits  []*rule
	// named are the rules that name a model, by model; every are those for every
	// model.
	named map[string][]*rule
	every []*rule
	// asksParameters says that some rule has a condition about parameters.
	asksParameters bool
	caller         *expression.Caller // nil without conditions
}

// grant finds what the principal may do with the method, or makes it.
func (r *rules) grant(id spiffeid.ID, m *dialect.Method) *grant {
	key := grantKey{id, m}
	r.mu.RLock()
	g := r.grants[key]
	r.mu.RUnlock()
	if g != nil {
		return g
	}
	g = r.newGrant(id, m)
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.grants) >= maxGrants {
		for other := range r.grants { // whichever comes first
			delete(r.grants, other)
			break
		}
	}
	r.grants[key] = g
	return g
}

// newGrant asks the rules.
func (r *rules) newGrant(id spiffeid.ID, m *dialect.Method) *grant {
	g := &grant{id: id, principal: anonymous, tenant: r.tenants.tenant(id), method: m, rules: r}
	if !id.IsZero() {
		g.principal = id.String()
	}
	if m == nil {
		return g
	}
	g.named = make(map[string][]*rule)
	for n := range r.list {
		rule := &r.list[n]
		if rule.concerns(id, m) != matches {
			continue
		}
		if rule.deny {
			g.denials = append(g.denials, rule)
		} else {
			g.permits = append(g.permits, rule)
		}
		if rule.anyModel || len(rule.models) == 0 {
			g.every = append(g.every, rule)
		} else {
			for model := range rule.models {
				g.named[model] = append(g.named[model], rule)
			}
		}
		if rule.when != nil {
			g.asksParameters = g.asksParameters || rule.when.AsksParameters()
			if g.caller == nil {
				g.caller = expression.NewCaller(id, g.principal, g.tenant, m.Name)
			}
		}
	}
	return g
}

// call decides whether the method may be called, for some model at least. A
// condition on what only an inference shows may yet hold.
func (g *grant) call(e *environment) bool {
	if g.denied(e) {
		return false
	}
	for _, r := range g.permits {
		if v := r.holds(g, e); v == matches || v == unknown {
			return true
		}
	}
	return false
}

// denied reports whether a rule denies the method, whatever the model.
func (g *grant) denied(e *environment) bool { return g.closing(e) != nil }

// closing is the first rule that denies the method, whatever the model; nil if
// none does.
func (g *grant) closing(e *environment) *rule {
	for _, r := range g.denials {
		whole := (r.anyModel || len(r.models) == 0) && (r.versions == nil || !asksModel(g.method, ""))
		if !whole {
			continue
		}
		if v := r.holds(g, e); v == matches || v == undecided {
			return r
		}
	}
	return nil
}

// allows decides about a model and version; "" for what a message does not name.
// What cannot be decided is not allowed.
func (g *grant) allows(model, version string, e *environment) bool {
	_, ok := g.decide(model, version, e)
	return ok
}

// decide is allows, with the rule that decided; nil if none allows.
func (g *grant) decide(model, version string, e *environment) (by *rule, ok bool) {
	switch {
	case strings.IndexByte(model, 0) >= 0: // a server written in C reads another name
		return nil, false
	case model == "":
		if by = g.deciding(g.denials, true, model, version, e); by != nil {
			return by, false
		}
		by = g.deciding(g.permits, false, model, version, e)
		return by, by != nil
	}
	for _, deny := range []bool{true, false} {
		for _, rules := range [][]*rule{g.named[model], g.every} {
			if by = g.deciding(rules, deny, model, version, e); by != nil {
				return by, !deny
			}
		}
	}
	return nil, false
}

// deciding is the first of the rules that denies, or allows; nil if none does.
func (g *grant) deciding(rules []*rule, deny bool, model, version string, e *environment) *rule {
	for _, r := range rules {
		if r.deny != deny || r.covers(g.method, model, version) != matches {
			continue
		}
		if v := r.holds(g, e); v == matches || deny && v != conditionFalse {
			return r
		}
	}
	return nil
}
