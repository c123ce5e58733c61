package dialect

import (
	"fmt"
	"math/rand/v2"
	"testing"

	"github.com/sluicegate/sluice/interceptors/fields"
	"github.com/sluicegate/sluice/proto/gen/inference"
	"google.golang.org/grpc/mem"
)

// Whatever came before, a response that is read into the same message says what
// it says when it is read alone, and its fields have the same roles.
func TestAResponseSaysTheSameAfterAnyOther(t *testing.T) {
	m := method(t, "triton", streaming, Options{Tensors: map[string]fields.Role{"x": fields.ErrorText}})
	mostly := func(r *rand.Rand, first string, others ...string) string {
		if n := r.IntN(8 * len(others)); n < len(others) {
			return others[n]
		}
		return first
	}
	answer := func(r *rand.Rand) *inference.ModelStreamInferResponse {
		resp := &inference.ModelInferResponse{ModelName: "m", Id: mostly(r, "a", "b", "")}
		name := mostly(r, "x", "text_output", "num_output_tokens")
		resp.Outputs = append(resp.Outputs, output(name, "BYTES", nil, 1))
		text := []string{"one", " two words", ""}[r.IntN(3)]
		resp.RawOutputContents = [][]byte{append([]byte{byte(len(text)), 0, 0, 0}, text...)}
		switch r.IntN(12) {
		case 0:
			resp.Outputs = append(resp.Outputs, output("num_output_tokens", "INT32", nil, 1))
			resp.RawOutputContents = append(resp.RawOutputContents, []byte{byte(r.IntN(9)), 0, 0, 0})
		case 1:
			resp.Parameters = params{outputTokens: intParam(int64(r.IntN(4)))}
		}
		if resp.Parameters == nil {
			resp.Parameters = params{finalResponse: boolParam(r.IntN(8) == 0)}
		}
		msg := &inference.ModelStreamInferResponse{InferResponse: resp}
		if r.IntN(12) == 0 {
			msg.ErrorMessage = []string{"no", "not that"}[r.IntN(2)]
		}
		return msg
	}
	repeats := 0
	for seed := range uint64(50) {
		r := rand.New(rand.NewPCG(seed, 2))
		var (
			msg  fields.Message
			said Response
		)
		for range 40 {
			b := marshal(t, answer(r))
			alone, err := scan(t, m.Response, b)
			if err != nil {
				t.Fatal(err)
			}
			want := m.ReadResponse(alone)
			if err := m.Response.ScanNext(&msg, mem.BufferSlice{mem.SliceBuffer(b)}); err != nil {
				t.Fatal(err)
			}
			if msg.Repeats() {
				repeats++
			}
			m.ReadNext(&msg, &said)
			if g, w := fmt.Sprintf("%+v", said), fmt.Sprintf("%+v", want); g != w || roles(&msg) != roles(alone) {
				t.Fatalf("after others it says\n%s %s\nalone\n%s %s\n%q", g, roles(&msg), w, roles(alone), b)
			}
			msg.Release()
		}
	}
	if repeats < 100 {
		t.Errorf("only %d messages repeated the one before: next to nothing was tested", repeats)
	}
}

// The same of a request.
func TestARequestSaysTheSameAfterAnyOther(t *testing.T) {
	m := method(t, "triton", unary, Options{})
	var msg fields.Message
	r := rand.New(rand.NewPCG(1, 2))
	for range 400 {
		limit := []string{"5", "17", "no number"}[r.IntN(10)/4]
		req := &inference.ModelInferRequest{ModelName: "m", Id: []string{"a", "b"}[r.IntN(4)/3], Inputs: []*inference.ModelInferRequest_InferInputTensor{
			tensor("text_input", "BYTES", nil, 1), tensor("max_tokens", "BYTES", nil, 1),
		}}
		for _, text := range []string{"a prompt"[:r.IntN(8)], limit} {
			req.RawInputContents = append(req.RawInputContents, append([]byte{byte(len(text)), 0, 0, 0}, text...))
		}
		b := marshal(t, req)
		alone, err := scan(t, m.Request, b)
		if err != nil {
			t.Fatal(err)
		}
		want, wantErr := m.ReadRequest(alone)
		if err := m.Request.ScanNext(&msg, mem.BufferSlice{mem.SliceBuffer(b)}); err != nil {
			t.Fatal(err)
		}
		got, err := m.ReadRequest(&msg)
		if got != want || fmt.Sprint(err) != fmt.Sprint(wantErr) || roles(&msg) != roles(alone) {
			t.Fatalf("after others it says %+v %v, alone %+v %v", got, err, want, wantErr)
		}
		if wantErr == nil && want.MaxTokens == 0 {
			t.Fatal("the limit is not read")
		}
		msg.Release()
	}
}

func roles(m *fields.Message) (s string) {
	for i := range m.Fields {
		s += m.Fields[i].Role.String() + " "
	}
	return s
}
