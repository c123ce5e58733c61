package admit

import (
	"context"
	"testing"

	"github.com/sluicegate/sluice/interceptors"
	"github.com/sluicegate/sluice/interceptors/dialect"
)

// BenchmarkUncontended is to stay under 300 ns with one allocation, the
// InferencePolicy.
func BenchmarkUncontended(b *testing.B) {
	p := policy(b, of(100, 100))
	call, i := benchInference(b, p)
	b.ReportAllocs()
	for b.Loop() {
		v, err := call.Start(i)
		if err != nil {
			b.Fatal(err)
		}
		v.End(well)
	}
}

// BenchmarkContended has every core ask for more permits than there are.
func BenchmarkContended(b *testing.B) {
	p := policy(b, of(2, 1000))
	b.SetParallelism(8)
	b.ReportAllocs()
	b.RunParallel(func(pb *testing.PB) {
		call, i := benchInference(b, p)
		for pb.Next() {
			v, err := call.Start(i)
			if err != nil {
				b.Error(err)
				return
			}
			if w := v.(interceptors.Waiter); !w.Ready() {
				if err := w.Wait(context.Background()); err != nil {
					b.Error(err)
				}
			}
			v.End(well)
		}
	})
}

// BenchmarkQueued is one place in a long queue, taken and left.
func BenchmarkQueued(b *testing.B) {
	p := policy(b, of(1, 20_000))
	held := must(b, p, "1")
	var before []*permit
	for range 10_000 {
		before = append(before, must(b, p, "1"))
	}
	call, i := benchInference(b, p)
	b.ReportAllocs()
	for b.Loop() {
		v, err := call.Start(i)
		if err != nil {
			b.Fatal(err)
		}
		v.End(cancelled)
	}
	for _, v := range before {
		v.End(cancelled)
	}
	held.End(well)
}

// BenchmarkRefused is the price of one too many.
func BenchmarkRefused(b *testing.B) {
	p := policy(b, of(1, 0))
	held := must(b, p, "1")
	defer held.End(well)
	call, i := benchInference(b, p)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := call.Start(i); err == nil {
			b.Fatal("not refused")
		}
	}
}

func benchInference(b *testing.B, p *Policy) (interceptors.CallPolicy, *interceptors.Inference) {
	c := &interceptors.Call{Method: &dialect.Method{Kind: dialect.Inference}}
	c.SetContext(context.Background())
	call, err := p.Begin(c)
	if err != nil {
		b.Fatal(err)
	}
	return call, &interceptors.Inference{Call: c, Model: "1"}
}
