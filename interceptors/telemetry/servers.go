package telemetry

import (
	"context"

	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/metric"
)

// Server is a model server of a back end at one moment.
type Server struct {
	Backend, Address string
	Ready, Ejected   bool
	InUse            int64 // permits of what is in flight there
	// What it reports of itself.
	Waiting, Running, Utilization float64
}

// WatchServers has metrics of the model servers read whenever metrics are collected,
// until it is told to stop. read must be safe for concurrent use and must not block.
func (p *Policy) WatchServers(read func() []Server) (stop func()) {
	gauge := func(name, unit, what string) metric.Float64ObservableGauge {
		return must(p.meter.Float64ObservableGauge(name, metric.WithUnit(unit), metric.WithDescription(what)))
	}
	ready := gauge(serverReady, unitServer, "1 while a model server can take calls, else 0.")
	ejected := gauge(serverEjected, unitServer, "1 while a model server is left alone because it failed, else 0.")
	inUse := gauge(serverInUse, unitPermit, "Permits of the inferences that a model server has of this gateway.")
	waiting := gauge(serverWaiting, unitInference, "Inferences in a model server's own queue, as it reports.")
	running := gauge(serverRunning, unitInference, "Inferences that a model server works on, as it reports.")
	utilization := gauge(serverUtilization, unitOne, "How full a model server is, as it reports.")
	yes := map[bool]float64{true: 1}
	registered, err := p.meter.RegisterCallback(func(_ context.Context, o metric.Observer) error {
		for _, s := range read() {
			labels := metric.WithAttributeSet(attribute.NewSet(append(server(s.Address), backendKey.String(s.Backend))...))
			o.ObserveFloat64(ready, yes[s.Ready], labels)
			o.ObserveFloat64(ejected, yes[s.Ejected], labels)
			o.ObserveFloat64(inUse, float64(s.InUse), labels)
			o.ObserveFloat64(waiting, s.Waiting, labels)
			o.ObserveFloat64(running, s.Running, labels)
			o.ObserveFloat64(utilization, s.Utilization, labels)
		}
		return nil
	}, ready, ejected, inUse, waiting, running, utilization)
	if err != nil {
		otel.Handle(err)
		return func() {}
	}
	return func() { _ = registered.Unregister() }
}
