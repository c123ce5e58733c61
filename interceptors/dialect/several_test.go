package dialect

import (
	"testing"

	"github.com/sluicegate/sluice/interceptors/fields"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protodesc"
	"google.golang.org/protobuf/types/descriptorpb"

	fieldsv1 "github.com/sluicegate/sluice/proto/gen/sluice/fields/v1"
)

// Of several models in one message only one would be judged.
func TestAMessageForSeveralModelsIsRefused(t *testing.T) {
	field := func(name string, number int32, r fieldsv1.Role) *descriptorpb.FieldDescriptorProto {
		o := new(descriptorpb.FieldOptions)
		proto.SetExtension(o, fieldsv1.E_Role, r)
		return &descriptorpb.FieldDescriptorProto{Name: &name, Number: &number, Options: o,
			Type: descriptorpb.FieldDescriptorProto_TYPE_STRING.Enum(), Label: descriptorpb.FieldDescriptorProto_LABEL_REPEATED.Enum()}
	}
	d, err := Fields(&descriptorpb.FileDescriptorSet{File: []*descriptorpb.FileDescriptorProto{
		protodesc.ToFileDescriptorProto(descriptorpb.File_google_protobuf_descriptor_proto),
		protodesc.ToFileDescriptorProto(fieldsv1.File_sluice_fields_v1_fields_proto),
		{
			Name: proto.String("a.proto"), Package: proto.String("a"), Syntax: proto.String("proto3"),
			Dependency: []string{"sluice/fields/v1/fields.proto"},
			MessageType: []*descriptorpb.DescriptorProto{{Name: proto.String("M"),
				Field: []*descriptorpb.FieldDescriptorProto{field("model", 1, fields.Model), field("version", 2, fields.ModelVersion)}}},
			Service: []*descriptorpb.ServiceDescriptorProto{{Name: proto.String("S"), Method: []*descriptorpb.MethodDescriptorProto{
				{Name: proto.String("Do"), InputType: proto.String(".a.M"), OutputType: proto.String(".a.M")}}}},
		},
	}}, Options{})
	if err != nil {
		t.Fatal(err)
	}
	m := d.Methods["/a.S/Do"]
	str := func(n protowire.Number, s string) []byte {
		return protowire.AppendString(protowire.AppendTag(nil, n, protowire.BytesType), s)
	}
	for _, c := range []struct {
		name   string
		fields [][]byte
		ok     bool
	}{
		{"one", [][]byte{str(1, "m"), str(2, "1")}, true},
		{"the same again", [][]byte{str(1, "m"), str(2, "1"), str(1, "m"), str(2, "1")}, true},
		{"two models", [][]byte{str(1, "m"), str(1, "n")}, false},
		{"a model and none", [][]byte{str(1, "m"), str(1, "")}, false},
		{"two versions", [][]byte{str(1, "m"), str(2, "1"), str(2, "2")}, false},
	} {
		var b []byte
		for _, f := range c.fields {
			b = append(b, f...)
		}
		msg, err := scan(t, m.Request, b)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := m.ReadRequest(msg); (err == nil) != c.ok || err != nil && kindOf(err) != fields.Ambiguous {
			t.Errorf("%s: %v", c.name, err)
		}
	}
}
