package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"math"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/status"

	adminv1 "github.com/sluicegate/sluice/proto/gen/sluice/admin/v1"
)

// budgetCommand sees and changes the budgets of a running gateway.
func budgetCommand(args []string, stdout, stderr io.Writer) int {
	const name = "budget"
	if len(args) == 0 {
		return usageError(stderr, name, "say what: list, show, grant or reset")
	}
	verb := args[0]
	switch verb {
	case "list", "show", "grant", "reset":
	case "help", "--help", "-h", "-help":
		for _, v := range []string{"list", "show", "grant", "reset"} {
			newBudget(v, stderr).flags.Usage()
		}
		return 0
	default:
		return usageError(stderr, name, "there is no %q; there are list, show, grant and reset", verb)
	}
	b := newBudget(verb, stderr)
	if code, ok := parse(b.flags, args[1:], 0); !ok {
		return code
	}
	if wrong := b.wrong(); wrong != "" {
		return usageError(stderr, name+" "+verb, "%s", wrong)
	}
	if err := b.run(stdout); err != nil {
		if s, ok := status.FromError(err); ok {
			err = errors.New(s.Message())
		}
		return fail(stderr, name+" "+verb, err)
	}
	return 0
}

// budgetFlags are the flags of "budget".
type budgetFlags struct {
	verb  string
	flags *flag.FlagSet
	adminFlags

	account adminv1.AccountName
	amount  string
}

var budgetTexts = map[string][2]string{
	"list": {"", "Lists the accounts of budgets of a running gateway that have been used; names choose among them."},
	"show": {"--budget NAME", "Shows one account of a budget of a running gateway."},
	"grant": {"--budget NAME --amount N", "Adds an amount to the present window of one account of a budget of a running gateway.\n" +
		"It asks for the account first, so it takes the right to GetAccount too."},
	"reset": {"--budget NAME", "Makes one account of a budget of a running gateway full again. What was spent is forgotten; what inferences hold\n" +
		"stays theirs, and is charged when they end."},
}

func newBudget(verb string, stderr io.Writer) *budgetFlags {
	b := &budgetFlags{verb: verb}
	text := budgetTexts[verb]
	f := newFlags("budget "+verb, space(text[0])+adminSynopsis,
		stderr, text[1]+"\nThe gateway must have listener.admin_api, and a rule that names the method: /sluice.admin.v1.BudgetsService/"+
			budgetMethods[verb]+".\nAmounts are tokens, requests, the currency of the prices, or seconds of one permit. Exit status: 0 done, 1 failed, 2 wrong usage.")
	b.flags = f
	b.add(f)
	f.StringVar(&b.account.Budget, "budget", "", "name of the budget")
	f.StringVar(&b.account.TrustDomain, "trust-domain", "", "whose account, where the budget tells them apart")
	f.StringVar(&b.account.Tenant, "tenant", "", "whose account")
	f.StringVar(&b.account.Principal, "principal", "", "whose account: a SPIFFE ID")
	f.StringVar(&b.account.Model, "model", "", "of which model")
	f.StringVar(&b.account.Key, "own-key", "", "what the budget's own key gives")
	if verb == "grant" {
		f.StringVar(&b.amount, "amount", "", "how much more, such as 5000 or 2.50")
	}
	return b
}

var budgetMethods = map[string]string{"list": "ListAccounts", "show": "GetAccount", "grant": "Grant", "reset": "Reset"}

// wrong says what is wrong with the flags; "" if nothing is.
func (b *budgetFlags) wrong() string {
	if wrong := b.adminFlags.wrong(); wrong != "" {
		return wrong
	}
	switch {
	case b.verb != "list" && b.account.GetBudget() == "":
		return "--budget is missing"
	case b.verb == "grant" && b.amount == "":
		return "--amount is missing"
	case b.verb == "grant":
		if _, err := units(b.amount, 9); err != nil {
			return "--amount: " + err.Error()
		}
	}
	return ""
}

func (b *budgetFlags) run(stdout io.Writer) error {
	return b.with(func(ctx context.Context, conn grpc.ClientConnInterface) error {
		return b.do(ctx, adminv1.NewBudgetsServiceClient(conn), stdout)
	})
}

func (b *budgetFlags) do(ctx context.Context, api adminv1.BudgetsServiceClient, stdout io.Writer) (err error) {
	var account *adminv1.Account
	switch b.verb {
	case "list":
		return b.list(ctx, api, stdout)
	case "show":
		var r *adminv1.GetAccountResponse
		r, err = api.GetAccount(ctx, &adminv1.GetAccountRequest{Name: &b.account})
		account = r.GetAccount()
	case "grant":
		account, err = b.grant(ctx, api)
	case "reset":
		var r *adminv1.ResetResponse
		r, err = api.Reset(ctx, &adminv1.ResetRequest{Name: &b.account})
		account = r.GetAccount()
	}
	if err != nil {
		return err
	}
	return b.print(stdout, []*adminv1.Account{account})
}

func (b *budgetFlags) grant(ctx context.Context, api adminv1.BudgetsServiceClient) (*adminv1.Account, error) {
	before, err := api.GetAccount(ctx, &adminv1.GetAccountRequest{Name: &b.account})
	if err != nil {
		return nil, err
	}
	amount, err := units(b.amount, decimals(before.GetAccount().GetMetric()))
	if err != nil {
		return nil, fmt.Errorf("--amount: %w", err)
	}
	r, err := api.Grant(ctx, &adminv1.GrantRequest{Name: &b.account, Amount: amount})
	return r.GetAccount(), err
}

func (b *budgetFlags) list(ctx context.Context, api adminv1.BudgetsServiceClient, stdout io.Writer) error {
	var all []*adminv1.Account
	for token := ""; ; {
		r, err := api.ListAccounts(ctx, &adminv1.ListAccountsRequest{Filter: &b.account, PageSize: 1000, PageToken: token})
		if err != nil {
			return err
		}
		if all = append(all, r.GetAccounts()...); r.GetNextPageToken() == "" {
			return b.print(stdout, all)
		}
		token = r.GetNextPageToken()
	}
}

// decimals are the decimal places in which people read what a metric counts.
func decimals(m adminv1.Metric) int {
	switch m {
	case adminv1.Metric_METRIC_MONEY:
		return 9
	case adminv1.Metric_METRIC_GPU_TIME:
		return 6
	}
	return 0
}

// units is a decimal number in the smallest units.
func units(text string, places int) (int64, error) {
	whole, part, _ := strings.Cut(text, ".")
	part = strings.TrimRight(part, "0")
	if len(part) > places {
		return 0, fmt.Errorf("%q has more than %d decimal places", text, places)
	}
	n, err := strconv.ParseUint(whole+part+strings.Repeat("0", places-len(part)), 10, 64)
	switch {
	case errors.Is(err, strconv.ErrRange) || err == nil && n > math.MaxInt64:
		return 0, fmt.Errorf("%q is more than can be counted", text)
	case err != nil || whole == "" || n == 0:
		return 0, fmt.Errorf("%q is no number above 0", text)
	}
	return int64(n), nil
}

// decimal is a number of the smallest units, for people.
func decimal(n int64, places int) string {
	s := strconv.FormatInt(n, 10)
	if places == 0 {
		return s
	}
	sign := ""
	if s[0] == '-' {
		sign, s = "-", s[1:]
	}
	if len(s) <= places {
		s = strings.Repeat("0", places-len(s)+1) + s
	}
	return strings.TrimRight(strings.TrimRight(sign+s[:len(s)-places]+"."+s[len(s)-places:], "0"), ".")
}

// accountLine is an account as JSON. Amounts are as people read them.
type accountLine struct {
	Budget      string      `json:"budget"`
	TrustDomain string      `json:"trust_domain,omitempty"`
	Tenant      string      `json:"tenant,omitempty"`
	Principal   string      `json:"principal,omitempty"`
	Model       string      `json:"model,omitempty"`
	Key         string      `json:"key,omitempty"`
	Metric      string      `json:"metric"`
	Limit       json.Number `json:"limit"`
	Remaining   json.Number `json:"remaining"`
	Reserved    json.Number `json:"reserved"`
	Spent       json.Number `json:"spent"`
	Granted     json.Number `json:"granted"`
	Carried     json.Number `json:"carried"`
	Owed        json.Number `json:"owed"`
	WindowEnds  *time.Time  `json:"window_ends,omitempty"`
	SharedLeft  json.Number `json:"shared_left,omitempty"`
}

func lineOf(a *adminv1.Account) accountLine {
	show := func(n int64) json.Number { return json.Number(decimal(n, decimals(a.GetMetric()))) }
	n := a.GetName()
	out := accountLine{
		Budget: n.GetBudget(), TrustDomain: n.GetTrustDomain(), Tenant: n.GetTenant(), Principal: n.GetPrincipal(), Model: n.GetModel(), Key: n.GetKey(),
		Metric: strings.ToLower(strings.TrimPrefix(a.GetMetric().String(), "METRIC_")),
		Limit:  show(a.GetLimit()), Remaining: show(a.GetRemaining()), Reserved: show(a.GetReserved()), Spent: show(a.GetSpent()),
		Granted: show(a.GetGranted()), Carried: show(a.GetCarried()), Owed: show(a.GetOwed()),
	}
	if a.GetWindowEnds() != nil {
		t := a.GetWindowEnds().AsTime()
		out.WindowEnds = &t
	}
	if a.GetShared() {
		out.SharedLeft = show(a.GetSharedLeft())
	}
	return out
}

func (b *budgetFlags) print(w io.Writer, accounts []*adminv1.Account) error {
	if b.json {
		for _, a := range accounts {
			if err := json.NewEncoder(w).Encode(lineOf(a)); err != nil {
				return err
			}
		}
		return nil
	}
	if len(accounts) == 0 {
		_, err := fmt.Fprintln(w, "no account has been used: all are full")
		return err
	}
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "BUDGET\tOF\tMETRIC\tLEFT\tLIMIT\tSPENT\tRESERVED\tGRANTED\tOWED\tWINDOW ENDS\tNOT TAKEN")
	for _, a := range accounts {
		l := lineOf(a)
		ends, shared := "-", "-"
		if l.WindowEnds != nil {
			ends = l.WindowEnds.Format(time.RFC3339)
		}
		if l.SharedLeft != "" {
			shared = l.SharedLeft.String()
		}
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\n",
			l.Budget, l.of(), l.Metric, l.Remaining, l.Limit, l.Spent, l.Reserved, l.Granted, l.Owed, ends, shared)
	}
	return t.Flush()
}

// of says whose account it is. The names may be a stranger's choice.
func (l *accountLine) of() string {
	var parts []string
	for _, p := range [][2]string{{"trust_domain", l.TrustDomain}, {"tenant", l.Tenant}, {"principal", l.Principal}, {"model", l.Model}, {"key", l.Key}} {
		if p[1] == "" {
			continue
		}
		if q := strconv.Quote(p[1]); q != `"`+p[1]+`"` || strings.Contains(p[1], " ") {
			p[1] = q
		}
		parts = append(parts, p[0]+"="+p[1])
	}
	if parts == nil {
		return "everyone"
	}
	return strings.Join(parts, ",")
}
