package telemetry

import (
	"encoding/binary"
	"math/rand/v2"

	"go.opentelemetry.io/otel/trace"
	"go.opentelemetry.io/otel/trace/noop"
)

var (
	serverKind = []trace.SpanStartOption{trace.WithSpanKind(trace.SpanKindServer)}
	clientKind = []trace.SpanStartOption{trace.WithSpanKind(trace.SpanKindClient)}
)

// startSpan starts the RPC span and puts it into the call's context.
func (c *call) startSpan() trace.Span {
	ctx, kind, root := c.call.Context(), serverKind, false
	local := trace.SpanFromContext(ctx)
	parent := local.SpanContext()
	switch {
	case c.call.Client:
		kind = clientKind
	case parent.IsValid() && !parent.IsRemote():
	default:
		remote := c.propagator.Extract(ctx, carrier{&c.call.Metadata})
		parent = trace.SpanContextFromContext(remote)
		if !c.public {
			ctx = remote
			break
		}
		if parent.IsValid() {
			kind = append(kind[:1:1], trace.WithLinks(trace.Link{SpanContext: parent}))
		}
		parent, root = trace.SpanContext{}, true
	}
	switch {
	case c.sampled != nil && !local.IsRecording():
		id := parent.TraceID()
		if !id.IsValid() {
			id = newTraceID()
		}
		if !c.sampled(parent, id) {
			c.unrecorded = unrecorded{none, c.tracers, trace.NewSpanContext(trace.SpanContextConfig{
				TraceID: id, SpanID: newSpanID(),
				TraceFlags: parent.TraceFlags() &^ trace.FlagsSampled, TraceState: parent.TraceState(),
			})}
			c.ctx, c.span = trace.ContextWithSpan(ctx, &c.unrecorded), &c.unrecorded
			c.call.SetContext(c.ctx)
			return c.span
		}
		if !parent.TraceID().IsValid() {
			// The id of a trace and none of a span: the provider makes a root of it, in the
			// trace that was decided on.
			ctx = trace.ContextWithSpanContext(ctx, trace.NewSpanContext(trace.SpanContextConfig{TraceID: id}))
		}
	case root:
		kind = append(kind[:len(kind):len(kind)], trace.WithNewRoot())
	}
	c.ctx, c.span = c.tracer.Start(ctx, c.method, kind...)
	c.call.SetContext(c.ctx)
	return c.span
}

// unrecorded is a span that is nothing but a place in a trace.
type unrecorded struct {
	trace.Span // what it does: nothing
	tracers    trace.TracerProvider
	at         trace.SpanContext
}

var none trace.Span = noop.Span{}

func (u *unrecorded) SpanContext() trace.SpanContext       { return u.at }
func (u *unrecorded) TracerProvider() trace.TracerProvider { return u.tracers }

func newTraceID() (id trace.TraceID) {
	for !id.IsValid() {
		random(id[:8])
		random(id[8:])
	}
	return id
}

func newSpanID() (id trace.SpanID) {
	for !id.IsValid() {
		random(id[:])
	}
	return id
}

func random(id []byte) {
	binary.NativeEndian.PutUint64(id, rand.Uint64()) //nolint:gosec // ids must be unlike each other, and are no secrets
}
