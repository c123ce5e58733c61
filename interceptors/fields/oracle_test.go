package fields

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
)

// values groups what was read by path, and leaves out what an encoding may or
// may not hold: shadowed fields, and default values without presence.
func values(m *Message) map[string][]string {
	out := make(map[string][]string)
	for i := range m.Fields {
		f := &m.Fields[i]
		if f.Shadowed {
			continue
		}
		fd := f.f.desc
		v := string(m.AppendText(nil, f))
		if !fd.IsList() && !fd.HasPresence() && m.nodeOf(f) == nil && isDefault(m, f) {
			continue
		}
		// Not the index of the tensor: an encoding may hold tensors that are shadowed.
		key := fmt.Sprintf("%s|%s|%s|%s|%t", m.Path(f), f.Role, m.Key(f), fd.Name(), m.IsElement(f))
		out[key] = append(out[key], v)
	}
	for i := range m.Tensors {
		t := &m.Tensors[i]
		if !t.Shadowed {
			key := fmt.Sprintf("tensor %s", m.Name(t))
			out[key] = append(out[key], fmt.Sprint(string(m.Datatype(t)), t.Elements, t.SharedMemory, m.Ints(nil, t, 50)))
		}
	}
	return out
}

// nodeOf is the map entry that the field is a key or value of, or nil.
func (m *Message) nodeOf(f *Field) *node {
	if n := &m.nodes[f.node]; n.f != nil && n.f.isMap && f.f.use != useKey {
		return n
	}
	return nil
}

func isDefault(m *Message, f *Field) bool {
	if m.IsString(f) {
		return len(m.Bytes(f)) == 0
	}
	return f.num == 0
}

func listed(v map[string][]string) string {
	var lines []string
	for k, vs := range v {
		lines = append(lines, fmt.Sprintf("%s: %q", k, vs))
	}
	slices.Sort(lines)
	return strings.Join(lines, "\n")
}

// same fails unless the scanned bytes and the decoded message show the same.
func same(t *testing.T, p *Program, b []byte, msg proto.Message) {
	t.Helper()
	var scanned, walked Message
	if err := p.Scan(&scanned, one(b)); err != nil {
		t.Fatalf("Scan: %v\n%x", err, b)
	}
	if err := p.Walk(&walked, msg); err != nil {
		t.Fatalf("Walk: %v\n%x", err, b)
	}
	if s, w := listed(values(&scanned)), listed(values(&walked)); s != w {
		t.Fatalf("scanned\n%s\nwalked\n%s\nbytes %x", s, w, b)
	}
	// A reader of our own, which shares nothing with the program, finds the
	// same strings and bytes.
	var got, want []string
	for i := range walked.Fields {
		if f := &walked.Fields[i]; walked.IsString(f) && f.f.use != useRaw {
			got = append(got, string(walked.Bytes(f)))
		}
	}
	for i := range walked.raws {
		got = append(got, string(walked.bytes(&walked.raws[i].value)))
	}
	strs(msg.ProtoReflect(), &want)
	slices.Sort(got)
	slices.Sort(want)
	if !slices.Equal(got, want) {
		t.Fatalf("strings are\n%q\nwant\n%q", got, want)
	}
}

// strs collects every string and bytes value of a message.
func strs(msg protoreflect.Message, out *[]string) {
	leaf := func(fd protoreflect.FieldDescriptor, v protoreflect.Value) {
		switch fd.Kind() {
		case protoreflect.StringKind:
			*out = append(*out, v.String())
		case protoreflect.BytesKind:
			*out = append(*out, string(v.Bytes()))
		case protoreflect.MessageKind:
			strs(v.Message(), out)
		}
	}
	msg.Range(func(fd protoreflect.FieldDescriptor, v protoreflect.Value) bool {
		switch {
		case fd.IsMap():
			v.Map().Range(func(k protoreflect.MapKey, v protoreflect.Value) bool {
				leaf(fd.MapKey(), k.Value())
				leaf(fd.MapValue(), v)
				return true
			})
		case fd.IsList():
			for i := range v.List().Len() {
				leaf(fd, v.List().Get(i))
			}
		default:
			leaf(fd, v)
		}
		return true
	})
}
