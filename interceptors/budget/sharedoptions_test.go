package budget

import (
	"context"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/sluicegate/sluice/interceptors"
	"github.com/sluicegate/sluice/interceptors/dialect"
	configv1 "github.com/sluicegate/sluice/proto/gen/sluice/config/v1"
)

// through is one inference of three words in a chain, answered with so many; max is the output
// that it asks for, 0 if it does not say. It returns what is forwarded, and the refusal.
func through(t *testing.T, l *Ledger, w *watcher, max, out int) ([]byte, *interceptors.Denial) {
	t.Helper()
	d, err := dialect.Triton(dialect.Options{})
	if err != nil {
		t.Fatal(err)
	}
	chain := interceptors.New([]*interceptors.Backend{{Name: "b", Dialect: d}}, w, l.Rates(), l.Tokens())
	call, err := chain.Begin(context.Background(), interceptors.CallInfo{FullMethod: "/inference.GRPCInferenceService/ModelInfer"})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { call.End(err) }()
	b := field(field(nil, 1, []byte("m")), 5, tensor("one two three"))
	if max > 0 {
		b = field(b, 4, field(field(nil, 1, []byte("max_tokens")), 2, protowire.AppendVarint([]byte{2 << 3}, uint64(max))))
	}
	request := envelope(b)
	i, err := call.Request(request)
	if err == nil {
		err = i.Wait(call.Context())
	}
	if err != nil {
		request.Release()
		return nil, denial(t, err)
	}
	i.Hand()
	forwarded := slices.Clone(request.Encode().Materialize())
	response := envelope(field(field(nil, 1, []byte("m")), 5, tensor(strings.Repeat("word ", out))))
	defer response.Release()
	_, _, err = call.Response(response)
	return forwarded, denial(t, err)
}

// maxOf is the limit on output tokens in a request.
func maxOf(t *testing.T, request []byte) int64 {
	t.Helper()
	d, _ := dialect.Triton(dialect.Options{})
	method := d.Methods["/inference.GRPCInferenceService/ModelInfer"]
	e := envelope(request)
	defer e.Release()
	if err := method.Request.Scan(&e.Message, mem.BufferSlice{mem.SliceBuffer(request)}); err != nil {
		t.Fatal(err)
	}
	r, err := method.ReadRequest(&e.Message)
	if err != nil {
		t.Fatal(err)
	}
	return r.MaxTokens
}

// Gateways that share a budget tell of each threshold once, by what all of them have spent,
// in every window; also if all that follows is refused. What is only reserved is not spent.
func TestThresholdsOfSharedBudgets(t *testing.T) {
	s := newServer(t)
	for kind, budget := range map[string]*configv1.Budget{
		"life":     {},
		"window":   {Window: durationpb.New(time.Hour)},
		"calendar": {Calendar: month},
		"bucket":   {Window: durationpb.New(10000 * time.Hour), Burst: 120},
	} {
		t.Run(kind, func(t *testing.T) {
			budget.Name, budget.Tokens, budget.Share = kind, 120, 6
			var w watcher
			a, b := s.gateway(t, time.Minute, long, budget), s.gateway(t, time.Minute, long, budget)
			tell := func(want ...string) {
				t.Helper()
				for n := range want {
					want[n] = "budget threshold budget " + kind + " percent " + want[n]
				}
				if !slices.Equal(w.seen, want) {
					t.Errorf("%q, want %q", w.seen, want)
				}
				w.seen = nil
			}
			serve := func(inferences int) {
				t.Helper()
				for n := range inferences {
					if _, d := through(t, []*Ledger{a, b}[n%2], &w, 3, 3); d != nil {
						t.Fatal(n, d)
					}
				}
			}
			serve(8) // 48 of 120
			tell()
			i := infer(caller("a", "p"), "m", 0, 40)
			reserved, d := begin(t, a.Tokens(), i)
			if d != nil {
				t.Fatal(d)
			}
			if _, err := a.Account(t.Context(), Name{Budget: kind}); err != nil { // the store hears of it
				t.Fatal(err)
			}
			_, _ = through(t, a, &w, 3, 1)
			tell()
			reserved.End(interceptors.Outcome{})
			serve(6) // 88
			tell("50")
			for range 12 {
				_, _ = through(t, a, &w, 3, 3)
				_, _ = through(t, b, &w, 3, 3)
			}
			tell("80")
			if _, err := a.Grant(t.Context(), Name{Budget: kind}, 1); err != nil { // nothing is passed downwards
				t.Fatal(err)
			}
			tell()
			_, _ = a.Close(), b.Close()
		})
	}
	t.Run("to the last token", func(t *testing.T) {
		var w watcher
		l := s.gateway(t, time.Minute, long, &configv1.Budget{Name: "all", Tokens: 12, Share: 6})
		for range 3 {
			_, _ = through(t, l, &w, 3, 3)
		}
		if got := strings.Join(w.seen, ", "); !strings.HasSuffix(got, "percent 100") {
			t.Errorf("%s, want 100 in the end", got)
		}
		_ = l.Close()
	})
}

// With a shared store too, an inference that may be clamped asks for what is left in it, and
// its message says so; one that may not is refused.
func TestClampOfSharedBudgets(t *testing.T) {
	s := newServer(t)
	for _, test := range []struct {
		name    string
		budgets []*configv1.Budget
		max     int
		want    int64 // in the message; 0: refused
	}{
		{"all fits", []*configv1.Budget{{Tokens: 103, Clamp: true}}, 90, 90},
		{"what is left", []*configv1.Budget{{Tokens: 103, Clamp: true, Share: 10}}, 500, 90},
		{"the least of all", []*configv1.Budget{{Tokens: 103, Clamp: true}, {Tokens: 63, Clamp: true}}, 500, 50},
		{"another that does not clamp has too little", []*configv1.Budget{{Tokens: 103, Clamp: true}, {Tokens: 73}}, 500, 0},
		{"not one token", []*configv1.Budget{{Tokens: 13, Clamp: true}}, 500, 0},
	} {
		t.Run(test.name, func(t *testing.T) {
			for n, b := range test.budgets {
				b.Name = strings.ReplaceAll(test.name, " ", "-") + string(rune('a'+n))
			}
			other, l := s.gateway(t, time.Minute, long, test.budgets...), s.gateway(t, time.Minute, long, test.budgets...)
			var w watcher
			if _, d := through(t, other, &w, 7, 7); d != nil {
				t.Fatal(d)
			}
			_ = other.Close() // gives back what it did not spend
			request, d := through(t, l, &w, test.max, 1)
			if (d != nil) != (test.want == 0) {
				t.Fatalf("%v, want %d", d, test.want)
			}
			if d == nil && maxOf(t, request) != test.want {
				t.Errorf("the model server is asked for %d, want %d", maxOf(t, request), test.want)
			}
			_ = l.Close()
			atRest(t, l)
		})
	}
}

// With a shared store too, what has begun goes into the overdraft, and nothing begins there.
func TestOverdraftOfSharedBudgets(t *testing.T) {
	s := newServer(t)
	for _, test := range []struct {
		name string
		out  int64
		cut  bool
	}{
		{"all of it", 70, false},
		{"one more", 71, true},
	} {
		t.Run(test.name, func(t *testing.T) {
			b := &configv1.Budget{Name: strings.ReplaceAll(test.name, " ", "-"), Tokens: 100, Overdraft: 20, Share: 10}
			a, l := s.gateway(t, time.Minute, long, b), s.gateway(t, time.Minute, long, b)
			serve := func(l *Ledger, out int64) *interceptors.Denial {
				i := infer(caller("a", "p"), "m", 0, 50)
				v, d := begin(t, l.Tokens(), i)
				if d != nil {
					return d
				}
				i.Handed, i.OutputTokens = true, out
				d = denial(t, v.Response(nil))
				v.End(interceptors.Outcome{})
				return d
			}
			if d := serve(a, 50); d != nil {
				t.Fatal(d)
			}
			_ = a.Close()
			if d := serve(l, test.out); (d != nil) != test.cut {
				t.Fatalf("cut: %v", d)
			}
			if d := serve(l, 1); d == nil {
				t.Error("another begins")
			}
			seen, err := l.Account(t.Context(), Name{Budget: b.Name})
			if want := min(50+test.out, 120); err != nil || seen.SharedLeft != 0 || !test.cut && seen.Spent != want-50 {
				t.Errorf("%+v, %v", seen, err)
			}
			_ = l.Close()
			atRest(t, l)
		})
	}
	t.Run("of two at once", func(t *testing.T) {
		b := &configv1.Budget{Name: "two", Tokens: 80, Overdraft: 20, Share: 1}
		cuts := 0
		var all [2]interceptors.InferencePolicy
		var ledgers [2]*Ledger
		for n := range all {
			ledgers[n] = s.gateway(t, time.Minute, long, b)
			i := infer(caller("a", "p"), "m", 0, 40)
			v, d := begin(t, ledgers[n].Tokens(), i)
			if d != nil {
				t.Fatal(d)
			}
			i.Handed, i.OutputTokens, all[n] = true, 55, v
		}
		for _, v := range all {
			if v.Response(nil) != nil {
				cuts++
			}
		}
		for n, l := range ledgers {
			all[n].End(interceptors.Outcome{})
			_ = l.Close()
		}
		if cuts != 1 {
			t.Errorf("%d of two were cut that want 30 of an overdraft of 20, want one", cuts)
		}
	})
}
