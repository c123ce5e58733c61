package identity

import (
	"errors"
	"fmt"
	"strconv"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

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
