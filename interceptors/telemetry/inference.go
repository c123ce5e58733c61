package telemetry

import (
	"context"
	"net"
	"strconv"
	"time"

	"github.com/sluicegate/sluice/interceptors"
	"github.com/sluicegate/sluice/interceptors/fields"
	"go.opentelemetry.io/otel/attribute"
	otelcodes "go.opentelemetry.io/otel/codes"
	semconv "go.opentelemetry.io/otel/semconv/v1.41.0"
	"go.opentelemetry.io/otel/trace"
)

// inference is the policy's part in one inference.
type inference struct {
	call   *call
	i      *interceptors.Inference
	series *series
	// span is the inference span if recording, else that of the RPC, which then
	// is not recorded either.
	span      trace.Span
	recording bool
	began     time.Time
	first     time.Duration // from began to the first output; 0 if there was none
	chunks    int           // messages with output, counted to 2
}

// start begins the telemetry of an inference. In a trace that is not recorded it
// has no span: the model server's span is then the child of the RPC span.
func (c *call) start(i *interceptors.Inference) *inference {
	n := &c.single
	if i.Call.Method.Multiplexed || n.call != nil {
		n = new(inference)
	}
	*n = inference{call: c, i: i, span: c.span, began: time.Now()}
	n.series = c.metrics.series.get(c.labels(i))
	n.series.active.Add(1)
	if !c.span.IsRecording() {
		return n
	}
	var ctx context.Context
	ctx, n.span = c.tracer.Start(c.call.Context(), n.series.spanName, clientKind...)
	if !i.Call.Method.Multiplexed {
		c.propagator.Inject(ctx, carrier{&i.Call.Outgoing})
	}
	if n.recording = n.span.IsRecording(); n.recording {
		n.describe()
	}
	return n
}

// labels are what the metrics of an inference are told apart by; all bounded.
func (c *call) labels(i *interceptors.Inference) labels {
	l := labels{operation: operation(i), provider: otherProvider, client: c.call.Client}
	known := false
	if b := i.Backend; b != nil {
		l.provider = b.Dialect.Name
		known = b.Models[i.Model]
	}
	switch {
	case i.Model == "" || known || c.models != nil && c.models(i.Model):
		l.model = i.Model
	default:
		l.model = otherModel
	}
	if c.tenantLabel {
		l.tenant = c.call.Tenant
	}
	return l
}

// operation is "text_completion" if the first message holds a prompt or says
// how many tokens it wants, and else "inference": a tensor in, a tensor out.
func operation(i *interceptors.Inference) string {
	if i.InputTokens > 0 || i.MaxOutputTokens > 0 {
		return operationText
	}
	return operationOther
}

func (n *inference) describe() {
	i := n.i
	n.span.SetAttributes(n.series.attributes...)
	kv := make([]attribute.KeyValue, 0, 6)
	if i.Model != "" {
		kv = append(kv, semconv.GenAIRequestModel(clean(i.Model)))
	}
	if i.MaxOutputTokens > 0 {
		kv = append(kv, semconv.GenAIRequestMaxTokens(int(i.MaxOutputTokens)))
	}
	if i.Call.Method.ServerStreams {
		kv = append(kv, semconv.GenAIRequestStream(true))
	}
	if i.Backend != nil && i.Backend.Name != "" {
		kv = append(kv, backendKey.String(i.Backend.Name))
	}
	if i.ID != "" {
		kv = append(kv, inferenceIDKey.String(clean(i.ID)))
	}
	n.span.SetAttributes(kv...)
	n.call.identify(n.span)
}

// server is where the inference went, of the servers of its back end.
func server(address string) []attribute.KeyValue {
	host, port, err := net.SplitHostPort(address)
	switch n, bad := strconv.Atoi(port); {
	case address == "":
		return nil
	case err != nil || bad != nil: // a Unix socket, say
		return []attribute.KeyValue{semconv.ServerAddress(clean(address))}
	default:
		return []attribute.KeyValue{semconv.ServerAddress(clean(host)), semconv.ServerPort(n)}
	}
}

// Request has nothing to see: what counts is in the Inference.
func (n *inference) Request(*fields.Message) error { return nil }

// Response notes when the first output of a stream came, and whether there is more.
// An answer in one piece has no first output. The clock is not asked for each chunk:
// that would cost a tenth of all that is done with one.
func (n *inference) Response(m *fields.Message) error {
	if n.chunks > 1 || !n.i.Call.Method.ServerStreams {
		return nil
	}
	for k := range m.Fields {
		f := &m.Fields[k]
		if f.Role != fields.Output || f.Shadowed || len(m.Bytes(f)) == 0 {
			continue
		}
		if n.chunks++; n.chunks == 1 {
			n.first = time.Since(n.began)
			n.series.firstToken(n.call.ctx, n.first.Seconds())
		}
		break
	}
	return nil
}

// Observe tells of an event. Unlike the rest it may run beside End.
func (n *inference) Observe(e interceptors.Event) {
	k := eventKeys{policy: e.Policy, name: e.Name}
	if e.Name == thresholdEvent && len(e.Attributes) == 4 { // a budget, of which there are few, and a percentage
		k.budget, k.percent = e.Attributes[1], e.Attributes[3]
	}
	n.call.metrics.event(n.call.ctx, k)
	if !n.recording {
		return
	}
	kv := make([]attribute.KeyValue, 0, 1+len(e.Attributes)/2)
	kv = append(kv, policyKey.String(e.Policy))
	for k := 1; k < len(e.Attributes) && len(kv) < attributesPerSource; k += 2 {
		kv = append(kv, attribute.String(eventPrefix+clean(e.Attributes[k-1]), clean(e.Attributes[k])))
	}
	n.span.AddEvent(eventPrefix+e.Name, trace.WithAttributes(kv...))
}

// End says what became of the inference.
func (n *inference) End(o interceptors.Outcome) {
	i, ctx, code := n.i, n.call.ctx, codeOf(o.Err)
	took := time.Since(n.began)
	input, output := max(i.InputTokens, i.ReportedInput), max(i.OutputTokens, i.ReportedOutput)
	failure, d := errorType(o.Err, code), o.Denial()

	n.series.active.Add(-1)
	n.call.metrics.inference(ctx, n.series, failure, took.Seconds())
	if i.Handed { // else the model did no work
		n.series.usage(ctx, input, output)
		n.series.drift(ctx, i)
	}
	if n.chunks > 1 && output > 1 && o.Err == nil {
		// As the convention has it: up to the end of the request.
		n.series.perToken(ctx, (took-n.first).Seconds()/float64(output-1))
	}
	if d != nil {
		n.call.metrics.denied(ctx, denialKey{d.Policy, d.Reason, n.series.model})
	}
	outcome := outcomeOf(o, code, i.Handed)
	if n.recording {
		kv := make([]attribute.KeyValue, 0, 5)
		kv = append(kv, outcomeKey.String(outcome),
			semconv.GenAIUsageInputTokens(int(input)), semconv.GenAIUsageOutputTokens(int(output)))
		if n.chunks > 0 {
			kv = append(kv, semconv.GenAIResponseTimeToFirstChunk(n.first.Seconds()))
		}
		if failure != "" {
			kv = append(kv, semconv.ErrorTypeKey.String(failure))
		}
		kv = append(kv, server(i.Server)...)
		n.span.SetAttributes(kv...)
		if d != nil {
			n.span.AddEvent(verdictEvent, trace.WithAttributes(verdict(d, outcome)...))
		}
		if outcome == outcomeFailed || d != nil && isError(code, false) {
			n.span.SetStatus(otelcodes.Error, "")
		}
	}
	if o.Err != nil {
		n.call.tell(o.Err)
	}
	n.call.record(ctx, &record{
		what: "inference", outcome: outcome, err: o.Err, denial: d, code: code,
		call: n.call, inference: i, span: n.span.SpanContext(),
		seconds: took.Seconds(), input: input, output: output,
	})
	if n.recording {
		n.span.End()
	}
}
