package tokens

import "unicode/utf8"

// A text is split into pieces, and each piece into tokens: no token spans two pieces.
// There may be several patterns; each splits the pieces of the one before into what it
// matches and what is between.

// splitting is the splitting of a text of which more may follow.
type splitting struct {
	patterns []*pattern
	joints   *joints
	// piece is called for each piece, in order. sure says that it is one whatever
	// follows; once a piece is not, none after it is.
	piece func(text []byte, sure bool)
}

// segment splits a text that is a piece of the patterns before a level. Of the
// text known bytes are known to belong to it; one more than there are says that
// it ends there.
func (s *splitting) segment(level int, text []byte, known int, sure bool) {
	if level == len(s.patterns) {
		s.piece(text, sure && known > len(text))
		return
	}
	for len(text) > 0 {
		n, within := s.next(level, text, known)
		s.segment(level+1, text[:n], within, sure)
		sure = sure && within > n
		text, known = text[n:], known-n
	}
}

// next is the length of the match of a pattern, or of what comes before the first,
// and how much of that is known; one more than its length if it ends there. Of a match
// that more text could change nothing is known. What is before one can be taken up
// anywhere in it, for no match begins there.
func (s *splitting) next(level int, text []byte, known int) (n, within int) {
	p := s.patterns[level]
	found, sure := s.bounded(p, text, known)
	switch {
	case found > 0 && sure:
		return found, found + 1
	case found > 0:
		return found, 0
	}
	most, within := len(text), len(text)+1
	if level == len(s.patterns)-1 {
		most = cut(text)
	}
	for {
		if !sure {
			within = min(within, n)
		}
		if found > 0 || n >= most {
			break
		}
		_, size := p.of(text[n:])
		if n += size; n >= most {
			n = most
			break
		}
		sets, size := p.of(text[n:])
		if sure = n+size <= known; p.begin == 0 || p.begin&sets != 0 {
			found, sure = s.bounded(p, text[n:], known-n)
		}
	}
	switch {
	case found == 0 && n < len(text): // the window has cut it
		if n = s.part(text, n); known <= window {
			within = min(within, known, n)
		}
	case n == len(text) && known <= n:
		within = min(within, known)
	}
	return n, min(within, n+1)
}

// bounded is the length of the match at the beginning of text, 0 if there is none,
// and whether that is so whatever follows what is known. A match is no longer than the window.
func (s *splitting) bounded(p *pattern, text []byte, known int) (n int, sure bool) {
	end := cut(text)
	n, far := p.find(text[:end])
	if end == len(text) || far <= end {
		return n, far <= known || end < len(text) && known > window
	}
	if n == end {
		n = s.part(text, n)
	}
	return n, known > window
}

// cut is where the window ends: between two characters.
func cut(text []byte) int {
	if len(text) <= window {
		return len(text)
	}
	for n := window - 1; n > window-utf8.UTFMax; n-- {
		if _, size := utf8.DecodeRune(text[n:]); size > window-n {
			return n
		}
	}
	return window
}

// part is where to split a piece that the window has cut: as late as can be in its
// second half where no merge joins what is before with what is after, and else where it
// was cut.
func (s *splitting) part(text []byte, n int) int {
	for k := n; k > n/2; k-- {
		if utf8.RuneStart(text[k]) && !s.joints.join(text[:k], text[k:]) {
			return k
		}
	}
	return n
}

// joints are the pairs of bytes, or of characters, that some merge brings together.
type joints struct {
	bytes [256 * 256 / 64]uint64
	runes map[[2]rune]struct{} // nil: a text begins as bytes
}

func (j *joints) add(left, right string) {
	if j.runes == nil {
		n := int(left[len(left)-1])<<8 | int(right[0])
		j.bytes[n/64] |= 1 << (n % 64)
		return
	}
	l, _ := utf8.DecodeLastRuneInString(left)
	r, _ := utf8.DecodeRuneInString(right)
	j.runes[[2]rune{l, r}] = struct{}{}
}

// join reports whether a token may span the end of one text and the beginning of another.
func (j *joints) join(left, right []byte) bool {
	if j.runes == nil {
		n := int(left[len(left)-1])<<8 | int(right[0])
		return j.bytes[n/64]>>(n%64)&1 == 1
	}
	l, _ := utf8.DecodeLastRune(left)
	r, _ := utf8.DecodeRune(right)
	_, ok := j.runes[[2]rune{l, r}]
	return ok || l == utf8.RuneError || r == utf8.RuneError
}
