package telemetry

import (
	"context"
	"io"
	"log/slog"
	"testing"
	"time"

	"github.com/sluicegate/sluice/interceptors"
	"github.com/sluicegate/sluice/interceptors/fields"

	"go.opentelemetry.io/otel/metric"
	metricnoop "go.opentelemetry.io/otel/metric/noop"
	"go.opentelemetry.io/otel/propagation"
	sdkmetric "go.opentelemetry.io/otel/sdk/metric"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/trace"
	tracenoop "go.opentelemetry.io/otel/trace/noop"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/proto"
)

// discard is a processor that makes spans recorded, at no further cost.
type discard struct{}

func (discard) OnStart(context.Context, sdktrace.ReadWriteSpan) {}
func (discard) OnEnd(sdktrace.ReadOnlySpan)                     {}
func (discard) Shutdown(context.Context) error                  { return nil }
func (discard) ForceFlush(context.Context) error                { return nil }

func sampled(ratio float64) trace.TracerProvider {
	return sdktrace.NewTracerProvider(sdktrace.WithSpanProcessor(discard{}),
		sdktrace.WithSampler(sdktrace.ParentBased(sdktrace.TraceIDRatioBased(ratio))))
}

// decides is what the sampler of sampled decides.
func decides(ratio float64) func(trace.SpanContext, trace.TraceID) bool {
	root := sdktrace.TraceIDRatioBased(ratio)
	return func(parent trace.SpanContext, id trace.TraceID) bool {
		if parent.IsValid() {
			return parent.IsSampled()
		}
		p := sdktrace.SamplingParameters{ParentContext: context.Background(), TraceID: id}
		return root.ShouldSample(p).Decision == sdktrace.RecordAndSample
	}
}

func quiet(tp trace.TracerProvider, mp metric.MeterProvider, opts ...Option) *Policy {
	return New(append(opts, WithTracerProvider(tp), WithMeterProvider(mp), WithPropagator(propagation.TraceContext{}),
		WithLogger(slog.New(slog.NewTextHandler(io.Discard, nil))))...)
}

func sdkMeter() metric.MeterProvider {
	return sdkmetric.NewMeterProvider(sdkmetric.WithReader(sdkmetric.NewManualReader()))
}

var providers = []struct {
	name   string
	policy func() *Policy
}{
	{"noop", func() *Policy { return quiet(tracenoop.NewTracerProvider(), metricnoop.NewMeterProvider()) }},
	{"metrics", func() *Policy { return quiet(tracenoop.NewTracerProvider(), sdkMeter()) }},
	{"sampled=0.01", func() *Policy { return quiet(sampled(.01), sdkMeter()) }},
	{"sampler=0.01", func() *Policy { return quiet(sampled(.01), sdkMeter(), WithSampler(decides(.01))) }},
	{"sampled=1", func() *Policy { return quiet(sampled(1), sdkMeter()) }},
}

// scanned is a message as the chain hands it to a policy.
func scanned(t testing.TB, p *fields.Program, m proto.Message) *fields.Message {
	t.Helper()
	msg := new(fields.Message)
	if err := p.Walk(msg, m); err != nil {
		t.Fatal(err)
	}
	return msg
}

// BenchmarkUnary is all that the policy does for one unary inference.
func BenchmarkUnary(b *testing.B) {
	back := backend(b)
	method := back.Dialect.Methods[infer]
	answer := scanned(b, method.Response, response("1", "an answer"))
	for _, bb := range providers {
		b.Run(bb.name, func(b *testing.B) {
			p := bb.policy()
			ctx := context.Background()
			in := info(infer, metadata.Pairs("user-agent", "bench"))
			c := &interceptors.Call{CallInfo: in, Method: method}
			i := &interceptors.Inference{Call: c, Backend: back, Model: "llama", InputTokens: 9, OutputTokens: 2, MaxOutputTokens: 64, Handed: true}
			b.ReportAllocs()
			for b.Loop() {
				c.Began, c.Outgoing = time.Now(), nil
				c.SetContext(ctx)
				call, _ := p.Begin(c)
				inf, _ := call.Start(i)
				_ = inf.Request(nil)
				_ = inf.Response(answer)
				inf.End(interceptors.Outcome{})
				call.End(interceptors.Outcome{})
			}
		})
	}
}

// BenchmarkChunk is what the policy does for one streamed response.
func BenchmarkChunk(b *testing.B) {
	for _, bb := range providers {
		b.Run(bb.name, func(b *testing.B) {
			inf, m := streaming(b, bb.policy())
			b.ReportAllocs()
			for b.Loop() {
				_ = inf.Response(m)
			}
		})
	}
}

func streaming(t testing.TB, p *Policy) (interceptors.InferencePolicy, *fields.Message) {
	back := backend(t)
	method := back.Dialect.Methods[stream]
	c := &interceptors.Call{CallInfo: info(stream, nil), Method: method, Began: time.Now()}
	c.SetContext(context.Background())
	call, err := p.Begin(c)
	if err != nil {
		t.Fatal(err)
	}
	inf, err := call.Start(&interceptors.Inference{Call: c, Backend: back, Model: "llama"})
	if err != nil {
		t.Fatal(err)
	}
	return inf, scanned(t, method.Response, chunk("1", "word ", false))
}

func TestChunkAllocatesNothing(t *testing.T) {
	for _, p := range providers {
		inf, m := streaming(t, p.policy())
		_ = inf.Response(m) // the first one records a time
		if n := testing.AllocsPerRun(100, func() { _ = inf.Response(m) }); n != 0 {
			t.Errorf("%s: %v allocations a chunk", p.name, n)
		}
	}
}
