package telemetry

import (
	"context"
	"maps"
	"runtime"
	"sync"
	"sync/atomic"
	"weak"

	"github.com/sluicegate/sluice/interceptors"
	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/metric"
	semconv "go.opentelemetry.io/otel/semconv/v1.41.0"
	"google.golang.org/grpc/codes"
)

// instruments are the metrics, and the sets of their labels, made once for each
// combination: to build a set for each measurement would cost more than all the
// rest of this package.
type instruments struct {
	callTimes  [2]metric.Float64Histogram // server, client
	durations  [2]metric.Float64Histogram
	firsts     [2]metric.Float64Histogram
	perToken   metric.Float64Histogram
	usage      metric.Int64Histogram
	drift      metric.Float64Histogram
	denials    metric.Int64Counter
	events     metric.Int64Counter
	calls      cache[callKey, []metric.RecordOption]
	series     cache[labels, *series]
	failures   cache[failureKey, []metric.RecordOption]
	denialSets cache[denialKey, []metric.AddOption]
	eventSets  cache[eventKeys, []metric.AddOption]
	others     atomic.Int64 // active inferences of the series that are too many to be kept
}

type (
	callKey struct {
		method string
		code   codes.Code
		client bool
	}
	// labels are those of every metric of an inference.
	labels struct {
		operation, provider, model, tenant string
		client                             bool
	}
	failureKey struct {
		labels
		failure string
	}
	denialKey struct {
		policy string
		reason interceptors.Reason
		model  string
	}
	eventKeys struct{ policy, name, budget, percent string }
)

func newInstruments(m metric.Meter) *instruments {
	seconds := func(name, what string, buckets []float64) metric.Float64Histogram {
		return must(m.Float64Histogram(name, metric.WithUnit(unitSeconds), metric.WithDescription(what),
			metric.WithExplicitBucketBoundaries(buckets...)))
	}
	ins := &instruments{
		callTimes: [2]metric.Float64Histogram{
			seconds(serverCallDuration, "Duration of an RPC that was served.", callBuckets),
			seconds(clientCallDuration, "Duration of an RPC that was made.", callBuckets),
		},
		durations: [2]metric.Float64Histogram{
			seconds(serverDuration, "Duration of an inference, from its first message to its end.", durationBuckets),
			seconds(clientDuration, "Duration of an inference, from its first message to its end.", durationBuckets),
		},
		firsts: [2]metric.Float64Histogram{
			seconds(serverFirstToken, "Time from an inference's first message to its first output.", firstTokenBuckets),
			seconds(clientFirstChunk, "Time from an inference's first message to its first output.", firstTokenBuckets),
		},
		perToken: seconds(serverPerToken, "Time per output token after the first, of streamed inferences that ended well.", perTokenBuckets),
		usage: must(m.Int64Histogram(clientTokenUsage, metric.WithUnit(unitTokens),
			metric.WithDescription("Tokens of an inference that was handed to the model server."),
			metric.WithExplicitBucketBoundaries(usageBuckets...))),
		drift: must(m.Float64Histogram(driftMetric, metric.WithUnit(unitRatio),
			metric.WithDescription("Tokens of an inference that the model server reported, for each that was counted here."),
			metric.WithExplicitBucketBoundaries(driftBuckets...))),
		denials: must(m.Int64Counter(denialsMetric, metric.WithUnit(unitDenial),
			metric.WithDescription("Calls and inferences that were refused or cut."))),
		events: must(m.Int64Counter(eventsMetric, metric.WithUnit(unitEvent),
			metric.WithDescription("Events that policies told of."))),
	}
	ins.calls.build = func(k callKey) []metric.RecordOption {
		kv := []attribute.KeyValue{rpcSystem, semconv.RPCMethod(k.method),
			semconv.RPCResponseStatusCodeKey.String(codeName(k.code))}
		if isError(k.code, k.client) {
			kv = append(kv, semconv.ErrorTypeKey.String(codeName(k.code)))
		}
		return recordSet(kv...)
	}
	ins.series.build = ins.newSeries
	ins.failures.build = func(k failureKey) []metric.RecordOption {
		return recordSet(append(k.attributes(), semconv.ErrorTypeKey.String(k.failure))...)
	}
	ins.denialSets.build = func(k denialKey) []metric.AddOption {
		kv := []attribute.KeyValue{policyKey.String(k.policy), reasonKey.String(string(k.reason))}
		if k.model != "" {
			kv = append(kv, semconv.GenAIRequestModel(k.model))
		}
		return addSet(kv...)
	}
	ins.eventSets.build = func(k eventKeys) []metric.AddOption {
		kv := []attribute.KeyValue{policyKey.String(k.policy), eventKey.String(k.name)}
		if k.budget != "" {
			kv = append(kv, budgetKey.String(k.budget), percentKey.String(k.percent))
		}
		return addSet(kv...)
	}
	ins.countActive(m)
	return ins
}

// overflow is what the SDK calls what has too many label sets to be told apart.
var overflow = metric.WithAttributeSet(attribute.NewSet(attribute.Bool("otel.metric.overflow", true)))

// countActive has the active inferences read whenever metrics are collected: to tell
// the SDK of each one's begin and end would cost more than all else that is done for
// it here but the histograms. It goes on as long as the instruments are in use.
func (ins *instruments) countActive(m metric.Meter) {
	active := must(m.Int64ObservableUpDownCounter(activeInferences, metric.WithUnit(unitInference),
		metric.WithDescription("Inferences that have begun and not ended, waiting ones included.")))
	used := weak.Make(ins)
	registered, err := m.RegisterCallback(func(_ context.Context, o metric.Observer) error {
		ins := used.Value()
		if ins == nil {
			return nil
		}
		for _, s := range ins.series.all() {
			o.ObserveInt64(active, s.active.Load(), s.set)
		}
		if ins.series.full() {
			o.ObserveInt64(active, ins.others.Load(), overflow)
		}
		return nil
	}, active)
	if err != nil {
		otel.Handle(err)
		return
	}
	runtime.AddCleanup(ins, func(r metric.Registration) { _ = r.Unregister() }, registered)
}

// must hands on an instrument. What can go wrong is a clash with another's of
// the same name; the SDK then still gives one that works.
func must[T any](v T, err error) T {
	if err != nil {
		otel.Handle(err)
	}
	return v
}

func recordSet(kv ...attribute.KeyValue) []metric.RecordOption {
	return []metric.RecordOption{metric.WithAttributeSet(attribute.NewSet(kv...))}
}

func addSet(kv ...attribute.KeyValue) []metric.AddOption {
	return []metric.AddOption{metric.WithAttributeSet(attribute.NewSet(kv...))}
}

func (l *labels) attributes() []attribute.KeyValue {
	kv := make([]attribute.KeyValue, 0, 6)
	kv = append(kv, semconv.GenAIOperationNameKey.String(l.operation), semconv.GenAIProviderNameKey.String(l.provider))
	if l.model != "" {
		kv = append(kv, semconv.GenAIRequestModel(l.model))
	}
	if l.tenant != "" {
		kv = append(kv, tenantKey.String(l.tenant))
	}
	return kv
}

// side is the index of the instruments of a server or of a client.
func side(client bool) int {
	if client {
		return 1
	}
	return 0
}

func (ins *instruments) call(ctx context.Context, k callKey, seconds float64) {
	ins.callTimes[side(k.client)].Record(ctx, seconds, ins.calls.get(k)...)
}

func (ins *instruments) inference(ctx context.Context, s *series, failure string, seconds float64) {
	opts := s.record
	if failure != "" {
		opts = ins.failures.get(failureKey{s.labels, failure})
	}
	ins.durations[side(s.client)].Record(ctx, seconds, opts...)
}

func (ins *instruments) denied(ctx context.Context, k denialKey) {
	ins.denials.Add(ctx, 1, ins.denialSets.get(k)...)
}

func (ins *instruments) event(ctx context.Context, k eventKeys) {
	ins.events.Add(ctx, 1, ins.eventSets.get(k)...)
}

// series is what inferences with the same labels share.
type series struct {
	labels
	*instruments
	spanName      string
	attributes    []attribute.KeyValue // of the span; the model is not among them
	active        *atomic.Int64
	set           metric.MeasurementOption
	record        []metric.RecordOption
	input, output []metric.RecordOption
}

func (ins *instruments) newSeries(l labels) *series {
	kv := l.attributes()
	with := func(more attribute.KeyValue) []metric.RecordOption {
		return recordSet(append(kv[:len(kv):len(kv)], more)...)
	}
	set := metric.WithAttributeSet(attribute.NewSet(append([]attribute.KeyValue(nil), kv...)...))
	s := &series{
		labels: l, instruments: ins, active: new(atomic.Int64),
		spanName:   l.operation,
		attributes: kv[:2:2],
		input:      with(semconv.GenAITokenTypeKey.String(tokenInput)),
		output:     with(semconv.GenAITokenTypeKey.String(tokenOutput)),
		set:        set,
		record:     []metric.RecordOption{set},
	}
	if ins.series.full() {
		s.active = &ins.others
	}
	if l.model != "" {
		s.spanName += " " + l.model
	}
	return s
}

func (s *series) firstToken(ctx context.Context, seconds float64) {
	s.firsts[side(s.client)].Record(ctx, seconds, s.record...)
}

func (s *series) perToken(ctx context.Context, seconds float64) {
	if !s.client {
		s.instruments.perToken.Record(ctx, seconds, s.record...)
	}
}

func (s *series) usage(ctx context.Context, input, output int64) {
	if input > 0 {
		s.instruments.usage.Record(ctx, input, s.input...)
	}
	if output > 0 {
		s.instruments.usage.Record(ctx, output, s.output...)
	}
}

// drift tells how far the model server's count is from ours, where there are both.
func (s *series) drift(ctx context.Context, i *interceptors.Inference) {
	if i.ReportedInput > 0 && i.InputTokens > 0 {
		s.instruments.drift.Record(ctx, float64(i.ReportedInput)/float64(i.InputTokens), s.input...)
	}
	if i.ReportedOutput > 0 && i.OutputTokens > 0 {
		s.instruments.drift.Record(ctx, float64(i.ReportedOutput)/float64(i.OutputTokens), s.output...)
	}
}

// maxCached bounds each cache. It is about the number of sets that the SDK
// keeps of one metric (2,000) before it lumps the rest together.
const maxCached = 2048

// cache holds what was built for a key. Reads take no lock and allocate
// nothing. When it is full, what is not in it is built anew each time.
type cache[K comparable, V any] struct {
	build   func(K) V
	entries atomic.Pointer[map[K]V]
	mu      sync.Mutex // one writer
}

func (c *cache[K, V]) get(k K) V {
	if v, ok := c.all()[k]; ok {
		return v
	}
	if c.full() {
		return c.build(k)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	old := c.all()
	if v, ok := old[k]; ok { // another was faster
		return v
	}
	v := c.build(k)
	if len(old) >= maxCached {
		return v
	}
	next := make(map[K]V, len(old)+1)
	maps.Copy(next, old)
	next[k] = v
	c.entries.Store(&next)
	return v
}

// all is what the cache holds. Not to be changed.
func (c *cache[K, V]) all() map[K]V {
	if m := c.entries.Load(); m != nil {
		return *m
	}
	return nil
}

// full says whether the cache holds all that it ever will.
func (c *cache[K, V]) full() bool { return len(c.all()) >= maxCached }
