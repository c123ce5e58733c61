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
//	@sluicePersonal email,phone,card,iban,ssn,id,birth,ip,address
//	@sluiceSecret privatekey,aws,github,token,assigned
//	@sluiceStructure script,repetition,control
//	@sluiceScore 0.005
//
// and four actions: redact, which goes with the second and third: what was found
// becomes "[redacted:email]"; on outputs replace:'text', in place of what one of
// the first three found, and truncate:'text', in place of that and all that
// follows; and annotate: the model server gets the rule's class as metadata
// (AnnotationHeader). The files @sluice/starter.conf (used by
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
// inference's prompts, however they are cut; encoded text, personal data and secrets,
// too, and all of it across the messages of a sequence (see joined.go). What lies in
// part in a message that was delivered is replaced in what was not. In outputs all of it is seen across elements and chunks:
// chunks are held back while they may still become part of what a rule looks for
// (see flow.go), and decisions do not depend on how the text was cut. A denial says
// how much of the output was delivered before (deliveredBytes).
//
// Where the classifier is not sure a guard model can be asked, before the inference
// takes anything (see guard.go).
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

// Policy inspects. It is safe for concurrent use, and remembers nothing but the ends of
// sequences (see joined.go) and what a guard model said (see judge.go).
type Policy struct {
	engine    *engine
	responses bool
	sequences sequences
	guard     *guard // nil without one
}

var _ interceptors.Policy = (*Policy)(nil)

// New compiles the rules of a configuration; nil is the starter rules alone.
// Rule files are relative to dir. An error begins with the field that is at
// fault; one in a rule names its file and line too.
func New(cfg *configv1.Inspect, dir string, opts ...Option) (*Policy, error) {
	e, err := newEngine(cfg, dir)
	if err != nil {
		return nil, fmt.Errorf("inspect.%w", err)
	}
	if len(cfg.GetCanaries()) > 0 && !cfg.GetResponses() {
		return nil, errors.New("inspect.canaries: outputs are not read; set responses: true")
	}
	p := &Policy{engine: e, responses: cfg.GetResponses()}
	if cfg.GetGuard() != nil {
		var o options
		for _, opt := range opts {
			opt(&o)
		}
		if p.guard, err = newGuard(cfg.GetGuard(), o); err != nil {
			return nil, fmt.Errorf("inspect.guard.%w", err)
		}
		e.request.judge(p.guard.places)
	}
	return p, nil
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
	return a.start(i, !a.begun.Swap(true)), nil
}

// Start takes part in every inference.
func (p *Policy) Start(i *interceptors.Inference) (interceptors.InferencePolicy, error) {
	return p.start(i, false), nil
}

func (p *Policy) start(i *interceptors.Inference, annotates bool) interceptors.InferencePolicy {
	stream := i.Call.Method.ServerStreams
	if p.guard != nil && (!i.Call.Client || i.Context().Value(askingKey{}) == nil) {
		return &guardedPart{part: part{policy: p, inference: i, stream: stream, annotates: annotates}}
	}
	return &part{policy: p, inference: i, stream: stream, annotates: annotates}
}

// End does nothing.
func (p *Policy) End(interceptors.Outcome) {}

// part is the policy's part in one inference.
type part struct {
	policy    *Policy
	inference *interceptors.Inference
	stream    bool // responses may be many
	annotates bool // the call's metadata is still to be sent

	prompt    *scratch   // the prompts so far
	tail      tail       // and their end
	crossings []crossing // what was found over elements of the message at hand
	found     []uint64   // by field of the message at hand
	space     [8]uint64
	worst     float32 // score of the message at hand, for the guard model

	flows     []*flow // the outputs so far
	rows      []*flow // those of a choice in a row, where there are several
	copies    []*flow // what is written once more, by path
	round     int     // counts responses
	next      int     // number of the next one
	replies   []reply // those that are held, the last of which came last
	cuts      []cut   // what is to be replaced in them
	delivered int     // bytes of output
	told      []toldOf
}

// Deaf says whether responses are inspected.
func (p *part) Deaf() bool { return !p.policy.responses || !p.policy.engine.answer.asks() }

// End gives back the matcher.
func (p *part) End(interceptors.Outcome) {
	p.forget()
	for f := range p.all() {
		f.put()
	}
	p.flows, p.rows, p.copies, p.replies, p.cuts = nil, nil, nil, nil, nil
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
	if err != nil {
		return refusal(err)
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
		return p.denial(o, texts, answer)
	}
	for _, r := range o.redactions {
		if r.text.field >= 0 && m.Fixed(&m.Fields[r.text.field]) {
			o.denied, o.at = p.policy.engine.rules[r.rule], slices.IndexFunc(texts, func(t text) bool { return t.field == r.text.field })
			return p.denial(o, texts, answer)
		}
	}
	p.redact(m, texts, o.redactions, answer)
	if p.annotates {
		for _, h := range o.matched {
			if h.rule.annotate && !h.rule.shadow {
				p.annotate(h.rule.class)
			}
		}
	}
	return nil
}

// refusal refuses what could not be judged.
func refusal(err error) error {
	switch {
	case errors.Is(err, errDepth):
		return tooDeep()
	case errors.Is(err, errLimit):
		return interceptors.Deny(name, interceptors.MessageTooLarge, "the message has more texts than can be inspected; send fewer elements")
	}
	return &interceptors.Denial{Policy: name, Reason: interceptors.PolicyUnavailable,
		Message: "the message could not be inspected", Cause: err}
}

// denial is what a rule refused.
func (p *part) denial(o outcome, texts []text, answer bool) error {
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
	return d
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
func (p *part) redact(m *fields.Message, texts []text, redactions []redaction, answer bool) {
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
		from := 0
		for _, c := range p.crossings {
			switch {
			case answer || c.field != t.field || mask>>c.kind&1 == 0:
			case c.on:
				from = c.end
			default:
				s.spans = append(s.spans, c.span)
			}
		}
		f := &m.Fields[t.field]
		m.Set(f, replace(t.value, from, s.spans, list, m.Sized(f)))
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
