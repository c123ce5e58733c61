package inspect

import (
	"math"
	"slices"
	"sync"
	"unicode/utf8"

	"github.com/sluicegate/sluice/interceptors/inspect/classify"
)

// Normalize appends the normalised form of a text to dst: what the phrases are
// matched against and the classifier reads.
func Normalize(dst, text []byte) []byte { return appendNormal(dst, text) }

// PhraseClasses tells which classes of phrases occur in a text or in what it
// encodes, as the bits that classify.Classes has.
func PhraseClasses(text []byte) uint16 {
	s := borrow(new(engine))
	defer s.put()
	s.whole(text, phraseMask)
	return uint16(s.found >> firstClass)
}

// Views calls yield with the normalised form of a text and of each text that it
// stands for: what is encoded in it, and what it reads with digits for letters.
// The form is yield's until it returns.
func Views(text []byte, yield func(normal []byte)) {
	s := borrow(new(engine))
	defer s.put()
	s.yield = yield
	s.whole(text, phraseMask)
}

// scratch reads texts: it looks at a text and at every text that this stands
// for, with the detectors of a mask. It holds the room that this takes.
type scratch struct {
	m       *matcher // for whole texts
	spelled *matcher // for words spelled without anything between them
	// The same for the policy's canaries; nil without any.
	canary, canarySpelled *matcher

	found  uint64 // detectors that fired
	spans  []span // what those of personal data and secrets found, in the text as it came
	over   bool   // the text stands for more than is read
	doubts int    // texts that the one at hand was decoded from, and that are none
	work   int    // bytes of text read so far
	limit  int

	scored bool    // the classifier reads along
	logit  float32 // the highest that it came to
	score  float32
	scores [speakers]float32 // of what is said in each role

	buf     []byte
	letters []byte
	normal  []byte
	yield   func(normal []byte)
}

var scratches = sync.Pool{New: func() any {
	d, _ := dictionaries() // an error has stopped the policy from being made
	return &scratch{m: newMatcher(d.words), spelled: newMatcher(d.spelled)}
}}

// borrow takes a scratch from the pool, for the texts of an engine.
func borrow(e *engine) *scratch {
	s := scratches.Get().(*scratch)
	switch {
	case e.canary == nil:
		s.canary, s.canarySpelled = nil, nil
	case s.canary == nil || s.canary.a != e.canary:
		s.canary, s.canarySpelled = newMatcher(e.canary), newMatcher(e.canarySpelled)
	}
	return s
}

// put gives it back, but for room that only one large text needed.
func (s *scratch) put() {
	if cap(s.buf) > 1<<16 {
		s.buf = nil
	}
	if cap(s.letters) > 1<<14 {
		s.letters = nil
	}
	if cap(s.normal) > 1<<16 {
		s.normal = nil
	}
	if cap(s.spans) > 1<<10 {
		s.spans = nil
	}
	s.yield = nil
	scratches.Put(s)
}

// room is n bytes that are free again when buf is cut back to mark.
func (s *scratch) room(n int) (b []byte, mark int) {
	mark = len(s.buf)
	s.buf = slices.Grow(s.buf, n)[:mark+n]
	return s.buf[mark : mark+n : mark+n], mark
}

// start forgets what was found, and allows the work for a text of n bytes, of
// which detectors of the mask are asked for.
func (s *scratch) start(n int, mask uint64) {
	s.found, s.spans, s.over = 0, s.spans[:0], false
	s.work, s.limit = 0, maxWork*n+smallWork
	s.scored, s.logit, s.score = mask&scoreMask != 0, float32(math.Inf(-1)), 0
	s.scores = [speakers]float32{}
}

// judge ends the reading of a text for which the detectors in hits fired, too:
// it takes the classes of phrases, and so comes after all of them.
func (s *scratch) judge(hits uint64) {
	if s.scored {
		s.score = classify.Judge(s.logit, classify.Classes((s.found|hits)&phraseMask>>firstClass))
		s.found |= overRates(s.score)
		s.scores[anybody] = s.score
	}
}

// spend reports whether n more bytes may be read.
func (s *scratch) spend(n int) bool {
	if s.over || s.work+n > s.limit {
		s.over = true
		return false
	}
	s.work += n
	return true
}

// whole reads one text.
func (s *scratch) whole(text []byte, mask uint64) {
	s.start(len(text), mask)
	s.layer(text, mask, 0)
	s.judge(0)
	s.roles(text, mask)
}

// layer reads a text: its surface and what is beneath.
func (s *scratch) layer(text []byte, mask uint64, depth int) {
	if mask&surfaceMask != 0 {
		s.match(text)
		if depth == 0 || legible(text) {
			s.show(text)
		}
	}
	s.beneath(text, mask, depth)
}

// open begins a stream of text, of which flow takes a piece and returns what it
// completed, pause the end of an element, and end its end.
func (s *scratch) open() {
	s.m.reset()
	if s.canary != nil {
		s.canary.reset()
	}
}

func (s *scratch) flow(text []byte) (found uint64) {
	s.m.found = 0
	s.m.write(text)
	found = s.m.found
	if s.canary != nil {
		s.canary.found = 0
		s.canary.write(text)
		found |= s.canary.found & canary
	}
	return found
}

func (s *scratch) pause() (found uint64) {
	s.m.found = 0
	s.m.pause()
	found = s.m.found
	if s.canary != nil {
		s.canary.found = 0
		s.canary.pause()
		found |= s.canary.found & canary
	}
	return found
}

func (s *scratch) end() (found uint64) {
	s.m.found = 0
	s.m.end()
	found = s.m.found
	if s.canary != nil {
		s.canary.found = 0
		s.canary.end()
		found |= s.canary.found & canary
	}
	return found
}

// match reads the surface of a text.
func (s *scratch) match(text []byte) {
	if !s.spend(len(text)) {
		return
	}
	s.open()
	s.found |= s.flow(text) | s.end()
}

// legible reports whether what was decoded may be text: of other bytes, such as
// those of a key, the classifier knows nothing.
func legible(text []byte) bool {
	bad := 0
	for i := 0; i < len(text); {
		r, n := utf8.DecodeRune(text[i:])
		i += n
		if r == utf8.RuneError && n == 1 {
			bad++
		}
	}
	return bad*8 <= len(text)
}

// show hands the normalised form of a text to the classifier and to yield.
func (s *scratch) show(text []byte) {
	if !s.scored && s.yield == nil {
		return
	}
	s.normal = appendNormal(slices.Grow(s.normal[:0], len(text)), text)
	if s.scored {
		s.logit = max(s.logit, classify.Logit(s.normal))
	}
	if s.yield != nil {
		s.yield(s.normal)
	}
}

// beneath reads all of a text but its surface.
func (s *scratch) beneath(text []byte, mask uint64, depth int) {
	if depth == 0 && mask&structureMask != 0 {
		s.found |= structure(text, mask)
	}
	if plain := isPlain(text); plain || isFolded(text) {
		s.pieces(text, mask)
		if !plain {
			s.views(text, mask, depth)
		}
		return
	}
	at := len(s.spans)
	if big, ok := wide(text); ok && depth == maxDepth {
		s.over = s.over || s.doubts == 0 && readable(text)
	} else if ok {
		out, mark := s.room(len(text) / 2 * 3)
		s.layer(appendWide(out[:0], text, big), mask, depth+1)
		s.buf = s.buf[:mark]
		if len(s.spans) > at {
			// What UTF-16 says is replaced as a whole: it is no string field's.
			s.spans = append(s.spans[:at], span{0, len(text), s.spans[at].kind})
			at++
		}
	}
	folded, mark := s.room(len(text) + len(text)/2)
	folded = appendFolded(folded[:0], text)
	s.pieces(folded, mask)
	s.views(folded, mask, depth)
	s.buf = s.buf[:mark]
	if len(s.spans) > at {
		remap(text, s.spans[at:], folds().fold)
	}
	s.pieces(text, mask)
}

// pieces finds personal data and secrets.
func (s *scratch) pieces(text []byte, mask uint64) {
	if mask&kindMask == 0 {
		return
	}
	at := len(s.spans)
	s.spans = findSpans(s.spans, text, mask)
	for _, x := range s.spans[at:] {
		s.found |= 1 << x.kind
	}
}
