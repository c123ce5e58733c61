// Package otelsetup makes the OpenTelemetry SDK of the gateway program from its
// configuration: traces and metrics to a collector over OTLP, and metrics for
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
	"go.opentelemetry.io/otel/exporters/otlp/otlpmetric/otlpmetricgrpc"
	"go.opentelemetry.io/otel/exporters/otlp/otlptrace/otlptracegrpc"
	promexporter "go.opentelemetry.io/otel/exporters/prometheus"
	"go.opentelemetry.io/otel/propagation"
	sdkmetric "go.opentelemetry.io/otel/sdk/metric"
	"go.opentelemetry.io/otel/sdk/resource"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	semconv "go.opentelemetry.io/otel/semconv/v1.41.0"
)

// The bounds. A span with its events takes a few KiB, so that a full queue
// stays well under 16 MiB.
const (
	maxQueue        = 2048             // spans that wait for the collector; more are dropped
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
	Tracer     *sdktrace.TracerProvider
	Meter      *sdkmetric.MeterProvider
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
	traces := []sdktrace.TracerProviderOption{
		sdktrace.WithResource(res),
		sdktrace.WithSampler(sdktrace.ParentBased(sdktrace.TraceIDRatioBased(ratio))),
		sdktrace.WithRawSpanLimits(limits),
	}
	meters := []sdkmetric.Option{sdkmetric.WithResource(res), sdkmetric.WithReader(reader)}
	var spans sdktrace.SpanExporter
	if address != "" {
		var metrics sdkmetric.Exporter
		if spans, metrics, err = exporters(ctx, address, cfg.GetOtlpPlaintext()); err != nil {
			return p, nil, err
		}
		traces = append(traces, sdktrace.WithBatcher(spans,
			sdktrace.WithMaxQueueSize(maxQueue), sdktrace.WithMaxExportBatchSize(maxBatch),
			sdktrace.WithBatchTimeout(batchInterval), sdktrace.WithExportTimeout(exportTimeout)))
		meters = append(meters, sdkmetric.WithReader(sdkmetric.NewPeriodicReader(metrics,
			sdkmetric.WithInterval(metricInterval), sdkmetric.WithTimeout(exportTimeout))))
	}
	p = Providers{
		Tracer:     sdktrace.NewTracerProvider(traces...),
		Meter:      sdkmetric.NewMeterProvider(meters...),
		Propagator: propagation.TraceContext{},
		Metrics:    promhttp.HandlerFor(registry, promhttp.HandlerOpts{MaxRequestsInFlight: 4, EnableOpenMetrics: true}),
	}
	return p, func(ctx context.Context) error {
		ctx, cancel := context.WithTimeout(ctx, shutdownTimeout)
		defer cancel()
		// Side by side, so that a collector that hangs costs one timeout, not two.
		traced := make(chan error, 1)
		go func() {
			err := p.Tracer.Shutdown(ctx)
			if err != nil && spans != nil {
				_ = spans.Shutdown(ctx) // the provider gave up waiting; this ends the export itself
			}
			traced <- err
		}()
		err := p.Meter.Shutdown(ctx)
		return errors.Join(<-traced, err)
	}, nil
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
