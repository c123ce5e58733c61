package admit

import (
	"cmp"
	"fmt"
	"slices"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/sluicegate/sluice/interceptors"
	configv1 "github.com/sluicegate/sluice/proto/gen/sluice/config/v1"
)

// priority names inferences and the level that they queue in.
type priority struct {
	level      int
	principals [][]string // trust domain and segments of the path
	methods    []string
	models     []string
}

// addPriorities makes the levels of the queue: one for each priority that is named, and 0.
func (l *pool) addPriorities(list []*configv1.PoolPriority) error {
	values := []int32{0}
	for _, c := range list {
		values = append(values, c.GetPriority())
	}
	slices.SortFunc(values, func(a, b int32) int { return cmp.Compare(b, a) })
	values = slices.Compact(values)
	for range values {
		l.levels = append(l.levels, newLevel())
	}
	l.normal = slices.Index(values, 0)
	for n, c := range list {
		p := priority{level: slices.Index(values, c.GetPriority()), methods: c.GetMethods(), models: c.GetModels()}
		for k, text := range c.GetPrincipals() {
			pattern, err := parsePattern(text)
			if err != nil {
				return fmt.Errorf("priorities[%d].principals[%d]: %w", n, k, err)
			}
			p.principals = append(p.principals, pattern)
		}
		for k, m := range c.GetMethods() {
			if !strings.HasPrefix(m, "/") || strings.Count(m, "/") != 2 {
				return fmt.Errorf("priorities[%d].methods[%d]: %q is no full method; write it as /package.Service/Method", n, k, m)
			}
		}
		l.priorities = append(l.priorities, p)
	}
	return nil
}

// levelOf is the level that an inference queues in.
func (l *pool) levelOf(i *interceptors.Inference) int {
	for n := range l.priorities {
		p := &l.priorities[n]
		if (len(p.methods) == 0 || slices.Contains(p.methods, i.Call.FullMethod)) &&
			(len(p.models) == 0 || slices.Contains(p.models, i.Model)) &&
			(len(p.principals) == 0 || slices.ContainsFunc(p.principals, func(s []string) bool { return matches(s, i.Call.Principal) })) {
			return p.level
		}
	}
	return l.normal
}

const (
	scheme    = "spiffe://"
	anonymous = "anonymous" // a caller without an identity
)

// parsePattern reads a SPIFFE ID in which "*" stands for any one segment and a
// last "**" for one or more.
func parsePattern(text string) ([]string, error) {
	if text == anonymous {
		return []string{text}, nil
	}
	rest, ok := strings.CutPrefix(text, scheme)
	if !ok {
		return nil, fmt.Errorf("%q is no SPIFFE ID; it must begin with spiffe://", text)
	}
	segments := strings.Split(rest, "/")
	if _, err := spiffeid.TrustDomainFromString(segments[0]); err != nil {
		return nil, fmt.Errorf("%q: %w", text, err)
	}
	if len(segments) == 1 {
		return nil, fmt.Errorf("%q has no path; write %s/** for every identity of the trust domain", text, text)
	}
	for n, s := range segments[1:] {
		switch {
		case s == "*", s == "**" && n == len(segments)-2:
		case strings.Contains(s, "*"):
			return nil, fmt.Errorf(`%q: "*" can only be a whole segment, and "**" the last`, text)
		case s == "":
			return nil, fmt.Errorf("%q: a path segment is empty", text)
		default:
			if err := spiffeid.ValidatePathSegment(s); err != nil {
				return nil, fmt.Errorf("%q: %w", text, err)
			}
		}
	}
	return segments, nil
}

// matches reports whether a pattern is for a principal.
func matches(pattern []string, principal string) bool {
	rest, ok := strings.CutPrefix(principal, scheme)
	if !ok {
		return len(pattern) == 1 && pattern[0] == principal
	}
	for n, want := range pattern {
		if want == "**" {
			return true
		}
		segment, after, more := strings.Cut(rest, "/")
		if want != "*" && want != segment || more == (n == len(pattern)-1) {
			return false
		}
		rest = after
	}
	return true
}
