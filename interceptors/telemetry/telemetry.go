// Package telemetry shows what the chain does: a span for each RPC and for each
// inference in it, in the caller's trace; metrics; and a log record for each
// refusal and failure, at most ten of a kind in a second. Names are those of the OpenTelemetry semantic
// conventions for RPC and generative AI where they have one.
//
// It imports the OpenTelemetry API only; the program brings the SDK. Prompts
// and outputs are never recorded. Text that a peer controls is never a metric
// label: an unknown method is "_OTHER", a model that nobody configured "other".
// On spans and in logs such text is cut to 128 bytes and control characters are
// escaped.
package telemetry

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"strconv"
	"sync"
	"time"

	"github.com/sluicegate/sluice/interceptors"
	"github.com/sluicegate/sluice/interceptors/dialect"
	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/attribute"
	otelcodes "go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/metric"
	"go.opentelemetry.io/otel/propagation"
	semconv "go.opentelemetry.io/otel/semconv/v1.41.0"
	"go.opentelemetry.io/otel/trace"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
)

// Policy is the telemetry policy. It refuses nothing and must be the first of
// the chain, so that it sees what all the others do. It is safe for concurrent
// use.
type Policy struct {
	tracers     trace.TracerProvider
	tracer      trace.Tracer
	sampled     func(parent trace.SpanContext, id trace.TraceID) bool
	meter       metric.Meter
	metrics     *instruments
	log         *slog.Logger
	propagator  propagation.TextMapPropagator
	models      func(string) bool
	public      bool
	tenantLabel bool
	throttle    throttle
}

type options struct {
	meters func() (metric.Meter, *instruments)
	policy Policy
}

// Option changes what New makes.
type Option func(*options)

// WithTracerProvider sets where spans go. Default: otel.GetTracerProvider.
func WithTracerProvider(p trace.TracerProvider) Option {
	return func(o *options) { o.policy.tracers = p }
}

// WithMeterProvider sets where metrics go. Default: otel.GetMeterProvider. Policies
// that are made with the same Option share what they count with, so that a count goes
// on when one of them takes another's place.
func WithMeterProvider(p metric.MeterProvider) Option {
	meters := sync.OnceValues(func() (metric.Meter, *instruments) {
		m := p.Meter(scope, metric.WithSchemaURL(semconv.SchemaURL))
		return m, newInstruments(m)
	})
	return func(o *options) { o.meters = meters }
}

// WithLogger sets where log records go. Default: slog.Default, as it is when New is called.
func WithLogger(l *slog.Logger) Option {
	return func(o *options) { o.policy.log = l }
}

// WithPropagator sets how trace context is read from and written to metadata.
// Default: otel.GetTextMapPropagator, which does nothing until a program sets
// it; propagation.TraceContext is the usual one.
func WithPropagator(p propagation.TextMapPropagator) Option {
	return func(o *options) { o.policy.propagator = p }
}

// WithSampler tells the policy what the tracer provider's sampler decides, so that
// a call that is not sampled need not ask it, which costs several times as much as
// the decision: sampled reports whether the span of a call is recorded, given its
// parent (the zero value for none) and the id of its trace. It must be what the
// provider's sampler says, which is asked again where it is true, and must be safe
// for concurrent use. Where it is false the span gets a random id, as the SDK's own
// do, and the flags and state of its parent; so the provider's generator of ids and
// a sampler that changes the trace state are for programs that do without this
// option. Default: the provider decides each time.
func WithSampler(sampled func(parent trace.SpanContext, id trace.TraceID) bool) Option {
	return func(o *options) { o.policy.sampled = sampled }
}

// WithPublicEndpoint is for a server whose callers are strangers: each call
// starts a trace of its own, linked to the caller's, so that a caller cannot
// decide what is sampled. Default: the RPC span is a child of the caller's.
func WithPublicEndpoint() Option {
	return func(o *options) { o.policy.public = true }
}

// WithModels says which model names may be metric labels, beside those that
// the back ends list. It must hold of a bounded set only. All others are "other".
func WithModels(known func(model string) bool) Option {
	return func(o *options) { o.policy.models = known }
}

// WithTenantLabel makes the tenant a label of the metrics of inferences. Each
// tenant multiplies their number. Default: tenants are on spans and in logs only.
func WithTenantLabel() Option {
	return func(o *options) { o.policy.tenantLabel = true }
}

// New makes a telemetry policy.
func New(opts ...Option) *Policy {
	o := options{}
	for _, opt := range opts {
		opt(&o)
	}
	if o.meters == nil {
		WithMeterProvider(otel.GetMeterProvider())(&o)
	}
	p := &o.policy
	if p.tracers == nil {
		p.tracers = otel.GetTracerProvider()
	}
	if p.log == nil {
		p.log = slog.Default()
	}
	if p.propagator == nil {
		p.propagator = otel.GetTextMapPropagator()
	}
	p.tracer = p.tracers.Tracer(scope, trace.WithSchemaURL(semconv.SchemaURL))
	p.meter, p.metrics = o.meters()
	return p
}

// Name is "telemetry".
func (p *Policy) Name() string { return "telemetry" }

// Begin continues the caller's trace, or starts one, with the RPC span. If the
// call's context already holds a span of this process (that of a stats handler,
// or of the client code that makes the call) the RPC span is its child.
func (p *Policy) Begin(c *interceptors.Call) (interceptors.CallPolicy, error) {
	part := &call{Policy: p, call: c, method: methodLabel(c)}
	method, span := part.method, part.startSpan()
	p.propagator.Inject(part.ctx, carrier{&c.Outgoing})
	if span.IsRecording() {
		span.SetAttributes(rpcSystem, semconv.RPCMethod(method))
		if c.Method == nil {
			span.SetAttributes(semconv.RPCMethodOriginal(clean(c.FullMethod)))
		}
		if a := c.Peer.Addr; a != nil {
			host, port, err := net.SplitHostPort(a.String())
			if err != nil {
				host = a.String() // a Unix socket, say
			}
			span.SetAttributes(semconv.NetworkPeerAddress(clean(host)))
			if n, err := strconv.Atoi(port); err == nil {
				span.SetAttributes(semconv.NetworkPeerPort(n))
			}
		}
	}
	return part, nil
}

// methodLabel is "package.Service/Method" for the methods of the back ends.
func methodLabel(c *interceptors.Call) string {
	if c.Method == nil {
		return otherMethod
	}
	return c.Method.Name[1:]
}

// call is the policy's part in one RPC.
type call struct {
	*Policy
	call   *interceptors.Call
	ctx    context.Context // the call's, with the span outermost: what is measured looks for it
	span   trace.Span
	method string

	// Space for what most calls need, so that one allocation does for all.
	unrecorded unrecorded
	single     inference

	mu   sync.Mutex
	told error // the last error that an inference of the call ended with
}

// tell notes that an inference has told of an error; so the call need not.
func (c *call) tell(err error) {
	c.mu.Lock()
	c.told = err
	c.mu.Unlock()
}

func (c *call) wasTold(err error) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.told != nil && errors.Is(err, c.told)
}

// Start begins the inference span. Methods that are no inference have none.
func (c *call) Start(i *interceptors.Inference) (interceptors.InferencePolicy, error) {
	if i.Call.Method.Kind != dialect.Inference {
		return nil, nil
	}
	return c.start(i), nil
}

// Refused tells of an inference that the chain refused before Start.
func (c *call) Refused(i *interceptors.Inference, d *interceptors.Denial) {
	if i.Call.Method.Kind == dialect.Inference {
		c.start(i).End(interceptors.Outcome{Err: d})
	}
}

// End ends the RPC span.
func (c *call) End(o interceptors.Outcome) {
	ctx, code := c.ctx, codeOf(o.Err)
	seconds := time.Since(c.call.Began).Seconds()
	c.metrics.call(ctx, callKey{c.method, code, c.call.Client}, seconds)

	told := o.Err == nil || c.wasTold(o.Err)
	d := o.Denial()
	if d != nil && !told {
		c.metrics.denied(ctx, denialKey{d.Policy, d.Reason, ""})
	}
	if c.span.IsRecording() {
		c.span.SetAttributes(semconv.RPCResponseStatusCodeKey.String(codeName(code)))
		c.identify(c.span)
		if isError(code, c.call.Client) {
			c.span.SetAttributes(semconv.ErrorTypeKey.String(codeName(code)))
			c.span.SetStatus(otelcodes.Error, "")
		}
		if d != nil && !told {
			c.span.AddEvent(verdictEvent, trace.WithAttributes(verdict(d, outcomeRefused)...))
		}
	}
	if outcome := outcomeOf(o, code, false); !told || o.Err == nil {
		c.record(ctx, &record{
			what: "call", outcome: outcome, err: o.Err, denial: d, code: code,
			call: c, span: c.span.SpanContext(), seconds: seconds,
		})
	}
	c.span.End()
}

// identify says on a span who calls. It is known only after Begin.
func (c *call) identify(span trace.Span) {
	if who := principal(c.call); who != "" {
		span.SetAttributes(principalKey.String(clean(who)))
	}
	if c.call.Tenant != "" {
		span.SetAttributes(tenantKey.String(clean(c.call.Tenant)))
	}
}

// principal is who calls: as the identity policy says, or, if it refused before
// it could, whom the handshake proved.
func principal(c *interceptors.Call) string {
	if c.Principal != "" || c.Peer.ID.IsZero() {
		return c.Principal
	}
	return c.Peer.ID.String()
}

// codeOf is the code that an outcome is answered with; UNKNOWN if that is no
// code of gRPC.
func codeOf(err error) codes.Code {
	if err == nil {
		return codes.OK
	}
	if d, ok := err.(*interceptors.Denial); ok { //nolint:errorlint // a denial is never wrapped
		return d.Code()
	}
	switch {
	case errors.Is(err, context.DeadlineExceeded):
		return codes.DeadlineExceeded
	case errors.Is(err, context.Canceled):
		return codes.Canceled
	}
	s, ok := status.FromError(err)
	switch {
	case !ok:
		return codes.Internal
	case int(s.Code()) >= len(codeNames): // a peer may send any number
		return codes.Unknown
	}
	return s.Code()
}

// errorType is the error.type of an outcome: the reason of a denial, the name
// of a code, and "" if all went well.
func errorType(err error, code codes.Code) string {
	if err == nil {
		return ""
	}
	if d, ok := err.(*interceptors.Denial); ok { //nolint:errorlint // a denial is never wrapped
		return string(d.Reason)
	}
	if _, ok := status.FromError(err); !ok && code == codes.Internal {
		return otherError
	}
	return codeName(code)
}

// outcomeOf sums an outcome up in a word.
func outcomeOf(o interceptors.Outcome, code codes.Code, handed bool) string {
	switch d := o.Denial(); {
	case o.Err == nil:
		return outcomeServed
	case d != nil && handed:
		return outcomeCut
	case d != nil:
		return outcomeRefused
	case code == codes.Canceled:
		return outcomeCancelled
	}
	return outcomeFailed
}

// verdict is what a denial says of itself: what the caller is told, less the
// sentence.
func verdict(d *interceptors.Denial, outcome string) []attribute.KeyValue {
	kv := make([]attribute.KeyValue, 0, 4+len(d.Metadata))
	kv = append(kv, policyKey.String(d.Policy), reasonKey.String(string(d.Reason)), outcomeKey.String(outcome))
	if d.Field != "" {
		kv = append(kv, fieldKey.String(clean(d.Field)))
	}
	for k, v := range d.Metadata {
		if len(kv) == attributesPerSource {
			break
		}
		kv = append(kv, attribute.String(metadataPrefix+clean(k), clean(v)))
	}
	return kv
}

// carrier lets a propagator read and write gRPC metadata.
type carrier struct{ md *metadata.MD }

// Get returns the only value of a key. Several values are none: which of them
// a receiver behind us takes cannot be known.
func (c carrier) Get(key string) string {
	if v := c.md.Get(key); len(v) == 1 {
		return v[0]
	}
	return ""
}

// Values returns every value of a key.
func (c carrier) Values(key string) []string { return c.md.Get(key) }

func (c carrier) Set(key, value string) {
	if *c.md == nil {
		*c.md = make(metadata.MD, 2)
	}
	c.md.Set(key, value)
}

func (c carrier) Keys() []string {
	keys := make([]string, 0, len(*c.md))
	for k := range *c.md {
		keys = append(keys, k)
	}
	return keys
}
