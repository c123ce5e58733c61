package identity

import (
	"fmt"
	"regexp"
	"strings"
	"sync"

	"github.com/sluicegate/sluice/interceptors/dialect"
	"github.com/sluicegate/sluice/interceptors/internal/expression"
	"github.com/sluicegate/sluice/interceptors/internal/principals"
	configv1 "github.com/sluicegate/sluice/proto/gen/sluice/config/v1"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// rules are the rules of a configuration. They are immutable, apart from a
// cache of grants, and safe for concurrent use.
type rules struct {
	list    []rule
	tenants tenants

	mu     sync.RWMutex
	grants map[grantKey]*grant
}

// rule is a configured rule, ready to be matched.
type rule struct {
	index      int
	name       string
	principals principals.Set
	methods    map[string]bool
	kinds      map[dialect.Kind]bool
	models     map[string]bool
	anyModel   bool
	versions   map[string]bool       // none: every version
	when       *expression.Condition // nil: none
	deny       bool
}

// groups are the methods that can be named together. There is none for
// management.
var groups = map[string]dialect.Kind{
	"inference": dialect.Inference,
	"metadata":  dialect.Metadata,
	"health":    dialect.Health,
}

var fullMethod = regexp.MustCompile(`^/[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z_][A-Za-z0-9_]*)*/[A-Za-z_][A-Za-z0-9_]*$`)

// compileRules compiles rules and tenants. An error names the field and says
// how to mend it. Rules that cannot do what they seem to say are errors too.
func compileRules(c *configv1.Identity) (*rules, error) {
	open := c.GetInsecure() != nil
	r := &rules{grants: make(map[grantKey]*grant)}
	var err error
	if r.tenants, err = compileTenants(c, open); err != nil {
		return nil, err
	}
	for n, text := range c.GetRules() {
		compiled, err := compileRule(text, open)
		if err != nil {
			return nil, fmt.Errorf("identity.rules[%d].%w", n, err)
		}
		compiled.index = n
		r.list = append(r.list, compiled)
	}
	return r, nil
}

func compileRule(c *configv1.Rule, open bool) (r rule, err error) {
	r = rule{
		name:    c.GetName(),
		methods: make(map[string]bool),
		kinds:   make(map[dialect.Kind]bool),
		models:  make(map[string]bool),
		deny:    c.GetDeny(),
	}
	if r.principals, err = principals.Parse(c.GetPrincipals(), open); err != nil {
		return r, err
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
	for n, text := range c.GetVersions() {
		if text == "" || strings.Contains(text, "*") {
			return r, fmt.Errorf("versions[%d]: %q is no version, because versions are named exactly; leave versions out for every version", n, text)
		}
		if r.versions == nil {
			r.versions = make(map[string]bool)
		}
		r.versions[text] = true
	}
	if text := c.GetWhen(); text != "" {
		if r.when, err = expression.NewCondition(text); err != nil {
			return r, fmt.Errorf("when: %w", err)
		}
	}
	return r, nil
}

// answer is what a rule says of a request.
type answer uint8

const (
	matches answer = iota
	// What the rule asks is not known yet.
	unknown
	// The rule's condition cannot be decided.
	undecided
	// Why the rule does not match.
	otherPrincipal
	otherMethod
	otherModel
	otherVersion
	conditionFalse
)

// concerns compares principal and method, which do not change during a call.
func (r *rule) concerns(id spiffeid.ID, m *dialect.Method) answer {
	switch {
	case !r.kinds[m.Kind] && !r.methods[m.Name]:
		return otherMethod
	case !r.principals.Match(id):
		return otherPrincipal
	}
	return matches
}

// asksModel reports whether a request for the method is one for a model, named
// or left to the model server.
func asksModel(m *dialect.Method, model string) bool {
	return m.NamesModel || m.Kind == dialect.Inference || model != ""
}

// covers compares model and version. A request that leaves them to the model
// server may get any: to allow it takes the right to all, to deny it takes one.
func (r *rule) covers(m *dialect.Method, model, version string) answer {
	if !asksModel(m, model) {
		if r.deny && len(r.models) > 0 && !r.anyModel {
			return otherModel
		}
		return matches
	}
	if r.deny {
		switch {
		case model != "" && !r.anyModel && len(r.models) > 0 && !r.models[model]:
			return otherModel
		case version != "" && r.versions != nil && !r.denies(version):
			return otherVersion
		}
		return matches
	}
	switch {
	case !r.anyModel && (model == "" || !r.models[model]):
		return otherModel
	case r.versions != nil && !r.versions[version]:
		return otherVersion
	}
	return matches
}

// denies reports whether a version is one of those denied, also as a server
// reads it that takes the number which a text begins with: Triton reads "01"
// and " 1x" as 1.
func (r *rule) denies(version string) bool {
	if r.versions[version] {
		return true
	}
	n, ok := leadingNumber(version)
	if !ok {
		return false
	}
	for denied := range r.versions {
		if d, ok := leadingNumber(denied); ok && d == n {
			return true
		}
	}
	return false
}

// leadingNumber is the digits that a text begins with as the C library reads
// them: after space and a sign, without leading zeros.
func leadingNumber(s string) (string, bool) {
	s = strings.TrimLeft(s, " \t\n\v\f\r")
	if s != "" && (s[0] == '+' || s[0] == '-') {
		s = s[1:]
	}
	end := 0
	for end < len(s) && '0' <= s[end] && s[end] <= '9' {
		end++
	}
	if end == 0 {
		return "", false
	}
	if s = strings.TrimLeft(s[:end], "0"); s == "" {
		s = "0"
	}
	return s, true
}

// holds asks the condition.
func (r *rule) holds(g *grant, e *environment) answer {
	if r.when == nil {
		return matches
	}
	v, _ := g.holds(r.when, e)
	return v
}
