package otelsetup

import (
	"context"
	"io"
	"math"
	"net"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	configv1 "github.com/sluicegate/sluice/proto/gen/sluice/config/v1"

	otellog "go.opentelemetry.io/otel/log"
	semconv "go.opentelemetry.io/otel/semconv/v1.41.0"
	"go.opentelemetry.io/otel/trace"
	logspb "go.opentelemetry.io/proto/otlp/collector/logs/v1"
	metricspb "go.opentelemetry.io/proto/otlp/collector/metrics/v1"
	tracepb "go.opentelemetry.io/proto/otlp/collector/trace/v1"
	"go.uber.org/goleak"
	"google.golang.org/grpc"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestWithoutCollector(t *testing.T) {
	p, shutdown, err := Setup(t.Context(), nil)
	if err != nil {
		t.Fatal(err)
	}
	_, span := p.Tracer.Tracer("t").Start(t.Context(), "new")
	if sc := span.SpanContext(); !sc.IsValid() || sc.IsSampled() {
		t.Errorf("a new trace without a collector: %v; want an id, not sampled", sc)
	}
	parent := trace.NewSpanContext(trace.SpanContextConfig{
		TraceID: trace.TraceID{1}, SpanID: trace.SpanID{2}, TraceFlags: trace.FlagsSampled, Remote: true,
	})
	_, span = p.Tracer.Tracer("t").Start(trace.ContextWithRemoteSpanContext(t.Context(), parent), "child")
	if sc := span.SpanContext(); sc.TraceID() != parent.TraceID() || !sc.IsSampled() {
		t.Errorf("a sampled parent: %v; want its trace, sampled", sc)
	}
	c, _ := p.Meter.Meter("t").Int64Counter("sluice.denials")
	c.Add(t.Context(), 3)
	w := httptest.NewRecorder()
	p.Metrics.ServeHTTP(w, httptest.NewRequest("GET", "/metrics", nil))
	body, _ := io.ReadAll(w.Body)
	for _, want := range []string{"sluice_denials_total{", "} 3\n", `service_name="sluice"`} {
		if !strings.Contains(string(body), want) {
			t.Errorf("/metrics lacks %q:\n%s", want, body)
		}
	}
	if err := shutdown(t.Context()); err != nil {
		t.Error(err)
	}
}

func TestResource(t *testing.T) {
	tests := []struct{ name, env, configured, want string }{
		{"default", "", "", "sluice"},
		{"environment", "edge-2", "", "edge-2"},
		{"configuration wins", "edge-2", "edge-1", "edge-1"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Setenv("OTEL_SERVICE_NAME", tt.env)
			res, err := newResource(t.Context(), tt.configured)
			if err != nil {
				t.Fatal(err)
			}
			if v, _ := res.Set().Value(semconv.ServiceNameKey); v.AsString() != tt.want {
				t.Errorf("service.name = %q, want %q", v.AsString(), tt.want)
			}
			if v, ok := res.Set().Value(semconv.ServiceVersionKey); !ok || v.AsString() == "" {
				t.Error("no service.version")
			}
		})
	}
}

// Sampled is what the tracer does.
func TestSampled(t *testing.T) {
	parent := trace.NewSpanContext(trace.SpanContextConfig{TraceID: trace.TraceID{1}, SpanID: trace.SpanID{2}})
	sampled := parent.WithTraceFlags(trace.FlagsSampled)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	nothing := grpc.NewServer() // a collector that takes nothing
	served := make(chan struct{})
	go func() { defer close(served); _ = nothing.Serve(l) }()
	defer func() { nothing.Stop(); <-served }()
	for _, ratio := range []float64{0, .5, 1} {
		p, shutdown, err := Setup(t.Context(), &configv1.Telemetry{OtlpAddress: l.Addr().String(), OtlpPlaintext: true, SampleRatio: &ratio})
		if err != nil {
			t.Fatal(err)
		}
		tracer := p.Tracer.Tracer("t")
		for n := range 400 {
			of := []trace.SpanContext{{}, parent, sampled, parent.WithRemote(true), sampled.WithRemote(true)}[n%5]
			_, span := tracer.Start(trace.ContextWithSpanContext(t.Context(), of), "a call")
			id := span.SpanContext().TraceID()
			if got := p.Sampled(of, id); got != span.SpanContext().IsSampled() || got != span.IsRecording() {
				t.Errorf("ratio %v, parent %+v, trace %v: %v, and the tracer thinks otherwise", ratio, of, id, got)
			}
		}
		_ = shutdown(t.Context()) // an error: the spans were not taken
	}
}

func TestBadRatio(t *testing.T) {
	for _, bad := range []float64{-0.1, 1.1, math.NaN()} {
		if _, _, err := Setup(t.Context(), &configv1.Telemetry{SampleRatio: &bad}); err == nil {
			t.Errorf("a ratio of %v was taken", bad)
		}
	}
}

// collector takes what is exported.
type collector struct {
	tracepb.UnimplementedTraceServiceServer
	mu    sync.Mutex
	spans []string
}

func (c *collector) Export(_ context.Context, r *tracepb.ExportTraceServiceRequest) (*tracepb.ExportTraceServiceResponse, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, rs := range r.ResourceSpans {
		for _, ss := range rs.ScopeSpans {
			for _, s := range ss.Spans {
				c.spans = append(c.spans, s.Name)
			}
		}
	}
	return &tracepb.ExportTraceServiceResponse{}, nil
}

type metricCollector struct {
	metricspb.UnimplementedMetricsServiceServer
	mu    sync.Mutex
	names []string
}

func (c *metricCollector) Export(_ context.Context, r *metricspb.ExportMetricsServiceRequest) (*metricspb.ExportMetricsServiceResponse, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, rm := range r.ResourceMetrics {
		for _, sm := range rm.ScopeMetrics {
			for _, m := range sm.Metrics {
				c.names = append(c.names, m.Name)
			}
		}
	}
	return &metricspb.ExportMetricsServiceResponse{}, nil
}

type logCollector struct {
	logspb.UnimplementedLogsServiceServer
	mu    sync.Mutex
	names []string
}

func (c *logCollector) Export(_ context.Context, r *logspb.ExportLogsServiceRequest) (*logspb.ExportLogsServiceResponse, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, rl := range r.ResourceLogs {
		for _, sl := range rl.ScopeLogs {
			for _, l := range sl.LogRecords {
				c.names = append(c.names, l.EventName)
			}
		}
	}
	return &logspb.ExportLogsServiceResponse{}, nil
}

func TestExport(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	spans, metrics, logs := new(collector), new(metricCollector), new(logCollector)
	s := grpc.NewServer()
	tracepb.RegisterTraceServiceServer(s, spans)
	metricspb.RegisterMetricsServiceServer(s, metrics)
	logspb.RegisterLogsServiceServer(s, logs)
	served := make(chan struct{})
	go func() { defer close(served); _ = s.Serve(l) }()
	defer func() { s.Stop(); <-served }()

	p, shutdown, err := Setup(t.Context(), &configv1.Telemetry{OtlpAddress: l.Addr().String(), OtlpPlaintext: true})
	if err != nil {
		t.Fatal(err)
	}
	_, span := p.Tracer.Tracer("t").Start(t.Context(), "an inference")
	span.End()
	c, _ := p.Meter.Meter("t").Int64Counter("a.counter")
	c.Add(t.Context(), 1)
	var record otellog.Record
	record.SetEventName("an event")
	p.Logger.Logger("t").Emit(t.Context(), record)
	if err := shutdown(t.Context()); err != nil {
		t.Fatal(err)
	}
	if len(logs.names) != 1 || logs.names[0] != "an event" {
		t.Errorf("the collector has logs %q", logs.names)
	}
	if len(spans.spans) != 1 || spans.spans[0] != "an inference" {
		t.Errorf("the collector has spans %q", spans.spans)
	}
	if len(metrics.names) != 1 || metrics.names[0] != "a.counter" {
		t.Errorf("the collector has metrics %q", metrics.names)
	}
}

// A collector that is down costs the caller nothing, and the shutdown little.
func TestCollectorDown(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	address := l.Addr().String()
	l.Close()
	p, shutdown, err := Setup(t.Context(), &configv1.Telemetry{OtlpAddress: address, OtlpPlaintext: true})
	if err != nil {
		t.Fatal(err)
	}
	tracer := p.Tracer.Tracer("t")
	for range 3 * maxQueue { // must not block
		_, span := tracer.Start(t.Context(), "dropped")
		span.End()
	}
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if err := shutdown(ctx); err == nil {
		t.Error("a flush to nobody went well")
	}
}
