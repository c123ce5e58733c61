package admit

import (
	"context"
	"fmt"
	"testing"
	"time"

	"github.com/sluicegate/sluice/interceptors"
	"github.com/sluicegate/sluice/interceptors/dialect"
)

// BenchmarkUncontended is to stay under 300 ns, without an allocation.
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
			if w, ok := v.(interceptors.Waiter); ok && !w.Ready() {
				if err := w.Wait(context.Background()); err != nil {
					b.Error(err)
				}
			}
			v.End(well)
		}
	})
}

// BenchmarkQueued is one place in a long queue, taken and left: of one tenant, and
// of many. It is to grow no faster than the logarithm of the length.
func BenchmarkQueued(b *testing.B) {
	for _, length := range []int{100, 10_000} {
		for _, tenants := range []int{1, 100, 10_000} {
			b.Run(fmt.Sprintf("%d waiters of %d tenants", length, tenants), func(b *testing.B) {
				p := policy(b, of(1, 20_000))
				held := must(b, p, "1")
				var before []*part
				for n := range length {
					v, _ := begin(b, p, context.Background(), &interceptors.Inference{Model: "1"}, fmt.Sprint(n%tenants), "")
					before = append(before, v)
				}
				call, i := benchInference(b, p)
				i.Call.Tenant = fmt.Sprint(tenants / 2)
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
			})
		}
	}
}

// BenchmarkPassed is one that ends, and passes its permit to the next of 10,000
// of 100 tenants, while another queues.
func BenchmarkPassed(b *testing.B) {
	p := policy(b, of(1, 20_000))
	infer := func(n int) *part {
		v, _ := begin(b, p, context.Background(), &interceptors.Inference{Model: "1"}, fmt.Sprint(n%100), "")
		return v
	}
	running := interceptors.InferencePolicy(infer(0))
	for n := range 10_000 {
		infer(n)
	}
	l := p.pools[0]
	b.ReportAllocs()
	for n := 0; b.Loop(); n++ {
		next := l.first()
		running.End(well)
		running = next
		infer(n)
	}
	for l.waiting > 0 {
		l.first().End(cancelled)
	}
	running.End(cancelled)
}

// BenchmarkResponse is what a response costs a policy that counts tokens.
func BenchmarkResponse(b *testing.B) {
	p := policy(b, of(1, 10))
	call, i := benchInference(b, p)
	v, err := call.Start(i)
	if err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	for b.Loop() {
		i.OutputTokens++
		if err := v.Response(nil); err != nil {
			b.Fatal(err)
		}
	}
	v.End(well)
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

// BenchmarkShared is BenchmarkUncontended in a pool that gateways share: no inference
// meets the network.
func BenchmarkShared(b *testing.B) {
	p, _ := gatewayOf(b, store(b), common(100, 100, time.Minute, whileHeld))
	call, i := benchInference(b, p)
	b.ReportAllocs()
	for b.Loop() {
		v, err := call.Start(i)
		if err != nil {
			b.Fatal(err)
		}
		if w, ok := v.(interceptors.Waiter); ok {
			if err := w.Wait(context.Background()); err != nil {
				b.Fatal(err)
			}
		}
		v.End(well)
	}
}
