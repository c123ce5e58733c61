package identity

import (
	"errors"
	"fmt"
	"strconv"
	"strings"

	"github.com/sluicegate/sluice/interceptors/internal/principals"
	configv1 "github.com/sluicegate/sluice/proto/gen/sluice/config/v1"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// tenants say who pays for what a principal does: the first entry that names
// the principal, else the template.
type tenants struct {
	list     []tenantEntry
	template template
}

type tenantEntry struct {
	principals principals.Set
	tenant     string
}

func compileTenants(c *configv1.Identity, open bool) (t tenants, err error) {
	if t.template, err = parseTemplate(c.GetTenant()); err != nil {
		return t, fmt.Errorf("identity.tenant: %w", err)
	}
	for n, entry := range c.GetTenants() {
		p, err := principals.Parse(entry.GetPrincipals(), open)
		if err != nil {
			return t, fmt.Errorf("identity.tenants[%d].%w", n, err)
		}
		if entry.GetTenant() == "" {
			return t, fmt.Errorf("identity.tenants[%d].tenant: it is empty; name the tenant", n)
		}
		t.list = append(t.list, tenantEntry{p, entry.GetTenant()})
	}
	return t, nil
}

// tenant is the tenant of the principal, zero for anonymous.
func (t *tenants) tenant(id spiffeid.ID) string {
	for n := range t.list {
		if t.list[n].principals.Match(id) {
			return t.list[n].tenant
		}
	}
	if id.IsZero() {
		return anonymous
	}
	return t.template.tenant(id)
}

// template makes a tenant of a SPIFFE ID: literal text, "{trust_domain}" and
// path segments, "{1}" being the first.
type template []piece

// piece is literal text, or a path segment if segment is above 0, or the trust
// domain if it is below.
type piece struct {
	text    string
	segment int
}

const defaultTenant = "{trust_domain}"

func parseTemplate(text string) (template, error) {
	if text == "" {
		text = defaultTenant
	}
	var t template
	variables := 0
	for rest := text; rest != ""; {
		literal, after, open := strings.Cut(rest, "{")
		if strings.Contains(literal, "}") {
			return nil, fmt.Errorf(`%q has a "}" without a "{"`, text)
		}
		if literal != "" {
			t = append(t, piece{text: literal})
		}
		if !open {
			break
		}
		name, after, closed := strings.Cut(after, "}")
		if !closed {
			return nil, fmt.Errorf(`%q has a "{" without a "}"`, text)
		}
		if name == "trust_domain" {
			t = append(t, piece{segment: -1})
		} else {
			n, err := strconv.Atoi(name)
			if err != nil || n < 1 || strconv.Itoa(n) != name {
				return nil, fmt.Errorf("%q: {%s} is neither {trust_domain} nor a path segment such as {1}", text, name)
			}
			t = append(t, piece{segment: n})
		}
		variables++
		rest = after
	}
	if variables == 0 {
		return nil, errors.New("it names the same tenant for everyone; use {trust_domain} or a path segment such as {1}")
	}
	return t, nil
}

// tenant is the tenant of the principal. A principal without one of the
// segments is a tenant of its own: it must not share an account with strangers.
func (t template) tenant(id spiffeid.ID) string {
	segments := strings.Split(id.Path(), "/") // the first is empty
	var out strings.Builder
	for _, p := range t {
		switch {
		case p.segment == 0:
			out.WriteString(p.text)
		case p.segment < 0:
			out.WriteString(id.TrustDomain().Name())
		case p.segment < len(segments):
			out.WriteString(segments[p.segment])
		default:
			return id.String()
		}
	}
	return out.String()
}
