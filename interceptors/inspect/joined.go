package inspect

import (
	"bytes"
	"container/list"
	"slices"
	"sync"

	"github.com/sluicegate/sluice/interceptors/fields"
)

// tailBytes is how much of the prompts so far an encoded text may go on from
// when the next message comes. Chosen: a kilobyte of base64 is 130 words.
const tailBytes = 1 << 10

// joinedKinds are what is looked for over elements and messages, too. Not what digits
// alone are, or what a name before it makes of it: columns of numbers would be full of it.
const joinedKinds = kindMask &^ (1<<kindID | 1<<kindBirth | 1<<kindAddress | 1<<kindAssigned)

// longestPart is how long an element in the middle of a word may be. Chosen.
const longestPart = 32

// tail is the end of the prompts so far of an inference, or of a sequence.
type tail struct {
	text []byte
	ends []int // of the elements in it
}

// cut leaves what fits into tailBytes.
func (t *tail) cut() {
	n := len(t.text) - tailBytes
	if n <= 0 {
		return
	}
	t.text = t.text[:copy(t.text, t.text[n:])]
	rest := t.ends[:0]
	for _, end := range t.ends {
		if end > n {
			rest = append(rest, end-n)
		}
	}
	t.ends = rest
}

// crossing is a part of what was found over elements, in one of them.
type crossing struct {
	field int
	span
	on bool // it goes on with the element before: then it begins the element
}

// joined reads what lies over several elements or messages: all prompts of the
// message in a row, after the end of those before. hits are the detectors that
// fired on the prompts one by one, single is what they found where.
func (p *part) joined(m *fields.Message, s *scratch, prompts int, hits uint64, single []span) uint64 {
	e := p.policy.engine
	mask := e.request.reads(inPrompt) & (surfaceMask | joinedKinds)
	if mask == 0 || prompts == 0 || prompts == 1 && !p.goesOn() {
		return 0
	}
	before := len(p.tail.text)
	row := append([]byte(nil), p.tail.text...)
	ends := append([]int(nil), p.tail.ends...)
	inWord := false // an element may be the middle of a word
	for n := range m.Fields {
		if f := &m.Fields[n]; placeOf(f.Role) == inPrompt && len(m.Bytes(f)) > 0 {
			row = append(row, m.Bytes(f)...)
			ends = append(ends, len(row))
			inWord = inWord || len(m.Bytes(f)) <= longestPart && bytes.IndexByte(m.Bytes(f), ' ') < 0
		}
	}
	s.start(len(row), mask)
	if prompts > 1 || before > 0 {
		if inWord && len(ends) > 2 && mask&surfaceMask != 0 {
			s.match(row) // over more than one break in a word
		}
		s.show(row)
		s.beneath(row, mask, 0)
		s.judge(hits)
		s.roles(row, mask)
		p.note(inPrompt, s.score)
		p.cross(m, before, s.spans, single)
	}
	if p.goesOn() {
		p.tail = tail{row, ends}
		p.tail.cut()
	}
	return s.found & surfaceMask
}

// cross notes what of a row lies over more than one element, and was not found in
// any: elements that end and begin with ordinary words may look like more in a row.
func (p *part) cross(m *fields.Message, before int, spans, single []span) {
	slices.SortStableFunc(spans, func(a, b span) int { return a.start - b.start })
	last := 0
	for _, x := range spans {
		if x.end <= before || x.start < last ||
			slices.ContainsFunc(single, func(o span) bool { return o.start+before < x.end && x.start < o.end+before }) {
			continue
		}
		at, first := before, len(p.crossings)
		for n := range m.Fields {
			f := &m.Fields[n]
			if placeOf(f.Role) != inPrompt {
				continue
			}
			end := at + len(m.Bytes(f))
			from, to := max(x.start, at), min(x.end, end)
			if from == x.start && to == x.end {
				break // in one of them
			}
			if from < to {
				p.crossings = append(p.crossings, crossing{n, span{from - at, to - at, x.kind}, len(p.crossings) > first})
				last = x.end
			}
			at = end
		}
	}
}

// goesOn reports whether the inference, or its sequence, may have more than one message.
func (p *part) goesOn() bool { return p.extends() || p.sequenced() }

// extends reports whether the inference may have more than one message.
func (p *part) extends() bool {
	m := p.inference.Call.Method
	return m.ClientStreams && !m.Multiplexed
}

// sequenced reports whether the model server joins the inference to others.
func (p *part) sequenced() bool { return p.inference.Sequence != "" && !p.extends() }

// resume goes on where the sequence was left.
func (p *part) resume() {
	if !p.sequenced() {
		return
	}
	if p.tail = p.policy.sequences.of(p.sequence()); len(p.tail.ends) == 0 {
		return
	}
	p.prompt = borrow(p.policy.engine)
	p.prompt.open()
	at := 0
	for _, end := range p.tail.ends {
		p.prompt.flow(p.tail.text[at:end])
		p.prompt.pause()
		at = end
	}
}

// leave keeps the end of the sequence's prompts for its next message, unless this is the last.
func (p *part) leave(m *fields.Message) {
	if !p.sequenced() || len(p.tail.text) == 0 {
		return
	}
	for n := range m.Fields {
		f := &m.Fields[n]
		if v, ok := m.Int(f); ok && v != 0 && string(m.KeyBytes(f)) == "sequence_end" && m.Path(f) == "parameters.sequence_end" {
			p.policy.sequences.drop(p.sequence())
			return
		}
	}
	p.policy.sequences.put(p.sequence(), p.tail)
}

func (p *part) sequence() sequence {
	i := p.inference
	key := sequence{principal: i.Call.Principal, model: i.Model, id: i.Sequence}
	if i.Backend != nil {
		key.backend = i.Backend.Name
	}
	return key
}

// sequence names a sequence. That of another caller is another one.
type sequence struct{ principal, backend, model, id string }

// maxSequences bounds what is remembered of sequences, to 4 MB; the one that was
// quiet for longest is forgotten first, and begins anew. Chosen.
const maxSequences = 4096

// sequences remembers the ends of the prompts of sequences. It is safe for
// concurrent use; the zero value is ready.
type sequences struct {
	mu    sync.Mutex
	tails map[sequence]*list.Element
	order list.List // of *sequenceTail, the last used first
}

type sequenceTail struct {
	key sequence
	tail
}

// of is the end of a sequence's prompts so far, which nobody changes.
func (s *sequences) of(key sequence) tail {
	s.mu.Lock()
	defer s.mu.Unlock()
	if e := s.tails[key]; e != nil {
		return e.Value.(*sequenceTail).tail
	}
	return tail{}
}

func (s *sequences) drop(key sequence) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if e := s.tails[key]; e != nil {
		s.order.Remove(e)
		delete(s.tails, key)
	}
}

func (s *sequences) put(key sequence, t tail) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.tails == nil {
		s.tails = make(map[sequence]*list.Element)
	}
	if e := s.tails[key]; e != nil {
		s.order.Remove(e)
	}
	s.tails[key] = s.order.PushFront(&sequenceTail{key, tail{slices.Clone(t.text), slices.Clone(t.ends)}})
	if s.order.Len() > maxSequences {
		delete(s.tails, s.order.Remove(s.order.Back()).(*sequenceTail).key)
	}
}
