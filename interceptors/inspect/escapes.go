package inspect

import (
	"bytes"
	"unicode/utf16"
	"unicode/utf8"
)

// entities are HTML's names for what may split or stand between words.
var entities = map[string]string{
	"lt": "<", "gt": ">", "amp": "&", "quot": `"`, "apos": "'", "nbsp": " ", "ensp": " ", "emsp": " ", "thinsp": " ",
	"Tab": "\t", "NewLine": "\n", "shy": "", "zwj": "", "zwnj": "", "lrm": "", "rlm": "", "ZeroWidthSpace": "",
	"excl": "!", "colon": ":", "comma": ",", "period": ".", "lowbar": "_", "hyphen": "-", "sol": "/", "bsol": `\`,
	"lpar": "(", "rpar": ")", "lsqb": "[", "rsqb": "]", "commat": "@", "num": "#", "equals": "=", "quest": "?",
}

// unescape appends what text begins with, an escape or a byte, as what it
// means, and returns how many bytes that was: more than one for an escape, none
// of which becomes longer. It knows percent, HTML's entities, and the
// backslashes of C, JSON and their kin. However often one of their own signs was
// escaped, it becomes that sign at once, and what that begins is read next time.
func unescape(dst, text []byte) ([]byte, int) {
	switch text[0] {
	case '%':
		if n := again(text, "25"); n > 0 {
			return append(dst, '%'), 1 + n
		}
		if len(text) > 2 && isHex(text[1]) && isHex(text[2]) {
			return append(dst, unhex(text[1])<<4|unhex(text[2])), 3
		}
		if len(text) > 5 && text[1]|0x20 == 'u' { // of JavaScript's escape
			if r, ok := hexRune(text[2:6]); ok {
				return utf8.AppendRune(dst, r), 6
			}
		}
	case '&':
		if n := again(text, "amp;"); n > 0 {
			return append(dst, '&'), 1 + n
		}
		return entity(dst, text)
	case '\\':
		if n := again(text, `\`); n > 0 {
			return append(dst, '\\'), 1 + n
		}
		return backslash(dst, text)
	}
	return append(dst, text[0]), 1
}

// mostAgain is how often a sign of escapes may be escaped. Nobody nests as deep.
const mostAgain = 32

// again is how many bytes of what makes an escape's sign of itself follow it.
func again(text []byte, self string) int {
	n := 0
	for n < mostAgain*len(self) && len(text)-1-n >= len(self) && string(text[1+n:1+n+len(self)]) == self {
		n += len(self)
	}
	return n
}

func entity(dst, text []byte) ([]byte, int) {
	if len(text) < 3 {
		return append(dst, '&'), 1
	}
	if text[1] != '#' {
		end := bytes.IndexByte(text[:min(len(text), 18)], ';')
		if end > 0 {
			if s, ok := entities[string(text[1:end])]; ok {
				return append(dst, s...), end + 1
			}
		}
		return append(dst, '&'), 1
	}
	i, base := 2, rune(10)
	if text[2]|0x20 == 'x' {
		i, base = 3, 16
	}
	var r rune
	from := i
	for ; i < len(text) && i < from+9 && r <= utf8.MaxRune; i++ {
		c := text[i]
		if !digit(c) && (base == 10 || !isHex(c)) {
			break
		}
		r = r*base + rune(unhex(c))
	}
	if i == from {
		return append(dst, '&'), 1
	}
	if i < len(text) && text[i] == ';' {
		i++
	}
	return appendShort(dst, r, i), i
}

func backslash(dst, text []byte) ([]byte, int) {
	if len(text) < 2 {
		return append(dst, '\\'), 1
	}
	switch c := text[1]; {
	case c == 'n' || c == 'r' || c == 't':
		return append(dst, ' '), 2
	case c == '"' || c == '\'' || c == '/':
		return append(dst, c), 2
	case c == 'x' && len(text) > 3 && isHex(text[2]) && isHex(text[3]):
		return append(dst, unhex(text[2])<<4|unhex(text[3])), 4
	case c == 'u' && len(text) > 3 && text[2] == '{':
		if end := bytes.IndexByte(text[:min(len(text), 11)], '}'); end > 3 {
			if r, ok := hexRune(text[3:end]); ok {
				return appendShort(dst, r, end+1), end + 1
			}
		}
	case c == 'u' && len(text) > 5:
		r, ok := hexRune(text[2:6])
		if !ok {
			break
		}
		if utf16.IsSurrogate(r) && len(text) > 11 && text[6] == '\\' && text[7] == 'u' {
			if low, ok := hexRune(text[8:12]); ok {
				if pair := utf16.DecodeRune(r, low); pair != utf8.RuneError {
					return utf8.AppendRune(dst, pair), 12
				}
			}
		}
		return utf8.AppendRune(dst, r), 6
	case c == 'U' && len(text) > 9:
		if r, ok := hexRune(text[2:10]); ok {
			return utf8.AppendRune(dst, r), 10
		}
	case c >= '0' && c <= '3' && len(text) > 3 && octal(text[2]) && octal(text[3]):
		return append(dst, (c-'0')<<6|(text[2]-'0')<<3|(text[3]-'0')), 4
	}
	return append(dst, '\\'), 1
}

// appendShort appends a rune, but not more than n bytes.
func appendShort(dst []byte, r rune, n int) []byte {
	if utf8.RuneLen(r) < 0 || utf8.RuneLen(r) > n {
		return append(dst, ' ')
	}
	return utf8.AppendRune(dst, r)
}

func octal(c byte) bool { return c >= '0' && c <= '7' }

func hexRune(digits []byte) (r rune, ok bool) {
	for _, c := range digits {
		if !isHex(c) || r > utf8.MaxRune {
			return 0, false
		}
		r = r<<4 | rune(unhex(c))
	}
	return r, true
}

func isHex(c byte) bool { return digit(c) || c|0x20 >= 'a' && c|0x20 <= 'f' }

func unhex(c byte) byte {
	if digit(c) {
		return c - '0'
	}
	return c | 0x20 - 'a' + 10
}

// wide reports whether bytes are UTF-16, and its order: they begin with its
// mark, or ASCII among them shows as zeros at every other place.
func wide(text []byte) (big, ok bool) {
	if len(text) < 4 || len(text)%2 != 0 {
		return false, false
	}
	if text[0] == 0xFE && text[1] == 0xFF || text[0] == 0xFF && text[1] == 0xFE {
		return text[0] == 0xFE, true
	}
	var zeros [2]int
	for i, c := range text {
		if c == 0 {
			zeros[i&1]++
		}
	}
	switch least := max(len(text)/32, 1); {
	case zeros[0] >= least && zeros[1] == 0:
		return true, true
	case zeros[1] >= least && zeros[0] == 0:
		return false, true
	}
	return false, false
}

// appendWide appends UTF-16 as UTF-8, which is half as long again at most.
func appendWide(dst, text []byte, big bool) []byte {
	unit := func(i int) rune {
		if big {
			return rune(text[i])<<8 | rune(text[i+1])
		}
		return rune(text[i+1])<<8 | rune(text[i])
	}
	for i := 0; i+1 < len(text); i += 2 {
		r := unit(i)
		if utf16.IsSurrogate(r) && i+3 < len(text) {
			if pair := utf16.DecodeRune(r, unit(i+2)); pair != utf8.RuneError {
				r = pair
				i += 2
			}
		}
		dst = utf8.AppendRune(dst, r)
	}
	return dst
}
