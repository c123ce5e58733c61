package budget

import (
	"fmt"
	"math"
	"math/big"
	"math/rand/v2"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/sluicegate/sluice/interceptors"
	"github.com/sluicegate/sluice/interceptors/dialect"
	"github.com/sluicegate/sluice/interceptors/fields"
	configv1 "github.com/sluicegate/sluice/proto/gen/sluice/config/v1"
)

func TestNewRefusesUnitsAndWindowsThatCannotWork(t *testing.T) {
	all := []*configv1.Price{{Model: "*"}}
	for _, test := range []struct {
		name   string
		budget *configv1.Budget
		prices []*configv1.Price
		want   string // "" for none
	}{
		{"money", &configv1.Budget{MoneyMicros: 1}, all, ""},
		{"money for models that have prices", &configv1.Budget{MoneyMicros: 1, Models: []string{"m"}}, []*configv1.Price{{Model: "m"}}, ""},
		{"money without a price for every model", &configv1.Budget{MoneyMicros: 1}, nil, "budgets[0].money_micros: models without a price"},
		{"money without a price for a model", &configv1.Budget{MoneyMicros: 1, Models: []string{"m"}}, nil, `budgets[0].models: "m" has no price`},
		{"a price twice", &configv1.Budget{MoneyMicros: 1}, append(all, all...), "prices[1].model"},
		{"money and tokens", &configv1.Budget{MoneyMicros: 1, Tokens: 1}, all, "not both"},
		{"more money than can be counted", &configv1.Budget{MoneyMicros: math.MaxInt64 / 1000}, all, "above"},
		{"GPU time", &configv1.Budget{GpuSeconds: 1}, nil, ""},
		{"weights", &configv1.Budget{Tokens: 1, InputWeight: proto.Uint32(0), OutputWeight: proto.Uint32(3)}, nil, ""},
		{"weights of nothing", &configv1.Budget{Tokens: 1, InputWeight: proto.Uint32(0), OutputWeight: proto.Uint32(0)}, nil, "both weights are 0"},
		{"weights of money", &configv1.Budget{MoneyMicros: 1, InputWeight: proto.Uint32(2)}, all, "weights are for tokens"},
		{"calendar", &configv1.Budget{Tokens: 1, Calendar: day, TimeZone: "Europe/Zurich"}, nil, ""},
		{"calendar and window", &configv1.Budget{Tokens: 1, Calendar: day, Window: durationpb.New(1)}, nil, "make two budgets"},
		{"calendar and burst", &configv1.Budget{Tokens: 1, Calendar: day, Burst: 1}, nil, "make two budgets"},
		{"unknown calendar", &configv1.Budget{Tokens: 1, Calendar: 99}, nil, "is no calendar"},
		{"unknown zone", &configv1.Budget{Tokens: 1, Calendar: day, TimeZone: "Europe/Nowhere"}, nil, `"Europe/Nowhere" is not known`},
		{"this machine's zone", &configv1.Budget{Tokens: 1, Calendar: day, TimeZone: "Local"}, nil, "is not known"},
		{"zone without calendar", &configv1.Budget{Tokens: 1, TimeZone: "UTC"}, nil, "time_zone: it is for a calendar"},
		{"bucket", &configv1.Budget{Tokens: 1, Burst: 9, Window: durationpb.New(1)}, nil, ""},
		{"burst without a rate", &configv1.Budget{Tokens: 1, Burst: 9}, nil, "burst: say in window"},
		{"debt without a next window", &configv1.Budget{Tokens: 1, Debt: true}, nil, "debt: there is no next window"},
		{"told to strangers", &configv1.Budget{Tokens: 1, Tell: true, Per: []configv1.BudgetKey{perTrustDomain, perModel}}, nil, "tell: the account is of several"},
		{"told to a tenant", &configv1.Budget{Tokens: 1, Tell: true, Per: []configv1.BudgetKey{perTenant}}, nil, ""},
		{"overdraft of requests", &configv1.Budget{Requests: 1, Overdraft: 1}, nil, "requests: clamp, overdraft"},
	} {
		t.Run(test.name, func(t *testing.T) {
			_, err := New([]*configv1.Budget{test.budget}, WithPrices(test.prices))
			switch {
			case err == nil && test.want != "":
				t.Errorf("no error, want %q", test.want)
			case err != nil && (test.want == "" || !strings.Contains(err.Error(), test.want)):
				t.Errorf("error %q, want %q", err, test.want)
			}
		})
	}
}

// A cost is the exact sum, rounded up by less than a unit; and affords finds the
// last output that a sum pays for.
func TestTariffsAreExact(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 1))
	random := func() int64 { return r.Int64N(1 << uint(1+r.IntN(40))) }
	for range 20_000 {
		f := tariff{input: random(), output: random(), time: random(), per: []int64{1, 1000}[r.IntN(2)]}
		u := usage{random(), random(), random()}
		want := new(big.Int)
		for _, p := range [][2]int64{{f.input, u.input}, {f.output, u.output}, {f.time, u.time}} {
			want.Add(want, new(big.Int).Mul(big.NewInt(p[0]), big.NewInt(p[1])))
		}
		if want.IsInt64() {
			want.Add(want, big.NewInt(f.per-1))
			want.Div(want, big.NewInt(f.per))
		} else {
			want.SetInt64(math.MaxInt64)
		}
		if got := f.cost(u); got != want.Int64() {
			t.Fatalf("%+v of %+v costs %d, want %v", f, u, got, want)
		}
		amount := random()
		switch n := f.affords(u, amount); {
		case n < 0 && f.cost(usage{input: u.input, time: u.time}) <= amount,
			n >= 0 && f.cost(usage{u.input, n, u.time}) > amount,
			n >= 0 && n < math.MaxInt64 && f.cost(usage{u.input, n + 1, u.time}) <= amount:
			t.Fatalf("%+v: %d pays for an output of %d beside %+v", f, amount, n, u)
		}
	}
}

func TestShow(t *testing.T) {
	for _, test := range []struct {
		metric metric
		n      int64
		want   string
	}{
		{tokens, 12, "12"}, {money, 1, "0.000000001"}, {money, 1_500_000_000, "1.5"}, {money, -20_000_000_000, "-20"},
		{gpuTime, 250_000, "0.25"}, {gpuTime, 0, "0"},
	} {
		if got := test.metric.show(test.n); got != test.want {
			t.Errorf("%d of %s: %s, want %s", test.n, test.metric, got, test.want)
		}
	}
}

func TestMoney(t *testing.T) {
	l, err := New([]*configv1.Budget{{Name: "b", MoneyMicros: 100, Window: durationpb.New(time.Hour)}},
		WithPrices([]*configv1.Price{
			{Model: "small", InputMicrosPerMillion: 37_500, OutputMicrosPerMillion: 150_000}, // 0.0375 and 0.15 micros a token
			{Model: "*", InputMicrosPerMillion: 3_000_000, OutputMicrosPerMillion: 15_000_000},
		}))
	if err != nil {
		t.Fatal(err)
	}
	for _, step := range []struct {
		model   string
		in, out int64
		want    int64 // thousandths of a micro, of 100,000
	}{
		{"small", 100, 100, 18_750},
		{"small", 1, 0, 18_788}, // 37.5, rounded up
		{"large", 2, 5, 99_788},
	} {
		i := infer(caller("a", "p"), step.model, step.in, max(1, step.out))
		v, d := start(t, l.Tokens(), i)
		if d != nil {
			t.Fatalf("%+v: %v", step, d)
		}
		i.Handed, i.OutputTokens = true, step.out
		v.End(interceptors.Outcome{})
		if got := only(t, l); got.Spent != step.want || got.Metric != "money" {
			t.Errorf("%+v, want %d spent", got, step.want)
		}
	}
	_, d := start(t, l.Tokens(), infer(caller("a", "p"), "small", 1, 2))
	if d == nil || d.Reason != interceptors.BudgetExhausted || d.Metadata["remaining"] != "0.000000212" ||
		d.Metadata["requested"] != "0.000000338" || d.Metadata["limit"] != "0.0001" || d.Quota.Metric != "money" || d.Quota.Limit != 100 ||
		!strings.Contains(d.Message, "too little money left") {
		t.Errorf("%+v", d)
	}
}

func TestGPUTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l, err := New([]*configv1.Budget{{Name: "b", GpuSeconds: 10, Window: durationpb.New(time.Hour)}},
			WithPermits(func(i *interceptors.Inference) int64 { return map[string]int64{"large": 4}[i.Model] }))
		if err != nil {
			t.Fatal(err)
		}
		begin := func() (*interceptors.Inference, interceptors.InferencePolicy) {
			i := infer(caller("a", "p"), "large", 1, 1)
			v, d := start(t, l.Tokens(), i)
			if d != nil {
				t.Fatal(d)
			}
			v.(*reservation).timer.Stop() // there is no chain whose calls it could come between
			return i, v
		}
		i, v := begin()
		time.Sleep(time.Hour / 2) // in the queue for a permit
		i.Hand()
		time.Sleep(1500 * time.Millisecond)
		if err := v.Response(nil); err != nil {
			t.Fatal(err)
		}
		v.End(interceptors.Outcome{})
		if got := only(t, l); got.Spent != 6_000_000 || got.Metric != "gpu_time" {
			t.Errorf("%+v, want 6 s of 4 permits spent", got)
		}
		i, v = begin()
		i.Hand()
		time.Sleep(1001 * time.Millisecond)
		d := denial(t, v.Response(nil))
		if d == nil || d.Reason != interceptors.BudgetCut || d.Metadata["limit"] != "10" || d.Metadata["requested"] != "0.004" {
			t.Fatalf("%+v, want a cut", d)
		}
		v.End(interceptors.Outcome{Err: d})
		if got := only(t, l); got.Remaining != 0 {
			t.Errorf("%+v, want nothing left", got)
		}
		if _, d = start(t, l.Rates(), infer(caller("a", "p"), "large", 1, 1)); d == nil {
			t.Error("an inference began with nothing left")
		}
		atRest(t, l)
	})
}

// What may be used beyond the amount, and what becomes of it in the next window.
func TestBeyondTheAmount(t *testing.T) {
	for _, test := range []struct {
		name      string
		budget    *configv1.Budget
		out       int64 // of an inference that asked for 50 after 50 were spent
		cut       bool
		spent     int64
		begins    bool  // another inference does
		next      int64 // what is left when the window is over
		reported  int64 // beyond what was cut
		afterNext int64
	}{
		{"none", &configv1.Budget{}, 51, true, 100, false, 100, 0, 100},
		{"soft", &configv1.Budget{Soft: true}, 500, false, 550, true, 100, 0, 100},
		{"overdraft", &configv1.Budget{Overdraft: 20}, 70, false, 120, false, 100, 0, 100},
		{"overdraft is used up", &configv1.Budget{Overdraft: 20}, 71, true, 100, false, 100, 0, 100},
		{"debt", &configv1.Budget{Debt: true}, 51, true, 100, false, 99, 0, 100},
		{"debt for what nobody saw", &configv1.Budget{Debt: true}, 51, true, 100, false, 60, 90, 100},
		{"debt beyond a window", &configv1.Budget{Debt: true}, 51, true, 100, false, -20, 170, 80},
		{"overdraft and debt", &configv1.Budget{Overdraft: 20, Debt: true}, 70, false, 120, false, 80, 0, 100},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				b := proto.CloneOf(test.budget)
				b.Name, b.Tokens, b.Window = "b", 100, durationpb.New(time.Minute)
				l := ledger(t, b)
				for _, out := range []int64{50, test.out} {
					i := infer(caller("a", "p"), "m", 0, 50)
					v, d := start(t, l.Tokens(), i)
					if d != nil {
						t.Fatal(d)
					}
					i.Handed, i.OutputTokens = true, out
					if err := v.Response(nil); (err != nil) != (test.cut && out == test.out) {
						t.Fatalf("cut: %v", err)
					}
					if out == test.out {
						i.ReportedOutput = test.reported
					}
					v.End(interceptors.Outcome{})
				}
				if got := only(t, l); got.Spent != test.spent {
					t.Errorf("%+v, want %d spent", got, test.spent)
				}
				if _, d := start(t, l.Rates(), infer(caller("a", "p"), "m", 1, 1)); (d == nil) != test.begins {
					t.Errorf("another inference: %v, want that it begins: %t", d, test.begins)
				}
				time.Sleep(time.Minute)
				if got := only(t, l); got.Remaining != test.next {
					t.Errorf("in the next window: %+v, want %d left", got, test.next)
				}
				time.Sleep(time.Minute)
				if got := only(t, l); got.Remaining != 100 {
					if test.afterNext == 100 {
						t.Errorf("in the window after that: %+v", got)
					} else if got.Remaining != test.afterNext {
						t.Errorf("in the window after that: %+v, want %d", got, test.afterNext)
					}
				}
			})
		})
	}
}

func TestClampReserves(t *testing.T) {
	for _, test := range []struct {
		name    string
		budgets []*configv1.Budget
		max     int64
		want    int64 // output granted; 0: refused
	}{
		{"all fits", []*configv1.Budget{{Tokens: 100, Clamp: true}}, 90, 90},
		{"what is left", []*configv1.Budget{{Tokens: 100, Clamp: true}}, 500, 90},
		{"the least of all", []*configv1.Budget{{Tokens: 100, Clamp: true}, {Tokens: 60, Clamp: true}}, 500, 50},
		{"by weight", []*configv1.Budget{{Tokens: 100, Clamp: true, OutputWeight: proto.Uint32(4)}}, 500, 22},
		{"another that does not clamp has enough", []*configv1.Budget{{Tokens: 100, Clamp: true}, {Tokens: 600}}, 500, 90},
		{"another that does not clamp has too little", []*configv1.Budget{{Tokens: 100, Clamp: true}, {Tokens: 70}}, 500, 0},
		{"not one token", []*configv1.Budget{{Tokens: 10, Clamp: true}}, 500, 0},
	} {
		t.Run(test.name, func(t *testing.T) {
			for n, b := range test.budgets {
				b.Name = fmt.Sprint(n)
			}
			l := ledger(t, test.budgets...)
			i := infer(caller("a", "p"), "m", 10, test.max)
			c, _ := l.Tokens().Begin(i.Call)
			v, err := c.Start(i)
			if d := denial(t, err); (d != nil) != (test.want == 0) {
				t.Fatalf("%v, want %d", d, test.want)
			}
			if test.want == 0 {
				atRest(t, l)
				return
			}
			for _, h := range v.(*reservation).holds {
				if got := h.tariff.affords(usage{input: 10}, h.granted()); got != test.want {
					t.Errorf("%s: output of %d granted, want %d", h.account.limit.name, got, test.want)
				}
			}
		})
	}
}

// The limit in the message is lowered, wherever it can be.
func TestClampSplices(t *testing.T) {
	for _, test := range []struct {
		name, text string
		want       string // "" for nothing
	}{
		{"alone", `{"max_tokens":500}`, `{"max_tokens":90}`},
		{"among others", `{ "stop": ["\"max_tokens\": 5"], "max_tokens" : 500 , "n": 1}`, `{ "stop": ["\"max_tokens\": 5"], "max_tokens" : 90 , "n": 1}`},
		{"for each choice", `{"max_tokens":250,"n":2}`, `{"max_tokens":45,"n":2}`},
		{"deeper", `{"x":{"max_tokens":500}}`, ""},
		{"none", `{"n":1}`, ""},
		{"null", `{"max_tokens":null}`, ""},
		{"broken", `{"max_tokens":500`, `{"max_tokens":90`},
		{"a list", `["max_tokens",500]`, ""},
		{"nothing", ``, ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			share := func(limit int64) []byte { return fmt.Append(nil, max(1, 90/(500/limit))) }
			if got := string(splice([]byte(test.text), share)); got != test.want {
				t.Errorf("got %q, want %q", got, test.want)
			}
		})
	}
	d, err := dialect.Triton(dialect.Options{})
	if err != nil {
		t.Fatal(err)
	}
	method := d.Methods["/inference.GRPCInferenceService/ModelInfer"]
	parameter := func(key string, value []byte) []byte {
		return field(nil, 4, field(field(nil, 1, []byte(key)), 2, value))
	}
	sampling := field(nil, 5, append(field(field(nil, 1, []byte("sampling_parameters")), 2, []byte("BYTES")),
		append(field(nil, 3, []byte{1}), field(nil, 5, field(nil, 8, []byte(`{"max_tokens": 500}`)))...)...))
	for _, test := range []struct {
		name    string
		message []byte
	}{
		{"an integer", parameter("max_tokens", protowire.AppendVarint([]byte{2 << 3}, 500))},
		{"a string", parameter("max_tokens", field(nil, 3, []byte("500")))},
		{"sampling parameters", sampling},
		{"for each of two choices", append(parameter("max_tokens", protowire.AppendVarint([]byte{2 << 3}, 250)),
			parameter("n", protowire.AppendVarint([]byte{2 << 3}, 2))...)},
	} {
		t.Run(test.name, func(t *testing.T) {
			read := func(b []byte) (dialect.Request, *fields.Message) {
				m := new(fields.Message)
				if err := method.Request.Scan(m, mem.BufferSlice{mem.SliceBuffer(b)}); err != nil {
					t.Fatal(err)
				}
				r, err := method.ReadRequest(m)
				if err != nil {
					t.Fatal(err)
				}
				return r, m
			}
			r, m := read(field(test.message, 1, []byte("m")))
			if r.MaxTokens != 500 {
				t.Fatalf("the dialect reads %d", r.MaxTokens)
			}
			clamp(m, r.MaxTokens, 90)
			if again, _ := read(m.Encode().Materialize()); again.MaxTokens != 90 {
				t.Errorf("the model server is asked for %d, want 90", again.MaxTokens)
			}
		})
	}
}

func TestWhatIsLearned(t *testing.T) {
	l := ledger(t, &configv1.Budget{Name: "b", Tokens: 1 << 40})
	if got := l.limits[0].reserve("m"); got != defaultOutput {
		t.Errorf("at first %d, want %d", got, defaultOutput)
	}
	r := rand.New(rand.NewPCG(3, 3))
	for range 3000 {
		i := infer(caller("a", "p"), "m", 1, 0)
		v, d := start(t, l.Tokens(), i)
		if d != nil {
			t.Fatal(d)
		}
		i.Handed, i.OutputTokens = true, r.Int64N(1000)
		v.End(interceptors.Outcome{})
	}
	if got := l.limits[0].reserve("m"); got < 800 || got > 980 {
		t.Errorf("of outputs up to 1000: %d, want about 900", got)
	}
	if got := l.limits[0].reserve("other"); got != defaultOutput {
		t.Errorf("of another model: %d", got)
	}
	for n := range 2 * maxEstimates {
		l.limits[0].learned.learn(fmt.Sprint(n), 5)
	}
	if got := len(*l.limits[0].learned.models.Load()); got != maxEstimates {
		t.Errorf("%d models are remembered, want %d", got, maxEstimates)
	}
}

// While one tenant's account is locked another tenant goes on, even one whose
// account is in the same shard of the table.
func TestTenantsShareNoLock(t *testing.T) {
	l := ledger(t, four(1000)...)
	begin := func(tenant string) {
		i := infer(caller(tenant, "p"), "m", 1, 1)
		v, d := start(t, l.Tokens(), i)
		if d != nil {
			t.Error(d)
			return
		}
		i.Handed = true
		v.End(interceptors.Outcome{})
	}
	l.limits = l.limits[:3] // the account of the trust domain is shared
	begin("a")
	begin("b")
	for n := range l.table.shards {
		l.table.shards[n].mu.Lock()
		defer l.table.shards[n].mu.Unlock()
	}
	var held []*account
	l.table.all(func(a *account) {
		if a.key.tenant == "a" {
			held = append(held, a)
		}
	})
	for _, a := range held {
		a.mu.Lock()
		defer a.mu.Unlock()
	}
	if len(held) != 3 {
		t.Fatalf("%d accounts of tenant a, want 3", len(held))
	}
	begin("b") // deadlocks if it needs any lock of a's, or of the table
}
