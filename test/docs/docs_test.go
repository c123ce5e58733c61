// Package docs tests what the documentation says: its snippets load and
// compile, its links lead somewhere, its lists are complete.
package docs

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/reflect/protoreflect"

	"github.com/sluicegate/sluice/interceptors"
	"github.com/sluicegate/sluice/interceptors/config"
	"github.com/sluicegate/sluice/interceptors/inspect"
	configv1 "github.com/sluicegate/sluice/proto/gen/sluice/config/v1"
)

const root = "../.."

// pages are the Markdown files of the repository, by their path in it.
func pages(t *testing.T) map[string]string {
	t.Helper()
	out := make(map[string]string)
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() && path != root && strings.HasPrefix(d.Name(), ".") {
			return filepath.SkipDir
		}
		if filepath.Ext(path) != ".md" {
			return nil
		}
		text, err := os.ReadFile(path)
		out[strings.TrimPrefix(path, root+"/")] = string(text)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	if out["README.md"] == "" {
		t.Fatalf("no README.md among %d pages: the test looks at the wrong place", len(out))
	}
	return out
}

var fence = regexp.MustCompile("(?ms)^```(\\w+)[^\n]*\n(.*?)^```$")

// snippets runs a test for every snippet in a language, and wants some.
func snippets(t *testing.T, language string, test func(t *testing.T, page, text string)) {
	found := 0
	for page, text := range pages(t) {
		for n, m := range fence.FindAllStringSubmatch(text, -1) {
			if m[1] != language {
				continue
			}
			found++
			t.Run(page+"/"+strconv.Itoa(n), func(t *testing.T) { test(t, page, m[2]) })
		}
	}
	if found == 0 {
		t.Errorf("no %s snippet found", language)
	}
}

// What a snippet leaves out of a configuration.
var rest = map[string]string{
	"identity": "identity: {development: {}}\n",
	"backends": "backends: [{name: model, dialect: DIALECT_TRITON, address: \"127.0.0.1:1\"}]\n",
}

// Files that pages name and that come with a model, and what stands in for them here.
var files = func() *strings.Replacer {
	testdata, err := filepath.Abs(filepath.Join(root, "interceptors/tokens/testdata"))
	if err != nil {
		panic(err)
	}
	return strings.NewReplacer(
		"/etc/sluice/llama-3/tokenizer.json", filepath.Join(testdata, "llama.json"),
		"/etc/sluice/o200k_base.tiktoken", filepath.Join(testdata, "ranks.tiktoken"))
}()

func TestConfigurationsAreGood(t *testing.T) {
	snippets(t, "yaml", func(t *testing.T, page, text string) {
		if strings.HasPrefix(text, "config:") {
			t.Skip("it is a test file, which is run with the configuration of its page")
		}
		for key, section := range rest {
			if !regexp.MustCompile("(?m)^" + key + ":").MatchString(text) {
				text += section
			}
		}
		text = files.Replace(text)
		// Paths in it are relative to the page.
		t.Chdir(filepath.Join(root, filepath.Dir(page)))
		cfg, err := config.Parse(page, []byte(text))
		if err == nil {
			err = config.Check(cfg)
		}
		if err != nil {
			t.Error(err)
		}
	})
}

func TestRulesAreGood(t *testing.T) {
	snippets(t, "seclang", func(t *testing.T, _, text string) {
		if _, err := inspect.New(&configv1.Inspect{Rules: text}, ""); err != nil {
			t.Error(err)
		}
	})
}

// The example that docs/rules.md tries out does what it shows.
func TestRuleExample(t *testing.T) {
	page := pages(t)["docs/rules.md"]
	m := regexp.MustCompile(`'\{"id":1,"text":"([^"]*)"\}' \| sluice inspect .*\n\s*\{"id":1,"verdict":"(\w+)","score":([.\d]+),"rules":\["(\d+)"\]\}`).FindStringSubmatch(page)
	if m == nil {
		t.Fatal("there is no example")
	}
	cfg, err := config.Parse("rules.md", []byte(fence.FindStringSubmatch(page)[2]+rest["identity"]+rest["backends"]))
	if err != nil {
		t.Fatal(err)
	}
	p, err := inspect.New(cfg.GetInspect(), "")
	if err != nil {
		t.Fatal(err)
	}
	v, err := p.Text([]byte(m[1]))
	if score, _ := strconv.ParseFloat(m[3], 64); err != nil || v.Verdict != m[2] || v.Score != score || !slices.Equal(v.Rules, m[4:]) {
		t.Errorf("%q is %+v, %v; want %q", m[1], v, err, m[2:])
	}
}

// The rules of docs/authorization.md do what its test file says, its conditions
// are good, and the table of what they can ask is complete.
func TestAuthorizationExample(t *testing.T) {
	page := pages(t)["docs/authorization.md"]
	check := func(rules string) error {
		cfg, err := config.Parse("authorization.md", []byte(rules+rest["backends"]))
		if err == nil {
			err = config.Check(cfg)
		}
		return err
	}
	dir := t.TempDir()
	var rules, cases string
	for _, m := range fence.FindAllStringSubmatch(page, -1) {
		switch {
		case m[1] == "cel":
			when := strconv.Quote(strings.TrimSpace(m[2]))
			if err := check("identity: {development: {}, rules: [{principals: [\"spiffe://a/b\"], methods: [health], when: " + when + "}]}\n"); err != nil {
				t.Error(err)
			}
		case strings.HasPrefix(m[2], "config:"):
			cases = m[2]
		case rules == "":
			rules = m[2]
		}
	}
	for name, text := range map[string]string{"sluice.yaml": rules + rest["backends"], "authz.yaml": cases} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	test, err := config.ReadTest(filepath.Join(dir, "authz.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	cfg, err := config.Read(test.GetConfig())
	if err != nil {
		t.Fatal(err)
	}
	access, err := config.NewAccess(cfg)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range test.GetCases() {
		x, err := access.Case(c)
		if err != nil || x.Allowed != (c.GetWant() == "ALLOW") || c.GetWantReason() != "" && c.GetWantReason() != string(x.Reason) ||
			c.GetWantTenant() != "" && c.GetWantTenant() != x.Tenant {
			t.Errorf("%s: %+v, %v", c.GetName(), x, err)
		}
	}
	// The error for a name that is not there lists those that are.
	err = check("identity: {development: {}, rules: [{principals: [\"spiffe://a/b\"], methods: [health], when: none}]}\n")
	_, list, _ := strings.Cut(err.Error(), "there are ")
	list, _, _ = strings.Cut(list, ", and the functions")
	names := strings.Split(list, ", ")
	if len(names) < 10 {
		t.Fatalf("%v lists no names", err)
	}
	for _, name := range names {
		if !regexp.MustCompile("(?m)^\\|[^|]*`" + regexp.QuoteMeta(name) + "`[^|]*\\|").MatchString(page) {
			t.Errorf("the table lacks %s", name)
		}
	}
}

// docs/configuration.md names every field there is.
func TestConfigurationIsComplete(t *testing.T) {
	page := pages(t)["docs/configuration.md"]
	seen := make(map[protoreflect.FullName]bool)
	var look func(protoreflect.MessageDescriptor)
	look = func(md protoreflect.MessageDescriptor) {
		if seen[md.FullName()] || md.ParentFile().Package() != "sluice.config.v1" {
			return
		}
		seen[md.FullName()] = true
		for n := range md.Fields().Len() {
			f := md.Fields().Get(n)
			if !regexp.MustCompile(`\b` + string(f.Name()) + `\b`).MatchString(page) {
				t.Errorf("%s is not in it", f.FullName())
			}
			if f.Message() != nil {
				look(f.Message())
			}
			if e := f.Enum(); e != nil && e.Name() == "Dialect" {
				for k := range e.Values().Len() {
					if v := e.Values().Get(k); v.Number() > 0 && !strings.Contains(page, string(v.Name())) {
						t.Errorf("%s is not in it", v.Name())
					}
				}
			}
		}
	}
	look(new(configv1.Config).ProtoReflect().Descriptor())
}

var (
	declared = regexp.MustCompile(`(?m)^(\w+(?:, \w+)*) :=`)
	packages = map[string]string{
		"log":    "log",
		"grpc":   "google.golang.org/grpc",
		"config": "github.com/sluicegate/sluice/interceptors/config",
	}
)

func TestGoCompiles(t *testing.T) {
	snippets(t, "go", func(t *testing.T, _, text string) {
		program := "package main\n\n"
		for name, path := range packages {
			if regexp.MustCompile(`\b` + name + `\.`).MatchString(text) {
				program += "import " + strconv.Quote(path) + "\n"
			}
		}
		program += "\nfunc main() {\n" + text
		for _, m := range declared.FindAllStringSubmatch(text, -1) {
			for name := range strings.SplitSeq(m[1], ", ") {
				program += "\t_ = " + name + "\n"
			}
		}
		file := filepath.Join(t.TempDir(), "main.go")
		if err := os.WriteFile(file, []byte(program+"}\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		cmd := exec.Command("go", "vet", file)
		cmd.Dir = root
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("%v\n%s\n%s", err, out, program)
		}
	})
}

// Snippets of a .proto are from the example, which is compiled.
func TestProtoIsThatOfTheExample(t *testing.T) {
	text, err := os.ReadFile(root + "/examples/yourproto/proto/acme/llm/v1/llm.proto")
	if err != nil {
		t.Fatal(err)
	}
	squeeze := func(s string) string { return strings.Join(strings.Fields(s), " ") }
	example := squeeze(string(text))
	snippets(t, "proto", func(t *testing.T, _, text string) {
		for line := range strings.Lines(text) {
			if !strings.Contains(example, squeeze(line)) {
				t.Errorf("the example has no %q", line)
			}
		}
	})
}

func TestLinksLeadSomewhere(t *testing.T) {
	link := regexp.MustCompile(`\]\(([^)\s]+)\)`)
	found := 0
	for page, text := range pages(t) {
		for _, m := range link.FindAllStringSubmatch(text, -1) {
			target, _, _ := strings.Cut(m[1], "#")
			if target == "" || strings.Contains(target, "://") || strings.HasPrefix(target, "mailto:") {
				continue
			}
			found++
			if _, err := os.Stat(filepath.Join(root, filepath.Dir(page), target)); err != nil {
				t.Errorf("%s: %s is not there", page, m[1])
			}
		}
	}
	if found < 10 {
		t.Errorf("only %d links found", found)
	}
}

// Commands of make that a page names are in the Makefile.
func TestMakeTargetsExist(t *testing.T) {
	makefile, err := os.ReadFile(root + "/Makefile")
	if err != nil {
		t.Fatal(err)
	}
	named := regexp.MustCompile("(?m)(?:^|`| {4})make ([a-z-]+)")
	found := 0
	for page, text := range pages(t) {
		for _, m := range named.FindAllStringSubmatch(text, -1) {
			found++
			if !strings.Contains(string(makefile), "\n"+m[1]+":") {
				t.Errorf("%s: there is no make %s", page, m[1])
			}
		}
	}
	if found < 5 {
		t.Errorf("only %d commands found", found)
	}
}

// docs/refusals.md has a row for each reason, with its code.
func TestRefusalsAreComplete(t *testing.T) {
	file, err := parser.ParseFile(token.NewFileSet(), root+"/interceptors/denial.go", nil, 0)
	if err != nil {
		t.Fatal(err)
	}
	want := make(map[interceptors.Reason]codes.Code)
	ast.Inspect(file, func(n ast.Node) bool {
		v, ok := n.(*ast.ValueSpec)
		if !ok || len(v.Values) != 1 {
			return true
		}
		if kind, ok := v.Type.(*ast.Ident); ok && kind.Name == "Reason" {
			text, err := strconv.Unquote(v.Values[0].(*ast.BasicLit).Value)
			if err != nil {
				t.Fatal(err)
			}
			want[interceptors.Reason(text)] = interceptors.Reason(text).Code()
		}
		return true
	})
	row := regexp.MustCompile("(?m)^\\| .* \\| ([A-Z_]+) \\| `([A-Z_]+)` \\|$")
	got := make(map[interceptors.Reason]codes.Code)
	for _, m := range row.FindAllStringSubmatch(pages(t)["docs/refusals.md"], -1) {
		var code codes.Code
		if err := code.UnmarshalJSON([]byte(strconv.Quote(m[1]))); err != nil {
			t.Error(err)
		}
		if _, twice := got[interceptors.Reason(m[2])]; twice {
			t.Errorf("%s is there twice", m[2])
		}
		got[interceptors.Reason(m[2])] = code
	}
	if len(want) == 0 || !maps.Equal(got, want) {
		t.Errorf("the page has\n%v\nwant\n%v", got, want)
	}
}
