// Package layout tests the repository itself: which package may import which,
// which versions are too old, and what no file may name.
package layout

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/sluicegate/sluice"

// rule says what a package may import. Patterns are import paths; one that ends
// in "/..." stands for the path and all below it. A pattern that starts with
// "./" is below our module. The standard library is always allowed.
type rule struct {
	packages string
	// allow is what the package may import itself. Nil: anything.
	allow []string
	// never is what it may not reach, directly or through others.
	never []string
	// except is what it may reach all the same.
	except []string
}

// Libraries that the packages which everyone links must not pull in.
const (
	coraza   = "github.com/corazawaf/..."
	envoy    = "github.com/envoyproxy/..."
	otelSDK  = "go.opentelemetry.io/otel/sdk/..."
	workload = "github.com/spiffe/go-spiffe/v2/workloadapi/..."
	grpcgo   = "google.golang.org/grpc/..."
	pb       = "google.golang.org/protobuf/..."
	// The details of a gRPC status.
	errdetails = "google.golang.org/genproto/googleapis/rpc/..."
	spiffeid   = "github.com/spiffe/go-spiffe/v2/spiffeid"
	ownProto   = "./proto/gen/sluice/..."
	// What the messages of ORCA, the standard for reports of load, import.
	orcaRules = "github.com/envoyproxy/protoc-gen-validate/validate"
	// Users link their own generated copy, and a second registration panics.
	inference = "./proto/gen/inference"
)

// policyImports is what every policy may import, beside its own library.
var policyImports = []string{
	"./interceptors", "./interceptors/fields", "./interceptors/dialect", "./interceptors/tokens",
	"./interceptors/internal/...", ownProto, grpcgo, pb, errdetails, spiffeid,
}

func policy(name string, library ...string) rule {
	r := rule{
		packages: "./interceptors/" + name + "/...",
		allow:    slices.Concat(policyImports, []string{"./interceptors/" + name + "/..."}, library),
		never:    []string{envoy, otelSDK, inference, coraza},
	}
	if slices.Contains(library, coraza) {
		r.never = slices.DeleteFunc(r.never, func(s string) bool { return s == coraza })
	}
	return r
}

// rules holds for each package the first that matches. Tests are not bound by them.
var rules = []rule{
	{
		packages: "./interceptors",
		allow: []string{
			"./interceptors/fields", "./interceptors/dialect", "./interceptors/tokens",
			"./interceptors/internal/...", ownProto, grpcgo, pb, errdetails, spiffeid,
		},
		never: []string{envoy, coraza, workload, otelSDK, inference},
	},
	{
		packages: "./interceptors/fields/...",
		allow:    []string{"./interceptors/fields/...", "./proto/gen/sluice/fields/...", "google.golang.org/grpc/mem", pb},
		never:    []string{envoy, coraza, workload, otelSDK, inference},
	},
	{
		packages: "./interceptors/dialect/...",
		allow: []string{
			"./interceptors/fields", "./interceptors/dialect/...", "./proto/gen/sluice/fields/...",
			"google.golang.org/grpc/mem", pb,
		},
		never: []string{envoy, coraza, workload, otelSDK, inference},
	},
	{
		packages: "./interceptors/tokens/...",
		allow:    []string{"./interceptors/fields", "./interceptors/dialect", "./interceptors/tokens/...", ownProto, pb},
		never:    []string{envoy, coraza, workload, otelSDK, inference},
	},
	// What several policies share.
	{
		packages: "./interceptors/internal/expression",
		allow:    append([]string{"cel.dev/cel-go/..."}, policyImports...),
		never:    []string{envoy, coraza, workload, otelSDK, inference},
	},
	{
		packages: "./interceptors/internal/redis",
		allow:    append([]string{"github.com/redis/rueidis"}, policyImports...),
		never:    []string{envoy, coraza, workload, otelSDK, inference},
	},
	{
		packages: "./interceptors/internal/...",
		allow:    policyImports,
		never:    []string{envoy, coraza, workload, otelSDK, inference},
	},
	policy("identity", "github.com/spiffe/go-spiffe/v2/..."),
	policy("inspect", coraza, "golang.org/x/text/..."),
	policy("budget", "github.com/redis/rueidis"),
	policy("admit", "github.com/redis/rueidis"),
	policy("telemetry", "go.opentelemetry.io/..."),
	policy("usage", "go.opentelemetry.io/..."),
	{
		packages: "./interceptors/config/...",
		allow: []string{
			"./interceptors/...", ownProto, grpcgo, pb, spiffeid,
			"buf.build/go/protoyaml/...", "go.yaml.in/yaml/...", "buf.build/go/protovalidate/...", "go.opentelemetry.io/...",
			"github.com/grpc-ecosystem/go-grpc-middleware/...",
		},
		never: []string{envoy, otelSDK, inference},
	},
	// The program brings the model server that the demo guards.
	{packages: "./gateway/cmd/...", never: []string{"./test/..."}, except: []string{"./test/model"}},
	{packages: "./gateway/extproc/...", never: []string{otelSDK, workload, inference, "./test/..."}},
	{packages: "./gateway/extauthz/...", never: []string{otelSDK, workload, inference, "./test/..."}},
	{
		packages: "./gateway/endpoints",
		allow: []string{
			ownProto, grpcgo, pb,
			"github.com/cncf/xds/go/xds/data/orca/v3", "github.com/prometheus/common/...", "github.com/prometheus/client_model/go",
		},
		never:  []string{envoy, coraza, otelSDK, workload, inference},
		except: []string{orcaRules},
	},
	{
		packages: "./gateway/...",
		allow: []string{
			"./interceptors", "./interceptors/config", "./interceptors/dialect", "./gateway/...", ownProto, grpcgo, pb, errdetails,
			"github.com/spiffe/go-spiffe/v2/...", "github.com/grpc-ecosystem/go-grpc-middleware/...",
			"go.opentelemetry.io/...", "golang.org/x/net/...", "golang.org/x/sync/...",
		},
		never:  []string{envoy, otelSDK, inference},
		except: []string{orcaRules},
	},
	// For programs: the standard library alone.
	{packages: "./internal/heapfloor", allow: []string{}},
	{packages: "./proto/gen/..."},
	{packages: "./examples/..."},
	{packages: "./kind/..."},
	{packages: "./test/..."},
}

// pkg is what go list says of a package.
type pkg struct {
	ImportPath string
	Imports    []string
	Deps       []string
	Error      *struct{ Err string }
}

func matches(pattern, path string) bool {
	if rest, ok := strings.CutPrefix(pattern, "./"); ok {
		pattern = module + "/" + rest
	}
	if prefix, ok := strings.CutSuffix(pattern, "/..."); ok {
		return path == prefix || strings.HasPrefix(path, prefix+"/")
	}
	return path == pattern
}

func matchesAny(patterns []string, path string) bool {
	return slices.ContainsFunc(patterns, func(p string) bool { return matches(p, path) })
}

// standard tells a package of the standard library: its first element has no dot.
func standard(path string) bool {
	first, _, _ := strings.Cut(path, "/")
	return !strings.Contains(first, ".")
}

// breaches says what p imports against the rules, one line each.
func breaches(rules []rule, p pkg) []string {
	i := slices.IndexFunc(rules, func(r rule) bool { return matches(r.packages, p.ImportPath) })
	if i < 0 {
		return []string{p.ImportPath + " has no import rule: add one here"}
	}
	r := rules[i]
	var out []string
	for _, dep := range p.Imports {
		if r.allow != nil && !standard(dep) && !matchesAny(r.allow, dep) {
			out = append(out, fmt.Sprintf("%s imports %s, which the rule for %s does not allow", p.ImportPath, dep, r.packages))
		}
	}
	for _, dep := range p.Deps {
		if matchesAny(r.never, dep) && !matchesAny(r.except, dep) {
			out = append(out, fmt.Sprintf("%s depends on %s, which the rule for %s forbids", p.ImportPath, dep, r.packages))
		}
	}
	return out
}

func TestImportsFollowTheRules(t *testing.T) {
	root := repositoryRoot(t)
	// -e: a package that does not compile yet is no reason to skip the others.
	cmd := exec.Command("go", "list", "-e", "-json=ImportPath,Imports,Deps,Error", "./...")
	cmd.Dir = root
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list: %v\n%s", err, stderr(err))
	}
	found := map[string]bool{}
	for dec := json.NewDecoder(bytes.NewReader(out)); ; {
		var p pkg
		if err := dec.Decode(&p); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatalf("go list: %v", err)
		}
		found[p.ImportPath] = true
		if p.Error != nil {
			t.Logf("%s: %s", p.ImportPath, p.Error.Err)
		}
		for _, b := range breaches(rules, p) {
			t.Error(b)
		}
	}
	if !found[module+"/interceptors"] {
		t.Errorf("go list did not find %s/interceptors among %d packages: the test looks at the wrong place", module, len(found))
	}
}

func TestBreaches(t *testing.T) {
	const m = module + "/"
	tests := []struct {
		name string
		pkg  pkg
		want int
	}{
		{"core imports grpc", pkg{ImportPath: m + "interceptors", Imports: []string{"context", "google.golang.org/grpc/codes"}}, 0},
		{"core imports a policy", pkg{ImportPath: m + "interceptors", Imports: []string{m + "interceptors/budget"}}, 1},
		{"core reaches Coraza", pkg{ImportPath: m + "interceptors", Deps: []string{"github.com/corazawaf/coraza/v3"}}, 1},
		{"core imports the TLS half of go-spiffe", pkg{ImportPath: m + "interceptors",
			Imports: []string{"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"}}, 1},
		{"dialect imports generated inference", pkg{ImportPath: m + "interceptors/dialect",
			Imports: []string{m + "proto/gen/inference"}, Deps: []string{m + "proto/gen/inference"}}, 2},
		{"fields imports grpc/mem", pkg{ImportPath: m + "interceptors/fields", Imports: []string{"google.golang.org/grpc/mem"}}, 0},
		{"fields imports grpc", pkg{ImportPath: m + "interceptors/fields", Imports: []string{"google.golang.org/grpc"}}, 1},
		{"policy imports the core", pkg{ImportPath: m + "interceptors/budget", Imports: []string{m + "interceptors"}}, 0},
		{"policy imports another policy", pkg{ImportPath: m + "interceptors/budget", Imports: []string{m + "interceptors/admit"}}, 1},
		{"policy imports the gateway", pkg{ImportPath: m + "interceptors/budget", Imports: []string{m + "gateway"}}, 1},
		{"inspect imports Coraza", pkg{ImportPath: m + "interceptors/inspect",
			Imports: []string{"github.com/corazawaf/coraza/v3"}, Deps: []string{"github.com/corazawaf/coraza/v3"}}, 0},
		{"budget imports Coraza", pkg{ImportPath: m + "interceptors/budget",
			Imports: []string{"github.com/corazawaf/coraza/v3"}, Deps: []string{"github.com/corazawaf/coraza/v3"}}, 2},
		{"telemetry reaches the SDK", pkg{ImportPath: m + "interceptors/telemetry", Deps: []string{"go.opentelemetry.io/otel/sdk/trace"}}, 1},
		{"config imports every policy", pkg{ImportPath: m + "interceptors/config",
			Imports: []string{m + "interceptors/budget", m + "interceptors/inspect"}}, 0},
		{"gateway imports a policy", pkg{ImportPath: m + "gateway", Imports: []string{m + "interceptors/budget"}}, 1},
		{"program imports the SDK", pkg{ImportPath: m + "gateway/cmd/sluice", Imports: []string{"go.opentelemetry.io/otel/sdk/trace"}}, 0},
		{"program imports the demo's model", pkg{ImportPath: m + "gateway/cmd/sluice", Deps: []string{m + "test/model"}}, 0},
		{"program imports test code", pkg{ImportPath: m + "gateway/cmd/sluice", Deps: []string{m + "test/testkit"}}, 1},
		{"policy nobody knows", pkg{ImportPath: m + "interceptors/novel"}, 1},
		{"longer name is not below", pkg{ImportPath: m + "interceptors/budgetary"}, 1},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if got := breaches(rules, tt.pkg); len(got) != tt.want {
				t.Errorf("%d breaches, want %d: %q", len(got), tt.want, got)
			}
		})
	}
}

func repositoryRoot(t *testing.T) string {
	t.Helper()
	out, err := exec.Command("go", "env", "GOMOD").Output()
	if err != nil {
		t.Fatalf("go env GOMOD: %v\n%s", err, stderr(err))
	}
	return filepath.Dir(strings.TrimSpace(string(out)))
}

func stderr(err error) []byte {
	if exit, ok := errors.AsType[*exec.ExitError](err); ok {
		return exit.Stderr
	}
	return nil
}
