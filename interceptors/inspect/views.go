package inspect

const (
	// leastEncoded is the shortest run that is taken for encoded text: 24
	// characters of base64 are three words.
	leastEncoded = 24
	// leastSpelled is the shortest run of letters apart that is taken for words.
	leastSpelled = 8
	// leastCodes is the shortest run of character codes that is taken for text.
	leastCodes = 8
	// glued is the length from which a run of letters may be several words, and
	// longestGlued the one from which it is none.
	glued, longestGlued = 14, 512
	// maxDepth is how often what was decoded is decoded again. What is encoded still
	// is refused.
	maxDepth = 3
	// maxWork bounds the bytes of all texts that one text stands for, as a
	// multiple of its own; smallWork is added so that short texts are not
	// refused for what costs nothing. Source code with long names, certificates and
	// escapes comes to 8, seldom: a text beyond was made to be costly, and is refused
	// as hidden text.
	maxWork, smallWork = 9, 1 << 12
)

// views looks at the other texts that a folded text stands for: what is encoded
// in it (base64, hexadecimal, character codes), what its escapes mean (percent,
// HTML, backslash), what it reads with digits for letters, and what it spells
// letter by letter. Every level is shorter than the one above it.
func (s *scratch) views(text []byte, mask uint64, depth int) {
	mark := len(s.letters)
	defer func() { s.letters = s.letters[:mark] }()
	v := view{scratch: s, text: text, mask: mask, depth: depth, spelled: -1}
	word, kinds := 0, uint8(0)
	var escaped [4]byte
	for i := 0; i <= len(text); i++ {
		c := byte(0)
		if i < len(text) {
			c = text[i]
		}
		if k := encodedClass[c]; k != 0 {
			kinds |= k
			continue
		}
		if i > word {
			v.word(word, i, kinds)
		}
		switch c {
		case '%', '&', '\\':
			if !v.escaped {
				_, n := unescape(escaped[:0], text[i:])
				v.escaped = n > 1
			}
		case '@', '$':
			v.leets++
		case ' ', '\n', '\r', '\t':
		default:
			v.closeGroups()
		}
		word, kinds = i+1, 0
	}
	v.closeSpelled()
	v.closeGroups()
	v.closeCodes()
	if v.escaped && (depth < maxDepth || v.doubts == 0 && legible(text)) {
		v.unescaped() // where the rest is looked for, too
		return
	}
	if mask&surfaceMask == 0 {
		return
	}
	if v.leets >= 2 {
		v.leet()
	}
	if len(s.letters) > mark && s.spend(len(s.letters)-mark) {
		s.found |= s.spelled.spell(s.letters[mark:])
		if s.canarySpelled != nil {
			s.found |= s.canarySpelled.spell(s.letters[mark:])
		}
	}
}

// view is a pass over a text in search of the texts that it stands for.
type view struct {
	*scratch
	text    []byte
	mask    uint64
	depth   int
	escaped bool // there is an escape
	leets   int  // words with digits for letters; what is surely none counts half
	spelled int  // where in letters the run of single letters began, or -1
	groups  run  // of base64 in groups
	codes   run  // of character codes
}

// run is a run of words that may be parts of one encoding.
type run struct {
	from, end int
	count     int // of words
	chars     int
	odd       int // words that look encoded
	width     int // of a code: 2 hexadecimal, 8 binary, 3 decimal; 4 hexadecimal after "0x"
}

// Classes of characters, by bits.
const (
	isLetter = 1 << iota
	isDigit
	notHex
	isUpper
	isLower
	isMark
)

// encodedClass tells the characters of base64, standard and URL, from others.
var encodedClass = func() (t [256]uint8) {
	for c := range 256 {
		switch c := byte(c); {
		case digit(c):
			t[c] = isDigit
		case c >= 'a' && c <= 'z':
			t[c] = isLetter | isLower
		case c >= 'A' && c <= 'Z':
			t[c] = isLetter | isUpper
		case c == '+' || c == '/' || c == '-' || c == '_':
			t[c] = isMark | notHex
		}
		if letter(byte(c)) && c|0x20 > 'f' {
			t[c] |= notHex
		}
	}
	return t
}()

// word takes a run of characters of base64.
func (v *view) word(from, to int, kinds uint8) {
	n := to - from
	if kinds&(isDigit|isUpper|isMark) == 0 && n > 2 && n < glued && v.groups.count+v.codes.count == 0 && v.spelled < 0 {
		return // an ordinary word
	}
	w := v.text[from:to]
	if n == 1 && kinds&isMark == 0 {
		if v.spelled < 0 {
			v.spelled = len(v.letters)
		}
		v.letters = append(v.letters, unleet(w[0]))
	} else {
		v.closeSpelled()
	}
	v.code(from, to, kinds)
	v.group(from, to, kinds)
	if n >= leastEncoded && kinds&(isDigit|isUpper) != 0 {
		v.decodeRun(w, from, to, kinds&notHex == 0)
	}
	switch {
	case kinds&isMark != 0 && n >= 2*leastSpelled-1 && n <= longestGlued:
		v.dashed(w)
	case n >= glued && n <= longestGlued && kinds&isLetter != 0:
		for _, c := range w {
			v.letters = append(v.letters, unleet(c))
		}
		v.letters = append(v.letters, 0)
	}
	if n > 2 && n < leastEncoded && kinds&(isDigit|isLetter) == isDigit|isLetter {
		v.leets++
		for i := 1; i+1 < n; i++ {
			if digit(w[i]) && letter(w[i-1]) && letter(w[i+1]) {
				v.leets++
				break
			}
		}
	}
}

// dashed takes a word that may be letters with marks between them.
func (v *view) dashed(w []byte) {
	marks := 0
	for _, c := range w {
		if encodedClass[c]&isMark != 0 {
			marks++
		}
	}
	if marks*5 < len(w)*2 { // two of five: letters one by one, but for a slip
		return
	}
	for _, c := range w {
		if encodedClass[c]&isMark == 0 {
			v.letters = append(v.letters, unleet(c))
		}
	}
	v.letters = append(v.letters, 0)
}

// closeSpelled ends a run of single letters.
func (v *view) closeSpelled() {
	if v.spelled < 0 {
		return
	}
	if len(v.letters)-v.spelled < leastSpelled {
		v.letters = v.letters[:v.spelled]
	} else {
		v.letters = append(v.letters, 0)
	}
	v.spelled = -1
}

// unleet is the letter in lower case that a character may stand for.
func unleet(c byte) byte {
	switch c {
	case '0':
		return 'o'
	case '1', '!', '|':
		return 'i'
	case '3':
		return 'e'
	case '4', '@':
		return 'a'
	case '5', '$':
		return 's'
	case '7':
		return 't'
	case '8':
		return 'b'
	case '9':
		return 'g'
	}
	if c >= 'A' && c <= 'Z' {
		c |= 0x20
	}
	return c
}

// leet reads the text with digits for letters; 1 may be i or l.
func (v *view) leet() {
	either := false
	for _, one := range []byte{'i', 'l'} {
		out, mark := v.room(len(v.text))
		for i, c := range v.text {
			switch c {
			case '1', '!', '|':
				c, either = one, true
			case '+':
				c = 't'
			default:
				c = unleet(c)
			}
			out[i] = c
		}
		v.match(out)
		v.show(out)
		v.buf = v.buf[:mark]
		if !either {
			return
		}
	}
}

// child reads what was decoded from a part of the text. Where something is to
// be replaced in it, that is the whole part. What is text still, as all is that it was
// decoded from, and deeper than is read, is too deep. Of long names and of numbers
// something can be decoded, too, and something of that by chance.
func (v *view) child(text []byte, from, to int) {
	plain := readable(text)
	if v.depth == maxDepth {
		v.over = v.over || v.doubts == 0 && len(text) >= leastCodes && plain
		return
	}
	mark := len(v.spans)
	if !plain {
		v.doubts++
		defer func() { v.doubts-- }()
	}
	v.layer(text, v.mask, v.depth+1)
	var kinds uint64
	n := mark
	for _, x := range v.spans[mark:] {
		if kinds>>x.kind&1 == 0 {
			kinds |= 1 << x.kind
			v.spans[n] = span{from, to, x.kind}
			n++
		}
	}
	v.spans = v.spans[:n]
}

// unescaped reads the text with its escapes replaced by what they mean.
func (v *view) unescaped() {
	if v.depth == maxDepth {
		v.over = true
		return
	}
	out, mark := v.room(len(v.text))
	out = out[:0]
	for i := 0; i < len(v.text); {
		if c := v.text[i]; c != '%' && c != '&' && c != '\\' {
			out = append(out, c)
			i++
			continue
		}
		var n int
		out, n = unescape(out, v.text[i:])
		i += n
	}
	at := len(v.spans)
	v.layer(out, v.mask, v.depth+1)
	if len(v.spans) > at {
		remap(v.text, v.spans[at:], unescape)
	}
	v.buf = v.buf[:mark]
}
