// Package otelsetup makes the OpenTelemetry SDK of the gateway program from its
// configuration: traces, metrics and logs to a collector over OTLP, and metrics for
// Prometheus to fetch.
//
// Nothing here ever waits for the collector: spans queue up to a bound and are
// then dropped, metrics are summed in memory and sent each minute.
package otelsetup

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"runtime/debug"
	"time"

	configv1 "github.com/sluicegate/sluice/proto/gen/sluice/config/v1"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"go.opentelemetry.io/otel/exporters/otlp/otlplog/otlploggrpc"
	"go.opentelemetry.io/otel/exporters/otlp/otlpmetric/otlpmetricgrpc"
	"go.opentelemetry.io/otel/exporters/otlp/otlptrace/otlptracegrpc"
	promexporter "go.opentelemetry.io/otel/exporters/prometheus"
	"go.opentelemetry.io/otel/propagation"
	sdklog "go.opentelemetry.io/otel/sdk/log"
	sdkmetric "go.opentelemetry.io/otel/sdk/metric"
	"go.opentelemetry.io/otel/sdk/resource"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	semconv "go.opentelemetry.io/otel/semconv/v1.41.0"
	"go.opentelemetry.io/otel/trace"
)

// The bounds. A span with its events takes a few KiB, so that a full queue
// stays well under 16 MiB.
const (
	maxQueue        = 2048             // spans that wait for the collector; more are dropped
	maxLogs         = 8192             // log records that do
	maxBatch        = 512              // spans in one request
	batchInterval   = time.Second      // between requests that are not full
	metricInterval  = time.Minute      // between exports of metrics
	exportTimeout   = 10 * time.Second // for one batch with its retries; then it is dropped
	shutdownTimeout = 5 * time.Second  // for the last flush
	maxAttribute    = 256              // characters of a span attribute
	maxEvents       = 64               // events of a span
)

// Providers are what the telemetry policy and the admin listener need.
type Providers struct {
	Tracer *sdktrace.TracerProvider
	// Sampled is what the tracer's sampler decides for a span, by its parent and the id of its trace.
	Sampled func(parent trace.SpanContext, id trace.TraceID) bool
	Meter   *sdkmetric.MeterProvider
	// Logger gets what is exported as log records: without a collector they are dropped.
	Logger     *sdklog.LoggerProvider
	Propagator propagation.TextMapPropagator
	// Metrics serves the metrics to Prometheus, in its text formats.
	Metrics http.Handler
}

// Setup makes the providers. It does not connect to the collector, which may
// come up later. A nil cfg, or one without otlp_address, exports nothing: traces
// then are continued and have ids for the logs, but a new trace is not sampled.
//
// OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES are read; service_name wins
// over them. The shutdown sends what is queued and ends what Setup started; it
// takes 5 seconds at most.
func Setup(ctx context.Context, cfg *configv1.Telemetry) (p Providers, shutdown func(context.Context) error, err error) {
	res, err := newResource(ctx, cfg.GetServiceName())
	if err != nil {
		return p, nil, err
	}
	ratio := 1.0
	if cfg != nil && cfg.SampleRatio != nil {
		ratio = cfg.GetSampleRatio()
	}
	if ratio < 0 || ratio > 1 || ratio != ratio {
		return p, nil, fmt.Errorf("telemetry.sample_ratio is %v; it must be from 0 to 1", ratio)
	}
	address := cfg.GetOtlpAddress()
	if address == "" {
		ratio = 0
	}

	registry := prometheus.NewRegistry()
	reader, err := promexporter.New(promexporter.WithRegisterer(registry))
	if err != nil {
		return p, nil, fmt.Errorf("metrics for Prometheus: %w", err)
	}
	limits := sdktrace.NewSpanLimits()
	limits.AttributeValueLengthLimit = maxAttribute
	limits.EventCountLimit = maxEvents
	root := sdktrace.TraceIDRatioBased(ratio)
	traces := []sdktrace.TracerProviderOption{
		sdktrace.WithResource(res),
		sdktrace.WithSampler(sdktrace.ParentBased(root)),
		sdktrace.WithRawSpanLimits(limits),
	}
	meters := []sdkmetric.Option{sdkmetric.WithResource(res), sdkmetric.WithReader(reader)}
	logs := []sdklog.LoggerProviderOption{sdklog.WithResource(res), sdklog.WithAttributeValueLengthLimit(maxAttribute)}
	var spans sdktrace.SpanExporter
	if address != "" {
		var metrics sdkmetric.Exporter
		if spans, metrics, err = exporters(ctx, address, cfg.GetOtlpPlaintext()); err != nil {
			return p, nil, err
		}
		records, err := logExporter(ctx, address, cfg.GetOtlpPlaintext())
		if err != nil {
			return p, nil, errors.Join(err, spans.Shutdown(ctx), metrics.Shutdown(ctx))
		}
		logs = append(logs, sdklog.WithProcessor(sdklog.NewBatchProcessor(records,
			sdklog.WithMaxQueueSize(maxLogs), sdklog.WithExportMaxBatchSize(maxBatch),
			sdklog.WithExportInterval(batchInterval), sdklog.WithExportTimeout(exportTimeout))))
		traces = append(traces, sdktrace.WithBatcher(spans,
			sdktrace.WithMaxQueueSize(maxQueue), sdktrace.WithMaxExportBatchSize(maxBatch),
			sdktrace.WithBatchTimeout(batchInterval), sdktrace.WithExportTimeout(exportTimeout)))
		meters = append(meters, sdkmetric.WithReader(sdkmetric.NewPeriodicReader(metrics,
			sdkmetric.WithInterval(metricInterval), sdkmetric.WithTimeout(exportTimeout))))
	}
	p = Providers{
		Tracer:     sdktrace.NewTracerProvider(traces...),
		Sampled:    parentBased(root),
		Meter:      sdkmetric.NewMeterProvider(meters...),
		Logger:     sdklog.NewLoggerProvider(logs...),
		Propagator: propagation.TraceContext{},
		Metrics:    promhttp.HandlerFor(registry, promhttp.HandlerOpts{MaxRequestsInFlight: 4, EnableOpenMetrics: true}),
	}
	return p, func(ctx context.Context) error {
		ctx, cancel := context.WithTimeout(ctx, shutdownTimeout)
		defer cancel()
		// Side by side, so that a collector that hangs costs one timeout, not three.
		traced, logged := make(chan error, 1), make(chan error, 1)
		go func() { logged <- p.Logger.Shutdown(ctx) }()
		go func() {
			err := p.Tracer.Shutdown(ctx)
			if err != nil && spans != nil {
				_ = spans.Shutdown(ctx) // the provider gave up waiting; this ends the export itself
			}
			traced <- err
		}()
		err := p.Meter.Shutdown(ctx)
		return errors.Join(<-traced, <-logged, err)
	}, nil
}

// parentBased is what sdktrace.ParentBased(root) decides, without a context for each
// question: a span is sampled if its parent is, and where it has none, as root says.
func parentBased(root sdktrace.Sampler) func(trace.SpanContext, trace.TraceID) bool {
	return func(parent trace.SpanContext, id trace.TraceID) bool {
		if parent.IsValid() {
			return parent.IsSampled()
		}
		p := sdktrace.SamplingParameters{ParentContext: context.Background(), TraceID: id}
		return root.ShouldSample(p).Decision == sdktrace.RecordAndSample
	}
}

func exporters(ctx context.Context, address string, plaintext bool) (sdktrace.SpanExporter, sdkmetric.Exporter, error) {
	traceOpts := []otlptracegrpc.Option{
		otlptracegrpc.WithEndpoint(address),
		otlptracegrpc.WithTimeout(exportTimeout),
	}
	metricOpts := []otlpmetricgrpc.Option{
		otlpmetricgrpc.WithEndpoint(address),
		otlpmetricgrpc.WithTimeout(exportTimeout),
	}
	if plaintext {
		traceOpts = append(traceOpts, otlptracegrpc.WithInsecure())
		metricOpts = append(metricOpts, otlpmetricgrpc.WithInsecure())
	}
	spans, err := otlptracegrpc.New(ctx, traceOpts...)
	if err != nil {
		return nil, nil, fmt.Errorf("traces to telemetry.otlp_address %q: %w", address, err)
	}
	metrics, err := otlpmetricgrpc.New(ctx, metricOpts...)
	if err != nil {
		return nil, nil, errors.Join(fmt.Errorf("metrics to telemetry.otlp_address %q: %w", address, err), spans.Shutdown(ctx))
	}
	return spans, metrics, nil
}

func logExporter(ctx context.Context, address string, plaintext bool) (sdklog.Exporter, error) {
	opts := []otlploggrpc.Option{otlploggrpc.WithEndpoint(address), otlploggrpc.WithTimeout(exportTimeout)}
	if plaintext {
		opts = append(opts, otlploggrpc.WithInsecure())
	}
	e, err := otlploggrpc.New(ctx, opts...)
	if err != nil {
		return nil, fmt.Errorf("logs to telemetry.otlp_address %q: %w", address, err)
	}
	return e, nil
}

// newResource says who reports. What comes later wins.
func newResource(ctx context.Context, name string) (*resource.Resource, error) {
	opts := []resource.Option{
		resource.WithAttributes(semconv.ServiceName("sluice"), semconv.ServiceVersion(version())),
		resource.WithTelemetrySDK(),
		resource.WithFromEnv(),
	}
	if name != "" {
		opts = append(opts, resource.WithAttributes(semconv.ServiceName(name)))
	}
	res, err := resource.New(ctx, opts...)
	if err != nil {
		return nil, fmt.Errorf("OTEL_RESOURCE_ATTRIBUTES: %w", err)
	}
	return res, nil
}

// version is the version of the module that the program was built from.
func version() string {
	if info, ok := debug.ReadBuildInfo(); ok && info.Main.Version != "" {
		return info.Main.Version
	}
	return "(devel)"
}
