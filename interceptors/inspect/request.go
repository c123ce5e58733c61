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
	s := borrow(e)
	defer s.put()
	if !p.extends() {
		defer p.forget() // the next inference finds it in the processor's cache
	}
	p.resume()
	p.crossings = p.crossings[:0]
	found, all, names := p.room(), uint64(0), uint64(0)
	prompts, read := 0, 0
	var single []span // in the prompts in a row
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
			s.roles(text, prompt)
			p.note(inPrompt, s.score)
			for _, x := range s.spans {
				single = append(single, span{read + x.start, read + x.end, x.kind})
			}
			read += len(text)
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
			p.note(inParameter, s.score)
			hits = s.found
		case inIdentifier:
			if f.Role == fields.Model {
				s.name(e.names, text, identifier)
			} else {
				s.whole(text, identifier)
			}
			hits = s.found
		}
		if s.over {
			return tooDeep()
		}
		found = append(found, hits)
		all |= hits
	}
	for n := range m.Tensors {
		s.name(e.names, m.Name(&m.Tensors[n]), identifier|named)
		names |= s.found
		if s.over {
			return tooDeep()
		}
	}
	all |= names
	p.found = found
	if joined := p.joined(m, s, prompts, all, single); joined != 0 {
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
	for _, c := range p.crossings {
		found[c.field] |= 1 << c.kind
		all |= 1 << c.kind
	}
	if !plan.needed(all) {
		p.leave(m)
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
	if err == nil {
		p.leave(m)
	}
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

// forget gives back the matcher of the prompts so far.
func (p *part) forget() {
	if p.prompt != nil {
		p.prompt.put()
		p.prompt = nil
	}
}

// tooDeep refuses a text that stands for more text than is read.
func tooDeep() error {
	return interceptors.Deny(name, interceptors.MessageTooLarge,
		"a text stands for more encoded text than can be inspected; send it as it is")
}
