package main

import (
	"encoding/json"
	"path/filepath"
	"strings"
	"testing"
)

const exampleTests = "../../../examples/gateway/authz.yaml"

func TestAuthzExample(t *testing.T) {
	rc, out, errs := said("", "authz", "test", exampleTests)
	if rc != 0 || errs != "" || !strings.HasSuffix(out, "\n8 case(s), 0 failed\n") {
		t.Errorf("exit status %d, %q, %q", rc, out, errs)
	}
	if want := "ok    " + exampleTests + ":4:5: a team of acme may use the language model, and acme pays\n"; !strings.HasPrefix(out, want) {
		t.Errorf("%q does not begin with %q", out, want)
	}
}

// authzConfig has rules of every kind, and what a gateway serves itself.
const authzConfig = `listener: {address: "127.0.0.1:0", reflection: true}
identity:
  development: {}
  tenant: "{1}"
  rules:
  - name: words
    principals: ["spiffe://sluice.dev/team/*"]
    methods: [inference, health]
    models: [words]
    when: '!("max_tokens" in parameters) || parameters["max_tokens"] <= 256'
  - principals: ["spiffe://sluice.dev/team/eve"]
    methods: [inference]
    deny: true
    when: '"x-debug" in metadata && time.getFullYear() < 2030'
  - principals: ["spiffe://sluice.dev/ops"]
    methods: [/grpc.reflection.v1.ServerReflection/ServerReflectionInfo, inference]
    models: ["*"]
backends:
- {name: model, address: "127.0.0.1:1", dialect: DIALECT_TRITON, models: [words]}
`

const infer = "/inference.GRPCInferenceService/ModelInfer"

func TestAuthzExplain(t *testing.T) {
	file := filepath.Join(t.TempDir(), "sluice.yaml")
	write(t, file, authzConfig)
	for _, c := range []struct {
		name string
		args []string
		rc   int
		want []string
	}{
		{"allowed", []string{"--principal", "spiffe://sluice.dev/team/amy", "--method", infer, "--model", "words", "--parameter", "max_tokens=256"}, 0,
			[]string{"ALLOW: a rule allows it\n", "principal spiffe://sluice.dev/team/amy, tenant team\n",
				"by " + file + `:6:5 identity.rules[0] "words"` + "\n", file + ":11:5 identity.rules[1] (denies): the principal is another\n"}},
		{"too much", []string{"--principal", "spiffe://sluice.dev/team/amy", "--method", infer, "--model", "words", "--parameter", "max_tokens=257"}, 1,
			[]string{"DENY MODEL_DENIED: ", `identity.rules[0] "words": the condition is false` + "\n"}},
		{"text is no number", []string{"--principal", "spiffe://sluice.dev/team/amy", "--method", infer, "--model", "words", "--parameter", `max_tokens="5"`}, 1,
			[]string{"DENY MODEL_DENIED: ", "the condition cannot be decided: no such overload"}},
		{"denied", []string{"--principal", "spiffe://sluice.dev/team/eve", "--method", infer, "--model", "words", "--metadata", "x-debug=1",
			"--time", "2029-12-31T23:59:59Z"}, 1, []string{"DENY METHOD_DENIED: a rule denies the method\n", "by " + file + ":11:5 identity.rules[1] (denies)\n",
			`identity.rules[0] "words": it matches too`}},
		{"not denied any more", []string{"--principal", "spiffe://sluice.dev/team/eve", "--method", infer, "--model", "words", "--metadata", "x-debug=1",
			"--time", "2030-01-01T00:00:00Z"}, 0, []string{"ALLOW"}},
		{"reflection", []string{"--principal", "spiffe://sluice.dev/ops", "--method", "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo"}, 0, []string{"ALLOW"}},
		{"no back end", []string{"--principal", "spiffe://sluice.dev/ops", "--method", infer, "--model", "none"}, 1,
			[]string{"DENY MODEL_DENIED: no back end serves the model\n"}},
		{"no method", []string{"--principal", "spiffe://sluice.dev/ops", "--method", "/a.B/C"}, 1, []string{"DENY METHOD_UNKNOWN: no back end has the method\n"}},
		{"nobody", []string{"--principal", "anonymous", "--method", infer}, 1, []string{"DENY IDENTITY_MISSING: every caller needs an identity\n"}},
		{"bad principal", []string{"--principal", "amy", "--method", infer}, 2, []string{"sluice authz explain: --principal: "}},
		{"bad time", []string{"--principal", "anonymous", "--method", infer, "--time", "noon"}, 2, []string{`--time: "noon" is no time such as `}},
		{"bad parameter", []string{"--parameter", "x"}, 2, []string{"want NAME=VALUE"}},
		{"too little", nil, 2, []string{"--config, --principal and --method are needed"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			rc, out, errs := said("", append([]string{"authz", "explain", "--config", file}, c.args...)...)
			if rc != c.rc {
				t.Errorf("exit status %d, want %d", rc, c.rc)
			}
			for _, want := range c.want {
				if !strings.Contains(out+errs, want) {
					t.Errorf("%q lacks %q", out+errs, want)
				}
			}
		})
	}
}

func TestAuthzExplainJSON(t *testing.T) {
	file := filepath.Join(t.TempDir(), "sluice.yaml")
	write(t, file, authzConfig)
	_, out, _ := said("", "authz", "explain", "--json", "--config", file, "--principal", "spiffe://sluice.dev/ops", "--method", infer, "--model", "words")
	var got struct {
		Allowed bool
		Rule    int
		Tenant  string
		Rules   []struct{ At, Why string }
	}
	if err := json.Unmarshal([]byte(out), &got); err != nil {
		t.Fatal(err)
	}
	if !got.Allowed || got.Rule != 2 || got.Tenant != "ops" || len(got.Rules) != 3 || got.Rules[1].At != file+":11:5" || got.Rules[1].Why == "" {
		t.Errorf("%+v", got)
	}
}

func TestAuthzTest(t *testing.T) {
	dir := t.TempDir()
	write(t, filepath.Join(dir, "sluice.yaml"), authzConfig)
	file := filepath.Join(dir, "authz.yaml")
	const one = `config: sluice.yaml
cases:
- name: amy
  principal: spiffe://sluice.dev/team/amy
  method: /inference.GRPCInferenceService/ModelInfer
  model: words
  parameters: {max_tokens: 256}
  metadata: {x-debug: "1"}
  time: 2026-01-01T00:00:00Z
  want: ALLOW
  want_tenant: team
`
	for _, c := range []struct {
		name, old, new string
		rc             int
		want           string
	}{
		{"good", "", "", 0, "ok    FILE:3:3: amy\n1 case(s), 0 failed\n"},
		{"allowed, not denied", "ALLOW", "DENY", 1, "FAIL  FILE:3:3: amy: got ALLOW (a rule allows it by identity.rules[0]), want DENY\n1 case(s), 1 failed\n"},
		{"denied, not allowed", "256", "256.5", 1, "FAIL  FILE:3:3: amy: got DENY MODEL_DENIED (no rule allows it, though one allows the method), want ALLOW\n"},
		{"another reason", "model: words", "model: none", 1, "FAIL  FILE:3:3: amy: got DENY MODEL_DENIED"},
		{"another tenant", "want_tenant: team", "want_tenant: t", 1, `FAIL  FILE:3:3: amy: got tenant "team", want "t"`},
		{"unknown field", "want_tenant", "want_tenants", 1, "sluice authz test: FILE:11:3 unknown field"},
		{"bad want", "ALLOW", "allow", 1, "sluice authz test: FILE:10:"},
		{"reason of what is allowed", "want_tenant: team", "want_reason: MODEL_DENIED", 1, "sluice authz test: FILE:3:"},
		{"unknown reason", "want: ALLOW\n  want_tenant: team", "want: DENY\n  want_reason: MODEL_MISSING", 1, "sluice authz test: FILE:11:"},
		{"bad principal", "spiffe://sluice.dev/team/amy", "amy", 1, "sluice authz test: FILE:4:14 cases[0].principal: "},
		{"a parameter that is none", "{max_tokens: 256}", "{max_tokens: [1]}", 1, "sluice authz test: FILE:7:"},
		{"no configuration", "sluice.yaml", "none.yaml", 1, "sluice authz test: open "},
	} {
		t.Run(c.name, func(t *testing.T) {
			write(t, file, strings.Replace(one, c.old, c.new, 1))
			rc, out, errs := said("", "authz", "test", file)
			if got := strings.ReplaceAll(out+errs, file, "FILE"); rc != c.rc || !strings.HasPrefix(got, c.want) {
				t.Errorf("exit status %d, %q; want %d, %q", rc, got, c.rc, c.want)
			}
		})
	}
	write(t, file, one)
	_, out, _ := said("", "authz", "test", "--json", file)
	var got outcome
	if err := json.Unmarshal([]byte(out), &got); err != nil || !got.OK || !got.Allow || got.Tenant != "team" || got.Name != "amy" {
		t.Errorf("%q: %+v, %v", out, got, err)
	}
	for _, args := range [][]string{{"authz"}, {"authz", "tests"}, {"authz", "test"}} {
		if rc, _, errs := said("", args...); rc != 2 || !strings.HasPrefix(errs, "sluice authz") {
			t.Errorf("%v: exit status %d, %q", args, rc, errs)
		}
	}
}
