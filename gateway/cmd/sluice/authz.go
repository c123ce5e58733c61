package main

import (
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"

	"google.golang.org/grpc/metadata"

	"github.com/sluicegate/sluice/gateway"
	"github.com/sluicegate/sluice/interceptors"
	"github.com/sluicegate/sluice/interceptors/config"
	"github.com/sluicegate/sluice/interceptors/identity"
	authzv1 "github.com/sluicegate/sluice/proto/gen/sluice/authz/v1"
	configv1 "github.com/sluicegate/sluice/proto/gen/sluice/config/v1"
)

// authzCommand asks authorization rules, without a gateway.
func authzCommand(args []string, stdout, stderr io.Writer) int {
	if len(args) == 0 {
		return usageError(stderr, "authz", "say what: explain or test")
	}
	switch args[0] {
	case "explain":
		return explainCommand(args[1:], stdout, stderr)
	case "test":
		return authzTestCommand(args[1:], stdout, stderr)
	case "help", "--help", "-h", "-help":
		newExplain(stderr).flags.Usage()
		flags, _ := newAuthzTest(stderr)
		flags.Usage()
		return 0
	}
	return usageError(stderr, "authz", "there is no %q; there are explain and test", args[0])
}

// explain are the flags of "authz explain".
type explain struct {
	flags                                             *flag.FlagSet
	config, principal, method, model, version, moment string
	parameters, metadata                              pairs
	json                                              bool
}

func newExplain(stderr io.Writer) *explain {
	x := &explain{flags: newFlags("authz explain", "--config FILE --principal ID --method M [flags]", stderr,
		"Says whether a request would be allowed, by which rule, and of each other rule why it does not match. The caller is\n"+
			"one that comes with mutual TLS. Exit status: 0 allowed, 1 denied.")}
	f := x.flags
	f.StringVar(&x.config, "config", "", "the configuration")
	f.StringVar(&x.principal, "principal", "", `the caller's SPIFFE ID, or "anonymous"`)
	f.StringVar(&x.method, "method", "", `the full method, "/package.Service/Method"`)
	f.StringVar(&x.model, "model", "", "the model that the request names")
	f.StringVar(&x.version, "version", "", "the version that it names")
	f.Var(&x.parameters, "parameter", `a parameter of the request, NAME=VALUE: a bool, a number, or text (in "" if it looks like one of them); may be repeated`)
	f.Var(&x.metadata, "metadata", "a header of the request, NAME=VALUE; may be repeated")
	f.StringVar(&x.moment, "time", "", "when it comes, such as 2026-01-31T18:00:00Z (default now)")
	f.BoolVar(&x.json, "json", false, "print JSON")
	return x
}

// pairs are values of a flag NAME=VALUE.
type pairs [][2]string

func (p *pairs) String() string { return "" }

func (p *pairs) Set(s string) error {
	name, value, ok := strings.Cut(s, "=")
	if !ok || name == "" {
		return fmt.Errorf("want NAME=VALUE")
	}
	*p = append(*p, [2]string{name, value})
	return nil
}

// typed is the value of a parameter.
func typed(s string) any {
	if v, err := strconv.ParseInt(s, 10, 64); err == nil {
		return v
	}
	if v, err := strconv.ParseFloat(s, 64); err == nil {
		return v
	}
	if text, err := strconv.Unquote(s); err == nil && s[0] == '"' {
		return text
	}
	switch s {
	case "true":
		return true
	case "false":
		return false
	}
	return s
}

func explainCommand(args []string, stdout, stderr io.Writer) int {
	x := newExplain(stderr)
	if code, ok := parse(x.flags, args, 0); !ok {
		return code
	}
	const name = "authz explain"
	if x.config == "" || x.principal == "" || x.method == "" {
		return usageError(stderr, name, "--config, --principal and --method are needed")
	}
	q := identity.Question{Model: x.model, Version: x.version, Parameters: make(map[string]any), Metadata: metadata.MD{}}
	var err error
	if q.Principal, err = config.Principal(x.principal); err != nil {
		return usageError(stderr, name, "--principal: %v", err)
	}
	if x.moment != "" {
		if q.Time, err = time.Parse(time.RFC3339, x.moment); err != nil {
			return usageError(stderr, name, "--time: %q is no time such as 2026-01-31T18:00:00Z", x.moment)
		}
	}
	for _, p := range x.parameters {
		q.Parameters[p[0]] = typed(p[1])
	}
	for _, p := range x.metadata {
		q.Metadata.Append(p[0], p[1])
	}
	access, err := readAccess(x.config)
	if err != nil {
		return fail(stderr, name, err)
	}
	answer := access.Explain(x.method, q)
	if x.json {
		err = writeExplanation(stdout, x.config, answer)
	} else {
		printExplanation(stdout, x, answer)
	}
	switch {
	case err != nil:
		return fail(stderr, name, err)
	case !answer.Allowed:
		return 1
	}
	return 0
}

// readAccess compiles a configuration file, with what a gateway serves itself.
func readAccess(file string) (*config.Access, error) {
	cfg, err := config.Read(file)
	if err != nil {
		return nil, err
	}
	own, err := ownBackends(cfg)
	if err != nil {
		return nil, err
	}
	access, err := config.NewAccess(cfg, own...)
	return access, config.Locate(file, err)
}

// ownBackends is what serves health and reflection, where there is a gateway.
func ownBackends(cfg *configv1.Config) ([]*interceptors.Backend, error) {
	if cfg.GetListener() == nil {
		return nil, nil
	}
	own, err := gateway.Own(cfg.GetListener())
	return []*interceptors.Backend{own}, err
}

// places are where the rules stand.
func places(file string, rules int) []string {
	paths := make([]string, rules)
	for n := range paths {
		paths[n] = rulePath(n)
	}
	return config.Lines(file, paths...)
}

func rulePath(n int) string { return fmt.Sprintf("identity.rules[%d]", n) }

func writeExplanation(w io.Writer, file string, x identity.Explanation) error {
	type rule struct {
		identity.RuleExplanation
		At string `json:"at"`
	}
	out := struct {
		identity.Explanation
		Rules []rule `json:"rules"`
	}{x, []rule{}}
	at := places(file, len(x.Rules))
	for n, r := range x.Rules {
		out.Rules = append(out.Rules, rule{r, at[n]})
	}
	enc := json.NewEncoder(w)
	enc.SetIndent("", "  ")
	return enc.Encode(out)
}

func printExplanation(w io.Writer, x *explain, answer identity.Explanation) {
	at := places(x.config, len(answer.Rules))
	line := func(r identity.RuleExplanation) string {
		s := at[r.Index] + " " + rulePath(r.Index)
		if r.Name != "" {
			s += fmt.Sprintf(" %q", r.Name)
		}
		if r.Deny {
			s += " (denies)"
		}
		return s
	}
	verdict := "ALLOW"
	if !answer.Allowed {
		verdict = "DENY " + string(answer.Reason)
	}
	fmt.Fprintf(w, "%s: %s\n  principal %s, tenant %s\n", verdict, answer.Why, answer.Principal, answer.Tenant)
	if answer.Rule >= 0 {
		fmt.Fprintf(w, "  by %s\n", line(answer.Rules[answer.Rule]))
	}
	for _, r := range answer.Rules {
		switch {
		case r.Index == answer.Rule:
			continue
		case r.Matches && r.Why == "":
			r.Why = "it matches too"
		}
		fmt.Fprintf(w, "  %s: %s\n", line(r), r.Why)
	}
}

func newAuthzTest(stderr io.Writer) (*flag.FlagSet, *bool) {
	flags := newFlags("authz test", "[--json] FILE...", stderr,
		"Tries the rules of configurations by cases: YAML files, see proto/sluice/authz/v1/authz.proto. Prints a line for each\n"+
			"case. Exit status: 0 all are as they want to be, 1 some are not, or a file is bad.")
	return flags, flags.Bool("json", false, "print a JSON line for each case")
}

// outcome is what became of a case.
type outcome struct {
	File   string              `json:"file"`
	At     string              `json:"at"`
	Name   string              `json:"name"`
	OK     bool                `json:"ok"`
	Allow  bool                `json:"allowed"`
	Reason interceptors.Reason `json:"reason,omitempty"`
	Tenant string              `json:"tenant"`
	// Wrong says what is not as the case wants it.
	Wrong string `json:"wrong,omitempty"`
}

func authzTestCommand(args []string, stdout, stderr io.Writer) int {
	flags, asJSON := newAuthzTest(stderr)
	if code, ok := parse(flags, args, -1); !ok {
		return code
	}
	if flags.NArg() == 0 {
		return usageError(stderr, "authz test", "name a file")
	}
	cases, failed := 0, 0
	for _, file := range flags.Args() {
		results, err := authzTest(file)
		if err != nil {
			return fail(stderr, "authz test", err)
		}
		for _, r := range results {
			cases++
			if !r.OK {
				failed++
			}
			if *asJSON {
				err = json.NewEncoder(stdout).Encode(r)
			} else {
				err = printOutcome(stdout, r)
			}
			if err != nil {
				return fail(stderr, "authz test", err)
			}
		}
	}
	if !*asJSON {
		fmt.Fprintf(stdout, "%d case(s), %d failed\n", cases, failed)
	}
	if failed > 0 {
		return 1
	}
	return 0
}

func printOutcome(w io.Writer, r outcome) error {
	var err error
	if r.OK {
		_, err = fmt.Fprintf(w, "ok    %s: %s\n", r.At, r.Name)
	} else {
		_, err = fmt.Fprintf(w, "FAIL  %s: %s: %s\n", r.At, r.Name, r.Wrong)
	}
	return err
}

// authzTest tries the cases of a file.
func authzTest(file string) ([]outcome, error) {
	test, err := config.ReadTest(file)
	if err != nil {
		return nil, err
	}
	access, err := readAccess(test.GetConfig())
	if err != nil {
		return nil, err
	}
	paths := make([]string, len(test.GetCases()))
	for n := range paths {
		paths[n] = fmt.Sprintf("cases[%d]", n)
	}
	at := config.Lines(file, paths...)
	var out []outcome
	for n, c := range test.GetCases() {
		x, err := access.Case(c)
		if err != nil {
			return nil, config.Locate(file, fmt.Errorf("%s.%w", paths[n], err))
		}
		r := outcome{File: file, At: at[n], Name: c.GetName(), Allow: x.Allowed, Reason: x.Reason, Tenant: x.Tenant, Wrong: wrong(c, x)}
		r.OK = r.Wrong == ""
		out = append(out, r)
	}
	return out, nil
}

// wrong says what is not as the case wants it; "" if all is.
func wrong(c *authzv1.Case, x identity.Explanation) string {
	got := "ALLOW"
	if !x.Allowed {
		got = "DENY"
	}
	by := ""
	if x.Rule >= 0 {
		by = " by " + rulePath(x.Rule)
	}
	switch {
	case got != c.GetWant():
		return fmt.Sprintf("got %s %s(%s%s), want %s", got, space(string(x.Reason)), x.Why, by, c.GetWant())
	case c.GetWantReason() != "" && c.GetWantReason() != string(x.Reason):
		return fmt.Sprintf("got DENY %s (%s%s), want %s", x.Reason, x.Why, by, c.GetWantReason())
	case c.GetWantTenant() != "" && c.GetWantTenant() != x.Tenant:
		return fmt.Sprintf("got tenant %q, want %q", x.Tenant, c.GetWantTenant())
	}
	return ""
}

// space is a word with the space after it.
func space(word string) string {
	if word == "" {
		return ""
	}
	return word + " "
}
