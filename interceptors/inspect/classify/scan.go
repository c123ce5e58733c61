package classify

import "unicode/utf8"

// The features of a text are hashes of two kinds of n-grams, each with a part of
// the table to itself: of words, and of the skeleton, which is the text with every
// word replaced by its class (see words.go).
//
// A text is taken in blocks of a few words. Two neighbouring blocks make a
// window, so windows overlap by half, lie where the text alone puts them, and
// cost nothing more than the text itself.
const (
	wordBits     = 19
	skeletonBits = 18

	wordsAt    = 0
	skeletonAt = wordsAt + 1<<wordBits

	blockWords = 12
	blockBytes = 160 // ends a block of few words
	headBytes  = 64  // of a text say whether it is data or prose
	headMarks  = 4   // of structure among them make it data
)

// Buckets is how many features n-grams are hashed to.
const Buckets = skeletonAt + 1<<skeletonBits

// Kind is what a feature is an n-gram of.
type Kind uint8

// The kinds.
const (
	WordNgram Kind = iota
	SkeletonNgram
)

// KindOf is the kind of the features of a bucket.
func KindOf(bucket uint32) Kind {
	if bucket >= skeletonAt {
		return SkeletonNgram
	}
	return WordNgram
}

// How far apart, in words, classes may be that make a feature together.
const (
	nearWord   = 6  // a class, and a word after it
	nearClass  = 10 // two classes
	nearTriple = 16 // three
)

// scanner turns a text into features. It is fed in pieces that may be cut
// anywhere: what an unfinished word has come to is in its fields.
type scanner struct {
	words   *Words
	word    uint64    // hash of the word so far, 0 between words
	letters int       // bytes of it
	last    [2]uint64 // the words before it
	more    uint8     // bytes to come of a rune that is a word by itself
	first   byte      // of the word
	data    bool      // the text begins as data does: JSON, HTML, a table
	marks   int       // bytes of structure within the head
	count   int       // words of this block
	size    int       // bytes of this block
	length  int       // bytes so far
	total   int       // words so far
	foreign int       // bytes beyond ASCII
	signs   int       // bytes that are neither space nor part of a word
	hints   [2]int    // common words, turned; see turned.go

	skeleton uint64                // the last eight classes
	seen     [keptClasses]struct { // classes with a meaning, the latest first
		class uint8
		at    int // what total was
	}

	n    int // features in ids
	ids  [bufferSize]uint32
	sums sums
	sink *Features // instead of sums, for training
}

const (
	keptClasses = 5
	bufferSize  = 256
	// perByte is how many features a byte makes that ends a word, at most: the
	// word's, and those of two steps of the skeleton and of pairs.
	// It leaves room for what a word makes before it ends.
	perByte = 9 + 2*5 + 2*(keptClasses-1) + 2
)

// Multipliers: odd, without pattern (the fractions of the square roots of small
// primes), one for each kind of n-gram.
const (
	mulWord   = 0x6A09E667F3BCC909
	mulPair   = 0xBB67AE8584CAA73B
	mulTriple = 0x3C6EF372FE94F82B
	mulSkip   = 0xA54FF53A5F1D36F1
	mulData   = 0x5BE0CD19137E2179
	mulStem   = 0x510E527FADE682D1
	mulChain  = 0x1F83D9ABFB41BD6B
	mulNear   = 0xCBBB9D5DC1059ED9
	mulAfter  = 0x629A292A367CD507
)

// What a byte is.
const (
	inWord    = 1 << iota
	alone     // the first byte of a rune that is a word by itself
	nothing   // passed over within words
	sign      // neither space nor word
	structure // a sign of JSON, HTML or tables
)

var kindOf = func() (t [256]uint8) {
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
	word, letters, n := s.word, s.letters, s.n
	foreign, from := 0, 0           // of the block at hand
	last := blockBytes - 1 - s.size // at which it ends, if not before
	for i, c := range text {
		kind := kindOf[c]
		if kind&inWord != 0 && s.more == 0 {
			if letters++; letters == 1 {
				s.first = c
			}
			word = (word ^ uint64(c) + 1) * mulWord
			if letters == 4 || letters == 6 { // what inflection leaves of it
				s.ids[n] = wordsAt | uint32((word^word>>29)*mulStem>>(64-wordBits))
				n++
			}
			foreign += int(c >> 7)
		} else if kind != nothing || s.more > 0 || letters == 0 {
			s.word, s.letters, s.n = word, letters, n
			if n > bufferSize-perByte {
				s.flush(false)
			}
			s.edge(c, kind, s.length+i+1)
			word, letters, n = s.word, s.letters, s.n
			if s.count >= blockWords {
				last = i
			}
		}
		if i >= last {
			s.n = n
			s.size += i + 1 - from
			s.flush(true)
			n, from, last = 0, i+1, i+blockBytes
		}
	}
	s.word, s.letters, s.n = word, letters, n
	s.size += len(text) - from
	s.length += len(text)
	s.foreign += foreign
}

// edge takes a byte that ends a word or is a word by itself, or a part of one
// that is. It is the byte before at.
func (s *scanner) edge(c byte, kind uint8, at int) {
	switch {
	case s.more > 0:
		s.foreign++
		s.word = (s.word ^ uint64(c)) * mulWord
		if s.more--; s.more == 0 {
			s.endWord(true)
		}
		return
	case s.word != 0:
		s.endWord(false)
	}
	switch {
	case kind&alone != 0:
		s.foreign++
		s.word, s.first = (uint64(c)+1)*mulWord, c
		s.more = 2
		if c >= 0xF0 {
			s.more = 3
		}
	case kind&sign != 0:
		s.signs++
		if kind&structure != 0 && at <= headBytes {
			s.marks++
			s.data = s.marks >= headMarks
		}
		if c != ',' {
			s.step(signClass[c])
		}
	case kind&nothing != 0:
		s.step(classQuote)
	}
}

// end ends the last word and the last block.
func (s *scanner) end() {
	s.flush(false)
	if s.word != 0 {
		s.endWord(false)
	}
	if s.length > 0 {
		s.step(classFinish)
		s.flush(true)
	}
}

// endWord makes the features of a word; rune says that it is one rune of a
// script without spaces.
func (s *scanner) endWord(rune bool) {
	w := s.word ^ s.word>>29
	a, b := s.last[0], s.last[1]
	pair := (a*mulPair ^ w) * mulPair
	near, before := s.skeleton&0xFF, s.skeleton&0xFFFF
	ids := s.ids[s.n : s.n+9 : s.n+9]
	ids[0] = wordsAt | uint32(w*mulWord>>(64-wordBits))
	ids[1] = wordsAt | uint32(pair>>(64-wordBits))
	ids[2] = wordsAt | uint32(((b*mulTriple^a)*mulTriple^w)*mulTriple>>(64-wordBits))
	ids[3] = wordsAt | uint32((b*mulSkip^w)*mulSkip>>(64-wordBits))
	ids[4] = skeletonAt | uint32(((near+1)*mulAfter^w)*mulAfter>>(64-skeletonBits))
	ids[5] = skeletonAt | uint32(((before+1)*mulChain^w)*mulChain>>(64-skeletonBits))
	n := 6
	if s.data {
		ids[n] = wordsAt | uint32((w^mulData)*mulWord>>(64-wordBits))
		ids[n+1] = wordsAt | uint32((a*mulData^w)*mulData>>(64-wordBits))
		n += 2
	}
	if r := s.seen[0]; r.class != 0 && s.total+1-r.at <= nearWord {
		ids[n] = skeletonAt | uint32((uint64(r.class)*mulNear^w)*mulNear>>(64-skeletonBits))
		n++
	}
	s.n += n
	s.hint(w)
	s.last = [2]uint64{w, a}
	s.word, s.more, s.letters = 0, 0, 0
	s.total++
	class := s.words.class(w)
	if rune {
		if c := s.words.class(pair); c != 0 {
			class = c
		}
	}
	if class == 0 {
		class = classOther
		if s.first >= '0' && s.first <= '9' {
			class = classNumber
		}
	}
	s.step(class)
	if class&meaning != 0 {
		s.meet(class)
	}
	s.count++
}

// step appends a class to the skeleton. Several words without one count as one,
// and so do several signs.
func (s *scanner) step(class uint8) {
	if last := uint8(s.skeleton); class == last && (class == classOther || class == classSign) {
		return
	}
	k := s.skeleton<<8 | uint64(class)
	s.skeleton = k
	ids := s.ids[s.n : s.n+5 : s.n+5]
	ids[0] = skeletonAt | uint32(k<<56*mulTriple>>(64-skeletonBits))
	ids[1] = skeletonAt | uint32((k<<48|1)*mulTriple>>(64-skeletonBits))
	ids[2] = skeletonAt | uint32((k<<40|2)*mulTriple>>(64-skeletonBits))
	ids[3] = skeletonAt | uint32((k<<32|3)*mulTriple>>(64-skeletonBits))
	ids[4] = skeletonAt | uint32((k<<24|4)*mulTriple>>(64-skeletonBits))
	s.n += len(ids)
}

// meet makes the features of a class with those shortly before it.
func (s *scanner) meet(class uint8) {
	for i := range keptClasses - 1 {
		r, q := s.seen[i], s.seen[i+1]
		if r.class == 0 || s.total-r.at > nearClass {
			break
		}
		pair := uint64(r.class)<<8 | uint64(class)
		s.ids[s.n] = skeletonAt | uint32(pair*mulPair>>(64-skeletonBits))
		s.n++
		if q.class != 0 && s.total-q.at <= nearTriple {
			s.ids[s.n] = skeletonAt | uint32((uint64(q.class)<<16|pair)*mulSkip>>(64-skeletonBits))
			s.n++
		}
	}
	copy(s.seen[1:], s.seen[:])
	s.seen[0].class, s.seen[0].at = class, s.total
}

// flush takes the features of the buffer; the block may end here.
func (s *scanner) flush(block bool) {
	size := 0
	if block {
		size = s.size
		s.count, s.size = 0, 0
	}
	if s.sink != nil {
		s.sink.add(s.ids[:s.n], size, block)
	} else {
		s.sums.add(s.ids[:s.n], size, block)
	}
	s.n = 0
}
