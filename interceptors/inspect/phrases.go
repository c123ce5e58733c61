package inspect

import (
	"fmt"
	"math/bits"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"
)

// parsePhrases compiles a dictionary:
//
//	# comment
//	$set = word | several words | prefix* | *inside*
//	class: $set <2> word|other <0> $set2
//	class! <|mark|> [mark]:
//
// The last form lists marks, which stand for themselves. A phrase belongs to a
// class and is a sequence of sets, with the greatest number of words that may lie
// between them. Every phrase in ASCII is also looked for written backwards and in rot13.
//
// With spelled it is the automaton for words without anything between them:
// phrases in ASCII only, and gaps in letters.
func parsePhrases(source string, classes map[string]uint64, spelled bool) (*automaton, error) {
	phrases, err := readPhrases(source, classes)
	if err != nil {
		return nil, err
	}
	return compilePhrases(phrases, spelled)
}

// somePhrases compiles the phrases of the dictionary that are of some classes.
func somePhrases(classes uint64) (*automaton, error) {
	phrases, err := readPhrases(phrasesText, phraseClasses)
	if err != nil {
		return nil, err
	}
	return compilePhrases(slices.DeleteFunc(phrases, func(p phrase) bool { return p.found&classes == 0 }), false)
}

func compilePhrases(phrases []phrase, spelled bool) (*automaton, error) {
	b := &builder{entries: make(map[string]*word), symbol: make(map[byte]byte), spelled: spelled}
	a := &automaton{}
	views := []func(string) string{func(s string) string { return s }, rot13, reversed}
	if spelled {
		views = views[:1]
	}
	for _, view := range views {
		for _, p := range phrases {
			if (spelled || view("ab") != "ab") && !p.latin() {
				continue
			}
			if spelled && !p.lengthen() {
				continue
			}
			b.phrase(p, view, a)
		}
	}
	return a, b.build(a)
}

// phrase adds a phrase.
func (b *builder) phrase(p phrase, view func(string) string, a *automaton) {
	last := len(p.words) - 1
	for i := range p.words {
		from, gap := i, int32(-1)
		if view("ab") == "ba" {
			from = last - i
			if i > 0 {
				gap = p.gaps[from]
			}
		} else if i > 0 {
			gap = p.gaps[i-1]
		}
		if b.spelled && gap >= 0 {
			gap = min(gap*lettersPerWord, distant-1)
		}
		b.steps++
		s := step{id: b.steps, at: uint16(a.steps), gap: gap}
		if i == last {
			s.found = p.found
		} else {
			a.steps++
		}
		for _, w := range p.words[from] {
			b.add(w, view, s)
		}
	}
}

// lettersPerWord is how long the words are that may lie between two.
const lettersPerWord = 7

// readPhrases reads the lines of a dictionary.
func readPhrases(source string, classes map[string]uint64) (phrases []phrase, err error) {
	sets := make(map[string][]string)
	for n, line := range strings.Split(source, "\n") {
		line = strings.TrimSpace(line)
		if line == "" || line[0] == '#' {
			continue
		}
		fail := func(what string) ([]phrase, error) { return nil, fmt.Errorf("line %d: %s", n+1, what) }
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
			phrases = append(phrases, phrase{found: classes[class], words: [][]string{strings.Fields(def)}, marks: true})
			continue
		}
		class, def, ok := strings.Cut(line, ":")
		if !ok || classes[class] == 0 {
			return fail("want $set = words, or class: phrase")
		}
		p := phrase{found: classes[class]}
		for i, part := range strings.FieldsFunc(def, func(r rune) bool { return r == '<' || r == '>' }) {
			part = strings.TrimSpace(part)
			if i%2 == 1 {
				gap, err := strconv.ParseInt(part, 10, 32)
				if err != nil || gap < 0 || gap > 32 {
					return fail("a gap is a number from 0 to 32")
				}
				p.gaps = append(p.gaps, int32(gap))
				continue
			}
			var words []string
			for _, alt := range strings.Split(part, "|") {
				if alt = strings.TrimSpace(alt); strings.HasPrefix(alt, "$") {
					if sets[alt] == nil {
						return fail("no set " + alt)
					}
					words = append(words, sets[alt]...)
				} else if alt != "" {
					words = append(words, alt)
				}
			}
			if len(words) == 0 {
				return fail("an empty step")
			}
			p.words = append(p.words, words)
		}
		if len(p.words) == 0 || len(p.gaps) != len(p.words)-1 {
			return fail("want steps with gaps between them")
		}
		phrases = append(phrases, p)
	}

	return phrases, nil
}

// phrase is one line of a dictionary.
type phrase struct {
	found uint64
	marks bool
	words [][]string
	gaps  []int32
}

// latin reports whether the phrase is words in ASCII.
func (p *phrase) latin() bool {
	if p.marks {
		return false
	}
	for _, set := range p.words {
		for _, w := range set {
			if strings.ContainsFunc(w, func(r rune) bool { return r >= utf8.RuneSelf }) {
				return false
			}
		}
	}
	return true
}

// leastLetters is how many letters a phrase has at least that is looked for between
// other letters: in a megabyte of letters at random there is each of six, and in names
// and in languages that glue words there is many a one.
const leastLetters = 10

// lengthen drops what makes a phrase shorter than leastLetters, and reports whether
// something is left of it.
func (p *phrase) lengthen() bool {
	letters := func(w string) (n int) {
		for i := range len(w) {
			if letter(w[i]) {
				n++
			}
		}
		return n
	}
	sum, shortest := 0, make([]int, len(p.words))
	for i, set := range p.words {
		shortest[i] = letters(slices.MinFunc(set, func(a, b string) int { return letters(a) - letters(b) }))
		sum += shortest[i]
	}
	words := make([][]string, len(p.words))
	for i, set := range p.words {
		for _, w := range set {
			if sum-shortest[i]+letters(w) >= leastLetters {
				words[i] = append(words[i], w)
			}
		}
		if len(words[i]) == 0 {
			return false
		}
	}
	p.words = words
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
	spelled bool
	entries map[string]*word // by their symbols, bytes as they are and edge as 0
	keys    []string
	symbol  map[byte]byte
	steps   int // added so far
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
	if b.spelled {
		for i := range len(plain) {
			if letter(plain[i]) {
				key = append(key, plain[i])
			}
		}
		if len(key) < 3 { // in every other word
			return
		}
		w = word{length: int32(len(key))}
		b.enter(key, w, s)
		return
	}
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
	b.enter(key, w, s)
}

func (b *builder) enter(key []byte, w word, s step) {
	w.size = uint8(min(len(key), 255))
	e := b.entries[string(key)]
	if e == nil {
		e = &w
		b.entries[string(key)] = e
		b.keys = append(b.keys, string(key))
	}
	for i := range e.steps {
		if e.steps[i].id == s.id {
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
	plain := func(c, symbol byte) { b.symbol[c], a.symbols[c] = symbol, symbol }
	plain(' ', symSpace)
	for c := byte('a'); c <= 'z'; c++ {
		plain(c, symLetters+c-'a')
	}
	n := byte(plainSymbols)
	for _, k := range b.keys {
		for i := range len(k) {
			if c := k[i]; c != edge && b.symbol[c] == 0 {
				b.symbol[c] = n
				a.symbols[c] = n
				n++
			}
		}
	}
	stride := int(n)
	t := folds()
	for c := range a.ascii {
		a.ascii[c], a.word[c] = symDrop, false
		if e := t.plain[c]; e != 0 {
			a.ascii[c] = a.symbols[e]
			a.word[c] = e != '\'' && wordByte(e)
		}
	}
	for c := range a.runs {
		a.runs[c] = runEnds
		switch {
		case c >= utf8.RuneSelf:
		case a.ascii[c] == symDrop:
			a.runs[c] = runDrop
		case a.ascii[c] < plainSymbols:
			if a.runs[c] = a.ascii[c]; a.word[c] {
				a.runs[c] |= runWord
			}
		}
	}
	inWord := make([]bool, stride) // of a symbol
	inWord[symWord] = true
	for c, s := range b.symbol {
		inWord[s] = wordByte(c) && c != '\''
	}

	// The trie, then failure links in breadth-first order, which also complete
	// the transitions.
	type node struct {
		child, sibling, fail int32 // 0: none
		symbol, depth        byte
		words                []*word
	}
	nodes := make([]node, 1, 1<<15)
	for _, k := range b.keys {
		at := int32(0)
		for i := range len(k) {
			s := b.symbol[k[i]]
			if k[i] == edge {
				s = symEdge
			}
			to := nodes[at].child
			for to != 0 && nodes[to].symbol != s {
				to = nodes[to].sibling
			}
			if to == 0 {
				to = int32(len(nodes))
				nodes = append(nodes, node{symbol: s, depth: uint8(min(i+1, 255)), sibling: nodes[at].child})
				nodes[at].child = to
			}
			at = to
		}
		nodes[at].words = append(nodes[at].words, b.entries[k])
	}
	// What no word begins with is the root, too, and tells what came last.
	word, space := int32(len(nodes)), int32(len(nodes)+1)
	nodes = append(nodes, node{symbol: symWord}, node{symbol: symSpace})
	if a.steps > 1<<16 {
		return fmt.Errorf("%d steps are more than an index of 16 bits holds", a.steps)
	}
	if len(nodes) >= passed {
		return fmt.Errorf("%d states are more than a table of 16 bits holds", len(nodes))
	}
	full := make([]uint16, len(nodes)*stride)
	row := func(n int32) []uint16 { return full[int(n)*stride : (int(n)+1)*stride] }
	queue := make([]int32, 1, len(nodes))
	for i := 0; i < len(queue); i++ {
		at := queue[i]
		fail := row(nodes[at].fail)
		if at != 0 {
			copy(row(at), fail)
			nodes[at].words = append(nodes[at].words, nodes[nodes[at].fail].words...)
		}
		for to := nodes[at].child; to != 0; to = nodes[to].sibling {
			s := nodes[to].symbol
			if at != 0 {
				nodes[to].fail = int32(fail[s])
			}
			row(at)[s] = uint16(to)
			queue = append(queue, to)
		}
	}
	copy(row(word), row(0))
	copy(row(space), row(0))
	queue = append(queue, word, space)
	land := func(to int32, s byte) int32 { // after a symbol
		switch {
		case to != 0:
			return to
		case inWord[s]:
			return word
		case s == symSpace:
			return space
		}
		return 0
	}
	move := func(at int32, s byte) (to int32, ends bool) {
		last := nodes[at].symbol
		switch {
		case s == symSpace && last == symSpace:
			return at, false
		case s == symEdge || last == symEdge && at != 0 || inWord[s] == inWord[last]:
			return land(int32(row(at)[s]), s), false
		}
		edge := int32(row(at)[symEdge])
		return land(int32(row(edge)[s]), s), len(nodes[edge].words) > 0
	}
	// Number the states so that those with words come last, and else from the
	// root: what text is made of most lies close together.
	number, order := make([]uint16, len(nodes)), make([]int32, 0, len(nodes))
	for _, words := range []bool{false, true} {
		if words {
			a.first = uint16(len(order))
		}
		for _, i := range queue {
			if (len(nodes[i].words) > 0) == words {
				number[i] = uint16(len(order))
				order = append(order, i)
			}
		}
	}
	a.depth, a.within = make([]uint8, 0, len(nodes)), make([]int32, a.steps)
	for _, e := range b.entries {
		for _, s := range e.steps {
			if s.gap >= 0 {
				a.within[s.at-1] = max(a.within[s.at-1], s.gap+e.length)
			}
		}
	}
	a.others = stride - plainSymbols
	a.plain, a.other = make([]uint16, 0, len(nodes)*plainSymbols), make([]uint16, 0, len(nodes)*a.others)
	for _, i := range order {
		a.depth = append(a.depth, nodes[i].depth)
		for s := range byte(stride) {
			to, ends := move(i, s)
			next := number[to]
			if ends {
				next = passed
			}
			if s < plainSymbols {
				a.plain = append(a.plain, next)
			} else {
				a.other = append(a.other, next)
			}
		}
		if words := nodes[i].words; len(words) > 0 {
			a.ends = append(a.ends, a.ending(words))
		}
	}
	return nil
}

// ending lays out what happens when words end together.
func (a *automaton) ending(words []*word) (e ending) {
	e.from = uint32(len(a.reaches))
	for _, w := range words {
		if w.glued {
			e.glued++
		}
		end := int16(e.glued)
		if w.inside {
			end++
		}
		for i := len(w.steps) - 1; i >= 0; i-- { // later steps first: a word is one step only
			s := &w.steps[i]
			a.reaches = append(a.reaches, reach{
				at: s.at, gap: int16(s.gap), start: end - int16(w.length) + 1, end: end,
				found: uint8(bits.TrailingZeros64(s.found)), size: w.size,
			})
			e.count++
		}
	}
	return e
}
