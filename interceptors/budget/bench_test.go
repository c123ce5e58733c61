package budget

import (
	"fmt"
	"runtime"
	"testing"

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

// BenchmarkAccounts reports what an account costs in memory, with a SPIFFE ID
// of 60 bytes for its name.
func BenchmarkAccounts(b *testing.B) {
	for b.Loop() {
		const n = 200_000
		l := ledger(b, &configv1.Budget{Name: "b", Tokens: 1000, Per: []configv1.BudgetKey{perPrincipal}})
		var before, after runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&before)
		for k := range n {
			call, i := benchInference(b, l.Tokens(), fmt.Sprintf("%060d", k))
			i.Handed = true
			reserveSettle(b, call, i)
		}
		runtime.GC()
		runtime.ReadMemStats(&after)
		b.ReportMetric(float64(after.HeapAlloc-before.HeapAlloc)/n, "B/account")
		runtime.KeepAlive(l)
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
