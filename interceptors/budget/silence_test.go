package budget

import (
	"context"
	"testing"
	"testing/synctest"
	"time"

	"github.com/sluicegate/sluice/interceptors"
	"github.com/sluicegate/sluice/interceptors/dialect"
	configv1 "github.com/sluicegate/sluice/proto/gen/sluice/config/v1"
)

// silent begins an inference whose model server says nothing.
func silent(t *testing.T, l *Ledger, hand bool) *interceptors.Call {
	t.Helper()
	d, err := dialect.KServe(dialect.Options{})
	if err != nil {
		t.Fatal(err)
	}
	chain := interceptors.New([]*interceptors.Backend{{Name: "b", Dialect: d}}, l.Rates(), l.Tokens())
	call, err := chain.Begin(context.Background(), interceptors.CallInfo{FullMethod: "/inference.GRPCInferenceService/ModelInfer"})
	if err != nil {
		t.Fatal(err)
	}
	request := envelope(field(field(nil, 1, []byte("m")), 5, tensor("one two three")))
	defer request.Release()
	i, err := call.Request(request)
	if err != nil {
		t.Fatal(err)
	}
	if hand {
		i.Hand()
	}
	return call
}

// GPU time that is used up ends an inference although its model server is silent: no
// later than a millisecond after.
func TestSilenceIsCut(t *testing.T) {
	for _, test := range []struct {
		name    string
		budget  *configv1.Budget
		permits int64
		after   time.Duration
	}{
		{"one permit", &configv1.Budget{GpuSeconds: 7}, 1, 7 * time.Second},
		{"two permits", &configv1.Budget{GpuSeconds: 7}, 2, 3500 * time.Millisecond},
		{"less than a top-up", &configv1.Budget{GpuSeconds: 1}, 3, time.Second / 3},
		{"an overdraft", &configv1.Budget{GpuSeconds: 2, Overdraft: 3}, 1, 5 * time.Second},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				test.budget.Name = "b"
				l, err := New([]*configv1.Budget{test.budget}, WithPermits(func(*interceptors.Inference) int64 { return test.permits }))
				if err != nil {
					t.Fatal(err)
				}
				call, began := silent(t, l, true), time.Now()
				<-call.Context().Done()
				took := time.Since(began)
				d := denial(t, context.Cause(call.Context()))
				if d.Reason != interceptors.BudgetCut || took < test.after-time.Millisecond || took > test.after+2*time.Millisecond {
					t.Errorf("%v after %v, want %v", d, took, test.after)
				}
				call.End(d)
				if got := only(t, l); got.Spent > got.Limit+int64(test.budget.GetOverdraft())*1e6 || got.Spent < got.Limit-2000 {
					t.Errorf("%+v", got)
				}
				atRest(t, l)
			})
		})
	}
}

// One that ends in time, or was never handed on, is left alone, and leaves no timer.
func TestSilenceThatEndsInTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := ledger(t, &configv1.Budget{Name: "b", GpuSeconds: 7})
		call := silent(t, l, true)
		time.Sleep(3 * time.Second)
		call.End(nil)
		waits := silent(t, l, false)
		time.Sleep(time.Hour)
		if waits.Context().Err() != nil {
			t.Error("one that waits for its turn was cut")
		}
		waits.End(nil)
		if got := only(t, l).Spent; got != 3_000_000 {
			t.Errorf("%d spent", got)
		}
		atRest(t, l)
	})
}
