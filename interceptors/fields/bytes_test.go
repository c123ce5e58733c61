package fields

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	oip "github.com/sluicegate/sluice/proto/gen/inference"
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
)

// bytesProgram reads the tensor TEXT as bytes of a text.
func bytesProgram(t testing.TB, strict bool) *Program {
	t.Helper()
	p, err := Compile((*oip.ModelInferRequest)(nil).ProtoReflect().Descriptor(),
		Options{Text: Prompt, Strict: strict, Bytes: map[string]bool{"TEXT": true}})
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// bytesRequest has text in TEXT, between two tensors of numbers.
func bytesRequest(datatype string, raw bool, text []byte) *oip.ModelInferRequest {
	type tensor = oip.ModelInferRequest_InferInputTensor
	numbers := []byte{104, 105, 200}
	r := &oip.ModelInferRequest{ModelName: "m"}
	for _, v := range []struct {
		name, datatype string
		b              []byte
	}{{"IMAGE", "UINT8", numbers}, {"TEXT", datatype, text}, {"MASK", "INT8", numbers}} {
		in := &tensor{Name: v.name, Datatype: v.datatype, Shape: []int64{1, int64(len(v.b))}}
		switch {
		case raw:
			r.RawInputContents = append(r.RawInputContents, v.b)
		case v.datatype == "UINT8":
			in.Contents = new(oip.InferTensorContents)
			for _, c := range v.b {
				in.Contents.UintContents = append(in.Contents.UintContents, uint32(c))
			}
		default:
			in.Contents = new(oip.InferTensorContents)
			for _, c := range v.b {
				in.Contents.IntContents = append(in.Contents.IntContents, int32(int8(c)))
			}
		}
		r.Inputs = append(r.Inputs, in)
	}
	return r
}

func prompts(m *Message) (all []*Field) {
	for i := range m.Fields {
		if m.Fields[i].Role == Prompt {
			all = append(all, &m.Fields[i])
		}
	}
	return all
}

// checkBytes reads and edits a text in all four forms, from the wire and from the Go
// message: what is set arrives in as many elements, and nothing else changes.
func checkBytes(t *testing.T, r *rand.Rand, text, with []byte) {
	t.Helper()
	want := with[:min(len(with), len(text))]
	want = append(slices.Clone(want), strings.Repeat(" ", len(text)-len(want))...)
	p := bytesProgram(t, true)
	for _, datatype := range []string{"UINT8", "INT8"} {
		for _, raw := range []bool{false, true} {
			name := fmt.Sprintf("%s raw %t", datatype, raw)
			msg := bytesRequest(datatype, raw, text)
			wire, err := proto.Marshal(msg)
			if err != nil {
				t.Fatal(err)
			}
			wanted := bytesRequest(datatype, raw, want)
			var scanned, walked Message
			if err := p.Scan(&scanned, cutRandomly(r, wire)); err != nil {
				t.Fatal(name, err)
			}
			if err := p.Walk(&walked, msg); err != nil {
				t.Fatal(name, err)
			}
			for _, m := range []*Message{&scanned, &walked} {
				got := prompts(m)
				if len(text) == 0 && len(got) == 0 {
					continue
				}
				if len(got) != 1 || !bytes.Equal(m.Bytes(got[0]), text) || m.Path(got[0]) != "inputs.TEXT" || !m.Sized(got[0]) || !m.IsElement(got[0]) {
					t.Fatalf("%s: %d prompts, want %q", name, len(got), text)
				}
				m.Set(got[0], with)
				if !bytes.Equal(m.Bytes(got[0]), want) {
					t.Fatalf("%s: set %q, want %q", name, m.Bytes(got[0]), want)
				}
			}
			if len(text) == 0 {
				continue
			}
			again := new(oip.ModelInferRequest)
			if err := proto.Unmarshal(scanned.Encode().Materialize(), again); err != nil {
				t.Fatal(name, err)
			}
			if !proto.Equal(again, wanted) || !proto.Equal(walked.Typed(), wanted) {
				t.Fatalf("%s:\n got %v\n and %v\nwant %v", name, again, walked.Typed(), wanted)
			}
			if err := p.Scan(new(Message), scanned.Encode()); err != nil {
				t.Fatal(name, err)
			}
		}
	}
}

func TestBytesOfAText(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	for _, text := range []string{"", "a", "hello there", "grüße 日本語", "\x00\xff\x80", strings.Repeat("long ", 1000)} {
		for _, with := range []string{"", "b", "ü", "hello", "another text that is longer"} {
			checkBytes(t, r, []byte(text), []byte(with))
		}
	}
}

func FuzzBytesOfAText(f *testing.F) {
	f.Add(uint64(1), []byte("pay 4111"), []byte("pay \xff"))
	f.Fuzz(func(t *testing.T, seed uint64, text, with []byte) {
		checkBytes(t, rand.New(rand.NewPCG(seed, 1)), text, with)
	})
}

// TestBytesRules is what else may be on the wire.
func TestBytesRules(t *testing.T) {
	head := func(datatype string, n uint64) []byte {
		return cat(str(1, "TEXT"), str(2, datatype), packed(3, n))
	}
	tensor := func(datatype string, n uint64, contents ...[]byte) []byte {
		return sub(5, head(datatype, n), sub(5, contents...))
	}
	for _, c := range []struct {
		name            string
		b               []byte
		text            string // lenient
		lenient, strict Kind
	}{
		{"two runs", tensor("UINT8", 4, packed(4, 'a', 'b'), packed(4, 'c', 0xFF)), "abc\xff", ok, ok},
		{"one by one", tensor("UINT8", 2, vi(4, 'a'), vi(4, 'b')), "ab", ok, Ambiguous},
		{"larger than the datatype", tensor("UINT8", 2, packed(4, 'a', 256+'b')), "ab", ok, Malformed},
		{"larger than the datatype, signed", tensor("INT8", 2, packed(2, 'a', 200)), "a\xc8", ok, Malformed},
		{"in the other field", tensor("UINT8", 2, packed(2, 'a', 'b')), "ab", ok, Ambiguous},
		{"raw and typed", cat(tensor("UINT8", 1, packed(4, 'a')), str(7, "b")), "ab", ok, Ambiguous},
		{"raw entry first", cat(str(7, "ab"), sub(5, head("UINT8", 2))), "ab", ok, ok},
		{"raw, too short", cat(sub(5, head("UINT8", 3)), str(7, "ab")), "ab", ok, Malformed},
		{"of another type", tensor("INT16", 2, packed(2, 'a', 'b')), "", ok, ok},
		{"BOOL", cat(sub(5, head("BOOL", 2)), str(7, "ab")), "", ok, ok},
		{"two contents", sub(5, head("UINT8", 2), sub(5, packed(4, 'a')), sub(5, packed(4, 'b'))), "ab", ok, Ambiguous},
	} {
		t.Run(c.name, func(t *testing.T) {
			for _, strict := range []bool{false, true} {
				want := c.lenient
				if strict {
					want = c.strict
				}
				p, m := bytesProgram(t, strict), new(Message)
				err := p.Scan(m, mem.BufferSlice{mem.SliceBuffer(c.b)})
				if kindOf(err) != want {
					t.Fatalf("strict %t: %v, want %v", strict, err, want)
				}
				if err != nil {
					continue
				}
				var got []byte
				for _, f := range prompts(m) {
					got = append(got, m.Bytes(f)...)
					m.Set(f, bytes.Repeat([]byte("\xfe"), len(m.Bytes(f))))
				}
				if string(got) != c.text {
					t.Errorf("strict %t: %q, want %q", strict, got, c.text)
				}
				again := new(Message)
				if err := p.Scan(again, m.Encode()); err != nil {
					t.Fatal(err)
				}
				got = got[:0]
				for _, f := range prompts(again) {
					got = append(got, again.Bytes(f)...)
				}
				if string(got) != strings.Repeat("\xfe", len(c.text)) {
					t.Errorf("strict %t: %q after the edit", strict, got)
				}
			}
		})
	}
}

// TestBytesNext holds that messages that look alike are read each for itself.
func TestBytesNext(t *testing.T) {
	p, m := bytesProgram(t, false), new(Message)
	for _, text := range []string{"hello", "there", "again", "grüß", "hello"} {
		for _, raw := range []bool{true, false} {
			wire, err := proto.Marshal(bytesRequest("UINT8", raw, []byte(text)))
			if err != nil {
				t.Fatal(err)
			}
			if err := p.ScanNext(m, mem.BufferSlice{mem.SliceBuffer(wire)}); err != nil {
				t.Fatal(err)
			}
			if got := prompts(m); len(got) != 1 || string(m.Bytes(got[0])) != text {
				t.Fatalf("%d prompts, want %q", len(got), text)
			}
		}
	}
}

// TestNumbersCostNothing holds that clean tensors of numbers are not read: nothing of them is
// allocated or copied, however large they are.
func TestNumbersCostNothing(t *testing.T) {
	p, m := bytesProgram(t, true), new(Message)
	wire := sub(5, str(1, "IMAGE"), str(2, "UINT8"), packed(3, 1<<16))
	wire = append(wire, protowire.AppendBytes(tag(7, protowire.BytesType), make([]byte, 1<<16))...)
	buffers := mem.BufferSlice{mem.SliceBuffer(wire)}
	n := testing.AllocsPerRun(100, func() {
		if err := p.Scan(m, buffers); err != nil {
			t.Fatal(err)
		}
	})
	if n > 0 || len(prompts(m)) > 0 {
		t.Errorf("%.0f allocations, %d prompts", n, len(prompts(m)))
	}
}
