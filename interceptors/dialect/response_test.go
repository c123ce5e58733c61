package dialect

import (
	"math"
	"testing"
	"time"

	"github.com/sluicegate/sluice/interceptors/fields"
	"github.com/sluicegate/sluice/proto/gen/inference"
	"google.golang.org/protobuf/proto"
)

func output(name, datatype string, c *inference.InferTensorContents, shape ...int64) *inference.ModelInferResponse_InferOutputTensor {
	return &inference.ModelInferResponse_InferOutputTensor{Name: name, Datatype: datatype, Shape: shape, Contents: c}
}

func TestATritonResponseEndsItsInferenceWhenTheServerSaysSo(t *testing.T) {
	type want struct{ final, empty, failed bool }
	word := []*inference.ModelInferResponse_InferOutputTensor{output("text_output", "BYTES", texts("word"), 1)}
	flag := func(v bool) params { return params{finalResponse: boolParam(v)} }
	for _, c := range []struct {
		name string
		msg  *inference.ModelStreamInferResponse
		want want
	}{
		{"a chunk", &inference.ModelStreamInferResponse{InferResponse: &inference.ModelInferResponse{Id: "a", Outputs: word, Parameters: flag(false)}}, want{}},
		{"a chunk without a flag", &inference.ModelStreamInferResponse{InferResponse: &inference.ModelInferResponse{Id: "a", Outputs: word}}, want{}},
		{"the last chunk", &inference.ModelStreamInferResponse{InferResponse: &inference.ModelInferResponse{Id: "a", Outputs: word, Parameters: flag(true)}}, want{final: true}},
		{"a numeric last chunk", &inference.ModelStreamInferResponse{InferResponse: &inference.ModelInferResponse{Id: "a", Parameters: flag(true),
			Outputs: []*inference.ModelInferResponse_InferOutputTensor{output("y", "INT32", ints(1), 1)}}}, want{final: true}},
		{"the empty end", &inference.ModelStreamInferResponse{InferResponse: &inference.ModelInferResponse{Id: "a", Parameters: flag(true)}}, want{final: true, empty: true}},
		{"an error that ends", &inference.ModelStreamInferResponse{ErrorMessage: "no", InferResponse: &inference.ModelInferResponse{Id: "a", Parameters: flag(true)}}, want{final: true, failed: true}},
		{"an error of no model", &inference.ModelStreamInferResponse{ErrorMessage: "no", InferResponse: &inference.ModelInferResponse{Id: "a"}}, want{final: true, failed: true}},
		{"an error before the end", &inference.ModelStreamInferResponse{ErrorMessage: "no", InferResponse: &inference.ModelInferResponse{Id: "a", Parameters: flag(false)}}, want{failed: true}},
	} {
		t.Run(c.name, func(t *testing.T) {
			m := method(t, "triton", streaming, Options{})
			bothWays(t, m.Response, c.msg, func(t *testing.T, msg *fields.Message) {
				r := m.ReadResponse(msg)
				if got := (want{r.Final, r.Empty, r.Failed}); got != c.want || string(r.ID) != "a" {
					t.Errorf("got %+v of %q, want %+v of a", got, r.ID, c.want)
				}
			})
		})
	}
}

func TestOnlyTheStreamEndsAnInferenceThatIsTheWholeCall(t *testing.T) {
	m := method(t, "mlserver", streaming, Options{})
	resp := &inference.ModelInferResponse{Id: "a", Parameters: params{finalResponse: boolParam(true)}}
	bothWays(t, m.Response, resp, func(t *testing.T, msg *fields.Message) {
		if r := m.ReadResponse(msg); r.Final {
			t.Error("the inference was ended by a message")
		}
	})
	for _, server := range []string{"triton", "mlserver", "kserve"} {
		m := method(t, server, unary, Options{})
		bothWays(t, m.Response, resp, func(t *testing.T, msg *fields.Message) {
			if r := m.ReadResponse(msg); !r.Final {
				t.Errorf("%s: the answer to a unary call does not end it", server)
			}
		})
	}
}

func TestReportedUsageIsReadAndNonsenseIsNot(t *testing.T) {
	tensors := func(ts ...*inference.ModelInferResponse_InferOutputTensor) *inference.ModelInferResponse {
		return &inference.ModelInferResponse{Outputs: ts}
	}
	many := make([]int32, 100)
	for n := range many {
		many[n] = 1
	}
	for _, c := range []struct {
		name          string
		msg           *inference.ModelInferResponse
		input, output int64
	}{
		{"none", &inference.ModelInferResponse{}, 0, 0},
		{"parameters", &inference.ModelInferResponse{Parameters: params{inputTokens: intParam(3), outputTokens: intParam(4)}}, 3, 4},
		{"parameters, negative", &inference.ModelInferResponse{Parameters: params{inputTokens: intParam(-3), outputTokens: intParam(-4)}}, 0, 0},
		{"parameters, too large", &inference.ModelInferResponse{Parameters: params{inputTokens: intParam(math.MaxInt64), outputTokens: intParam(math.MaxInt32 + 1)}}, 0, 0},
		{"parameters, text", &inference.ModelInferResponse{Parameters: params{inputTokens: stringParam("3")}}, 0, 0},
		{"tensors", tensors(output(inputTokens, "UINT32", &inference.InferTensorContents{UintContents: []uint32{3}}, 1),
			output(outputTokens, "INT32", ints(4), 1)), 3, 4},
		{"tensors, several choices", tensors(output(outputTokens, "INT32", ints(1, 1, 2), 3)), 0, 4},
		{"tensors, a hundred choices", tensors(output(outputTokens, "INT32", ints(many...), 100)), 0, 100},
		{"tensors, negative", tensors(output(outputTokens, "INT32", ints(-1, 2), 2)), 0, 2},
		{"tensors, too large", tensors(output(outputTokens, "UINT64", &inference.InferTensorContents{Uint64Contents: []uint64{math.MaxUint64, 2}}, 2)), 0, 2},
		{"tensors, float", tensors(output(outputTokens, "FP32", &inference.InferTensorContents{Fp32Contents: []float32{4}}, 1)), 0, 0},
		{"parameters of an output are not the answer's", tensors(&inference.ModelInferResponse_InferOutputTensor{
			Name: "y", Datatype: "INT32", Shape: []int64{1}, Contents: ints(1), Parameters: params{outputTokens: intParam(9)}}), 0, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			m := method(t, "triton", unary, Options{})
			bothWays(t, m.Response, c.msg, func(t *testing.T, msg *fields.Message) {
				if r := m.ReadResponse(msg); r.InputTokens != c.input || r.OutputTokens != c.output {
					t.Errorf("got %d in, %d out; want %d, %d", r.InputTokens, r.OutputTokens, c.input, c.output)
				}
			})
		})
	}
}

func TestTheReasonForTheEndIsNotOutput(t *testing.T) {
	m := method(t, "triton", streaming, Options{})
	resp := &inference.ModelStreamInferResponse{InferResponse: &inference.ModelInferResponse{Outputs: []*inference.ModelInferResponse_InferOutputTensor{
		output("text_output", "BYTES", texts("word"), 1), output("finish_reason", "BYTES", texts("length"), 1)}}}
	bothWays(t, m.Response, resp, func(t *testing.T, msg *fields.Message) {
		m.ReadResponse(msg)
		for k := range msg.Fields {
			if f := &msg.Fields[k]; f.Role == fields.Output && string(msg.Bytes(f)) != "word" {
				t.Errorf("%q counts as output", msg.Bytes(f))
			}
		}
	})
}

func TestARefusalIsAResponseOfTheProtocol(t *testing.T) {
	m := method(t, "triton", streaming, Options{})
	for _, c := range []struct {
		name             string
		model, id        string
		retry            time.Duration
		want             params
		wantModel, wantI string
	}{
		{"with all", "llama", "a", 1500 * time.Millisecond, params{"sluice_retry_after_ms": intParam(1500)}, "llama", "a"},
		{"rounded up, as the trailer", "llama", "a", time.Microsecond, params{"sluice_retry_after_ms": intParam(1)}, "llama", "a"},
		{"no retry named", "llama", "a", 0, params{}, "llama", "a"},
		{"no retry wanted", "llama", "a", -1, params{}, "llama", "a"},
		{"without names", "", "", 0, params{}, "", ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			b := m.Refusal(c.model, c.id, "QUEUE_FULL: try again later", "RESOURCE_EXHAUSTED", "QUEUE_FULL", c.retry)
			got := new(inference.ModelStreamInferResponse)
			if err := proto.Unmarshal(b, got); err != nil {
				t.Fatal(err)
			}
			c.want[finalResponse] = boolParam(true)
			c.want["sluice_code"] = stringParam("RESOURCE_EXHAUSTED")
			c.want["sluice_reason"] = stringParam("QUEUE_FULL")
			want := &inference.ModelStreamInferResponse{
				ErrorMessage:  "QUEUE_FULL: try again later",
				InferResponse: &inference.ModelInferResponse{ModelName: c.wantModel, Id: c.wantI, Parameters: c.want},
			}
			if !proto.Equal(got, want) {
				t.Errorf("got %v, want %v", got, want)
			}
			msg, err := scan(t, m.Response, b)
			if err != nil {
				t.Fatal(err)
			}
			if r := m.ReadResponse(msg); !r.Final || !r.Failed || r.Empty || string(r.ID) != c.id || msg.Unknown > 0 {
				t.Errorf("read back as %+v", r)
			}
		})
	}
	for _, other := range []*Method{method(t, "triton", unary, Options{}), method(t, "mlserver", streaming, Options{}), method(t, "kserve", unary, Options{})} {
		if b := other.Refusal("m", "a", "t", "c", "r", 0); b != nil {
			t.Errorf("%s refuses in band, which its API cannot say", other.Name)
		}
	}
}
