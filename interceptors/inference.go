package interceptors

import (
	"context"
	"sync"
	"sync/atomic"
	"time"

	"github.com/sluicegate/sluice/interceptors/dialect"
	"github.com/sluicegate/sluice/interceptors/fields"
	"github.com/sluicegate/sluice/interceptors/tokens"
)

// Inference is one unit of model work. The chain fills it in before the first
// policy sees it; policies only read it, and only inside the calls that the
// chain makes to them.
type Inference struct {
	// Call is the RPC that carries it.
	Call *Call
	// Backend serves it.
	Backend *Backend
	// Model and Version are what its first message names; "" if it names none.
	Model, Version string
	// ID is what the caller calls it; "" if it has no name.
	ID string
	// Sequence is the sequence (session) that it belongs to, or "".
	Sequence string
	// MaxOutputTokens is how many tokens the caller lets the model write, over
	// all choices; 0 if it does not say.
	MaxOutputTokens int64
	// InputTokens and OutputTokens are our own count of the text so far.
	// Output counts what the model wrote, delivered or not.
	InputTokens, OutputTokens int64
	// ReportedInput and ReportedOutput are the model server's count so far; 0 if
	// it reports none.
	ReportedInput, ReportedOutput int64
	// Handed says that the inference was handed to the model server, HandedAt when.
	Handed   bool
	HandedAt time.Time
	// Server is the address of that model server; "" if it is not known.
	Server string

	// The chain's own.
	mu         sync.Mutex
	key        string // its id on the way to the model server
	renamed    bool   // key is private: the caller gave no id, or one in flight
	wantFinal  bool   // the caller asked for the empty final response
	cut        error  // refused in mid-stream; the rest of its responses are dropped
	failed     bool   // the model server reported an error of it
	ended      bool
	placed     bool        // Place was called
	leave      func()      // to be called at the end, or nil
	told       bool        // the caller was told that it was refused
	lost       atomic.Bool // cut from outside: no response follows the refusal
	tokenizer  *tokens.Tokenizer
	streamed   bool            // the model server sends token ids piece by piece
	before     *tokens.Counter // of the output before the response at hand; nil without a tokenizer
	ids        bool            // the response at hand has output that is token ids
	last       *Denial         // to be refused with after the response at hand
	inBand     int64           // output tokens that the model server reported in responses
	toldOutput int64           // and in its header or trailer
	choice     choice          // what was counted of the first answer
	others     []choice        // and of the others, if the caller asked for several
	first      *fields.Message // while policies start
	holds      bool            // some part is a Holder that was not told of the end
	held       []*Envelope     // responses that must not be delivered yet, in order
	due        []*Envelope     // those that were held and may: of the goroutine of the responses
	waits      bool            // some part is a Waiter that may not be ready
	waiters    bool            // some part is a Waiter
	started    int             // how many of the call's parts have
	rest       *fields.Message // the first message, while the others wait for those
	late       bool            // the call was told of that
	deaf       uint64          // a bit for each of the parts that Response need not be called of
	parts      []inferencePart
	space      [6]inferencePart
}

type inferencePart struct {
	name   string
	policy InferencePolicy
}

// Context is the call's context: it ends when the call does.
func (i *Inference) Context() context.Context { return i.Call.ctx }

// First is the first message, for Start alone: nil at any other time. It must not be
// changed there, nor kept.
func (i *Inference) First() *fields.Message { return i.first }

// Emit tells the observers of the inference of an event. It is called inside
// the calls that the chain makes to a policy.
func (i *Inference) Emit(e Event) {
	for _, p := range i.parts {
		if o, ok := p.policy.(Observer); ok {
			o.Observe(e)
		}
	}
}

// startLocked runs the policies over the first message, in order. Those after one
// that has to wait follow when it has, in Wait. On a refusal what was opened is ended
// again, and the denial is returned.
func (i *Inference) startLocked(m *fields.Message) (err error) {
	name := ""
	i.first = m
	defer func() {
		i.first = nil
		if v := recover(); v != nil {
			err = Recovered(name, v)
		}
		if err != nil {
			err = asDenial(name, err)
			i.endLocked(err)
		}
	}()
	if i.started == 0 {
		i.parts = i.space[:0]
	}
	behind, held := i.Call.behind(i), false
	for i.started < len(i.Call.parts) {
		if held || i.started >= behind {
			i.waits, i.rest = true, m
			i.Call.putOff(i)
			return nil
		}
		part := i.Call.parts[i.started]
		i.started++
		name = part.name
		p, err := part.policy.Start(i)
		if err != nil {
			return err
		}
		if p == nil {
			continue
		}
		if d, ok := p.(Deaf); ok && d.Deaf() {
			i.deaf |= 1 << len(i.parts) // those beyond the 64th are called
		}
		i.parts = append(i.parts, inferencePart{name, p})
		w, waiter := p.(Waiter)
		if waiter {
			i.waits, i.waiters = true, true
		}
		if _, ok := p.(Holder); ok && i.deaf>>(len(i.parts)-1)&1 == 0 {
			i.holds = true
			i.Call.holds.Store(true)
		}
		if err := p.Request(m); err != nil {
			return err
		}
		held = waiter && i.started < len(i.Call.parts) && !w.Ready()
	}
	if i.late {
		i.Call.allStarted(i)
	}
	return nil
}

// goOn starts the policies that have not started.
func (i *Inference) goOn() error {
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.ended {
		if i.cut != nil {
			return i.cut
		}
		return hasEnded()
	}
	m := i.rest
	i.rest = nil
	return i.startLocked(m)
}

// requestLocked runs the policies over a later message of the inference.
func (i *Inference) requestLocked(m *fields.Message) (err error) {
	if i.cut != nil {
		return i.cut
	}
	if i.ended {
		return Deny("chain", Draining, "the inference has ended")
	}
	name := ""
	defer func() {
		if v := recover(); v != nil {
			err = Recovered(name, v)
		}
		if err != nil {
			i.cut = asDenial(name, err)
			err = i.cut
			i.endLocked(err)
		}
	}()
	for _, part := range i.parts {
		name = part.name
		if err := part.policy.Request(m); err != nil {
			return err
		}
	}
	i.waits = i.waiters
	return nil
}

// responseLocked runs the policies over a response, in reverse.
func (i *Inference) responseLocked(m *fields.Message) (err error) {
	n := len(i.parts) - 1
	defer func() {
		if v := recover(); v != nil {
			err = Recovered(i.parts[n].name, v)
		}
		if err != nil {
			i.cut = asDenial(i.parts[n].name, err)
			err = i.cut
			if i.holds {
				i.refusedLocked(n)
			}
		}
	}()
	for ; n >= 0; n-- {
		if i.deaf>>n&1 == 1 {
			continue
		}
		if err := i.parts[n].policy.Response(m); err != nil {
			return err
		}
	}
	return nil
}

// Ready reports that the inference may be forwarded without waiting.
func (i *Inference) Ready() bool {
	if i.rest != nil {
		return false
	}
	if i.waits {
		for n := range i.parts {
			if w, ok := i.parts[n].policy.(Waiter); ok && !w.Ready() {
				return false
			}
		}
	}
	return true
}

// Wait blocks until the inference may be forwarded. If it returns an error the
// inference has ended with it. Ready and Wait are the door's to call, one at a
// time.
func (i *Inference) Wait(ctx context.Context) (err error) {
	if !i.waits {
		return nil
	}
	name := ""
	defer func() {
		if v := recover(); v != nil {
			err = Recovered(name, v)
		}
		if err != nil {
			err = i.fail(err)
		}
	}()
	for n := 0; n < len(i.parts) || i.rest != nil; n++ {
		if n == len(i.parts) {
			name = "chain"
			if err := i.goOn(); err != nil {
				return err
			}
			if n == len(i.parts) {
				break // nobody else takes part
			}
		}
		w, ok := i.parts[n].policy.(Waiter)
		if name = i.parts[n].name; !ok || w.Ready() {
			continue
		}
		err := w.Wait(ctx)
		if ctx.Err() != nil {
			return i.Call.causeOf(ctx)
		}
		if err != nil {
			return asDenial(name, err)
		}
	}
	i.waits = false
	return nil
}

// End ends the inference: every policy's part is ended once, in reverse. A nil
// error means that it ended well.
func (i *Inference) End(err error) {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.endLocked(err)
}

func (i *Inference) endLocked(err error) {
	if i.ended {
		return
	}
	i.ended = true
	i.dropLocked()
	if i.leave != nil {
		i.leave()
	}
	if i.cut != nil {
		err = i.cut
	}
	o := Outcome{Err: err}
	for n := len(i.parts) - 1; n >= 0; n-- {
		endInference(i.parts[n].policy, o)
	}
	i.Call.forget(i)
}

// endInference ends one part. If its code panics the others must end all the same.
func endInference(p InferencePolicy, o Outcome) {
	defer func() { _ = recover() }()
	p.End(o)
}

// fail ends the inference and returns what it has ended with: not what became of
// its wait, if that was ended from outside.
func (i *Inference) fail(err error) error {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.endLocked(err)
	if i.cut != nil {
		return i.cut
	}
	return err
}

// Cut refuses an inference from outside, in mid-flight. Where it is one of many
// on a stream it alone is refused, at once: the caller is told in band, and what
// the model server still answers is dropped; what the inference holds it gives
// back when the model server is done with it. Otherwise the call is aborted. Cut
// does not wait, and is safe at any time: an inference that has ended or was
// refused stays as it is.
func (i *Inference) Cut(d *Denial) {
	i.Call.mu.Lock()
	s := i.Call.stream
	i.Call.mu.Unlock()
	i.mu.Lock()
	if i.ended || i.cut != nil {
		i.mu.Unlock()
		return
	}
	if s != nil {
		s.untold.Add(1)
	}
	i.cut = d
	i.dropLocked()
	i.lost.Store(true)
	if !i.Handed {
		i.endLocked(d)
	}
	i.mu.Unlock()
	if s == nil || !i.Call.Method.Multiplexed {
		i.Call.Abort(d)
		return
	}
	s.tell(i, d)
}

// Check has a policy look at its inference in between the calls that the chain makes to
// it, such as when a time has come. It is called as one of them: not beside another,
// and not once the inference has ended or was refused. An error, which must be a
// *Denial, cuts the inference.
func (i *Inference) Check(f func() error) {
	if d := i.checked(f); d != nil {
		i.Cut(d)
	}
}

func (i *Inference) checked(f func() error) (d *Denial) {
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.ended || i.cut != nil {
		return nil
	}
	defer func() {
		if v := recover(); v != nil {
			d = Recovered("chain", v)
		}
	}()
	if err := f(); err != nil {
		return asDenial("chain", err)
	}
	return nil
}

// tell reports whether the caller is still to be told that the inference was
// refused. It is so once.
func (i *Inference) tell() bool {
	i.mu.Lock()
	defer i.mu.Unlock()
	told := i.told
	i.told = true
	return !told
}

// Part is a policy's part in the inference, or nil.
func (i *Inference) Part(policy string) InferencePolicy {
	i.mu.Lock()
	defer i.mu.Unlock()
	for _, p := range i.parts {
		if p.name == policy {
			return p.policy
		}
	}
	return nil
}

// open reports whether it has neither ended nor been refused.
func (i *Inference) open() bool {
	i.mu.Lock()
	defer i.mu.Unlock()
	return !i.ended && i.cut == nil
}

// Hand notes that the inference is being handed to the model server, and
// reports whether it may be: not if it has ended meanwhile. A door calls it
// before it forwards a message.
func (i *Inference) Hand() bool {
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.ended {
		return false
	}
	if !i.Handed {
		i.Handed, i.HandedAt = true, time.Now()
	}
	return true
}

// read takes over what the dialect read from a request.
func (i *Inference) read(r *dialect.Request) {
	i.Model, i.Version, i.ID, i.Sequence = r.Model, r.Version, r.ID, r.Sequence
	i.MaxOutputTokens = r.MaxTokens
	i.wantFinal = r.WantsFinal
}
