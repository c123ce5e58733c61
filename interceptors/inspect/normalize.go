package inspect

import (
	"slices"
	"sync"
	"unicode"
	"unicode/utf8"

	"golang.org/x/text/unicode/norm"
)

// Text is matched in a normalised form, so that one phrase stands for every
// way to write it: compatibility forms (fullwidth, circled, mathematical
// letters) become plain ones, letters lower case, combining marks and
// invisible characters vanish, tag characters become the ASCII that they hide,
// letters that look Latin become Latin, and a run of white space one space.
//
// All of it but the white space is decided rune by rune. So a text may be cut
// anywhere, also inside a rune, without a change in the result.
//
// What depends on case and layout (encodings, keys, numbers) is looked for in
// the folded text: the same, but ASCII stays as it is except for control
// characters. remap leads from there back to the text as it came.

// foldTable maps runes. A missing page or a zero entry leaves the rune as it
// is, foldDrop removes it, foldLong|offset<<8|length is an entry of text, and
// any other value is the rune to put in its place.
type foldTable struct {
	pages [(unicode.MaxRune >> 8) + 1]*[256]uint32
	text  string
	plain [utf8.RuneSelf]byte // the same for ASCII; 0 for what is removed
}

const (
	foldDrop = 1
	foldLong = 1 << 31
	// maxGrowth is how many bytes a byte may become. The few runes that stand
	// for whole sentences (U+FDFA) become a space.
	maxGrowth = 3
)

var folds = sync.OnceValue(newFoldTable)

// lookalikes are letters of other scripts that pass for Latin ones, and Latin
// letters without a decomposition. Upper-case letters are listed where they
// look like another letter than their lower case does.
var lookalikes = map[string]string{
	"a": "аα᧐ɑᴀᎪꓮᎯ", "b": "вВΒβʙƄᏴꓐᗷ", "c": "сϲᴄⅽᏟꓚ", "d": "ԁđɗᴅᎠꓓᗪ", "e": "еєεᴇΕᎬꓰ℮", "f": "ꜰƒ", "g": "ɡɢցᏀꓖ",
	"h": "һнНΗʜհᎻꓧ", "i": "іιıɪӏꓲᏆ", "j": "јϳᴊᎫꓙ", "k": "кκᴋᏦꓗ", "l": "łʟᏞꓡᒪⳑ", "m": "мΜᴍᎷꓟ", "n": "ηпɴոΝꓠ",
	"o": "оοօøᴏσꓳ", "p": "рρᴘᏢꓑ", "q": "ԛգ", "r": "гʀᴦᎡꓣ", "s": "ѕꜱᏚꓢ", "t": "тτᴛᎢꓔ", "u": "υսᴜꓴᑌ", "v": "νѵᴠᏙꓦᐯ",
	"w": "ԝωᴡѡᎳꓪ", "x": "хχꓫ", "y": "уүγʏΥᎩꓬ", "z": "ᴢΖᏃꓜ", "ss": "ß", "ae": "æ", "oe": "œ",
	"'": "‘’‛′ʼ`´", "\"": "“”„‟″«»", "-": "‐‑‒–—―−", "/": "⁄∕", "!": "¡", "?": "¿", "[": "【「", "]": "】」",
	"0": "٠۰", "1": "١۱", "2": "٢۲", "3": "٣۳", "4": "٤۴", "5": "٥۵", "6": "٦۶", "7": "٧۷", "8": "٨۸", "9": "٩۹",
}

func newFoldTable() *foldTable {
	alike := make(map[rune]string)
	for latin, others := range lookalikes {
		for _, r := range others {
			alike[r] = latin
		}
	}
	for i := rune(0); i < 26; i++ {
		l := string('a' + i)
		alike[0x1F150+i], alike[0x1F170+i], alike[0x1F1E6+i] = l, l, l // negative circled, squared; regional indicators
	}
	t := new(foldTable)
	var text []byte
	for _, span := range [][2]rune{{0, 0x323AF}, {0xE0000, 0xE0FFF}} {
		for r := span[0]; r <= span[1]; r++ {
			if r >= 0xD800 && r < 0xE000 {
				continue
			}
			out := foldRune(alike, r)
			for range 3 { // what a rune becomes may itself have something to become
				next := make([]byte, 0, len(out))
				for _, c := range string(out) {
					next = append(next, foldRune(alike, c)...)
				}
				out = next
			}
			if len(out) > maxGrowth*utf8.RuneLen(r) {
				out = []byte{' '}
			}
			var e uint32
			switch c, n := utf8.DecodeRune(out); {
			case len(out) == 0:
				e = foldDrop
			case n == len(out) && c == r:
				continue
			case n == len(out):
				e = uint32(c)
			default:
				e = foldLong | uint32(len(text))<<8 | uint32(len(out))
				text = append(text, out...)
			}
			p := t.pages[r>>8]
			if p == nil {
				p = new([256]uint32)
				t.pages[r>>8] = p
			}
			p[r&0xFF] = e
		}
	}
	t.text = string(text)
	for c := range t.plain {
		switch e := t.pages[0][c]; e {
		case 0:
			t.plain[c] = byte(c)
		case foldDrop:
		default:
			t.plain[c] = byte(e)
		}
	}
	return t
}

// foldRune is one step of what a rune becomes.
func foldRune(alike map[rune]string, r rune) []byte {
	if s, ok := alike[r]; ok {
		return []byte(s)
	}
	if r >= 0xE0020 && r < 0xE007F { // tag characters mirror ASCII
		r -= 0xE0000
	}
	switch {
	case r == '\t' || r == '\n' || r == '\v' || r == '\f' || r == '\r' || r == 0x85 || unicode.Is(unicode.Z, r):
		return []byte{' '}
	case unicode.In(r, unicode.Cc, unicode.Cf, unicode.Mn, unicode.Me) || unicode.Is(unicode.Variation_Selector, r):
		return nil
	case r < utf8.RuneSelf:
		return []byte{byte(unicode.ToLower(r))}
	}
	lower := unicode.ToLower(r)
	if d := norm.NFKD.PropertiesString(string(lower)).Decomposition(); d != nil {
		return d
	}
	if s, ok := alike[lower]; ok {
		return []byte(s)
	}
	if unicode.In(r, unicode.P, unicode.S) {
		return []byte{' '}
	}
	return []byte(string(lower))
}

// isFolded reports whether a text is as appendFolded would leave it.
func isFolded(text []byte) bool {
	for _, c := range text {
		if c >= utf8.RuneSelf || c < ' ' && (c < '\t' || c > '\r') || c == 0x7F {
			return false
		}
	}
	return true
}

// appendFolded appends the folded text to dst.
func appendFolded(dst, text []byte) []byte {
	t := folds()
	for i := 0; i < len(text); {
		var n int
		dst, n = t.fold(dst, text[i:])
		i += n
	}
	return dst
}

// fold appends what the first rune of text is folded to, and returns the rune's
// size.
func (t *foldTable) fold(dst, text []byte) ([]byte, int) {
	if c := text[0]; c < utf8.RuneSelf {
		if c >= ' ' && c != 0x7F || c >= '\t' && c <= '\r' {
			dst = append(dst, c)
		}
		return dst, 1
	}
	r, n := utf8.DecodeRune(text)
	if r == utf8.RuneError && n == 1 {
		return dst, 1
	}
	if r >= 0xFF21 && r <= 0xFF3A { // fullwidth capitals: encodings are written with them, too
		return append(dst, byte(r-0xFF21+'A')), n
	}
	var e uint32
	if p := t.pages[r>>8]; p != nil {
		e = p[r&0xFF]
	}
	switch {
	case e == foldDrop:
	case e == 0:
		dst = append(dst, text[:n]...)
	case e&foldLong != 0:
		at := e &^ foldLong >> 8
		dst = append(dst, t.text[at:at+e&0xFF]...)
	default:
		dst = utf8.AppendRune(dst, rune(e))
	}
	return dst, n
}

// remap turns spans of what step makes of a text into spans of the text. step
// appends what the text begins with becomes, and returns how much that was.
// Every byte that a byte of a span came from is in the span that results.
func remap(text []byte, spans []span, step func(dst, text []byte) ([]byte, int)) {
	starts, ends := make([]*int, len(spans)), make([]*int, len(spans))
	for i := range spans {
		starts[i], ends[i] = &spans[i].start, &spans[i].end
	}
	byValue := func(a, b *int) int { return *a - *b }
	slices.SortFunc(starts, byValue)
	slices.SortFunc(ends, byValue)
	var buf [64]byte
	made := 0
	for at := 0; at < len(text) && len(ends) > 0; {
		out, n := step(buf[:0], text[at:])
		made += len(out)
		for len(starts) > 0 && *starts[0] < made {
			*starts[0] = at
			starts = starts[1:]
		}
		at += n
		for len(ends) > 0 && *ends[0] <= made && len(out) > 0 {
			*ends[0] = at
			ends = ends[1:]
		}
	}
}

// appendPlain appends the normalised form of the ASCII that text begins with to dst, and returns
// what follows, and whether a space there is left out: it is after a space, and at the beginning.
func (t *foldTable) appendPlain(dst, text []byte) (_, rest []byte, space bool) {
	out := slices.Grow(dst, len(text))[:len(dst)+len(text)]
	n, after, i := len(dst), 1, 0
	for ; i < len(text) && text[i] < utf8.RuneSelf; i++ {
		c := t.plain[text[i]]
		if c == 0 {
			continue
		}
		out[n] = c
		blank := int(((uint32(c) ^ ' ') - 1) >> 31) // 1 for a space
		n += 1 - blank&after
		after = blank
	}
	return out[:n], text[i:], after == 1
}

// appendNormal appends the normalised text to dst.
func appendNormal(dst, text []byte) []byte {
	t := folds()
	dst, text, space := t.appendPlain(dst, text)
	put := func(b byte) {
		if b == ' ' && space {
			return
		}
		space = b == ' '
		dst = append(dst, b)
	}
	for i := 0; i < len(text); {
		if c := text[i]; c < utf8.RuneSelf {
			i++
			switch c = t.plain[c]; {
			case c == 0 || c == ' ' && space:
			default:
				space = c == ' '
				dst = append(dst, c)
			}
			continue
		}
		r, n := utf8.DecodeRune(text[i:])
		i += n
		if r == utf8.RuneError && n == 1 {
			continue // not text: as if it were not there
		}
		var e uint32
		if p := t.pages[r>>8]; p != nil {
			e = p[r&0xFF]
		}
		switch {
		case e == foldDrop:
		case e == 0:
			space = false
			dst = append(dst, text[i-n:i]...)
		case e&foldLong != 0:
			at := e &^ foldLong >> 8
			for _, b := range []byte(t.text[at : at+e&0xFF]) {
				put(b)
			}
		case e < utf8.RuneSelf:
			put(byte(e))
		default:
			space = false
			dst = utf8.AppendRune(dst, rune(e))
		}
	}
	return dst
}
