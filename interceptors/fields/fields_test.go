package fields

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"go.uber.org/goleak"
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/encoding/prototext"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protodesc"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
	"google.golang.org/protobuf/types/descriptorpb"
	"google.golang.org/protobuf/types/dynamicpb"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// inferenceFiles are the descriptors of the Open Inference Protocol.
var inferenceFiles = sync.OnceValue(func() *protoregistry.Files {
	b, err := os.ReadFile("../dialect/apis.binpb")
	if err != nil {
		panic(err)
	}
	set := new(descriptorpb.FileDescriptorSet)
	if err := proto.Unmarshal(b, set); err != nil {
		panic(err)
	}
	files, err := protodesc.NewFiles(set)
	if err != nil {
		panic(err)
	}
	return files
})

func inference(name string) protoreflect.MessageDescriptor {
	d, err := inferenceFiles().FindDescriptorByName(protoreflect.FullName("inference." + name))
	if err != nil {
		panic(err)
	}
	return d.(protoreflect.MessageDescriptor)
}

func compile(t testing.TB, md protoreflect.MessageDescriptor, opts Options) *Program {
	t.Helper()
	p, err := Compile(md, opts)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// file builds a file descriptor from its text form; {role: X} is short for the
// role option.
func file(t testing.TB, text string) protoreflect.FileDescriptor {
	t.Helper()
	fd := new(descriptorpb.FileDescriptorProto)
	if err := prototext.Unmarshal([]byte(text), fd); err != nil {
		t.Fatal(err)
	}
	d, err := protodesc.NewFile(fd, protoregistry.GlobalFiles)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// zoo has a field of every kind, in every way that fields can stand.
const zoo = `
name: "zoo.proto" package: "zoo" syntax: "proto3" dependency: "sluice/fields/v1/fields.proto"
message_type {
  name: "Zoo"
  field { name: "prompt" number: 1 type: TYPE_STRING label: LABEL_OPTIONAL options { [sluice.fields.v1.role]: ROLE_PROMPT } }
  field { name: "max_tokens" number: 2 type: TYPE_INT32 label: LABEL_OPTIONAL options { [sluice.fields.v1.role]: ROLE_MAX_TOKENS } }
  field { name: "final" number: 3 type: TYPE_BOOL label: LABEL_OPTIONAL options { [sluice.fields.v1.role]: ROLE_FINAL } }
  field { name: "used" number: 4 type: TYPE_UINT64 label: LABEL_OPTIONAL options { [sluice.fields.v1.role]: ROLE_OUTPUT_TOKENS } }
  field { name: "blob" number: 5 type: TYPE_BYTES label: LABEL_OPTIONAL options { [sluice.fields.v1.role]: ROLE_OPAQUE } }
  field { name: "stops" number: 6 type: TYPE_STRING label: LABEL_REPEATED }
  field { name: "text" number: 7 type: TYPE_STRING label: LABEL_OPTIONAL oneof_index: 0 options { [sluice.fields.v1.role]: ROLE_PROMPT } }
  field { name: "sub" number: 8 type: TYPE_MESSAGE type_name: ".zoo.Zoo" label: LABEL_OPTIONAL oneof_index: 0 }
  field { name: "other" number: 9 type: TYPE_MESSAGE type_name: ".zoo.Leaf" label: LABEL_OPTIONAL oneof_index: 0 }
  field { name: "count" number: 10 type: TYPE_SINT64 label: LABEL_OPTIONAL oneof_index: 0 options { [sluice.fields.v1.role]: ROLE_PARAMETER } }
  field { name: "one" number: 11 type: TYPE_MESSAGE type_name: ".zoo.Zoo" label: LABEL_OPTIONAL }
  field { name: "many" number: 12 type: TYPE_MESSAGE type_name: ".zoo.Zoo" label: LABEL_REPEATED }
  field { name: "by_name" number: 13 type: TYPE_MESSAGE type_name: ".zoo.Zoo.ByNameEntry" label: LABEL_REPEATED }
  field { name: "by_number" number: 14 type: TYPE_MESSAGE type_name: ".zoo.Zoo.ByNumberEntry" label: LABEL_REPEATED }
  field { name: "numbers" number: 15 type: TYPE_MESSAGE type_name: ".zoo.Zoo.NumbersEntry" label: LABEL_REPEATED options { [sluice.fields.v1.role]: ROLE_PARAMETER } }
  field { name: "packed" number: 16 type: TYPE_SINT32 label: LABEL_REPEATED }
  field { name: "unpacked" number: 17 type: TYPE_FIXED32 label: LABEL_REPEATED options { packed: false } }
  field { name: "ratio" number: 18 type: TYPE_FLOAT label: LABEL_OPTIONAL options { [sluice.fields.v1.role]: ROLE_PARAMETER } }
  field { name: "wide" number: 19 type: TYPE_DOUBLE label: LABEL_OPTIONAL options { [sluice.fields.v1.role]: ROLE_PARAMETER } }
  field { name: "low" number: 20 type: TYPE_SFIXED32 label: LABEL_OPTIONAL options { [sluice.fields.v1.role]: ROLE_PARAMETER } }
  field { name: "high" number: 21 type: TYPE_SFIXED64 label: LABEL_OPTIONAL options { [sluice.fields.v1.role]: ROLE_SEQUENCE_ID } }
  field { name: "zig" number: 22 type: TYPE_SINT32 label: LABEL_OPTIONAL options { [sluice.fields.v1.role]: ROLE_PARAMETER } }
  field { name: "optional" number: 23 type: TYPE_STRING label: LABEL_OPTIONAL proto3_optional: true oneof_index: 1 }
  field { name: "color" number: 24 type: TYPE_ENUM type_name: ".zoo.Color" label: LABEL_OPTIONAL options { [sluice.fields.v1.role]: ROLE_PARAMETER } }
  field { name: "doubles" number: 25 type: TYPE_DOUBLE label: LABEL_REPEATED }
  field { name: "unread" number: 26 type: TYPE_UINT32 label: LABEL_OPTIONAL }
  field { name: "far" number: 70000 type: TYPE_BYTES label: LABEL_OPTIONAL }
  nested_type { name: "ByNameEntry" options { map_entry: true }
    field { name: "key" number: 1 type: TYPE_STRING label: LABEL_OPTIONAL }
    field { name: "value" number: 2 type: TYPE_MESSAGE type_name: ".zoo.Leaf" label: LABEL_OPTIONAL } }
  nested_type { name: "ByNumberEntry" options { map_entry: true }
    field { name: "key" number: 1 type: TYPE_SINT32 label: LABEL_OPTIONAL }
    field { name: "value" number: 2 type: TYPE_STRING label: LABEL_OPTIONAL } }
  nested_type { name: "NumbersEntry" options { map_entry: true }
    field { name: "key" number: 1 type: TYPE_BOOL label: LABEL_OPTIONAL }
    field { name: "value" number: 2 type: TYPE_FIXED64 label: LABEL_OPTIONAL } }
  oneof_decl { name: "choice" }
  oneof_decl { name: "_optional" }
}
message_type {
  name: "Leaf"
  field { name: "a" number: 1 type: TYPE_STRING label: LABEL_OPTIONAL }
  field { name: "b" number: 2 type: TYPE_STRING label: LABEL_REPEATED }
  field { name: "n" number: 3 type: TYPE_INT64 label: LABEL_OPTIONAL }
}
enum_type { name: "Color" value { name: "RED" number: 0 } value { name: "BLUE" number: 1 } }
`

func one(b []byte) mem.BufferSlice { return mem.BufferSlice{mem.SliceBuffer(b)} }

// cut lays b out in buffers that end at the given offsets.
func cut(b []byte, at ...int) mem.BufferSlice {
	var s mem.BufferSlice
	from := 0
	for _, to := range append(at, len(b)) {
		s = append(s, mem.SliceBuffer(b[from:to]))
		from = to
	}
	return s
}

func cutRandomly(r *rand.Rand, b []byte) mem.BufferSlice {
	var at []int
	for range r.IntN(12) {
		at = append(at, r.IntN(len(b)+1))
	}
	slices.Sort(at)
	return cut(b, at...)
}

// show lists what was read, field by field.
func show(m *Message) []string {
	var out []string
	for i := range m.Fields {
		f := &m.Fields[i]
		s := fmt.Sprintf("%s %s t%d %q key=%q", m.Path(f), f.Role, f.Tensor, m.AppendText(nil, f), m.Key(f))
		if f.Shadowed {
			s += " shadowed"
		}
		out = append(out, s)
	}
	for i := range m.Tensors {
		t := &m.Tensors[i]
		out = append(out, fmt.Sprintf("tensor %s %s %d shm=%t shadowed=%t ints=%v", m.Name(t), m.Datatype(t),
			t.Elements, t.SharedMemory, t.Shadowed, m.Ints(nil, t, 100)))
	}
	return append(out, fmt.Sprintf("unknown %d", m.Unknown))
}

func kindOf(err error) Kind {
	var e *Error
	if errors.As(err, &e) {
		return e.Kind
	}
	if err != nil {
		panic(err)
	}
	return 0
}

// recorded is one message of testdata/wire, which real clients and servers
// exchanged. The texts are those that the official decoder finds.
type recorded struct {
	Case, Direction, Type, File string
	Size, Ramp                  int
	Unparsable, Problem         bool
	Names                       map[string]string
	Texts                       []struct {
		Path, Hex, SHA256 string
		Text              *string
		Size              int
	}
}

var recordings = sync.OnceValue(func() []recorded {
	b, err := os.ReadFile("testdata/wire/manifest.json")
	if err != nil {
		panic(err)
	}
	var all []recorded
	if err := json.Unmarshal(b, &all); err != nil {
		panic(err)
	}
	return all
})

// bytes are the message. Large tensors are a ramp that is worked out here.
func (r recorded) bytes() []byte {
	b, err := os.ReadFile(filepath.Join("testdata/wire", r.File))
	if err != nil {
		panic(err)
	}
	for i := range r.Ramp {
		b = binary.LittleEndian.AppendUint32(b, math.Float32bits(float32(i%1021)/8))
	}
	if len(b) != r.Size {
		panic(r.File + " has the wrong size")
	}
	return b
}

func (r recorded) descriptor() protoreflect.MessageDescriptor {
	return inference(strings.TrimPrefix(r.Type, "inference."))
}

func TestRecordedMessages(t *testing.T) {
	for _, r := range recordings() {
		t.Run(r.Case+"/"+r.File, func(t *testing.T) {
			b := r.bytes()
			var m Message
			err := compile(t, r.descriptor(), Options{}).Scan(&m, one(b))
			if r.Unparsable {
				if kindOf(err) != Malformed {
					t.Fatalf("got %v, want a malformed message", err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if m.Size() != len(b) {
				t.Errorf("size is %d, want %d", m.Size(), len(b))
			}
			names := make(map[string]string)
			var got, want []string
			for i := range m.Fields {
				f := &m.Fields[i]
				switch {
				case f.Shadowed && m.Path(f) != "raw_input_contents", !m.IsString(f):
				case f.Role == Model, f.Role == ModelVersion, f.Role == RequestID:
					if len(m.Bytes(f)) > 0 {
						names[m.Path(f)] = string(m.Bytes(f))
					}
				case IsText(f.Role) && (!r.Problem || !f.bare):
					got = append(got, fmt.Sprintf("%s=%q", m.Path(f), m.Bytes(f)))
				}
			}
			for _, x := range r.Texts {
				switch {
				case x.Text != nil:
					want = append(want, fmt.Sprintf("%s=%q", x.Path, *x.Text))
				case x.SHA256 != "":
					i := slices.IndexFunc(m.Fields, func(f Field) bool {
						h := sha256.Sum256(m.Bytes(&f))
						return hex.EncodeToString(h[:]) == x.SHA256
					})
					if i < 0 {
						t.Fatalf("%s has no element with sha256 %s", x.Path, x.SHA256)
					}
					want = append(want, fmt.Sprintf("%s=%q", m.Path(&m.Fields[i]), m.Bytes(&m.Fields[i])))
				default:
					v, _ := hex.DecodeString(x.Hex)
					want = append(want, fmt.Sprintf("%s=%q", x.Path, v))
				}
			}
			slices.Sort(got)
			slices.Sort(want)
			if !slices.Equal(got, want) {
				t.Errorf("texts are\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
			}
			if fmt.Sprint(names) != fmt.Sprint(r.Names) {
				t.Errorf("names are %v, want %v", names, r.Names)
			}
		})
	}
}

// The recorded messages that strict mode refuses, and why. It takes all others.
var refused = map[string]Kind{
	"error_raw_and_typed":         Ambiguous,
	"error_length_past_the_end":   Malformed,
	"error_trailing_bytes":        Malformed,
	"error_fewer_raw_than_inputs": Malformed,
	"extra_raw_contents":          Ambiguous,
	"wire_model_name_twice":       Ambiguous,
	"wire_contents_split":         Ambiguous,
	"wire_unknown_fields":         Ambiguous,
	"wire_shape_unpacked":         Ambiguous,
	"wire_overlong_varints":       Ambiguous,
	"wire_name_twice_in_tensor":   Ambiguous,
	"wire_truncated":              Malformed,
	"wire_unknown_group":          Ambiguous,
	"wire_invalid_utf8_id":        Malformed,
	"wire_duplicate_parameter":    Ambiguous,
}

func TestStrictOnRecordedMessages(t *testing.T) {
	for _, r := range recordings() {
		t.Run(r.Case+"/"+r.File, func(t *testing.T) {
			want := refused[r.Case]
			if r.Direction == "response" {
				want = 0
			}
			var m Message
			err := compile(t, r.descriptor(), Options{Strict: true}).Scan(&m, one(r.bytes()))
			if kindOf(err) != want {
				t.Errorf("got %v, want %v", err, want)
			}
		})
	}
}

// Every layout of the same bytes reads the same.
func TestLayouts(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	for _, rec := range recordings() {
		b := rec.bytes()
		if len(b) > 100_000 {
			continue
		}
		for _, strict := range []bool{false, true} {
			p := compile(t, rec.descriptor(), Options{Strict: strict, Text: Prompt})
			var m Message
			err := p.Scan(&m, one(b))
			want := show(&m)
			check := func(s mem.BufferSlice) {
				t.Helper()
				var m Message
				got := p.Scan(&m, s)
				if fmt.Sprint(got) != fmt.Sprint(err) {
					t.Fatalf("%s: got %v in pieces, %v in one", rec.File, got, err)
				}
				if err == nil && !slices.Equal(show(&m), want) {
					t.Fatalf("%s: in pieces\n%s\nin one\n%s", rec.File, strings.Join(show(&m), "\n"), strings.Join(want, "\n"))
				}
			}
			if len(b) < 400 {
				for i := range len(b) + 1 {
					check(cut(b, i))
				}
			}
			for range 20 {
				check(cutRandomly(r, b))
			}
			if len(b) < 4000 {
				bytewise := mem.BufferSlice{}
				for i := range b {
					bytewise = append(bytewise, mem.SliceBuffer(b[i:i+1]))
				}
				check(bytewise)
			}
		}
	}
}

// A walked message shows what its encoding shows.
func TestWalkRecordedMessages(t *testing.T) {
	for _, r := range recordings() {
		if r.Unparsable || r.Ramp > 0 {
			continue
		}
		msg := dynamicpb.NewMessage(r.descriptor())
		if err := proto.Unmarshal(r.bytes(), msg); err != nil {
			t.Fatal(err)
		}
		same(t, compile(t, r.descriptor(), Options{}), r.bytes(), msg)
	}
}
