package interceptors

import (
	"context"
	"errors"
	"io"
	"sync"
	"sync/atomic"

	"google.golang.org/genproto/googleapis/rpc/code"
	"google.golang.org/grpc/mem"
)

// What one stream may park: inferences that wait for a permit while others of
// the same stream go on. When there are so many, or they have more bytes, the
// stream is not read until one of them has gone on. Eight is enough for a client
// that keeps a few models busy, and both bound what a stream can make us hold,
// but for the last message. Chosen, not measured.
const (
	maxParked      = 8
	maxParkedBytes = 1 << 20
)

// Door is what a transport does for one streaming call. An Envelope that is
// handed to Forward or Deliver is taken over by it, whatever comes of it.
type Door interface {
	// Receive blocks for the caller's next message; io.EOF at half-close.
	Receive() (*Envelope, error)
	// Forward hands a request to the model server. One goroutine calls it at a time.
	Forward(*Envelope, *Inference) error
	// CloseForward tells the model server that no more requests follow.
	CloseForward() error
	// Deliver sends a response to the caller. One goroutine calls it at a time.
	Deliver(*Envelope) error
	// Encoded makes a response of its encoded form.
	Encoded([]byte) (*Envelope, error)
}

// Stream is the life of a streaming call, the same for every door: requests
// come in and are forwarded, or parked while they wait for a permit, or refused
// in band; responses go out.
type Stream struct {
	call *Call
	door Door

	toCaller   turn // one writer to the caller
	toServer   turn // one writer to the model server
	halfClosed atomic.Bool

	mu     sync.Mutex
	room   sync.Cond // of mu: something parked has gone on
	parked int
	bytes  int
	tails  map[sequence]chan struct{} // closed when the last parked message of the sequence has gone on
	wg     sync.WaitGroup
	over   bool           // nobody is told anything any more
	tells  sync.WaitGroup // who tells the caller of what was cut from outside
	untold atomic.Int64   // how many were cut from outside and are still to be told

	answer *Envelope   // of the response at hand: they are alike, and come one at a time
	spare  []*Envelope // more of them, for where some were held
}

// turn is a lock that is held while a message is being written, for as long as
// the other side does not read. So who waits for it stops when the call ends.
type turn struct {
	held    atomic.Bool
	waiting atomic.Int32
	free    chan struct{} // has an element if the turn was passed while somebody waited
}

func newTurn() turn { return turn{free: make(chan struct{}, 1)} }

func (t *turn) take(ctx context.Context) error {
	if t.held.CompareAndSwap(false, true) { // as nearly always: the only writer
		return nil
	}
	t.waiting.Add(1)
	defer t.waiting.Add(-1)
	for !t.held.CompareAndSwap(false, true) { // after waiting: pass has seen that, or we see the turn free
		select {
		case <-t.free:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	return nil
}

func (t *turn) pass() {
	t.held.Store(false)
	if t.waiting.Load() == 0 {
		return
	}
	select {
	case t.free <- struct{}{}:
	default: // somebody is being woken already
	}
}

// sequence names inferences whose order a model server relies on.
type sequence struct{ model, id string }

// NewStream begins the streaming part of a call.
func NewStream(call *Call, door Door) *Stream {
	s := &Stream{call: call, door: door, toCaller: newTurn(), toServer: newTurn()}
	s.room.L = &s.mu
	call.mu.Lock()
	defer call.mu.Unlock()
	call.stream = s
	return s
}

// End waits until the caller was told of everything that was cut from outside,
// or the call is aborted; nobody is told anything afterwards. A door calls it
// before a call ends well, and when one has ended, and the transport with it;
// never beside Response.
func (s *Stream) End() {
	if s.answer != nil {
		s.spare = append(s.spare, s.answer)
		s.answer = nil
	}
	for _, e := range s.spare {
		if e.kept = false; e.raw == nil { // else something went wrong while it was read
			answers.Put(e)
		}
	}
	s.spare = nil
	s.mu.Lock()
	s.over = true
	s.mu.Unlock()
	s.tells.Wait()
}

// tell tells the caller of an inference that was cut from outside.
func (s *Stream) tell(i *Inference, d *Denial) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.over {
		return
	}
	s.tells.Go(func() {
		if err := s.telling(i, d); err != nil {
			s.call.Abort(err)
		}
	})
}

// telling returns what the call is to end with, if it is.
func (s *Stream) telling(i *Inference, d *Denial) (err error) {
	defer recovered(&err)
	if err := s.refuse(i, d); err != nil {
		return err
	}
	s.untold.Add(-1)
	if s.done() != nil {
		return ErrServed
	}
	return nil
}

// ErrServed ends a call well whose caller has all that it will get, though the
// model server is still at work.
var ErrServed = errors.New("served")

// Begin takes the caller's first messages, on the goroutine of the caller, until
// one has gone on, or waits to. io.EOF means that the caller has half-closed and
// nothing did. Most streams carry one request: a goroutine made for it would have
// to grow a deep stack each time.
func (s *Stream) Begin() (err error) {
	defer recovered(&err)
	for {
		if on, err := s.request(); on || err != nil {
			return err
		}
	}
}

// Requests reads the caller's messages until it half-closes (nil), goes away
// or is refused as a whole. It runs beside Response, in a goroutine of its own,
// and returns when nothing it began is still waiting. Begin need not come first.
func (s *Stream) Requests() error {
	err := s.requests()
	if err != nil {
		s.call.Abort(err)
	}
	s.wg.Wait()
	if err != nil {
		return err
	}
	s.halfClosed.Store(true)
	if err := s.toServer.take(s.call.ctx); err != nil {
		return err
	}
	defer s.toServer.pass()
	return s.door.CloseForward()
}

func (s *Stream) requests() (err error) {
	defer recovered(&err)
	for {
		_, err := s.request()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

// request takes one message. It reports whether that has gone on, or waits to.
func (s *Stream) request() (on bool, err error) {
	e, err := s.door.Receive()
	if err != nil {
		return false, err
	}
	i, err := s.call.Request(e)
	switch {
	case err != nil && i == nil:
		e.Release()
		return false, err
	case err != nil:
		e.Release()
		return false, s.refuse(i, err)
	case s.mustPark(i):
		s.park(e, i)
	default:
		if err := i.Wait(s.call.ctx); err != nil {
			e.Release()
			return false, err
		}
		s.forward(e, i)
	}
	return true, nil
}

// recovered makes a panic the error that a call ends with. The goroutines of a
// stream are ours: nobody else would catch it, and it would end the program.
func recovered(err *error) {
	if v := recover(); v != nil {
		*err = Recovered("chain", v)
	}
}

// forward hands a request on. If that fails the model server is gone, and its
// side says why.
func (s *Stream) forward(e *Envelope, i *Inference) {
	if s.toServer.take(s.call.ctx) != nil {
		e.Release()
		return
	}
	defer s.toServer.pass()
	if !i.Hand() {
		e.Release()
		return
	}
	_ = s.door.Forward(e, i)
}

// mustPark reports whether others must not wait behind this one: it is one of
// many on the stream and waits for a permit, or for its turn in its sequence.
func (s *Stream) mustPark(i *Inference) bool {
	if !s.call.Method.Multiplexed {
		return false
	}
	if !i.Ready() {
		return true
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return i.Sequence != "" && s.tails[sequence{i.Model, i.Sequence}] != nil
}

// park lets an inference wait on its own, so that the stream can be read on. It
// blocks while the stream has parked as much as it may. What is parked goes on
// meanwhile, the last one too: were it held back with a permit in hand, two
// streams could wait for each other's permits.
func (s *Stream) park(e *Envelope, i *Inference) {
	size := e.Size()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.parked++
	s.bytes += size
	var before, done chan struct{}
	key := sequence{i.Model, i.Sequence}
	if i.Sequence != "" {
		if s.tails == nil {
			s.tails = make(map[sequence]chan struct{})
		}
		done = make(chan struct{})
		before, s.tails[key] = s.tails[key], done
	}
	s.wg.Go(func() {
		if err := s.wait(e, i, before); err != nil {
			s.call.Abort(err)
		}
		s.mu.Lock()
		defer s.mu.Unlock()
		s.parked--
		s.bytes -= size
		if done != nil {
			close(done)
			if s.tails[key] == done {
				delete(s.tails, key)
			}
		}
		s.room.Signal()
	})
	for s.parked >= maxParked || s.bytes > maxParkedBytes {
		s.room.Wait()
	}
}

// wait is the life of a parked inference until it has gone on, or is refused.
// The error ends the call.
func (s *Stream) wait(e *Envelope, i *Inference, before <-chan struct{}) (err error) {
	defer recovered(&err)
	if before != nil && i.rest != nil {
		<-before // what has not started does so in order
	}
	err = i.Wait(s.call.ctx)
	if before != nil {
		<-before
	}
	if err != nil {
		e.Release()
		return s.refuse(i, err)
	}
	s.forward(e, i)
	return nil
}

// refuse tells the caller, in band, that one inference was refused, and the
// others go on. Where that cannot be said it returns the error, which then ends
// the call.
func (s *Stream) refuse(i *Inference, err error) error {
	if !i.tell() {
		return nil
	}
	var d *Denial
	if !errors.As(err, &d) || s.call.ctx.Err() != nil {
		return err
	}
	if v := s.call.Metadata.Get("triton_grpc_error"); len(v) > 0 && v[0] == "true" {
		return err
	}
	encoded := s.call.Method.Refusal(i.Model, i.ID, d.Error(), code.Code(d.Code()).String(), string(d.Reason), d.RetryAfter)
	if encoded == nil {
		return err
	}
	e, fail := s.door.Encoded(encoded)
	if fail != nil {
		return err
	}
	return s.deliver(e, nil)
}

// deliver sends a response to the caller, but not one of an inference that was
// cut meanwhile.
func (s *Stream) deliver(e *Envelope, of *Inference) error {
	if err := s.toCaller.take(s.call.ctx); err != nil {
		e.Release()
		return err
	}
	defer s.toCaller.pass()
	if of != nil && of.lost.Load() {
		e.Release()
		return nil
	}
	return s.door.Deliver(e)
}

// Answer is RawEnvelope for a response. It holds one at a time: the one before
// must have been given to Response, which must have returned.
func (s *Stream) Answer(b mem.BufferSlice) *Envelope {
	switch n := len(s.spare); {
	case s.answer != nil:
	case n > 0:
		s.answer, s.spare = s.spare[n-1], s.spare[:n-1]
	default:
		s.answer = RawAnswer(b)
		s.answer.kept = true
		s.answer.Message.Afresh()
	}
	s.answer.raw = b
	return s.answer
}

// Response delivers a response of the model server, if it is to be delivered.
// io.EOF means that the caller has all that it will get: the call can end well
// although the model server is still at work. Any other error ends the call.
func (s *Stream) Response(e *Envelope) (err error) {
	if s.call.ctx.Err() != nil { // the caller is gone, or was told already
		e.Release()
		return s.call.Cause()
	}
	defer recovered(&err)
	i, verdict, err := s.call.Response(e)
	if verdict == Hold && e == s.answer {
		s.answer = nil
	}
	if i != nil && len(i.due) > 0 {
		if undelivered := s.release(i); undelivered != nil {
			if verdict != Hold {
				e.Release()
			}
			return undelivered
		}
	}
	switch {
	case verdict == Hold:
		return nil
	case verdict == Last:
		if err := s.deliver(e, i); err != nil {
			return err
		}
		if err := s.refuse(i, err); err != nil {
			return err
		}
		return s.done()
	case verdict == Refuse:
		e.Release()
		if err := s.refuse(i, err); err != nil {
			return err
		}
		return s.done()
	case err != nil:
		e.Release()
		return err
	case verdict == Drop:
		e.Release()
		return s.done()
	}
	return s.deliver(e, i)
}

// done is io.EOF if all that the model server still works on was refused and
// the caller will not ask for more.
func (s *Stream) done() error {
	if !s.halfClosed.Load() {
		return nil
	}
	if _, open := s.call.Open(); len(open) > 0 || s.untold.Load() > 0 { // in this order
		return nil
	}
	return io.EOF
}
