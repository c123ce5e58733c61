package telemetry

import (
	"fmt"
	"strings"
	"testing"

	"github.com/sluicegate/sluice/interceptors"

	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/sdk/trace/tracetest"
	"go.opentelemetry.io/otel/trace"
	"google.golang.org/grpc/metadata"
)

// A span that the SDK is spared is, to all who look, the one that it would have
// started: the same trace, flags and state, handed on in the same way, and decided
// on in the same way.
func TestSampler(t *testing.T) {
	const parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-"
	state := []string{"tracestate", "vendor=x"}
	tests := []struct {
		name   string
		md     metadata.MD
		ratio  float64
		public bool
		client bool
		local  sdktrace.Sampler // of a span of this process; nil for none
	}{
		{name: "root, never", ratio: 0},
		{name: "root, always", ratio: 1},
		{name: "parent not sampled", md: metadata.Pairs(append(state, "traceparent", parent+"00")...), ratio: 1},
		{name: "parent not sampled, of a random id", md: metadata.Pairs("traceparent", parent+"02"), ratio: 1},
		{name: "parent sampled", md: metadata.Pairs(append(state, "traceparent", parent+"01")...), ratio: 0},
		{name: "two parents", md: metadata.Pairs("traceparent", parent+"01", "traceparent", parent+"01"), ratio: 0},
		{name: "public, never", md: metadata.Pairs(append(state, "traceparent", parent+"01")...), ratio: 0, public: true},
		{name: "public, always", md: metadata.Pairs(append(state, "traceparent", parent+"00")...), ratio: 1, public: true},
		{name: "public, nobody to link", ratio: 1, public: true},
		{name: "client, never", ratio: 0, client: true},
		{name: "client of a span that is not sampled", ratio: 1, client: true, local: sdktrace.NeverSample()},
		{name: "client of a span that is recorded only", ratio: 1, client: true, local: sdktrace.AlwaysRecord(sdktrace.NeverSample())},
		{name: "client of a sampled span", ratio: 0, client: true, local: sdktrace.AlwaysSample()},
		{name: "server of a sampled span", md: metadata.Pairs("traceparent", parent+"00"), ratio: 0, local: sdktrace.AlwaysSample()},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			var got [2]string
			for n, opts := range [][]Option{nil, {WithSampler(decides(tt.ratio))}} {
				spans := tracetest.NewSpanRecorder()
				provider := sdktrace.NewTracerProvider(sdktrace.WithSpanProcessor(spans),
					sdktrace.WithSampler(sdktrace.ParentBased(sdktrace.TraceIDRatioBased(tt.ratio))))
				if opts = append(opts, WithTracerProvider(provider)); tt.public {
					opts = append(opts, WithPublicEndpoint())
				}
				s := watch(opts...)
				ctx, before := t.Context(), trace.SpanContext{}
				if tt.local != nil {
					local := sdktrace.NewTracerProvider(sdktrace.WithSampler(tt.local)).Tracer("t")
					var span trace.Span
					ctx, span = local.Start(ctx, "local")
					before = span.SpanContext()
				}
				in := info(infer, tt.md)
				in.Client = tt.client
				call, err := interceptors.New([]*interceptors.Backend{backend(t)}, s.policy).Begin(ctx, in)
				if err != nil {
					t.Fatal(err)
				}
				span := trace.SpanFromContext(call.Context())
				sc := span.SpanContext()
				out := call.Outgoing.Get("traceparent")
				want := fmt.Sprintf("00-%v-%v-%v", sc.TraceID(), sc.SpanID(), sc.TraceFlags())
				if len(out) != 1 || out[0] != want {
					t.Errorf("traceparent %q goes on, want %q", out, want)
				}
				if strings.Contains(parent, sc.SpanID().String()) || sc.SpanID() == before.SpanID() || !sc.IsValid() || sc.IsRemote() {
					t.Errorf("%+v is no span of its own", sc)
				}
				if span.TracerProvider() != trace.TracerProvider(provider) {
					t.Error("its provider is another")
				}
				_, spared := span.(*unrecorded)
				if want := n == 1 && !sc.IsSampled() && !trace.SpanFromContext(ctx).IsRecording(); spared != want {
					t.Errorf("the SDK is spared: %v, want %v", spared, want)
				}
				call.End(nil)
				got[n] = fmt.Sprintf("of the caller's trace: %v, of the span before: %v, flags %v, recorded: %v, state %q, ended:",
					strings.Contains(parent, sc.TraceID().String()), sc.TraceID() == before.TraceID(), sc.TraceFlags(),
					span.IsRecording() || len(spans.Ended()) > 0, call.Outgoing.Get("tracestate"))
				for _, sp := range spans.Ended() {
					got[n] += fmt.Sprintf(" %q, parent's span %v of %v, remote %v, links %d; ", sp.Name(), sp.Parent().SpanID() == before.SpanID(),
						sp.Parent().IsValid(), sp.Parent().IsRemote(), len(sp.Links()))
				}
			}
			if got[0] != got[1] {
				t.Errorf("the SDK:\n%s\nspared:\n%s", got[0], got[1])
			}
		})
	}
}

// Of roots the ratio says which are recorded: by the id of the trace, once.
func TestSamplerOfRoots(t *testing.T) {
	const ratio, calls = .25, 4000
	for _, public := range []bool{false, true} {
		spans := tracetest.NewSpanRecorder()
		opts := []Option{WithSampler(decides(ratio)), WithTracerProvider(sdktrace.NewTracerProvider(sdktrace.WithSpanProcessor(spans),
			sdktrace.WithSampler(sdktrace.ParentBased(sdktrace.TraceIDRatioBased(ratio)))))}
		if public {
			opts = append(opts, WithPublicEndpoint())
		}
		s := watch(opts...)
		chain := interceptors.New([]*interceptors.Backend{backend(t)}, s.policy)
		recorded := 0
		for range calls {
			call, err := chain.Begin(t.Context(), info(health, nil))
			if err != nil {
				t.Fatal(err)
			}
			sc := trace.SpanContextFromContext(call.Context())
			call.End(nil)
			if want := decides(ratio)(trace.SpanContext{}, sc.TraceID()); sc.IsSampled() != want {
				t.Fatalf("trace %v is sampled: %v, want %v", sc.TraceID(), sc.IsSampled(), want)
			}
			if sc.IsSampled() {
				recorded++
			}
		}
		// 12 standard deviations: by chance less than once in 10^30 runs.
		if n := len(spans.Ended()); n != recorded || n < 670 || n > 1330 {
			t.Errorf("%d spans recorded of %d sampled in %d calls, want about %v", n, recorded, calls, ratio*calls)
		}
		for _, sp := range spans.Ended() {
			if sp.Parent().IsValid() || sp.Parent().SpanID().IsValid() {
				t.Fatalf("a root has the parent %v", sp.Parent())
			}
		}
	}
}
