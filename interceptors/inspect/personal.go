package inspect

import (
	"bytes"
	"net/netip"
)

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

// findIPv6 finds addresses of at least three groups, two of them with a digit.
func findIPv6(dst []span, text []byte) []span {
	for from := 0; ; {
		n := bytes.IndexByte(text[from:], ':')
		if n < 0 {
			return dst
		}
		at := from + n
		start, end := at, at
		in := func(c byte) bool { return isHex(c) || c == ':' || c == '.' }
		for start > from && at-start < 4 && in(text[start-1]) {
			start--
		}
		colons, digits := 0, 0
		for end < len(text) && end-start < 46 && in(text[end]) {
			if text[end] == ':' {
				colons++
			} else if digit(text[end]) {
				digits++
			}
			end++
		}
		from = end
		if colons < 3 || digits < 2 || start > 0 && (alnum(text[start-1]) || text[start-1] == '.') ||
			end < len(text) && alnum(text[end]) {
			continue
		}
		for end > start && (text[end-1] == '.' || text[end-1] == ':' && text[end-2] != ':') {
			end--
		}
		if a, err := netip.ParseAddr(string(text[start:end])); err == nil && a.Is6() {
			dst = append(dst, span{start, end, kindIP})
		}
	}
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
