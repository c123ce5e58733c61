package inspect

import (
	"fmt"
	"strconv"
	"strings"
	"unicode/utf8"
)

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

// parsePhrases compiles a dictionary:
//
//	# comment
//	$set = word | several words | prefix* | *inside*
//	class: $set <2> word|other <0> $set2
//	class! <|mark|> [mark]:
//
// The last form lists marks, which stand for themselves. A phrase belongs to a class and is a sequence of sets, with the greatest
// number of words that may lie between them. Every phrase in ASCII is also
// looked for written backwards and in rot13.
func parsePhrases(source string, classes map[string]uint64) (*automaton, error) {
	sets := make(map[string][]string)
	var phrases []phrase
	for n, line := range strings.Split(source, "\n") {
		line = strings.TrimSpace(line)
		if line == "" || line[0] == '#' {
			continue
		}
		fail := func(what string) error { return fmt.Errorf("line %d: %s", n+1, what) }
		if name, def, ok := strings.Cut(line, "="); ok && line[0] == '$' {
			for _, alt := range strings.Split(def, "|") {
				alt = strings.TrimSpace(alt)
				if strings.HasPrefix(alt, "$") {
					sets[strings.TrimSpace(name)] = append(sets[strings.TrimSpace(name)], sets[alt]...)
				} else if alt != "" {
					sets[strings.TrimSpace(name)] = append(sets[strings.TrimSpace(name)], alt)
				}
			}
			continue
		}
		if class, def, ok := strings.Cut(line, "! "); ok && classes[class] != 0 {
			phrases = append(phrases, phrase{found: classes[class], words: [][]string{strings.Fields(def)}})
			continue
		}
		class, def, ok := strings.Cut(line, ":")
		if !ok || classes[class] == 0 {
			return nil, fail("want $set = words, or class: phrase")
		}
		p := phrase{found: classes[class]}
		for i, part := range strings.FieldsFunc(def, func(r rune) bool { return r == '<' || r == '>' }) {
			part = strings.TrimSpace(part)
			if i%2 == 1 {
				gap, err := strconv.ParseInt(part, 10, 32)
				if err != nil || gap < 0 || gap > 32 {
					return nil, fail("a gap is a number from 0 to 32")
				}
				p.gaps = append(p.gaps, int32(gap))
				continue
			}
			var words []string
			for _, alt := range strings.Split(part, "|") {
				if alt = strings.TrimSpace(alt); strings.HasPrefix(alt, "$") {
					if sets[alt] == nil {
						return nil, fail("no set " + alt)
					}
					words = append(words, sets[alt]...)
				} else if alt != "" {
					words = append(words, alt)
				}
			}
			if len(words) == 0 {
				return nil, fail("an empty step")
			}
			p.words = append(p.words, words)
		}
		if len(p.words) == 0 || len(p.gaps) != len(p.words)-1 {
			return nil, fail("want steps with gaps between them")
		}
		phrases = append(phrases, p)
	}

	b := &builder{entries: make(map[string]*word), symbol: make(map[byte]byte)}
	a := &automaton{}
	for _, view := range []func(string) string{func(s string) string { return s }, rot13, reversed} {
		for _, p := range phrases {
			if view("ab") != "ab" && !p.latin() {
				continue
			}
			n := len(p.words)
			for i := range p.words {
				from, gap := i, int32(-1)
				if n1 := n - 1; view("ab") == "ba" {
					from = n1 - i
					if i > 0 {
						gap = p.gaps[n1-i]
					}
				} else if i > 0 {
					gap = p.gaps[i-1]
				}
				s := step{at: uint32(a.steps + i), gap: gap}
				if i == n-1 {
					s.found = p.found
				}
				for _, w := range p.words[from] {
					b.add(w, view, s)
				}
			}
			a.steps += n
		}
	}
	return a, b.build(a)
}

// phrase is one line of a dictionary.
type phrase struct {
	found uint64
	words [][]string
	gaps  []int32
}

// latin reports whether the phrase is in ASCII.
func (p *phrase) latin() bool {
	for _, set := range p.words {
		for _, w := range set {
			if strings.ContainsFunc(w, func(r rune) bool { return r >= utf8.RuneSelf }) {
				return false
			}
		}
	}
	return true
}

func rot13(s string) string {
	return strings.Map(func(r rune) rune {
		if r >= 'a' && r <= 'z' {
			return 'a' + (r-'a'+13)%26
		}
		return r
	}, s)
}

func reversed(s string) string {
	r := []rune(s)
	for i, j := 0, len(r)-1; i < j; i, j = i+1, j-1 {
		r[i], r[j] = r[j], r[i]
	}
	return string(r)
}

// builder collects the words, then lays out the table.
type builder struct {
	entries map[string]*word // by their symbols, bytes as they are and edge as 0
	keys    []string
	symbol  map[byte]byte
}

const edge = 0 // in a key; no normalised text has a zero byte

func (b *builder) add(text string, view func(string) string, s step) {
	w := word{}
	open, shut := true, true // edges before and after
	if strings.HasPrefix(text, "*") {
		text, open = text[1:], false
	}
	if strings.HasSuffix(text, "*") {
		text, shut = text[:len(text)-1], false
	}
	plain := view(string(appendNormal(nil, []byte(text))))
	if !open && !shut {
		w.glued = true
	} else if view("ab") == "ba" {
		open, shut = shut, open
	}
	w.inside = !shut && !w.glued && plain != "" && wordByte(plain[len(plain)-1])
	key := make([]byte, 0, len(plain)+2)
	in := false
	for i := range len(plain) {
		if wordByte(plain[i]) != in {
			in = !in
			if in {
				w.length++
			}
			if i > 0 || open {
				key = append(key, edge)
			}
		}
		if plain[i] != '\'' {
			key = append(key, plain[i])
		}
	}
	if in && shut {
		key = append(key, edge)
	}
	if w.glued {
		w.length = 1
	}
	e := b.entries[string(key)]
	if e == nil {
		e = &w
		b.entries[string(key)] = e
		b.keys = append(b.keys, string(key))
	}
	for i := range e.steps {
		if e.steps[i].at == s.at {
			return
		}
	}
	e.steps = append(e.steps, s)
}

// wordByte reports whether a normalised byte is part of a word.
func wordByte(c byte) bool {
	return c >= 'a' && c <= 'z' || c >= '0' && c <= '9' || c >= utf8.RuneSelf || c == '\''
}

func (b *builder) build(a *automaton) error {
	for c := range 256 {
		a.symbols[c] = symOther
		if wordByte(byte(c)) {
			a.symbols[c] = symWord
		}
	}
	a.symbols['\''] = symDrop
	n := byte(symBytes)
	for _, k := range b.keys {
		for i := range len(k) {
			if c := k[i]; c != edge && b.symbol[c] == 0 {
				b.symbol[c] = n
				a.symbols[c] = n
				n++
			}
		}
	}
	a.stride = int(n)
	t := folds()
	for c := range a.ascii {
		e := uint32(c)
		if f := t.pages[0][c]; f != 0 {
			e = f
		}
		a.ascii[c], a.word[c] = symDrop, false
		if e != foldDrop {
			a.ascii[c] = a.symbols[e]
			a.word[c] = e != '\'' && wordByte(byte(e))
		}
	}

	// The trie, then failure links in breadth-first order, which also complete
	// the transitions.
	type node struct {
		next  map[byte]int
		fail  int
		words []*word
	}
	nodes := []node{{next: map[byte]int{}}}
	for _, k := range b.keys {
		at := 0
		for i := range len(k) {
			s := b.symbol[k[i]]
			if k[i] == edge {
				s = symEdge
			}
			to, ok := nodes[at].next[s]
			if !ok {
				to = len(nodes)
				nodes = append(nodes, node{next: map[byte]int{}})
				nodes[at].next[s] = to
			}
			at = to
		}
		nodes[at].words = append(nodes[at].words, b.entries[k])
	}
	if len(nodes) > 1<<16-1 {
		return fmt.Errorf("%d states are more than a table of 16 bits holds", len(nodes))
	}
	full := make([]int, len(nodes)*a.stride)
	queue := make([]int, 0, len(nodes))
	for s, to := range nodes[0].next {
		full[int(s)] = to
		queue = append(queue, to)
	}
	for i := 0; i < len(queue); i++ {
		at := queue[i]
		fail := nodes[at].fail
		nodes[at].words = append(nodes[at].words, nodes[fail].words...)
		for s := range a.stride {
			to, ok := nodes[at].next[byte(s)]
			if !ok {
				full[at*a.stride+s] = full[fail*a.stride+s]
				continue
			}
			full[at*a.stride+s] = to
			nodes[to].fail = full[fail*a.stride+s]
			queue = append(queue, to)
		}
	}
	// Number the states so that those with words come last.
	number := make([]uint16, len(nodes))
	var count uint16
	for pass := range 2 {
		for i := range nodes {
			if (len(nodes[i].words) > 0) == (pass == 1) {
				number[i] = count
				count++
			}
		}
		if pass == 0 {
			a.first = count
		}
	}
	a.next = make([]uint16, len(full))
	a.words = make([][]word, int(count)-int(a.first))
	for i := range nodes {
		for s := range a.stride {
			a.next[int(number[i])*a.stride+s] = number[full[i*a.stride+s]]
		}
		for _, w := range nodes[i].words {
			a.words[number[i]-a.first] = append(a.words[number[i]-a.first], *w)
		}
	}
	return nil
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
const distant = 64

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
		m.tags, m.flag = 0, false
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
		m.tags, m.flag = 0, false
	default:
		m.tags, m.flag = 0, r == 0x1F3F4
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
