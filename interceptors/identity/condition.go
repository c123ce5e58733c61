package identity

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"cel.dev/cel-go/cel"
	"cel.dev/cel-go/common/cost"
	"cel.dev/cel-go/common/types"
	"cel.dev/cel-go/common/types/ref"
	"cel.dev/cel-go/interpreter"
	"github.com/sluicegate/sluice/interceptors"
	"github.com/sluicegate/sluice/interceptors/fields"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/metadata"
)

// Limits of conditions. Chosen: a unit of cost is about one operation, or ten
// bytes of text that are looked at, and takes up to a hundred nanoseconds, so
// that the dearest condition takes some 2 ms (BenchmarkDearCondition).
const (
	maxCost       = 20_000
	maxExpression = 4096 // bytes
	maxRegex      = 1000 // instructions of the compiled pattern
	// maxText is the most bytes of a text that a condition can look at. The cost
	// of an operation is known only when it is done.
	maxText = 16 << 10
)

// variables are what a condition can ask.
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

// sizes are what a condition's cost is estimated with: the most bytes of a
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

// condition is a compiled expression. It is safe for concurrent use.
type condition struct {
	program cel.Program
	// What it asks for that is not known from the beginning.
	model, parameters bool
}

// compileCondition checks an expression: its types, its names, its cost.
func compileCondition(text string) (*condition, error) {
	env, err := language()
	if err != nil {
		return nil, err
	}
	ast, issues := env.Compile(text)
	if issues.Err() != nil {
		return nil, readable(issues)
	}
	if ast.OutputType() != cel.BoolType {
		return nil, fmt.Errorf("it is a %s; a condition must be true or false", ast.OutputType())
	}
	estimate, err := env.EstimateCost(ast, hints{})
	if err != nil {
		return nil, fmt.Errorf("its cost cannot be estimated: %w", err)
	}
	if estimate.Max > maxCost {
		return nil, fmt.Errorf("it may cost %s, the limit is %d; look at less text, or leave out loops in loops", dear(estimate.Max), maxCost)
	}
	c := new(condition)
	if c.program, err = env.Program(ast, cel.EvalOptions(cel.OptOptimize), cel.CostLimit(maxCost)); err != nil {
		return nil, err
	}
	for _, r := range ast.NativeRep().ReferenceMap() {
		switch r.Name {
		case "model", "version":
			c.model = true
		case "parameters":
			c.parameters = true
		}
	}
	return c, nil
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

// errNotKept says why a condition about parameters cannot be decided again.
var errNotKept = errors.New("the parameters are not known")

// decide evaluates the condition: matches, conditionFalse, unknown as long as it
// asks for what is not known yet, or undecided, with the reason.
func (c *condition) decide(g *grant, e *environment) (answer, error) {
	if c.model && e.inference == nil || c.parameters && e.parameters == nil && e.message == nil {
		return unknown, errNotKept
	}
	a := activations.Get().(*activation)
	a.grant, a.environment = g, *e
	result, _, err := c.program.Eval(a)
	*a = activation{}
	activations.Put(a)
	switch {
	case err != nil:
		return undecided, err
	case result == types.True:
		return matches, nil
	case result == types.False:
		return conditionFalse, nil
	}
	return undecided, errors.New("it is neither true nor false")
}

// activation is an environment as CEL asks for it, one name at a time.
type activation struct {
	grant *grant
	environment
}

var activations = sync.Pool{New: func() any { return new(activation) }}

var _ interpreter.Activation = (*activation)(nil)

// Parent is none.
func (a *activation) Parent() interpreter.Activation { return nil }

// ResolveName is the value of a variable.
func (a *activation) ResolveName(name string) (any, bool) {
	switch name {
	case "principal.id":
		return a.grant.values.id, true
	case "principal.trust_domain":
		return a.grant.values.trustDomain, true
	case "principal.path":
		return a.grant.values.path, true
	case "principal.segments":
		return a.grant.values.segments, true
	case "tenant":
		return a.grant.values.tenant, true
	case "method":
		return a.grant.values.method, true
	case "model":
		return bounded(a.inference.Model), true
	case "version":
		return bounded(a.inference.Version), true
	case "parameters":
		if a.parameters == nil {
			a.parameters = readParameters(a.inference, a.message)
		}
		return types.NewStringInterfaceMap(types.DefaultTypeAdapter, a.parameters), true
	case "metadata":
		return types.NewStringInterfaceMap(types.DefaultTypeAdapter, headers(a.call.Metadata)), true
	case "peer.id":
		if a.peer.IsZero() {
			return "", true
		}
		return a.peer.String(), true
	case "peer.address":
		if a.call.Peer.Addr == nil {
			return "", true
		}
		return a.call.Peer.Addr.String(), true
	case "peer.via":
		return a.via, true
	case "time":
		if a.now.IsZero() {
			return types.Timestamp{Time: time.Now()}, true
		}
		return types.Timestamp{Time: a.now}, true
	}
	return nil, false
}

// bounded is a text that a caller chose, or an error in its place: a condition
// that looks at it cannot be decided.
func bounded[T string | []byte](text T) any {
	if len(text) > maxText {
		return tooLong()
	}
	return string(text)
}

func tooLong() ref.Val { return types.NewErr("a text has more than %d bytes", maxText) }

// values are what conditions can ask of a grant.
type values struct {
	id, trustDomain, path, segments, tenant, method ref.Val
}

func valuesOf(g *grant) *values {
	segments := []string{}
	if path := g.id.Path(); path != "" {
		segments = strings.Split(path[1:], "/")
	}
	return &values{
		id:          types.String(g.principal),
		trustDomain: types.String(trustDomain(g.id)),
		path:        types.String(g.id.Path()),
		segments:    types.NewStringList(types.DefaultTypeAdapter, segments),
		tenant:      types.String(g.tenant),
		method:      types.String(g.method.Name),
	}
}

func trustDomain(id spiffeid.ID) string {
	if id.IsZero() {
		return ""
	}
	return id.TrustDomain().Name()
}

// headers are what a condition can see of a call's metadata: not what others
// write for the caller, not secrets, not what is no text.
func headers(md metadata.MD) map[string]any {
	out := make(map[string]any, len(md))
	for key, list := range md {
		key = strings.ToLower(key)
		switch {
		case key == "authorization", key == "proxy-authorization", strings.HasSuffix(key, "-bin"), interceptors.Untrusted(key):
			continue
		}
		had, _ := out[key].([]string) // the same key in another case
		had = append(slices.Clip(had), list...)
		out[key] = had
		if slices.ContainsFunc(had, func(v string) bool { return len(v) > maxText }) {
			out[key] = tooLong()
		}
	}
	return out
}

// parameters are the parameters of an inference by name: strings, int64, float64
// and bool. Nil means that they are not known.
type parameters map[string]any

// maxTokensParameter is the limit on output tokens, wherever a request states it.
const maxTokensParameter = "max_tokens"

// readParameters copies the parameters of a message. Those of the message itself
// go by their keys, any others by their paths. What lies in tensors is left out.
func readParameters(i *interceptors.Inference, m *fields.Message) parameters {
	out := make(parameters)
	if m == nil {
		return out
	}
	for n := range m.Fields {
		f := &m.Fields[n]
		if f.Role != fields.Parameter && f.Role != fields.Identifier || f.Shadowed || f.Tensor >= 0 {
			continue
		}
		name, own := strings.CutPrefix(m.Path(f), "parameters.")
		had, twice := out[name]
		switch {
		case f.Role == fields.Identifier:
			if own && !twice {
				out[name] = types.NullValue // the key of a parameter, which may have no value
			}
		case twice && had != types.NullValue:
			out[name] = types.NewErr("the parameter stands more than once")
		default:
			out[name] = valueOf(m, f)
		}
	}
	if i != nil && i.MaxOutputTokens > 0 {
		out[maxTokensParameter] = i.MaxOutputTokens
	}
	return out
}

func valueOf(m *fields.Message, f *fields.Field) any {
	if m.IsString(f) {
		return bounded(m.Bytes(f))
	}
	var buf [32]byte
	text := string(m.AppendText(buf[:0], f))
	if text == "true" || text == "false" {
		return text == "true"
	}
	if v, ok := m.Int(f); ok {
		return v
	}
	v, _ := strconv.ParseFloat(text, 64)
	return v
}
