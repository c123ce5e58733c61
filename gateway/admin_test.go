package gateway

import (
	"strings"
	"testing"

	adminv1 "github.com/sluicegate/sluice/proto/gen/sluice/admin/v1"
)

const adminBudgets = "budgets: [{name: day, tokens: 100, window: 24h, per: [BUDGET_KEY_TENANT]}]\n"

// The admin API is there if it is asked for, and for whom a rule names it.
func TestAdminAPI(t *testing.T) {
	_, behind := modelServer(t)
	const on = "listener: {address: x, admin_api: true}\n"
	named := strings.Replace(base, "methods: [", "methods: [/sluice.admin.v1.BudgetsService/ListAccounts, /sluice.admin.v1.BudgetsService/Grant, ", 1)
	for name, tc := range map[string]struct{ config, list, reset string }{
		"off":              {base, "Unimplemented METHOD_UNKNOWN", "Unimplemented METHOD_UNKNOWN"},
		"off, with a rule": {named, "Unimplemented METHOD_UNKNOWN", "Unimplemented METHOD_UNKNOWN"},
		"on, without one":  {base + on, "Unauthenticated IDENTITY_MISSING", "Unauthenticated IDENTITY_MISSING"},
		"on, with a rule":  {named + on, "OK", "Unauthenticated IDENTITY_MISSING"},
	} {
		t.Run(name, func(t *testing.T) {
			c := adminv1.NewBudgetsServiceClient(open(t, tc.config+adminBudgets, behind).dial())
			_, err := c.ListAccounts(ctx(t), &adminv1.ListAccountsRequest{})
			expect(t, "ListAccounts", err, tc.list)
			_, err = c.Reset(ctx(t), &adminv1.ResetRequest{Name: &adminv1.AccountName{Budget: "day", Tenant: "anonymous"}})
			expect(t, "Reset", err, tc.reset)
		})
	}
}

// What is granted can be spent at once, and the log says who granted it.
func TestAdminChangesBudgets(t *testing.T) {
	_, behind := modelServer(t)
	const all = "/sluice.admin.v1.BudgetsService/"
	text := strings.Replace(base, "methods: [", "methods: ["+all+"ListAccounts, "+all+"GetAccount, "+all+"Grant, "+all+"Reset, ", 1) +
		"listener: {address: x, admin_api: true}\n"
	g := open(t, text+adminBudgets, behind)
	api := adminv1.NewBudgetsServiceClient(g.dial())
	name := &adminv1.AccountName{Budget: "day", Tenant: "anonymous"}
	infer := func(want string) {
		t.Helper()
		_, err := g.client().ModelInfer(ctx(t), ask("echo", "a", words(60)))
		expect(t, "ModelInfer", err, want)
	}
	infer("ResourceExhausted BUDGET_CUT")
	infer("ResourceExhausted BUDGET_EXHAUSTED")
	granted, err := api.Grant(ctx(t), &adminv1.GrantRequest{Name: name, Amount: 500})
	if err != nil || granted.GetAccount().GetLimit() != 600 || granted.GetAccount().GetGranted() != 500 {
		t.Fatalf("%v, %v", granted, err)
	}
	infer("OK")
	got, err := api.GetAccount(ctx(t), &adminv1.GetAccountRequest{Name: name})
	if a := got.GetAccount(); err != nil || a.GetSpent() != granted.GetAccount().GetSpent()+120 || a.GetWindowEnds() == nil {
		t.Errorf("%v, %v", got, err)
	}
	if _, err := api.Reset(ctx(t), &adminv1.ResetRequest{Name: name}); err != nil {
		t.Error(err)
	}
	list, err := api.ListAccounts(ctx(t), &adminv1.ListAccountsRequest{})
	if err != nil || len(list.GetAccounts()) != 1 || list.GetAccounts()[0].GetRemaining() != 100 {
		t.Errorf("%v, %v", list, err)
	}
	g.Shutdown()
	for _, want := range []string{`"a budget was granted more" amount=500 budget=day`, `"a budget was reset" budget=day`, "peer=127.0.0.1"} {
		if !strings.Contains(g.log.String(), want) {
			t.Errorf("the log has no %s:\n%s", want, g.log)
		}
	}
	if _, err := api.Grant(ctx(t), &adminv1.GrantRequest{}); err == nil {
		t.Error("a gateway that was shut down grants")
	}

	// A reload that takes the budgets away.
	h := open(t, text+adminBudgets, behind)
	if err := h.Reload(parse(t, text, behind)); err != nil {
		t.Fatal(err)
	}
	_, err = adminv1.NewBudgetsServiceClient(h.dial()).GetAccount(ctx(t), &adminv1.GetAccountRequest{Name: name})
	if err == nil || !strings.Contains(err.Error(), "no budgets are configured") {
		t.Errorf("%v", err)
	}
}
