package classify

// A text that is written backwards, or with its letters moved by thirteen, has
// none of the n-grams that say what it is. It is known by its commonest words,
// and read a second time, turned back.

// common are the English words that tell.
var common = []string{"the", "and", "you", "that", "for", "this", "are", "with", "your", "all", "have", "not", "is", "of", "to", "in", "it", "say", "what"}

const (
	leastTurned = 2  // words of common, turned
	turnedShare = 12 // and one word in so many
)

// turnedWords has 1 at the hash of a common word moved by thirteen, 2 at that of
// one written backwards. It goes by eight bits of the hash: full holds the rest.
var turnedWords = func() (t struct {
	full [256]uint64
	way  [256]uint8
}) {
	for _, w := range common {
		for way, f := range []func([]byte) []byte{rot13, reversed} {
			h := uint64(0)
			for _, c := range f([]byte(w)) {
				h = (h ^ uint64(c) + 1) * mulWord
			}
			h ^= h >> 29
			for i := h >> 56; ; i = (i + 1) & 255 {
				if t.way[i] == 0 {
					t.full[i], t.way[i] = h, uint8(way+1)
					break
				}
			}
		}
	}
	return t
}()

// hint counts a word, by its hash, if it is a common one turned.
func (s *scanner) hint(w uint64) {
	for i := w >> 56; turnedWords.way[i] != 0; i = (i + 1) & 255 {
		if turnedWords.full[i] == w {
			s.hints[turnedWords.way[i]-1]++
			return
		}
	}
}

// Turned gives what a normalised text says where it seems to be English written
// backwards or with its letters moved by thirteen, and nil where it does not.
func Turned(normalised []byte) []byte {
	var s scanner
	s.sink = new(Features)
	s.write(normalised)
	s.end()
	return s.turned(normalised)
}

func (s *scanner) turned(text []byte) []byte {
	for way, f := range []func([]byte) []byte{rot13, reversed} {
		if n := s.hints[way]; n >= leastTurned && n*turnedShare >= s.total {
			return f(text)
		}
	}
	return nil
}

func rot13(text []byte) []byte {
	out := make([]byte, len(text))
	for i, c := range text {
		if c >= 'a' && c <= 'z' {
			c = 'a' + (c-'a'+13)%26
		}
		out[i] = c
	}
	return out
}

// reversed takes bytes, not runes: it is for English.
func reversed(text []byte) []byte {
	out := make([]byte, len(text))
	for i, c := range text {
		out[len(text)-1-i] = c
	}
	return out
}
