package interceptors

import (
	"context"
	"errors"
	"io"
	"sync"
	"sync/atomic"

	"google.golang.org/genproto/googleapis/rpc/code"
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
}

// turn is a lock that is held while a message is being written, for as long as
// the other side does not read. So who waits for it stops when the call ends.
type turn chan struct{}

func (t turn) take(ctx context.Context) error {
	select {
	case t <- struct{}{}: // free, as nearly always: this is cheaper than to ask for either
		return nil
	default:
	}
	select {
	case t <- struct{}{}:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

func (t turn) pass() { <-t }

// sequence names inferences whose order a model server relies on.
type sequence struct{ model, id string }

// NewStream begins the streaming part of a call.
func NewStream(call *Call, door Door) *Stream {
	s := &Stream{call: call, door: door, toCaller: make(turn, 1), toServer: make(turn, 1)}
	s.room.L = &s.mu
	return s
}

// Requests reads the caller's messages until it half-closes (nil), goes away
// or is refused as a whole. It runs beside Response, in a goroutine of its own,
// and returns when nothing it began is still waiting.
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
		e, err := s.door.Receive()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		i, err := s.call.Request(e)
		switch {
		case err != nil && i == nil:
			e.Release()
			return err
		case err != nil:
			e.Release()
			if err := s.refuse(i, err); err != nil {
				return err
			}
		case s.mustPark(i):
			s.park(e, i)
		default:
			if err := i.Wait(s.call.ctx); err != nil {
				e.Release()
				return err
			}
			s.forward(e, i)
		}
	}
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
	return s.deliver(e)
}

// deliver sends a response to the caller.
func (s *Stream) deliver(e *Envelope) error {
	if err := s.toCaller.take(s.call.ctx); err != nil {
		e.Release()
		return err
	}
	defer s.toCaller.pass()
	return s.door.Deliver(e)
}

// Response delivers a response of the model server, if it is to be delivered.
// io.EOF means that the caller has all that it will get: the call can end well
// although the model server is still at work. Any other error ends the call.
func (s *Stream) Response(e *Envelope) (err error) {
	if s.call.ctx.Err() != nil { // the caller is gone, or was told already
		e.Release()
		return context.Cause(s.call.ctx)
	}
	defer recovered(&err)
	i, verdict, err := s.call.Response(e)
	switch {
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
	return s.deliver(e)
}

// done is io.EOF if all that the model server still works on was refused and
// the caller will not ask for more.
func (s *Stream) done() error {
	if s.halfClosed.Load() && s.call.live() == 0 {
		return io.EOF
	}
	return nil
}
