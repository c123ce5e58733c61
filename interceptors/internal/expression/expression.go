// Package expression is the language in which a configuration says things about
// callers and inferences: CEL, with our variables, as a [Condition] or a [Key]. Its
// cost is bounded, both when it is compiled and when it is evaluated, and it says
// nothing of prompts and outputs: it cannot see them.
package expression

import (
	"errors"
	"fmt"
	"strconv"
	"strings"
	"sync"

	"cel.dev/cel-go/cel"
	"cel.dev/cel-go/common/cost"
	"cel.dev/cel-go/common/types"
	"cel.dev/cel-go/common/types/ref"
)

// Limits of expressions. Chosen: a unit of cost is about one operation, or ten
// bytes of text that are looked at, and takes up to a hundred nanoseconds, so
// that the dearest takes some 2 ms (BenchmarkDearCondition in package identity).
const (
	maxCost       = 20_000
	maxExpression = 4096 // bytes
	maxRegex      = 1000 // instructions of the compiled pattern
	// MaxText is the most bytes of a text that an expression can look at. The cost
	// of an operation is known only when it is done.
	MaxText = 16 << 10
)

// variables are what an expression can ask.
var variables = []struct {
	name string
	kind *cel.Type
}{
	{"principal.id", cel.StringType},
	{"principal.trust_domain", cel.StringType},
	{"principal.path", cel.StringType},
	{"principal.segments", cel.ListType(cel.StringType)},
	{"tenant", cel.StringType},
	{"method", cel.StringType},
	{"model", cel.StringType},
	{"version", cel.StringType},
	{"parameters", cel.MapType(cel.StringType, cel.DynType)},
	{"metadata", cel.MapType(cel.StringType, cel.ListType(cel.StringType))},
	{"peer.id", cel.StringType},
	{"peer.address", cel.StringType},
	{"peer.via", cel.StringType},
	{"time", cel.TimestampType},
}

// sizes are what an expression's cost is estimated with: the most bytes of a
// text, elements of a list and entries of a map that calls are expected to have.
// A call that has more may run into the limit.
var sizes = map[string]uint64{
	"principal.id": 2048, "principal.trust_domain": 255, "principal.path": 2048, // SPIFFE ID 2.3: 2048 bytes
	"principal.segments": 32, "principal.segments.@items": 255,
	"tenant": 255, "method": 255, "model": 255, "version": 64,
	"parameters": 64, "parameters.@keys": 64, "parameters.@values": 1024,
	"metadata": 64, "metadata.@keys": 64, "metadata.@values": 4, "metadata.@values.@items": 256,
	"peer.id": 2048, "peer.address": 64, "peer.via": 16,
}

// hints is sizes as CEL wants them.
type hints struct{}

func (hints) EstimateSize(n cost.AstNode) *cost.SizeEstimate {
	if most, ok := sizes[strings.Join(n.Path(), ".")]; ok {
		return &cost.SizeEstimate{Max: most}
	}
	return nil
}

func (hints) EstimateCallCost(string, string, *cost.AstNode, []cost.AstNode) *cost.CallEstimate {
	return nil
}

// language is CEL with our variables.
var language = sync.OnceValues(func() (*cel.Env, error) {
	options := []cel.EnvOption{
		cel.ParserExpressionSizeLimit(maxExpression),
		cel.RegexProgramSizeLimit(maxRegex),
		cel.DefaultUTCTimeZone(true),
		cel.ASTValidators(cel.ValidateDurationLiterals(), cel.ValidateTimestampLiterals(), cel.ValidateRegexLiterals()),
	}
	for _, v := range variables {
		options = append(options, cel.Variable(v.name, v.kind))
	}
	return cel.NewEnv(options...)
})

// ErrUnknown says that an expression asks for what is not known at that moment: the
// model before there is an inference, or parameters that nobody kept.
var ErrUnknown = errors.New("the parameters are not known")

// program is a compiled expression.
type program struct {
	program cel.Program
	// What it asks for that is not known from the beginning.
	model, parameters bool
}

// Condition is an expression that is true or false. It is safe for concurrent use.
type Condition struct{ program }

// Key is an expression that is a text. It is safe for concurrent use.
type Key struct{ program }

// NewCondition checks an expression: its types, its names, its cost. An error says
// where it is wrong.
func NewCondition(text string) (*Condition, error) {
	p, err := compile(text, cel.BoolType, "a condition must be true or false")
	return &Condition{p}, err
}

// NewKey is NewCondition for a text.
func NewKey(text string) (*Key, error) {
	p, err := compile(text, cel.StringType, "a key must be a string: string(...) makes it one")
	return &Key{p}, err
}

// compile checks an expression of a type.
func compile(text string, kind *cel.Type, must string) (p program, err error) {
	env, err := language()
	if err != nil {
		return p, err
	}
	ast, issues := env.Compile(text)
	if issues.Err() != nil {
		return p, readable(issues)
	}
	if ast.OutputType() != kind {
		return p, fmt.Errorf("it is a %s; %s", ast.OutputType(), must)
	}
	estimate, err := env.EstimateCost(ast, hints{})
	if err != nil {
		return p, fmt.Errorf("its cost cannot be estimated: %w", err)
	}
	if estimate.Max > maxCost {
		return p, fmt.Errorf("it may cost %s, the limit is %d; look at less text, or leave out loops in loops", dear(estimate.Max), maxCost)
	}
	if p.program, err = env.Program(ast, cel.EvalOptions(cel.OptOptimize), cel.CostLimit(maxCost)); err != nil {
		return p, err
	}
	for _, r := range ast.NativeRep().ReferenceMap() {
		switch r.Name {
		case "model", "version":
			p.model = true
		case "parameters":
			p.parameters = true
		}
	}
	return p, nil
}

// dear is a cost for people.
func dear(units uint64) string {
	if units > 1_000_000_000 {
		return "more than 1000000000"
	}
	return strconv.FormatUint(units, 10)
}

// readable is the first thing that is wrong with an expression, and what there is
// in place of a name that is not.
func readable(issues *cel.Issues) error {
	first := issues.Errors()[0]
	what := first.Message
	if name, ok := strings.CutPrefix(what, "undeclared reference to '"); ok {
		name, _, _ = strings.Cut(name, "'")
		names := make([]string, len(variables))
		for n, v := range variables {
			names[n] = v.name
		}
		what = fmt.Sprintf("there is no %q; there are %s, and the functions of CEL", name, strings.Join(names, ", "))
	}
	return fmt.Errorf("line %d, column %d: %s", first.Location.Line(), first.Location.Column()+1, what)
}

// AsksParameters reports whether it asks for parameters of the request.
func (p *program) AsksParameters() bool { return p.parameters }

// Holds evaluates the condition. An error says that it cannot be decided; it is
// ErrUnknown as long as that may change. The caller may be nil: then it is the call's.
func (c *Condition) Holds(caller *Caller, s *Scope) (bool, error) {
	switch result, err := c.eval(caller, s); {
	case err != nil:
		return false, err
	case result == types.True:
		return true, nil
	case result == types.False:
		return false, nil
	}
	return false, errors.New("it is neither true nor false")
}

// Text evaluates the key. Errors are as of Holds.
func (k *Key) Text(caller *Caller, s *Scope) (string, error) {
	result, err := k.eval(caller, s)
	if err != nil {
		return "", err
	}
	text, ok := result.(types.String)
	if !ok {
		return "", errors.New("it is no text")
	}
	return string(text), nil
}

func (p *program) eval(caller *Caller, s *Scope) (ref.Val, error) {
	if p.model && s.Inference == nil || p.parameters && s.Parameters == nil && s.Message == nil {
		return nil, ErrUnknown
	}
	a := activations.Get().(*activation)
	a.caller, a.Scope = caller, *s
	result, _, err := p.program.Eval(a)
	*a = activation{}
	activations.Put(a)
	return result, err
}
