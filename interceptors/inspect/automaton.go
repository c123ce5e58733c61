package inspect

import "unicode/utf8"

// automaton finds phrases in a stream of text, in one pass and in constant
// memory. A phrase is a sequence of words, each out of a set, with a bounded
// number of other words between one and the next. The words are found by an
// Aho-Corasick automaton whose transitions are a dense table; the sequences by
// remembering, for each phrase and each of its steps, where the step was last
// reached.
type automaton struct {
	symbols [256]byte // of a normalised byte; see the constants
	ascii   [128]byte // the same for the raw byte, symDrop where nothing is left of it
	word    [128]bool // of a raw byte: part of a word
	stride  int
	next    []uint16 // state*stride + symbol, states with words last
	first   uint16   // the first state with words
	words   [][]word // of state first+i
	steps   int      // of all phrases
}

// Symbols. Every other symbol stands for one byte value that occurs in a word.
const (
	symEdge  = 0 // between a word character and another one; no byte
	symOther = 1 // a byte that is no part of a word and occurs in none
	symWord  = 2 // a byte that is part of a word and occurs in none
	symBytes = 3
	symDrop  = 255 // no symbol: the byte is passed over
)

// word is a dictionary entry found when a state is entered.
type word struct {
	length int32 // in words
	inside bool  // found before the word's end: the count of words is one behind
	glued  bool  // of a script without spaces: counts as a word by itself
	steps  []step
}

// step says that a word is a step of a phrase.
type step struct {
	at    uint32 // index of its position in matcher.reached
	gap   int32  // words that may lie between the step before and this one; -1 for the first step
	found uint64 // detectors that fire when the step is reached; 0 but for the last
}

// matcher is where one stream of text stands in an automaton. The zero value
// with an automaton is ready; it is not safe for concurrent use.
type matcher struct {
	a       *automaton
	found   uint64  // detectors that have fired since found was last cleared
	reached []int32 // where each step was last reached, in words; 0 never
	at      int32   // words so far
	state   uint16
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
}

func newMatcher(a *automaton) *matcher {
	return &matcher{a: a, reached: make([]int32, a.steps), at: distant, space: true}
}

// distant is farther than any gap: what lies before it is out of reach.
const distant = 32*lettersPerWord + 64

// reset forgets all text, cheaply.
func (m *matcher) reset() {
	if m.at > 1<<30 {
		clear(m.reached)
		m.at = 0
	}
	*m = matcher{a: m.a, reached: m.reached, at: m.at + distant, space: true}
}

// write takes the next bytes of the text.
func (m *matcher) write(text []byte) {
	a := m.a
	if m.have > 0 {
		text = m.resume(text)
	}
	state := m.state
	for i := 0; i < len(text); {
		c := text[i]
		if c >= utf8.RuneSelf {
			m.state = state
			n := m.rune(text[i:])
			state = m.state
			if n == 0 { // the rest of the rune is in the next chunk
				m.have = uint8(copy(m.partial[:], text[i:]))
				break
			}
			i += n
			continue
		}
		i++
		m.tags, m.flag, m.blind = 0, false, 0
		if a.word[c] && m.inWord && !m.gluing { // the plain case
			state = a.next[int(state)*a.stride+int(a.ascii[c])]
			if state >= a.first {
				m.hit(state)
			}
			continue
		}
		m.state = state
		m.symbol(a.ascii[c], a.word[c], c == ' ' || c >= '\t' && c <= '\r')
		state = m.state
	}
	m.state = state
}

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
	m.space = space
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
	m.state = m.a.next[int(m.state)*m.a.stride+int(s)]
	if m.state >= m.a.first {
		m.hit(m.state)
	}
}

func (m *matcher) glueStep(s byte) {
	m.glue = m.a.next[int(m.glue)*m.a.stride+int(s)]
	if m.glue >= m.a.first {
		m.hit(m.glue)
	}
}

// hit takes the words that end here.
func (m *matcher) hit(state uint16) {
	for _, w := range m.a.words[state-m.a.first] {
		if w.glued {
			m.at++
		}
		end := m.at
		if w.inside {
			end++
		}
		start := end - w.length + 1
		for i := len(w.steps) - 1; i >= 0; i-- { // later steps first: a word is one step only
			s := &w.steps[i]
			if s.gap >= 0 {
				before := m.reached[s.at-1]
				if before == 0 || start <= before || start-before-1 > s.gap {
					continue
				}
			}
			m.reached[s.at] = end
			m.found |= s.found
		}
	}
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
	m.space = true
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
		state = a.next[int(state)*a.stride+int(a.symbols[c])]
		if state >= a.first {
			m.hit(state)
		}
	}
	return m.found
}
