package budget

import (
	"context"
	"fmt"
	"runtime"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/sluicegate/sluice/interceptors"
	configv1 "github.com/sluicegate/sluice/proto/gen/sluice/config/v1"
)

// four is a budget at each of four levels.
func four(amount uint64) []*configv1.Budget {
	levels := []configv1.BudgetKey{perTrustDomain, perTenant, perPrincipal, perModel}
	var out []*configv1.Budget
	for n := range levels {
		out = append(out, &configv1.Budget{Name: fmt.Sprint("level-", n), Tokens: amount, Per: levels[:n+1],
			Window: durationpb.New(3600e9)})
	}
	return out
}

// BenchmarkReserveSettle is to stay under 1 µs with one key and under 3 µs with
// four levels, with one allocation, the InferencePolicy.
func BenchmarkReserveSettle(b *testing.B) {
	for _, test := range []struct {
		name    string
		budgets []*configv1.Budget
	}{{"keys=1", four(1 << 60)[:1]}, {"keys=4", four(1 << 60)}} {
		b.Run(test.name, func(b *testing.B) {
			call, i := benchInference(b, ledger(b, test.budgets...).Tokens(), "p")
			b.ReportAllocs()
			for b.Loop() {
				reserveSettle(b, call, i)
			}
		})
		b.Run(test.name+"/parallel", func(b *testing.B) {
			p := ledger(b, test.budgets...).Tokens()
			b.ReportAllocs()
			b.RunParallel(func(pb *testing.PB) {
				call, i := benchInference(b, p, "p")
				for pb.Next() {
					reserveSettle(b, call, i)
				}
			})
		})
	}
}

func reserveSettle(b *testing.B, call interceptors.CallPolicy, i *interceptors.Inference) {
	v, err := call.Start(i)
	if err != nil {
		b.Fatal(err)
	}
	v.End(interceptors.Outcome{})
}

// BenchmarkMessage is the price of a streamed message that the grant covers.
func BenchmarkMessage(b *testing.B) {
	call, i := benchInference(b, ledger(b, four(1<<60)...).Tokens(), "p")
	v, err := call.Start(i)
	if err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	for b.Loop() {
		if err := v.Response(nil); err != nil {
			b.Fatal(err)
		}
	}
	v.End(interceptors.Outcome{})
}

// BenchmarkTopUp is the price of one that it does not cover.
func BenchmarkTopUp(b *testing.B) {
	call, i := benchInference(b, ledger(b, four(1<<60)...).Tokens(), "p")
	v, err := call.Start(i)
	if err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	for b.Loop() {
		i.OutputTokens += 64
		if err := v.Response(nil); err != nil {
			b.Fatal(err)
		}
	}
	v.End(interceptors.Outcome{})
}

// BenchmarkRates is a request spent, and four token accounts looked at.
func BenchmarkRates(b *testing.B) {
	l := ledger(b, append(four(1<<60), &configv1.Budget{Name: "rate", Requests: 1 << 60, Per: []configv1.BudgetKey{perPrincipal}})...)
	tokens, i := benchInference(b, l.Tokens(), "p")
	v, err := tokens.Start(i) // so that there are accounts
	if err != nil {
		b.Fatal(err)
	}
	defer v.End(interceptors.Outcome{})
	call, i := benchInference(b, l.Rates(), "p")
	b.ReportAllocs()
	for b.Loop() {
		if _, err := call.Start(i); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkAccounts reports what a million live accounts cost in memory: it is to stay
// under 300 MB.
func BenchmarkAccounts(b *testing.B) {
	for _, test := range []struct {
		name string
		per  []configv1.BudgetKey
	}{
		{"principal=60B", []configv1.BudgetKey{perPrincipal}},
		{"tenant,principal=60B,model", []configv1.BudgetKey{perTenant, perPrincipal, perModel}},
	} {
		b.Run(test.name, func(b *testing.B) {
			for b.Loop() {
				const n = 1_000_000
				l := ledger(b, &configv1.Budget{Name: "b", Tokens: 1000, Per: test.per})
				var before, after runtime.MemStats
				runtime.GC()
				runtime.ReadMemStats(&before)
				call, i := benchInference(b, l.Tokens(), "")
				i.Handed = true
				for k := range n {
					i.Call.Principal = fmt.Sprintf("%060d", k)
					reserveSettle(b, call, i)
				}
				runtime.GC()
				runtime.ReadMemStats(&after)
				if got := l.table.size.Load(); got != n {
					b.Fatalf("%d accounts", got)
				}
				b.ReportMetric(float64(after.HeapAlloc-before.HeapAlloc)/1e6, "MB/million")
				runtime.KeepAlive(l)
			}
		})
	}
}

// BenchmarkTenants is tenants who share no budget, at once: each has four accounts.
func BenchmarkTenants(b *testing.B) {
	var budgets []*configv1.Budget
	for n, per := range [][]configv1.BudgetKey{{perTenant}, {perTenant, perModel}, {perTenant, perPrincipal}, {perTenant, perPrincipal, perModel}} {
		budgets = append(budgets, &configv1.Budget{Name: fmt.Sprint("level-", n), Tokens: 1 << 60, Per: per, Window: durationpb.New(3600e9)})
	}
	p := ledger(b, budgets...).Tokens()
	var who atomic.Int64
	b.ReportAllocs()
	b.RunParallel(func(pb *testing.PB) {
		c := caller(fmt.Sprint("tenant-", who.Add(1)), "p")
		call, err := p.Begin(c)
		if err != nil {
			b.Fatal(err)
		}
		i := infer(c, "llama", 10, 100)
		for pb.Next() {
			reserveSettle(b, call, i)
		}
	})
}

// BenchmarkShared is what a real store costs an inference at a steady load, and how
// many of a hundred wait for it: to stay under one.
func BenchmarkShared(b *testing.B) {
	for name, budgets := range map[string][]*configv1.Budget{"keys=1": four(1 << 40)[:1], "keys=4": four(1 << 40)} {
		b.Run(name, func(b *testing.B) {
			s := newServer(b)
			l := s.gateway(b, time.Minute, long, budgets...)
			p, waited, n := l.Tokens(), 0, 0
			call, i := benchInference(b, p, "p")
			i.Call.SetContext(context.Background())
			i.Handed = true
			i.OutputTokens = 100
			b.ReportAllocs()
			for b.Loop() {
				n++
				v, err := call.Start(i)
				if err != nil {
					b.Fatal(err)
				}
				if w := v.(interceptors.Waiter); !w.Ready() {
					waited++
					if err := w.Wait(context.Background()); err != nil {
						b.Fatal(err)
					}
				}
				v.End(interceptors.Outcome{})
			}
			b.ReportMetric(100*float64(waited)/float64(n), "waited/100")
			_ = l.Close()
		})
	}
}

func benchInference(b *testing.B, p interceptors.Policy, principal string) (interceptors.CallPolicy, *interceptors.Inference) {
	c := caller("acme", "p")
	c.Principal = principal
	call, err := p.Begin(c)
	if err != nil {
		b.Fatal(err)
	}
	return call, infer(c, "llama", 10, 100)
}
