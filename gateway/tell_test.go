package gateway

import (
	"context"
	"slices"
	"strings"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"

	"github.com/sluicegate/sluice/interceptors/config"
	"github.com/sluicegate/sluice/proto/gen/inference"
	"github.com/sluicegate/sluice/test/model"
)

// Callers are told what is left of those budgets of theirs that say so: in
// trailers, at both doors, however the call ends.
func TestCallersAreToldWhatIsLeft(t *testing.T) {
	_, behind := modelServer(t, grpc.UnaryInterceptor(func(ctx context.Context, req any, _ *grpc.UnaryServerInfo, h grpc.UnaryHandler) (any, error) {
		_ = grpc.SetTrailer(ctx, metadata.Pairs("x-sluice-budget-day-remaining", "1000000", "x-model", "said")) // a liar
		return h(ctx, req)
	}))
	const text = base + `
budgets:
- {name: day, tokens: 60, window: 24h, per: [BUDGET_KEY_TENANT], tell: true}
- {name: purse, money_micros: 900, per: [BUDGET_KEY_PRINCIPAL], tell: true}
- {name: rate, requests: 5, window: 24h, per: [BUDGET_KEY_PRINCIPAL], tell: true}
- {name: quiet, tokens: 1000, per: [BUDGET_KEY_TENANT]}
prices: [{model: "*", input_micros_per_million: 500000, output_micros_per_million: 1250000}]
`
	for door, dial := range map[string]func(t *testing.T) inference.GRPCInferenceServiceClient{
		"gateway": func(t *testing.T) inference.GRPCInferenceServiceClient { return open(t, text, behind).client() },
		"linked": func(t *testing.T) inference.GRPCInferenceServiceClient {
			guard, err := config.Build(parse(t, text), nil, quietOptions())
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(guard.Close)
			s := grpc.NewServer(guard.ServerOptions()...)
			inference.RegisterGRPCInferenceServiceServer(s, model.New(model.Options{}))
			conn, err := grpc.NewClient(serve(t, s), insecureTransport, grpc.WithDisableRetry())
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = conn.Close() })
			return inference.NewGRPCInferenceServiceClient(conn)
		},
	} {
		t.Run(door, func(t *testing.T) {
			c := dial(t)
			told := func(what string, header, trailer metadata.MD, want string) {
				t.Helper()
				var got []string
				for k, v := range trailer {
					if name, ok := strings.CutPrefix(k, "x-sluice-budget-"); ok {
						got = append(got, strings.TrimSuffix(name, "-remaining")+"="+strings.Join(v, "&"))
					}
				}
				slices.Sort(got)
				if strings.Join(got, " ") != want {
					t.Errorf("%s: told %q, want %q", what, got, want)
				}
				for k := range header {
					if strings.HasPrefix(k, "x-sluice") {
						t.Errorf("%s: the header has %s", what, k)
					}
				}
			}
			unary := func(prompt, answer, want string) {
				t.Helper()
				var header, trailer metadata.MD
				_, err := c.ModelInfer(ctx(t), ask("echo", "a", prompt), grpc.Header(&header), grpc.Trailer(&trailer))
				expect(t, "ModelInfer", err, answer)
				told("ModelInfer", header, trailer, want)
				if said := trailer.Get("x-model"); door == "gateway" && err == nil && len(said) != 1 {
					t.Errorf("the model server's trailer is lost: %v", trailer)
				}
				if pushed := trailer.Get("grpc-retry-pushback-ms"); (len(pushed) > 0) != (err != nil) || err != nil && len(header) > 0 {
					t.Errorf("pushback %q with the header %v", pushed, header)
				}
			}
			unary(words(10), "OK", "day=40 purse=0.0008825 rate=4") // 10 in, 10 out
			s, err := c.ModelStreamInfer(ctx(t))
			if err != nil {
				t.Fatal(err)
			}
			for _, id := range []string{"a", "b"} {
				if err := s.Send(ask("words", id, words(2))); err != nil {
					t.Fatal(err)
				}
			}
			_ = s.CloseSend()
			if _, err := drainStream(s); err != nil {
				t.Fatal(err)
			}
			header, _ := s.Header()
			told("ModelStreamInfer", header, s.Trailer(), "day=32 purse=0.0008755 rate=2") // twice 2 in, 2 out
			unary(words(20), "ResourceExhausted BUDGET_CUT", "day=11 purse=0.00086425 rate=1")
			unary(words(20), "ResourceExhausted BUDGET_EXHAUSTED", "rate=0")
			unary(words(20), "ResourceExhausted RATE_EXCEEDED", "rate=0")
		})
	}
}
