package gateway

import (
	"context"
	"strconv"
	"strings"
	"testing"

	orcapb "github.com/cncf/xds/go/xds/data/orca/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/proto"

	"github.com/sluicegate/sluice/interceptors/config"
	"github.com/sluicegate/sluice/proto/gen/inference"
	"github.com/sluicegate/sluice/test/model"
)

// What a model server says of the usage in its header or trailer is charged, where the
// configuration names it, at every door: but what was counted is the floor, and the grant
// the ceiling. A prompt of two words is echoed: 4 tokens by our own count.
func TestUsageInTrailersIsCharged(t *testing.T) {
	orca := func(costs, named map[string]float64) metadata.MD {
		b, err := proto.Marshal(&orcapb.OrcaLoadReport{CpuUtilization: .5, RequestCost: costs, NamedMetrics: named})
		if err != nil {
			t.Fatal(err)
		}
		return metadata.Pairs("endpoint-load-metrics-bin", string(b))
	}
	for _, test := range []struct {
		name     string
		md       metadata.MD
		budget   string
		left     string // after one inference
		answered string
	}{
		{"nothing", nil, "100", "96", "OK"},
		{"a trailer", metadata.Pairs("x-in", "20", "x-out", "31"), "100", "49", "OK"},
		{"half of it", metadata.Pairs("x-out", "31"), "100", "67", "OK"},
		{"less than was counted", metadata.Pairs("x-in", "1", "x-out", "0"), "100", "96", "OK"},
		{"no number", metadata.Pairs("x-in", "many", "x-out", "-5"), "100", "96", "OK"},
		{"of another name", metadata.Pairs("x-input", "20"), "100", "96", "OK"},
		{"the cost in ORCA", orca(map[string]float64{"x-in": 20, "x-out": 30.5}, nil), "100", "49", "OK"},
		{"a metric in ORCA", orca(nil, map[string]float64{"x-out": 50}), "100", "48", "OK"},
		{"more than there is", metadata.Pairs("x-out", "1000"), "100", "97", "ResourceExhausted BUDGET_CUT"},
	} {
		text := strings.Replace(base, "plaintext: true", "plaintext: true, reported_usage: {input_tokens: x-in, output_tokens: x-out}", 1) +
			"budgets: [{name: day, tokens: " + test.budget + ", window: 24h, per: [BUDGET_KEY_TENANT], default_output_tokens: 1, tell: true}]\n"
		says := func(set func(context.Context, metadata.MD) error) grpc.UnaryServerInterceptor {
			return func(ctx context.Context, req any, _ *grpc.UnaryServerInfo, h grpc.UnaryHandler) (any, error) {
				_ = set(ctx, test.md)
				return h(ctx, req)
			}
		}
		header, trailer := func(ctx context.Context, md metadata.MD) error { return grpc.SetHeader(ctx, md) },
			func(ctx context.Context, md metadata.MD) error { return grpc.SetTrailer(ctx, md) }
		doors := map[string]func(t *testing.T) inference.GRPCInferenceServiceClient{
			"gateway": func(t *testing.T) inference.GRPCInferenceServiceClient {
				_, behind := modelServer(t, grpc.UnaryInterceptor(says(trailer)))
				return open(t, text, behind).client()
			},
			"gateway, header": func(t *testing.T) inference.GRPCInferenceServiceClient {
				_, behind := modelServer(t, grpc.UnaryInterceptor(says(header)))
				return open(t, text, behind).client()
			},
			"linked": func(t *testing.T) inference.GRPCInferenceServiceClient {
				guard, err := config.Build(parse(t, text), nil, quietOptions())
				if err != nil {
					t.Fatal(err)
				}
				t.Cleanup(guard.Close)
				s := grpc.NewServer(append(guard.ServerOptions(), grpc.ChainUnaryInterceptor(says(trailer)))...)
				inference.RegisterGRPCInferenceServiceServer(s, model.New(model.Options{}))
				return clientOf(t, serve(t, s))
			},
		}
		for door, dial := range doors {
			t.Run(test.name+"/"+door, func(t *testing.T) {
				var told metadata.MD
				_, err := dial(t).ModelInfer(ctx(t), ask("echo", "a", "two words"), grpc.Trailer(&told))
				expect(t, "ModelInfer", err, test.answered)
				if got := strings.Join(told.Get("x-sluice-budget-day-remaining"), " "); got != test.left {
					t.Errorf("%q is left, want %q", got, test.left)
				}
			})
		}
	}
}

func clientOf(t *testing.T, address string) inference.GRPCInferenceServiceClient {
	t.Helper()
	conn, err := grpc.NewClient(address, insecureTransport, grpc.WithDisableRetry())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return inference.NewGRPCInferenceServiceClient(conn)
}

// What a caller says of attempts that it made before changes nothing in what it is charged.
func TestAttemptsBuyNothing(t *testing.T) {
	_, behind := modelServer(t)
	c := open(t, base+"budgets: [{name: day, tokens: 16, window: 24h, per: [BUDGET_KEY_TENANT], default_output_tokens: 1, tell: true}]\n", behind).client()
	for n, want := range []string{"12", "8", "4", "0"} {
		var told metadata.MD
		call := ctx(t)
		if n > 0 {
			call = metadata.AppendToOutgoingContext(call, "grpc-previous-rpc-attempts", strconv.Itoa(n))
		}
		_, err := c.ModelInfer(call, ask("echo", "a", "two words"), grpc.Trailer(&told))
		expect(t, "ModelInfer", err, "OK")
		if got := strings.Join(told.Get("x-sluice-budget-day-remaining"), " "); got != want {
			t.Errorf("%q is left after %d attempts, want %q", got, n+1, want)
		}
	}
	_, err := c.ModelInfer(ctx(t), ask("echo", "a", "two words"))
	expect(t, "ModelInfer", err, "ResourceExhausted BUDGET_EXHAUSTED")
}
