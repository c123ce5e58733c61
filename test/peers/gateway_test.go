//go:build linux

package peers

import (
	"bytes"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/sluicegate/sluice/gateway"
	"github.com/sluicegate/sluice/interceptors/config"
)

// dialects are the servers' names in a configuration.
var dialects = map[string]string{
	"triton":   "DIALECT_TRITON",
	"mlserver": "DIALECT_MLSERVER",
	"kserve":   "DIALECT_KSERVE",
	"tgis":     "DIALECT_TGIS",
	"vllm":     "DIALECT_VLLM, models: [words]",
}

// configurations of a gateway, none of which may change an answer. {server}, {dialect} and {folder} are
// filled in.
var configurations = map[string]string{
	// Nothing but who may do what.
	"plaintext": `
listener: {address: 127.0.0.1:0}
identity:
  insecure: {}
  rules:
    - {principals: [anonymous], methods: [inference, metadata, health], models: ["*"]}
backends:
  - {name: server, address: "{server}", dialect: {dialect}, plaintext: true}
`,
	// Every policy, with rules that nothing here breaks and limits that nothing here reaches. It
	// needs the gateway to see where each inference ends, and to tell those without an id apart.
	"every policy": `
listener: {address: 127.0.0.1:0}
identity:
  development: {directory: {folder}, issue: [/client]}
  rules:
    - {principals: [spiffe://sluice.dev/client], methods: [inference, metadata, health], models: ["*"]}
backends:
  - {name: server, address: "{server}", dialect: {dialect}, plaintext: true}
inspect:
  no_starter_rules: true
  responses: true
  rules: |
    SecRule ARGS_POST "@contains a word that nobody says" "id:100001,phase:2,deny"
    SecRule RESPONSE_ARGS "@contains a word that nobody says" "id:100002,phase:4,deny"
tokenizers:
  - {models: [words], file: "{tokenizer}"}
budgets:
  - {name: tokens, per: [BUDGET_KEY_PRINCIPAL, BUDGET_KEY_MODEL], tokens: 1000000000}
  - {name: requests, requests: 1000000, window: 3600s}
pools:
  - {name: gpu, capacity: 1000, models: [{model: "*"}]}
`,
}

// startGateway runs a gateway until the test ends and returns its address.
func startGateway(t *testing.T, configuration string) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "sluice.yaml")
	if err := os.WriteFile(file, []byte(configuration), 0o600); err != nil {
		t.Fatal(err)
	}
	cfg, err := config.Read(file)
	if err != nil {
		t.Fatal(err)
	}
	log := new(bytes.Buffer)
	g, err := gateway.New(cfg, config.Options{Logger: slog.New(slog.NewTextHandler(log, nil))})
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", cfg.GetListener().GetAddress())
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- g.Serve(l) }()
	t.Cleanup(func() {
		g.Shutdown()
		if err := <-served; err != nil {
			t.Error(err)
		}
		if t.Failed() {
			t.Logf("the gateway's log:\n%s", log)
		}
	})
	return l.Addr().String()
}

// TestGateway drives each server directly and through the gateway: what comes over the wire is the same.
func TestGateway(t *testing.T) {
	for name := range servers {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := running(t, name)
			want := run(t, s, s.address)
			for name, configuration := range configurations {
				t.Run(name, func(t *testing.T) {
					folder := t.TempDir()
					tokenizer, err := filepath.Abs("../../interceptors/tokens/testdata/gpt2.json")
					if err != nil {
						t.Fatal(err)
					}
					address := startGateway(t, strings.NewReplacer(
						"{tokenizer}", tokenizer, // of what answers with token ids
						"{server}", s.address, "{dialect}", dialects[s.name], "{folder}", folder).Replace(configuration))
					var options []string
					if strings.Contains(configuration, "{folder}") {
						options = []string{
							"--bundle", filepath.Join(folder, "bundle.pem"),
							"--certificate", filepath.Join(folder, "client.pem"),
							"--key", filepath.Join(folder, "client-key.pem"),
						}
					}
					for _, d := range differences(want, run(t, s, address, options...)) {
						t.Error(d)
					}
				})
			}
		})
	}
}
