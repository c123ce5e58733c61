package config

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"google.golang.org/grpc/health/grpc_health_v1"
	reflectionpb "google.golang.org/grpc/reflection/grpc_reflection_v1"
	reflectionalphapb "google.golang.org/grpc/reflection/grpc_reflection_v1alpha"
	"google.golang.org/protobuf/reflect/protoreflect"

	adminv1 "github.com/sluicegate/sluice/proto/gen/sluice/admin/v1"
	configv1 "github.com/sluicegate/sluice/proto/gen/sluice/config/v1"
)

// good is a configuration in which the tests of errors spoil one line.
const good = `listener: {address: "127.0.0.1:0"}
identity:
  insecure: {}
  tenant: "{trust_domain}"
  rules:
  - principals: [anonymous]
    methods: [inference, health]
    models: [llama]
  - principals: [anonymous]
    methods:
    - /inference.GRPCInferenceService/RepositoryModelLoad
    deny: true
backends:
- name: gpu
  address: 127.0.0.1:1
  plaintext: true
  dialect: DIALECT_TRITON
  spiffe_id: spiffe://example.org/model
  tensors:
  - {tensor: question, role: ROLE_PROMPT}
- name: own
  address: 127.0.0.1:2
  plaintext: true
  dialect: DIALECT_FIELDS
  descriptor_set: llm.binpb
  fields:
  - field: acme.llm.v1.AskRequest.question
    role: ROLE_PROMPT
inspect:
  rule_files: [good.conf]
  rules: |
    # one of our own
    SecRule ARGS "@contains x" "id:7,phase:2,deny"
  shadow: [7]
budgets:
- name: hour
  per: [BUDGET_KEY_TENANT]
  tokens: 10
  window: 3600s
pools:
- name: gpu-0
  capacity: 2
  models:
  - {model: llama, weight: 2}
  queue_timeout: 1s
`

// folder has what the good configuration names beside it.
func folder(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	descriptors, err := os.ReadFile(filepath.Join("..", "..", "examples", "yourproto", "llm.binpb"))
	if err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string]string{
		"llm.binpb": string(descriptors),
		"good.conf": "SecRule ARGS \"@contains y\" \"id:5,phase:2,deny\"\n",
		"bad.conf":  "# a comment\nSecRule ARGS \"@nope\" \"id:6,phase:2\"\n",
		"log.conf":  "SecAuditLog /var/log/prompts\n",
		"no.binpb":  "\xff\xff",
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// check is what sluice check does.
func check(t *testing.T, dir, text string) error {
	t.Helper()
	file := filepath.Join(dir, "sluice.yaml")
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	cfg, err := Read(file)
	if err != nil {
		return err
	}
	return Locate(file, Check(cfg))
}

func TestGoodConfiguration(t *testing.T) {
	if err := check(t, folder(t), good); err != nil {
		t.Error(err)
	}
}

func TestErrorsNameFileLineAndField(t *testing.T) {
	dir := folder(t)
	tests := []struct {
		name     string
		old, new string // what is spoilt, in the good configuration
		want     string // after the file, ":LINE:COLUMN PATH: what", as far as it matters
	}{
		// Found by reading it.
		{"empty", good, "", ": it is empty"},
		{"nothing but a comment", good, "# nothing\n", ": it is empty"},
		{"null", good, "---\n", ": it is empty"},
		{"not YAML", "identity:\n", "identity: [\n", ":1: did not find"},
		{"not UTF-8", "llama", "\xff", ": invalid leading UTF-8 octet"},
		{"nothing but carriage returns", good, "\ra: b\r", ": it cannot be read as YAML; look for line breaks"},
		{"a list", good, "- a\n", ":1:1 expected fields for sluice.config.v1.Config, got sequence"},
		{"a second document", "budgets:", "---\nbudgets:", ":35:1 the file has a second document"},
		{"a key twice", "  tenant: \"{trust_domain}\"\n", "  tenant: \"{1}\"\n  tenant: \"{2}\"\n", ":5:3 tenant is set twice, first in line 4"},
		{"a key twice in two spellings", "  queue_timeout: 1s\n", "  queue_timeout: 1s\n  queueTimeout: 2s\n", ":46:3 queueTimeout is set twice, first in line 45"},
		{"alias", "models: [llama]", "models: &m [llama]\n  - {principals: [anonymous], methods: [health], models: *m}", ":9:58 expected sequence, got alias"},
		{"merge key", "- name: hour\n", "- <<: {tokens: 2}\n  name: hour\n", `:36:3 unknown field "<<"`},
		{"unknown field", "  insecure: {}\n", "  insecure: {}\n  rulez: []\n", `:4:3 unknown field "rulez"`},
		{"wrong type", "models: [llama]", "models: 3", ":8:13 expected sequence, got scalar"},
		{"number for a word", "capacity: 2", "capacity: two", `:42:13 invalid integer`},
		{"bad enum", "dialect: DIALECT_TRITON", "dialect: DIALECT_FOO", `:17:12 unknown enum value "DIALECT_FOO"`},
		{"bad duration", "queue_timeout: 1s", "queue_timeout: soon", ":45:18 invalid number"},
		{"missing", "  address: 127.0.0.1:1\n  plaintext: true\n  dialect: DIALECT_TRITON\n", "", "backends[0].dialect: must not be in list [0]"},
		{"identity missing", "identity:", "x:", ` identity: value is required`},
		{"no source", "  insecure: {}\n", "", ":3:3 identity.source: exactly one field is required in oneof"},
		{"two sources", "  insecure: {}\n", "  insecure: {}\n  development: {}\n", ":4:16 field insecure is already set for oneof source"},
		{"no methods", "    methods: [inference, health]\n", "    methods: []\n", ":7:14 identity.rules[0].methods: must contain at least 1 item"},
		{"listener without an address", `"127.0.0.1:0"`, `""`, ":1:21 listener.address: must be at least 1 characters"},
		{"name of a back end", "name: gpu\n", "name: Big GPU\n", ":14:9 backends[0].name: does not match"},
		{"both amounts", "  tokens: 10\n", "  tokens: 10\n  requests: 1\n", ":36:3 budgets[0]: set one of tokens, requests, money_micros and gpu_seconds"},
		{"negative window", "3600s", "-1s", ":39:11 budgets[0].window: must be greater than or equal to 0s"},
		{"no capacity", "capacity: 2", "capacity: 0", ":42:13 pools[0].capacity: must be greater than 0"},

		// Found by compiling it.
		{"two back ends of a name", "- name: own\n", "- name: gpu\n", `:21:9 backends[1].name: there are two back ends named "gpu"`},
		{"SPIFFE ID of a back end", "spiffe://example.org/model", "example.org", `:18:14 backends[0].spiffe_id: "example.org" is no SPIFFE ID`},
		{"no address", "  address: 127.0.0.1:2\n", "", ":21:3 backends[1].address: the gateway needs"},
		{"address and addresses", "  address: 127.0.0.1:2\n", "  address: 127.0.0.1:2\n  addresses: [\"127.0.0.1:3\"]\n", ":23:14 backends[1].addresses: there is an address too"},
		{"no port", "  address: 127.0.0.1:2\n", "  addresses: [\"127.0.0.1:3\", models]\n", `:22:30 backends[1].addresses[1]: "models" is no host:port`},
		{"the same server twice", "  address: 127.0.0.1:2\n", "  addresses: [\"a:3\", \"a:3\"]\n", ":22:14 backends[1].addresses: repeated value must contain unique items"},
		{"too many retries", "  address: 127.0.0.1:2\n", "  address: 127.0.0.1:2\n  retries: 5\n", ":23:12 backends[1].retries: must be less than or equal to 4"},
		{"metrics of no server", "  address: 127.0.0.1:2\n", "  address: 127.0.0.1:2\n  load: {metrics_url: host:8002}\n", ":23:23 backends[1].load.metrics_url: \"host:8002\" is no URL"},
		{"metrics of one of them", "  address: 127.0.0.1:2\n", "  addresses: [\"a:3\", \"b:3\"]\n  load: {metrics_url: http://a:8002/metrics}\n", ":23:23 backends[1].load.metrics_url: each server has"},
		{"xDS without a name", "  address: 127.0.0.1:2\n", "  address: \"xds:///\"\n", `:22:12 backends[1].address: "xds:///" names nothing that a control plane knows`},
		{"xDS with a port", "  address: 127.0.0.1:2\n", "  address: XDS:models:80\n", `:22:12 backends[1].address: "XDS:models:80" names nothing that a control plane knows`},
		{"xDS and retries", "  address: 127.0.0.1:2\n", "  address: xds:///models\n  retries: 1\n", ":23:12 backends[1].retries: the control plane decides about that for xds:///models; leave it out"},
		{"xDS and outliers", "  address: 127.0.0.1:2\n", "  address: xds:///models\n  outliers: {failures: 2}\n", ":23:13 backends[1].outliers: the control plane decides about that for xds:///models; leave it out"},
		{"xDS and load", "  address: 127.0.0.1:2\n", "  address: xds:///models\n  load: {orca: true}\n", ":23:9 backends[1].load: the control plane decides about that for xds:///models; leave it out"},
		{"xDS and readiness", "  address: 127.0.0.1:2\n", "  address: xds:///models\n  readiness: READINESS_GRPC_HEALTH\n", ":23:14 backends[1].readiness: the control plane decides about that for xds:///models; leave it out"},
		{"no plaintext and no identity", "  plaintext: true\n  dialect: DIALECT_TRITON", "  dialect: DIALECT_TRITON", ":14:3 backends[0].plaintext: without an identity"},
		{"plaintext false", "true\n  dialect: DIALECT_TRITON", "false\n  dialect: DIALECT_TRITON", ":16:14 backends[0].plaintext: without an identity"},
		{"tensor's role", "ROLE_PROMPT}", "ROLE_TENSOR}", ":20:30 backends[0].tensors[0].role: ROLE_TENSOR is no role of a tensor"},
		{"tensor twice", "  - {tensor: question, role: ROLE_PROMPT}\n", "  - {tensor: q, role: ROLE_PROMPT}\n  - {tensor: q, role: ROLE_PARAMETER}\n",
			`:21:14 backends[0].tensors[1].tensor: "q" has a role already`},
		{"field that no message has", "AskRequest.question\n", "AskRequest.questoin\n", ":27:5 backends[1].fields[0]: field acme.llm.v1.AskRequest.questoin: no method"},
		{"role that does not fit the field", "    role: ROLE_PROMPT\n", "    role: ROLE_MAX_TOKENS\n", ":27:5 backends[1].fields[0]: fields: acme.llm.v1.AskRequest.question: ROLE_MAX_TOKENS cannot stand here"},
		{"field twice", "    role: ROLE_PROMPT\n", "    role: ROLE_PROMPT\n  - {field: acme.llm.v1.AskRequest.question, role: ROLE_OPAQUE}\n",
			":29:13 backends[1].fields[1].field: acme.llm.v1.AskRequest.question has a role already"},
		{"no descriptor set", "  descriptor_set: llm.binpb\n", "", ":21:3 backends[1].descriptor_set: the dialect needs the API's descriptors"},
		{"descriptor set that is not there", "llm.binpb", "none.binpb", ":25:19 backends[1].descriptor_set: open "},
		{"descriptor set that is none", "llm.binpb", "no.binpb", ":25:19 backends[1].descriptor_set: no.binpb holds no descriptor set"},
		{"engine without a model", "dialect: DIALECT_TRITON", "dialect: DIALECT_VLLM", ":14:3 backends[0].models: name the model that the engine runs"},
		{"engine without a tokenizer", "dialect: DIALECT_TRITON", "dialect: DIALECT_SGLANG\n  models: [x]", `backends[0].models[0]: prompts for "x" are token ids`},
		{"two engines", "- name: own\n", "- {name: x, address: 127.0.0.1:1, plaintext: true, dialect: DIALECT_VLLM, models: [x]}\n" +
			"- {name: y, address: 127.0.0.1:1, plaintext: true, dialect: DIALECT_VLLM, models: [y]}\n- name: own\n", " backends[2].dialect: an engine of this kind is there already"},
		{"allowed field that no message has", "dialect: DIALECT_TRITON", "allow_fields: [a.b]\n  dialect: DIALECT_TRITON", " backends[0].allow_fields[0]: field a.b: no method"},
		{"tenant", "{trust_domain}", "acme", ":4:11 identity.tenant: it names the same tenant for everyone"},
		{"principal", "  rules:\n  - principals: [anonymous]", "  rules:\n  - principals: [anonymous, joe]", `:6:29 identity.rules[0].principals[1]: "joe" is no SPIFFE ID`},
		{"group of methods", "[inference, health]", "[inference, admin]", `:7:26 identity.rules[0].methods[1]: "admin" is no group`},
		{"model pattern", "models: [llama]", "models: ['llama*']", `:8:14 identity.rules[0].models[0]: "llama*" is no pattern`},
		{"inference without a model", "    models: [llama]\n", "", `:6:5 identity.rules[0].models: an inference needs a model`},
		{"denies what nobody has", "RepositoryModelLoad", "RepositoryModelLaod", `:11:7 identity.rules[1].methods[0]: no back end has the method "/inference.GRPCInferenceService/RepositoryModelLaod"`},
		{"development authority", "  insecure: {}\n", "  development:\n    issue: [/a, '']\n    directory: x\n", ":4:17 identity.development.issue[1]: an identity needs a path"},
		{"trust domain", "  insecure: {}\n", "  development: {trust_domain: A B}\n", ":3:31 identity.development.trust_domain: "},
		{"rule file that is not there", "[good.conf]", "[good.conf, none.conf]", ":30:27 inspect.rule_files[1]: open "},
		{"error in a rule file", "[good.conf]", "[good.conf, bad.conf]", ":30:27 inspect.rule_files[1]: " + filepath.Join(dir, "bad.conf") + ":2: "},
		{"rule file that would log prompts", "[good.conf]", "[log.conf]", ":30:16 inspect.rule_files[0]: " + filepath.Join(dir, "log.conf") + ":1: SecAuditLog: leave it out"},
		{"error in a rule", "@contains x", "@nope x", ":33:1 inspect.rules:2: "},
		{"error in a rule without a block", "  rules: |\n    # one of our own\n    SecRule ARGS \"@contains x\" \"id:7,phase:2,deny\"\n", "  rules: SecNonsense\n", ":31:10 inspect.rules:1: "},
		{"shadow of nothing", "shadow: [7]", "shadow: [7, 8]", ":34:15 inspect.shadow[1]: there is no such rule: 8"},
		{"two budgets of a name", "pools:", "- {name: hour, tokens: 1}\npools:", `:40:10 budgets[1].name: there are two budgets named "hour"`},
		{"key twice", "[BUDGET_KEY_TENANT]", "[BUDGET_KEY_TENANT, BUDGET_KEY_TENANT]", ":37:28 budgets[0].per[1]: BUDGET_KEY_TENANT is there twice"},
		{"window that is too long", "3600s", "315576000000s", ":39:11 budgets[0].window: it is"},
		{"two pools of a name", "  queue_timeout: 1s\n", "- {name: gpu-0, capacity: 1, models: [{model: x}]}\n", `:45:10 pools[1].name: there are two pools named "gpu-0"`},
		{"too heavy", "weight: 2", "weight: 3", `:44:5 pools[0].models[0]: "llama" weighs 3 of 2 permits`},
		{"model in two pools", "  queue_timeout: 1s\n", "- {name: b, capacity: 1, models: [{model: llama}]}\n", `:45:35 pools[1].models[0]: "llama" is in pool "gpu-0" already`},
		{"pool for nothing", "  models:\n  - {model: llama, weight: 2}\n", "", ":41:3 pools[0].models: the pool names none"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if strings.Count(good, tt.old) < 1 {
				t.Fatalf("the good configuration has no %q", tt.old)
			}
			err := check(t, dir, strings.Replace(good, tt.old, tt.new, 1))
			if err == nil {
				t.Fatal("it is taken")
			}
			if !strings.HasPrefix(err.Error(), filepath.Join(dir, "sluice.yaml")+":") {
				t.Errorf("the file is not named first: %v", err)
			}
			if !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got  %v\nwant %s", err, tt.want)
			}
		})
	}
}

func TestLocate(t *testing.T) {
	file := filepath.Join(t.TempDir(), "sluice.yaml")
	text := "budgets:\n- {name: a}\n- {name: b}\n\nidentity: {}\n"
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	tests := []struct{ name, err, want string }{
		{"field", "identity: wrong", ":5:11 identity: wrong"},
		{"element of a list", "budgets[1].name: wrong", ":3:10 budgets[1].name: wrong"},
		{"field that is not set", "identity.tenant: wrong", ":5:11 identity.tenant: wrong"},
		{"index beyond the list", "budgets[9].name: wrong", ":2:1 budgets[9].name: wrong"},
		{"no field of the file", "the gateway is shut down", ": the gateway is shut down"},
		{"no field at all", ": ?", ": : ?"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			cause := errors.New(tt.err)
			err := Locate(file, cause)
			if err.Error() != file+tt.want || !errors.Is(err, cause) {
				t.Errorf("got %v; want %s", err, file+tt.want)
			}
		})
	}
	if err := Locate(file, nil); err != nil {
		t.Errorf("of no error: %v", err)
	}
	if err := Locate("none.yaml", errors.New("x")); err.Error() != "none.yaml: x" {
		t.Errorf("without the file: %v", err)
	}
}

func TestDenyRulesNameMethodsThatSomebodyHas(t *testing.T) {
	for _, m := range served {
		cfg := &configv1.Config{
			Identity: &configv1.Identity{Rules: []*configv1.Rule{{
				Principals: []string{"spiffe://a.b/c"}, Methods: []string{m, "inference"}, Deny: true,
			}}},
			Backends: []*configv1.Backend{{Name: "a", Dialect: configv1.Dialect_DIALECT_TRITON}},
		}
		if err := Check(cfg); err != nil {
			t.Errorf("%s: %v", m, err)
		}
	}
	var want []string
	for _, f := range []protoreflect.FileDescriptor{
		grpc_health_v1.File_grpc_health_v1_health_proto,
		reflectionpb.File_grpc_reflection_v1_reflection_proto,
		reflectionalphapb.File_grpc_reflection_v1alpha_reflection_proto,
		adminv1.File_sluice_admin_v1_admin_proto,
		adminv1.File_sluice_admin_v1_pools_proto,
		adminv1.File_sluice_admin_v1_endpoints_proto,
	} {
		for _, s := range []protoreflect.ServiceDescriptor{f.Services().Get(0)} {
			for n := range s.Methods().Len() {
				want = append(want, fmt.Sprintf("/%s/%s", s.FullName(), s.Methods().Get(n).Name()))
			}
		}
	}
	slices.Sort(want)
	if !slices.Equal(served, want) {
		t.Errorf("served is %q; grpc-go and the admin API have %q", served, want)
	}
}

func TestReadTakesPathsFromTheFilesFolder(t *testing.T) {
	file := filepath.Join(t.TempDir(), "sluice.yaml")
	text := `identity: {files: {certificate: a.pem, key: keys/a.pem, bundle: /etc/bundle.pem}}
backends: [{name: a, dialect: DIALECT_FIELDS, descriptor_set: a.binpb}]
inspect: {rule_files: [a.conf]}
usage: {file: usage.jsonl}
`
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	cfg, err := Read(file)
	if err != nil {
		t.Fatal(err)
	}
	dir, f := filepath.Dir(file), cfg.GetIdentity().GetFiles()
	got := []string{f.GetCertificate(), f.GetKey(), f.GetBundle(), cfg.GetBackends()[0].GetDescriptorSet(), cfg.GetInspect().GetRuleFiles()[0], cfg.GetUsage().GetFile()}
	want := []string{filepath.Join(dir, "a.pem"), filepath.Join(dir, "keys", "a.pem"), "/etc/bundle.pem", filepath.Join(dir, "a.binpb"), filepath.Join(dir, "a.conf"), filepath.Join(dir, "usage.jsonl")}
	if !slices.Equal(got, want) {
		t.Errorf("got %q; want %q", got, want)
	}
	if _, err := Read(filepath.Join(dir, "none.yaml")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("of a file that is not there: %v", err)
	}
}

// FuzzParse holds that no text makes a panic, here or in what compiles it.
func FuzzParse(f *testing.F) {
	f.Add([]byte(good))
	f.Add([]byte("identity: &a {insecure: {}}\nbackends: [*a]\n"))
	f.Add([]byte("a: &a [*a]"))
	f.Add([]byte("? {a: b}\n: c\n--- x"))
	f.Fuzz(func(t *testing.T, text []byte) {
		cfg, err := Parse("fuzz.yaml", text)
		if err != nil {
			if cfg != nil || !strings.HasPrefix(err.Error(), "fuzz.yaml:") {
				t.Errorf("%v, %v", cfg, err)
			}
			return
		}
		for _, b := range cfg.GetBackends() {
			b.DescriptorSet = "" // reads no files
		}
		cfg.Inspect = nil
		_ = Check(cfg)
	})
}
