// Package principals matches callers: by SPIFFE ID, by patterns of SPIFFE IDs, or
// callers without an identity.
package principals

import (
	"errors"
	"fmt"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Pattern matches SPIFFE IDs of one trust domain by the segments of their path:
// literal, "*" for any one, and last of all "**" for one or more.
type Pattern struct {
	trustDomain spiffeid.TrustDomain
	segments    []string // without the last "**"
	rest        bool     // it ends in "**"
}

const scheme = "spiffe://"

// ParsePattern reads a pattern such as "spiffe://example.org/ns/*/sa/**".
func ParsePattern(text string) (Pattern, error) {
	var p Pattern
	rest, ok := strings.CutPrefix(text, scheme)
	if !ok {
		return p, fmt.Errorf("%q is no SPIFFE ID; it must begin with spiffe://", text)
	}
	name, path, slash := strings.Cut(rest, "/")
	if strings.Contains(name, "*") {
		return p, fmt.Errorf("%q has a wildcard in the trust domain; name each trust domain in full", text)
	}
	td, err := spiffeid.TrustDomainFromString(name)
	if err != nil {
		return p, fmt.Errorf("%q: %w", text, err)
	}
	if !slash {
		return p, fmt.Errorf("%q has no path; write %s/** for every identity of the trust domain", text, text)
	}
	p.trustDomain = td
	p.segments = strings.Split(path, "/")
	if n := len(p.segments) - 1; p.segments[n] == "**" {
		p.segments, p.rest = p.segments[:n], true
	}
	for _, segment := range p.segments {
		switch {
		case segment == "*":
		case segment == "**":
			return p, fmt.Errorf(`%q: "**" can only be the last segment`, text)
		case strings.Contains(segment, "*"):
			return p, fmt.Errorf(`%q: "*" can only be a whole segment, not a part of %q`, text, segment)
		default:
			if err := validSegment(segment); err != nil {
				return p, fmt.Errorf("%q: %w", text, err)
			}
		}
	}
	return p, nil
}

func validSegment(segment string) error {
	if segment == "" {
		return errors.New("a path segment is empty")
	}
	return spiffeid.ValidatePathSegment(segment)
}

// Match reports whether the pattern is for the identity; it is for no zero one.
func (p *Pattern) Match(id spiffeid.ID) bool {
	if id.TrustDomain() != p.trustDomain {
		return false
	}
	path := id.Path()
	for _, want := range p.segments {
		if path == "" {
			return false
		}
		segment, _, _ := strings.Cut(path[1:], "/")
		if want != "*" && want != segment {
			return false
		}
		path = path[1+len(segment):]
	}
	return p.rest == (path != "")
}

// anonymous is how a configuration names a caller without an identity.
const anonymous = "anonymous"

// Set is patterns, and perhaps callers without an identity.
type Set struct {
	patterns  []Pattern
	anonymous bool
}

// Parse reads a field "principals". Callers without an identity can be
// named only where there are some.
func Parse(texts []string, open bool) (p Set, err error) {
	if len(texts) == 0 {
		return p, errors.New("principals: name at least one")
	}
	for n, text := range texts {
		if text == anonymous {
			if !open {
				return p, fmt.Errorf("principals[%d]: every caller has an identity here; %q goes with identity.insecure only", n, anonymous)
			}
			p.anonymous = true
			continue
		}
		pattern, err := ParsePattern(text)
		if err != nil {
			return p, fmt.Errorf("principals[%d]: %w", n, err)
		}
		p.patterns = append(p.patterns, pattern)
	}
	return p, nil
}

// ParseIDs reads SPIFFE IDs and patterns, of which there may be none. An error begins
// with the index of the one that is at fault.
func ParseIDs(texts []string) (p Set, err error) {
	for n, text := range texts {
		pattern, err := ParsePattern(text)
		if err != nil {
			return p, fmt.Errorf("[%d]: %w", n, err)
		}
		p.patterns = append(p.patterns, pattern)
	}
	return p, nil
}

// Match reports whether the principal, zero for anonymous, is among them.
func (p *Set) Match(id spiffeid.ID) bool {
	if id.IsZero() {
		return p.anonymous
	}
	for n := range p.patterns {
		if p.patterns[n].Match(id) {
			return true
		}
	}
	return false
}
