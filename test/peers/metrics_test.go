//go:build linux

package peers

import (
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"math"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/sluicegate/sluice/proto/gen/inference"
	adminv1 "github.com/sluicegate/sluice/proto/gen/sluice/admin/v1"
)

// What the gateway learns from a real Triton's metrics, under load, is what Triton says: of six callers
// one is served at a time, so five wait in its queue. The configuration is that of docs/endpoints.md.
func TestTritonMetrics(t *testing.T) {
	const callers = 6
	s := running(t, "triton")
	address := startGateway(t, strings.NewReplacer("{server}", s.address, "{metrics}", fmt.Sprint(s.metrics)).Replace(`
listener: {address: 127.0.0.1:0, admin_api: true}
identity:
  insecure: {}
  rules:
    - {principals: [anonymous], methods: [inference, /sluice.admin.v1.EndpointsService/ListEndpoints], models: ["*"]}
backends:
- name: triton
  address: dns:///{server}
  dialect: DIALECT_TRITON
  plaintext: true
  retries: 1
  readiness: READINESS_SERVER_READY
  load: {metrics_url: "http://{host}:{metrics}/metrics", interval: 0.5s}
`))
	conn, err := grpc.NewClient(address, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	api := adminv1.NewEndpointsServiceClient(conn)
	learned := func() *adminv1.Endpoint {
		t.Helper()
		r, err := api.ListEndpoints(ctx, &adminv1.ListEndpointsRequest{})
		if err != nil || len(r.GetEndpoints()) != 1 {
			t.Fatalf("%v, %v", r, err)
		}
		return r.GetEndpoints()[0]
	}
	eventually := func(what string, ok func(e *adminv1.Endpoint, pending float64) bool) {
		t.Helper()
		for {
			e, pending := learned(), pendingAt(t, s)
			if e.GetState() == adminv1.EndpointState_ENDPOINT_STATE_READY && e.GetReported().GetSource() == adminv1.LoadSource_LOAD_SOURCE_METRICS &&
				ok(e, pending) {
				return
			}
			select {
			case <-ctx.Done():
				t.Fatalf("%s: this did not come about; the gateway learned %v, Triton says that %v wait", what, e, pending)
			case <-time.After(pause):
			}
		}
	}
	eventually("nothing waits", func(e *adminv1.Endpoint, pending float64) bool {
		return e.GetReported().GetWaiting() == 0 && pending == 0
	})

	var group sync.WaitGroup
	over := make(chan struct{})
	for range callers {
		group.Go(func() {
			c := inference.NewGRPCInferenceServiceClient(conn)
			for {
				select {
				case <-over:
					return
				default:
				}
				if _, err := c.ModelInfer(ctx, slow(0.4)); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	eventually("the others wait", func(e *adminv1.Endpoint, pending float64) bool {
		r := e.GetReported()
		return r.GetWaiting() == callers-1 && pending == callers-1 && e.GetCalls() == callers &&
			r.GetRunning() > 0.5 && r.GetRunning() < 1.5 // an average of what Triton counts in time
	})
	close(over)
	group.Wait()
	eventually("nothing waits any more", func(e *adminv1.Endpoint, pending float64) bool {
		return e.GetReported().GetWaiting() == 0 && pending == 0 && e.GetCalls() == 0
	})
}

// slow is an inference that takes so many seconds.
func slow(seconds float32) *inference.ModelInferRequest {
	return &inference.ModelInferRequest{
		ModelName:        "slow",
		Inputs:           []*inference.ModelInferRequest_InferInputTensor{{Name: "SECONDS", Datatype: "FP32", Shape: []int64{1}}},
		RawInputContents: [][]byte{binary.LittleEndian.AppendUint32(nil, math.Float32bits(seconds))},
	}
}

// pendingAt is what Triton says of the model's queue, read here line by line.
func pendingAt(t *testing.T, s *server) float64 {
	t.Helper()
	r, err := http.Get(fmt.Sprintf("http://127.0.0.1:%d/metrics", s.metrics))
	if err != nil {
		t.Fatal(err)
	}
	defer r.Body.Close()
	defer http.DefaultClient.CloseIdleConnections()
	page, err := io.ReadAll(r.Body)
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(page)) {
		if rest, ok := strings.CutPrefix(line, `nv_inference_pending_request_count{model="slow",version="1"} `); ok {
			n, err := strconv.ParseFloat(strings.TrimSpace(rest), 64)
			if err != nil {
				t.Fatal(err)
			}
			return n
		}
	}
	t.Fatalf("Triton says nothing of its queue:\n%s", page)
	return 0
}
