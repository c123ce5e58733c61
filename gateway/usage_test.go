package gateway

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/sluicegate/sluice/proto/gen/inference"
)

// Every inference leaves a record, whose charges are what the budgets charged; a
// reload goes on with the file.
func TestUsageIsWrittenDown(t *testing.T) {
	_, behind := modelServer(t)
	file := filepath.Join(t.TempDir(), "usage.jsonl")
	text := strings.Replace(base, `models: ["*"]`, "models: [echo, words]", 1) + `
usage: {file: ` + file + `}
budgets:
- {name: day, tokens: 60, window: 24h, per: [BUDGET_KEY_TENANT]}
- {name: rate, requests: 100, window: 24h}
- {name: purse, money_micros: 900}
prices: [{model: "*", input_micros_per_million: 500000, output_micros_per_million: 1250000}]
`
	g := open(t, text, behind)
	c := g.client()
	infer := func(model, prompt, want string) {
		t.Helper()
		_, err := c.ModelInfer(ctx(t), ask(model, "a", prompt))
		expect(t, "ModelInfer", err, want)
	}
	infer("echo", words(10), "OK")
	infer("secret", words(1), "PermissionDenied MODEL_DENIED")
	if err := g.Reload(parse(t, strings.Replace(text, "tokens: 60", "tokens: 70", 1), behind)); err != nil {
		t.Fatal(err)
	}
	s, err := c.ModelStreamInfer(ctx(t))
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range []*inference.ModelInferRequest{ask("words", "a", words(2), number("max_tokens", 4)), ask("words", "b", words(3), number("max_tokens", 4))} {
		if err := s.Send(r); err != nil {
			t.Fatal(err)
		}
	}
	_ = s.CloseSend()
	if _, err := drainStream(s); err != nil {
		t.Fatal(err)
	}
	infer("echo", words(40), "ResourceExhausted BUDGET_CUT")
	infer("echo", words(80), "ResourceExhausted BUDGET_EXHAUSTED")
	g.idle()
	spent := make(map[string]int64)
	for _, a := range g.Guard().Budgets().Snapshot() {
		spent[a.Budget] = a.Spent
	}
	g.Shutdown()

	out, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	charged, outcomes := make(map[string]float64), ""
	for line := range strings.Lines(string(out)) {
		var r struct {
			Model, Tenant, Outcome, Reason, Backend string
			Input                                   int64 `json:"input_tokens"`
			Charges                                 []struct {
				Budget, Unit string
				Amount       float64
			}
		}
		if err := json.Unmarshal([]byte(line), &r); err != nil {
			t.Fatalf("%v: %s", err, line)
		}
		outcomes += r.Outcome + ":" + r.Reason + " "
		if r.Tenant != "anonymous" || strings.Contains(line, "word word") {
			t.Errorf("%s", line)
		}
		for _, c := range r.Charges {
			charged[c.Budget] += c.Amount
		}
	}
	if outcomes != "served: refused:MODEL_DENIED served: served: cut:BUDGET_CUT refused:BUDGET_EXHAUSTED " {
		t.Errorf("outcomes %q", outcomes)
	}
	charged["day"] -= 20 // before the reload, in an account that is no more
	if charged["day"] != float64(spent["day"]) || charged["rate"] != float64(spent["rate"]) || int64(charged["purse"]*1e9+0.5) != spent["purse"] {
		t.Errorf("records say %v, accounts %v", charged, spent)
	}
}

func TestUsageThatCannotBeWritten(t *testing.T) {
	_, behind := modelServer(t)
	g := open(t, base, behind)
	err := g.Reload(parse(t, base+"usage: {file: /none/usage.jsonl}\n", behind))
	if err == nil || !strings.HasPrefix(err.Error(), "usage.file: open /none/usage.jsonl") {
		t.Errorf("%v", err)
	}
}
