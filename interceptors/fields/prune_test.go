package fields

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/dynamicpb"
)

// listedEntry is an element of RepositoryIndexResponse.models, in one of the forms
// that an encoder may give it.
func listedEntry(r *rand.Rand, model, version string) []byte {
	parts := [][]byte{str(1, model), str(2, version), str(3, "READY")}
	if r.IntN(2) == 0 {
		parts = append(parts, str(99, "unknown"))
	}
	if version == "" {
		parts = append(parts[:len(parts):len(parts)], str(4, strings.Repeat("why ", r.IntN(700))))
	}
	return sub(1, parts...)
}

// The elements that are not wanted go, tag and all; what is left is as it was.
func TestPrune(t *testing.T) {
	md := inference("RepositoryIndexResponse")
	p := compile(t, md, Options{Omit: []Role{Identifier, Model, ModelVersion}})
	r := rand.New(rand.NewPCG(1, 2))
	for range 500 {
		var whole, want []byte
		for range r.IntN(8) {
			model, version := fmt.Sprint("m", r.IntN(3)), fmt.Sprint(r.IntN(3))
			if r.IntN(4) == 0 {
				version = ""
			}
			e := listedEntry(r, model, version)
			whole = append(whole, e...)
			if model != "m1" && version != "2" {
				want = append(want, e...)
			}
		}
		keep := func(model, version string) bool {
			if !strings.HasPrefix(model, "m") {
				t.Errorf("asked for %q", model)
			}
			return model != "m1" && version != "2"
		}
		pruned := len(whole) != len(want)

		var m Message
		if err := p.Scan(&m, cutRandomly(r, whole)); err != nil {
			t.Fatal(err)
		}
		m.Prune(keep)
		if got := m.Encode(); !pruned == m.Edited() {
			t.Errorf("edited is %t, pruned %t", m.Edited(), pruned)
		} else if b := got.Materialize(); !bytes.Equal(b, want) {
			t.Fatalf("left\n%x\nwant\n%x", b, want)
		}
		for n := range m.Fields {
			if f := &m.Fields[n]; f.Role == ListedModel && !f.Shadowed && string(m.Bytes(f)) == "m1" {
				t.Error("what was taken out can still be seen")
			}
		}

		typed := dynamicpb.NewMessage(md)
		if err := proto.Unmarshal(whole, typed); err != nil {
			t.Fatal(err)
		}
		before := proto.Clone(typed)
		if err := p.Walk(&m, typed); err != nil {
			t.Fatal(err)
		}
		m.Prune(keep)
		left := dynamicpb.NewMessage(md)
		if err := proto.Unmarshal(want, left); err != nil {
			t.Fatal(err)
		}
		if got := m.Typed(); !proto.Equal(got, left) {
			t.Fatalf("left %v, want %v", got, left)
		} else if !pruned && got != proto.Message(typed) {
			t.Error("a message that lost nothing was copied")
		}
		if !proto.Equal(typed, before) {
			t.Error("the caller's message was changed")
		}
	}
}

// Lists in elements of lists, and other edits beside.
func TestPruneNested(t *testing.T) {
	md := file(t, zoo).Messages().ByName("Zoo")
	p := compile(t, md, Options{Overlay: map[protoreflect.FullName]Role{"zoo.Zoo.prompt": ListedModel}})
	many := func(name string, parts ...[]byte) []byte { return sub(12, append([][]byte{str(1, name)}, parts...)...) }
	whole := cat(str(1, "no"), many("a", many("x"), many("no", many("y")), many("z"), str(6, "stop")), many("no", many("a")), many("b"))
	want := cat(str(1, "no"), many("a", many("x"), many("z"), str(6, "end")), many("b"))
	edit := func(m *Message) {
		m.Prune(func(model, _ string) bool { return model != "no" })
		for n := range m.Fields {
			if f := &m.Fields[n]; f.Role == Parameter && !f.Shadowed {
				m.Set(f, []byte("end"))
			}
		}
	}
	var m Message
	if err := p.Scan(&m, one(whole)); err != nil {
		t.Fatal(err)
	}
	edit(&m)
	if got := m.Encode().Materialize(); !bytes.Equal(got, want) {
		t.Errorf("left\n%x\nwant\n%x", got, want)
	}
	typed, left := dynamicpb.NewMessage(md), dynamicpb.NewMessage(md)
	if err := proto.Unmarshal(whole, typed); err != nil {
		t.Fatal(err)
	}
	if err := proto.Unmarshal(want, left); err != nil {
		t.Fatal(err)
	}
	if err := p.Walk(&m, typed); err != nil {
		t.Fatal(err)
	}
	edit(&m)
	if got := m.Typed(); !proto.Equal(got, left) {
		t.Errorf("left %v, want %v", got, left)
	}
}

// An element that names no model is judged too: by no name.
func TestPruneWithoutName(t *testing.T) {
	p := compile(t, inference("RepositoryIndexResponse"), Options{})
	var m Message
	if err := p.Scan(&m, one(cat(sub(1, str(3, "READY")), sub(1, str(1, "m"))))); err != nil {
		t.Fatal(err)
	}
	m.Prune(func(model, _ string) bool { return model == "m" })
	if got, want := m.Encode().Materialize(), sub(1, str(1, "m")); !bytes.Equal(got, want) {
		t.Errorf("left %x, want %x", got, want)
	}
}

// Whatever the bytes are: what is left on the wire is what is left of the list
// that decoders read.
func FuzzPrune(f *testing.F) {
	md := inference("RepositoryIndexResponse")
	p := compile(f, md, Options{})
	f.Add(cat(sub(1, str(1, "m"), str(2, "1")), sub(1, str(1, "n")), sub(1)), uint8(1))
	f.Add(cat(sub(1, str(1, "n"), str(1, "m"), str(9, "?")), str(5, "x"), sub(1, str(1, "n"), vi(2, 7))), uint8(9))
	f.Fuzz(func(t *testing.T, b []byte, at uint8) {
		typed := dynamicpb.NewMessage(md)
		var raw, walked Message
		if p.Scan(&raw, cut(b, min(int(at), len(b)))) != nil || proto.Unmarshal(b, typed) != nil {
			return
		}
		keep := func(model, version string) bool { return len(model)%2 == 1 || version == "1" }
		raw.Prune(keep)
		if err := p.Walk(&walked, typed); err != nil {
			t.Fatal(err)
		}
		walked.Prune(keep)
		left := dynamicpb.NewMessage(md)
		if err := proto.Unmarshal(raw.Encode().Materialize(), left); err != nil {
			t.Fatal(err)
		}
		if want := walked.Typed(); !proto.Equal(left, want) {
			t.Errorf("the wire has %v, the list %v", left, want)
		}
		var again Message
		if err := p.Scan(&again, one(raw.Encode().Materialize())); err != nil {
			t.Fatal(err)
		}
		again.Prune(func(model, version string) bool {
			if !keep(model, version) {
				t.Errorf("%q %q was left", model, version)
			}
			return true
		})
	})
}
