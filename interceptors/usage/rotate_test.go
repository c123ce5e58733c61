package usage

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"go.opentelemetry.io/otel/attribute"
	sdklog "go.opentelemetry.io/otel/sdk/log"
	sdkmetric "go.opentelemetry.io/otel/sdk/metric"
	"go.opentelemetry.io/otel/sdk/metric/metricdata"

	"github.com/sluicegate/sluice/interceptors"
	configv1 "github.com/sluicegate/sluice/proto/gen/sluice/config/v1"
)

// A file that has reached its size becomes FILE.1; of those there are so many, and no
// record is lost or torn but those of the oldest.
func TestRotation(t *testing.T) {
	path := filepath.Join(t.TempDir(), "usage.jsonl")
	p, err := Open(&configv1.Usage{File: path, MaxBytes: 1000, Keep: 3}, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	for n := range 60 {
		p.file.line(record{Model: fmt.Sprint("model-", n)})
	}
	p.Close()
	next := 59
	for k := range 4 {
		name := path
		if k > 0 {
			name = p.file.numbered(k)
		}
		text, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		lines := bytes.Split(bytes.TrimSuffix(text, []byte("\n")), []byte("\n"))
		if k > 0 && len(text) < 1000 {
			t.Errorf("%s has %d bytes", name, len(text))
		}
		for n := len(lines) - 1; n >= 0 && len(lines[n]) > 0; n-- {
			if want := fmt.Sprintf(`"model":"model-%d"`, next); !bytes.Contains(lines[n], []byte(want)) {
				t.Fatalf("%s: %s, want %s", name, lines[n], want)
			}
			next--
		}
	}
	if next < 20 {
		t.Errorf("%d records are left", 59-next)
	}
	if _, err := os.Stat(p.file.numbered(4)); err == nil {
		t.Error("there is one more than is to be kept")
	}
}

// The size is that of the file, also of one that was there.
func TestRotationGoesOn(t *testing.T) {
	path := filepath.Join(t.TempDir(), "usage.jsonl")
	if err := os.WriteFile(path, bytes.Repeat([]byte("{}\n"), 400), 0o600); err != nil {
		t.Fatal(err)
	}
	p, err := Open(&configv1.Usage{File: path, MaxBytes: 1000}, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	p.file.line(record{})
	p.Close()
	if info, err := os.Stat(path); err != nil || info.Size() != 0 {
		t.Errorf("%v, %v: want a new file", info, err)
	}
}

// A file that cannot be moved goes on growing: nothing is lost for it.
func TestRotationThatFails(t *testing.T) {
	path := filepath.Join(t.TempDir(), "usage.jsonl")
	if err := os.MkdirAll(filepath.Join(path+".1", "x"), 0o700); err != nil {
		t.Fatal(err)
	}
	p, err := Open(&configv1.Usage{File: path, MaxBytes: 10, Keep: 1}, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	for range 3 {
		p.file.line(record{})
	}
	p.Close()
	text, err := os.ReadFile(path)
	if err != nil || bytes.Count(text, []byte("\n")) != 3 || p.Lost() != 0 {
		t.Errorf("%s, %v, %d lost", text, err, p.Lost())
	}
}

// exported are log records that were exported.
type exported struct {
	mu   sync.Mutex
	list []sdklog.Record
}

func (e *exported) Export(_ context.Context, list []sdklog.Record) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, r := range list {
		e.list = append(e.list, r.Clone())
	}
	return nil
}
func (e *exported) Shutdown(context.Context) error   { return nil }
func (e *exported) ForceFlush(context.Context) error { return nil }

// An inference is an OpenTelemetry event, with what the line of the file says.
func TestOpenTelemetry(t *testing.T) {
	out := new(exported)
	provider := sdklog.NewLoggerProvider(sdklog.WithProcessor(sdklog.NewSimpleProcessor(out)))
	p, err := Open(&configv1.Usage{Otlp: true}, slog.New(slog.DiscardHandler), WithLoggerProvider(provider))
	if err != nil {
		t.Fatal(err)
	}
	c := &interceptors.Call{Principal: "spiffe://a/x", Tenant: "a"}
	c.FullMethod = "/s/M"
	v := &inference{to: p, i: &interceptors.Inference{Call: c, Model: "m", InputTokens: 3, OutputTokens: 5, Handed: true}}
	v.Observe(interceptors.Event{Name: "charged", Attributes: []string{"budget", "b", "unit", "tokens", "amount", "8"}})
	v.End(interceptors.Outcome{})
	p.Close()
	if len(out.list) != 1 || out.list[0].EventName() != eventName {
		t.Fatalf("%+v", out.list)
	}
	got := map[attribute.Key]attribute.Value{}
	out.list[0].WalkAttributes(func(kv attribute.KeyValue) bool { got[kv.Key] = kv.Value; return true })
	for key, want := range map[attribute.Key]string{
		"sluice.principal": "spiffe://a/x", "sluice.tenant": "a", "rpc.method": "/s/M", "gen_ai.request.model": "m",
		"gen_ai.usage.input_tokens": "3", "gen_ai.usage.output_tokens": "5", "sluice.handed": "true", "sluice.outcome": "served",
	} {
		if v := got[key]; v.String() != want {
			t.Errorf("%s is %s, want %s", key, v.String(), want)
		}
	}
	if v := got["sluice.charges"]; v.Type() != attribute.SLICE {
		t.Errorf("charges are %s", v.String())
	}
	if v, there := got["sluice.reason"]; there {
		t.Errorf("a reason: %s", v.String())
	}
}

// Lost records are a metric.
func TestLostIsAMetric(t *testing.T) {
	reader := sdkmetric.NewManualReader()
	p, err := Open(&configv1.Usage{File: filepath.Join(t.TempDir(), "usage.jsonl")}, slog.New(slog.DiscardHandler),
		WithMeterProvider(sdkmetric.NewMeterProvider(sdkmetric.WithReader(reader))))
	if err != nil {
		t.Fatal(err)
	}
	p.file.lose(3, nil)
	p.file.lose(2, nil)
	p.Close()
	var all metricdata.ResourceMetrics
	if err := reader.Collect(t.Context(), &all); err != nil {
		t.Fatal(err)
	}
	if len(all.ScopeMetrics) != 1 || all.ScopeMetrics[0].Metrics[0].Name != "sluice.usage.lost" {
		t.Fatalf("%+v", all)
	}
	if sum := all.ScopeMetrics[0].Metrics[0].Data.(metricdata.Sum[int64]); sum.DataPoints[0].Value != 5 || !sum.IsMonotonic {
		t.Errorf("%+v", sum)
	}
}
