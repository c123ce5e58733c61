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
// Beside Coraza's operators there are five of ours:
//
//	@sluicePhrases injection,extraction,jailbreak,exfiltration,tool,hidden,canary
//	@sluicePersonal email,phone,card,iban,ssn,id,ip
//	@sluiceSecret privatekey,aws,github,token,assigned
//	@sluiceStructure script,repetition,control
//	@sluiceScore 0.005
//
// and two actions: redact, which goes with the second and third: what was found
// becomes "[redacted:email]"; and annotate: the model server gets the rule's
// class as metadata (AnnotationHeader). The files @sluice/starter.conf (used by
// default), @sluice/personal.conf, @sluice/secrets.conf and
// @sluice/structure.conf can be included.
//
// @sluiceScore is the classifier's (package classify): it matches where the score
// of a prompt is one that less than this share of harmless texts reaches. It reads
// all that a text stands for, too, and only where a rule asks for it. In requests
// of several prompts it reads each, and all in a row.
//
// Every text is read once, before the rules, as it came and in all that it
// stands for: normalised (see normalize.go), decoded to a depth of three and
// spelled out (see views.go). The work is bounded by the length of the text; a
// text that stands for more is refused whole. Rule sets that are no more than our
// operators are evaluated by a plan; others by Coraza, in a transaction (see
// plan.go). TestPlan holds that the verdict is the same.
//
// Phrases and canaries are seen across the elements, tensors and messages of one
// inference's prompts, and across the chunks of one output, however they are cut;
// encoded text across the elements and messages of prompts. Output that was
// delivered before a phrase was complete is not taken back; a denial says how
// much it was (deliveredBytes). In streamed output, personal data, secrets and
// encoded text are looked for within one chunk: holding chunks back is still to
// come.
//
// Nothing of a text is logged, written to disk or told to the caller. If the
// engine fails the inference is refused.
package inspect

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"

	"github.com/sluicegate/sluice/interceptors"
	"github.com/sluicegate/sluice/interceptors/dialect"
	"github.com/sluicegate/sluice/interceptors/fields"
	configv1 "github.com/sluicegate/sluice/proto/gen/sluice/config/v1"
	"google.golang.org/grpc/metadata"
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
	if len(cfg.GetCanaries()) > 0 && !cfg.GetResponses() {
		return nil, errors.New("inspect.canaries: outputs are not read; set responses: true")
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
	if p.engine.annotates {
		return &annotated{Policy: p}, nil
	}
	return p, nil
}

// annotated is the policy's part in a call whose metadata it may add to. That
// goes out with the first message of the first inference.
type annotated struct {
	*Policy
	begun atomic.Bool
}

// Start takes part in every inference.
func (a *annotated) Start(i *interceptors.Inference) (interceptors.InferencePolicy, error) {
	return &part{policy: a.Policy, inference: i, stream: i.Call.Method.ServerStreams, annotates: !a.begun.Swap(true)}, nil
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
	annotates bool // the call's metadata is still to be sent

	prompt    *scratch // the prompts so far
	tail      []byte   // and their end
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

// Deaf says whether responses are inspected.
func (p *part) Deaf() bool { return !p.policy.responses }

// Response inspects a response message.
func (p *part) Response(m *fields.Message) error {
	if p.Deaf() {
		return nil
	}
	e := p.policy.engine
	mask := e.answer.mask
	p.round++
	final := !p.stream
	s := borrow(p.policy.engine)
	defer s.put()
	found, all, size := p.room(), uint64(0), 0
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
			case mask&surfaceMask == 0:
			case o == nil:
				s.whole(text, mask&surfaceMask)
				hits = s.found
			default:
				hits = o.s.flow(text)
			}
			if mask&kindMask != 0 {
				s.whole(text, mask&kindMask)
				hits |= s.found
			}
		default:
			s.whole(m.Bytes(f), mask)
			hits = s.found
			size += len(m.Bytes(f))
		}
		if s.over {
			return tooDeep()
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
			hits |= p.outputs[i].s.end()
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
	some := e.answer.whole()
	var texts []text
	for n := range m.Fields {
		f := &m.Fields[n]
		if !fields.IsText(f.Role) || some && found[n]&mask == 0 {
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
	s := borrow(p.policy.engine)
	s.open()
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
	o, err := p.policy.engine.decide(texts, answer)
	switch {
	case err == nil:
	case errors.Is(err, errDepth):
		return tooDeep()
	case errors.Is(err, errLimit):
		return interceptors.Deny(name, interceptors.MessageTooLarge, "the message has more texts than can be inspected; send fewer elements")
	default:
		return &interceptors.Denial{Policy: name, Reason: interceptors.PolicyUnavailable,
			Message: "the message could not be inspected", Cause: err}
	}
	for _, h := range o.matched {
		switch {
		case h.rule.shadow:
			p.emit("shadow", h.rule, texts, h.text)
		case h.rule == o.denied:
		case h.rule.log:
			p.emit("matched", h.rule, texts, h.text)
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
	if p.annotates {
		for _, h := range o.matched {
			if h.rule.annotate && !h.rule.shadow {
				p.annotate(h.rule.class)
			}
		}
	}
	return nil
}

// AnnotationHeader is the metadata by which the model server learns the classes
// of the rules with the action annotate that matched, one value each. Doors
// take it from no caller.
const AnnotationHeader = "x-sluice-class"

func (p *part) annotate(class string) {
	c := p.inference.Call
	if slices.Contains(c.Outgoing[AnnotationHeader], class) {
		return
	}
	if c.Outgoing == nil {
		c.Outgoing = make(metadata.MD, 1)
	}
	c.Outgoing.Append(AnnotationHeader, class)
}

// redact replaces what rules found.
func (p *part) redact(m *fields.Message, texts []text, redactions []redaction) {
	if len(redactions) == 0 {
		return
	}
	s := borrow(p.policy.engine)
	defer s.put()
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
		s.whole(t.value, mask)
		m.Set(&m.Fields[t.field], replace(t.value, s.spans))
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
