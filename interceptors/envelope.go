package interceptors

import (
	"sync"

	"github.com/sluicegate/sluice/interceptors/dialect"
	"github.com/sluicegate/sluice/interceptors/fields"
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/proto"
)

// Envelope is a message on its way through a door: raw bytes or a Go message,
// and what the chain read in it. It has one owner at a time, who hands it on or
// releases it.
type Envelope struct {
	// Message is what the chain reads and edits.
	Message fields.Message

	raw    mem.BufferSlice
	typed  proto.Message
	answer bool // it is of answers
	kept   bool // by a stream, for one message after the other
	size   int  // while it is held

	response dialect.Response // what Message says, if it is one
}

// Envelopes that are used again. Each remembers what its last message was like,
// which is what the next one of another call is often like too: so those of
// requests and of responses are kept apart.
var (
	envelopes = sync.Pool{New: func() any { return new(Envelope) }}
	answers   = sync.Pool{New: func() any { return &Envelope{answer: true} }}
)

// RawEnvelope holds an encoded message. It takes over the caller's reference
// to the buffers.
func RawEnvelope(b mem.BufferSlice) *Envelope {
	e := envelopes.Get().(*Envelope)
	e.raw = b
	return e
}

// RawAnswer is RawEnvelope for a response.
func RawAnswer(b mem.BufferSlice) *Envelope {
	e := answers.Get().(*Envelope)
	e.raw = b
	return e
}

// TypedEnvelope holds a Go message.
func TypedEnvelope(m proto.Message) *Envelope {
	e := envelopes.Get().(*Envelope)
	e.typed = m
	return e
}

// Size is the encoded size of the message as it came, in bytes.
func (e *Envelope) Size() int {
	if e.typed != nil {
		return proto.Size(e.typed)
	}
	return e.raw.Len()
}

// read fills Message in.
func (e *Envelope) read(p *fields.Program) error {
	if e.typed != nil {
		return p.Walk(&e.Message, e.typed)
	}
	return p.ScanNext(&e.Message, e.raw)
}

// Encode ends the envelope and returns the message with its edits. The caller
// owns a reference to the buffers.
func (e *Envelope) Encode() mem.BufferSlice {
	out := e.raw
	if e.Message.Edited() {
		out = e.Message.Encode()
	} else {
		e.raw = nil
	}
	e.Release()
	return out
}

// Typed ends the envelope and returns the Go message with its edits.
func (e *Envelope) Typed() proto.Message {
	out := e.typed
	if e.Message.Edited() {
		out = e.Message.Typed()
	}
	e.Release()
	return out
}

// Release ends the envelope and gives its buffers back.
func (e *Envelope) Release() {
	e.raw.Free()
	e.raw, e.typed = nil, nil
	e.Message.Release()
	switch {
	case e.kept:
	case e.answer:
		answers.Put(e)
	default:
		envelopes.Put(e)
	}
}
