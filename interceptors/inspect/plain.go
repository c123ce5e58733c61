package inspect

// plainest is how many bytes a text may have in a row none of which is the third of
// a word or a later one: eight words of one letter or two, and what is between them, are more.
const plainest = 2*leastSpelled - 1

// What a byte may be a part of.
const (
	joins     = 1 << iota // a word, or a run of base64
	capital               // within a word, mixed case
	disguises             // a number, an escape, a letter in disguise
	unfolded              // something that folding changes
)

var plainKinds = func() (t [256]uint8) {
	for c := range t {
		k := encodedClass[c]
		if k != 0 {
			t[c] |= joins
		}
		if k&isUpper != 0 {
			t[c] |= capital
		}
		if k&isDigit != 0 || c == '%' || c == '&' || c == '\\' || c == '@' || c == '$' {
			t[c] |= disguises
		}
		if !isFolded([]byte{byte(c)}) {
			t[c] |= unfolded
		}
	}
	return t
}()

// isPlain reports whether a text is folded, and stands for no other text. It does not
// know of all such texts, but of ordinary ones: without digits, escapes and mixed
// case, words of [glued] letters, and eight words in a row of one letter or two.
func isPlain(text []byte) bool {
	// Bit 63 is the last byte, and so on; 48 bytes at a time are new. Before the text are words
	// of three letters.
	words, capitals := uint64(0x7777777777777777), uint64(0)
	kinds := uint8(0)
	for len(text) > 0 {
		n := min(len(text), 48)
		for _, c := range text[:n] {
			k := plainKinds[c]
			kinds |= k
			words = words>>1 | uint64(k)<<63
			capitals = capitals>>1 | uint64(k&capital)<<62
		}
		text = text[n:]
		if kinds&(disguises|unfolded) != 0 || capitals&(words<<1) != 0 {
			return false
		}
		long := words & (words << 1) // two in a row
		third := long & (words << 2)
		long &= long << 2 // four
		long &= long << 4 // eight
		if long&(long<<(glued-8)) != 0 {
			return false
		}
		short := ^third
		short &= short << 1
		short &= short << 2
		short &= short << 4
		if short&(short<<(plainest-8)) != 0 {
			return false
		}
	}
	return true
}
