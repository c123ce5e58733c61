package inspect

import (
	"github.com/sluicegate/sluice/interceptors"
	"github.com/sluicegate/sluice/interceptors/fields"
)

// Request inspects a request message.
func (p *part) Request(m *fields.Message) error {
	e := p.policy.engine
	plan := &e.request
	prompt, parameter, identifier, named := plan.reads(inPrompt), plan.reads(inParameter), plan.reads(inIdentifier), plan.reads(inNames)
	s := borrow(p.policy.engine)
	defer s.put()
	found, all, names := p.room(), uint64(0), uint64(0)
	prompts := 0
	for n := range m.Fields {
		f := &m.Fields[n]
		text := m.Bytes(f)
		var hits uint64
		switch placeOf(f.Role) {
		case inPrompt:
			if len(text) == 0 {
				break
			}
			prompts++
			s.start(len(text), prompt)
			if prompt&surfaceMask != 0 {
				// One matcher for all prompts: an element is judged singly, and
				// joined to those before.
				if p.prompt == nil {
					p.prompt = borrow(e)
					p.prompt.open()
				}
				s.found = p.prompt.flow(text) | p.prompt.pause()
				s.show(text)
			}
			s.beneath(text, prompt, 0)
			s.judge(0)
			hits = s.found
		case inParameter:
			if key := m.Key(f); key != "" && !m.IsElement(f) {
				s.whole([]byte(key), named&surfaceMask)
				names |= s.found
				if s.over {
					return tooDeep()
				}
			}
			s.whole(text, parameter)
			hits = s.found
		case inIdentifier:
			s.whole(text, identifier)
			hits = s.found
		}
		if s.over {
			return tooDeep()
		}
		found = append(found, hits)
		all |= hits
	}
	for n := range m.Tensors {
		s.whole(m.Name(&m.Tensors[n]), identifier|named)
		names |= s.found
		if s.over {
			return tooDeep()
		}
	}
	all |= names
	p.found = found
	if joined := p.joined(m, s, prompts, all); joined != 0 {
		// What is encoded over several elements shows at the last of them.
		all |= joined
		for n := len(m.Fields) - 1; n >= 0; n-- {
			if f := &m.Fields[n]; placeOf(f.Role) == inPrompt && len(m.Bytes(f)) > 0 {
				found[n] |= joined
				break
			}
		}
	}
	if s.over {
		return tooDeep()
	}
	if !plan.needed(all) {
		p.annotates = false
		return nil
	}
	// The plan needs only those texts that something was found in.
	some := plan.whole() && names&plan.mask == 0
	var texts []text
	for n := range m.Fields {
		f := &m.Fields[n]
		pl := placeOf(f.Role)
		if pl == notInspected || some && found[n]&plan.mask == 0 {
			continue
		}
		value := m.Bytes(f)
		if !m.IsString(f) {
			value = m.AppendText(nil, f)
		}
		texts = append(texts, text{place: pl, name: m.Path(f), value: value, found: found[n], field: n})
	}
	for n := range m.Tensors {
		if some {
			break
		}
		v := m.Name(&m.Tensors[n])
		s.whole(v, identifier)
		texts = append(texts, text{place: inIdentifier, name: "tensor_name", value: v, found: s.found, field: -1})
	}
	err := p.act(m, texts, false)
	p.annotates = false
	return err
}

// room is where the hits of a message's fields go.
func (p *part) room() []uint64 {
	if p.found == nil {
		return p.space[:0]
	}
	return p.found[:0]
}

// tailBytes is how much of the prompts so far an encoded text may go on from
// when the next message comes. Chosen: a kilobyte of base64 is 130 words.
const tailBytes = 1 << 10

// joined reads what is encoded over several elements or messages: all prompts
// of the message in a row, after the end of those before. hits are the detectors
// that fired on the prompts one by one.
func (p *part) joined(m *fields.Message, s *scratch, prompts int, hits uint64) uint64 {
	e := p.policy.engine
	mask := e.request.reads(inPrompt) & surfaceMask
	if mask == 0 || prompts == 0 || prompts == 1 && !p.extends() {
		return 0
	}
	row := append([]byte(nil), p.tail...)
	for n := range m.Fields {
		if f := &m.Fields[n]; placeOf(f.Role) == inPrompt {
			row = append(row, m.Bytes(f)...)
		}
	}
	s.start(len(row), mask)
	if prompts > 1 || len(p.tail) > 0 {
		s.show(row)
		s.beneath(row, mask, 0)
		s.judge(hits)
	}
	if p.extends() {
		p.tail = append(p.tail[:0], row[max(0, len(row)-tailBytes):]...)
	}
	return s.found
}

// extends reports whether the inference may have more than one message.
func (p *part) extends() bool {
	m := p.inference.Call.Method
	return m.ClientStreams && !m.Multiplexed
}

// tooDeep refuses a text that stands for more text than is read.
func tooDeep() error {
	return interceptors.Deny(name, interceptors.MessageTooLarge,
		"a text stands for more encoded text than can be inspected; send it as it is")
}
