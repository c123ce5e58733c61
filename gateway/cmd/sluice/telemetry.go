package main

import (
	"context"
	"fmt"
	"log/slog"
	"net/http"
	"time"

	"github.com/sluicegate/sluice/gateway"
	"github.com/sluicegate/sluice/gateway/cmd/sluice/internal/otelsetup"
	"github.com/sluicegate/sluice/interceptors/telemetry"
	"github.com/sluicegate/sluice/interceptors/usage"
	configv1 "github.com/sluicegate/sluice/proto/gen/sluice/config/v1"
)

// watching is the program's telemetry: what the chain reports to, and the
// handler that shows its metrics.
type watching struct {
	options  []telemetry.Option
	usage    []usage.Option
	metrics  http.Handler
	shutdown func(context.Context) error
}

func startTelemetry(cfg *configv1.Telemetry) (*watching, error) {
	p, shutdown, err := otelsetup.Setup(context.Background(), cfg)
	if err != nil {
		return nil, fmt.Errorf("telemetry: %w", err)
	}
	return &watching{
		options: []telemetry.Option{
			telemetry.WithTracerProvider(p.Tracer),
			telemetry.WithSampler(p.Sampled),
			telemetry.WithMeterProvider(p.Meter),
			telemetry.WithPropagator(p.Propagator),
		},
		usage:    []usage.Option{usage.WithLoggerProvider(p.Logger), usage.WithMeterProvider(p.Meter)},
		metrics:  p.Metrics,
		shutdown: shutdown,
	}, nil
}

// servers has metrics of the model servers until it is told to stop.
func (w *watching) servers(g *gateway.Gateway) (stop func()) {
	return telemetry.New(w.options...).WatchServers(func() (out []telemetry.Server) {
		for name, servers := range g.Servers() {
			for _, s := range servers {
				out = append(out, telemetry.Server{
					Backend: name, Address: s.Address, Ready: s.Ready, Ejected: s.Ejected, InUse: s.Load,
					Waiting: s.Reported.Waiting, Running: s.Reported.Running, Utilization: s.Reported.Utilization,
				})
			}
		}
		return out
	})
}

// stop sends what is queued; it takes 5 seconds at most.
func (w *watching) stop(log *slog.Logger) {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	if err := w.shutdown(ctx); err != nil {
		log.Warn("telemetry could not be sent before the end", "error", err)
	}
}
