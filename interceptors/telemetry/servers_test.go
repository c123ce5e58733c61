package telemetry

import (
	"fmt"
	"maps"
	"slices"
	"testing"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/sdk/metric/metricdata"

	"github.com/sluicegate/sluice/interceptors"
)

// The span of an inference says which model server it went to.
func TestServerOfAnInference(t *testing.T) {
	for address, want := range map[string][2]string{
		"":              {"", ""},
		"10.0.0.7:8001": {"10.0.0.7", "8001"},
		"[::1]:8001":    {"::1", "8001"},
		"/run/model":    {"/run/model", ""},
	} {
		s := watch()
		chain := interceptors.New([]*interceptors.Backend{backend(t)}, s.policy)
		call, err := chain.Begin(t.Context(), info(infer, nil))
		if err != nil {
			t.Fatal(err)
		}
		i, err := ask(call, request("llama", "1", "a prompt"))
		if err != nil {
			t.Fatal(err)
		}
		if address != "" && !i.Place(address, nil) {
			t.Error("it is not placed")
		}
		call.End(nil)
		sp := s.span(t, "text_completion llama")
		if got := [2]string{attr(sp, "server.address"), attr(sp, "server.port")}; got != want {
			t.Errorf("%q: got %q, want %q", address, got, want)
		}
	}
}

func TestWatchServers(t *testing.T) {
	s := watch()
	stop := s.policy.WatchServers(func() []Server {
		return []Server{
			{Backend: "m", Address: "10.0.0.7:8001", Ready: true, InUse: 3, Waiting: 4, Running: 5, Utilization: .5},
			{Backend: "m", Address: "10.0.0.8:8001", Ejected: true},
		}
	})
	got := make(map[string]string)
	for name, m := range s.metrics(t) {
		g, ok := m.Data.(metricdata.Gauge[float64])
		if !ok {
			t.Fatalf("%s is %T", name, m.Data)
		}
		values := make([]string, len(g.DataPoints))
		for n, p := range g.DataPoints {
			values[n] = p.Attributes.Encoded(attribute.DefaultEncoder()) + "=" + fmt.Sprint(p.Value)
		}
		slices.Sort(values)
		got[name] = fmt.Sprint(values)
	}
	two := func(a, b string) string {
		const labels = "server.address=10.0.0.%d,server.port=8001,sluice.backend=m="
		return fmt.Sprintf("["+labels+"%s "+labels+"%s]", 7, a, 8, b)
	}
	want := map[string]string{
		"sluice.server.ready": two("1", "0"), "sluice.server.ejected": two("0", "1"),
		"sluice.server.permits.in_use": two("3", "0"), "sluice.server.reported.waiting": two("4", "0"),
		"sluice.server.reported.running": two("5", "0"), "sluice.server.reported.utilization": two("0.5", "0"),
	}
	if !maps.Equal(got, want) {
		t.Errorf("got %v\nwant %v", got, want)
	}
	if stop(); len(s.metrics(t)) != 0 {
		t.Error("it goes on after it was told to stop")
	}
}
