package gateway

import (
	"context"
	"slices"
	"strings"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	adminv1 "github.com/sluicegate/sluice/proto/gen/sluice/admin/v1"
)

// The model servers are seen with what is at work there, what they report and how
// they fail; by whom a rule names the method for.
func TestAdminSeesServers(t *testing.T) {
	first, _, _ := failing(t, func(grpc.ServerStream) error { return status.Error(codes.Unavailable, "") })
	good := script(t, func(method string, ss grpc.ServerStream) error {
		if method == modelStreamInfer { // until the caller goes
			var req []byte
			for ss.RecvMsg(&req) == nil {
			}
			return nil
		}
		ss.SetTrailer(metadata.Pairs("endpoint-load-metrics", "TEXT application_utilization=0.5, named_metrics.num_requests_waiting=9"))
		return answerOne(method, ss)
	})
	text := several(", outliers: {failures: 3, ejection: 3600s}", first, good, "127.0.0.1:1")
	text = strings.Replace(text, "methods: [", "methods: [/sluice.admin.v1.EndpointsService/ListEndpoints, ", 1)
	text += "\nlistener: {address: x, admin_api: true}\n"
	text = strings.Replace(text, "backends: [", `backends: [{name: other, models: [none], dialect: DIALECT_TRITON, plaintext: true, address: "127.0.0.1:2"}, `, 1)
	text = strings.Replace(text, `models: [{model: "*"}]`, `models: [{model: words, weight: 3}, {model: "*"}]`, 1)
	g := open(t, text)
	g.pool.abandoned = true
	api := adminv1.NewEndpointsServiceClient(g.dial())
	list := func(backend string) []*adminv1.Endpoint {
		t.Helper()
		r, err := api.ListEndpoints(ctx(t), &adminv1.ListEndpointsRequest{Backend: backend})
		if err != nil {
			t.Fatal(err)
		}
		return r.GetEndpoints()
	}
	of := func(address string) *adminv1.Endpoint {
		t.Helper()
		all := list("model")
		i := slices.IndexFunc(all, func(e *adminv1.Endpoint) bool { return e.GetAddress() == address })
		if i < 0 {
			t.Fatalf("there is no %s: %v", address, all)
		}
		return all[i]
	}
	for _, e := range list("") {
		if e.GetState() != adminv1.EndpointState_ENDPOINT_STATE_IDLE || e.GetReported() != nil || e.GetControlled() {
			t.Errorf("before the first call: %v", e)
		}
	}
	client := g.client()
	_, _ = client.ModelInfer(ctx(t), ask("echo", "a", "hello"))
	g.ready(2)
	g.eventually("one fails and is left alone", func() bool {
		_, _ = client.ModelInfer(ctx(t), ask("echo", "a", "hello"))
		return of(first).GetState() == adminv1.EndpointState_ENDPOINT_STATE_EJECTED
	})
	if e := of(first); e.GetFailures() < 3 || e.GetEjectedUntil() == nil || e.GetCalls() != 0 || e.GetReported() != nil {
		t.Errorf("the one that fails: %v", e)
	}
	g.eventually("one cannot be reached", func() bool {
		e := of("127.0.0.1:1")
		return e.GetState() == adminv1.EndpointState_ENDPOINT_STATE_NOT_READY && strings.Contains(e.GetFailure(), "refused")
	})
	for id := range int64(4) {
		if _, err := client.ModelInfer(ctx(t), ask("echo", "a", "hello", number("sequence_id", id+1))); err != nil {
			t.Fatal(err)
		}
	}
	during, cancel := context.WithCancel(ctx(t))
	defer cancel()
	s, err := client.ModelStreamInfer(during)
	if err == nil {
		err = s.Send(ask("words", "a", "hello"))
	}
	if err != nil {
		t.Fatal(err)
	}
	g.eventually("a stream is at work", func() bool { return of(good).GetCalls() == 1 && of(good).GetPermits() == 3 })
	e := of(good)
	if e.GetState() != adminv1.EndpointState_ENDPOINT_STATE_READY || e.GetSequences() != 4 || e.GetFailures() != 0 || e.GetFailure() != "" {
		t.Errorf("the good one: %v", e)
	}
	if r := e.GetReported(); r.GetSource() != adminv1.LoadSource_LOAD_SOURCE_CALL || r.GetWaiting() != 9 || r.GetUtilization() != .5 || r.GetAt() == nil {
		t.Errorf("reported %v", r)
	}
	cancel()
	g.eventually("it has ended", func() bool { return of(good).GetCalls() == 0 && of(good).GetPermits() == 0 })

	var names []string
	for _, e := range list("") {
		names = append(names, e.GetBackend())
	}
	if got := strings.Join(names, " "); got != "other model model model" {
		t.Errorf("back ends %s", got)
	}
	if _, err := api.ListEndpoints(ctx(t), &adminv1.ListEndpointsRequest{Backend: "none"}); status.Code(err) != codes.NotFound {
		t.Errorf("%v", err)
	}
	g.unloaded()

	_, behind := modelServer(t)
	without := open(t, base+"listener: {address: x, admin_api: true}\n", behind)
	_, err = adminv1.NewEndpointsServiceClient(without.dial()).ListEndpoints(ctx(t), &adminv1.ListEndpointsRequest{})
	expect(t, "a method that no rule names", err, "Unauthenticated IDENTITY_MISSING")
}
