package budget

import (
	"errors"
	"os"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"go.uber.org/goleak"

	"github.com/sluicegate/sluice/interceptors"
	"github.com/sluicegate/sluice/interceptors/dialect"
	configv1 "github.com/sluicegate/sluice/proto/gen/sluice/config/v1"
)

func TestMain(m *testing.M) {
	if file := os.Getenv(crashFile); file != "" {
		os.Exit(spendUntilKilled(file))
	}
	goleak.VerifyTestMain(m)
}

const (
	perTrustDomain = configv1.BudgetKey_BUDGET_KEY_TRUST_DOMAIN
	perTenant      = configv1.BudgetKey_BUDGET_KEY_TENANT
	perPrincipal   = configv1.BudgetKey_BUDGET_KEY_PRINCIPAL
	perModel       = configv1.BudgetKey_BUDGET_KEY_MODEL
)

func ledger(t testing.TB, budgets ...*configv1.Budget) *Ledger {
	t.Helper()
	l, err := New(budgets)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// caller is a call by a principal of a tenant of the trust domain "example.org".
func caller(tenant, principal string) *interceptors.Call {
	return &interceptors.Call{
		ID:        spiffeid.RequireFromString("spiffe://example.org/" + principal),
		Method:    &dialect.Method{Kind: dialect.Inference},
		Principal: principal,
		Tenant:    tenant,
	}
}

func infer(c *interceptors.Call, model string, input, output int64) *interceptors.Inference {
	return &interceptors.Inference{Call: c, Model: model, InputTokens: input, MaxOutputTokens: output}
}

// start begins an inference with a policy, as the chain does.
func start(t testing.TB, p interceptors.Policy, i *interceptors.Inference) (interceptors.InferencePolicy, *interceptors.Denial) {
	t.Helper()
	c, err := p.Begin(i.Call)
	if err != nil {
		t.Fatalf("Begin refused: %v", err)
	}
	if c == nil {
		return nil, nil
	}
	v, err := c.Start(i)
	if err == nil && v != nil {
		err = v.Request(nil)
	}
	return v, denial(t, err)
}

func denial(t testing.TB, err error) *interceptors.Denial {
	t.Helper()
	if err == nil {
		return nil
	}
	var d *interceptors.Denial
	if !errors.As(err, &d) {
		t.Fatalf("error is no denial: %v", err)
	}
	return d
}

// only is the state of the only account.
func only(t testing.TB, l *Ledger) Account {
	t.Helper()
	all := l.Snapshot()
	if len(all) != 1 {
		t.Fatalf("there are %d accounts, want 1: %+v", len(all), all)
	}
	return all[0]
}

// atRest fails if a reservation is left.
func atRest(t testing.TB, l *Ledger) {
	t.Helper()
	for _, a := range l.Snapshot() {
		if a.Reserved != 0 || a.Carried != 0 {
			t.Errorf("left behind: %+v", a)
		}
	}
	l.table.all(func(a *account) {
		if l.shared != nil { // a share may still be on its way
			within(t, 10*time.Second, "shares to arrive", func() bool { return a.pins.Load() == 1 })
		}
		if pins := a.pins.Load(); pins != 1 { // ours
			t.Errorf("%+v has %d pins left", a.key, pins-1)
		}
	})
}
