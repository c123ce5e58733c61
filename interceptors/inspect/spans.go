package inspect

import (
	"bytes"
	"math"
)

// span is a piece of a text that a detector found.
type span struct {
	start, end int
	kind       int // index in kinds
}

// kinds are the detectors of personal data and secrets. What can be checked is
// checked: a card number by Luhn's digit, an IBAN by its remainder modulo 97.
var kinds = []struct {
	name   string
	secret bool
	find   func(dst []span, text []byte, kind int) []span
}{
	{"email", false, findEmails},
	{"card", false, findCards},
	{"iban", false, findIBANs},
	{"ssn", false, findSSNs},
	{"privatekey", true, findPrivateKeys},
	{"aws", true, prefixed(16, 16, upperDigit, "AKIA", "ASIA")},
	{"github", true, prefixed(36, 255, tokenChar, "ghp_", "gho_", "ghu_", "ghs_", "ghr_", "github_pat_")},
	{"token", true, findTokens},
}

// findSpans finds what the detectors of the mask find: bit i is kinds[i].
func findSpans(dst []span, text []byte, mask uint64) []span {
	for i := range kinds {
		if mask>>i&1 != 0 {
			dst = kinds[i].find(dst, text, i)
		}
	}
	return dst
}

func digit(c byte) bool      { return c >= '0' && c <= '9' }
func letter(c byte) bool     { return c|0x20 >= 'a' && c|0x20 <= 'z' }
func alnum(c byte) bool      { return digit(c) || letter(c) }
func upperDigit(c byte) bool { return digit(c) || c >= 'A' && c <= 'Z' }
func tokenChar(c byte) bool  { return alnum(c) || c == '_' || c == '-' }

func findEmails(dst []span, text []byte, kind int) []span {
	from := 0
	for at := 0; ; at++ {
		n := bytes.IndexByte(text[at:], '@')
		if n < 0 {
			return dst
		}
		at += n
		start := at
		for start > from && at-start < 64 && (alnum(text[start-1]) || bytes.IndexByte([]byte("._%+-"), text[start-1]) >= 0) {
			start--
		}
		for start < at && !alnum(text[start]) {
			start++
		}
		// Labels with a dot between them; the last has two letters at least.
		end, label, last := at+1, 0, 0
		for ; end < len(text) && end-at <= 254; end++ {
			c := text[end]
			if c == '.' && label > 0 && end+1 < len(text) && alnum(text[end+1]) {
				label, last = 0, end+1
				continue
			}
			if !alnum(c) && (c != '-' || label == 0) {
				break
			}
			label++
		}
		if start < at && last > 0 && end-last >= 2 && letter(text[last]) {
			dst = append(dst, span{start, end, kind})
			from, at = end, end-1
		}
	}
}

func findCards(dst []span, text []byte, kind int) []span {
	for i := 0; i < len(text); i++ {
		if !digit(text[i]) || i > 0 && (alnum(text[i-1]) || text[i-1] == '.') {
			continue
		}
		// Digits with single spaces or hyphens between groups.
		var digits [20]byte
		n, end := 0, i
		for j := i; j < len(text); j++ {
			if digit(text[j]) {
				if n == len(digits) {
					break
				}
				digits[n] = text[j] - '0'
				n++
				end = j + 1
				continue
			}
			if (text[j] != ' ' && text[j] != '-') || j+1 == len(text) || !digit(text[j+1]) {
				break
			}
		}
		// The longest length that fits: a number may follow the card's.
		for n >= 13 {
			if n <= 19 && (end == len(text) || !alnum(text[end])) && cardPrefix(digits[:n]) && luhn(digits[:n]) {
				dst = append(dst, span{i, end, kind})
				break
			}
			cut := end // back over the last group
			for cut > i && digit(text[cut-1]) {
				cut--
				n--
			}
			if end = cut - 1; end <= i {
				break
			}
		}
		if n >= 13 {
			i = end - 1
			continue
		}
		for i+1 < len(text) && digit(text[i+1]) {
			i++
		}
	}
	return dst
}

// cardPrefix knows the ranges and lengths of the large issuers (ISO/IEC 7812).
func cardPrefix(d []byte) bool {
	four := int(d[0])*1000 + int(d[1])*100 + int(d[2])*10 + int(d[3])
	switch {
	case d[0] == 4:
		return len(d) == 13 || len(d) == 16 || len(d) == 19
	case four >= 5100 && four < 5600, four >= 2221 && four <= 2720:
		return len(d) == 16
	case four/100 == 34, four/100 == 37, four == 2131, four == 1800:
		return len(d) == 15
	case four == 6011, four/100 == 65, four >= 6440 && four < 6500, four/100 == 62, four >= 3528 && four < 3590:
		return len(d) >= 16
	case four >= 3000 && four < 3060, four/100 == 36, four/100 == 38, four/100 == 39:
		return len(d) == 14
	case four/100 == 50, four >= 5600 && four < 5900, four/100 == 67:
		return len(d) >= 13
	}
	return false
}

func luhn(d []byte) bool {
	sum := 0
	for i := range d {
		v := int(d[len(d)-1-i])
		if i%2 == 1 {
			if v *= 2; v > 9 {
				v -= 9
			}
		}
		sum += v
	}
	return sum%10 == 0
}

// ibanLengths by country (the SWIFT registry of 2024, and its longest for others).
var ibanLengths = map[[2]byte]int{
	{'A', 'D'}: 24, {'A', 'E'}: 23, {'A', 'T'}: 20, {'B', 'E'}: 16, {'B', 'G'}: 22, {'C', 'H'}: 21, {'C', 'Y'}: 28,
	{'C', 'Z'}: 24, {'D', 'E'}: 22, {'D', 'K'}: 18, {'E', 'E'}: 20, {'E', 'S'}: 24, {'F', 'I'}: 18, {'F', 'R'}: 27,
	{'G', 'B'}: 22, {'G', 'I'}: 23, {'G', 'R'}: 27, {'H', 'R'}: 21, {'H', 'U'}: 28, {'I', 'E'}: 22, {'I', 'L'}: 23,
	{'I', 'S'}: 26, {'I', 'T'}: 27, {'L', 'I'}: 21, {'L', 'T'}: 20, {'L', 'U'}: 20, {'L', 'V'}: 21, {'M', 'C'}: 27,
	{'M', 'T'}: 31, {'N', 'L'}: 18, {'N', 'O'}: 15, {'P', 'L'}: 28, {'P', 'T'}: 25, {'R', 'O'}: 24, {'R', 'S'}: 22,
	{'S', 'A'}: 24, {'S', 'E'}: 24, {'S', 'I'}: 19, {'S', 'K'}: 24, {'T', 'R'}: 26, {'U', 'A'}: 29,
}

func findIBANs(dst []span, text []byte, kind int) []span {
	for i := 0; i+15 <= len(text); i++ {
		if !letter(text[i]) || !letter(text[i+1]) || !digit(text[i+2]) || !digit(text[i+3]) || i > 0 && alnum(text[i-1]) {
			continue
		}
		want := ibanLengths[[2]byte{text[i] &^ 0x20, text[i+1] &^ 0x20}]
		var chars [34]byte
		n, j := 0, i
		for ; j < len(text) && n < len(chars) && (want == 0 || n < want); j++ {
			c := text[j]
			if (c == ' ' || c == '-') && j+1 < len(text) && alnum(text[j+1]) && (want > 0 || n%4 == 0) {
				continue
			}
			if !alnum(c) {
				break
			}
			if letter(c) {
				c &^= 0x20
			}
			chars[n] = c
			n++
		}
		if n < 15 || n != want && want != 0 || j < len(text) && alnum(text[j]) || !mod97(chars[:n]) {
			continue
		}
		dst = append(dst, span{i, j, kind})
		i = j - 1
	}
	return dst
}

func mod97(c []byte) bool {
	r := 0
	for i := range c {
		v := c[(i+4)%len(c)]
		if digit(v) {
			r = (r*10 + int(v-'0')) % 97
		} else {
			r = (r*100 + int(v-'A') + 10) % 97
		}
	}
	return r == 1
}

// findSSNs finds US social security numbers, written with hyphens.
func findSSNs(dst []span, text []byte, kind int) []span {
	for i := 0; i+11 <= len(text); i++ {
		s := text[i : i+11]
		if s[3] != '-' || s[6] != '-' || i > 0 && (alnum(text[i-1]) || text[i-1] == '-') ||
			i+11 < len(text) && (alnum(text[i+11]) || text[i+11] == '-') {
			continue
		}
		ok := true
		for j, c := range s {
			ok = ok && (j == 3 || j == 6 || digit(c))
		}
		area := string(s[:3])
		if ok && area != "000" && area != "666" && s[0] != '9' && string(s[4:6]) != "00" && string(s[7:]) != "0000" {
			dst = append(dst, span{i, i + 11, kind})
			i += 10
		}
	}
	return dst
}

func findPrivateKeys(dst []span, text []byte, kind int) []span {
	begin, end := []byte("-----BEGIN "), []byte("-----END ")
	for at := 0; ; {
		n := bytes.Index(text[at:], begin)
		if n < 0 {
			return dst
		}
		start := at + n
		at = start + len(begin)
		head := text[at:min(len(text), at+40)]
		n = bytes.Index(head, []byte("PRIVATE KEY"))
		if n < 0 {
			continue
		}
		at += n
		stop := len(text) // without an end, all that follows
		if n := bytes.Index(text[at:], end); n >= 0 {
			stop = at + n
			if line := bytes.Index(text[stop+len(end):], []byte("-----")); line >= 0 && line < 40 {
				stop += len(end) + line + 5
			}
		}
		dst = append(dst, span{start, stop, kind})
		at = stop
	}
}

// prefixed finds tokens that say what they are in their first characters.
func prefixed(least, most int, in func(byte) bool, prefixes ...string) func([]span, []byte, int) []span {
	list := make([][]byte, len(prefixes))
	for i, p := range prefixes {
		list[i] = []byte(p)
	}
	return func(dst []span, text []byte, kind int) []span {
		for _, p := range list {
			for at := 0; ; {
				n := bytes.Index(text[at:], p)
				if n < 0 {
					break
				}
				start := at + n
				end := start + len(p)
				for end < len(text) && end-start-len(p) <= most && in(text[end]) {
					end++
				}
				size := end - start - len(p)
				at = end
				if size >= least && size <= most && (start == 0 || !alnum(text[start-1])) &&
					(end == len(text) || !alnum(text[end])) && mixed(text[start+len(p):end]) {
					dst = append(dst, span{start, end, kind})
				}
			}
		}
		return dst
	}
}

var (
	findVendorTokens = prefixed(20, 512, tokenChar, "sk-", "sk_live_", "rk_live_", "hf_", "glpat-", "xoxb-", "xoxp-", "xoxa-", "xoxs-",
		"npm_", "pypi-", "dop_v1_", "shpat_", "SG.", "AIza")
	bearer = []byte("earer ")
)

// findTokens finds the tokens of well-known vendors, bearer tokens and JWTs.
func findTokens(dst []span, text []byte, kind int) []span {
	dst = findVendorTokens(dst, text, kind)
	in := func(c byte) bool { return tokenChar(c) || bytes.IndexByte([]byte("./+=~"), c) >= 0 }
	for at := 0; ; {
		n := bytes.Index(text[at:], bearer)
		if n < 0 {
			break
		}
		start := at + n + len(bearer)
		end := start
		for end < len(text) && in(text[end]) {
			end++
		}
		if end-start >= 20 && mixed(text[start:end]) {
			dst = append(dst, span{start, end, kind})
		}
		at = end
	}
	for at := 0; ; {
		n := bytes.Index(text[at:], []byte("eyJ"))
		if n < 0 {
			return dst
		}
		start := at + n
		end, dots := start, 0
		for end < len(text) && (tokenChar(text[end]) || text[end] == '.' && dots < 2) {
			if text[end] == '.' {
				dots++
			}
			end++
		}
		if dots == 2 && end-start >= 40 && (start == 0 || !alnum(text[start-1])) {
			dst = append(dst, span{start, end, kind})
		}
		at = max(end, start+3)
	}
}

// mixed reports whether a token looks drawn at random: its characters have at
// least 3 bits of entropy each, which words and placeholders do not reach.
func mixed(token []byte) bool {
	var count [256]int
	for _, c := range token {
		count[c]++
	}
	bits := 0.0
	for _, n := range count {
		if n > 0 {
			p := float64(n) / float64(len(token))
			bits -= p * math.Log2(p)
		}
	}
	return bits >= 3
}

// replace is the text with every span replaced by its kind. Where spans
// overlap, the first one stands.
func replace(text []byte, spans []span) []byte {
	for i := 1; i < len(spans); i++ { // few, and sorted by kind already
		for j := i; j > 0 && spans[j].start < spans[j-1].start; j-- {
			spans[j], spans[j-1] = spans[j-1], spans[j]
		}
	}
	out := make([]byte, 0, len(text)+16*len(spans))
	at := 0
	for _, s := range spans {
		if s.end <= at {
			continue
		}
		if s.start > at {
			out = append(out, text[at:s.start]...)
		}
		out = append(append(append(out, "[redacted:"...), kinds[s.kind].name...), ']')
		at = s.end
	}
	return append(out, text[at:]...)
}
