package interceptors

import (
	"slices"

	"github.com/sluicegate/sluice/interceptors/dialect"
	"github.com/sluicegate/sluice/interceptors/fields"
	"github.com/sluicegate/sluice/interceptors/tokens"
)

// choice is what was counted of one of the answers that a caller asked for.
type choice struct {
	text     tokens.Counter
	ids      int64 // token ids, as we counted them
	reported int64 // output tokens, as the model server did
}

// countWith sets the tokenizer that text is counted with; nil counts words.
func (i *Inference) countWith(t *tokens.Tokenizer) {
	i.tokenizer = t
	if i.choice.text = t.Counter(); t != nil {
		i.before = new(tokens.Counter)
	}
}

// countPrompt counts the prompts in a request.
func (i *Inference) countPrompt(m *fields.Message) int64 {
	c := i.tokenizer.Counter()
	n, ids := countText(&c, m, fields.Prompt), int64(0)
	for k := range m.Fields {
		if f := &m.Fields[k]; f.Role == fields.PromptIDs && !f.Shadowed {
			v, _ := m.Int(f)
			ids += v
		}
	}
	return max(n, ids)
}

// count adds what a response says that the model wrote.
func (i *Inference) count(m *fields.Message, r *dialect.Response) {
	i.ReportedInput = max(i.ReportedInput, r.InputTokens)
	a := &i.choice
	if r.Choice > 0 {
		if n := int(r.Choice); n > len(i.others) {
			i.others = slices.Grow(i.others, n-len(i.others))
			for len(i.others) < n {
				i.others = append(i.others, choice{text: i.tokenizer.Counter()})
			}
		}
		a = &i.others[r.Choice-1]
	}
	if i.before != nil {
		i.before.Copy(&a.text)
	}
	i.OutputTokens += countText(&a.text, m, fields.Output)
	if i.ids = r.IDs|r.IDsTotal != 0; i.ids {
		n := max(a.ids+r.IDs, r.IDsTotal)
		i.OutputTokens += n - a.ids
		a.ids = n
	}
	n := max(a.reported+r.OutputTokens, r.OutputTotal)
	i.inBand += n - a.reported
	i.ReportedOutput = max(i.inBand, i.toldOutput)
	a.reported = n
}

// countText counts the text of one role. A word does not go on from one field
// to the next, but may go on in the next message if each has one field.
func countText(c *tokens.Counter, m *fields.Message, role fields.Role) (n int64) {
	texts := 0
	for k := range m.Fields {
		f := &m.Fields[k]
		if f.Role != role || f.Shadowed {
			continue
		}
		if texts > 0 {
			c.Break()
		}
		texts++
		n += c.Add(m.Bytes(f))
	}
	if texts > 1 {
		c.Break()
	}
	return n
}

// FitOutput cuts the output in a response to no more than so many tokens, and is how
// many are left. It is 0, and nothing is cut, where that cannot be done: without a
// tokenizer, for token ids, and where not even one token fits. Only Response may call it, before
// any other policy has changed the output.
func (i *Inference) FitOutput(m *fields.Message, most int64) (left int64) {
	if i.before == nil || i.ids {
		return 0
	}
	var c tokens.Counter
	c.Copy(i.before)
	fit := make([]int, len(m.Fields))
	texts := 0
	for k := range m.Fields {
		f := &m.Fields[k]
		if f.Role != fields.Output || f.Shadowed || !m.IsString(f) {
			continue
		}
		if texts > 0 {
			c.Break()
		}
		texts++
		text := m.Bytes(f)
		fit[k] = c.Fits(text, most-left)
		left += c.Add(text[:fit[k]])
		if fit[k] < len(text) {
			most = left // nothing of the texts after it
		}
	}
	if left <= 0 {
		return 0
	}
	for k := range m.Fields {
		f := &m.Fields[k]
		if f.Role == fields.Output && !f.Shadowed && m.IsString(f) {
			if text := m.Bytes(f); fit[k] < len(text) {
				m.Set(f, text[:fit[k]])
			}
		}
	}
	return left
}

// CutAfter refuses the inference once the response at hand was delivered. Where that
// cannot be, for the caller would take it for the last one, that is refused too. Only Response
// may call it.
func (i *Inference) CutAfter(d *Denial) { i.last = d }

// lastLocked ends the responses of an inference with the one at hand. The error is
// of a policy that will not have delivered what it holds.
func (i *Inference) lastLocked(multiplexed bool) (err error) {
	if err = i.finishLocked(); err == nil {
		i.cut = i.last
	} else {
		i.cut = err
	}
	if !multiplexed {
		i.endLocked(i.cut)
	}
	return err
}

// refuseLastLocked refuses the response at hand, that was to be delivered.
func (i *Inference) refuseLastLocked() error {
	i.cut = i.last
	_ = i.finishLocked()
	return i.cut
}
