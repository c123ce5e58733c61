package inspect

import (
	"bytes"
	"encoding/base64"
	"encoding/hex"
)

// group takes a word that may be one of several groups of base64, as encoders
// break it into lines: all of one length, but for a shorter last one.
func (v *view) group(from, to int, kinds uint8) {
	g := &v.groups
	n := to - from
	if g.count > 0 && (n > g.width || g.chars%g.width != 0) {
		v.closeGroups()
	}
	if g.count == 0 {
		if n%4 != 0 {
			return
		}
		*g = run{from: from, width: n}
	}
	g.end, g.count, g.chars = to, g.count+1, g.chars+n
	if kinds&isDigit != 0 || kinds&(isUpper|isLower) == isUpper|isLower && hasInnerUpper(v.text[from:to]) {
		g.odd++
	}
}

func hasInnerUpper(w []byte) bool {
	for _, c := range w[1:] {
		if c >= 'A' && c <= 'Z' {
			return true
		}
	}
	return false
}

// closeGroups ends a run of groups.
func (v *view) closeGroups() {
	g := v.groups
	v.groups = run{}
	if g.count < 2 || g.chars < leastEncoded || g.odd*2 < g.count ||
		g.count == 2 && bytes.IndexByte(v.text[g.from+g.width:g.end], '\n') < 0 {
		return
	}
	out, mark := v.room(g.chars)
	out = out[:0]
	for _, c := range v.text[g.from:g.end] {
		if encodedClass[c] != 0 {
			out = append(out, c)
		}
	}
	v.decodeRun(out, g.from, g.end, false)
	v.buf = v.buf[:mark]
}

// code takes a word that may be the code of a character.
func (v *view) code(from, to int, kinds uint8) {
	w, width := v.text[from:to], 0
	switch n := to - from; {
	case n == 4 && w[0] == '0' && w[1]|0x20 == 'x' && isHex(w[2]) && isHex(w[3]):
		width = 4
	case kinds == isDigit && n == 8 && isBinary(w):
		width = 8
	case kinds == isDigit && (n == 2 || n == 3):
		width = 3
	case n == 2 && kinds&notHex == 0:
		width = 2
	}
	c := &v.codes
	switch {
	case width == 0:
		v.closeCodes()
		return
	case c.count > 0 && c.width == 3 && width == 2 && allPairs(v.text[c.from:c.end]):
		c.width = 2 // digits so far, of hexadecimal
	case c.count > 0 && c.width == 2 && to-from == 2:
	case c.count == 0 || c.width != width:
		v.closeCodes()
		*c = run{from: from, width: width}
	}
	c.count++
	c.end = to
}

func isBinary(w []byte) bool {
	for _, c := range w {
		if c != '0' && c != '1' {
			return false
		}
	}
	return true
}

// allPairs reports whether every code in a run so far has two digits. A run
// that turns hexadecimal does so soon: the look back is bounded.
func allPairs(w []byte) bool {
	n := 0
	for i, c := range w {
		if i > 256 {
			return false
		}
		if digit(c) {
			if n++; n > 2 {
				return false
			}
			continue
		}
		n = 0
	}
	return true
}

// closeCodes ends a run of codes.
func (v *view) closeCodes() {
	c := v.codes
	v.codes = run{}
	if c.count < leastCodes {
		return
	}
	in := v.text[c.from:c.end]
	v.decodeCodes(c, in, c.width)
	if c.width == 3 && allPairs(in) { // two digits each: it may be either
		v.decodeCodes(c, in, 2)
	}
}

func (v *view) decodeCodes(c run, in []byte, width int) {
	out, mark := v.room(c.count)
	out = out[:0]
	value, digits := 0, false
	for i := 0; i <= len(in); i++ {
		if i == len(in) || encodedClass[in[i]]&(isDigit|isLetter) == 0 {
			if digits && len(out) < cap(out) {
				out = append(out, byte(min(value, 0xFF))) // a larger number is no byte
			}
			value, digits = 0, false
			continue
		}
		digits = true
		switch b := in[i]; width {
		case 8:
			value = value<<1 | int(b-'0')
		case 3:
			value = value*10 + int(b-'0')
		default:
			if isHex(b) { // not the x of 0x
				value = value<<4 | int(unhex(b))
			}
		}
	}
	v.child(out, c.from, c.end)
	v.buf = v.buf[:mark]
}

// decodeRun reads a run of base64 or hexadecimal. Of a run the whole is decoded
// or nothing; what is not text in it matches nothing.
func (v *view) decodeRun(w []byte, from, to int, hexOnly bool) {
	plain, mark := v.room(len(w))
	out, _ := v.room(len(w))
	defer func() { v.buf = v.buf[:mark] }()
	if hexOnly && len(w)%2 == 0 {
		if n, err := hex.Decode(out, w); err == nil {
			v.child(out[:n], from, to)
		}
		return
	}
	for i, c := range w {
		switch c {
		case '-':
			c = '+'
		case '_':
			c = '/'
		}
		plain[i] = c
	}
	// What stands before it may have run into it: the four ways to begin.
	for skip := range min(4, len(plain)) {
		p := plain[skip:]
		if skip > 0 && !reads(out, p) {
			continue
		}
		if len(p)%4 == 1 { // no encoder ends so: a stray character
			p = p[:len(p)-1]
		}
		n, err := base64.RawStdEncoding.Decode(out, p)
		if err != nil && n == 0 {
			continue
		}
		v.child(out[:n], from, to)
		if skip > 0 || readable(out[:min(n, 48)]) {
			return
		}
	}
}

// reads reports whether some part of a run of base64 is text: what stands before it may be long.
func reads(room, run []byte) bool {
	const part, parts = 64, 8
	for at := 0; at < len(run); at += max(part, len(run)/parts&^3) {
		p := run[at:min(len(run)&^3, at+part)]
		if n, err := base64.RawStdEncoding.Decode(room, p); err == nil && n*4 >= leastEncoded*3 && readable(room[:n]) {
			return true
		}
	}
	return false
}

// readable reports whether bytes look like ASCII text, or its UTF-16.
func readable(text []byte) bool {
	good := 0
	for _, c := range text {
		if c >= ' ' && c < 0x7F || c == '\n' || c == '\t' || c == '\r' || c == 0 {
			good++
		}
	}
	return good*10 >= len(text)*9
}
