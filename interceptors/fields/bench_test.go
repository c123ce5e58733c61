package fields

import (
	"bytes"
	"fmt"
	"math"
	"strings"
	"testing"

	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/dynamicpb"
)

// request encodes a ModelInferRequest with one tensor and its raw entry.
func request(name, datatype string, shape int, raw []byte) []byte {
	var in []byte
	in = protowire.AppendTag(in, 1, protowire.BytesType)
	in = protowire.AppendString(in, name)
	in = protowire.AppendTag(in, 2, protowire.BytesType)
	in = protowire.AppendString(in, datatype)
	in = protowire.AppendTag(in, 3, protowire.BytesType)
	in = protowire.AppendBytes(in, protowire.AppendVarint(nil, uint64(shape)))
	var b []byte
	b = protowire.AppendTag(b, 1, protowire.BytesType)
	b = protowire.AppendString(b, "model")
	b = protowire.AppendTag(b, 3, protowire.BytesType)
	b = protowire.AppendString(b, "id-1")
	b = protowire.AppendTag(b, 5, protowire.BytesType)
	b = protowire.AppendBytes(b, in)
	b = protowire.AppendTag(b, 7, protowire.BytesType)
	return protowire.AppendBytes(b, raw)
}

func rawStrings(n int, s string) []byte {
	var b []byte
	for range n {
		b = append(b, byte(len(s)), byte(len(s)>>8), byte(len(s)>>16), byte(len(s)>>24))
		b = append(b, s...)
	}
	return b
}

func pieces(b []byte, size int) mem.BufferSlice {
	var s mem.BufferSlice
	for len(b) > size {
		s, b = append(s, mem.SliceBuffer(b[:size])), b[size:]
	}
	return append(s, mem.SliceBuffer(b))
}

var benchmarks = []struct {
	name string
	data func() []byte
}{
	{"prompt-200B", func() []byte { return request("text_input", "BYTES", 1, rawStrings(1, strings.Repeat("a", 150))) }},
	{"fp32-1MB", func() []byte { return request("X", "FP32", 1<<18, make([]byte, 1<<20)) }},
	{"fp32-4MB", func() []byte { return request("X", "FP32", 1<<20, make([]byte, 4<<20)) }},
	{"fp32-8MB", func() []byte { return request("X", "FP32", 1<<21, make([]byte, 8<<20)) }},
	{"strings-1000", func() []byte {
		return request("TEXT", "BYTES", 1000, rawStrings(1000, "a short prompt, as they come in batches"))
	}},
}

func BenchmarkScan(b *testing.B) {
	p, err := Compile(inference("ModelInferRequest"), Options{Strict: true, Text: Prompt})
	if err != nil {
		b.Fatal(err)
	}
	for _, bm := range benchmarks {
		data := bm.data()
		for _, size := range []int{math.MaxInt, 16 << 10} {
			name := bm.name + "/one-buffer"
			if size < math.MaxInt {
				if len(data) <= size {
					continue
				}
				name = fmt.Sprintf("%s/%dKiB-buffers", bm.name, size>>10)
			}
			s := pieces(data, size)
			b.Run(name, func(b *testing.B) {
				var m Message
				b.ReportAllocs()
				b.SetBytes(int64(len(data)))
				for b.Loop() {
					if err := p.Scan(&m, s); err != nil {
						b.Fatal(err)
					}
				}
			})
		}
	}
}

// chunk is a message of a stream as Triton sends it.
func chunk(id, words string, last bool) []byte {
	text := lengthDelimited(nil, 1, []byte("model"))
	text = lengthDelimited(text, 3, []byte(id))
	final := []byte{2<<3 | 2, 2, 1 << 3, byte(protowire.EncodeBool(last))}
	text = lengthDelimited(text, 4, append(lengthDelimited(nil, 1, []byte("triton_final_response")), final...))
	out := lengthDelimited(lengthDelimited(nil, 1, []byte("text_output")), 2, []byte("BYTES"))
	text = lengthDelimited(text, 5, lengthDelimited(out, 3, []byte{1}))
	text = lengthDelimited(text, 6, rawStrings(1, words))
	return lengthDelimited(nil, 2, text)
}

func lengthDelimited(b []byte, num protowire.Number, v []byte) []byte {
	return protowire.AppendBytes(protowire.AppendTag(b, num, protowire.BytesType), v)
}

// BenchmarkScanChunk is the price of each message of a token stream, of which the
// one before is known or not.
func BenchmarkScanChunk(b *testing.B) {
	p, err := Compile(inference("ModelStreamInferResponse"), Options{Text: Output})
	if err != nil {
		b.Fatal(err)
	}
	chunks := []mem.BufferSlice{one(chunk("id-1", " and some words ", false)), one(chunk("id-1", " and some more ", false))}
	for _, known := range []bool{false, true} {
		b.Run(fmt.Sprintf("known=%t", known), func(b *testing.B) {
			var (
				m Message
				n int
			)
			b.ReportAllocs()
			for b.Loop() {
				if n++; known {
					err = p.ScanNext(&m, chunks[n&1])
				} else {
					err = p.Scan(&m, chunks[n&1])
				}
				if err != nil {
					b.Fatal(err)
				}
				m.Release()
			}
		})
	}
}

// The same over Go messages (dynamic ones: generated types are faster).
func BenchmarkWalk(b *testing.B) {
	p, err := Compile(inference("ModelInferRequest"), Options{Strict: true, Text: Prompt})
	if err != nil {
		b.Fatal(err)
	}
	for _, bm := range benchmarks[:2] {
		msg := dynamicpb.NewMessage(inference("ModelInferRequest"))
		if err := proto.Unmarshal(bm.data(), msg); err != nil {
			b.Fatal(err)
		}
		b.Run(bm.name, func(b *testing.B) {
			var m Message
			b.ReportAllocs()
			for b.Loop() {
				if err := p.Walk(&m, msg); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

func BenchmarkEncode(b *testing.B) {
	p, err := Compile(inference("ModelInferRequest"), Options{Strict: true, Text: Prompt})
	if err != nil {
		b.Fatal(err)
	}
	s := pieces(request("X", "FP32", 1<<21, make([]byte, 8<<20)), 16<<10)
	var m Message
	if err := p.Scan(&m, s); err != nil {
		b.Fatal(err)
	}
	for i := range m.Fields {
		if m.Fields[i].Role == RequestID {
			m.Set(&m.Fields[i], bytes.Repeat([]byte("x"), 20))
		}
	}
	b.ReportAllocs()
	for b.Loop() {
		m.Encode().Free()
	}
}
