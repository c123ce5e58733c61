package interceptors

import (
	"testing"

	"github.com/sluicegate/sluice/interceptors/dialect"
	"github.com/sluicegate/sluice/proto/gen/inference"
)

// Rules are asked about the version that the first message names: a later one
// cannot bring another.
func TestAStreamBelongsToOneVersion(t *testing.T) {
	chain := New([]*Backend{backend(t, "mlserver", dialect.MLServer)})
	for _, c := range []struct {
		first, later string
		want         Reason
	}{{"1", "1", ""}, {"1", "", ""}, {"", "", ""}, {"1", "2", MessageAmbiguous}, {"", "2", MessageAmbiguous}} {
		call, err := chain.Begin(t.Context(), CallInfo{FullMethod: modelStreamInfer})
		if err != nil {
			t.Fatal(err)
		}
		for n, version := range []string{c.first, c.later} {
			e := rawEnvelope(t, &inference.ModelInferRequest{ModelName: "m", ModelVersion: version})
			_, err := call.Request(e)
			if want := map[int]Reason{1: c.want}[n]; reasonOf(err) != want {
				t.Errorf("%q, then %q: message %d: %v, want %q", c.first, c.later, n, err, want)
			}
			e.Release()
		}
		call.End(nil)
	}
}
