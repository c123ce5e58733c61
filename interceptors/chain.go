package interceptors

import (
	"context"
	"time"

	"github.com/sluicegate/sluice/interceptors/dialect"
	"github.com/sluicegate/sluice/interceptors/fields"
	"github.com/sluicegate/sluice/interceptors/tokens"
	"google.golang.org/grpc/metadata"
)

// Policy is one concern that can refuse, change or watch an inference. Its
// methods are called by many goroutines at once.
type Policy interface {
	// Name names the policy in denials, events and metrics.
	Name() string
	// Begin sees a call when only its metadata is known. It may refuse it with
	// a *Denial, and must not wait. A nil CallPolicy means that the policy has
	// no interest in this call.
	Begin(*Call) (CallPolicy, error)
}

// CallPolicy is a policy's part in one call. Start may be called for several
// inferences at once; End is called once, after every inference has ended.
type CallPolicy interface {
	// Start sees an inference begin: its first message is in hand and the
	// Inference is filled in. A nil InferencePolicy means no interest. It must
	// not wait: see Waiter. If it refuses it has nothing left open.
	Start(*Inference) (InferencePolicy, error)
	End(Outcome)
}

// InferencePolicy is a policy's part in one inference. The chain calls its
// methods one at a time.
type InferencePolicy interface {
	// Request sees each request message of the inference, the first included,
	// before it is forwarded, and may change it.
	Request(*fields.Message) error
	// Response sees each response message before it is delivered, and may
	// change it. To refuse ends the inference: the message is not delivered.
	Response(*fields.Message) error
	// End is called exactly once, whatever became of the inference.
	End(Outcome)
}

// Waiter is an InferencePolicy whose inference may have to wait before it is
// forwarded. Only here may a policy wait. If it is not ready after its first Request,
// the policies after it start when it has waited.
type Waiter interface {
	// Ready reports that there is nothing to wait for.
	Ready() bool
	// Wait blocks until the inference may be forwarded, until it is refused (a
	// *Denial), or until the context ends (its error). It is called at most
	// once for each Request, without the chain's lock: the caller may end the
	// inference while it waits.
	Wait(context.Context) error
}

// Deaf is an InferencePolicy that may have nothing to do with responses.
type Deaf interface {
	// Deaf reports that the chain need not call Response, which would do nothing. It
	// is asked once, before the first Request.
	Deaf() bool
}

// Gate is a Policy that can refuse a call before a stream is made for it.
type Gate interface {
	// Allow is Begin without state: it may be called for a call that never
	// begins.
	Allow(*Call) error
}

// Authorizer is a CallPolicy that decides, before anything else is looked at,
// whether the caller may use the model that an inference names. Who may not
// learns nothing of the model: not where it is, nor that it exists.
type Authorizer interface {
	// Authorize refuses with a *Denial, or nil. Like Start it must not wait. The
	// message is the first of the inference.
	Authorize(*Inference, *fields.Message) error
}

// Witness is a CallPolicy that wants to know of inferences that the chain itself
// refused before any Start, for what their first message is.
type Witness interface {
	Refused(*Inference, *Denial)
}

// Observer is an InferencePolicy that wants to know of Events.
type Observer interface {
	Observe(Event)
}

// Event is something worth telling about an inference that is not its end: a
// text was redacted, a rule in shadow would have refused, an inference queued.
// It never holds a prompt or an output.
type Event struct {
	Policy string
	Name   string
	// Attributes are pairs of name and value.
	Attributes []string
}

// Outcome says how an inference or a call ended.
type Outcome struct {
	// Err is nil if it ended well, a *Denial if a policy refused or cut it, a
	// context error if the caller went away, and else the error of the model
	// server or the handler.
	Err error
}

// Denial is the denial that ended it, or nil.
func (o Outcome) Denial() *Denial {
	d, _ := o.Err.(*Denial) //nolint:errorlint // a denial is never wrapped
	return d
}

// Backend is a model server as the chain sees it: which models it serves and
// what its API means.
type Backend struct {
	// Name is the configured name.
	Name string
	// Models that it serves; nil means every model.
	Models map[string]bool
	// Dialect is what is known of its API.
	Dialect *dialect.Dialect
	// AllowSharedMemory lets tensors in shared memory pass unseen.
	AllowSharedMemory bool
	// AllowTokenIDs lets prompts pass unread that are token ids.
	AllowTokenIDs bool
	// Tokenizer is the tokenizer of a model, by which its text is counted; nil, or one
	// that gives nil, means that words are counted.
	Tokenizer func(model string) *tokens.Tokenizer
	// Datatypes are the element types that may pass; nil means every type.
	Datatypes map[string]bool
	// Usage is where the server says in its header or trailer what a call used.
	Usage Usage
	// MaskErrors replaces the text of errors that the server reports in band,
	// which may quote prompts or addresses. A door does the same for statuses.
	MaskErrors bool
}

// tokenizer is that of a model; nil if words are counted.
func (b *Backend) tokenizer(model string) *tokens.Tokenizer {
	if b.Tokenizer == nil {
		return nil
	}
	return b.Tokenizer(model)
}

func (b *Backend) serves(model string) bool { return b.Models == nil || b.Models[model] }

// Chain is an ordered list of policies and the back ends they guard. It is
// immutable and safe for concurrent use; a new configuration is a new Chain.
type Chain struct {
	policies []Policy
	backends []*Backend
	live     *Live
}

// New makes a chain. The order of the policies is the order of the requests;
// the first back end that serves a method and model takes the call.
func New(backends []*Backend, policies ...Policy) *Chain {
	return new(Live).Chain(backends, policies...)
}

// method is what is known of a full method name, by the first back end that
// has it; nil if none does.
func (c *Chain) method(name string) *dialect.Method {
	for _, b := range c.backends {
		if m := b.Dialect.Methods[name]; m != nil {
			return m
		}
	}
	return nil
}

// route picks the back end for a method and model; nil if none serves it. The
// policies have judged the call by the kind of its method: one of another kind
// under the same path is no place to go.
func (c *Chain) route(method, model string, kind dialect.Kind) (*Backend, *dialect.Method) {
	for _, b := range c.backends {
		m := b.Dialect.Methods[method]
		if m != nil && m.Kind == kind && (model == "" || b.serves(model)) {
			return b, m
		}
	}
	return nil, nil
}

// Begin opens a call: every policy sees its metadata. The error is a *Denial,
// and then nothing is left open. Otherwise the caller must End the call.
func (c *Chain) Begin(ctx context.Context, info CallInfo) (*Call, error) {
	call := &Call{
		CallInfo: info,
		Method:   c.method(info.FullMethod),
		Began:    time.Now(),
		chain:    c,
	}
	if call.ctx = ctx; info.Cancel == nil {
		call.ctx, call.cancel = context.WithCancelCause(ctx)
	}
	call.parts = call.partsSpace[:0]
	err := call.begin(c.policies)
	if err == nil && call.Method == nil {
		err = Deny("chain", MethodUnknown, "no back end has this method")
	}
	if err != nil {
		call.End(err)
		return nil, err
	}
	c.live.add(call)
	return call, nil
}

// Allow asks the gates whether a call may begin at all. It does not wait, so
// that it may run before a stream is made (grpc's tap). The policies before a
// gate that refuses see the call begin and end, as if it had refused in Begin;
// nothing else is touched.
func (c *Chain) Allow(ctx context.Context, info CallInfo) error {
	call := &Call{CallInfo: info, Method: c.method(info.FullMethod), Began: time.Now(), chain: c, ctx: ctx}
	for n, p := range c.policies {
		if g, ok := p.(Gate); ok {
			if d := call.allowed(p.Name(), g); d != nil {
				return call.refuse(c.policies[:n], d)
			}
		}
	}
	if call.Method == nil {
		return call.refuse(c.policies, Deny("chain", MethodUnknown, "no back end has this method"))
	}
	return nil
}

// allowed asks one gate.
func (c *Call) allowed(name string, g Gate) (d *Denial) {
	defer func() {
		if v := recover(); v != nil {
			d = Recovered(name, v)
		}
	}()
	if err := g.Allow(c); err != nil {
		return asDenial(name, err)
	}
	return nil
}

// refuse lets the policies that come first see a call that is refused before it begins.
func (c *Call) refuse(policies []Policy, d *Denial) error {
	c.ctx, c.cancel = context.WithCancelCause(c.ctx)
	if err := c.begin(policies); err != nil {
		d = asDenial("chain", err)
	}
	c.End(d)
	return d
}

// CallInfo is what a door knows of a call when it begins.
type CallInfo struct {
	// FullMethod is "/package.Service/Method" as it was sent.
	FullMethod string
	// Peer is who is at the other end of the connection.
	Peer Peer
	// Metadata is what the caller sent. Not to be changed.
	Metadata metadata.MD
	// Client says that we make the call instead of serving it.
	Client bool
	// Cancel ends the context that the call begins with, for the reason that it is
	// given. A door has it whose transport ends that context anyway when the call ends;
	// a context of the chain's own, which there is if Cancel is nil, would be a
	// twentieth of what a short call costs. It is called at most once, by Abort, on a
	// goroutine of its own.
	Cancel func(error)
}
