package inspect

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/sluicegate/sluice/interceptors"
	"github.com/sluicegate/sluice/interceptors/dialect"
	"github.com/sluicegate/sluice/interceptors/fields"
	"github.com/sluicegate/sluice/interceptors/inspect/classify"
	configv1 "github.com/sluicegate/sluice/proto/gen/sluice/config/v1"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"
)

// Option changes what New makes.
type Option func(*options)

type options struct {
	dialect *dialect.Dialect
	before  *Policy
}

// WithGuardDialect says what is known of the API of the guard model's back end.
// Default: Triton's.
func WithGuardDialect(d *dialect.Dialect) Option { return func(o *options) { o.dialect = d } }

// WithBefore has a policy with the same guard model go on with what the one before
// knows of it: its answers, its budget and whether it fails.
func WithBefore(p *Policy) Option { return func(o *options) { o.before = p } }

// GuardClass is the class of what the guard model refuses, in the place of a rule's.
const GuardClass = "guard"

// The defaults of the configuration, beside the band's, which begins where one
// harmless text in fifty does. Chosen.
const (
	guardInput    = "text_input"
	guardOutput   = "text_output"
	guardTimeout  = 500 * time.Millisecond
	guardBytes    = 64 << 10
	guardAnswers  = 4096
	guardLifetime = 5 * time.Minute
)

// guard is a model that is asked about prompts of which the classifier is not sure.
type guard struct {
	config   *configv1.Guard
	places   [places]bool // of the texts that it is asked about
	from, to float32
	max      int // bytes of a text
	shadow   bool
	open     bool // what it cannot be asked about passes
	inquiry  inquiry
	conn     atomic.Pointer[connection]
	*judge
}

// connection is where the guard model is.
type connection struct{ grpc.ClientConnInterface }

func newGuard(cfg *configv1.Guard, o options) (*guard, error) {
	g := &guard{
		config: cfg,
		from:   classify.Threshold(.02),
		to:     1,
		max:    guardBytes,
		shadow: cfg.GetShadow(),
		open:   cfg.GetOnFailure() == configv1.GuardFailure_GUARD_FAILURE_ALLOW,
	}
	if cfg.From != nil {
		g.from = float32(cfg.GetFrom())
	}
	if cfg.To != nil {
		g.to = float32(cfg.GetTo())
	}
	if g.from > g.to {
		return nil, fmt.Errorf("from: the band would be empty, from %g to %g", g.from, g.to)
	}
	if n := cfg.GetMaxBytes(); n > 0 {
		g.max = int(n)
	}
	if len(cfg.GetRoles()) == 0 {
		g.places[inPrompt] = true
	}
	for n, r := range cfg.GetRoles() {
		at := placeOf(r)
		if at != inPrompt && at != inParameter {
			return nil, fmt.Errorf("roles[%d]: a guard model can be asked about ROLE_PROMPT and ROLE_PARAMETER", n)
		}
		g.places[at] = true
	}
	for n, w := range cfg.GetSafe() {
		if slices.ContainsFunc(cfg.GetUnsafe(), func(u string) bool { return strings.EqualFold(u, w) }) {
			return nil, fmt.Errorf("safe[%d]: %q is one of unsafe, too", n, w)
		}
	}
	var err error
	if g.inquiry, err = newInquiry(cfg, o.dialect); err != nil {
		return nil, err
	}
	if b := o.before; b != nil && b.guard != nil && proto.Equal(b.guard.config, cfg) {
		g.judge = b.guard.judge
	} else {
		g.judge = newJudge(cfg)
	}
	return g, nil
}

// Connect says where the guard model is: a connection that leads to its back end, and
// not through a chain that asks it. Until then it cannot be asked. Safe at any time;
// does nothing without a guard model.
func (p *Policy) Connect(cc grpc.ClientConnInterface) {
	if p.guard != nil {
		p.guard.conn.Store(&connection{cc})
	}
}

// note takes down what the classifier thinks of a text.
func (p *part) note(at place, score float32) {
	if g := p.policy.guard; g != nil && g.places[at] {
		p.worst = max(p.worst, score)
	}
}

// guardedPart is the policy's part in an inference about which the guard model may be
// asked. It is asked in Wait, so that a stream of many is read on.
type guardedPart struct {
	part
	asks []byte // what it is to be asked; nil for nothing
}

var _ interceptors.Waiter = (*guardedPart)(nil)

// Request inspects a message, and keeps its text if the guard model is to be asked.
func (p *guardedPart) Request(m *fields.Message) error {
	g, before := p.policy.guard, p.tail
	if p.sequenced() {
		before = p.policy.sequences.of(p.sequence())
	}
	p.worst = -1
	if err := p.part.Request(m); err != nil {
		return err
	}
	if p.worst < g.from || p.worst > g.to {
		return nil
	}
	n := 0
	for k := range m.Fields {
		if f := &m.Fields[k]; g.asksOf(f) {
			n += len(m.Bytes(f)) + 1
		}
	}
	if n-1 > g.max {
		p.tell("skipped", "size")
		if g.open || g.shadow {
			return nil
		}
		return interceptors.Deny(name, interceptors.MessageTooLarge,
			"the guard model must be asked about the request, which has more text than it takes").With("ruleClass", GuardClass)
	}
	text := make([]byte, 0, n+len(before.text)+len(before.ends))
	if room := g.max - n; room >= len(before.text)+len(before.ends) {
		at := 0
		for _, end := range before.ends {
			text = append(append(text, before.text[at:end]...), '\n')
			at = end
		}
	}
	for k := range m.Fields {
		if f := &m.Fields[k]; g.asksOf(f) {
			text = append(append(text, m.Bytes(f)...), '\n') // as redacted
		}
	}
	if len(text) > 0 {
		p.asks = text[:len(text)-1]
	}
	return nil
}

// asksOf reports whether the guard model is asked about a field.
func (g *guard) asksOf(f *fields.Field) bool {
	at := placeOf(f.Role)
	return at < places && g.places[at]
}

// Ready reports that there is nothing to ask.
func (p *guardedPart) Ready() bool { return p.asks == nil }

// Wait asks the guard model, and refuses what it refuses.
func (p *guardedPart) Wait(ctx context.Context) error {
	g, text := p.policy.guard, p.asks
	p.asks = nil
	unsafe, how, err := g.about(ctx, text, g.ask)
	if ctx.Err() != nil && err != nil {
		return context.Cause(ctx)
	}
	var failed *failure
	switch {
	case errors.As(err, &failed):
		p.tell(how, failed.why)
		if g.open || g.shadow {
			return nil
		}
		return &interceptors.Denial{Policy: name, Reason: interceptors.PolicyUnavailable, Cause: err, RetryAfter: failed.retry,
			Message: "the guard model, which must be asked about the request, gave no answer"}
	case err != nil:
		return err
	}
	p.tell(how, "")
	if !unsafe {
		return nil
	}
	p.tell("unsafe", "")
	if g.shadow {
		p.inference.Emit(interceptors.Event{Policy: name, Name: "shadow", Attributes: []string{"ruleClass", GuardClass}})
		return nil
	}
	return interceptors.Deny(name, interceptors.PromptRejected, "the request was refused by the guard model").With("ruleClass", GuardClass)
}

// tell tells of a question to the guard model, by the event guard_asked, guard_cached,
// guard_shared, guard_skipped, guard_failed or guard_unsafe.
func (p *guardedPart) tell(what, why string) {
	attributes := []string{"ruleClass", GuardClass}
	if why != "" {
		attributes = append(attributes, "why", why)
	}
	p.inference.Emit(interceptors.Event{Policy: name, Name: "guard_" + what, Attributes: attributes})
}

// failure is why the guard model did not answer. It says nothing of what a server said,
// which may quote the text.
type failure struct {
	why   string
	retry time.Duration // when it may be asked again; 0 if that is not known
}

func (f *failure) Error() string { return "the guard model: " + f.why }
