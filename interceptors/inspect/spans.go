package inspect

import (
	"math/bits"
	"slices"
	"strings"
)

// span is a piece of a text that a detector found.
type span struct {
	start, end int
	kind       int // index in kinds
}

// kinds are the detectors of personal data and secrets, by the names that rules
// and redacted texts call them.
var kinds = []struct {
	name   string
	secret bool
}{
	{"email", false}, {"card", false}, {"iban", false}, {"ssn", false}, {"phone", false}, {"ip", false}, {"id", false}, {"birth", false}, {"address", false},
	{"privatekey", true}, {"aws", true}, {"github", true}, {"token", true}, {"assigned", true},
}

// Indexes in kinds.
const (
	kindEmail = iota
	kindCard
	kindIBAN
	kindSSN
	kindPhone
	kindIP
	kindID
	kindBirth
	kindAddress
	kindPrivateKey
	kindAWS
	kindGitHub
	kindToken
	kindAssigned
)

const (
	numberKinds = 1<<kindCard | 1<<kindSSN | 1<<kindPhone | 1<<kindIP | 1<<kindID | 1<<kindBirth
	secretKinds = 1<<kindPrivateKey | 1<<kindAWS | 1<<kindGitHub | 1<<kindToken | 1<<kindAssigned
)

// findSpans finds what the detectors of the mask find: bit i is kinds[i]. Each
// pass is linear.
func findSpans(dst []span, text []byte, mask uint64) []span {
	if mask&(1<<kindEmail) != 0 {
		dst = findEmails(dst, text, kindEmail)
	}
	at := len(dst)
	if mask&(1<<kindIBAN) != 0 {
		dst = findIBANs(dst, text, kindIBAN)
	}
	accounts := dst[at:len(dst):len(dst)]
	if mask&(1<<kindIP) != 0 {
		dst = findIPv6(dst, text)
	}
	if mask&(1<<kindID) != 0 {
		dst = findLetteredIDs(dst, text)
	}
	if mask&numberKinds != 0 {
		dst = findNumbers(dst, text, mask, accounts)
	}
	if mask&(1<<kindAddress) != 0 {
		dst = findAddresses(dst, text)
	}
	if mask&secretKinds != 0 {
		dst = findSecrets(dst, text, mask)
	}
	return dst
}

func digit(c byte) bool     { return c >= '0' && c <= '9' }
func letter(c byte) bool    { return c|0x20 >= 'a' && c|0x20 <= 'z' }
func alnum(c byte) bool     { return digit(c) || letter(c) }
func tokenChar(c byte) bool { return alnum(c) || c == '_' || c == '-' }

// redacted is what a rule puts in place of what a detector found.
func redacted(found uint64) string {
	if found &= kindMask; found != 0 {
		return "[redacted:" + kinds[bits.TrailingZeros64(found)].name + "]"
	}
	return "[redacted]"
}

// replace is the text with every span replaced as rules say. Spans that overlap
// are one, of the kind of the first. What comes before from is left out. A text that is
// sized keeps its length, and what is not replaced its place.
func replace(text []byte, from int, spans []span, how []redaction, sized bool) []byte {
	slices.SortStableFunc(spans, func(a, b span) int { return a.start - b.start })
	out := make([]byte, 0, len(text)+16*len(spans))
	at := from
	if sized {
		out = append(out, filled("", from)...)
	}
	for _, s := range spans {
		if s.start < at {
			if sized {
				out = append(out, filled("", s.end-at)...)
			}
			at = max(at, s.end)
			continue
		}
		out = append(out, text[at:s.start]...)
		with, rest := redacted(1<<s.kind), false
		for _, r := range how {
			if r.replaces && r.mask>>s.kind&1 != 0 {
				with, rest = r.with, r.rest
				break
			}
		}
		at = s.end
		if rest {
			at = len(text)
		}
		if sized {
			with = filled(with, at-s.start)
		}
		if out = append(out, with...); rest {
			return out
		}
	}
	return append(out, text[at:]...)
}

// filled is a text of n bytes: with and spaces, or where that is longer, asterisks.
func filled(with string, n int) string {
	switch {
	case n <= 0:
		return ""
	case len(with) > n:
		return strings.Repeat("*", n)
	}
	return with + strings.Repeat(" ", n-len(with))
}
