package inspect

// signs say what may be in a segment.
type signs uint8

const (
	someDigit   signs = 1 << iota // numbers, codes, digits for letters
	someAt                        // an address; or a letter in disguise
	someLong                      // a key; several words in one; base64
	someDashes                    // -----BEGIN
	someSingles                   // a word in letters apart
	someEscape                    // percent, HTML, backslash
	someMixed                     // base64 in groups
)

// Classes of characters of the folded text.
const (
	dropped = iota // nothing is left of it
	blank
	lower
	upper
	numeral
	quote   // may come before a word and after it
	stop    // may come after a word
	inner   // may be in a word: an apostrophe
	sign    // anything else
	foreign // a rune that is not ASCII, of which nothing that a segment holds is made
)

var wordClasses = func() (t [256]uint8) {
	for c := range 128 {
		switch c := byte(c); {
		case c == ' ' || c >= '\t' && c <= '\r':
			t[c] = blank
		case c < ' ' || c == 0x7F:
			t[c] = dropped
		case c >= 'a' && c <= 'z':
			t[c] = lower
		case c >= 'A' && c <= 'Z':
			t[c] = upper
		case digit(c):
			t[c] = numeral
		case c == '"' || c == '(' || c == ')' || c == '[' || c == ']' || c == '{' || c == '}' || c == '*' || c == '`':
			t[c] = quote
		case c == '.' || c == ',' || c == ';' || c == ':' || c == '!' || c == '?':
			t[c] = stop
		case c == '\'':
			t[c] = inner
		default:
			t[c] = sign
		}
	}
	return t
}()

// token is the word at hand, which ends with a space.
type token struct {
	in     bool
	odd    bool // it is no ordinary one
	after  bool // its letters have ended
	alien  bool // the last character is foreign
	mixed  bool // a capital follows a small letter
	size   int  // characters
	small  int
	large  int
	others int // foreign letters
	dashes int // in a row, at hand
	first  [3]byte
}

// extensionWord is the word that goes on with a telephone number; see extensionLength.
const extensionWord = "ext"

// longWord is from where on a word may be several, or a key. Of ordinary words one in
// a thousand is longer.
const longWord = glued

// read takes a character for the segments.
func (f *flow) read(c byte, class uint8, at, next int64) error {
	w := &f.word
	if class == blank {
		if err := f.endWord(at); err != nil {
			return err
		}
		return f.long(next)
	}
	if w.in && w.odd && class == foreign {
		if err := f.endWord(at); err != nil {
			return err
		}
	}
	if !w.in {
		*w = token{in: true}
		if f.pending == 0 && f.signs == 0 {
			f.segment, f.half = place64{at, f.chars - 1}, place64{}
		}
	}
	if w.size < len(w.first) {
		w.first[w.size] = c | 0x20
	}
	w.size++
	if w.size >= longWord {
		w.odd = true
		f.signs |= someLong
	}
	alien := w.alien
	w.alien = false
	switch class {
	case lower, upper:
		w.odd = w.odd || w.after
		if class == lower {
			w.small++
		} else {
			w.mixed = w.mixed || w.small > 0
			w.large++
		}
	case foreign:
		w.alien = true
		w.others++
		if alien && !w.odd { // two in a row are as good as a word
			f.pending = max(0, f.pending-1)
			w.size, w.alien = 1, true
			if f.pending == 0 {
				return f.rest(next)
			}
		}
	case quote:
		w.after = w.after || w.small+w.large+w.others > 0
	case stop:
		w.after = true
		w.odd = w.odd || w.small+w.large+w.others == 0
	case inner:
	case numeral:
		w.odd = true
		f.signs |= someDigit
	default:
		w.odd = true
		switch c {
		case '@', '$':
			f.signs |= someAt
		case '%', '&', '\\':
			f.signs |= someEscape
		}
	}
	if c == '-' {
		if w.dashes++; w.dashes == 3 {
			f.signs |= someDashes
		}
	} else {
		w.dashes = 0
	}
	return f.long(next)
}

// endWord takes the end of a word, at which a segment may end.
func (f *flow) endWord(at int64) error {
	w := &f.word
	if !w.in {
		return nil
	}
	w.in = false
	letters := w.small + w.large + w.others
	switch {
	case w.mixed:
		f.signs |= someMixed
		f.pending = 2
		return nil
	case w.odd, w.large == letters && letters > 1:
		f.pending = 2
		return nil
	case letters == 0:
	case letters == 1:
		if f.singles++; f.singles >= leastSpelled {
			f.signs |= someSingles
		}
		f.pending = max(f.pending, 1)
		return nil
	case letters == 2 && w.size == 2 && isHex(w.first[0]) && isHex(w.first[1]), letters == 3 && string(w.first[:]) == extensionWord:
		f.pending = max(f.pending, 1)
		return nil
	default:
		f.pending = max(0, f.pending-1)
	}
	if f.pending == 0 {
		return f.rest(at)
	}
	return nil
}

// rest ends the segment: nothing goes over this place.
func (f *flow) rest(at int64) error {
	var err error
	if f.signs != 0 {
		err = f.judge(at, at, true)
	}
	f.segment, f.half = place64{at, f.chars}, place64{}
	f.signs, f.singles = 0, 0
	return err
}

// long judges a segment that is too long, in windows.
func (f *flow) long(next int64) error {
	n := f.chars - f.segment.chars
	if n < f.plan.longest {
		return nil
	}
	if f.half == (place64{}) {
		f.half = place64{next, f.chars}
	}
	if n < 2*f.plan.longest {
		return nil
	}
	var err error
	if f.signs != 0 {
		err = f.judge(next, f.half.at, false)
	}
	f.segment, f.half = f.half, place64{next, f.chars}
	return err
}
