package interceptors

import (
	"context"
	"slices"
	"testing"

	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/encoding/protowire"

	"github.com/sluicegate/sluice/interceptors/dialect"
)

const engineGenerate = "/vllm.grpc.engine.VllmEngine/Generate"

// engine is a vLLM engine that runs the model "words".
func engine(t testing.TB) *Backend {
	return backend(t, "engine", func(o dialect.Options) (*dialect.Dialect, error) {
		o.Model = "words"
		return dialect.VLLM(o)
	}, "words")
}

func lengthed[T string | []byte](n protowire.Number, v T) []byte {
	return protowire.AppendBytes(protowire.AppendTag(nil, n, protowire.BytesType), []byte(v))
}

func varint(n protowire.Number, v uint64) []byte {
	return protowire.AppendVarint(protowire.AppendTag(nil, n, protowire.VarintType), v)
}

func wire(b []byte) *Envelope { return RawEnvelope(mem.BufferSlice{mem.SliceBuffer(b)}) }

func TestPromptsOfTokenIDsAreRefusedUnlessTheyAreAllowed(t *testing.T) {
	tokenized := lengthed(2, slices.Concat(lengthed(1, "a harmless remark"), lengthed(2, []byte{1, 2, 3})))
	for _, allowed := range []bool{false, true} {
		b := engine(t)
		b.AllowTokenIDs = allowed
		call, err := New([]*Backend{b}).Begin(context.Background(), CallInfo{FullMethod: engineGenerate})
		if err != nil {
			t.Fatal(err)
		}
		i, err := call.Request(wire(tokenized))
		if i == nil || i.Model != "words" {
			t.Errorf("the inference is %+v, want one of the engine's model", i)
		}
		if got, want := reasonOf(err), map[bool]Reason{false: Uninspectable, true: ""}[allowed]; got != want {
			t.Errorf("allowed %t: got %v, want %q", allowed, err, want)
		}
		call.End(nil)
	}
}

func TestTokenIDsAreCountedOnceOverAllAnswers(t *testing.T) {
	chunk := func(index uint64, total uint64, ids ...byte) []byte {
		return lengthed(1, slices.Concat(lengthed(1, ids), varint(2, 3), varint(3, total), varint(7, index)))
	}
	complete := func(index uint64, total uint64, ids ...byte) []byte {
		return lengthed(2, slices.Concat(lengthed(1, ids), varint(3, 3), varint(4, total), varint(8, index)))
	}
	for name, c := range map[string]struct {
		answers         [][]byte
		count, reported int64
	}{
		"piece by piece":          {[][]byte{chunk(0, 2, 7, 8), chunk(0, 3, 9), complete(0, 3, 7, 8, 9)}, 3, 3},
		"at once":                 {[][]byte{complete(0, 3, 7, 8, 9)}, 3, 3},
		"two answers":             {[][]byte{chunk(0, 1, 7), chunk(1, 1, 7), chunk(1, 2, 8), complete(0, 1, 7), complete(1, 2, 7, 8)}, 3, 3},
		"two answers at once":     {[][]byte{complete(0, 3, 7, 8, 9), complete(1, 2, 7, 8)}, 5, 5},
		"an engine that lies low": {[][]byte{chunk(0, 1, 7, 8), complete(0, 1, 7, 8)}, 2, 1},
		"an engine that lies":     {[][]byte{chunk(0, 9, 7), complete(0, 9, 7)}, 1, 9},
	} {
		t.Run(name, func(t *testing.T) {
			call, err := New([]*Backend{engine(t)}).Begin(context.Background(), CallInfo{FullMethod: engineGenerate})
			if err != nil {
				t.Fatal(err)
			}
			defer call.End(nil)
			i, err := call.Request(wire(lengthed(3, "tell me")))
			if err != nil {
				t.Fatal(err)
			}
			for _, a := range c.answers {
				if _, verdict, err := call.Response(wire(a)); verdict != Deliver || err != nil {
					t.Fatalf("%v, %v", verdict, err)
				}
			}
			if i.OutputTokens != c.count || i.ReportedOutput != c.reported || i.ReportedInput != 3 {
				t.Errorf("counted %d, reported %d of %d; want %d and %d of 3", i.OutputTokens, i.ReportedOutput, i.ReportedInput, c.count, c.reported)
			}
		})
	}
}
