package interceptors

import (
	"github.com/sluicegate/sluice/interceptors/fields"
)

// readIDs adds to a request the text that the token ids of its prompt stand for, in
// place of a text beside them that the model server does not read.
func (b *Backend) readIDs(model string, at int, m *fields.Message) *Denial {
	t := b.tokenizer(model)
	switch {
	case t == nil && b.AllowTokenIDs:
		return nil
	case t == nil:
		return Deny("chain", Uninspectable, "the prompt is token ids, which cannot be read here; send it as text")
	}
	ids := m.IDs(nil, &m.Fields[at])
	text, err := t.Decode(ids, nil)
	if err != nil {
		return Deny("chain", Uninspectable, "the prompt has token ids that the model's tokenizer does not know")
	}
	if n := m.Sibling(at); n >= 0 {
		if claim := m.Bytes(&m.Fields[n]); len(claim) > 0 && !t.Means(ids, claim) {
			return Deny("chain", MessageAmbiguous, "the text beside the token ids is not what they stand for")
		}
		m.Fields[n].Role = fields.Opaque
	}
	m.Mean(at, fields.Prompt, text)
	return nil
}

// readIDs adds to a response the text that its token ids stand for.
func (i *Inference) readIDs(m *fields.Message) error {
	if i.tokenizer == nil || !i.ids {
		return nil
	}
	streamed := false
	for k, n := 0, len(m.Fields); k < n; k++ {
		role := fields.Output
		switch f := &m.Fields[k]; {
		case f.Shadowed:
			continue
		case f.Role == fields.OutputIDs:
			streamed = true
		case f.Role == fields.OutputIDsTotal:
			if streamed || i.streamed {
				role = fields.OutputCopy
			}
		default:
			continue
		}
		text, err := i.tokenizer.Decode(m.IDs(nil, &m.Fields[k]), nil)
		if err != nil {
			i.cut = Deny("chain", UpstreamInvalid, "the model server's answer has token ids that the model's tokenizer does not know")
			return i.cut
		}
		m.Mean(k, role, text)
	}
	i.streamed = i.streamed || streamed
	return nil
}
