package dialect

import (
	"strings"
	"testing"

	"github.com/sluicegate/sluice/interceptors/fields"
	"google.golang.org/protobuf/encoding/prototext"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protodesc"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/descriptorpb"
	"google.golang.org/protobuf/types/dynamicpb"
)

// acme is an API of somebody's own, without role options.
const acme = `file {
  name: "acme.proto" package: "acme" syntax: "proto3"
  message_type { name: "Ask"
    field { name: "model" number: 1 type: TYPE_STRING label: LABEL_OPTIONAL }
    field { name: "question" number: 2 type: TYPE_STRING label: LABEL_OPTIONAL }
    field { name: "limit" number: 3 type: TYPE_INT32 label: LABEL_OPTIONAL }
    field { name: "session" number: 4 type: TYPE_UINT64 label: LABEL_OPTIONAL }
    field { name: "name" number: 5 type: TYPE_STRING label: LABEL_OPTIONAL }
    field { name: "version" number: 6 type: TYPE_STRING label: LABEL_OPTIONAL }
  }
  message_type { name: "Answer"
    field { name: "text" number: 1 type: TYPE_STRING label: LABEL_OPTIONAL }
    field { name: "read" number: 2 type: TYPE_INT32 label: LABEL_OPTIONAL }
    field { name: "written" number: 3 type: TYPE_INT32 label: LABEL_OPTIONAL }
    field { name: "total" number: 4 type: TYPE_INT64 label: LABEL_OPTIONAL }
    field { name: "done" number: 5 type: TYPE_BOOL label: LABEL_OPTIONAL }
    field { name: "error" number: 6 type: TYPE_STRING label: LABEL_OPTIONAL }
  }
  message_type { name: "Nothing" }
  service { name: "Oracle"
    method { name: "Ask" input_type: ".acme.Ask" output_type: ".acme.Answer" }
    method { name: "Stream" input_type: ".acme.Ask" output_type: ".acme.Answer" server_streaming: true }
    method { name: "Upload" input_type: ".acme.Ask" output_type: ".acme.Answer" client_streaming: true }
    method { name: "Chat" input_type: ".acme.Ask" output_type: ".acme.Answer" client_streaming: true server_streaming: true }
    method { name: "Reset" input_type: ".acme.Nothing" output_type: ".acme.Nothing" }
  }
}`

var acmeRoles = map[protoreflect.FullName]fields.Role{
	"acme.Ask.model": fields.Model, "acme.Ask.question": fields.Prompt, "acme.Ask.limit": fields.MaxTokens,
	"acme.Ask.session": fields.SequenceID, "acme.Ask.name": fields.RequestID, "acme.Ask.version": fields.ModelVersion,
	"acme.Answer.text": fields.Output, "acme.Answer.read": fields.InputTokens, "acme.Answer.written": fields.OutputTokens,
	"acme.Answer.total": fields.OutputTokensTotal, "acme.Answer.done": fields.Final, "acme.Answer.error": fields.ErrorText,
}

func acmeSet(t testing.TB) *descriptorpb.FileDescriptorSet {
	t.Helper()
	set := new(descriptorpb.FileDescriptorSet)
	if err := prototext.Unmarshal([]byte(acme), set); err != nil {
		t.Fatal(err)
	}
	return set
}

// acmeMessage makes a message of the API from its text form.
func acmeMessage(t testing.TB, name, text string) proto.Message {
	t.Helper()
	files, err := protodesc.NewFiles(acmeSet(t))
	if err != nil {
		t.Fatal(err)
	}
	d, err := files.FindDescriptorByName(protoreflect.FullName("acme." + name))
	if err != nil {
		t.Fatal(err)
	}
	m := dynamicpb.NewMessage(d.(protoreflect.MessageDescriptor))
	if err := prototext.Unmarshal([]byte(text), m); err != nil {
		t.Fatal(err)
	}
	return m
}

func TestAMethodWithRolesIsInferenceAndAnyOtherIsManagement(t *testing.T) {
	d, err := Fields(acmeSet(t), Options{Fields: acmeRoles})
	if err != nil {
		t.Fatal(err)
	}
	want := map[string]Kind{"Ask": Inference, "Stream": Inference, "Upload": Inference, "Chat": Inference, "Reset": Management}
	for name, kind := range want {
		m := d.Methods["/acme.Oracle/"+name]
		if m == nil {
			t.Errorf("there is no method %s", name)
			continue
		}
		if m.Kind != kind || m.Multiplexed {
			t.Errorf("%s: kind %d, multiplexed %t", name, m.Kind, m.Multiplexed)
		}
		if b := m.Refusal("m", "a", "t", "c", "r", 0); b != nil {
			t.Errorf("%s refuses in band", name)
		}
	}
	if len(d.Methods) != len(want) {
		t.Errorf("%d methods, want %d", len(d.Methods), len(want))
	}
	plain, err := Fields(acmeSet(t), Options{})
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range plain.Methods {
		if m.Kind != Management {
			t.Errorf("%s has no role and is not management", m.Name)
		}
	}
}

func TestFieldsWithRolesAreReadAsWhatTheyMean(t *testing.T) {
	d, err := Fields(acmeSet(t), Options{Fields: acmeRoles})
	if err != nil {
		t.Fatal(err)
	}
	m := d.Methods["/acme.Oracle/Chat"]
	ask := acmeMessage(t, "Ask", `model: "m" version: "2" question: "why" limit: 7 session: 42 name: "a"`)
	bothWays(t, m.Request, ask, func(t *testing.T, msg *fields.Message) {
		r, err := m.ReadRequest(msg)
		if err != nil || r.Model != "m" || r.Version != "2" || r.ID != "a" || r.Sequence != "42" || r.MaxTokens != 7 {
			t.Errorf("got %+v, %v", r, err)
		}
	})
	for _, limit := range []string{"-1", "-2147483648"} {
		bothWays(t, m.Request, acmeMessage(t, "Ask", "limit: "+limit), func(t *testing.T, msg *fields.Message) {
			if _, err := m.ReadRequest(msg); kindOf(err) != fields.Malformed {
				t.Errorf("limit %s: got %v", limit, err)
			}
		})
	}
	answer := acmeMessage(t, "Answer", `text: "because" read: 1 written: 2 total: 30 done: true error: "oh"`)
	bothWays(t, m.Response, answer, func(t *testing.T, msg *fields.Message) {
		r := m.ReadResponse(msg)
		if r.InputTokens != 1 || r.OutputTokens != 2 || r.OutputTotal != 30 || !r.Failed || r.Empty || r.Final {
			t.Errorf("got %+v", r)
		}
	})
}

func TestAnOverlayThatMeetsNothingIsAnError(t *testing.T) {
	for _, c := range []struct {
		name  string
		set   *descriptorpb.FileDescriptorSet
		roles map[protoreflect.FullName]fields.Role
		want  string
	}{
		{"message that no method uses", acmeSet(t), map[protoreflect.FullName]fields.Role{"acme.Asks.question": fields.Prompt}, "acme.Asks.question"},
		{"field that the message does not have", acmeSet(t), map[protoreflect.FullName]fields.Role{"acme.Ask.questions": fields.Prompt}, "acme.Ask.questions"},
		{"role that the field cannot have", acmeSet(t), map[protoreflect.FullName]fields.Role{"acme.Ask.limit": fields.Prompt}, "acme.Ask.limit"},
		{"a message in place of a field", acmeSet(t), map[protoreflect.FullName]fields.Role{"acme.Ask": fields.Prompt}, "acme.Ask"},
		{"no service", &descriptorpb.FileDescriptorSet{}, nil, "no service"},
	} {
		t.Run(c.name, func(t *testing.T) {
			if _, err := Fields(c.set, Options{Fields: c.roles}); err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %v, want an error that names %s", err, c.want)
			}
		})
	}
}
