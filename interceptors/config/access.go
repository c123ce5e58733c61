package config

import (
	"fmt"
	"os"
	"path/filepath"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"go.yaml.in/yaml/v3"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/sluicegate/sluice/interceptors"
	"github.com/sluicegate/sluice/interceptors/identity"
	authzv1 "github.com/sluicegate/sluice/proto/gen/sluice/authz/v1"
	configv1 "github.com/sluicegate/sluice/proto/gen/sluice/config/v1"
)

// Access is who may do what under a configuration. It opens nothing.
type Access struct {
	policy   *identity.Policy
	backends []*interceptors.Backend
}

// NewAccess compiles a configuration, of which own are what the program serves
// itself. An error begins with the field that is at fault.
func NewAccess(cfg *configv1.Config, own ...*interceptors.Backend) (*Access, error) {
	g, err := compile(cfg, &Guard{config: new(configv1.Config)}, Options{Own: own})
	if err != nil {
		return nil, err
	}
	return &Access{policy: g.identity, backends: append(g.backends, own...)}, nil
}

// Explain decides about a request for a method, by its full name: as the rules
// do, and as it would find its way to a back end.
func (a *Access) Explain(method string, q identity.Question) identity.Explanation {
	q.Method = nil
	routed := false
	for _, b := range a.backends {
		m := b.Dialect.Methods[method]
		switch {
		case m == nil, q.Method != nil && (routed || m.Kind != q.Method.Kind):
			continue
		case q.Model == "" || b.Models == nil || b.Models[q.Model]:
			q.Method, routed = m, true
		case q.Method == nil:
			q.Method = m
		}
	}
	x := a.policy.Explain(q)
	if x.Allowed && !routed {
		x.Allowed, x.Reason = false, interceptors.ModelDenied
		x.Why = "no back end serves the model"
	}
	return x
}

// Case decides about a case of a test file.
func (a *Access) Case(c *authzv1.Case) (identity.Explanation, error) {
	id, err := Principal(c.GetPrincipal())
	if err != nil {
		return identity.Explanation{}, fmt.Errorf("principal: %w", err)
	}
	q := identity.Question{
		Principal: id, Model: c.GetModel(), Version: c.GetVersion(),
		Parameters: make(map[string]any), Metadata: metadata.New(c.GetMetadata()),
	}
	if c.GetTime() != nil {
		q.Time = c.GetTime().AsTime()
	}
	for name, v := range c.GetParameters() {
		q.Parameters[name] = parameter(v)
	}
	return a.Explain(c.GetMethod(), q), nil
}

// parameter is a value as a request has it: a whole number is an integer.
func parameter(v *structpb.Value) any {
	if n, ok := v.GetKind().(*structpb.Value_NumberValue); ok && n.NumberValue == float64(int64(n.NumberValue)) {
		return int64(n.NumberValue)
	}
	return v.AsInterface()
}

// Principal reads a SPIFFE ID, or "anonymous", which is the zero ID.
func Principal(text string) (spiffeid.ID, error) {
	if text == "anonymous" {
		return spiffeid.ID{}, nil
	}
	return spiffeid.FromString(text)
}

// ReadTest reads a file of authorization tests. An error names the file, the
// line and the field. The configuration file is taken from the folder of the
// test file.
func ReadTest(file string) (*authzv1.Test, error) {
	text, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	test := new(authzv1.Test)
	if err := unmarshal(file, text, test); err != nil {
		return nil, err
	}
	if !filepath.IsAbs(test.GetConfig()) {
		test.Config = filepath.Join(filepath.Dir(file), test.GetConfig())
	}
	return test, nil
}

// Lines are the places of fields in a YAML file, as "file:line:column"; the file
// alone for a field that is not there.
func Lines(file string, paths ...string) []string {
	var doc yaml.Node
	text, err := os.ReadFile(file)
	if err == nil {
		err = yaml.Unmarshal(text, &doc)
	}
	out := make([]string, len(paths))
	for n, path := range paths {
		out[n] = file
		if err != nil {
			continue
		}
		if at := find(&doc, path); at != nil {
			out[n] = fmt.Sprintf("%s:%d:%d", file, at.Line, at.Column)
		}
	}
	return out
}
