package inspect

import (
	"cmp"
	"iter"
	"slices"
	"strconv"

	"github.com/sluicegate/sluice/interceptors"
	"github.com/sluicegate/sluice/interceptors/fields"
)

// outputPlan is how outputs are read.
type outputPlan struct {
	mask     uint64     // detectors that some rule asks for
	words    *automaton // with the phrases that rules ask for; nil without any
	segments bool       // personal data, secrets or what is encoded
	holds    bool       // some rule refuses or edits
	places   bool       // some rule edits phrases: it matters where they are
	longest  int64      // characters of the longest match
	foreign  bool       // rules with other operators
	window   int64      // characters of their longest match; 0 without any
	step     int64      // after how many characters they are asked again
	keep     int        // windows that begin within the longest match
	bytes    int        // that may be held for one inference
}

// heldCalls is how many inferences of a call may hold as much as one may. Chosen.
const heldCalls = 16

// reply is a response that was read.
type reply struct {
	message *fields.Message
	size    int // once it is held
	text    int // bytes of output
}

// cut is a part of a field that is replaced when its response is delivered.
type cut struct {
	response, field int
	from, to        int
	with            string
	on              bool // it goes on with a part of another field
}

// whole reports that the answer is one message.
func (p *part) whole() bool { return !p.stream }

// Response reads a response message.
func (p *part) Response(m *fields.Message) error {
	if p.Deaf() {
		return nil
	}
	return p.after(p.read(m))
}

// after says how much was delivered before an answer was cut.
func (p *part) after(err error) error {
	if err == nil {
		return nil
	}
	p.replies = nil // they are not ours any more

	if d, ok := err.(*interceptors.Denial); ok { //nolint:errorlint // a denial is never wrapped
		return d.With("deliveredBytes", strconv.Itoa(p.delivered))
	}
	return err
}

func (p *part) read(m *fields.Message) error {
	p.round++
	number := p.next
	p.next++
	p.replies = append(p.replies, reply{message: m})
	others := false
	for n := range m.Fields {
		f := &m.Fields[n]
		if !written(m, f) {
			others = others || fields.IsText(f.Role)
			continue
		}
		text := m.Bytes(f)
		if len(text) == 0 {
			continue
		}
		if f.Role == fields.OutputCopy {
			if err := p.copied(m, f).piece(number, n, text); err != nil {
				return err
			}
			continue
		}
		p.replies[len(p.replies)-1].text += len(text)
		if err := p.output(m, f, number, n, text); err != nil {
			return err
		}
	}
	if others {
		if err := p.others(m); err != nil {
			return err
		}
	}
	return p.settle()
}

// written reports whether a field is what the model wrote.
func written(m *fields.Message, f *fields.Field) bool {
	return (f.Role == fields.Output || f.Role == fields.OutputCopy) && m.IsString(f)
}

// copied is the flow of what is written once more at a path, such as token by token: all
// of it is one text.
func (p *part) copied(m *fields.Message, f *fields.Field) *flow {
	path := m.Path(f)
	for _, o := range p.copies {
		if o.choice == m.Choice && o.name == path {
			return o
		}
	}
	o := p.newFlow(m.Choice, "", path)
	p.copies = append(p.copies, o)
	return o
}

// all are the outputs that are read.
func (p *part) all() iter.Seq[*flow] {
	return func(yield func(*flow) bool) {
		for _, list := range [...][]*flow{p.flows, p.rows, p.copies} {
			for _, f := range list {
				if !yield(f) {
					return
				}
			}
		}
	}
}

// output reads a piece of an output: as what follows the piece before of the same
// element, and as what follows the element before.
func (p *part) output(m *fields.Message, f *fields.Field, number, field int, text []byte) error {
	o := p.follow(m, f)
	single := o == nil
	if single {
		o = p.newFlow(m.Choice, "", m.Path(f))
	}
	if err := o.piece(number, field, text); err != nil {
		return err
	}
	if single {
		defer o.put()
		if err := o.finish(); err != nil {
			return err
		}
	}
	for _, r := range p.rows {
		if r.choice == m.Choice {
			return r.piece(number, field, text)
		}
	}
	return nil
}

// piece takes the text of a field.
func (f *flow) piece(response, field int, text []byte) error {
	m := f.part.replies[len(f.part.replies)-1].message
	f.fixed = f.fixed || m.Fixed(&m.Fields[field])
	end := f.pos + int64(len(text))
	f.pieces = append(f.pieces, piece{response, field, f.pos, end})
	if f.ended {
		f.edit(f.pos, end, "", true)
		f.pos, f.base, f.buf = end, end, f.buf[:0]
		return nil
	}
	return f.write(text)
}

// maxOutputs is how many outputs of one inference are followed from chunk to
// chunk; further ones are read chunk by chunk.
const maxOutputs = 64

// follow is the output that a field goes on with: the n-th field of a key goes on with
// the n-th of the response before. It is nil if there are too many.
func (p *part) follow(m *fields.Message, f *fields.Field) *flow {
	key := m.KeyBytes(f)
	var first *flow // of its choice
	n := 0
	for _, o := range p.flows {
		if o.choice != m.Choice {
			continue
		}
		if o.round != p.round && o.key == string(key) {
			o.round = p.round
			return o
		}
		if n++; n == 1 {
			first = o
		}
	}
	if n == 1 {
		p.rows = append(p.rows, first.clone())
	}
	if len(p.flows) == maxOutputs {
		return nil
	}
	o := p.newFlow(m.Choice, string(key), m.Path(f))
	o.round = p.round
	p.flows = append(p.flows, o)
	return o
}

// settle decides what of the responses so far may be delivered.
func (p *part) settle() error {
	first := p.next
	for f := range p.all() {
		first = min(first, f.first())
	}
	p.release(first)
	if len(p.replies) == 0 || p.whole() {
		return nil
	}
	last := &p.replies[len(p.replies)-1]
	last.size = last.message.Size()
	held := 0
	for i := range p.replies {
		held += p.replies[i].size
	}
	limit := p.policy.engine.output.bytes
	if held > limit || p.inference.Call.HeldBytes()+last.size > heldCalls*limit {
		return interceptors.Deny(name, interceptors.MessageTooLarge,
			"more of the model's answer than %d bytes would have to be held back to inspect it; raise inspect.hold_bytes", limit)
	}
	return nil
}

// release lets go of the responses before the first that is held.
func (p *part) release(first int) {
	n := len(p.replies) - (p.next - first)
	if n <= 0 {
		return
	}
	for i := range p.replies[:n] {
		r := &p.replies[i]
		p.delivered += r.text
		if len(p.cuts) > 0 {
			p.delivered += p.apply(p.next-len(p.replies)+i, r.message)
		}
	}
	rest := copy(p.replies, p.replies[n:])
	clear(p.replies[rest:])
	p.replies = p.replies[:rest]
}

// apply makes the edits of a response, and returns by how much they lengthen it.
func (p *part) apply(number int, m *fields.Message) (longer int) {
	var mine []cut
	p.cuts = slices.DeleteFunc(p.cuts, func(c cut) bool {
		if c.response == number {
			mine = append(mine, c)
		}
		return c.response == number
	})
	slices.SortStableFunc(mine, func(a, b cut) int {
		if c := cmp.Or(a.field-b.field, a.from-b.from); c != 0 || a.on == b.on {
			return c
		}
		if a.on {
			return -1
		}
		return 1
	})
	for len(mine) > 0 {
		n := 1
		for n < len(mine) && mine[n].field == mine[0].field {
			n++
		}
		f := &m.Fields[mine[0].field]
		value, at := m.Bytes(f), 0
		var out []byte
		for _, c := range mine[:n] {
			if c.from < at { // parts that overlap are one
				if m.Sized(f) {
					out = append(out, filled("", c.to-at)...)
				}
				at = max(at, c.to)
				continue
			}
			with := c.with
			if m.Sized(f) {
				with = filled(with, c.to-c.from)
			}
			out = append(append(out, value[at:c.from]...), with...)
			at = c.to
		}
		out = append(out, value[at:]...)
		longer += len(out) - len(value)
		m.Set(f, out)
		mine = mine[n:]
	}
	return longer
}

// Held is how many of the last responses are held.
func (p *part) Held() int { return len(p.replies) }

// Finish takes the end of the outputs.
func (p *part) Finish() error { return p.after(p.finish()) }

func (p *part) finish() error {
	for f := range p.all() {
		if err := f.finish(); err != nil {
			return err
		}
	}
	p.release(p.next)
	return nil
}

// judge has the rules judge an output, in which something was found, and does what
// they say.
func (p *part) judge(f *flow, found uint64, list []match, value []byte) error {
	texts := []text{{place: inAnswer, name: f.name, value: value, found: found, field: -1}}
	o, err := p.policy.engine.decide(texts, true)
	if err != nil {
		return refusal(err)
	}
	for _, h := range o.matched {
		switch {
		case h.rule.shadow:
			p.once("shadow", h.rule, texts)
		case h.rule == o.denied:
		case h.rule.log:
			p.once("matched", h.rule, texts)
		}
	}
	if o.denied == nil && f.fixed && len(o.redactions) > 0 {
		o.denied, o.at = p.policy.engine.rules[o.redactions[0].rule], 0
	}
	if o.denied != nil {
		return p.denial(o, texts, true)
	}
	for _, r := range o.redactions {
		for _, m := range list {
			if m.found&r.mask == 0 || f.ended {
				continue
			}
			with := r.with
			if !r.replaces {
				with = redacted(m.found)
			}
			if m.on {
				with = ""
			}
			if r.rest {
				f.truncate(m.start, with)
			} else {
				f.edit(m.start, m.end, with, m.on)
			}
			p.once("redacted", p.policy.engine.rules[r.rule], texts)
		}
	}
	return nil
}

// once tells of a rule, once for an inference: how often it matched depends on how
// long the text is, not on what is wrong with it.
func (p *part) once(event string, r *rule, texts []text) {
	t := toldOf{event, r}
	if !slices.Contains(p.told, t) {
		p.told = append(p.told, t)
		p.emit(event, r, texts, 0)
	}
}

type toldOf struct {
	event string
	rule  *rule
}

// others inspects what is text in a response, and no output.
func (p *part) others(m *fields.Message) error {
	e := p.policy.engine
	mask := e.answer.mask &^ scoreMask
	s := borrow(e)
	defer s.put()
	all := uint64(0)
	var texts []text
	for n := range m.Fields {
		f := &m.Fields[n]
		if !fields.IsText(f.Role) || written(m, f) {
			continue
		}
		value := m.Bytes(f)
		if !m.IsString(f) {
			if !e.answer.foreign {
				continue
			}
			value = m.AppendText(nil, f)
		}
		s.whole(value, mask)
		if s.over {
			return tooDeep()
		}
		if all |= s.found; s.found&mask == 0 && e.answer.whole() {
			continue
		}
		texts = append(texts, text{place: inAnswer, name: m.Path(f), value: value, found: s.found, field: n})
	}
	if len(texts) == 0 || !e.answer.needed(all) {
		return nil
	}
	return p.act(m, texts, true)
}
