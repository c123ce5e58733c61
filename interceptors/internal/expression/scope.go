package expression

import (
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"cel.dev/cel-go/common/types"
	"cel.dev/cel-go/common/types/ref"
	"cel.dev/cel-go/interpreter"
	"github.com/sluicegate/sluice/interceptors"
	"github.com/sluicegate/sluice/interceptors/fields"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/metadata"
)

// Scope is what an expression can ask about a call or an inference, beside its
// caller. It is not kept.
type Scope struct {
	Call *interceptors.Call
	// Via is how the caller proved its identity: "mtls", "jwt", "forwarded" or "anonymous".
	Via string
	// Peer is the identity of the connection's other end; zero if it has none.
	Peer spiffeid.ID
	// Inference and Message are nil as long as a call has begun no inference. The
	// message is nil too where an inference is judged again.
	Inference *interceptors.Inference
	Message   *fields.Message
	// Parameters are those of the message, where it is there no more; nil if
	// nobody kept them.
	Parameters Parameters
	// Now is the time; zero is the clock's.
	Now time.Time
}

// Caller is what expressions can ask of who calls what.
type Caller struct {
	id, trustDomain, path, segments, tenant, method ref.Val
}

// NewCaller is a caller by its SPIFFE ID, which may be zero, as that is written, its
// tenant and the full method that it calls.
func NewCaller(id spiffeid.ID, principal, tenant, method string) *Caller {
	segments := []string{}
	if path := id.Path(); path != "" {
		segments = strings.Split(path[1:], "/")
	}
	return &Caller{
		id:          types.String(principal),
		trustDomain: types.String(id.TrustDomain().Name()),
		path:        types.String(id.Path()),
		segments:    types.NewStringList(types.DefaultTypeAdapter, segments),
		tenant:      types.String(tenant),
		method:      types.String(method),
	}
}

// activation is a scope as CEL asks for it, one name at a time.
type activation struct {
	caller *Caller
	Scope
}

var activations = sync.Pool{New: func() any { return new(activation) }}

var _ interpreter.Activation = (*activation)(nil)

// Parent is none.
func (a *activation) Parent() interpreter.Activation { return nil }

// who is the caller, made when something of it is asked for.
func (a *activation) who() *Caller {
	if a.caller == nil {
		c := a.Call
		a.caller = NewCaller(c.ID, c.Principal, c.Tenant, c.FullMethod)
	}
	return a.caller
}

// ResolveName is the value of a variable.
func (a *activation) ResolveName(name string) (any, bool) {
	switch name {
	case "principal.id":
		return a.who().id, true
	case "principal.trust_domain":
		return a.who().trustDomain, true
	case "principal.path":
		return a.who().path, true
	case "principal.segments":
		return a.who().segments, true
	case "tenant":
		return a.who().tenant, true
	case "method":
		return a.who().method, true
	case "model":
		return bounded(a.Inference.Model), true
	case "version":
		return bounded(a.Inference.Version), true
	case "parameters":
		if a.Parameters == nil {
			a.Parameters = ReadParameters(a.Inference, a.Message)
		}
		return types.NewStringInterfaceMap(types.DefaultTypeAdapter, a.Parameters), true
	case "metadata":
		return types.NewStringInterfaceMap(types.DefaultTypeAdapter, headers(a.Call.Metadata)), true
	case "peer.id":
		if a.Peer.IsZero() {
			return "", true
		}
		return a.Peer.String(), true
	case "peer.address":
		if a.Call.Peer.Addr == nil {
			return "", true
		}
		return a.Call.Peer.Addr.String(), true
	case "peer.via":
		return a.Via, true
	case "time":
		if a.Now.IsZero() {
			return types.Timestamp{Time: time.Now()}, true
		}
		return types.Timestamp{Time: a.Now}, true
	}
	return nil, false
}

// bounded is a text that a caller chose, or an error in its place: an expression
// that looks at it cannot be decided.
func bounded[T string | []byte](text T) any {
	if len(text) > MaxText {
		return tooLong()
	}
	return string(text)
}

func tooLong() ref.Val { return types.NewErr("a text has more than %d bytes", MaxText) }

// headers are what an expression can see of a call's metadata: not what others
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
		if slices.ContainsFunc(had, func(v string) bool { return len(v) > MaxText }) {
			out[key] = tooLong()
		}
	}
	return out
}

// Parameters are those of an inference by name: strings, int64, float64
// and bool. Nil means that they are not known.
type Parameters map[string]any

// maxTokensParameter is the limit on output tokens, wherever a request states it.
const maxTokensParameter = "max_tokens"

// ReadParameters copies the parameters of a message. Those of the message itself
// go by their keys, any others by their paths. What lies in tensors is left out.
func ReadParameters(i *interceptors.Inference, m *fields.Message) Parameters {
	out := make(Parameters)
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
