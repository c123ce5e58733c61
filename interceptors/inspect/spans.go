package inspect

import "slices"

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
	{"email", false}, {"card", false}, {"iban", false}, {"ssn", false}, {"phone", false}, {"ip", false}, {"id", false},
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
	kindPrivateKey
	kindAWS
	kindGitHub
	kindToken
	kindAssigned
)

const (
	numberKinds = 1<<kindCard | 1<<kindSSN | 1<<kindPhone | 1<<kindIP | 1<<kindID
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
	if mask&secretKinds != 0 {
		dst = findSecrets(dst, text, mask)
	}
	return dst
}

func digit(c byte) bool     { return c >= '0' && c <= '9' }
func letter(c byte) bool    { return c|0x20 >= 'a' && c|0x20 <= 'z' }
func alnum(c byte) bool     { return digit(c) || letter(c) }
func tokenChar(c byte) bool { return alnum(c) || c == '_' || c == '-' }

// replace is the text with every span replaced by its kind. Spans that overlap
// are one, of the kind of the first.
func replace(text []byte, spans []span) []byte {
	slices.SortStableFunc(spans, func(a, b span) int { return a.start - b.start })
	out := make([]byte, 0, len(text)+16*len(spans))
	at := 0
	for _, s := range spans {
		if s.start < at {
			at = max(at, s.end)
			continue
		}
		out = append(out, text[at:s.start]...)
		out = append(append(append(out, "[redacted:"...), kinds[s.kind].name...), ']')
		at = s.end
	}
	return append(out, text[at:]...)
}
