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

// Thresholds of budgets are counted by budget and percentage, all other events by name.
func TestThresholdsAreCounted(t *testing.T) {
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
	for _, percent := range []string{"50", "80", "50"} {
		i.Emit(interceptors.Event{Policy: "budget", Name: "threshold", Attributes: []string{"budget", "day", "percent", percent}})
	}
	i.Emit(interceptors.Event{Policy: "budget", Name: "drift", Attributes: []string{"counted", "1", "reported", "7"}})
	call.End(nil)
	got := points(t, s.metrics(t)["sluice.events"])
	want := map[string]float64{
		"sluice.budget=day,sluice.event=threshold,sluice.percent=50,sluice.policy=budget": 2,
		"sluice.budget=day,sluice.event=threshold,sluice.percent=80,sluice.policy=budget": 1,
		"sluice.event=drift,sluice.policy=budget":                                         1,
	}
	if len(got) != len(want) {
		t.Errorf("got %v", got)
	}
	for k, n := range want {
		if float64(got[k]) != n {
			t.Errorf("%s: %v, want %v", k, got[k], n)
		}
	}
}
