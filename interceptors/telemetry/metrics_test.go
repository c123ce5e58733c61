package telemetry

import (
	"fmt"
	"runtime"
	"sync"
	"testing"

	"go.opentelemetry.io/otel/metric"
	sdkmetric "go.opentelemetry.io/otel/sdk/metric"
	"go.opentelemetry.io/otel/sdk/metric/metricdata"

	"github.com/sluicegate/sluice/interceptors"
)

// active counts the active inferences by their labels.
func active(t *testing.T, s *seen) map[string]int64 {
	t.Helper()
	m := s.metrics(t)["sluice.inferences.active"]
	if sum, ok := m.Data.(metricdata.Sum[int64]); !ok || sum.IsMonotonic || sum.Temporality != metricdata.CumulativeTemporality ||
		m.Unit != "{inference}" {
		t.Fatalf("active inferences are %+v", m)
	}
	return points(t, m)
}

// begin begins an inference, and hands back how to end it.
func begin(t *testing.T, p *Policy, tenant string) (end func()) {
	t.Helper()
	chain := interceptors.New([]*interceptors.Backend{backend(t)}, p, &stub{tenant: tenant})
	call, err := chain.Begin(t.Context(), info(infer, nil))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := ask(call, request("llama", "1", "a prompt")); err != nil {
		t.Fatal(err)
	}
	return func() { call.End(nil) }
}

const llama = "gen_ai.operation.name=text_completion,gen_ai.provider.name=triton,gen_ai.request.model=llama"

func TestActive(t *testing.T) {
	s := watch()
	ends := []func(){begin(t, s.policy, "a"), begin(t, s.policy, "b"), begin(t, s.policy, "c")}
	for n := int64(3); ; n-- {
		if got := active(t, s); len(got) != 1 || got[llama] != n {
			t.Errorf("got %v, want %d", got, n)
		}
		if n == 0 {
			return
		}
		ends[n-1]()
	}
}

// A policy that takes another's place on the same meter, as after a reload, counts
// what is left of the other's with its own: however the two were told of the meter.
func TestActiveOfTwo(t *testing.T) {
	reader := sdkmetric.NewManualReader()
	provider := sdkmetric.NewMeterProvider(sdkmetric.WithReader(reader))
	same := WithMeterProvider(provider)
	for _, tt := range []struct {
		name   string
		second Option
	}{{"one option", same}, {"another option", WithMeterProvider(provider)}} {
		t.Run(tt.name, func(t *testing.T) {
			first, second := watch(same), watch(tt.second)
			first.reader, second.reader = reader, reader
			endFirst, endSecond := begin(t, first.policy, ""), begin(t, second.policy, "")
			if got := active(t, second); got[llama] != 2 {
				t.Errorf("got %v, want 2", got)
			}
			endFirst()
			if got := active(t, second); got[llama] != 1 {
				t.Errorf("got %v, want 1", got)
			}
			endSecond()
			if got := active(t, second); got[llama] != 0 {
				t.Errorf("got %v, want 0", got)
			}
			runtime.KeepAlive(first)
		})
	}
}

// Series beyond the bound are counted together, and none of them is lost.
func TestActiveOverflow(t *testing.T) {
	reader := sdkmetric.NewManualReader()
	s := watch(WithTenantLabel(), WithMeterProvider(sdkmetric.NewMeterProvider(sdkmetric.WithReader(reader), sdkmetric.WithCardinalityLimit(0))))
	s.reader = reader
	series := &s.policy.metrics.series
	for n := range maxCached - 1 {
		series.get(labels{tenant: fmt.Sprint(n)})
	}
	ends := []func(){begin(t, s.policy, "the last"), begin(t, s.policy, "one more"), begin(t, s.policy, "and one")}
	const last, others = llama + ",sluice.tenant=the last", "otel.metric.overflow=true"
	got := active(t, s)
	if len(got) != maxCached+1 || got[last] != 1 || got[others] != 2 {
		t.Errorf("%d series, of the last %d, of the others %d", len(got), got[last], got[others])
	}
	for _, end := range ends {
		end()
	}
	if got := active(t, s); got[last] != 0 || got[others] != 0 {
		t.Errorf("when all have ended: of the last %d, of the others %d", got[last], got[others])
	}
}

// Those who ask for a new series at once get one and the same: else what some of them
// count is lost.
func TestCacheBuildsOnce(t *testing.T) {
	for range 100 {
		c := cache[int, *int]{build: func(k int) *int { runtime.Gosched(); return &k }}
		var got [8]*int
		var wg sync.WaitGroup
		for n := range got {
			wg.Go(func() { got[n] = c.get(1) })
		}
		wg.Wait()
		for _, v := range got {
			if v != got[0] {
				t.Fatal("two were built")
			}
		}
	}
}

// When the last policy is gone that counts with them, nobody reads the counts.
func TestActiveReleased(t *testing.T) {
	gone := make(chan struct{})
	provider := releasing{sdkmetric.NewMeterProvider(), sync.OnceFunc(func() { close(gone) })}
	begin(t, watch(WithMeterProvider(provider)).policy, "")()
	for range 100 {
		runtime.GC()
		select {
		case <-gone:
			return
		default:
			runtime.Gosched()
		}
	}
	<-gone // the test's time limit is the bound
}

// releasing tells when a callback is given up.
type releasing struct {
	metric.MeterProvider
	released func()
}

func (r releasing) Meter(name string, opts ...metric.MeterOption) metric.Meter {
	return releasingMeter{r.MeterProvider.Meter(name, opts...), r.released}
}

type releasingMeter struct {
	metric.Meter
	released func()
}

func (m releasingMeter) RegisterCallback(f metric.Callback, of ...metric.Observable) (metric.Registration, error) {
	r, err := m.Meter.RegisterCallback(f, of...)
	return releasingRegistration{r, m.released}, err
}

type releasingRegistration struct {
	metric.Registration
	released func()
}

func (r releasingRegistration) Unregister() error {
	r.released()
	return r.Registration.Unregister()
}
