package dialect

import (
	"math"
	"strings"
	"testing"

	"github.com/sluicegate/sluice/interceptors/fields"
	"github.com/sluicegate/sluice/proto/gen/inference"
	"google.golang.org/protobuf/proto"
)

func TestTheLimitOnOutputIsReadOrRefusedButNeverIgnored(t *testing.T) {
	const bad = -1
	param := func(p *inference.InferParameter) *inference.ModelInferRequest {
		return &inference.ModelInferRequest{Parameters: params{"max_tokens": p}}
	}
	sampling := func(json ...string) *inference.ModelInferRequest {
		return &inference.ModelInferRequest{Inputs: []*inference.ModelInferRequest_InferInputTensor{
			tensor("sampling_parameters", "BYTES", texts(json...), int64(len(json)))}}
	}
	in := func(ts ...*inference.ModelInferRequest_InferInputTensor) *inference.ModelInferRequest {
		return &inference.ModelInferRequest{Inputs: ts}
	}
	many := make([]int32, maxRows+1)
	for n := range many {
		many[n] = 1
	}
	for _, c := range []struct {
		name string
		msg  *inference.ModelInferRequest
		want int64
	}{
		{"absent", &inference.ModelInferRequest{}, 0},
		{"parameter, int64", param(intParam(7)), 7},
		{"parameter, uint64", param(uintParam(7)), 7},
		{"parameter, decimal string", param(stringParam("7")), 7},
		{"parameter, whole double", param(doubleParam(7)), 7},
		{"parameter, largest", param(intParam(math.MaxInt32)), math.MaxInt32},
		{"parameter, zero", param(intParam(0)), bad},
		{"parameter, negative", param(intParam(-1)), bad},
		{"parameter, too large", param(intParam(math.MaxInt32 + 1)), bad},
		{"parameter, too large for an int64", param(uintParam(math.MaxUint64)), bad},
		{"parameter, bool", param(boolParam(true)), bad},
		{"parameter, fraction", param(doubleParam(7.5)), bad},
		{"parameter, not a number", param(doubleParam(math.NaN())), bad},
		{"parameter, words", param(stringParam("seven")), bad},
		{"parameter, empty string", param(stringParam("")), bad},
		{"parameter, hexadecimal", param(stringParam("0x10")), bad},
		{"parameter of an input is not the request's", in(&inference.ModelInferRequest_InferInputTensor{
			Name: "x", Datatype: "FP32", Shape: []int64{1}, Contents: &inference.InferTensorContents{Fp32Contents: []float32{1}},
			Parameters: params{"max_tokens": intParam(-5)}}), 0},
		{"JSON", sampling(`{"max_tokens": 7}`), 7},
		{"JSON, null", sampling(`{"max_tokens": null}`), 0},
		{"JSON, twice: the last counts, as in Python", sampling(`{"max_tokens": 1, "max_tokens": 9}`), 9},
		{"JSON, escaped name", sampling(`{"max\u005ftokens": 9}`), 9},
		{"JSON, another case is another name", sampling(`{"MAX_TOKENS": 9}`), 0},
		{"JSON, zero", sampling(`{"max_tokens": 0}`), bad},
		{"JSON, string", sampling(`{"max_tokens": "7"}`), bad},
		{"JSON, fraction", sampling(`{"max_tokens": 7.5}`), bad},
		{"JSON, exponent", sampling(`{"max_tokens": 1e9}`), bad},
		{"JSON, huge", sampling(`{"max_tokens": 99999999999999999999}`), bad},
		{"JSON, list", sampling(`{"max_tokens": [7]}`), bad},
		{"JSON that only Python reads", sampling(`{"max_tokens": 100000, "temperature": NaN}`), bad},
		{"JSON that only Python reads, after white space", sampling(" \n{\"max_tokens\": 100000, \"temperature\": Infinity}"), bad},
		{"JSON that ends early", sampling(`{"max_tokens": 1`), bad},
		{"no JSON is the server's to refuse", sampling(`not json`), 0},
		{"no object is the server's to refuse", sampling(`[7]`), 0},
		{"empty is the server's to refuse", sampling(``), 0},
		{"JSON, several: the largest", sampling(`{"max_tokens": 3}`, `{"max_tokens": 5}`), 5},
		{"tensor", in(tensor("max_tokens", "INT32", ints(7), 1, 1)), 7},
		{"tensor of TensorRT-LLM itself", in(tensor("request_output_len", "INT32", ints(7), 1)), 7},
		{"tensor, a batch: the model writes all", in(tensor("max_tokens", "INT32", ints(1, 1000), 2, 1)), 1001},
		{"tensor, a bad row", in(tensor("max_tokens", "INT32", ints(1, 0), 2)), bad},
		{"tensor, more rows than are read", in(tensor("max_tokens", "INT32", ints(many...), int64(len(many)))), bad},
		{"tensor, negative", in(tensor("max_tokens", "INT32", ints(-7), 1)), bad},
		{"tensor, no elements", in(tensor("max_tokens", "INT32", nil, 0)), 0},
		{"tensor, text", in(tensor("max_tokens", "BYTES", texts("7"), 1)), 7},
		{"tensor, bad text", in(tensor("max_tokens", "BYTES", texts("seven"), 1)), bad},
		{"tensor, float", in(tensor("max_tokens", "FP32", &inference.InferTensorContents{Fp32Contents: []float32{7}}, 1)), bad},
		{"tensor, bool", in(tensor("max_tokens", "BOOL", &inference.InferTensorContents{BoolContents: []bool{true}}, 1)), bad},
		{"tensor, UINT64", in(tensor("max_tokens", "UINT64", &inference.InferTensorContents{Uint64Contents: []uint64{7}}, 1)), 7},
		{"tensor, UINT64, huge", in(tensor("max_tokens", "UINT64", &inference.InferTensorContents{Uint64Contents: []uint64{math.MaxUint64}}, 1)), bad},
		{"several places: the largest", &inference.ModelInferRequest{Parameters: params{"max_tokens": intParam(3)},
			Inputs: sampling(`{"max_tokens": 5}`).Inputs}, 5},
		{"choices in JSON", sampling(`{"max_tokens": 7, "n": 3}`), 21},
		{"choices in JSON without a limit", sampling(`{"n": 3}`), 0},
		{"choices in JSON, bad", sampling(`{"max_tokens": 7, "n": 0}`), bad},
		{"choices in JSON, text", sampling(`{"max_tokens": 7, "n": "3"}`), bad},
		{"choices in JSON, too many", sampling(`{"max_tokens": 7, "n": 5000}`), bad},
		{"choices as a parameter", &inference.ModelInferRequest{Parameters: params{"max_tokens": intParam(7), "n": intParam(3)}}, 21},
		{"choices as a parameter, text", &inference.ModelInferRequest{Parameters: params{"max_tokens": intParam(7), "n": stringParam("3")}}, 21},
		{"another model's n", &inference.ModelInferRequest{Parameters: params{"max_tokens": intParam(7), "n": stringParam("north")}}, 7},
		{"largest of all does not overflow", &inference.ModelInferRequest{Parameters: params{
			"max_tokens": intParam(math.MaxInt32), "n": intParam(math.MaxInt64)}}, math.MaxInt32 * math.MaxInt32},
	} {
		t.Run(c.name, func(t *testing.T) {
			c.msg.ModelName, c.msg.Id = "m", "i"
			m := method(t, "triton", unary, Options{})
			bothWays(t, m.Request, c.msg, func(t *testing.T, msg *fields.Message) {
				r, err := m.ReadRequest(msg)
				switch {
				case c.want == bad && kindOf(err) != fields.Malformed:
					t.Errorf("got %d, %v; want it refused as malformed", r.MaxTokens, err)
				case c.want != bad && (err != nil || r.MaxTokens != c.want):
					t.Errorf("got %d, %v; want %d", r.MaxTokens, err, c.want)
				}
				if r.Model != "m" || r.ID != "i" {
					t.Errorf("model %q and id %q are not filled in", r.Model, r.ID)
				}
			})
		})
	}
}

func TestAnErrorInARequestQuotesNoValue(t *testing.T) {
	m := method(t, "triton", unary, Options{})
	for name, req := range map[string]*inference.ModelInferRequest{
		"parameter": {Parameters: params{"max_tokens": stringParam("SECRET")}},
		"JSON": {Inputs: []*inference.ModelInferRequest_InferInputTensor{
			tensor("sampling_parameters", "BYTES", texts(`{"max_tokens": "SECRET"}`), 1)}},
		"not JSON": {Inputs: []*inference.ModelInferRequest_InferInputTensor{
			tensor("sampling_parameters", "BYTES", texts(`{SECRET`), 1)}},
	} {
		t.Run(name, func(t *testing.T) {
			bothWays(t, m.Request, req, func(t *testing.T, msg *fields.Message) {
				_, err := m.ReadRequest(msg)
				if err == nil || strings.Contains(err.Error(), "SECRET") {
					t.Errorf("got %v", err)
				}
			})
		})
	}
}

func TestASequenceIsNamedByNumberOrText(t *testing.T) {
	for _, c := range []struct {
		name string
		id   *inference.InferParameter
		want string
	}{
		{"int64", intParam(42), "42"},
		{"uint64 above int64", uintParam(math.MaxUint64), "18446744073709551615"},
		{"text", stringParam("conversation-7"), "conversation-7"},
		{"the number 0 is none", intParam(0), ""},
		{"unsigned 0 is none", uintParam(0), ""},
		{"the text 0 is one", stringParam("0"), "0"},
		{"empty text is none", stringParam(""), ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			m := method(t, "triton", unary, Options{})
			req := &inference.ModelInferRequest{ModelName: "m", Parameters: params{"sequence_id": c.id}}
			bothWays(t, m.Request, req, func(t *testing.T, msg *fields.Message) {
				r, err := m.ReadRequest(msg)
				if err != nil || r.Sequence != c.want {
					t.Errorf("got %q, %v; want %q", r.Sequence, err, c.want)
				}
			})
		})
	}
}

func TestTheEndIsAskedForUnlessTheCallerDid(t *testing.T) {
	for _, c := range []struct {
		name  string
		param *inference.InferParameter
		wants bool
		bad   bool
	}{
		{name: "absent"},
		{name: "false", param: boolParam(false)},
		{name: "true", param: boolParam(true), wants: true},
		{name: "no value", param: &inference.InferParameter{}},
		{name: "int64 0", param: intParam(0), bad: true},
		{name: "int64 1", param: intParam(1), bad: true},
		{name: "uint64", param: uintParam(1), bad: true},
		{name: "double", param: doubleParam(1), bad: true},
		{name: "text", param: stringParam("true"), bad: true},
	} {
		t.Run(c.name, func(t *testing.T) {
			m := method(t, "triton", streaming, Options{})
			req := &inference.ModelInferRequest{ModelName: "m", Parameters: params{"other": intParam(1)}}
			if c.param != nil {
				req.Parameters[emptyFinal] = c.param
			}
			bothWays(t, m.Request, req, func(t *testing.T, msg *fields.Message) {
				r, err := m.ReadRequest(msg)
				if c.bad {
					if kindOf(err) != fields.Malformed {
						t.Errorf("got %v, want it refused as malformed", err)
					}
					return
				}
				if err != nil || r.WantsFinal != c.wants {
					t.Fatalf("got %t, %v; want %t", r.WantsFinal, err, c.wants)
				}
				m.AskFinal(msg, &r)
				if c.wants && msg.Edited() {
					t.Error("the message was edited although it asks already")
				}
				got, want := new(inference.ModelInferRequest), proto.CloneOf(req)
				want.Parameters[emptyFinal] = boolParam(true)
				if edited(t, msg, got); !proto.Equal(got, want) {
					t.Errorf("got %v, want %v", got, want)
				}
			})
		})
	}
}

func TestAnIdIsReplacedOrAdded(t *testing.T) {
	for _, id := range []string{"", "theirs"} {
		t.Run("was "+id, func(t *testing.T) {
			m := method(t, "triton", streaming, Options{})
			req := &inference.ModelInferRequest{ModelName: "m", Id: id, Parameters: params{"p": intParam(1)}}
			bothWays(t, m.Request, req, func(t *testing.T, msg *fields.Message) {
				r, err := m.ReadRequest(msg)
				if err != nil || r.ID != id {
					t.Fatalf("read id %q, %v", r.ID, err)
				}
				m.SetID(msg, &r, "ours")
				m.AskFinal(msg, &r)
				got, want := new(inference.ModelInferRequest), proto.CloneOf(req)
				want.Id, want.Parameters[emptyFinal] = "ours", boolParam(true)
				if edited(t, msg, got); !proto.Equal(got, want) {
					t.Errorf("got %v, want %v", got, want)
				}
				if req.Id != id {
					t.Error("the message that was read was changed")
				}
			})
		})
	}
}

func TestTensorsHaveTheRoleOfTheirName(t *testing.T) {
	for _, c := range []struct {
		name string
		want fields.Role
	}{
		{"text_input", fields.Prompt},
		{"anything", fields.Prompt},
		{"stop_words", fields.Parameter},
		{"sampling_parameters", fields.Parameter},
		{"mine", fields.Parameter},
		{"hidden", fields.Parameter}, // text is never left unread, whatever it is called
	} {
		t.Run(c.name, func(t *testing.T) {
			m := method(t, "triton", unary, Options{Tensors: map[string]fields.Role{"mine": fields.Parameter, "hidden": fields.Opaque}})
			req := &inference.ModelInferRequest{ModelName: "m", Inputs: []*inference.ModelInferRequest_InferInputTensor{
				tensor(c.name, "BYTES", texts("x"), 1)}}
			bothWays(t, m.Request, req, func(t *testing.T, msg *fields.Message) {
				if _, err := m.ReadRequest(msg); err != nil {
					t.Fatal(err)
				}
				for k := range msg.Fields {
					if f := &msg.Fields[k]; msg.IsElement(f) && f.Role != c.want {
						t.Errorf("its element is %v, want %v", f.Role, c.want)
					}
				}
			})
		})
	}
}
