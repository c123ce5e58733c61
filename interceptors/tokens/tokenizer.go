package tokens

import (
	"fmt"
	"math"
	"sync"
	"unicode/utf8"
)

// Tokenizer is a byte pair encoding: a vocabulary, the merges that make its tokens of
// shorter ones, and the patterns that split a text first. It is immutable and safe
// for concurrent use. A nil Tokenizer counts words.
//
// It says what the library says that the file was made for, but for this: of a run of
// more than 256 bytes without a place to split, each 256 bytes may be a few tokens more
// or less; a text is taken as it is, where some tokenizers compose its characters first
// (NFC); where they put or drop a space beside an added token, it may be one token off;
// and tokens that a server adds, as for the beginning of a text, are not in it.
type Tokenizer struct {
	patterns []*pattern
	added    *added
	byID     []string         // what a token stands for; "" if there is none
	words    map[string]int32 // pieces that are one token
	pairs    map[uint64]uint64
	joints   joints
	bytes    [256]int32
	runes    map[rune]int32 // nil: a text begins as bytes, else as characters
	fuses    bool           // characters that are not in the vocabulary are one token in a row
	prefix   prefix
	merging  sync.Pool // *merger
}

// prefix is whether a text gets a space before it.
type prefix uint8

const (
	noPrefix    prefix = iota
	prefixed           // unless it begins with one
	alwaysAdded        // also then
)

// none is the token of a character that is not in the vocabulary, and the merge of
// tokens that have none.
const (
	none   int32  = -1
	noPair uint64 = math.MaxUint64
)

// symbol is a token of a piece.
type symbol struct {
	id  int32
	end int32
}

// merger is the working space of one text at a time.
type merger struct {
	symbols []symbol
	ranks   []uint64 // of each symbol with the one after it: rank and token
	steps   int      // for tests: how much was done
}

func pairOf(left, right int32) uint64 { return uint64(left)<<32 | uint64(uint32(right)) }

func (t *Tokenizer) merger() *merger {
	if m, ok := t.merging.Get().(*merger); ok {
		return m
	}
	return &merger{symbols: make([]symbol, 0, window), ranks: make([]uint64, 0, window)}
}

// tokenize splits a piece into tokens, valid until the next.
func (t *Tokenizer) tokenize(m *merger, piece []byte) []symbol {
	if id, ok := t.words[string(piece)]; ok {
		m.symbols = append(m.symbols[:0], symbol{id, int32(len(piece))})
		return m.symbols
	}
	return t.merge(m, piece)
}

// merge begins with bytes or characters and merges the pair that was learned first, the
// leftmost of several, until there is none.
func (t *Tokenizer) merge(m *merger, piece []byte) []symbol {
	t.begin(m, piece)
	s, ranks := m.symbols, m.ranks[:0]
	for n := range len(s) - 1 {
		ranks = append(ranks, t.rank(s[n].id, s[n+1].id))
	}
	for {
		best, at := noPair, 0
		for n, r := range ranks {
			if r < best {
				best, at = r, n
			}
		}
		m.steps += len(ranks)
		if best == noPair {
			break
		}
		s[at] = symbol{int32(uint32(best)), s[at+1].end}
		s = append(s[:at+1], s[at+2:]...)
		ranks = append(ranks[:at], ranks[at+1:]...)
		if at > 0 {
			ranks[at-1] = t.rank(s[at-1].id, s[at].id)
		}
		if at < len(ranks) {
			ranks[at] = t.rank(s[at].id, s[at+1].id)
		}
	}
	m.symbols, m.ranks = s, ranks
	return s
}

func (t *Tokenizer) rank(left, right int32) uint64 {
	if left == none || right == none {
		return noPair
	}
	if r, ok := t.pairs[pairOf(left, right)]; ok {
		return r
	}
	return noPair
}

// begin makes the symbols that a piece begins with.
func (t *Tokenizer) begin(m *merger, piece []byte) {
	m.symbols = m.symbols[:0]
	if t.runes == nil {
		for n, b := range piece {
			m.symbols = append(m.symbols, symbol{t.bytes[b], int32(n + 1)})
		}
		return
	}
	for n := 0; n < len(piece); {
		r, size := utf8.DecodeRune(piece[n:])
		if id, ok := t.runes[r]; ok && (r != utf8.RuneError || size > 1) {
			n += size
			m.symbols = append(m.symbols, symbol{id, int32(n)})
			continue
		}
		for range size {
			id := t.bytes[piece[n]]
			n++
			last := len(m.symbols) - 1
			if id == none && last >= 0 && m.symbols[last].id == none && (t.fuses || size > 1 && n > 1 && !utf8.RuneStart(piece[n-1])) {
				m.symbols[last].end = int32(n)
				continue
			}
			m.symbols = append(m.symbols, symbol{id, int32(n)})
		}
	}
}

// Encode appends the tokens of a whole text to ids; -1 for a character that is not in the
// vocabulary.
func (t *Tokenizer) Encode(text []byte, ids []int64) []int64 {
	m := t.merger()
	defer t.merging.Put(m)
	if len(text) > 0 && t.prefix != noPrefix && (text[0] != ' ' || t.prefix == alwaysAdded) {
		text = append([]byte{' '}, text...)
	}
	t.split(text, len(text)+1, func(piece []byte, id int32, _ bool) {
		if id != none {
			ids = append(ids, int64(id))
			return
		}
		for _, s := range t.tokenize(m, piece) {
			ids = append(ids, int64(s.id))
		}
	})
	return ids
}

// Decode appends the text of tokens to buf. It is not UTF-8 where tokens begin or end within a
// character. The space that some tokenizers put before a text is in it. An error says
// which of the ids is no token, not what it is.
func (t *Tokenizer) Decode(ids []int64, buf []byte) ([]byte, error) {
	for n, id := range ids {
		if id < 0 || id >= int64(len(t.byID)) || t.byID[id] == "" {
			return buf, fmt.Errorf("token %d of %d is not in the vocabulary", n+1, len(ids))
		}
		buf = append(buf, t.byID[id]...)
	}
	return buf, nil
}

// split splits a text into pieces and added tokens, in order; id is none for a
// piece. Of the text known bytes are known, or one more than there are if it ends there.
func (t *Tokenizer) split(text []byte, known int, each func(piece []byte, id int32, sure bool)) {
	s := splitting{t.patterns, &t.joints, func(piece []byte, sure bool) { each(piece, none, sure) }}
	sure := true
	for len(text) > 0 {
		start, end, id, clear := t.added.find(text, known)
		within := min(known, clear)
		if id != none && clear >= start {
			within = start + 1
		}
		s.segment(0, text[:start], within, sure)
		sure = sure && clear > start
		if id != none {
			each(text[start:end], id, sure)
		}
		text, known = text[end:], known-end
	}
}

// measure counts the tokens of a text: those that stand whatever follows, which
// are its first settled bytes, and the others as they stand.
func (t *Tokenizer) measure(text []byte, known int) (settled int, done, open int64) {
	m := t.merger()
	defer t.merging.Put(m)
	t.split(text, known, func(piece []byte, id int32, sure bool) {
		n := int64(1)
		if id == none {
			n = int64(len(t.tokenize(m, piece)))
		}
		if sure {
			settled, done = settled+len(piece), done+n
		} else {
			open += n
		}
	})
	return settled, done, open
}

// ends is where the tokens of a whole text end.
func (t *Tokenizer) ends(text []byte) (ends []int) {
	m := t.merger()
	defer t.merging.Put(m)
	at := 0
	t.split(text, len(text)+1, func(piece []byte, id int32, _ bool) {
		if id == none {
			for _, s := range t.tokenize(m, piece) {
				ends = append(ends, at+int(s.end))
			}
		} else {
			ends = append(ends, at+len(piece))
		}
		at += len(piece)
	})
	return ends
}
