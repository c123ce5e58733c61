package gateway

import (
	"context"
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"go.opentelemetry.io/otel/propagation"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/sdk/trace/tracetest"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/sluicegate/sluice/interceptors/config"
	"github.com/sluicegate/sluice/interceptors/identity"
	"github.com/sluicegate/sluice/interceptors/telemetry"
	"github.com/sluicegate/sluice/proto/gen/inference"
)

// guardServer is a guard model that judges as it is told, and keeps the metadata.
type guardServer struct {
	inference.UnimplementedGRPCInferenceServiceServer
	judge func(ctx context.Context, text string) error // nil, or errUnsafe
	seen  chan metadata.MD
}

var errUnsafe = status.Error(codes.Unknown, "unsafe")

func (g *guardServer) ModelInfer(ctx context.Context, r *inference.ModelInferRequest) (*inference.ModelInferResponse, error) {
	if g.seen != nil {
		md, _ := metadata.FromIncomingContext(ctx)
		g.seen <- md
	}
	word := "safe"
	if err := g.judge(ctx, string(r.Inputs[0].Contents.BytesContents[0])); err == errUnsafe {
		word = "unsafe\nS1"
	} else if err != nil {
		return nil, err
	}
	return reply(r.ModelName, "", word), nil
}

func serveGuard(t *testing.T, g *guardServer, o ...grpc.ServerOption) string {
	t.Helper()
	s := grpc.NewServer(append(o, grpc.WaitForHandlers(true))...)
	inference.RegisterGRPCInferenceServiceServer(s, g)
	return serve(t, s)
}

// A guard model behind mTLS: it is asked by who it is, in the caller's trace, and
// nothing that the caller sent goes to it but the text.
func TestGuardModel(t *testing.T) {
	authority, err := identity.NewAuthority(spiffeid.RequireTrustDomainFromString("gate.test"))
	if err != nil {
		t.Fatal(err)
	}
	source := func(path string) *identity.Source {
		s, err := authority.Source(path)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = s.Close() })
		return s
	}
	m, behind := modelServer(t, grpc.Creds(identity.ServerCredentials(source("/model"), nil)))
	asked := make(chan metadata.MD, 10)
	guard := serveGuard(t, &guardServer{seen: asked, judge: func(_ context.Context, text string) error {
		if strings.Contains(text, "walrus") {
			return errUnsafe
		}
		return nil
	}}, grpc.Creds(identity.ServerCredentials(source("/guard"), nil)))
	client := source("/client")
	for expected, want := range map[string]map[string]string{
		"/guard": {"a robin": "OK", "a walrus": "PermissionDenied PROMPT_REJECTED"},
		"/other": {"a robin": "Unavailable POLICY_UNAVAILABLE", "a walrus": "Unavailable POLICY_UNAVAILABLE"},
	} {
		t.Run(expected, func(t *testing.T) {
			spans := tracetest.NewSpanRecorder()
			o := config.Options{Source: source("/gateway"), Telemetry: []telemetry.Option{
				telemetry.WithTracerProvider(sdktrace.NewTracerProvider(sdktrace.WithSpanProcessor(spans))),
				telemetry.WithPropagator(propagation.TraceContext{}),
			}}
			g := openWith(t, `
identity: {development: {trust_domain: gate.test}, rules: [{principals: ["spiffe://gate.test/client"], methods: [inference], models: [echo]}]}
backends:
- {name: model, dialect: DIALECT_TRITON, models: [echo], spiffe_id: "spiffe://gate.test/model"}
- {name: judges, dialect: DIALECT_KSERVE, models: [judge], spiffe_id: "spiffe://gate.test`+expected+`"}
inspect: {guard: {backend: judges, model: judge, from: 0, timeout: 20s}}
`, o, behind, guard)
			c := g.client(grpc.WithTransportCredentials(identity.ClientCredentials(client, spiffeid.MatchAny(), nil)))
			for text, want := range want {
				before := m.Seen()
				ctx := metadata.AppendToOutgoingContext(ctx(t), "x-secret", "walrus")
				_, err := c.ModelInfer(ctx, ask("echo", "a", text))
				expect(t, text, err, want)
				noAddress(t, err, guard)
				if seen := m.Seen() - before; (seen == 1) != (want == "OK") {
					t.Errorf("%s: the model saw %d inferences", text, seen)
				}
				if expected == "/other" {
					continue
				}
				md := <-asked
				if len(md.Get("traceparent")) != 1 || len(md.Get("x-secret")) > 0 {
					t.Errorf("the guard model got the metadata %v", md)
				}
				found := false
				for _, s := range spans.Ended() {
					if p := md.Get("traceparent"); len(p) == 1 && strings.Contains(p[0], s.SpanContext().SpanID().String()) {
						found = s.Parent().IsValid() && strings.Contains(p[0], s.Parent().TraceID().String())
					}
				}
				if !found {
					t.Errorf("%s: no span of the caller's trace is the parent of the guard model's", text)
				}
			}
			if len(asked) > 0 {
				t.Error("a server that is not who it should be was asked")
			}
			if _, err := c.ModelInfer(ctx(t), ask("judge", "a", "a robin")); status.Code(err) != codes.PermissionDenied {
				t.Errorf("callers may ask the guard model: %v", err)
			}
		})
	}
}

// While one inference of a stream waits for the guard model the others go on, also if
// there is one permit only: it is taken after the verdict.
func TestGuardModelHoldsNothingUp(t *testing.T) {
	m, behind := modelServer(t)
	judged, waiting := make(chan struct{}), make(chan struct{}, 1)
	guard := serveGuard(t, &guardServer{judge: func(ctx context.Context, text string) error {
		switch {
		case strings.Contains(text, "walrus"):
			return errUnsafe
		case strings.Contains(text, "slow"):
			waiting <- struct{}{}
			select {
			case <-judged:
			case <-ctx.Done():
				return ctx.Err()
			}
		}
		return nil
	}})
	g := open(t, `
identity: {insecure: {}, rules: [{principals: [anonymous], methods: [inference], models: ["*"]}]}
backends:
- {name: model, dialect: DIALECT_TRITON, models: [words], plaintext: true}
- {name: judges, dialect: DIALECT_TRITON, models: [judge], plaintext: true}
inspect: {guard: {backend: judges, model: judge, from: 0, timeout: 20s}}
pools: [{name: gpu, capacity: 1, models: [{model: words}]}]
budgets: [{name: b, tokens: 1000}]
`, behind, guard)
	s, err := g.client().ModelStreamInfer(ctx(t))
	if err != nil {
		t.Fatal(err)
	}
	send := func(id, text string) {
		t.Helper()
		final := &inference.InferParameter{ParameterChoice: &inference.InferParameter_BoolParam{BoolParam: true}}
		if err := s.Send(ask("words", id, text, parameter("triton_enable_empty_final_response", final))); err != nil {
			t.Fatal(err)
		}
	}
	// end is the id of the next one that ends, and why it was refused, if it was.
	end := func() string {
		t.Helper()
		for {
			r, err := s.Recv()
			if err != nil {
				t.Fatal(err)
			}
			if r.GetInferResponse().GetParameters()["triton_final_response"].GetBoolParam() {
				reason, _, _ := strings.Cut(r.ErrorMessage, ":")
				return strings.TrimSpace(r.GetInferResponse().GetId() + " " + reason)
			}
		}
	}
	send("1", "slow one")
	<-waiting
	if s := g.Guard().Pools().Snapshot()[0]; s.InUse != 0 || s.Waiting != 0 {
		t.Errorf("%d permits are held and %d wait before the verdict", s.InUse, s.Waiting)
	}
	if a := g.Guard().Budgets().Snapshot(); len(a) > 0 && a[0].Reserved != 0 {
		t.Errorf("%d tokens are reserved before the verdict", a[0].Reserved)
	}
	send("2", "quick")
	if got := end(); got != "2" {
		t.Errorf("got %q", got)
	}
	send("3", "a walrus")
	if got := end(); got != "3 PROMPT_REJECTED" {
		t.Errorf("got %q", got)
	}
	close(judged)
	if got := end(); got != "1" {
		t.Errorf("got %q", got)
	}
	if n := m.Seen(); n != 2 {
		t.Errorf("the model saw %d inferences, want 2", n)
	}
}

// A caller that goes away takes its question with it.
func TestGuardModelIsNotAskedForNobody(t *testing.T) {
	_, behind := modelServer(t)
	waiting, over := make(chan struct{}, 1), make(chan struct{})
	guard := serveGuard(t, &guardServer{judge: func(ctx context.Context, _ string) error {
		waiting <- struct{}{}
		<-ctx.Done()
		close(over)
		return ctx.Err()
	}})
	g := open(t, `
identity: {insecure: {}, rules: [{principals: [anonymous], methods: [inference], models: ["*"]}]}
backends:
- {name: model, dialect: DIALECT_TRITON, models: [words], plaintext: true}
- {name: judges, dialect: DIALECT_TRITON, models: [judge], plaintext: true}
inspect: {guard: {backend: judges, model: judge, from: 0, timeout: 20s}}
`, behind, guard)
	ctx, cancel := context.WithCancel(ctx(t))
	s, err := g.client().ModelStreamInfer(ctx)
	if err == nil {
		err = s.Send(ask("words", "1", "hello"))
	}
	if err != nil {
		t.Fatal(err)
	}
	<-waiting
	cancel()
	<-over
}

// A reload keeps what is known of the guard model.
func TestGuardModelAfterReload(t *testing.T) {
	_, behind := modelServer(t)
	asked := make(chan metadata.MD, 10)
	guard := serveGuard(t, &guardServer{seen: asked, judge: func(context.Context, string) error { return nil }})
	const text = `
identity: {insecure: {}, rules: [{principals: [anonymous], methods: [inference], models: ["*"]}]}
backends:
- {name: model, dialect: DIALECT_TRITON, models: [echo], plaintext: true}
- {name: judges, dialect: DIALECT_TRITON, models: [judge], plaintext: true}
inspect: {guard: {backend: judges, model: judge, from: 0, timeout: 20s}}
`
	g := open(t, text, behind, guard)
	c := g.client()
	for n, change := range []string{"", "budgets: [{name: b, tokens: 1000}]\n", ""} {
		if n > 0 {
			if err := g.Reload(parse(t, text+change, behind, guard)); err != nil {
				t.Fatal(err)
			}
		}
		for _, prompt := range []string{"hello", "hello " + words(n)} {
			if _, err := c.ModelInfer(ctx(t), ask("echo", "a", prompt)); err != nil {
				t.Fatal(err)
			}
		}
	}
	if n := len(asked); n != 4 { // "hello", and what is new each time
		t.Errorf("asked %d times, want 4", n)
	}
}
