package dialect

import (
	_ "embed"
	"errors"
	"fmt"
	"maps"
	"sync"

	"github.com/sluicegate/sluice/interceptors/fields"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protodesc"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/descriptorpb"
)

// Options are what a back end's configuration adds to a dialect.
type Options struct {
	// Tensors gives roles to tensors by name, beside those that the dialect knows. What has
	// the role of a text is one as BYTES, and as UINT8 or INT8 of its bytes; other types of it are
	// refused in requests.
	Tensors map[string]fields.Role
	// Fields gives roles to fields by full name.
	Fields map[protoreflect.FullName]fields.Role
	// Lenient takes requests that decoders may read differently.
	Lenient bool
	// Allow are fields, by full name, that the dialect forbids and that callers may
	// set all the same.
	Allow []protoreflect.FullName
	// Model is what requests are for that cannot name a model.
	Model string
	// MaxFields bounds the fields of one message; 0 means the default of package fields.
	MaxFields int
}

// apisPB is what proto has of model servers' APIs, with imports, as a
// FileDescriptorSet; made by make generate.
//
//go:embed apis.binpb
var apisPB []byte

// apis is parsed once, and never changed.
var apis = sync.OnceValues(func() (*descriptorpb.FileDescriptorSet, error) {
	set := new(descriptorpb.FileDescriptorSet)
	if err := proto.Unmarshal(apisPB, set); err != nil {
		return nil, fmt.Errorf("dialect: embedded descriptors: %w", err)
	}
	return set, nil
})

// openInferenceKinds says what the methods of inference.GRPCInferenceService
// are for. What is not listed is management.
var openInferenceKinds = map[string]Kind{
	"ServerLive":       Health,
	"ServerReady":      Health,
	"ModelReady":       Health,
	"ServerMetadata":   Metadata,
	"ModelMetadata":    Metadata,
	"ModelInfer":       Inference,
	"ModelStreamInfer": Inference,
}

// languageTensors are the tensors of the vLLM and TensorRT-LLM back ends that
// are not simply prompt or output.
var languageTensors = map[string]fields.Role{
	"sampling_parameters":  fields.Parameter,
	"embedding_request":    fields.Parameter,
	"bad_words":            fields.Parameter,
	"stop_words":           fields.Parameter,
	"embedding_bias_words": fields.Parameter,
	"max_tokens":           fields.MaxTokens,
	"request_output_len":   fields.MaxTokens,
	"num_input_tokens":     fields.InputTokens,
	"num_output_tokens":    fields.OutputTokens,
	"finish_reason":        fields.Parameter, // not a word of the answer, nor of its price
}

// Triton is the Open Inference Protocol as Triton Inference Server speaks it,
// with the tensors of its vLLM and TensorRT-LLM back ends.
func Triton(o Options) (*Dialect, error) {
	return openInference("triton", o, nil, func(m *Method) {
		m.triton = true
		m.Multiplexed = m.ClientStreams
	})
}

// MLServer is the Open Inference Protocol as Seldon's MLServer speaks it: its
// stream answers with bare ModelInferResponse messages and belongs to the model
// of its first message.
func MLServer(o Options) (*Dialect, error) {
	return openInference("mlserver", o, func(f *descriptorpb.FileDescriptorProto) {
		threeParameterKinds(f)
		for _, m := range f.Service[0].Method {
			if m.GetName() == "ModelStreamInfer" {
				m.OutputType = proto.String(".inference.ModelInferResponse")
			}
		}
	}, nil)
}

// KServe is the Open Inference Protocol as KServe's Python model server speaks
// it: one answer to one request.
func KServe(o Options) (*Dialect, error) {
	return openInference("kserve", o, func(f *descriptorpb.FileDescriptorProto) {
		threeParameterKinds(f)
		for _, m := range f.MessageType {
			switch m.GetName() {
			case "RepositoryModelLoadRequest", "RepositoryModelUnloadRequest":
				modelFirst(m)
			}
		}
	}, func(m *Method) {
		if m.ClientStreams {
			m.Kind = Management // not there
		}
	})
}

// modelFirst leaves a message the field model_name, under the number 1.
func modelFirst(m *descriptorpb.DescriptorProto) {
	for _, fd := range m.Field {
		if fd.GetName() == "model_name" {
			fd.Number = proto.Int32(1)
			m.Field, m.NestedType = []*descriptorpb.FieldDescriptorProto{fd}, nil
			return
		}
	}
}

// threeParameterKinds leaves InferParameter the kinds bool, int64 and string.
func threeParameterKinds(f *descriptorpb.FileDescriptorProto) {
	for _, m := range f.MessageType {
		if m.GetName() != "InferParameter" {
			continue
		}
		kept := m.Field[:0]
		for _, fd := range m.Field {
			if fd.GetNumber() <= 3 {
				kept = append(kept, fd)
			}
		}
		m.Field = kept
	}
}

func openInference(name string, o Options, change func(*descriptorpb.FileDescriptorProto), adjust func(*Method)) (*Dialect, error) {
	set, err := apis()
	if err != nil {
		return nil, err
	}
	set = proto.CloneOf(set)
	for _, f := range set.File {
		if f.GetPackage() == "inference" && change != nil {
			change(f)
		}
	}
	d := newDialect(name, o, languageTensors)
	err = d.add(set, o, func(sd protoreflect.ServiceDescriptor, md protoreflect.MethodDescriptor) (Kind, bool) {
		return openInferenceKinds[string(md.Name())], sd.FullName() == "inference.GRPCInferenceService"
	})
	if err != nil {
		return nil, err
	}
	if adjust != nil {
		for _, m := range d.Methods {
			adjust(m)
		}
	}
	return d, nil
}

// Fields is any API whose fields have roles, by option in its .proto or by
// o.Fields. A method whose messages hold a prompt, an output or a model is
// inference; a call is one inference, and further messages extend it. Any other
// method is management.
func Fields(set *descriptorpb.FileDescriptorSet, o Options) (*Dialect, error) {
	d := newDialect("fields", o, nil)
	err := d.add(set, o, func(_ protoreflect.ServiceDescriptor, md protoreflect.MethodDescriptor) (Kind, bool) {
		seen := make(map[protoreflect.FullName]bool)
		in := speaks(md.Input(), o.Fields, seen)
		out := speaks(md.Output(), o.Fields, seen)
		if in || out {
			return Inference, true
		}
		return Management, true
	})
	if err != nil {
		return nil, err
	}
	if len(d.Methods) == 0 {
		return nil, errors.New("the descriptor set has no service")
	}
	return d, nil
}

// speaks reports whether a message holds a prompt, an output or a model.
func speaks(md protoreflect.MessageDescriptor, overlay map[protoreflect.FullName]fields.Role, seen map[protoreflect.FullName]bool) bool {
	if seen[md.FullName()] {
		return false
	}
	seen[md.FullName()] = true
	found := false
	for n := range md.Fields().Len() {
		fd := md.Fields().Get(n)
		switch fields.RoleOf(fd, overlay) {
		case fields.Prompt, fields.Output, fields.Model:
			found = true
		}
		if fd.Message() != nil && speaks(fd.Message(), overlay, seen) {
			found = true
		}
	}
	return found
}

func newDialect(name string, o Options, tensors map[string]fields.Role) *Dialect {
	return &Dialect{Name: name, Methods: make(map[string]*Method), tensors: merged(tensors, o.Tensors), texts: textTensors(o.Tensors), model: o.Model}
}

// add compiles the methods of a descriptor set that want says are wanted.
func (d *Dialect) add(set *descriptorpb.FileDescriptorSet, o Options,
	want func(protoreflect.ServiceDescriptor, protoreflect.MethodDescriptor) (Kind, bool),
) error {
	files, err := protodesc.NewFiles(set)
	if err != nil {
		return fmt.Errorf("descriptor set: %w", err)
	}
	overlay := maps.Clone(o.Fields)
	for _, name := range o.Allow {
		if overlay == nil {
			overlay = make(map[protoreflect.FullName]fields.Role)
		}
		overlay[name] = fields.None
	}
	request := fields.Options{Overlay: overlay, Text: fields.Prompt, Bytes: d.texts, Strict: !o.Lenient, MaxFields: o.MaxFields}
	// Of a response nobody reads what names things: there are many, and each chunk has them again.
	response := fields.Options{Overlay: o.Fields, Text: fields.Output, Bytes: d.texts, MaxFields: o.MaxFields,
		Omit: []fields.Role{fields.Identifier, fields.Model, fields.ModelVersion, fields.Forbidden}}
	known := make(map[protoreflect.FullName]bool)
	files.RangeFiles(func(f protoreflect.FileDescriptor) bool {
		for s := range f.Services().Len() {
			sd := f.Services().Get(s)
			for n := range sd.Methods().Len() {
				md := sd.Methods().Get(n)
				kind, ok := want(sd, md)
				if !ok {
					continue
				}
				m := &Method{
					Name:          fmt.Sprintf("/%s/%s", sd.FullName(), md.Name()),
					Kind:          kind,
					ClientStreams: md.IsStreamingClient(),
					ServerStreams: md.IsStreamingServer(),
					RequestType:   string(md.Input().FullName()),
					ResponseType:  string(md.Output().FullName()),
					dialect:       d,
				}
				if m.Request, err = fields.Compile(md.Input(), request); err != nil {
					return false
				}
				if m.Response, err = fields.Compile(md.Output(), response); err != nil {
					return false
				}
				d.Methods[m.Name] = m
				m.NamesModel = m.Request.Reports(fields.Model)
				m.ListsModels = m.Response.Reports(fields.ListedModel)
				names(md.Input(), known)
				names(md.Output(), known)
			}
		}
		return true
	})
	if err != nil {
		return err
	}
	for name := range overlay {
		if !known[name] {
			return fmt.Errorf("field %s: no method uses a message with that field; its name is \"package.Message.field\"", name)
		}
	}
	return nil
}

// names collects the names of the fields of a message and of those in it: true,
// beside the names of the messages.
func names(md protoreflect.MessageDescriptor, known map[protoreflect.FullName]bool) {
	if _, seen := known[md.FullName()]; seen {
		return
	}
	known[md.FullName()] = false // a message, not a field
	for n := range md.Fields().Len() {
		fd := md.Fields().Get(n)
		known[fd.FullName()] = true
		if fd.Message() != nil {
			names(fd.Message(), known)
		}
	}
}

// textTensors are the names of the tensors that have the role of a text.
func textTensors(tensors map[string]fields.Role) map[string]bool {
	out := make(map[string]bool)
	for name, r := range tensors {
		if fields.IsText(r) {
			out[name] = true
		}
	}
	return out
}

func merged(a, b map[string]fields.Role) map[string]fields.Role {
	out := make(map[string]fields.Role, len(a)+len(b))
	for k, v := range a {
		out[k] = v
	}
	for k, v := range b {
		out[k] = v
	}
	return out
}
