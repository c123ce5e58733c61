package identity

import (
	"context"
	"maps"
	"slices"
	"strings"
	"testing"

	"github.com/sluicegate/sluice/interceptors"
	"github.com/sluicegate/sluice/interceptors/dialect"
	"github.com/sluicegate/sluice/interceptors/fields"
	configv1 "github.com/sluicegate/sluice/proto/gen/sluice/config/v1"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protodesc"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/descriptorpb"
	"google.golang.org/protobuf/types/dynamicpb"

	fieldsv1 "github.com/sluicegate/sluice/proto/gen/sluice/fields/v1"
)

// requestFor is a request of the method that names the model and the version.
func requestFor(m *dialect.Method, model, version string) proto.Message {
	msg := dynamicpb.NewMessage(m.Request.Descriptor())
	for n := range msg.Descriptor().Fields().Len() {
		fd := msg.Descriptor().Fields().Get(n)
		switch role := fields.RoleOf(fd, nil); {
		case role == fields.Model && model != "":
			msg.Set(fd, protoreflect.ValueOfString(model))
		case role == fields.ModelVersion && version != "":
			msg.Set(fd, protoreflect.ValueOfString(version))
		}
	}
	return msg
}

// calls makes a call with one request, as both doors do: the error of each.
func calls(t *testing.T, chain *interceptors.Chain, id string, m *dialect.Method, msg proto.Message) map[string]error {
	t.Helper()
	out := make(map[string]error)
	for door, e := range envelopes(t, msg) {
		info := callOf(id, m).CallInfo
		info.Metadata = metadata.MD{}
		call, err := chain.Begin(context.Background(), info)
		if err == nil {
			_, err = call.Request(e)
			call.End(nil)
		}
		e.Release()
		out[door] = err
	}
	return out
}

// Each principal, method, model and version of Triton's whole service: what is
// not in the list is refused.
func TestMatrix(t *testing.T) {
	d := tritonDialect(t)
	full := func(names string) (out []string) {
		for _, n := range words(names) {
			out = append(out, service+n)
		}
		return out
	}
	rule := func(principal, methods, models, versions string) *configv1.Rule {
		r := allow("spiffe://a/"+principal, "", models)
		for _, m := range words(methods) {
			if _, group := groups[m]; group {
				r.Methods = append(r.Methods, m)
			} else {
				r.Methods = append(r.Methods, full(m)...)
			}
		}
		r.Versions = words(versions)
		return r
	}
	denied := rule("carol", "inference", "m", "")
	denied.Deny = true
	stale := rule("dave", "inference", "", "1")
	stale.Deny = true
	p := newPolicy(t, secure(
		rule("alice", "inference metadata health", "m", ""),
		rule("bob", "inference", "m", "1"),
		rule("carol", "inference", "*", ""), denied,
		rule("dave", "inference metadata", "*", ""), stale,
		rule("deployer", "RepositoryModelLoad RepositoryModelUnload RepositoryIndex", "m", ""),
		rule("watcher", "ModelStatistics health", "*", ""),
		rule("tracer", "TraceSetting LogSettings", "m", ""),
		rule("memory", "SystemSharedMemoryRegister CudaSharedMemoryStatus", "", ""),
	))
	chain := interceptors.New([]*interceptors.Backend{{Name: "triton", Dialect: d}}, p)

	const every = "m/ m/1 m/2 n/ n/1 n/2"
	want := map[string]bool{}
	for _, row := range [][3]string{
		{"alice", "ModelInfer ModelStreamInfer ModelMetadata ModelReady", "m/ m/1 m/2"},
		{"alice", "ServerLive ServerReady ServerMetadata", "/"},
		{"bob", "ModelInfer ModelStreamInfer", "m/1"},
		{"carol", "ModelInfer ModelStreamInfer", "n/ n/1 n/2"},
		{"dave", "ModelInfer ModelStreamInfer", "m/2 n/2 /2"},
		{"dave", "ModelMetadata", every + " / /1 /2"},
		{"dave", "ServerMetadata", "/"},
		{"deployer", "RepositoryModelLoad RepositoryModelUnload", "m/"},
		{"deployer", "RepositoryIndex", "/"},
		{"watcher", "ModelStatistics ModelReady", every + " / /1 /2"},
		{"watcher", "ServerLive ServerReady", "/"},
		{"tracer", "TraceSetting", "m/"},
		{"tracer", "LogSettings", "/"},
		{"memory", "SystemSharedMemoryRegister CudaSharedMemoryStatus", "/"},
	} {
		for _, m := range words(row[1]) {
			for _, what := range words(row[2]) {
				want[row[0]+" "+m+" "+what] = true
			}
		}
	}
	seen := 0
	for _, who := range words("alice bob carol dave deployer watcher tracer memory nobody") {
		for _, name := range slices.Sorted(maps.Keys(d.Methods)) {
			m := d.Methods[name]
			versioned := m.Request.Reports(fields.ModelVersion)
			for _, model := range []string{"", "m", "n"} {
				for _, version := range []string{"", "1", "2"} {
					if model != "" && !m.NamesModel || version != "" && !versioned {
						continue
					}
					key := who + " " + strings.TrimPrefix(name, service) + " " + model + "/" + version
					for door, err := range calls(t, chain, "spiffe://a/"+who, m, requestFor(m, model, version)) {
						if (err == nil) != want[key] {
							t.Errorf("%s, %s: %v, want allowed %t", key, door, err, want[key])
						}
					}
					if want[key] {
						seen++
					}
				}
			}
		}
	}
	if seen != len(want) {
		t.Errorf("%d of %d that are allowed were tried", seen, len(want))
	}
}

// ownAPI is a user's own API, with methods of every kind.
const ownAPI = "acme/llm.proto"

func ownDialect(t testing.TB) *dialect.Dialect {
	t.Helper()
	role := func(r fieldsv1.Role) *descriptorpb.FieldOptions {
		o := new(descriptorpb.FieldOptions)
		proto.SetExtension(o, fieldsv1.E_Role, r)
		return o
	}
	text := func(name string, number int32, r fieldsv1.Role) *descriptorpb.FieldDescriptorProto {
		return &descriptorpb.FieldDescriptorProto{
			Name: &name, Number: &number, Type: descriptorpb.FieldDescriptorProto_TYPE_STRING.Enum(),
			Label: descriptorpb.FieldDescriptorProto_LABEL_OPTIONAL.Enum(), Options: role(r),
		}
	}
	list := &descriptorpb.FieldDescriptorProto{
		Name: proto.String("models"), Number: proto.Int32(4), Type: descriptorpb.FieldDescriptorProto_TYPE_MESSAGE.Enum(),
		TypeName: proto.String(".acme.Model"), Label: descriptorpb.FieldDescriptorProto_LABEL_REPEATED.Enum(),
	}
	method := func(name, in, out string) *descriptorpb.MethodDescriptorProto {
		return &descriptorpb.MethodDescriptorProto{Name: &name, InputType: proto.String(".acme." + in), OutputType: proto.String(".acme." + out)}
	}
	set := &descriptorpb.FileDescriptorSet{File: []*descriptorpb.FileDescriptorProto{
		protodesc.ToFileDescriptorProto(descriptorpb.File_google_protobuf_descriptor_proto),
		protodesc.ToFileDescriptorProto(fieldsv1.File_sluice_fields_v1_fields_proto),
		{
			Name: proto.String(ownAPI), Package: proto.String("acme"), Syntax: proto.String("proto3"),
			Dependency: []string{"sluice/fields/v1/fields.proto"},
			MessageType: []*descriptorpb.DescriptorProto{
				{Name: proto.String("Ask"), Field: []*descriptorpb.FieldDescriptorProto{
					text("model", 1, fields.Model), text("version", 2, fields.ModelVersion), text("question", 3, fields.Prompt)}},
				{Name: proto.String("Answer"), Field: []*descriptorpb.FieldDescriptorProto{text("text", 1, fields.Output)}},
				{Name: proto.String("Model"), Field: []*descriptorpb.FieldDescriptorProto{
					text("name", 7, fields.ListedModel), text("tag", 3, fields.ListedVersion), text("about", 1, fields.Identifier)}},
				{Name: proto.String("None")},
				{Name: proto.String("List"), Field: []*descriptorpb.FieldDescriptorProto{text("title", 1, fields.Identifier), list}},
			},
			Service: []*descriptorpb.ServiceDescriptorProto{{Name: proto.String("LLM"), Method: []*descriptorpb.MethodDescriptorProto{
				method("Ask", "Ask", "Answer"), method("Describe", "Ask", "Model"), method("ListModels", "None", "List"),
			}}},
		},
	}}
	d, err := dialect.Fields(set, dialect.Options{})
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func everyDialect(t testing.TB) map[string]*dialect.Dialect {
	t.Helper()
	out := map[string]*dialect.Dialect{"triton": tritonDialect(t), "own": ownDialect(t)}
	for name, open := range map[string]func(dialect.Options) (*dialect.Dialect, error){"mlserver": dialect.MLServer, "kserve": dialect.KServe} {
		d, err := open(dialect.Options{})
		if err != nil {
			t.Fatal(err)
		}
		out[name] = d
	}
	return out
}

// Of no method's answer can be told whether a model that the caller may not use
// is there.
func TestModelsAreNotRevealed(t *testing.T) {
	tried := 0
	for name, d := range everyDialect(t) {
		for _, m := range d.Methods {
			if !m.NamesModel {
				continue
			}
			p := newPolicy(t, secure(allow("spiffe://a/x", m.Name, "open"), allow("spiffe://a/all", m.Name, "*")))
			said := make(map[string]bool)
			for _, model := range []string{"hidden", "absent"} {
				for _, served := range []map[string]bool{nil, {"open": true, "hidden": true}} {
					chain := interceptors.New([]*interceptors.Backend{{Name: name, Dialect: d, Models: served}}, p)
					for door, err := range calls(t, chain, "spiffe://a/x", m, requestFor(m, model, "")) {
						s, ok := status.FromError(err)
						if err == nil || !ok {
							t.Fatalf("%s %s %s: %v", name, m.Name, door, err)
						}
						said[strings.ReplaceAll(s.Proto().String(), model, "MODEL")] = true
					}
				}
			}
			// Who may use every model is told the same of one that is not there.
			chain := interceptors.New([]*interceptors.Backend{{Name: name, Dialect: d, Models: map[string]bool{"open": true}}}, p)
			for _, err := range calls(t, chain, "spiffe://a/all", m, requestFor(m, "absent", "")) {
				said[strings.ReplaceAll(status.Convert(err).Proto().String(), "absent", "MODEL")] = true
			}
			if len(said) != 1 {
				t.Errorf("%s %s: %d different answers: %q", name, m.Name, len(said), slices.Collect(maps.Keys(said)))
			}
			for door, err := range calls(t, chain, "spiffe://a/x", m, requestFor(m, "open", "")) {
				if err != nil {
					t.Errorf("%s %s %s: the model that may be used: %v", name, m.Name, door, err)
				}
			}
			tried++
		}
	}
	if tried < 29 {
		t.Errorf("only %d methods were tried", tried)
	}
}
