package telemetry

import (
	"context"
	"maps"
	"sync"
	"sync/atomic"

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
	activeNow  metric.Int64UpDownCounter
	denials    metric.Int64Counter
	events     metric.Int64Counter
	calls      cache[callKey, []metric.RecordOption]
	series     cache[labels, *series]
	failures   cache[failureKey, []metric.RecordOption]
	denialSets cache[denialKey, []metric.AddOption]
	eventSets  cache[eventKeys, []metric.AddOption]
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
	eventKeys struct{ policy, name string }
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
		activeNow: must(m.Int64UpDownCounter(activeInferences, metric.WithUnit(unitInference),
			metric.WithDescription("Inferences that have begun and not ended, waiting ones included."))),
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
		return addSet(policyKey.String(k.policy), eventKey.String(k.name))
	}
	return ins
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
	add           []metric.AddOption
	record        []metric.RecordOption
	input, output []metric.RecordOption
}

func (ins *instruments) newSeries(l labels) *series {
	kv := l.attributes()
	with := func(more attribute.KeyValue) []metric.RecordOption {
		return recordSet(append(kv[:len(kv):len(kv)], more)...)
	}
	s := &series{
		labels: l, instruments: ins,
		spanName:   l.operation,
		attributes: kv[:2:2],
		input:      with(semconv.GenAITokenTypeKey.String(tokenInput)),
		output:     with(semconv.GenAITokenTypeKey.String(tokenOutput)),
		record:     recordSet(append([]attribute.KeyValue(nil), kv...)...),
		add:        addSet(append([]attribute.KeyValue(nil), kv...)...),
	}
	if l.model != "" {
		s.spanName += " " + l.model
	}
	return s
}

func (s *series) active(ctx context.Context, n int64) { s.activeNow.Add(ctx, n, s.add...) }

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
	if m := c.entries.Load(); m != nil {
		if v, ok := (*m)[k]; ok {
			return v
		}
	}
	v := c.build(k)
	c.mu.Lock()
	defer c.mu.Unlock()
	var old map[K]V
	if m := c.entries.Load(); m != nil {
		old = *m
	}
	if len(old) >= maxCached {
		return v
	}
	next := make(map[K]V, len(old)+1)
	maps.Copy(next, old)
	next[k] = v
	c.entries.Store(&next)
	return v
}
