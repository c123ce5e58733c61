package inspect

import (
	"encoding/base64"
	"encoding/hex"
	"unicode"
	"unicode/utf8"
)

const (
	// leastEncoded is the shortest run that is taken for encoded text: 24
	// characters of base64 are three words.
	leastEncoded = 24
	// maxDepth is how often what was decoded is decoded again.
	maxDepth = 2
)

// views matches the other texts that a text stands for: what is encoded in it
// as base64, hexadecimal or percent escapes, and what it reads with digits for
// letters. Of an encoded run the whole is decoded or nothing. The work is
// linear in the text: every level is shorter than the one above it.
func (a *automaton) views(s *scratch, text []byte, depth int) (found uint64) {
	word, kinds, percents, leets := 0, 0, 0, 0
	const isLetter, isDigit, notHex, upper, lower = 1, 2, 4, 8, 16
	for i := 0; i <= len(text); i++ {
		var c byte
		if i < len(text) {
			c = text[i]
		}
		k := encodedClass[c]
		if k != 0 {
			kinds |= int(k)
			continue
		}
		n := i - word
		if n >= leastEncoded && kinds&isDigit|kinds&upper != 0 {
			found |= a.decodeRun(s, text[word:i], kinds&notHex == 0, depth)
		} else if n > 2 && n < leastEncoded && kinds&(isDigit|isLetter) == isDigit|isLetter {
			leets++
		}
		if c == '%' && i+2 < len(text) && isHex(text[i+1]) && isHex(text[i+2]) {
			percents++
		}
		if c == '@' || c == '$' {
			leets++
		}
		word, kinds = i+1, 0
	}
	if percents >= 3 {
		out, mark := s.room(len(text))
		out = out[:0]
		for i := 0; i < len(text); i++ {
			if text[i] == '%' && i+2 < len(text) && isHex(text[i+1]) && isHex(text[i+2]) {
				out = append(out, unhex(text[i+1])<<4|unhex(text[i+2]))
				i += 2
				continue
			}
			out = append(out, text[i])
		}
		found |= a.decoded(s, out, depth)
		s.buf = s.buf[:mark]
	}
	if leets >= 2 {
		for _, one := range []byte{'i', 'l'} {
			out, mark := s.room(len(text))
			for i, c := range text {
				switch c {
				case '0':
					c = 'o'
				case '1', '!', '|':
					c = one
				case '3':
					c = 'e'
				case '4', '@':
					c = 'a'
				case '5', '$':
					c = 's'
				case '7', '+':
					c = 't'
				case '8':
					c = 'b'
				case '9':
					c = 'g'
				}
				out[i] = c
			}
			found |= s.whole(a, out)
			s.buf = s.buf[:mark]
		}
	}
	return found
}

// encodedClass tells the characters of base64, standard and URL, from others.
var encodedClass = func() (t [256]byte) {
	const isLetter, isDigit, notHex, upper, lower = 1, 2, 4, 8, 16
	for c := range 256 {
		switch c := byte(c); {
		case digit(c):
			t[c] = isDigit
		case c >= 'a' && c <= 'f':
			t[c] = isLetter | lower
		case c >= 'A' && c <= 'F':
			t[c] = isLetter | upper
		case c >= 'a' && c <= 'z':
			t[c] = isLetter | lower | notHex
		case c >= 'A' && c <= 'Z':
			t[c] = isLetter | upper | notHex
		case c == '+' || c == '/' || c == '-' || c == '_':
			t[c] = notHex
		}
	}
	return t
}()

func isHex(c byte) bool { return digit(c) || c|0x20 >= 'a' && c|0x20 <= 'f' }

func unhex(c byte) byte {
	if digit(c) {
		return c - '0'
	}
	return c | 0x20 - 'a' + 10
}

func (a *automaton) decodeRun(s *scratch, run []byte, hexOnly bool, depth int) uint64 {
	plain, mark := s.room(len(run))
	defer func() { s.buf = s.buf[:mark] }()
	out, _ := s.room(len(run))
	if hexOnly && len(run)%2 == 0 {
		if n, err := hex.Decode(out, run); err == nil && readable(out[:n]) {
			return a.decoded(s, out[:n], depth)
		}
	}
	for i, c := range run {
		switch c {
		case '-':
			c = '+'
		case '_':
			c = '/'
		}
		plain[i] = c
	}
	if len(plain)%4 == 1 { // no encoder ends so: a stray character
		plain = plain[:len(plain)-1]
	}
	n, err := base64.RawStdEncoding.Decode(out, plain)
	if err != nil || !readable(out[:n]) {
		return 0
	}
	return a.decoded(s, out[:n], depth)
}

func (a *automaton) decoded(s *scratch, text []byte, depth int) uint64 {
	found := s.whole(a, text)
	if depth+1 < maxDepth {
		found |= a.views(s, text, depth+1)
	}
	return found
}

// readable reports whether bytes look like text: chance makes one in a
// thousand runs of 24 characters do so.
func readable(text []byte) bool {
	bad := 0
	for i := 0; i < len(text); {
		r, n := utf8.DecodeRune(text[i:])
		if r == utf8.RuneError && n == 1 || r < ' ' && r != '\n' && r != '\t' && r != '\r' || r >= utf8.RuneSelf && !unicode.IsPrint(r) {
			bad++
		}
		i += n
	}
	return bad*10 <= len(text)
}
