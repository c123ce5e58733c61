package classify

import "unicode/utf8"

// The features of a text are hashes of its word n-grams and of its byte
// n-grams. Words go into the lower half of the table, bytes into the upper.
//
// A text is taken in blocks of a few words. Two neighbouring blocks make a
// window, so windows overlap by half, lie where the text alone puts them, and
// cost nothing more than the text itself.
const (
	halfBits   = 17
	half       = 1 << halfBits
	blockWords = 24
	blockBytes = 320 // ends a block of few words
	headBytes  = 64  // of a text say whether it is data or prose
	headMarks  = 4   // of structure among them make it data
)

// Buckets is how many features n-grams are hashed to.
const Buckets = 2 * half

// scanner turns a text into features. It is fed in pieces that may be cut
// anywhere: what an unfinished word has come to is in its fields.
type scanner struct {
	recent  uint64    // the last eight bytes
	word    uint64    // hash of the word so far, 0 between words
	last    [2]uint64 // the words before it
	more    uint8     // bytes to come of a rune that is a word by itself
	data    bool      // the text begins as data does: JSON, HTML, a table
	marks   int       // bytes of structure within the head
	words   int       // of this block
	size    int       // bytes of this block
	length  int       // bytes so far
	total   int       // words so far
	foreign int       // bytes beyond ASCII
	signs   int       // bytes that are neither space nor part of a word
	hints   [2]int    // common words, turned; see turned.go

	n    int // features in ids
	ids  [bufferSize]uint32
	sums sums
	sink *Features // instead of sums, for training
}

const (
	bufferSize = 256
	perByte    = 3 + 6 // features of a byte that ends a word, at most
)

// Multipliers: odd, without pattern (the fractions of the square roots of small
// primes), one for each kind of n-gram.
const (
	mulWord   = 0x6A09E667F3BCC909
	mulPair   = 0xBB67AE8584CAA73B
	mulTriple = 0x3C6EF372FE94F82B
	mulSkip   = 0xA54FF53A5F1D36F1
	mul3      = 0x510E527FADE682D1
	mul4      = 0x9B05688C2B3E6C1F
	mul5      = 0x1F83D9ABFB41BD6B
	mulData   = 0x5BE0CD19137E2179
)

const (
	inWord    = 1 << iota
	alone     // the first byte of a rune that is a word by itself
	nothing   // passed over within words
	sign      // neither space nor word
	structure // a sign of JSON, HTML or tables
)

var classOf = func() (t [256]uint8) {
	for i := range t {
		switch c := byte(i); {
		case c >= '0' && c <= '9', c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z':
			t[i] = inWord
		case c >= 0xE3: // kana, ideographs and beyond
			t[i] = alone
		case c >= utf8.RuneSelf:
			t[i] = inWord
		case c == '\'':
			t[i] = nothing
		case c == '{', c == '}', c == '[', c == ']', c == '<', c == '>', c == '"', c == '|', c == '=', c == '#':
			t[i] = sign | structure
		case c != ' ':
			t[i] = sign
		}
	}
	return t
}()

func (s *scanner) write(text []byte) {
	recent, word, n := s.recent, s.word, s.n
	foreign := 0
	for i, c := range text {
		if n > bufferSize-perByte {
			s.n = n
			s.flush(false)
			n = 0
		}
		recent = recent<<8 | uint64(c)
		ids := s.ids[n : n+3 : n+3]
		ids[0] = half | uint32((recent&0xFFFFFF)*mul3>>(64-halfBits))
		ids[1] = half | uint32((recent&0xFFFFFFFF)*mul4>>(64-halfBits))
		ids[2] = half | uint32((recent&0xFFFFFFFFFF)*mul5>>(64-halfBits))
		n += 3
		s.size++
		class := classOf[c]
		if class&inWord != 0 && s.more == 0 {
			word = (word ^ uint64(c) + 1) * mulWord
			foreign += int(c >> 7)
		} else if class != nothing || s.more > 0 {
			s.word, s.n = word, n
			s.edge(c, class, s.length+i+1)
			word, n = s.word, s.n
		}
		if s.size >= blockBytes {
			s.n = n
			s.flush(true)
			n = 0
		}
	}
	s.recent, s.word, s.n = recent, word, n
	s.length += len(text)
	s.foreign += foreign
}

// edge takes a byte that ends a word or is a word by itself, or a part of one
// that is. It is the byte before at.
func (s *scanner) edge(c byte, class uint8, at int) {
	switch {
	case s.more > 0:
		s.foreign++
		s.word = (s.word ^ uint64(c)) * mulWord
		if s.more--; s.more == 0 {
			s.endWord()
		}
		return
	case s.word != 0:
		s.endWord()
	}
	switch {
	case class&alone != 0:
		s.foreign++
		s.word = (uint64(c) + 1) * mulWord
		s.more = 2
		if c >= 0xF0 {
			s.more = 3
		}
	case class&sign != 0:
		s.signs++
		if class&structure != 0 && at <= headBytes {
			s.marks++
			s.data = s.marks >= headMarks
		}
	}
}

// end ends the last word and the last block.
func (s *scanner) end() {
	if s.word != 0 {
		s.endWord()
	}
	if s.size > 0 {
		s.flush(true)
	}
}

func (s *scanner) endWord() {
	w := s.word ^ s.word>>29
	a, b := s.last[0], s.last[1]
	n := s.n
	s.ids[n] = uint32(w * mulWord >> (64 - halfBits))
	s.ids[n+1] = uint32((a*mulPair ^ w) * mulPair >> (64 - halfBits))
	s.ids[n+2] = uint32(((b*mulTriple^a)*mulTriple ^ w) * mulTriple >> (64 - halfBits))
	s.ids[n+3] = uint32((b*mulSkip ^ w) * mulSkip >> (64 - halfBits))
	s.n += 4
	if s.data {
		s.ids[n+4] = uint32((w ^ mulData) * mulWord >> (64 - halfBits))
		s.ids[n+5] = uint32((a*mulData ^ w) * mulData >> (64 - halfBits))
		s.n += 2
	}
	s.hint(w)
	s.last = [2]uint64{w, a}
	s.word, s.more = 0, 0
	s.total++
	if s.words++; s.words == blockWords {
		s.flush(true)
	}
}

// flush takes the features of the buffer; the block may end here.
func (s *scanner) flush(block bool) {
	if s.sink != nil {
		s.sink.add(s.ids[:s.n], block)
	} else {
		s.sums.add(s.ids[:s.n], block)
	}
	s.n = 0
	if block {
		s.words, s.size = 0, 0
	}
}
