package telemetry

import (
	"testing"

	"go.opentelemetry.io/otel/sdk/metric/metricdata"

	"github.com/sluicegate/sluice/interceptors"
	oip "github.com/sluicegate/sluice/proto/gen/inference"
)

// A model server that reports 6 tokens where 3 words were counted, and nothing of the
// prompt.
func TestDrift(t *testing.T) {
	s := watch()
	chain := interceptors.New([]*interceptors.Backend{backend(t)}, s.policy)
	call, err := chain.Begin(t.Context(), info(stream, nil))
	if err != nil {
		t.Fatal(err)
	}
	i, err := ask(call, request("llama", "a", "one two"))
	if err != nil {
		t.Fatal(err)
	}
	i.Hand()
	m := chunk("a", "three four five", true).(*oip.ModelStreamInferResponse)
	m.InferResponse.Outputs = append(m.InferResponse.Outputs, &oip.ModelInferResponse_InferOutputTensor{
		Name: "num_output_tokens", Datatype: "INT32", Shape: []int64{1}, Contents: &oip.InferTensorContents{IntContents: []int32{6}}})
	if err := answer(call, m); err != nil {
		t.Fatal(err)
	}
	call.End(nil)
	got, ok := s.metrics(t)["sluice.tokens.drift"].Data.(metricdata.Histogram[float64])
	if !ok || len(got.DataPoints) != 1 {
		t.Fatalf("got %+v", got)
	}
	p := got.DataPoints[0]
	if kind, _ := p.Attributes.Value("gen_ai.token.type"); p.Sum != 2 || p.Count != 1 || kind.AsString() != "output" {
		t.Errorf("got %+v", p)
	}
}
