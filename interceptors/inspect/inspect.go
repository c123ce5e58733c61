// Package inspect is the policy of what may be said: it reads the text fields
// of requests, and of responses where asked to, and refuses or redacts.
//
// Rules are SecLang, run by Coraza. Every text is an argument of a transaction.
// Its name is the path of its field, and its role chooses the collection:
//
//	ARGS_POST      prompts: "inputs.text_input"
//	ARGS_GET       parameters: "parameters.stop", "inputs.text_input.parameters.note"
//	ARGS_PATH      identifiers: "model_name", "id"; names of tensors as "tensor_name"
//	RESPONSE_ARGS  outputs, and texts of errors: "outputs.text_output"
//
// So ARGS is all of a request, ARGS_NAMES are its paths, ARGS_POST its prompts,
// and ARGS_POST:/^inputs\.doc/ some of them. Phases 1 and 2 run for each request
// message, phases 3 and 4 for each response message; other phases never run, and
// a rule for one is an error. Every occurrence of a field is inspected, also one
// that decoders would drop.
//
// Beside Coraza's operators there are three of ours:
//
//	@sluicePhrases injection,extraction,jailbreak,exfiltration,tool,hidden
//	@sluicePersonal email,card,iban,ssn
//	@sluiceSecret privatekey,aws,github,token
//
// and one action, redact, which goes with the last two: what was found becomes
// "[redacted:email]". The files @sluice/starter.conf (used by default),
// @sluice/personal.conf and @sluice/secrets.conf can be included.
//
// The phrases are matched over normalised text (see normalize.go), once, before
// Coraza. Where all rules begin with our operators and no detector fires, there
// is no transaction at all; TestPlan holds that the verdict is the same.
//
// Phrases are seen across the elements, tensors and messages of one inference's
// prompts, and across the chunks of one output, however they are cut. Output
// that was delivered before a phrase was complete is not taken back; a denial
// says how much it was (deliveredBytes). Encoded text (base64, hexadecimal,
// percent), digits for letters, personal data and secrets are looked for within
// one element or chunk: holding chunks back is still to come.
//
// Nothing of a text is logged, written to disk or told to the caller. If the
// engine fails the inference is refused.
package inspect

import (
	"errors"
	"fmt"
	"strconv"
	"strings"

	"github.com/sluicegate/sluice/interceptors"
	"github.com/sluicegate/sluice/interceptors/dialect"
	"github.com/sluicegate/sluice/interceptors/fields"
	configv1 "github.com/sluicegate/sluice/proto/gen/sluice/config/v1"
)

// Policy inspects. It is immutable and safe for concurrent use.
type Policy struct {
	engine    *engine
	responses bool
}

var _ interceptors.Policy = (*Policy)(nil)

// New compiles the rules of a configuration; nil is the starter rules alone.
// Rule files are relative to dir. An error begins with the field that is at
// fault; one in a rule names its file and line too.
func New(cfg *configv1.Inspect, dir string) (*Policy, error) {
	e, err := newEngine(cfg, dir)
	if err != nil {
		return nil, fmt.Errorf("inspect.%w", err)
	}
	return &Policy{engine: e, responses: cfg.GetResponses()}, nil
}

const name = "inspect"

// Name is "inspect".
func (p *Policy) Name() string { return name }

// Begin takes part in calls of inference methods.
func (p *Policy) Begin(c *interceptors.Call) (interceptors.CallPolicy, error) {
	if c.Method == nil || c.Method.Kind != dialect.Inference {
		return nil, nil
	}
	return p, nil
}

// Start takes part in every inference.
func (p *Policy) Start(i *interceptors.Inference) (interceptors.InferencePolicy, error) {
	return &part{policy: p, inference: i, stream: i.Call.Method.ServerStreams}, nil
}

// End does nothing.
func (p *Policy) End(interceptors.Outcome) {}

// part is the policy's part in one inference.
type part struct {
	policy    *Policy
	inference *interceptors.Inference
	stream    bool // responses may be many

	prompt    *scratch // the prompts so far
	outputs   []output // the outputs so far
	round     int      // counts responses
	delivered int      // bytes of output
	found     []uint64 // by field of the message at hand
	space     [8]uint64
}

// output is one output as it streams: an element of a tensor, or a field.
type output struct {
	key   string
	round int // the response that last added to it
	s     *scratch
}

// maxOutputs is how many outputs of one inference are followed from chunk to
// chunk; further ones are read chunk by chunk.
const maxOutputs = 64

// Request inspects a request message.
func (p *part) Request(m *fields.Message) error {
	e := p.policy.engine
	mask := e.request.mask
	s := scratches.Get().(*scratch)
	defer s.put()
	found, all := p.found, uint64(0)
	if found == nil {
		found = p.space[:0]
	}
	found = found[:0]
	for n := range m.Fields {
		f := &m.Fields[n]
		var hits uint64
		switch placeOf(f.Role) {
		case inPrompt:
			text := m.Bytes(f)
			if len(text) == 0 {
				break
			}
			if mask&^kindMask != 0 {
				if p.prompt == nil {
					p.prompt = scratches.Get().(*scratch)
					p.prompt.m.reset()
				}
				c := p.prompt.m
				c.found = 0
				c.write(text)
				c.pause()
				hits = c.found | e.a.views(s, text, 0)
			}
			hits |= e.spans(s, text, mask)
		case inParameter:
			if text := m.Bytes(f); len(text) > 0 {
				hits = e.readWith(s, text, mask)
			}
			if key := m.Key(f); key != "" && !m.IsElement(f) {
				all |= e.readWith(s, []byte(key), mask&^kindMask)
			}
		case inIdentifier:
			if text := m.Bytes(f); len(text) > 0 {
				hits = e.readWith(s, text, mask)
			}
		}
		found = append(found, hits)
		all |= hits
	}
	for n := range m.Tensors {
		all |= e.readWith(s, m.Name(&m.Tensors[n]), mask)
	}
	p.found = found
	if !e.request.needed(all) {
		return nil
	}
	texts := make([]text, 0, len(m.Fields)+len(m.Tensors))
	for n := range m.Fields {
		f := &m.Fields[n]
		pl := placeOf(f.Role)
		if pl == notInspected {
			continue
		}
		value := m.Bytes(f)
		if !m.IsString(f) {
			value = m.AppendText(nil, f)
		}
		texts = append(texts, text{place: pl, name: m.Path(f), value: value, found: found[n], field: n})
	}
	for n := range m.Tensors {
		v := m.Name(&m.Tensors[n])
		texts = append(texts, text{place: inIdentifier, name: "tensor_name", value: v, found: e.readWith(s, v, mask), field: -1})
	}
	return p.act(m, texts, false)
}

// Response inspects a response message.
func (p *part) Response(m *fields.Message) error {
	if !p.policy.responses {
		return nil
	}
	e := p.policy.engine
	mask := e.answer.mask
	p.round++
	final := !p.stream
	found, all, size := p.found, uint64(0), 0
	if found == nil {
		found = p.space[:0]
	}
	found = found[:0]
	for n := range m.Fields {
		f := &m.Fields[n]
		var hits uint64
		switch {
		case f.Role == fields.Final || f.Role == fields.Parameter && !m.IsString(f):
			if v, ok := m.Int(f); ok && v != 0 && (f.Role == fields.Final || f.Tensor < 0 && m.Key(f) == "triton_final_response") {
				final = true
			}
		case !fields.IsText(f.Role) || len(m.Bytes(f)) == 0:
		case f.Role == fields.Output && p.stream:
			text := m.Bytes(f)
			size += len(text)
			switch o := p.follow(m.Key(f)); {
			case mask&^kindMask == 0:
			case o == nil:
				hits = e.read(text, mask&^kindMask)
			default:
				o.s.m.found = 0
				o.s.m.write(text)
				hits = o.s.m.found
			}
			if mask&kindMask != 0 {
				hits |= e.read(text, mask&kindMask)
			}
		default:
			hits = e.read(m.Bytes(f), mask)
			size += len(m.Bytes(f))
		}
		found = append(found, hits)
		all |= hits
	}
	p.found = found
	last := -1
	if final && p.stream {
		// A word at the very end of an output ends with it.
		var hits uint64
		for i := range p.outputs {
			c := p.outputs[i].s.m
			c.found = 0
			c.end()
			hits |= c.found
		}
		if all |= hits; hits != 0 {
			last = len(found)
			found = append(found, hits)
		}
	}
	if !e.answer.needed(all) {
		p.delivered += size
		return nil
	}
	texts := make([]text, 0, len(m.Fields)+1)
	for n := range m.Fields {
		f := &m.Fields[n]
		if !fields.IsText(f.Role) {
			continue
		}
		value := m.Bytes(f)
		if !m.IsString(f) {
			value = m.AppendText(nil, f)
		}
		texts = append(texts, text{place: inAnswer, name: m.Path(f), value: value, found: found[n], field: n})
	}
	if last >= 0 {
		// There is no text left to hold it: it stands for the output's end.
		texts = append(texts, text{place: inAnswer, name: "outputs", value: []byte("\n"), found: found[last], field: -1})
	}
	if err := p.act(m, texts, true); err != nil {
		return err
	}
	p.delivered += size
	return nil
}

// follow is the output that the next chunk with this key goes on with.
func (p *part) follow(key string) *output {
	for i := range p.outputs {
		if o := &p.outputs[i]; o.round != p.round && o.key == key {
			o.round = p.round
			return o
		}
	}
	if len(p.outputs) == maxOutputs {
		return nil
	}
	s := scratches.Get().(*scratch)
	s.m.reset()
	p.outputs = append(p.outputs, output{key: key, round: p.round, s: s})
	return &p.outputs[len(p.outputs)-1]
}

// End gives back the matchers.
func (p *part) End(interceptors.Outcome) {
	if p.prompt != nil {
		p.prompt.put()
		p.prompt = nil
	}
	for i := range p.outputs {
		p.outputs[i].s.put()
	}
	p.outputs = nil
}

const notInspected place = 255

// placeOf is the collection for a role of a request's field.
func placeOf(r fields.Role) place {
	switch r {
	case fields.Prompt, fields.Output, fields.ErrorText:
		return inPrompt
	case fields.Parameter:
		return inParameter
	case fields.Model, fields.ModelVersion, fields.RequestID, fields.SequenceID, fields.Identifier:
		return inIdentifier
	}
	return notInspected
}

// act runs the rules and does what they say.
func (p *part) act(m *fields.Message, texts []text, answer bool) error {
	o, err := p.policy.engine.judge(texts, answer)
	switch {
	case err == nil:
	case errors.Is(err, errLimit):
		return interceptors.Deny(name, interceptors.MessageTooLarge, "the message has more texts than can be inspected; send fewer elements")
	default:
		return &interceptors.Denial{Policy: name, Reason: interceptors.PolicyUnavailable,
			Message: "the message could not be inspected", Cause: err}
	}
	for _, h := range o.matched {
		if h.rule.shadow {
			p.emit("shadow", h.rule, texts, h.text)
		}
	}
	if o.denied != nil {
		reason, what := interceptors.PromptRejected, "the request"
		if answer {
			reason, what = interceptors.OutputRejected, "the model's answer"
		}
		d := interceptors.Deny(name, reason, "%s was refused by a content rule", what).
			With("ruleId", strconv.Itoa(o.denied.id)).With("ruleClass", o.denied.class)
		if o.at >= 0 {
			d.Field = plainPath(texts[o.at].name)
			d = d.With("field", d.Field)
		}
		if answer {
			d = d.With("deliveredBytes", strconv.Itoa(p.delivered))
		}
		return d
	}
	p.redact(m, texts, o.redactions)
	return nil
}

// redact replaces what rules found.
func (p *part) redact(m *fields.Message, texts []text, redactions []redaction) {
	if len(redactions) == 0 {
		return
	}
	of := make(map[*text][]redaction, len(redactions))
	for _, r := range redactions {
		of[r.text] = append(of[r.text], r)
	}
	for i := range texts {
		t := &texts[i]
		list := of[t]
		if list == nil || t.field < 0 || !fields.IsText(m.Fields[t.field].Role) || !m.IsString(&m.Fields[t.field]) {
			continue
		}
		var mask uint64
		for _, r := range list {
			mask |= r.mask
		}
		m.Set(&m.Fields[t.field], replace(t.value, findSpans(nil, t.value, mask)))
		for _, r := range list {
			p.emit("redacted", p.policy.engine.rules[r.rule], texts, i)
		}
	}
}

func (p *part) emit(event string, r *rule, texts []text, at int) {
	attrs := []string{"ruleId", strconv.Itoa(r.id), "ruleClass", r.class}
	if at >= 0 {
		attrs = append(attrs, "field", plainPath(texts[at].name))
	}
	p.inference.Emit(interceptors.Event{Policy: name, Name: event, Attributes: attrs})
}

// plainPath is a path without what a caller may have written into it: a name
// that does not look like one ends it.
func plainPath(path string) string {
	for i := range len(path) {
		if c := path[i]; i == 128 || !alnum(c) && !strings.ContainsRune("._-", rune(c)) {
			return path[:i] + "…"
		}
	}
	return path
}

// Verdict is what became of a single text.
type Verdict struct {
	// Verdict is "allow", "deny" or "redact".
	Verdict string `json:"verdict"`
	// Score is how sure the rules are that it is an attack, from 0 to 1: that of
	// the severest rule that matched, CRITICAL .9, ERROR .8, WARNING .6, NOTICE .4,
	// a rule without a severity .5. It is not a probability yet.
	Score float64 `json:"score"`
	// Rules are the ids of the rules that matched. A rule that denies ends the
	// inspection.
	Rules []string `json:"rules"`
}

// Text inspects one text as if it were the prompt of a request, at the path
// "text". It says nothing of rules in shadow. The error is the engine's.
func (p *Policy) Text(prompt []byte) (Verdict, error) {
	e := p.engine
	v := Verdict{Verdict: "allow", Rules: []string{}}
	found := e.read(prompt, e.request.mask)
	if !e.request.needed(found) {
		return v, nil
	}
	o, err := e.judge([]text{{place: inPrompt, name: "text", value: prompt, found: found}}, false)
	if err != nil {
		return v, err
	}
	if len(o.redactions) > 0 {
		v.Verdict = "redact"
	}
	if o.denied != nil {
		v.Verdict = "deny"
	}
	for _, h := range o.matched {
		if !h.rule.shadow {
			v.Score = max(v.Score, h.rule.severity)
			v.Rules = append(v.Rules, strconv.Itoa(h.rule.id))
		}
	}
	return v, nil
}
