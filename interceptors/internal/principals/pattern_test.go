package principals

import (
	"math/rand/v2"
	"regexp"
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

func TestPattern(t *testing.T) {
	for _, c := range []struct {
		name, pattern, id string
		want              bool
	}{
		{"the same", "spiffe://a.b/c/d", "spiffe://a.b/c/d", true},
		{"a longer path", "spiffe://a.b/c", "spiffe://a.b/c/d", false},
		{"a shorter path", "spiffe://a.b/c/d", "spiffe://a.b/c", false},
		{"a longer segment", "spiffe://a.b/c", "spiffe://a.b/cc", false},
		{"another case", "spiffe://a.b/c", "spiffe://a.b/C", false},
		{"another trust domain", "spiffe://a.b/c", "spiffe://a.bb/c", false},
		{"a sub-domain", "spiffe://b/c", "spiffe://a.b/c", false},
		{"one segment", "spiffe://a.b/*", "spiffe://a.b/c", true},
		{"one segment is not two", "spiffe://a.b/*", "spiffe://a.b/c/d", false},
		{"one segment is not none", "spiffe://a.b/*", "spiffe://a.b", false},
		{"one segment in the middle", "spiffe://a.b/ns/*/sa/x", "spiffe://a.b/ns/team/sa/x", true},
		{"one segment in the middle is not two", "spiffe://a.b/ns/*/sa/x", "spiffe://a.b/ns/t/u/sa/x", false},
		{"the rest is one", "spiffe://a.b/ns/**", "spiffe://a.b/ns/team", true},
		{"the rest is three", "spiffe://a.b/ns/**", "spiffe://a.b/ns/team/sa/x", true},
		{"the rest is not none", "spiffe://a.b/ns/**", "spiffe://a.b/ns", false},
		{"the rest begins at a segment", "spiffe://a.b/ns/**", "spiffe://a.b/nsx/team", false},
		{"everyone", "spiffe://a.b/**", "spiffe://a.b/c/d", true},
		{"everyone of the trust domain", "spiffe://a.b/**", "spiffe://x.y/c/d", false},
		{"both wildcards, two segments", "spiffe://a.b/*/**", "spiffe://a.b/c/d", true},
		{"both wildcards, one segment", "spiffe://a.b/*/**", "spiffe://a.b/c", false},
	} {
		t.Run(c.name, func(t *testing.T) {
			p, err := ParsePattern(c.pattern)
			if err != nil {
				t.Fatal(err)
			}
			if got := p.Match(spiffeid.RequireFromString(c.id)); got != c.want {
				t.Errorf("%s matches %s: %v", c.pattern, c.id, got)
			}
		})
	}
}

func TestPatternErrors(t *testing.T) {
	for _, c := range []struct{ name, pattern, want string }{
		{"nothing", "", "must begin with spiffe://"},
		{"another scheme", "https://a.b/c", "must begin with spiffe://"},
		{"upper-case scheme", "SPIFFE://a.b/c", "must begin with spiffe://"},
		{"no trust domain", "spiffe:///c", "trust domain is missing"},
		{"upper-case trust domain", "spiffe://A.b/c", "trust domain characters"},
		{"wildcard trust domain", "spiffe://*/c", "wildcard in the trust domain"},
		{"partly wildcard trust domain", "spiffe://*.b/c", "wildcard in the trust domain"},
		{"no path", "spiffe://a.b", "spiffe://a.b/**"},
		{"root path", "spiffe://a.b/", "is empty"},
		{"trailing slash", "spiffe://a.b/c/", "is empty"},
		{"double slash", "spiffe://a.b//c", "is empty"},
		{"dots", "spiffe://a.b/c/../d", "dot"},
		{"query", "spiffe://a.b/c?d", "characters"},
		{"percent", "spiffe://a.b/c%2fd", "characters"},
		{"space", "spiffe://a.b/c ", "characters"},
		{"part of a segment", "spiffe://a.b/c*", "whole segment"},
		{"two stars before the end", "spiffe://a.b/**/c", "last segment"},
		{"two stars twice", "spiffe://a.b/**/**", "last segment"},
		{"three stars", "spiffe://a.b/***", "whole segment"},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, err := ParsePattern(c.pattern)
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %v, want something with %q", err, c.want)
			}
		})
	}
}

// A pattern means what a regular expression made of it means.
func TestPatternMatchesLikeARegexp(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	pick := func(of ...string) string { return of[r.IntN(len(of))] }
	matched := 0
	for range 20000 {
		text := "spiffe://" + pick("a", "b")
		for range r.IntN(4) {
			text += "/" + pick("a", "b", "ab", "*", "*")
		}
		if r.IntN(2) == 0 {
			text += "/**"
		}
		id := "spiffe://" + pick("a", "b")
		for range r.IntN(5) {
			id += "/" + pick("a", "b", "ab")
		}
		p, err := ParsePattern(text)
		if err != nil {
			if strings.Count(text, "/") > 2 {
				t.Fatal(err)
			}
			continue
		}
		expr := regexp.QuoteMeta(text)
		expr = strings.ReplaceAll(expr, `/\*\*`, `(/[^/]+)+`)
		expr = strings.ReplaceAll(expr, `\*`, `[^/]+`)
		want := regexp.MustCompile("^" + expr + "$").MatchString(id)
		if got := p.Match(spiffeid.RequireFromString(id)); got != want {
			t.Fatalf("%s matches %s: %v", text, id, got)
		}
		if want {
			matched++
		}
	}
	if matched < 500 {
		t.Errorf("only %d pairs matched: the test says little", matched)
	}
}

func FuzzParsePattern(f *testing.F) {
	for _, s := range []string{
		"spiffe://a.b/c", "spiffe://a.b/*/c/**", "spiffe://a.b/**", "spiffe://a.b", "spiffe://a.b//", "spiffe://a/../b",
		"spiffe://*/a", "spiffe://a/b*", "spiffe://a:1/b", "spiffe://u@a/b", "spiffe://a/%2e%2e", "spiffe://a/\x00",
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, text string) {
		p, err := ParsePattern(text)
		// Without wildcards a pattern is a SPIFFE ID, and the other way round.
		if id, e := spiffeid.FromString(text); e == nil && id.Path() != "" {
			if err != nil {
				t.Fatalf("a SPIFFE ID is refused: %v", err)
			}
			if !p.Match(id) {
				t.Fatal("a SPIFFE ID does not match itself")
			}
		} else if err == nil && !strings.Contains(text, "*") {
			t.Fatalf("%q is accepted and is no SPIFFE ID: %v", text, e)
		}
		if err != nil {
			return
		}
		// With some segment for each wildcard it is one too, and matches.
		filled := strings.ReplaceAll(strings.ReplaceAll(text, "**", "*/*"), "*", "x")
		id, e := spiffeid.FromString(filled)
		if e != nil {
			t.Fatalf("%q is accepted, and %q is no SPIFFE ID: %v", text, filled, e)
		}
		if !p.Match(id) {
			t.Fatalf("%q does not match %q", text, filled)
		}
	})
}
