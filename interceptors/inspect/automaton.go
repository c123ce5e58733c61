package inspect

import "unicode/utf8"

// automaton finds phrases in a stream of text, in one pass and in constant
// memory. A phrase is a sequence of words, each out of a set, with a bounded
// number of other words between one and the next. The words are found by an
// Aho-Corasick automaton whose transitions are a dense table; the sequences by
// remembering, for each phrase and each of its steps, where the step was last
// reached. All of it is laid out so that plain text touches little memory: what
// a short text costs is what it has the processor fetch.
//
// A state tells whether the text is in a word, and whether a space came last. So
// a transition between a word and what is none passes the edge between them, but
// from a state after an edge.
type automaton struct {
	symbols [256]byte // of a normalised byte; see the constants
	ascii   [128]byte // the same for the raw byte, symDrop where nothing is left of it
	word    [128]bool // of a raw byte: part of a word
	runs    [256]byte // of a raw byte: its plain symbol, and runWord; else runDrop or runEnds
	plain   []uint16  // state*plainSymbols + symbol: transitions, states with words last
	other   []uint16  // state*others + symbol - plainSymbols
	others  int
	first   uint16   // the first state with words
	ends    []ending // of state first+i
	reaches []reach
	steps   int     // of all phrases, but for the last ones
	depth   []uint8 // of a state: symbols since the word began that it is in
	within  []int32 // of a step: words after it within which the next one ends
}

// passed is a transition that passes an edge where words end.
const passed = 1<<16 - 1

const (
	runWord = plainSymbols // a part of a word
	runDrop = 1 << 6       // nothing is left of it
	runEnds = 1 << 7       // it takes more than a transition
)

// ending is what happens when a state with words is entered.
type ending struct {
	from, count uint32 // of reaches
	glued       int32  // how many of the words count by themselves
}

// reach is a step of a phrase that is reached with a word. Where the word begins
// and ends is relative to the count of words when the state is entered.
type reach struct {
	at         uint16 // index of its position in matcher.reached, that of the step before is one less; the last has none
	gap        int16  // words that may lie between the step before and this one; -1 for the first step
	start, end int16
	found      uint8 // the bit of the detector that fires when the step is reached; 64 for all but the last
	size       uint8 // of the word, in symbols
}

// Symbols. Every other symbol stands for one byte value: the plain ones for the
// letters of ASCII and the space, the rest for what else occurs in a word. The
// plain transitions of a state are a line of the processor's cache.
const (
	symEdge      = 0 // between a word character and another one; no byte
	symOther     = 1 // a byte that is no part of a word and occurs in none
	symWord      = 2 // a byte that is part of a word and occurs in none
	symSpace     = 3
	symLetters   = 4
	plainSymbols = 32
	symDrop      = 255 // no symbol: the byte is passed over
)

// word is a dictionary entry.
type word struct {
	length int32 // in words
	size   uint8 // in symbols
	inside bool  // found before the word's end: the count of words is one behind
	glued  bool  // of a script without spaces: counts as a word by itself
	steps  []step
}

// step says that a word is a step of a phrase.
type step struct {
	id    int
	at    uint16 // index of its position in matcher.reached, that of the step before is one less; the last has none
	gap   int32  // words that may lie between the step before and this one; -1 for the first step
	found uint64 // detectors that fire when the step is reached; 0 but for the last
}

// matcher is where one stream of text stands in an automaton. The zero value
// with an automaton is ready; it is not safe for concurrent use.
type matcher struct {
	a       *automaton
	found   uint64   // detectors that have fired since found was last cleared
	reached []int32  // where each step was last reached, in words
	armed   []uint64 // a bit for each step: it was reached
	at      int32    // words so far
	state   uint16
	settled bool // the state tells what space and inWord do: a symbol came since the break
	space   bool // the last symbol was a space
	inWord  bool
	partial [utf8.UTFMax]byte // a rune cut in two
	have    uint8
	tags    uint8 // length of the run of tag characters or variation selectors
	flag    bool  // the run follows a flag, where tag characters belong
	blind   uint8 // length of the run of other characters without a shape

	// glue is the automaton over the text without the breaks between elements:
	// a word cut in two by a break is found there. It runs from a break to the
	// next edge of a word.
	glue   uint16
	gluing bool
	fresh  bool // nothing came since the break

	trail *trail // nil where nobody asks where a phrase began
}

func newMatcher(a *automaton) *matcher {
	return &matcher{a: a, reached: make([]int32, a.steps), armed: make([]uint64, (a.steps+63)/64), space: true}
}

// distant is farther than any gap: what lies before it is out of reach.
const distant = 32*lettersPerWord + 64

// reset forgets all text, cheaply.
func (m *matcher) reset() {
	clear(m.armed)
	*m = matcher{a: m.a, reached: m.reached, armed: m.armed, space: true}
}

// to is the state after another symbol.
func (a *automaton) to(state uint16, s byte) uint16 {
	if s < plainSymbols {
		return a.plain[int(state)*plainSymbols+int(s)]
	}
	return a.other[int(state)*a.others+int(s)-plainSymbols]
}

// write takes the next bytes of the text.
func (m *matcher) write(text []byte) {
	a := m.a
	if m.have > 0 {
		text = m.resume(text)
	}
	for i := 0; i < len(text); {
		if m.settled && !m.gluing && text[i] < utf8.RuneSelf {
			if i += m.run(text[i:]); i == len(text) {
				break
			}
		}
		c := text[i]
		if c >= utf8.RuneSelf {
			n := m.rune(text[i:])
			if n == 0 { // the rest of the rune is in the next chunk
				m.have = uint8(copy(m.partial[:], text[i:]))
				break
			}
			i += n
			continue
		}
		i++
		m.tags, m.flag, m.blind = 0, false, 0
		m.symbol(a.ascii[c], a.word[c], white(c))
	}
}

// run takes what the text begins with that no word ends in, and returns how much
// that is.
func (m *matcher) run(text []byte) int {
	a := m.a
	state, at, in, last := uint(m.state), m.at, byte(0), byte(0)
	if m.inWord {
		in = 1
	}
	i := 0
	for ; i < len(text); i++ {
		r := a.runs[text[i]]
		if r >= runDrop {
			if r == runDrop {
				continue
			}
			break
		}
		next := a.plain[state*plainSymbols+uint(r%plainSymbols)]
		if next >= a.first {
			break
		}
		state, last = uint(next), r
		at += int32(in &^ (r / runWord)) // a word that ends
		in = r / runWord
	}
	if i > 0 {
		m.tags, m.flag, m.blind = 0, false, 0
	}
	if last != 0 {
		m.state, m.at, m.inWord, m.space, m.fresh = uint16(state), at, in != 0, last == symSpace, false
	}
	return i
}

// white reports whether a raw byte is normalised to a space.
func white(c byte) bool { return c == ' ' || c >= '\t' && c <= '\r' }

// resume completes a rune that the chunk before began.
func (m *matcher) resume(text []byte) []byte {
	var buf [2 * utf8.UTFMax]byte
	n := copy(buf[:], m.partial[:m.have])
	n += copy(buf[n:], text[:min(len(text), utf8.UTFMax)])
	had := int(m.have)
	m.have = 0
	at := 0
	for at < had {
		size := m.rune(buf[at:n])
		if size == 0 {
			m.have = uint8(copy(m.partial[:], buf[at:n]))
			return nil // all of the text went into it
		}
		at += size
	}
	return text[at-had:]
}

// rune takes the rune that text begins with and returns its size, 0 if text
// ends within it.
func (m *matcher) rune(text []byte) int {
	r, n := utf8.DecodeRune(text)
	if r == utf8.RuneError && n == 1 {
		if !utf8.FullRune(text) {
			return 0
		}
		return 1
	}
	m.hidden(r)
	var e uint32
	if p := folds().pages[r>>8]; p != nil {
		e = p[r&0xFF]
	}
	switch {
	case e == foldDrop:
	case e == 0:
		m.bytes(text[:n])
	case e&foldLong != 0:
		at := e &^ foldLong >> 8
		for i := range int(e & 0xFF) {
			m.byte(folds().text[int(at)+i])
		}
	default:
		var buf [utf8.UTFMax]byte
		m.bytes(buf[:utf8.EncodeRune(buf[:], rune(e))])
	}
	return n
}

func (m *matcher) bytes(b []byte) {
	for _, c := range b {
		m.byte(c)
	}
}

// byte takes a normalised byte.
func (m *matcher) byte(c byte) {
	m.symbol(m.a.symbols[c], wordByte(c) && c != '\'', c == ' ')
}

// symbol takes the symbol of a normalised byte.
func (m *matcher) symbol(s byte, inWord, space bool) {
	if s == symDrop {
		return
	}
	m.fresh = false
	if space && m.space {
		m.gluing = false
		return
	}
	m.space, m.settled = space, true
	if inWord != m.inWord {
		m.edge(inWord)
	}
	m.step(s)
	if m.gluing && inWord {
		m.glueStep(s)
	}
	m.gluing = m.gluing && inWord
}

// edge passes between a word and what is not.
func (m *matcher) edge(inWord bool) {
	if !inWord {
		m.at++
	}
	m.inWord = inWord
	m.step(symEdge)
	if m.gluing && !inWord {
		m.glueStep(symEdge)
		m.gluing = false
	}
}

func (m *matcher) step(s byte) {
	if m.trail != nil {
		m.trail.mark(s)
	}
	m.state = m.a.to(m.state, s)
	if m.state >= m.a.first {
		m.hit(m.state)
	}
}

func (m *matcher) glueStep(s byte) {
	m.glue = m.a.to(m.glue, s)
	if m.glue >= m.a.first {
		m.hit(m.glue)
	}
}

// hit takes the words that end here.
func (m *matcher) hit(state uint16) {
	e := &m.a.ends[state-m.a.first]
	reaches := m.a.reaches[e.from : e.from+e.count]
	for i := range reaches {
		r := &reaches[i]
		if r.gap >= 0 {
			at := r.at - 1
			if m.armed[at/64]>>(at%64)&1 == 0 {
				continue
			}
			before, start := m.reached[at], m.at+int32(r.start)
			if start <= before || start-before-1 > int32(r.gap) {
				continue
			}
		}
		if r.found < 64 {
			m.found |= 1 << r.found
		} else {
			m.armed[r.at/64] |= 1 << (r.at % 64)
			m.reached[r.at] = m.at + int32(r.end)
		}
		if m.trail != nil {
			m.trail.reach(r)
		}
	}
	m.at += e.glued
}

// hidden watches for text that people do not see.
func (m *matcher) hidden(r rune) {
	switch {
	case r >= 0xE0020 && r <= 0xE007F || r >= 0xE0100 && r <= 0xE01EF || r >= 0xFE00 && r <= 0xFE0F:
		// A flag of a region is followed by up to six tags, an ideograph or an
		// emoji by one selector.
		if m.tags < 255 {
			m.tags++
		}
		if limit := uint8(2); m.tags > limit && !(m.flag && m.tags <= 7) {
			m.found |= hiddenText
		}
	case r == 0x202D || r == 0x202E: // overrides of the writing direction
		m.found |= hiddenText
	case r == 0xAD || r == 0x180E || r >= 0x200B && r <= 0x200F || r >= 0x2060 && r <= 0x2064 || r == 0xFEFF:
		// Texts have a joiner or a mark here and there: a run of them is a
		// message in two or four signs.
		if m.blind++; m.blind >= 8 {
			m.found |= hiddenText
			m.blind = 0
		}
	default:
		m.tags, m.flag, m.blind = 0, r == 0x1F3F4, 0
	}
}

// end passes the end of the text: the last word ends here.
func (m *matcher) end() {
	m.have = 0 // half a rune is no rune
	if m.inWord {
		m.edge(false)
	}
	m.space, m.settled = true, false
}

// pause passes the end of an element after which another one may follow. The
// word at the break is judged as a whole word, and together with what follows.
func (m *matcher) pause() {
	if m.fresh {
		return
	}
	glue, gluing, have := m.glue, m.gluing, m.have
	if !gluing {
		glue = m.state
	}
	inWord := m.inWord
	m.end() // of the word glued together, too
	m.glue, m.gluing, m.have, m.fresh = glue, inWord, have, true
}

// spell matches letters in lower case that have nothing between them, or zeros
// where a text ends, with the automaton for spelled words.
func (m *matcher) spell(text []byte) uint64 {
	m.reset()
	a := m.a
	state := uint16(0)
	for _, c := range text {
		if c == 0 {
			state = 0
			m.at += distant
			continue
		}
		m.at++
		state = a.to(state, a.symbols[c])
		if state >= a.first {
			m.hit(state)
		}
	}
	return m.found
}
