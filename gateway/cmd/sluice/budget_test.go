package main

import (
	"encoding/json"
	"math"
	"path/filepath"
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"

	"github.com/sluicegate/sluice/interceptors/identity"
	"github.com/sluicegate/sluice/proto/gen/inference"
	configv1 "github.com/sluicegate/sluice/proto/gen/sluice/config/v1"
)

// An operator sees and changes the budgets of a real gateway, as whom a rule allows;
// nobody else does, and no other server is spoken to.
func TestBudget(t *testing.T) {
	dir := t.TempDir()
	if rc, _, errs := said("", "issue", "--directory", dir, "/gateway", "/alice", "/ops", "/auditor"); rc != 0 {
		t.Fatal(errs)
	}
	const api = "/sluice.admin.v1.BudgetsService/"
	text := strings.Replace(`
listener: {address: "127.0.0.1:0", admin_api: true}
identity:
  files: {certificate: gateway.pem, key: gateway-key.pem, bundle: bundle.pem}
  tenant: "{1}"
  rules:
  - {principals: [spiffe://sluice.dev/alice], methods: [inference], models: [echo]}
  - principals: [spiffe://sluice.dev/ops, spiffe://sluice.dev/gateway]
    methods: [API/ListAccounts, API/GetAccount, API/Grant, API/Reset]
  - {principals: [spiffe://sluice.dev/auditor], methods: [API/ListAccounts]}
backends: [{name: model, dialect: DIALECT_TRITON, address: "`+words(t)+`", plaintext: true}]
budgets:
- {name: day, tokens: 100, window: 24h, per: [BUDGET_KEY_TENANT]}
- {name: purse, money_micros: 2000000, per: [BUDGET_KEY_PRINCIPAL, BUDGET_KEY_MODEL]}
prices: [{model: "*", input_micros_per_million: 150000, output_micros_per_million: 600000}]
admin: {address: "127.0.0.1:0"}
`, "API/", api, 1)
	text = strings.ReplaceAll(text, "API/", api)
	s := inProcess(t, write(t, filepath.Join(dir, "sluice.yaml"), text))

	id := func(name string) []string {
		return []string{"--certificate", filepath.Join(dir, name+".pem"), "--key", filepath.Join(dir, name+"-key.pem"), "--bundle", filepath.Join(dir, "bundle.pem")}
	}
	budget := func(who, verb string, args ...string) (int, string, string) {
		t.Helper()
		all := append([]string{"budget", verb, "--address", s.address}, id(who)...)
		return said("", append(all, args...)...)
	}
	infer := func(want string) {
		t.Helper()
		source, err := identity.Open(t.Context(), &configv1.Identity{Source: &configv1.Identity_Files{Files: &configv1.IdentityFiles{
			Certificate: filepath.Join(dir, "alice.pem"), Key: filepath.Join(dir, "alice-key.pem"), Bundle: filepath.Join(dir, "bundle.pem")}}}, nil)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = source.Close() }()
		conn, err := grpc.NewClient(s.address, grpc.WithTransportCredentials(identity.ClientCredentials(source,
			spiffeid.MatchID(spiffeid.RequireFromString("spiffe://sluice.dev/gateway")), nil)))
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = conn.Close() }()
		_, err = inference.NewGRPCInferenceServiceClient(conn).ModelInfer(t.Context(), prompt("echo", strings.Repeat("word ", 45)))
		if reasonOf(err) != want || (err != nil) != (want != "") {
			t.Errorf("%v, want %q", err, want)
		}
	}

	if rc, out, errs := budget("ops", "list"); rc != 0 || !strings.HasPrefix(out, "no account has been used") {
		t.Errorf("%d %q %q", rc, out, errs)
	}
	infer("")
	infer("BUDGET_EXHAUSTED")
	rc, out, errs := budget("auditor", "list")
	lines := strings.Split(out, "\n")
	if rc != 0 || len(lines) != 4 || !strings.HasPrefix(lines[0], "BUDGET ") ||
		strings.Join(strings.Fields(lines[1])[:8], " ") != "day tenant=alice tokens 10 100 90 0 0" ||
		strings.Join(strings.Fields(lines[2])[:6], " ") != "purse principal=spiffe://sluice.dev/alice,model=echo money 1.99996625 2 0.00003375" {
		t.Errorf("%d %s%s", rc, out, errs)
	}
	rc, out, errs = budget("ops", "grant", "--budget", "day", "--tenant", "alice", "--amount", "1000", "--json", "--server-id", "spiffe://sluice.dev/gateway")
	var account map[string]any
	if err := json.Unmarshal([]byte(out), &account); rc != 0 || err != nil || account["limit"] != 1100.0 || account["granted"] != 1000.0 {
		t.Errorf("%d %v %s%s", rc, err, out, errs)
	}
	infer("")
	who := []string{"--budget", "purse", "--principal", "spiffe://sluice.dev/alice", "--model", "echo"}
	if rc, out, errs = budget("ops", "grant", append(who, "--amount", "2.50", "--json")...); rc != 0 || !strings.Contains(out, `"limit":4.5,`) {
		t.Errorf("%d %s%s", rc, out, errs)
	}
	if rc, out, errs = budget("ops", "reset", append(who, "--json")...); rc != 0 || !strings.Contains(out, `"remaining":2,`) {
		t.Errorf("%d %s%s", rc, out, errs)
	}
	// As the gateway itself, whose configuration says who that is.
	if rc, out, errs := said("", "budget", "show", "--config", s.file, "--address", s.address, "--budget", "day", "--tenant", "alice"); rc != 0 ||
		!strings.Contains(out, "tenant=alice  tokens  920   1100") {
		t.Errorf("%d %s%s", rc, out, errs)
	}

	key := id("ops")
	for name, tc := range map[string]struct {
		rc   int
		args []string
		errs string
	}{
		"nobody has the right":    {1, append([]string{"budget", "list", "--address", s.address}, id("alice")...), "METHOD_DENIED"},
		"the right to look":       {1, append([]string{"budget", "grant", "--address", s.address, "--budget", "day", "--tenant", "alice", "--amount", "1"}, id("auditor")...), "METHOD_DENIED"},
		"another server":          {1, append([]string{"budget", "list", "--address", s.address, "--server-id", "spiffe://sluice.dev/ops"}, key...), "spiffe://sluice.dev/gateway"},
		"no such budget":          {1, append([]string{"budget", "show", "--address", s.address, "--budget", "night"}, key...), `there is no budget "night"`},
		"no such account":         {1, append([]string{"budget", "reset", "--address", s.address, "--budget", "day"}, key...), "tenant: budget"},
		"half a token":            {1, append([]string{"budget", "grant", "--address", s.address, "--budget", "day", "--tenant", "a", "--amount", "0.5"}, key...), "more than 0 decimal"},
		"nobody listens":          {1, append([]string{"budget", "list", "--address", "127.0.0.1:1"}, key...), "refused"},
		"no identity":             {2, []string{"budget", "list", "--address", s.address}, "say who we are"},
		"two identities":          {2, append([]string{"budget", "list", "--address", s.address, "--workload-api", "unix:///x"}, key...), "say who we are"},
		"half an identity":        {2, append([]string{"budget", "list", "--address", s.address}, key[:4]...), "go together"},
		"no address":              {2, append([]string{"budget", "list"}, key...), "--address is missing"},
		"no budget":               {2, append([]string{"budget", "show", "--address", s.address}, key...), "--budget is missing"},
		"no amount":               {2, append([]string{"budget", "grant", "--address", s.address, "--budget", "day"}, key...), "--amount is missing"},
		"a bad amount":            {2, append([]string{"budget", "grant", "--address", s.address, "--budget", "day", "--amount", "-1"}, key...), "no number above 0"},
		"a bad pattern":           {1, append([]string{"budget", "list", "--address", s.address, "--server-id", "gateway"}, key...), "--server-id: "},
		"no verb":                 {2, []string{"budget"}, "say what"},
		"no such verb":            {2, []string{"budget", "burn"}, `there is no "burn"`},
		"a file that is not here": {1, []string{"budget", "list", "--config", filepath.Join(dir, "none.yaml")}, "none.yaml"},
		"an identity that lives in the gateway": {1, []string{"budget", "list", "--config", write(t, filepath.Join(dir, "development.yaml"),
			"listener: {address: x}\nidentity: {development: {}}\nbackends: [{name: m, dialect: DIALECT_TRITON, address: x}]\n")}, "inside the gateway's process"},
	} {
		t.Run(name, func(t *testing.T) {
			rc, out, errs := said("", tc.args...)
			if rc != tc.rc || out != "" || !strings.Contains(errs, tc.errs) {
				t.Errorf("%d %q %q, want %d and %q", rc, out, errs, tc.rc, tc.errs)
			}
		})
	}
	s.log.await(t, "a budget was granted more", `"amount":1000`, `"tenant":"alice"`, "spiffe://sluice.dev/ops")
}

// Amounts are read and shown exactly.
func TestAmounts(t *testing.T) {
	for text, want := range map[string]int64{
		"1": 1_000_000, "2.5": 2_500_000, "0.000001": 1, "1.": 1_000_000, "9223372036854.775807": math.MaxInt64,
		"9223372036854.775808": 0, "0.0000001": 0, "0": 0, "": 0, ".5": 0, "-1": 0, "+1": 0, "1e3": 0, "1.2.3": 0, "one": 0,
	} {
		if n, err := units(text, 6); n != want || (err == nil) != (want > 0) {
			t.Errorf("%q is %d, %v; want %d", text, n, err, want)
		}
	}
	for n, want := range map[int64]string{0: "0", 1: "0.000001", -1: "-0.000001", 1_500_000: "1.5", 20_000_000: "20", math.MinInt64: "-9223372036854.775808"} {
		if got := decimal(n, 6); got != want {
			t.Errorf("%d is shown as %s, want %s", n, got, want)
		}
	}
	if got := decimal(100, 0); got != "100" {
		t.Errorf("100 tokens are shown as %s", got)
	}
}

// Names of strangers cannot forge lines of the table.
func TestNamesAreShownSafely(t *testing.T) {
	l := accountLine{Tenant: "a\n\x1b[2Jday  everyone", Model: "m"}
	if got := l.of(); got != `tenant="a\n\x1b[2Jday  everyone",model=m` {
		t.Errorf("%s", got)
	}
}
