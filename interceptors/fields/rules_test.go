package fields

import (
	"bytes"
	"fmt"
	"math"
	"slices"
	"strings"
	"testing"

	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protodesc"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
	"google.golang.org/protobuf/types/descriptorpb"
	"google.golang.org/protobuf/types/dynamicpb"

	fieldsv1 "github.com/sluicegate/sluice/proto/gen/sluice/fields/v1"
)

// Wire bytes, by hand.
func cat(parts ...[]byte) []byte { return slices.Concat(parts...) }

func tag(n protowire.Number, t protowire.Type) []byte { return protowire.AppendTag(nil, n, t) }

func str(n protowire.Number, s string) []byte {
	return protowire.AppendString(tag(n, protowire.BytesType), s)
}

func sub(n protowire.Number, parts ...[]byte) []byte { return str(n, string(cat(parts...))) }

func vi(n protowire.Number, v uint64) []byte {
	return protowire.AppendVarint(tag(n, protowire.VarintType), v)
}

func f32(n protowire.Number, v uint32) []byte {
	return protowire.AppendFixed32(tag(n, protowire.Fixed32Type), v)
}

func f64(n protowire.Number, v uint64) []byte {
	return protowire.AppendFixed64(tag(n, protowire.Fixed64Type), v)
}

func group(n protowire.Number, parts ...[]byte) []byte {
	return cat(tag(n, protowire.StartGroupType), cat(parts...), tag(n, protowire.EndGroupType))
}

func packed(n protowire.Number, vs ...uint64) []byte {
	var b []byte
	for _, v := range vs {
		b = protowire.AppendVarint(b, v)
	}
	return str(n, string(b))
}

const ok = Kind(0)

// Every rule about the wire, on the zoo. The decoder's word is the measure of
// the lenient column; what it reads is compared too.
func TestWireRules(t *testing.T) {
	minus := func(n int64) uint64 { return uint64(n) }
	tests := []struct {
		name            string
		b               []byte
		lenient, strict Kind
	}{
		{"nothing", nil, ok, ok},
		{"string", str(1, "x"), ok, ok},
		{"empty string", str(1, ""), ok, ok},
		{"any order", cat(vi(2, 1), str(1, "x")), ok, ok},
		{"string twice", cat(str(1, "x"), str(1, "y")), ok, Ambiguous},
		{"number twice", cat(vi(2, 1), vi(2, 2)), ok, Ambiguous},
		{"number without a role twice", cat(vi(26, 1), vi(26, 2)), ok, Ambiguous},
		{"message twice", cat(sub(11, str(1, "x")), sub(11, vi(2, 1))), ok, Ambiguous},
		{"message twice, field twice", cat(sub(11, str(1, "x")), sub(11, str(1, "y"))), ok, Ambiguous},
		{"repeated string", cat(str(6, "x"), str(6, "y")), ok, ok},
		{"repeated message", cat(sub(12, str(1, "x")), sub(12, str(1, "y"))), ok, ok},

		{"oneof, one text", str(7, "x"), ok, ok},
		{"oneof, text and number", cat(str(7, "x"), vi(10, 3)), ok, Ambiguous},
		{"oneof, text and message", cat(str(7, "x"), sub(9, str(1, "a"))), ok, Ambiguous},
		{"oneof, message and text", cat(sub(8, sub(12, str(1, "a"))), str(7, "x")), ok, Ambiguous},
		{"oneof, same message merges", cat(sub(9, str(1, "a"), str(2, "b")), sub(9, str(1, "c"), str(2, "d"))), ok, Ambiguous},
		{"oneof, message is new after another", cat(sub(9, str(1, "a")), str(7, "x"), sub(9, str(2, "b"))), ok, Ambiguous},
		{"oneof, wrong wire type is no member", cat(str(7, "x"), str(10, "y")), ok, Ambiguous},

		{"map", cat(sub(14, vi(1, 2), str(2, "x")), sub(14, vi(1, 4), str(2, "y"))), ok, ok},
		{"map, value before key", sub(14, str(2, "x"), vi(1, 2)), ok, ok},
		{"map, no key", sub(14, str(2, "x")), ok, ok},
		{"map, no value", sub(14, vi(1, 2)), ok, ok},
		{"map, empty entry", sub(14), ok, ok},
		{"map, no value, and a field after it", cat(sub(14, vi(1, 2)), str(1, "x")), ok, ok},
		{"map, no number", sub(15, vi(1, 1)), ok, ok},
		{"map, no message", sub(13, str(1, "k")), ok, ok},
		{"map, key twice", cat(sub(14, vi(1, 2), str(2, "x")), sub(14, vi(1, 2), str(2, "y"))), ok, Ambiguous},
		{"map, default key twice", cat(sub(14, str(2, "x")), sub(14, vi(1, 0), str(2, "y"))), ok, Ambiguous},
		{"map, entries do not merge", cat(sub(13, str(1, "k"), sub(2, str(1, "x"))), sub(13, str(1, "k"), sub(2, str(2, "y")))), ok, Ambiguous},
		{"map, key twice in an entry", sub(13, str(1, "k"), str(1, "l"), sub(2, str(1, "x"))), ok, Ambiguous},
		{"map, value twice in an entry", sub(13, str(1, "k"), sub(2, str(1, "x")), sub(2, str(2, "y"))), ok, Ambiguous},
		{"map, text value twice in an entry", sub(14, vi(1, 2), str(2, "x"), str(2, "y")), ok, Ambiguous},
		{"map, unknown field in an entry", sub(14, vi(1, 2), str(2, "x"), str(3, "y")), ok, Ambiguous},
		{"map, group end in an entry", sub(14, vi(1, 2), tag(3, protowire.EndGroupType)), Malformed, Malformed},
		{"map, same key in two messages", cat(sub(12, sub(14, vi(1, 2))), sub(12, sub(14, vi(1, 2)))), ok, ok},
		{"map, same key in a merged message", cat(sub(11, sub(14, vi(1, 2), str(2, "x"))), sub(11, sub(14, vi(1, 2), str(2, "y")))), ok, Ambiguous},
		{"map, wide key", cat(sub(14, vi(1, 2), str(2, "x")), sub(14, vi(1, 1<<32|2), str(2, "y"))), ok, Ambiguous},

		{"packed", packed(16, 1, 2), ok, ok},
		{"packed, two runs", cat(packed(16, 1), packed(16, 2)), ok, ok},
		{"packed, one by one", cat(vi(16, 1), vi(16, 2)), ok, Ambiguous},
		{"unpacked", cat(f32(17, 1), f32(17, 2)), ok, ok},
		{"unpacked in a run", str(17, "12345678"), ok, Ambiguous},
		{"packed, odd size", str(25, "1234567"), Malformed, Malformed},
		{"packed, cut varint", str(16, "\x80"), Malformed, Malformed},
		{"packed, varint goes on after its end", cat(str(16, "\x80"), []byte{0x10}, vi(2, 1)), Malformed, Malformed},
		{"packed, long varint", str(16, "\x80\x00"), ok, Ambiguous},
		{"packed, wide", packed(16, 1<<40), ok, Ambiguous},

		{"int32, negative", vi(2, minus(-1)), ok, ok},
		{"int32, negative in 5 bytes", vi(2, math.MaxUint32), ok, Ambiguous},
		{"int32, wide", vi(2, 1<<32|5), ok, Ambiguous},
		{"sint32, wide", vi(22, 1<<32|5), ok, Ambiguous},
		{"uint32, wide", vi(26, 1<<32|5), ok, Ambiguous},
		{"enum, negative", vi(24, minus(-1)), ok, ok},
		{"enum, unknown value", vi(24, 77), ok, ok},
		{"enum, wide", vi(24, 1<<33), ok, Ambiguous},
		{"bool, true", vi(3, 1), ok, ok},
		{"bool, two", vi(3, 2), ok, Ambiguous},
		{"bool, 2^63", vi(3, 1<<63), ok, Ambiguous},
		{"sint64", vi(10, minus(-1)), ok, ok},
		{"uint64, largest", vi(4, math.MaxUint64), ok, ok},
		{"fixed numbers", cat(f32(18, 0x7fc00000), f64(19, 1<<63), f32(20, math.MaxUint32), f64(21, math.MaxUint64)), ok, ok},

		{"long tag", cat([]byte{0x8a, 0x00}, []byte("\x01x")), ok, Ambiguous},
		{"long length", cat([]byte{0x0a, 0x81, 0x00}, []byte("x")), ok, Ambiguous},
		{"long value", []byte{0x10, 0x81, 0x00}, ok, Ambiguous},
		{"ten bytes", cat([]byte{0x10}, bytes.Repeat([]byte{0x80}, 9), []byte{0}), ok, Ambiguous},
		{"varint of 65 bits", cat([]byte{0x10}, bytes.Repeat([]byte{0x80}, 9), []byte{2}), Malformed, Malformed},
		{"varint of eleven bytes", cat([]byte{0x10}, bytes.Repeat([]byte{0x80}, 10), []byte{0}), Malformed, Malformed},
		{"cut tag", []byte{0x8a}, Malformed, Malformed},
		{"cut length", []byte{0x0a, 0x81}, Malformed, Malformed},
		{"cut string", []byte{0x0a, 0x02, 'x'}, Malformed, Malformed},
		{"length past the message around it", sub(11, []byte{0x0a, 0x02, 'x'}), Malformed, Malformed},
		{"number past the message around it", cat(sub(11, []byte{0x10}), []byte{1}), Malformed, Malformed},
		{"length of 2^63", cat([]byte{0x0a}, protowire.AppendVarint(nil, 1<<63)), Malformed, Malformed},
		{"cut fixed32", []byte{0x95, 0x01, 1, 2, 3}, Malformed, Malformed},

		{"field number 0", []byte{0x02, 0x00}, Malformed, Malformed},
		{"largest field number", vi(1<<29-1, 1), ok, Ambiguous},
		{"field number 2^29", protowire.AppendVarint(protowire.AppendVarint(nil, 1<<29<<3), 1), Malformed, Malformed},
		{"wire type 6", []byte{0x0e}, Malformed, Malformed},
		{"wire type 7", []byte{0x0f}, Malformed, Malformed},
		{"unknown field", vi(99, 1), ok, Ambiguous},
		{"unknown fixed fields", cat(f32(99, 1), f64(100, 1), str(101, "x")), ok, Ambiguous},
		{"wrong wire type", vi(1, 1), ok, Ambiguous},
		{"wrong wire type of a message", vi(11, 1), ok, Ambiguous},
		{"wrong wire type of a map", vi(14, 1), ok, Ambiguous},
		{"group", group(99, vi(1, 1), group(2, str(3, "x"))), ok, Ambiguous},
		{"group of a known field", group(11, str(1, "x")), ok, Ambiguous},
		{"group with a large number in it", group(99, protowire.AppendVarint(protowire.AppendVarint(nil, 1<<30<<3), 1)), ok, Ambiguous},
		{"group with number 0 in it", group(99, []byte{0x00, 0x01}), Malformed, Ambiguous},
		{"group without an end", tag(99, protowire.StartGroupType), Malformed, Ambiguous},
		{"group ends with another number", cat(tag(99, protowire.StartGroupType), tag(98, protowire.EndGroupType)), Malformed, Ambiguous},
		{"group ends outside of its message", cat(sub(11, tag(99, protowire.StartGroupType)), tag(99, protowire.EndGroupType)), Malformed, Ambiguous},
		{"end of no group", tag(99, protowire.EndGroupType), Malformed, Malformed},

		{"not UTF-8", str(1, "\xff"), Malformed, Malformed},
		{"not UTF-8 in a map key", sub(13, str(1, "\xff")), Malformed, Malformed},
		{"not UTF-8 in bytes", str(5, "\xff"), ok, ok},
		{"half a rune", str(1, "x\xe2\x82"), Malformed, Malformed},
		{"surrogate", str(1, "\xed\xa0\x80"), Malformed, Malformed},
		{"runes", str(1, "aé€😀\uFFFD"), ok, ok},
		{"high field number", str(70000, "x"), ok, ok},
		{"proto3 optional", cat(str(23, "")), ok, ok},
	}
	md := file(t, zoo).Messages().ByName("Zoo")
	lenient, strict := compile(t, md, Options{}), compile(t, md, Options{Strict: true})
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			var m Message
			if err := lenient.Scan(&m, one(tt.b)); kindOf(err) != tt.lenient {
				t.Errorf("lenient: got %v, want %v", err, tt.lenient)
			}
			if err := strict.Scan(&m, one(tt.b)); kindOf(err) != tt.strict {
				t.Errorf("strict: got %v, want %v", err, tt.strict)
			}
			s := subject{md, lenient, strict}
			checkScan(t, s, 0, tt.b)
			for seed := range uint64(30) {
				checkEdit(t, s, 7*seed, tt.b)
			}
			for i := range len(tt.b) + 1 {
				for j := i; j <= len(tt.b); j++ {
					if err := lenient.Scan(&m, cut(tt.b, i, j)); kindOf(err) != tt.lenient {
						t.Fatalf("lenient, cut at %d and %d: got %v, want %v", i, j, err, tt.lenient)
					}
				}
			}
		})
	}
}

// raw is a ModelInferRequest: tensors, then what follows them.
func tensorOf(name, datatype string, dims []uint64, more ...[]byte) []byte {
	return sub(5, str(1, name), str(2, datatype), packed(3, dims...), cat(more...))
}

func TestTensorRules(t *testing.T) {
	dims := func(d ...uint64) []uint64 { return d }
	element := func(s string) []byte { return rawStrings(1, s) }
	shm := sub(4, str(1, "shared_memory_region"), sub(2, str(3, "region")))
	long := func(n int) string { return strings.Repeat("x", n) }
	negative := uint64(math.MaxUint64)
	tests := []struct {
		name   string
		b      []byte
		strict Kind
		texts  string // of a lenient scan
	}{
		{"raw text", cat(tensorOf("A", "BYTES", dims(2)), str(7, string(rawStrings(2, "hi")))), ok, "A:hi A:hi"},
		{"raw before tensors", cat(str(7, string(element("hi"))), tensorOf("A", "BYTES", dims(1))), ok, "A:hi"},
		{"raw before a parameter", cat(str(7, string(element("hi"))), tensorOf("A", "BYTES", dims(1)), sub(4, str(1, "NOTE"), sub(2, str(3, "note")))), ok, "A:hi NOTE:note"},
		{"raw before and after", cat(str(7, string(element("a"))), tensorOf("A", "BYTES", dims(1)), str(7, string(element("b"))), tensorOf("B", "BYTES", dims(1))), ok, "A:a B:b"},
		{"typed text", tensorOf("A", "BYTES", dims(2), sub(5, str(8, "x"), str(8, "y"))), ok, "A:x A:y"},
		{"contents without elements beside raw", cat(tensorOf("A", "BYTES", dims(1), sub(5)), str(7, string(element("hi")))), ok, "A:hi"},
		{"scalar", cat(tensorOf("A", "BYTES", nil), str(7, string(element("hi")))), ok, "A:hi"},
		{"no elements", cat(tensorOf("A", "BYTES", dims(0)), str(7, "")), ok, ""},
		{"no elements and no data", tensorOf("A", "FP32", dims(4, 0)), ok, ""},
		{"shared memory", tensorOf("A", "BYTES", dims(1), shm), ok, "parameters:region"},
		{"shared memory before raw", cat(tensorOf("A", "BYTES", dims(1), shm), tensorOf("B", "BYTES", dims(1)), str(7, string(element("hi")))), ok, "parameters:region B:hi"},
		{"every fixed size", cat(
			tensorOf("A", "BOOL", dims(2)), tensorOf("A", "UINT8", dims(2)), tensorOf("A", "INT8", dims(2)),
			tensorOf("A", "UINT16", dims(2)), tensorOf("A", "INT16", dims(2)), tensorOf("A", "FP16", dims(2)), tensorOf("A", "BF16", dims(2)),
			tensorOf("A", "UINT32", dims(2)), tensorOf("A", "INT32", dims(2)), tensorOf("A", "FP32", dims(2)),
			tensorOf("A", "UINT64", dims(2)), tensorOf("A", "INT64", dims(2)), tensorOf("A", "FP64", dims(2)),
			str(7, long(2)), str(7, long(2)), str(7, long(2)), str(7, long(4)), str(7, long(4)), str(7, long(4)), str(7, long(4)),
			str(7, long(8)), str(7, long(8)), str(7, long(8)), str(7, long(16)), str(7, long(16)), str(7, long(16))), ok, ""},
		{"every typed field", cat(
			tensorOf("A", "BOOL", dims(2), sub(5, packed(1, 0, 1))), tensorOf("A", "INT16", dims(2), sub(5, packed(2, 3, 4))),
			tensorOf("A", "INT64", dims(2), sub(5, packed(3, 3, 4))), tensorOf("A", "UINT8", dims(2), sub(5, packed(4, 3, 4))),
			tensorOf("A", "UINT64", dims(2), sub(5, packed(5, 3, 4))), tensorOf("A", "FP32", dims(2), sub(5, str(6, long(8)))),
			tensorOf("A", "FP64", dims(2), sub(5, str(7, long(16))))), ok, ""},

		{"raw and typed", cat(tensorOf("A", "BYTES", dims(1), sub(5, str(8, "x"))), str(7, string(element("hi")))), Ambiguous, "A:x raw_input_contents:hi"},
		{"raw for one, typed for another", cat(tensorOf("A", "BYTES", dims(1), sub(5, str(8, "x"))), tensorOf("B", "BYTES", dims(1)), str(7, string(element("hi")))), Ambiguous, "A:x B:hi"},
		{"typed and shared memory", tensorOf("A", "BYTES", dims(1), shm, sub(5, str(8, "x"))), Ambiguous, "parameters:region A:x"},
		{"typed in another field", tensorOf("A", "FP32", dims(1), sub(5, str(8, "x"))), Ambiguous, "A:x"},
		{"typed in two fields", tensorOf("A", "BYTES", dims(2), sub(5, packed(2, 1), str(8, "x"))), Ambiguous, "A:x"},
		{"more raw than tensors", cat(tensorOf("A", "BYTES", dims(1)), str(7, string(element("a"))), str(7, string(element("b")))), Ambiguous, "A:a raw_input_contents:b"},
		{"raw without tensors", str(7, "plain"), Ambiguous, "raw_input_contents:plain"},
		{"fewer raw than tensors", cat(tensorOf("A", "BYTES", dims(1)), tensorOf("B", "BYTES", dims(1)), str(7, string(element("a")))), Malformed, "A:a"},
		{"no data", tensorOf("A", "BYTES", dims(1)), Malformed, ""},
		{"length past the end", cat(tensorOf("A", "BYTES", dims(2)), str(7, string(cat(element("a"), []byte("\x09\x00\x00\x00hidden"))))), Malformed, "A:a A:\x09\x00\x00\x00hidden"},
		{"bytes after the last element", cat(tensorOf("A", "BYTES", dims(1)), str(7, string(cat(element("a"), []byte("xyz"))))), Malformed, "A:a A:xyz"},
		{"length of 2^32-1", cat(tensorOf("A", "BYTES", dims(1)), str(7, "\xff\xff\xff\xff")), Malformed, "A:\xff\xff\xff\xff"},
		{"more elements than the shape", cat(tensorOf("A", "BYTES", dims(1)), str(7, string(rawStrings(2, "a")))), Malformed, "A:a A:a"},
		{"fewer elements than the shape", cat(tensorOf("A", "BYTES", dims(3)), str(7, string(rawStrings(2, "a")))), Malformed, "A:a A:a"},
		{"typed elements unlike the shape", tensorOf("A", "BYTES", dims(1), sub(5, str(8, "x"), str(8, "y"))), Malformed, "A:x A:y"},
		{"raw size unlike the shape", cat(tensorOf("A", "FP32", dims(2)), str(7, long(7))), Malformed, ""},
		{"negative dimension", cat(tensorOf("A", "FP32", dims(negative, negative)), str(7, long(4))), Malformed, ""},
		{"shape overflows", cat(tensorOf("A", "FP32", dims(1<<32, 1<<32, 4)), str(7, "")), Malformed, ""},
		{"bytes overflow", cat(tensorOf("A", "FP32", dims(1<<62)), str(7, "")), Malformed, ""},
		{"shape overflows and is 0", cat(tensorOf("A", "FP32", dims(1<<62, 4, 0)), str(7, "")), Malformed, ""},
		{"unknown datatype", cat(tensorOf("A", "STRING", dims(1)), str(7, "text")), Malformed, "A:text"},
		{"no datatype", cat(sub(5, str(1, "A"), packed(3, 1)), str(7, "text")), Malformed, "A:text"},
		{"datatype twice", cat(sub(5, str(1, "A"), str(2, "BYTES"), str(2, "UINT8"), packed(3, 4)), str(7, "text")), Ambiguous, ""},
		{"datatype twice, text last", cat(sub(5, str(1, "A"), str(2, "FP32"), str(2, "BYTES"), packed(3, 1)), str(7, string(element("hi")))), Ambiguous, "A:hi"},
		{"shape one by one", cat(sub(5, str(1, "A"), str(2, "BYTES"), vi(3, 1)), str(7, string(element("hi")))), Ambiguous, "A:hi"},
	}
	md := inference("ModelInferRequest")
	lenient, strict := compile(t, md, Options{Text: Prompt}), compile(t, md, Options{Text: Prompt, Strict: true})
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			var m Message
			if err := strict.Scan(&m, one(tt.b)); kindOf(err) != tt.strict {
				t.Errorf("strict: got %v, want %v", err, tt.strict)
			}
			msg := dynamicpb.NewMessage(md)
			if err := proto.Unmarshal(tt.b, msg); err != nil {
				t.Fatal(err)
			}
			// What is wrong with tensors is wrong in a Go message as well; what is
			// wrong with the encoding is not seen there.
			if err := strict.Walk(&m, msg); kindOf(err) != tt.strict && err != nil {
				t.Errorf("strict, walked: got %v, want %v", err, tt.strict)
			}
			if err := lenient.Scan(&m, one(tt.b)); err != nil {
				t.Fatal(err)
			}
			var got []string
			for i := range m.Fields {
				if f := &m.Fields[i]; IsText(f.Role) {
					path := strings.Split(m.Path(f), ".")
					if len(path) > 1 {
						path = path[1:]
					}
					if len(path) > 1 {
						path = path[1:]
					}
					got = append(got, fmt.Sprintf("%s:%s", path[0], m.Bytes(f)))
				}
			}
			if s := strings.Join(got, " "); s != tt.texts {
				t.Errorf("texts are %q, want %q", s, tt.texts)
			}
			s := subject{md, lenient, strict}
			checkScan(t, s, 0, tt.b)
			for seed := range uint64(30) {
				checkEdit(t, s, 7*seed, tt.b)
			}
			for i := range len(tt.b) + 1 {
				var parts Message
				if err := lenient.Scan(&parts, cut(tt.b, i)); err != nil || !slices.Equal(show(&parts), show(&m)) {
					t.Fatalf("cut at %d: %v\n%q\nwant\n%q", i, err, show(&parts), show(&m))
				}
			}
		})
	}
}

func TestLimits(t *testing.T) {
	md := file(t, zoo).Messages().ByName("Zoo")
	nested := func(n int) (b []byte) {
		for range n {
			b = sub(11, b)
		}
		return b
	}
	groups := func(n int) (b []byte) {
		for range n {
			b = group(99, b)
		}
		return b
	}
	tests := []struct {
		name string
		opts Options
		b    []byte
		want Kind
	}{
		{"as deep as the limit", Options{MaxDepth: 5}, nested(4), ok},
		{"too deep", Options{MaxDepth: 5}, nested(5), TooLarge},
		{"groups as deep as the limit", Options{MaxDepth: 5}, groups(4), ok},
		{"groups too deep", Options{MaxDepth: 5}, groups(5), TooLarge},
		{"default depth", Options{}, nested(DefaultMaxDepth - 1), ok},
		{"beyond default depth", Options{}, nested(DefaultMaxDepth), TooLarge},
		{"as many fields as the limit", Options{MaxFields: 5}, bytes.Repeat(str(6, "x"), 4), ok},
		{"too many fields", Options{MaxFields: 5}, bytes.Repeat(str(6, "x"), 5), TooLarge},
		{"too many messages", Options{MaxFields: 5}, bytes.Repeat(sub(12), 5), TooLarge},
		{"too many map entries", Options{MaxFields: 5}, bytes.Repeat(sub(15), 3), TooLarge},
		{"default fields", Options{}, bytes.Repeat(str(6, "x"), DefaultMaxFields), TooLarge},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			var m Message
			if err := compile(t, md, tt.opts).Scan(&m, one(tt.b)); kindOf(err) != tt.want {
				t.Errorf("got %v, want %v", err, tt.want)
			}
		})
	}
	t.Run("elements", func(t *testing.T) {
		p := compile(t, inference("ModelInferRequest"), Options{Strict: true, MaxFields: 100})
		var m Message
		if err := p.Scan(&m, one(request("A", "BYTES", 200, rawStrings(200, "")))); kindOf(err) != TooLarge {
			t.Errorf("got %v, want too large", err)
		}
	})
	t.Run("2 GiB", func(t *testing.T) { // the same megabyte again and again
		p := compile(t, inference("ModelInferRequest"), Options{})
		var m Message
		err := p.Scan(&m, slices.Repeat(one(make([]byte, 1<<20)), 2048))
		if kindOf(err) != TooLarge {
			t.Errorf("got %v, want too large", err)
		}
	})
	t.Run("walked depth", func(t *testing.T) {
		msg := dynamicpb.NewMessage(md)
		if err := proto.Unmarshal(nested(9), msg); err != nil {
			t.Fatal(err)
		}
		var m Message
		if err := compile(t, md, Options{MaxDepth: 5}).Walk(&m, msg); kindOf(err) != TooLarge {
			t.Errorf("got %v, want too large", err)
		}
	})
}

// An error names fields of the descriptor and shows nothing of the message.
func TestErrorsHoldNoContent(t *testing.T) {
	p := compile(t, inference("ModelInferRequest"), Options{Strict: true})
	param := sub(4, str(1, "SECRET"), sub(2, str(3, "SECRET"), vi(1, 1)))
	for _, tt := range []struct {
		b    []byte
		want string
	}{
		{param, "ambiguous message: parameters.value.bool_param: more than one member of a oneof is set"},
		{tensorOf("SECRET", "SECRET", nil), "malformed message: inputs: the datatype is none of the Open Inference Protocol's"},
		{cat(str(1, "SECRET"), str(1, "SECRET")), "ambiguous message: model_name: a field that can stand once stands twice"},
		{str(1, "SECRET\xff"), "malformed message: model_name: a string is not valid UTF-8"},
		{str(9, "SECRET"), "ambiguous message: field 9 is unknown"},
	} {
		var m Message
		if err := p.Scan(&m, one(tt.b)); err == nil || err.Error() != tt.want {
			t.Errorf("got %q, want %q", err, tt.want)
		}
	}
}

func TestPathsAndKeys(t *testing.T) {
	b := cat(
		str(1, "m"), str(2, "1"), str(3, "id"),
		sub(4, str(1, "NOTE"), sub(2, str(3, "note"))),
		sub(4, str(1, "max_tokens"), sub(2, vi(2, 17))),
		sub(4, str(1, "big"), sub(2, vi(5, math.MaxUint64))),
		sub(4, str(1, "flag"), sub(2, vi(1, 1))),
		sub(4, str(1, "ratio"), sub(2, f64(4, math.Float64bits(0.5)))),
		sub(4, str(1, "bare")),
		tensorOf("TEXT", "BYTES", []uint64{1}, sub(4, str(1, "content_type"), sub(2, str(3, "str")))),
		tensorOf("N", "INT32", []uint64{2}),
		sub(6, str(1, "OUT"), sub(2, str(1, "classification"), sub(2, vi(2, 3)))),
		str(7, string(rawStrings(1, "hi"))), str(7, "\x01\x00\x00\x00\xff\xff\xff\xff"))
	want := []string{
		`model_name ROLE_MODEL t-1 "m" key=""`,
		`model_version ROLE_MODEL_VERSION t-1 "1" key=""`,
		`id ROLE_REQUEST_ID t-1 "id" key=""`,
		`parameters.NOTE ROLE_IDENTIFIER t-1 "NOTE" key=""`,
		`parameters.NOTE ROLE_PARAMETER t-1 "note" key="NOTE"`,
		`parameters.max_tokens ROLE_IDENTIFIER t-1 "max_tokens" key=""`,
		`parameters.max_tokens ROLE_PARAMETER t-1 "17" key="max_tokens"`,
		`parameters.big ROLE_IDENTIFIER t-1 "big" key=""`,
		`parameters.big ROLE_PARAMETER t-1 "18446744073709551615" key="big"`,
		`parameters.flag ROLE_IDENTIFIER t-1 "flag" key=""`,
		`parameters.flag ROLE_PARAMETER t-1 "true" key="flag"`,
		`parameters.ratio ROLE_IDENTIFIER t-1 "ratio" key=""`,
		`parameters.ratio ROLE_PARAMETER t-1 "0.5" key="ratio"`,
		`parameters.bare ROLE_IDENTIFIER t-1 "bare" key=""`,
		`inputs.TEXT.name ROLE_IDENTIFIER t0 "TEXT" key=""`,
		`inputs.TEXT.datatype ROLE_IDENTIFIER t0 "BYTES" key=""`,
		`inputs.TEXT.parameters.content_type ROLE_IDENTIFIER t0 "content_type" key=""`,
		`inputs.TEXT.parameters.content_type ROLE_PARAMETER t0 "str" key="content_type"`,
		`inputs.N.name ROLE_IDENTIFIER t1 "N" key=""`,
		`inputs.N.datatype ROLE_IDENTIFIER t1 "INT32" key=""`,
		`outputs.OUT.name ROLE_IDENTIFIER t-1 "OUT" key=""`,
		`outputs.OUT.parameters.classification ROLE_IDENTIFIER t-1 "classification" key=""`,
		`outputs.OUT.parameters.classification ROLE_PARAMETER t-1 "3" key="classification"`,
		`inputs.TEXT ROLE_PROMPT t0 "hi" key="TEXT"`,
		`tensor TEXT BYTES 1 shm=false shadowed=false ints=[]`,
		`tensor N INT32 2 shm=false shadowed=false ints=[1 -1]`,
		`unknown 0`,
	}
	p := compile(t, inference("ModelInferRequest"), Options{Strict: true, Text: Prompt})
	var m Message
	for range 2 { // the second time with everything reused
		if err := p.Scan(&m, one(b)); err != nil {
			t.Fatal(err)
		}
		if got := show(&m); !slices.Equal(got, want) {
			t.Fatalf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
		}
	}
	ints := make(map[string]int64)
	for i := range m.Fields {
		f := &m.Fields[i]
		if v, ok := m.Int(f); ok {
			ints[m.Key(f)] = v
			if m.Bytes(f) != nil || m.IsString(f) {
				t.Errorf("%s is a number and a text", m.Path(f))
			}
		}
	}
	if got, want := fmt.Sprint(ints), fmt.Sprint(map[string]int64{"max_tokens": 17, "big": math.MaxInt64, "flag": 1, "classification": 3}); got != want {
		t.Errorf("integers are %s, want %s", got, want)
	}
}

func TestOmit(t *testing.T) {
	md := inference("ModelInferResponse")
	b := cat(
		str(1, "m"), str(2, "1"), str(3, "id"),
		sub(4, str(1, "note"), sub(2, str(3, "x"))),
		tensorOf("OUT", "BYTES", []uint64{1}, sub(4, str(1, "kind"), sub(2, vi(2, 3)))),
		str(6, string(rawStrings(1, "hi"))))
	want := []string{
		`id ROLE_REQUEST_ID t-1 "id" key=""`,
		`parameters.note ROLE_PARAMETER t-1 "x" key="note"`,
		`outputs.OUT.parameters.kind ROLE_PARAMETER t0 "3" key="kind"`,
		`outputs.OUT ROLE_OUTPUT t0 "hi" key="OUT"`,
		`tensor OUT BYTES 1 shm=false shadowed=false ints=[]`,
		`unknown 0`,
	}
	opts := Options{Text: Output, Omit: []Role{Identifier, Model, ModelVersion}, Strict: true}
	p := compile(t, md, opts)
	var m Message
	if err := p.Scan(&m, one(b)); err != nil {
		t.Fatal(err)
	}
	if got := show(&m); !slices.Equal(got, want) {
		t.Errorf("scanned: got %q, want %q", got, want)
	}
	msg := dynamicpb.NewMessage(md)
	if err := proto.Unmarshal(b, msg); err != nil {
		t.Fatal(err)
	}
	if err := p.Walk(&m, msg); err != nil {
		t.Fatal(err)
	}
	if got := show(&m); !slices.Equal(got, want) {
		t.Errorf("walked: got %q, want %q", got, want)
	}
	opts.Omit = append(opts.Omit, Output)
	if err := compile(t, md, opts).Scan(&m, one(b)); err != nil || !slices.Equal(show(&m), want) {
		t.Errorf("an element is left out: %v, %q", err, show(&m))
	}

	for _, tt := range []struct {
		name string
		b    []byte
		want Kind
	}{
		{"what is left out stands twice", cat(str(1, "m"), str(1, "m")), Ambiguous},
		{"a map key that is left out stands twice", cat(sub(4, str(1, "k")), sub(4, str(1, "k"))), Ambiguous},
		{"what is left out is not UTF-8", str(2, "\xff"), Malformed},
		{"what is left out is cut off", cat(tag(1, protowire.BytesType), []byte{9, 'm'}), Malformed},
	} {
		if err := p.Scan(&m, one(tt.b)); kindOf(err) != tt.want {
			t.Errorf("%s: got %v, want %v", tt.name, err, tt.want)
		}
	}
}

func TestInts(t *testing.T) {
	b := func(typed ...[]byte) []byte { return cat(typed...) }
	p := compile(t, inference("ModelInferRequest"), Options{})
	tests := []struct {
		name string
		b    []byte
		max  int
		want []int64
	}{
		{"BOOL", b(tensorOf("A", "BOOL", []uint64{2}), str(7, "\x00\x02")), 9, []int64{0, 1}},
		{"INT8", b(tensorOf("A", "INT8", []uint64{2}), str(7, "\xff\x02")), 9, []int64{-1, 2}},
		{"UINT8", b(tensorOf("A", "UINT8", []uint64{2}), str(7, "\xff\x02")), 9, []int64{255, 2}},
		{"INT16", b(tensorOf("A", "INT16", []uint64{1}), str(7, "\xff\xff")), 9, []int64{-1}},
		{"UINT16", b(tensorOf("A", "UINT16", []uint64{1}), str(7, "\xff\xff")), 9, []int64{65535}},
		{"INT32", b(tensorOf("A", "INT32", []uint64{1}), str(7, "\xfe\xff\xff\xff")), 9, []int64{-2}},
		{"UINT32", b(tensorOf("A", "UINT32", []uint64{1}), str(7, "\xfe\xff\xff\xff")), 9, []int64{math.MaxUint32 - 1}},
		{"INT64", b(tensorOf("A", "INT64", []uint64{1}), str(7, "\xfe\xff\xff\xff\xff\xff\xff\xff")), 9, []int64{-2}},
		{"UINT64", b(tensorOf("A", "UINT64", []uint64{1}), str(7, "\xfe\xff\xff\xff\xff\xff\xff\xff")), 9, []int64{math.MaxInt64}},
		{"FP32", b(tensorOf("A", "FP32", []uint64{1}), str(7, "\xfe\xff\xff\xff")), 9, nil},
		{"BYTES", b(tensorOf("A", "BYTES", []uint64{1}), str(7, "\x00\x00\x00\x00")), 9, nil},
		{"max", b(tensorOf("A", "INT8", []uint64{4}), str(7, "\x01\x02\x03\x04")), 2, []int64{1, 2}},
		{"less than promised", b(tensorOf("A", "INT16", []uint64{4}), str(7, "\x01\x02\x03")), 9, []int64{513}},
		{"typed", b(tensorOf("A", "INT32", []uint64{3}, sub(5, packed(2, math.MaxUint64, 5), packed(2, 6)))), 9, []int64{-1, 5, 6}},
		{"typed one by one", b(tensorOf("A", "UINT64", []uint64{2}, sub(5, vi(5, 7), vi(5, math.MaxUint64)))), 9, []int64{7, math.MaxInt64}},
		{"typed max", b(tensorOf("A", "UINT8", []uint64{3}, sub(5, packed(4, 7, 8, 9)))), 2, []int64{7, 8}},
		{"typed in another field", b(tensorOf("A", "INT32", []uint64{1}, sub(5, packed(3, 7)))), 9, nil},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			var m Message
			for i := range tt.b {
				if err := p.Scan(&m, cut(tt.b, i)); err != nil {
					t.Fatal(err)
				}
				if got := m.Ints(nil, &m.Tensors[0], tt.max); !slices.Equal(got, tt.want) {
					t.Fatalf("cut at %d: got %v, want %v", i, got, tt.want)
				}
			}
			msg := dynamicpb.NewMessage(p.Descriptor())
			if err := proto.Unmarshal(tt.b, msg); err != nil {
				t.Fatal(err)
			}
			if err := p.Walk(&m, msg); err != nil {
				t.Fatal(err)
			}
			if got := m.Ints(nil, &m.Tensors[0], tt.max); !slices.Equal(got, tt.want) {
				t.Fatalf("walked: got %v, want %v", got, tt.want)
			}
		})
	}
}

func TestShadowed(t *testing.T) {
	md := file(t, zoo).Messages().ByName("Zoo")
	p := compile(t, md, Options{})
	tests := []struct {
		name string
		b    []byte
		want string // values, the shadowed in brackets
	}{
		{"singular", cat(str(1, "a"), str(1, "b"), str(1, "c")), "[a] [b] c"},
		{"merged message", cat(sub(11, str(1, "a"), str(6, "b")), sub(11, str(1, "c"), str(6, "d"))), "[a] b c d"},
		{"oneof", cat(str(7, "a"), vi(10, 2), str(7, "b")), "[a] [1] b"},
		{"oneof of messages", cat(sub(9, str(1, "a")), sub(8, str(1, "b"), sub(12, str(1, "c")))), "[a] b c"},
		{"oneof, deep loser", cat(sub(8, str(1, "b"), sub(12, str(1, "c"))), sub(9, str(1, "a"))), "[b] [c] a"},
		{"oneof, loser in two pieces", cat(sub(9, str(1, "a")), sub(9, str(2, "b")), str(7, "c")), "[a] [b] c"},
		{"map", cat(sub(14, vi(1, 2), str(2, "a")), sub(14, vi(1, 4), str(2, "b")), sub(14, vi(1, 2), str(2, "c"))), "[a] b c"},
		{"map of messages", cat(sub(13, str(1, "k"), sub(2, str(2, "a"))), sub(13, str(1, "k"), sub(2, str(2, "b")))), "[k] [a] k b"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			var m Message
			if err := p.Scan(&m, one(tt.b)); err != nil {
				t.Fatal(err)
			}
			var got []string
			for i := range m.Fields {
				s := string(m.AppendText(nil, &m.Fields[i]))
				if m.Fields[i].Shadowed {
					s = "[" + s + "]"
				}
				got = append(got, s)
			}
			if s := strings.Join(got, " "); s != tt.want {
				t.Errorf("got %s, want %s", s, tt.want)
			}
		})
	}
}

// Roles are found whoever parsed the descriptor.
func TestRoleOf(t *testing.T) {
	inner := file(t, zoo)
	set := protodesc.ToFileDescriptorProto(inner)
	b, err := proto.Marshal(set)
	if err != nil {
		t.Fatal(err)
	}
	for _, resolver := range []struct {
		name string
		r    interface {
			FindExtensionByName(protoreflect.FullName) (protoreflect.ExtensionType, error)
			FindExtensionByNumber(protoreflect.FullName, protoreflect.FieldNumber) (protoreflect.ExtensionType, error)
		}
	}{
		{"generated", protoregistry.GlobalTypes},
		{"dynamic", dynamicpb.NewTypes(protoregistry.GlobalFiles)},
		{"none", new(protoregistry.Types)},
	} {
		t.Run(resolver.name, func(t *testing.T) {
			fd := new(descriptorpb.FileDescriptorProto)
			if err := (proto.UnmarshalOptions{Resolver: resolver.r}).Unmarshal(b, fd); err != nil {
				t.Fatal(err)
			}
			d, err := protodesc.NewFile(fd, protoregistry.GlobalFiles)
			if err != nil {
				t.Fatal(err)
			}
			fs := d.Messages().ByName("Zoo").Fields()
			overlay := map[protoreflect.FullName]Role{"zoo.Zoo.stops": Opaque, "zoo.Zoo.final": MaxTokens}
			for name, want := range map[protoreflect.Name]Role{
				"prompt": Prompt, "max_tokens": MaxTokens, "blob": Opaque, // by option
				"optional": Parameter, "far": Parameter, // text by default
				"unread": None, "one": None,
				"stops": Opaque, "final": MaxTokens, // by overlay
			} {
				if got := RoleOf(fs.ByName(name), overlay); got != want {
					t.Errorf("%s: got %v, want %v", name, got, want)
				}
			}
		})
	}
}

func TestCompileRefuses(t *testing.T) {
	tests := []struct {
		field string
		role  Role
		want  string
	}{
		{"zoo.Zoo.max_tokens", Prompt, "needs a string or bytes field"},
		{"zoo.Zoo.one", Prompt, "needs a string or bytes field"},
		{"zoo.Zoo.one", Parameter, "needs a string, bytes or map field"},
		{"zoo.Zoo.packed", Parameter, "a single number"},
		{"zoo.Zoo.prompt", MaxTokens, "needs a single integer field"},
		{"zoo.Zoo.packed", MaxTokens, "needs a single integer field"},
		{"zoo.Zoo.max_tokens", Final, "needs a single bool field"},
		{"zoo.Zoo.prompt", Opaque, "needs a bytes field"},
		{"zoo.Zoo.blob", Model, "needs a string field"},
		{"zoo.Zoo.blob", SequenceID, "needs a single string or integer field"},
		{"zoo.Zoo.by_number", Model, "a map is"},
		{"zoo.Zoo.by_name", Prompt, "a map is"},
		{"zoo.Zoo.one", fieldsv1.Role_ROLE_TENSOR, "needs a repeated message"},
		{"zoo.Zoo.far", fieldsv1.Role_ROLE_TENSOR_RAW, "needs a repeated bytes field"},
		{"zoo.Zoo.prompt", fieldsv1.Role_ROLE_TENSOR_NAME, "in a tensor"},
		{"zoo.Zoo.packed", fieldsv1.Role_ROLE_TENSOR_SHAPE, "in a tensor"},
		{"zoo.Zoo.prompt", Role(99), "newer Sluice"},
	}
	md := file(t, zoo).Messages().ByName("Zoo")
	for _, tt := range tests {
		t.Run(fmt.Sprint(tt.field, " ", tt.role), func(t *testing.T) {
			_, err := Compile(md, Options{Overlay: map[protoreflect.FullName]Role{protoreflect.FullName(tt.field): tt.role}})
			if err == nil || !strings.Contains(err.Error(), tt.want) || !strings.Contains(err.Error(), tt.field) {
				t.Errorf("got %v, want an error with %q and the field's name", err, tt.want)
			}
		})
	}
	t.Run("role of tensors taken away", func(t *testing.T) {
		_, err := Compile(inference("ModelInferRequest"), Options{Overlay: map[protoreflect.FullName]Role{
			"inference.ModelInferRequest.inputs": Parameter}})
		if err == nil {
			t.Error("a message field was accepted as a parameter")
		}
	})
	t.Run("every inference message", func(t *testing.T) {
		n := 0
		inferenceFiles().RangeFilesByPackage("inference", func(f protoreflect.FileDescriptor) bool {
			for i := range f.Messages().Len() {
				compile(t, f.Messages().Get(i), Options{Strict: true})
				n++
			}
			return true
		})
		if n < 10 {
			t.Errorf("there are only %d messages", n)
		}
	})
}

// What is forwarded shares the large parts with what came in, and each holds
// its own references.
func TestEncodeReferences(t *testing.T) {
	pool := new(countingPool)
	b := cat(str(1, "model"), tensorOf("A", "BYTES", []uint64{2}), str(7, string(cat(rawStrings(1, "first"), rawStrings(1, strings.Repeat("z", 300_000))))))
	var in mem.BufferSlice
	for c := range slices.Chunk(b, 16<<10) {
		in = append(in, mem.Copy(c, pool))
	}
	p := compile(t, inference("ModelInferRequest"), Options{Strict: true, Text: Prompt})
	var m Message
	if err := p.Scan(&m, in); err != nil {
		t.Fatal(err)
	}
	same := m.Encode()
	if &same[0] != &in[0] {
		t.Error("without edits the message is not what was scanned")
	}
	same.Free()
	for i := range m.Fields {
		if f := &m.Fields[i]; string(m.Bytes(f)) == "first" {
			m.Set(f, []byte("a longer first element"))
			if string(m.Bytes(f)) != "a longer first element" {
				t.Error("an edited field shows its old value")
			}
		}
	}
	m.Append(str(3, "id"))
	out := m.Encode()
	m.Release()
	in.Free()
	got := dynamicpb.NewMessage(p.Descriptor())
	if err := proto.Unmarshal(out.Materialize(), got); err != nil {
		t.Fatal(err)
	}
	raw := got.Get(got.Descriptor().Fields().ByNumber(7)).List().Get(0).Bytes()
	if want := cat(rawStrings(1, "a longer first element"), rawStrings(1, strings.Repeat("z", 300_000))); !bytes.Equal(raw, want) {
		t.Error("the edited element is not there, or another one has changed")
	}
	glue := 0
	for _, x := range out {
		if s, ok := x.(mem.SliceBuffer); ok {
			glue += len(s)
		}
	}
	if glue > 2*shareAbove {
		t.Errorf("%d bytes were copied", glue)
	}
	if pool.put == pool.got {
		t.Error("the buffers went back while the result needs them")
	}
	out.Free()
	if pool.put != pool.got || pool.got == 0 {
		t.Errorf("%d buffers were taken and %d given back", pool.got, pool.put)
	}
}

type countingPool struct{ got, put int }

func (p *countingPool) Get(n int) *[]byte {
	p.got++
	b := make([]byte, n)
	return &b
}

func (p *countingPool) Put(b *[]byte) {
	p.put++
	clear(*b)
}

// A steady stream of messages of numbers allocates nothing.
func TestScanAllocations(t *testing.T) {
	p := compile(t, inference("ModelInferRequest"), Options{Strict: true, Text: Prompt})
	for _, bm := range benchmarks {
		data := bm.data()
		s := pieces(data, 16<<10)
		var m Message
		if n := testing.AllocsPerRun(20, func() {
			if err := p.Scan(&m, s); err != nil {
				t.Fatal(err)
			}
		}); n > 0 {
			t.Errorf("%s: %v allocations", bm.name, n)
		}
	}
}

// A user's own copy of the API, of another Go type, can be walked.
func TestWalkForeignType(t *testing.T) {
	p := compile(t, file(t, zoo).Messages().ByName("Zoo"), Options{})
	foreign := file(t, strings.NewReplacer(`package: "zoo"`, `package: "mine"`, ".zoo.", ".mine.", `"stops"`, `"halts"`).Replace(zoo)).Messages().ByName("Zoo")
	msg := zooMessage(foreign, 1)
	var a, b Message
	if err := p.Walk(&a, msg); err != nil {
		t.Fatal(err)
	}
	if err := p.Walk(&b, zooMessage(p.Descriptor(), 1)); err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(show(&a), show(&b)) || len(a.Fields) < 20 {
		t.Errorf("got\n%s\nwant\n%s", strings.Join(show(&a), "\n"), strings.Join(show(&b), "\n"))
	}
	for i := range a.Fields {
		if a.Fields[i].Role == Prompt {
			a.Set(&a.Fields[i], []byte("edited"))
			break
		}
	}
	if got := a.Typed().ProtoReflect(); got.Get(foreign.Fields().ByNumber(1)).String() != "edited" {
		t.Error("the edit is not in the user's own type")
	}
	other := file(t, strings.Replace(zoo, "number: 1 type: TYPE_STRING", "number: 1 type: TYPE_BYTES", 1)).Messages().ByName("Zoo")
	if err := p.Walk(&a, dynamicpb.NewMessage(other)); kindOf(err) != Malformed {
		t.Errorf("got %v for a field of another type, want a malformed message", err)
	}
}

func TestUTF8AcrossBuffers(t *testing.T) {
	md := file(t, zoo).Messages().ByName("Zoo")
	p := compile(t, md, Options{})
	for _, s := range []string{"aé€😀z", "\xf0\x9f\x98", "\xe2\x82x", "é\x80", "\xf0\x9f\xc3\xa9", "\xc3\xc3\xa9", "\xed\xa0\x80", "\xf4\x90\x80\x80", "\xc0\x80", "\uFFFD\uFFFD", "😀\xff"} {
		b := str(1, s)
		var m Message
		want := kindOf(p.Scan(&m, one(b)))
		for i := range len(b) + 1 {
			for j := i; j <= len(b); j++ {
				for k := j; k <= len(b); k++ {
					if got := kindOf(p.Scan(&m, cut(b, i, j, k))); got != want {
						t.Fatalf("%q cut at %d, %d, %d: got %v, want %v", s, i, j, k, got, want)
					}
				}
			}
		}
	}
}
