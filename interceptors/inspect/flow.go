package inspect

import (
	"bytes"
	"unicode/utf8"
)

// flow reads one output as it comes, in pieces that may be cut anywhere. Whatever it
// decides depends on the text before and at that place alone, so that it decides the
// same however the text is cut.
//
// Phrases and canaries are matched as the text comes. Personal data, secrets and
// what is encoded are looked for in segments: a segment begins with a word that may
// be a part of such a thing, and ends after ordinary words, which no such thing goes
// over (see word.go). Ordinary text has no segments, only a word at hand. A segment
// that is longer than the longest match is judged in windows of twice that, each of
// which begins in the middle of the one before. An answer that is one message is
// read at once, when all of it is there.
type flow struct {
	part   *part
	choice int64  // of the answers that the caller asked for
	key    string // of the field or tensor
	name   string // its path
	round  int    // the response that last added to it

	plan   *outputPlan
	words  *matcher // nil if no rule asks for phrases
	canary *matcher // nil without canaries

	pos     int64 // bytes so far
	chars   int64 // characters so far that normalising leaves
	space   bool  // the last of them is a space
	partial [utf8.UTFMax]byte
	have    int   // bytes of a rune that is not complete
	hidden  int64 // where a run of invisible characters began
	running bool  // there is one
	told    bool  // and it was found out

	buf  []byte // the text from base on
	base int64

	word    token
	segment place64 // the open segment, or the word at hand
	half    place64 // its middle, once it is so long
	signs   signs   // what may be in it
	pending int     // ordinary words until it ends
	singles int     // words of one letter

	windows []int64 // where the last windows of other operators' rules began
	marked  int64   // characters when the last one was judged
	normal  []byte  // the classifier's window
	scores  uint64  // thresholds that were reached
	raw     []byte  // the window of what looks at the make of a text

	cutFrom int64 // what is replaced goes on from here; -1: nothing does
	cutKind int
	ended   bool // what follows is left out
	fixed   bool // it cannot be changed: token ids stand for it

	pieces []piece
	work   int // bytes that were read more than once
}

// piece is where the text of a field of a response lies in the flow.
type piece struct {
	response int // its number
	field    int
	start    int64
	end      int64
}

const (
	// lookBack is how much of the text before a segment its detectors look back at:
	// for the name that a secret is assigned to, or the word "phone".
	lookBack = 128
	// scoreWindow normalised bytes are judged by the classifier at once, from every
	// scoreStep of them on: about the fifty words that it was trained to see.
	scoreWindow, scoreStep = 512, 256
)

// newFlow begins an output.
func (p *part) newFlow(choice int64, key, name string) *flow {
	e := p.policy.engine
	f, ok := e.flows.Get().(*flow)
	if !ok {
		f = &flow{plan: &e.output}
		if a := f.plan.words; a != nil {
			f.words = newMatcher(a)
			f.words.trail = newTrail(a)
		}
		if a := e.canary; a != nil && f.plan.mask&canary != 0 {
			f.canary = newMatcher(a)
			f.canary.trail = newTrail(a)
		}
	}
	f.part, f.choice, f.key, f.name = p, choice, key, name
	f.space, f.cutFrom = true, -1
	if f.plan.window > 0 {
		f.windows = append(f.windows, 0)
	}
	return f
}

// put gives a flow back, with the room that it took, but for room that only a large
// text needed.
func (f *flow) put() {
	for _, m := range []*matcher{f.words, f.canary} {
		if m != nil {
			t := m.trail
			t.waiting, t.hits = t.waiting[:0], t.hits[:0]
			m.reset()
			m.trail = t
		}
	}
	e := f.part.policy.engine
	*f = flow{plan: f.plan, words: f.words, canary: f.canary, buf: f.buf[:0], pieces: f.pieces[:0],
		windows: f.windows[:0], normal: f.normal[:0], raw: f.raw[:0]}
	if cap(f.buf) <= 1<<16 {
		e.flows.Put(f)
	}
}

// clone is a flow that has read the same.
func (f *flow) clone() *flow {
	c := *f
	for _, m := range []**matcher{&c.words, &c.canary} {
		if *m != nil {
			n, t := **m, *(*m).trail
			n.reached, n.armed = bytesOf(n.reached), bytesOf(n.armed)
			t.began, t.waiting, t.hits = bytesOf(t.began), bytesOf(t.waiting), nil
			n.trail = &t
			*m = &n
		}
	}
	c.buf, c.windows, c.normal, c.raw, c.pieces = bytesOf(c.buf), bytesOf(c.windows), bytesOf(c.normal), bytesOf(c.raw), bytesOf(c.pieces)
	return &c
}

func bytesOf[T any](s []T) []T { return append([]T(nil), s...) }

// write takes the next text. The error is a *Denial.
func (f *flow) write(text []byte) error {
	f.buf = append(f.buf, text...)
	if f.part.whole() && !f.plan.places {
		f.pos += int64(len(text))
		return nil
	}
	for i := 0; i < len(text); i++ {
		c := text[i]
		f.pos++
		var err error
		if f.plan.mask&structureMask != 0 && !f.part.whole() {
			if f.raw = append(f.raw, c); len(f.raw) == repeatWindow {
				if err := f.made(); err != nil {
					return err
				}
			}
		}
		switch {
		case f.ended:
		case c < utf8.RuneSelf && f.have == 0:
			err = f.ascii(c, f.pos-1)
		default:
			f.partial[f.have] = c
			f.have++
			err = f.runes()
		}
		if err != nil {
			return err
		}
	}
	if !f.part.whole() {
		f.flush()
		f.trim()
	}
	return nil
}

// runes takes the runes that are complete.
func (f *flow) runes() error {
	for f.have > 0 && utf8.FullRune(f.partial[:f.have]) {
		r, n := utf8.DecodeRune(f.partial[:f.have])
		at := f.pos - int64(f.have)
		first := f.partial[0]
		f.have = copy(f.partial[:], f.partial[n:f.have])
		var err error
		switch {
		case n > 1:
			err = f.rune(r, at, at+int64(n))
		case first < utf8.RuneSelf:
			err = f.ascii(first, at)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// ascii takes a byte of ASCII.
func (f *flow) ascii(c byte, at int64) error {
	f.running, f.told = false, false
	space := c == ' ' || c >= '\t' && c <= '\r'
	if m := f.words; m != nil {
		m.tags, m.flag, m.blind = 0, false, 0
		m.trail.at, m.trail.next, m.trail.chars = at, at+1, f.chars
		m.symbol(m.a.ascii[c], m.a.word[c], space)
		if m.found != 0 {
			if err := f.matched(m); err != nil {
				return err
			}
		}
	}
	if m := f.canary; m != nil {
		m.trail.at, m.trail.next, m.trail.chars = at, at+1, f.chars
		m.symbol(m.a.ascii[c], m.a.word[c], space)
		if m.found != 0 {
			if err := f.matched(m); err != nil {
				return err
			}
		}
	}
	return f.char(c, wordClasses[c], at, at+1)
}

// rune takes another rune.
func (f *flow) rune(r rune, at, next int64) error {
	t := folds()
	var buf [64]byte
	var e uint32
	if p := t.pages[r>>8]; p != nil {
		e = p[r&0xFF]
	}
	out := buf[:0]
	switch {
	case e == foldDrop:
	case e == 0:
		out = utf8.AppendRune(out, r)
	case e&foldLong != 0:
		from := e &^ foldLong >> 8
		out = append(out, t.text[from:from+e&0xFF]...)
	default:
		out = utf8.AppendRune(out, rune(e))
	}
	if m := f.words; m != nil {
		m.trail.at, m.trail.next, m.trail.chars = at, next, f.chars
		m.hidden(r)
		if m.tags|m.blind != 0 || m.found&hiddenText != 0 {
			if !f.running {
				f.hidden, f.running = at, true
			}
		} else {
			f.running, f.told = false, false
		}
		if m.found&hiddenText != 0 {
			m.trail.hits = append(m.trail.hits, match{f.hidden, next, hiddenText, f.told})
			f.hidden, f.told = next, true
		}
		m.bytes(out)
		if m.found != 0 {
			if err := f.matched(m); err != nil {
				return err
			}
		}
	}
	if m := f.canary; m != nil {
		m.trail.at, m.trail.next, m.trail.chars = at, next, f.chars
		m.bytes(out)
		if m.found != 0 {
			if err := f.matched(m); err != nil {
				return err
			}
		}
	}
	if e == 0 || e&foldLong == 0 && e != foldDrop && e >= utf8.RuneSelf {
		return f.char(foreignByte, foreign, at, next)
	}
	for i, c := range out {
		class := uint8(foreign)
		if c < utf8.RuneSelf {
			class = wordClasses[c]
		} else if i > 0 && out[i-1] >= utf8.RuneSelf && !utf8.RuneStart(c) {
			continue // of the same rune
		}
		if err := f.char(c, class, at, next); err != nil {
			return err
		}
	}
	return nil
}

const foreignByte = 0xFF

// matched takes what a matcher has found.
func (f *flow) matched(m *matcher) error {
	m.found = 0
	if f.part.whole() { // to be decided at once
		return nil
	}
	hits := m.trail.hits
	m.trail.hits = hits[:0]
	for _, h := range hits {
		if err := f.decide(h.found, []match{h}); err != nil {
			return err
		}
	}
	return nil
}

// char takes a character of the folded text, that at to next of the text became.
func (f *flow) char(c byte, class uint8, at, next int64) error {
	if class == dropped {
		return nil
	}
	if class == blank && f.space {
		return nil
	}
	f.space = class == blank
	f.chars++
	if f.part.whole() {
		return nil
	}
	if f.cutFrom >= 0 {
		f.goOn(c, class, at, next)
	}
	if f.plan.segments {
		if err := f.read(c, class, at, next); err != nil {
			return err
		}
	}
	if f.plan.mask&scoreMask != 0 {
		if err := f.score(c, class, next); err != nil {
			return err
		}
	}
	if f.plan.window > 0 && f.chars-f.marked >= f.plan.step {
		return f.window(next)
	}
	return nil
}

// held is from where on the text must not be delivered yet.
func (f *flow) held() int64 {
	limit := f.pos
	switch {
	case !f.plan.holds || f.ended:
		return limit
	case f.part.whole():
		return 0
	}
	limit -= int64(f.have)
	for _, m := range []*matcher{f.words, f.canary} {
		if m != nil {
			limit = m.open(limit, f.plan.longest)
		}
	}
	if f.running && !f.told {
		limit = min(limit, f.hidden)
	}
	if f.plan.segments && (f.word.in || f.pending > 0) {
		limit = min(limit, f.segment.at)
	}
	if len(f.windows) > 0 {
		limit = min(limit, f.windows[0])
	}
	return limit
}

// judge looks for what is in a segment that ends at to. What begins before until
// counts: the rest is seen again in the next window.
func (f *flow) judge(to, until int64, last bool) error {
	signs := f.signs
	mask := uint64(0)
	if signs&(someDigit|someAt|someLong|someDashes) != 0 {
		mask |= f.plan.mask & kindMask
	}
	if signs&^(someDashes) != 0 {
		mask |= f.plan.mask & surfaceMask &^ scoreMask
	}
	if mask == 0 {
		return nil
	}
	from := max(f.base, f.segment.at-lookBack)
	return f.beneath(from, to, until, mask, last)
}

// beneath looks for personal data and secrets from one place to another, and for
// what is encoded there.
func (f *flow) beneath(from, to, until int64, mask uint64, last bool) error {
	s := borrow(f.part.policy.engine)
	defer s.put()
	text := f.text(from, to)
	s.start(len(text), mask)
	s.beneath(text, mask, 0)
	f.work += len(text) + s.work
	if s.over {
		return tooDeep()
	}
	start := f.segment.at
	var list []match
	found := s.found &^ kindMask
	if found != 0 {
		list = append(list, match{start: start, end: to, found: found})
	}
	cut := -1
	for _, x := range s.spans {
		m := match{start: from + int64(x.start), end: from + int64(x.end), found: 1 << x.kind}
		if m.end <= start || m.start >= until && !last { // seen before, or again
			continue
		}
		m.start = max(m.start, start)
		found |= m.found
		list = append(list, m)
		if m.end == to && (x.kind == kindPrivateKey && !bytes.Contains(text[x.start:], []byte("-----END ")) ||
			x.kind >= kindPrivateKey && to > until) {
			cut = x.kind
		}
	}
	edits := len(f.part.cuts)
	if err := f.decide(found, list); err != nil {
		return err
	}
	if cut >= 0 && len(f.part.cuts) > edits && f.cutFrom < 0 {
		f.cutFrom, f.cutKind = to, cut
	}
	return nil
}

// decide has the rules judge what was found.
func (f *flow) decide(found uint64, list []match) error {
	if found &= f.plan.mask; found == 0 {
		return nil
	}
	var value []byte
	if f.plan.foreign {
		value = f.text(f.pos-f.plan.window*4, f.pos)
		if len(f.windows) > 0 {
			value = f.text(f.windows[0], f.pos)
		}
	}
	return f.part.judge(f, found, list, value)
}

// finish takes the end of the text. The error is a *Denial.
func (f *flow) finish() error {
	if f.ended {
		return nil
	}
	f.have = 0 // half a rune is no rune
	for _, m := range []*matcher{f.words, f.canary} {
		if m == nil {
			continue
		}
		m.trail.at, m.trail.next, m.trail.chars = f.pos, f.pos, f.chars
		if m.end(); m.found != 0 {
			if err := f.matched(m); err != nil {
				return err
			}
		}
	}
	if f.part.whole() {
		return f.readWhole()
	}
	if f.plan.segments {
		if err := f.endWord(f.pos); err != nil {
			return err
		}
		if f.signs != 0 && !f.ended {
			if err := f.judge(f.pos, f.pos, true); err != nil {
				return err
			}
		}
	}
	if f.ended {
		return nil
	}
	if err := f.made(); err != nil {
		return err
	}
	if f.plan.mask&scoreMask != 0 {
		if err := f.scored(); err != nil {
			return err
		}
	}
	if f.plan.window > 0 {
		if err := f.window(f.pos); err != nil {
			return err
		}
	}
	f.flush()
	return nil
}
