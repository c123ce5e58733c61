package interceptors

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/sluicegate/sluice/interceptors/dialect"
	"github.com/sluicegate/sluice/interceptors/fields"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/metadata"
)

// Call is one RPC. The chain fills it in; policies read it.
type Call struct {
	CallInfo
	// Method is what is known of the method; nil if nothing is.
	Method *dialect.Method
	// Principal is who calls, as far as the identity policy accepts it: a SPIFFE
	// ID, or "anonymous" where callers need no identity. Empty before that policy,
	// and if it refused the identity. It need not be the peer: a caller may come
	// through a proxy.
	Principal string
	// ID is the principal's SPIFFE ID; zero for an anonymous caller.
	ID spiffeid.ID
	// Tenant is who pays, by the identity policy's template; "anonymous" for an
	// anonymous caller.
	Tenant string
	// Via is how the caller is known: "mtls", "jwt", "forwarded" or "anonymous"; ""
	// before the identity policy.
	Via string
	// Began is when the call began.
	Began time.Time
	// Outgoing is metadata to send on to the model server, beside the caller's and
	// in its place; a key without values keeps the caller's back. Policies add to
	// it in Begin, and in Start of the first inference.
	Outgoing metadata.MD

	chain      *Chain
	ctx        context.Context
	cancel     context.CancelCauseFunc // nil where the door has Cancel
	aborted    atomic.Pointer[error]   // the first reason, if the context did not end before
	expects    atomic.Bool             // the door waits for the caller's first message
	parts      []callPart
	partsSpace [6]callPart

	// Where the call is among those in flight: of the list's lock, except list.
	list       *liveList
	prev, next *Call

	mu      sync.Mutex
	backend *Backend // bound by the first message
	stream  *Stream
	single  *Inference
	open    map[string]*Inference // multiplexed: by the id on the way to the model server
	renames int
	late    []lateStart // inferences of which some policies have not started
	ended   bool
	trailer metadata.MD  // for the caller, when the call ends
	holds   atomic.Bool  // some inference has a Holder
	held    atomic.Int64 // bytes of responses that are held

	// latest is the inference that the last response belonged to, while it is on
	// the books: responses come in runs. Stored with mu held.
	latest atomic.Pointer[Inference]
}

type callPart struct {
	name   string
	policy CallPolicy
}

// lateStart is an inference of which only so many parts have started.
type lateStart struct {
	i       *Inference
	started int
}

// putOff notes that only some policies of an inference have started.
func (c *Call) putOff(i *Inference) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.late = append(c.late, lateStart{i, i.started})
	i.late = true
}

// allStarted notes that all have.
func (c *Call) allStarted(i *Inference) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.started(i)
}

func (c *Call) started(i *Inference) {
	c.late = slices.DeleteFunc(c.late, func(l lateStart) bool { return l.i == i })
}

// behind is how many parts of an inference may start before the one before it in its
// sequence has gone on: no more than have of that one. Else it could be given permits
// that the other, for which it has to wait, needs.
func (c *Call) behind(i *Inference) int {
	n := len(c.parts)
	if i.Sequence == "" || i.started > 0 {
		return n
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, l := range c.late {
		if l.i.Model == i.Model && l.i.Sequence == i.Sequence {
			n = min(n, l.started)
		}
	}
	return n
}

// Context is the context of the call. It carries what policies put into it
// with SetContext, and ends when the caller goes away, its deadline passes or
// the call is aborted; Cause says why.
func (c *Call) Context() context.Context { return c.ctx }

// SetContext replaces the context by one derived from it. Only a policy's Begin
// may do so.
func (c *Call) SetContext(ctx context.Context) { c.ctx = ctx }

// Cause says why the call's context has ended, or is about to: the error that it was
// aborted with, or else what context.Cause says; nil while the call goes on.
func (c *Call) Cause() error { return c.causeOf(c.ctx) }

// causeOf is Cause for a context that comes of the call's.
func (c *Call) causeOf(ctx context.Context) error {
	if err := c.aborted.Load(); err != nil {
		return *err
	}
	return context.Cause(ctx)
}

// Abort ends the call from outside, with a denial or another error: its
// context is cancelled and the door answers with the error. Safe at any time; only
// the first Abort counts, and none once the context has ended.
func (c *Call) Abort(err error) {
	if c.ctx.Err() != nil || !c.aborted.CompareAndSwap(nil, &err) {
		return
	}
	if c.cancel == nil {
		go c.Cancel(err)
		return
	}
	c.cancel(err)
}

// Expect notes whether the door waits for the caller's first message. Who looks at all
// live calls now and then (Live.Each) can so end those that stay silent: a timer for
// each call would be a thirtieth of what a short one costs.
func (c *Call) Expect(first bool) { c.expects.Store(first) }

// Expects is what Expect noted last.
func (c *Call) Expects() bool { return c.expects.Load() }

// SetTrailer has a door tell the caller something when the call ends, in a trailer:
// a key in lower case, and printable ASCII. A later value of a key replaces it. Only
// a policy's Start and End may do so. Clients' doors tell nobody.
func (c *Call) SetTrailer(key, value string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.trailer == nil {
		c.trailer = make(metadata.MD, 1)
	}
	c.trailer.Set(key, value)
}

// Trailer is what SetTrailer was told; nil if it was told nothing. A door asks after
// End.
func (c *Call) Trailer() metadata.MD {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.trailer
}

// AbortAfter aborts the call with what why returns if stop is not called in time.
func (c *Call) AbortAfter(d time.Duration, why func() error) (stop func() bool) {
	return time.AfterFunc(d, func() { c.Abort(why()) }).Stop
}

// begin lets policies see the call, in order, until one refuses it.
func (c *Call) begin(policies []Policy) (err error) {
	name := "chain"
	defer func() {
		if v := recover(); v != nil {
			err = Recovered(name, v)
		}
	}()
	for _, p := range policies {
		name = p.Name()
		part, err := p.Begin(c)
		if err != nil {
			return asDenial(name, err)
		}
		if part != nil {
			c.parts = append(c.parts, callPart{name, part})
		}
	}
	return nil
}

// End ends the call and whatever inferences are still open, with what became
// of it: nil if all went well. Only the first End counts.
func (c *Call) End(err error) {
	c.mu.Lock()
	if c.ended {
		c.mu.Unlock()
		return
	}
	c.ended = true
	var space [4]*Inference // as many as most calls have
	open := space[:0]
	if c.single != nil {
		open = append(open, c.single)
	}
	for _, i := range c.open {
		open = append(open, i)
	}
	c.mu.Unlock()
	c.aborted.CompareAndSwap(nil, &errEnded) // nobody can abort it any more
	c.remove()
	for _, i := range open {
		i.End(err)
	}
	for n := len(c.parts) - 1; n >= 0; n-- {
		endPart(c.parts[n], Outcome{Err: err})
	}
	if c.cancel != nil {
		c.cancel(errEnded)
	}
}

// errEnded is the cause of the context's end where the call ended by itself.
var errEnded = context.Canceled

func endPart(p callPart, o Outcome) {
	defer func() { _ = recover() }() // the other parts must end all the same
	p.policy.End(o)
}

// Request takes the next request message, and begins the inference that it
// belongs to or goes on with it. On success the message, with its edits, may be
// forwarded once the inference is Ready.
//
// The error is a *Denial. If the inference is not nil, it alone was refused,
// and Refusal can say so in band; else the whole call was.
func (c *Call) Request(e *Envelope) (*Inference, error) {
	c.mu.Lock()
	ended, backend, single := c.ended, c.backend, c.single
	c.mu.Unlock()
	if ended {
		return nil, hasEnded()
	}
	m := &e.Message
	r, bad, err := c.readRequest(e, c.Method)
	if backend == nil {
		backend, r, bad, err = c.route(e, r, bad, err)
	}
	switch {
	case err != nil:
		return nil, err
	case single != nil:
		return c.extend(single, &r, m, bad)
	}
	i := &Inference{Call: c, Backend: backend}
	i.read(&r)
	if denied := c.authorize(i, m); denied != nil {
		bad = denied
	} else if bad == nil {
		bad = c.structure(i, &r, m)
	}
	if bad != nil {
		c.witnessed(i, bad)
		return i, bad
	}
	i.countWith(backend.tokenizer(i.Model))
	i.InputTokens = i.countPrompt(m)
	// Once the inference is on the books the call may be ended at any time: its
	// End waits until every policy has started.
	i.mu.Lock()
	defer i.mu.Unlock()
	if !c.begun(i, &r, m) {
		return nil, hasEnded()
	}
	return i, i.startLocked(m)
}

// hasEnded refuses a message that comes too late. Nobody is there to be told.
func hasEnded() error { return Deny("chain", Draining, "the call has ended") }

// readRequest reads a message as the method's dialect does. It may be bad,
// although it can be read: then it asks for what cannot be granted.
func (c *Call) readRequest(e *Envelope, m *dialect.Method) (r dialect.Request, bad, err error) {
	if err := e.read(m.Request); err != nil {
		return dialect.Request{}, nil, messageDenial(err)
	}
	if r, bad = m.ReadRequest(&e.Message); bad != nil {
		bad = messageDenial(bad)
	}
	return r, bad, nil
}

// route finds the back end for the first message of a call. The message was
// read as the first back end reads it; if it is another's, and that has another
// dialect under the same path, it is read again. A back end without the model
// decides nothing: not even that the message cannot be read.
func (c *Call) route(e *Envelope, r dialect.Request, bad, err error) (*Backend, dialect.Request, error, error) {
	if err == nil {
		b, m := c.chain.route(c.FullMethod, r.Model, c.Method.Kind)
		if b == nil || m == c.Method {
			return b, r, bad, nil
		}
		if r, bad, err = c.readRequest(e, m); err == nil {
			c.take(m)
		}
		return b, r, bad, err
	}
	for _, b := range c.chain.backends {
		m := b.Dialect.Methods[c.FullMethod]
		if m == nil || m == c.Method {
			continue
		}
		r, bad, again := c.readRequest(e, m)
		if again != nil || r.Model == "" {
			continue
		}
		if to, _ := c.chain.route(c.FullMethod, r.Model, c.Method.Kind); to == b {
			c.take(m)
			return b, r, bad, nil
		}
	}
	return nil, r, nil, err
}

// take makes the call one of another back end's dialect.
func (c *Call) take(m *dialect.Method) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.Method = m
}

// extend is a later message of a call that is one inference.
func (c *Call) extend(i *Inference, r *dialect.Request, m *fields.Message, bad error) (*Inference, error) {
	if r.Model != i.Model && r.Model != "" {
		err := Deny("chain", MessageAmbiguous,
			"the stream belongs to the model of its first message; open another stream for another model")
		err.Field = "model_name"
		return i, err
	}
	if r.Version != i.Version && r.Version != "" {
		err := Deny("chain", MessageAmbiguous,
			"the stream belongs to the model version of its first message; open another stream for another version")
		err.Field = "model_version"
		return i, err
	}
	if bad == nil {
		bad = c.structure(i, r, m)
	}
	if bad != nil {
		return i, bad
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	i.InputTokens += i.countPrompt(m)
	i.MaxOutputTokens = max(i.MaxOutputTokens, r.MaxTokens)
	return i, i.requestLocked(m)
}

// authorize asks the policies whether the caller may use the model.
func (c *Call) authorize(i *Inference, m *fields.Message) (err error) {
	name := ""
	defer func() {
		if v := recover(); v != nil {
			err = Recovered(name, v)
		}
	}()
	for _, part := range c.parts {
		name = part.name
		if a, ok := part.policy.(Authorizer); ok {
			if err := a.Authorize(i, m); err != nil {
				return asDenial(name, err)
			}
		}
	}
	return nil
}

// witnessed tells those who want to know of an inference that was refused
// before any policy saw it.
func (c *Call) witnessed(i *Inference, err error) {
	d := asDenial("chain", err)
	defer func() { _ = recover() }() // the refusal stands
	for _, part := range c.parts {
		if w, ok := part.policy.(Witness); ok {
			w.Refused(i, d)
		}
	}
}

// structure refuses what no back end serves and what cannot be seen.
func (c *Call) structure(i *Inference, r *dialect.Request, m *fields.Message) error {
	b := i.Backend
	switch {
	case b == nil:
		return NoModel("chain", i.Model)
	case !b.serves(i.Model) && i.Model != "":
		if other, _ := c.chain.route(c.FullMethod, i.Model, c.Method.Kind); other != nil {
			return Deny("chain", RouteConflict,
				"the stream is bound to the back end of its first message; open another stream for this model").With("model", i.Model)
		}
		return NoModel("chain", i.Model)
	}
	if r.PromptIDs >= 0 {
		if d := b.readIDs(i.Model, r.PromptIDs, m); d != nil {
			d.Field = m.Path(&m.Fields[r.PromptIDs])
			return d
		}
	}
	for n := range m.Tensors {
		t := &m.Tensors[n]
		if t.SharedMemory && !b.AllowSharedMemory {
			d := Deny("chain", Uninspectable, "the tensor lies in shared memory, where its text cannot be read; send it in the message")
			d.Field = string(m.Name(t))
			return d
		}
		if b.Datatypes != nil && !b.Datatypes[string(m.Datatype(t))] {
			d := Deny("chain", Uninspectable, "the tensor's datatype is not one that this back end may be sent")
			d.Field = string(m.Name(t))
			return d
		}
	}
	return nil
}

// privateID begins the ids that we give to inferences.
const privateID = "sluice-"

// begun puts an inference on the books, under an id that no other of its
// stream has, and has the model server show its end. It is false if the call
// has ended: then nobody would end the inference.
func (c *Call) begun(i *Inference, r *dialect.Request, m *fields.Message) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.ended {
		return false
	}
	if c.backend == nil {
		c.backend = i.Backend
	}
	if !c.Method.Multiplexed {
		c.single = i
		c.latest.Store(i)
		return true
	}
	if c.open == nil {
		c.open = make(map[string]*Inference, 4)
	}
	i.key = r.ID
	for i.key == "" || c.open[i.key] != nil {
		c.renames++
		i.key = privateID + strconv.Itoa(c.renames)
		i.renamed = true
	}
	c.open[i.key] = i
	if i.renamed {
		c.Method.SetID(m, r, i.key)
	}
	c.Method.AskFinal(m, r)
	return true
}

// forget takes an inference that ended off the books.
func (c *Call) forget(i *Inference) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.open[i.key] == i {
		delete(c.open, i.key)
		c.latest.CompareAndSwap(i, nil)
	}
	if i.late {
		c.started(i)
	}
}

// Open is the method and the inferences that have begun and have neither ended
// nor been refused, for those who look on from outside.
func (c *Call) Open() (*dialect.Method, []*Inference) {
	c.mu.Lock()
	method, open := c.Method, make([]*Inference, 0, len(c.open)+1)
	if c.single != nil {
		open = append(open, c.single)
	}
	for _, i := range c.open {
		open = append(open, i)
	}
	c.mu.Unlock()
	return method, slices.DeleteFunc(open, func(i *Inference) bool { return !i.open() })
}

// Verdict says what to do with a response.
type Verdict uint8

const (
	// Deliver it, with its edits.
	Deliver Verdict = iota
	// Drop it: the caller did not ask for it, or its inference was refused.
	Drop
	// Refuse it: its inference was refused just now, by the error beside. The
	// response is dropped and the caller told.
	Refuse
	// Hold it: the inference has taken it over, until a policy knows more.
	Hold
	// Last to be delivered, with its edits: then its inference is refused, by the error
	// beside. A door that cannot do both refuses.
	Last
)

// Response takes a response message from the model server and finds the
// inference that it belongs to. A final one ends it. With Refuse, the error is
// a *Denial of that inference; an error with any other verdict is a *Denial of
// the whole call.
func (c *Call) Response(e *Envelope) (*Inference, Verdict, error) {
	m := &e.Message
	i := c.latest.Load()
	if i == nil && !c.bound() { // and the method may yet become that of another dialect
		return nil, Drop, unasked()
	}
	if err := e.read(c.Method.Response); err != nil {
		return nil, Drop, Deny("chain", UpstreamInvalid, "the model server's answer cannot be read")
	}
	r := &e.response
	c.Method.ReadNext(m, r)
	if c.Method.Multiplexed && (i == nil || i.key != string(r.ID)) {
		i = c.find(r.ID)
	}
	if i == nil {
		return nil, Drop, unasked()
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	i.failed = i.failed || r.Failed
	if i.cut != nil || i.ended {
		if r.Final {
			i.endLocked(i.cut)
		}
		return i, Drop, nil
	}
	m.Choice = r.Choice
	i.count(m, r)
	err := i.readIDs(m)
	if err == nil {
		err = i.responseLocked(m)
	}
	if err == nil && i.last != nil && c.Method.Multiplexed && r.Final {
		err = i.refuseLastLocked() // it would tell the caller that all went well
	}
	if err != nil {
		if r.Final || !c.Method.Multiplexed {
			i.endLocked(err)
		}
		return i, Refuse, err
	}
	verdict := Deliver
	if c.Method.Multiplexed && r.Final && r.Empty && !i.wantFinal {
		verdict = Drop
	}
	if verdict == Deliver && i.renamed {
		i.restore(m, r.IDField)
	}
	if verdict == Deliver && r.Failed && i.Backend.MaskErrors {
		mask(m)
	}
	if i.last != nil {
		if err := i.lastLocked(c.Method.Multiplexed); err != nil {
			return i, Refuse, err
		}
		return i, Last, i.last
	}
	if i.holds {
		var err error
		if verdict, err = i.holdOrDeliver(e, verdict, r.Final); err != nil {
			return i, Refuse, err
		}
	}
	if r.Final {
		var err error
		if i.failed {
			err = errUpstreamFailed
		}
		i.endLocked(err)
	}
	return i, verdict, nil
}

// bound reports whether the first message has begun an inference.
func (c *Call) bound() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.backend != nil
}

// find is the open inference that has the id on the way to the model server, or nil.
func (c *Call) find(id []byte) *Inference {
	c.mu.Lock()
	defer c.mu.Unlock()
	i := c.open[string(id)]
	c.latest.Store(i)
	return i
}

// restore gives a response the id that the caller chose, also where the model
// server quotes it in the text of an error, as Triton does: "[request id: 7]",
// or <id_unknown> where there is none.
func (i *Inference) restore(m *fields.Message, id int) {
	if id >= 0 {
		if f := &m.Fields[id]; i.ID == "" {
			m.Delete(f)
		} else {
			m.Set(f, []byte(i.ID))
		}
	}
	for n := range m.Fields {
		f := &m.Fields[n]
		if f.Role != fields.ErrorText {
			continue
		}
		if text := string(m.Bytes(f)); strings.Contains(text, i.key) {
			m.Set(f, []byte(i.unquote(text)))
		}
	}
}

// MaskedError is what a caller gets in place of the text of a model server's error.
const MaskedError = "the model server reported an error"

// mask replaces the texts of errors.
func mask(m *fields.Message) {
	for n := range m.Fields {
		if f := &m.Fields[n]; f.Role == fields.ErrorText {
			m.Set(f, []byte(MaskedError))
		}
	}
}

// unquote replaces the private id where a text quotes it.
func (i *Inference) unquote(text string) string {
	id := i.ID
	if id == "" {
		id = "<id_unknown>"
	}
	return strings.ReplaceAll(text, "[request id: "+i.key+"]", "[request id: "+id+"]")
}

// Unquote gives a text of the model server the ids that the caller chose, where
// it quotes private ones of inferences that are still open.
func (c *Call) Unquote(text string) string {
	if !strings.Contains(text, privateID) {
		return text
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, i := range c.open {
		if i.renamed {
			text = i.unquote(text)
		}
	}
	return text
}

func unasked() error {
	return Deny("chain", UpstreamInvalid, "the model server answered an inference that nobody asked for")
}

// errUpstreamFailed ends an inference whose failure the model server reported in band.
var errUpstreamFailed = errors.New("the model server reported an error")

// messageDenial says what is wrong with a message that cannot be taken.
func messageDenial(err error) *Denial {
	var fe *fields.Error
	if !errors.As(err, &fe) {
		return asDenial("chain", err)
	}
	reason := MessageMalformed
	switch fe.Kind {
	case fields.Ambiguous:
		reason = MessageAmbiguous
	case fields.TooLarge:
		reason = MessageTooLarge
	case fields.Uninspectable:
		reason = Uninspectable
	}
	d := Deny("chain", reason, "%s", fe.What)
	d.Field = fe.Path
	return d
}

// Recovered makes a recovered panic a denial with an id that the log has too.
// The panic's value stays out of both: it may quote a prompt.
func Recovered(policy string, v any) *Denial {
	var id [8]byte
	_, _ = rand.Read(id[:])
	d := Deny(policy, Internal, "internal error %x", id).With("id", fmt.Sprintf("%x", id))
	d.Cause = &Panic{Type: fmt.Sprintf("%T", v), Stack: debug.Stack()}
	return d
}

// Panic is the cause of the denial that a recovered panic became. It holds the
// stack and the type of the panic's value, not the value.
type Panic struct {
	Type  string
	Stack []byte
}

func (p *Panic) Error() string { return "panic: " + p.Type }
