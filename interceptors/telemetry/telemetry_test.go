package telemetry

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/sluicegate/sluice/interceptors"
	"github.com/sluicegate/sluice/interceptors/dialect"
	"github.com/sluicegate/sluice/interceptors/fields"
	oip "github.com/sluicegate/sluice/proto/gen/inference"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"go.opentelemetry.io/otel/attribute"
	otelcodes "go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/propagation"
	sdkmetric "go.opentelemetry.io/otel/sdk/metric"
	"go.opentelemetry.io/otel/sdk/metric/metricdata"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/sdk/trace/tracetest"
	"go.opentelemetry.io/otel/trace"
	"go.uber.org/goleak"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const (
	infer  = "/inference.GRPCInferenceService/ModelInfer"
	stream = "/inference.GRPCInferenceService/ModelStreamInfer"
	health = "/inference.GRPCInferenceService/ServerReady"
)

// seen is all that a policy under test exports.
type seen struct {
	spans  *tracetest.SpanRecorder
	reader *sdkmetric.ManualReader
	log    bytes.Buffer
	logMu  sync.Mutex
	policy *Policy
}

func (s *seen) Write(b []byte) (int, error) {
	s.logMu.Lock()
	defer s.logMu.Unlock()
	return s.log.Write(b)
}

func watch(opts ...Option) *seen {
	s := &seen{spans: tracetest.NewSpanRecorder(), reader: sdkmetric.NewManualReader()}
	s.policy = New(append([]Option{
		WithTracerProvider(sdktrace.NewTracerProvider(sdktrace.WithSpanProcessor(s.spans))),
		WithMeterProvider(sdkmetric.NewMeterProvider(sdkmetric.WithReader(s.reader))),
		WithLogger(slog.New(slog.NewJSONHandler(s, &slog.HandlerOptions{Level: slog.LevelDebug}))),
		WithPropagator(propagation.TraceContext{}),
	}, opts...)...)
	return s
}

func (s *seen) metrics(t testing.TB) map[string]metricdata.Metrics {
	t.Helper()
	var rm metricdata.ResourceMetrics
	if err := s.reader.Collect(context.Background(), &rm); err != nil {
		t.Fatal(err)
	}
	out := map[string]metricdata.Metrics{}
	for _, sm := range rm.ScopeMetrics {
		for _, m := range sm.Metrics {
			out[m.Name] = m
		}
	}
	return out
}

// points are a metric's data points: the labels of each, and its count or sum.
func points(t testing.TB, m metricdata.Metrics) map[string]int64 {
	t.Helper()
	out := map[string]int64{}
	label := func(set attribute.Set) string { return set.Encoded(attribute.DefaultEncoder()) }
	switch d := m.Data.(type) {
	case nil:
	case metricdata.Histogram[float64]:
		for _, p := range d.DataPoints {
			out[label(p.Attributes)] = int64(p.Count)
		}
	case metricdata.Histogram[int64]:
		for _, p := range d.DataPoints {
			out[label(p.Attributes)] = p.Sum
		}
	case metricdata.Sum[int64]:
		for _, p := range d.DataPoints {
			out[label(p.Attributes)] = p.Value
		}
	default:
		t.Fatalf("unexpected data %T", d)
	}
	return out
}

func (s *seen) span(t testing.TB, name string) sdktrace.ReadOnlySpan {
	t.Helper()
	var names []string
	for _, sp := range s.spans.Ended() {
		if sp.Name() == name {
			return sp
		}
		names = append(names, sp.Name())
	}
	t.Fatalf("no span %q among %q", name, names)
	return nil
}

func attr(sp sdktrace.ReadOnlySpan, key string) string {
	for _, kv := range sp.Attributes() {
		if string(kv.Key) == key {
			return kv.Value.String()
		}
	}
	return ""
}

func event(sp sdktrace.ReadOnlySpan, name string) map[string]string {
	for _, e := range sp.Events() {
		if e.Name == name {
			out := map[string]string{}
			for _, kv := range e.Attributes {
				out[string(kv.Key)] = kv.Value.String()
			}
			return out
		}
	}
	return nil
}

// stub is another policy of the chain.
type stub struct {
	allow, begin, start, response error
	event                         *interceptors.Event
	principal, tenant             string
	panics                        any
}

func (s *stub) Name() string                   { return "stub" }
func (s *stub) Allow(*interceptors.Call) error { return s.allow }
func (s *stub) Begin(c *interceptors.Call) (interceptors.CallPolicy, error) {
	c.Principal, c.Tenant = s.principal, s.tenant
	return s, s.begin
}
func (s *stub) Start(i *interceptors.Inference) (interceptors.InferencePolicy, error) {
	if s.start != nil {
		return nil, s.start
	}
	return &stubInference{s, i}, nil
}
func (s *stub) End(interceptors.Outcome) {}

type stubInference struct {
	*stub
	i *interceptors.Inference
}

func (s *stubInference) Request(*fields.Message) error {
	if s.panics != nil {
		panic(s.panics)
	}
	if s.event != nil {
		s.i.Emit(*s.event)
	}
	return nil
}
func (s *stubInference) Response(*fields.Message) error { return s.response }

func backend(t testing.TB) *interceptors.Backend {
	t.Helper()
	d, err := dialect.Triton(dialect.Options{Lenient: true})
	if err != nil {
		t.Fatal(err)
	}
	return &interceptors.Backend{Name: "gpu", Dialect: d, Models: map[string]bool{"llama": true, "": true}}
}

func anyModel(t testing.TB) *interceptors.Backend {
	b := backend(t)
	b.Models = nil
	return b
}

func request(model, id, prompt string) proto.Message {
	return &oip.ModelInferRequest{
		ModelName: model, Id: id,
		Parameters: map[string]*oip.InferParameter{
			"max_tokens": {ParameterChoice: &oip.InferParameter_Int64Param{Int64Param: 64}},
		},
		Inputs: []*oip.ModelInferRequest_InferInputTensor{{
			Name: "text_input", Datatype: "BYTES", Shape: []int64{1},
			Contents: &oip.InferTensorContents{BytesContents: [][]byte{[]byte(prompt)}},
		}},
	}
}

func response(id, text string) *oip.ModelInferResponse {
	return &oip.ModelInferResponse{
		ModelName: "llama", Id: id,
		Outputs: []*oip.ModelInferResponse_InferOutputTensor{{
			Name: "text_output", Datatype: "BYTES", Shape: []int64{1},
			Contents: &oip.InferTensorContents{BytesContents: [][]byte{[]byte(text)}},
		}},
	}
}

func chunk(id, text string, final bool) proto.Message {
	r := response(id, text)
	r.Parameters = map[string]*oip.InferParameter{
		"triton_final_response": {ParameterChoice: &oip.InferParameter_BoolParam{BoolParam: final}},
	}
	return &oip.ModelStreamInferResponse{InferResponse: r}
}

// ask begins an inference, and hands it on if it is not refused.
func ask(call *interceptors.Call, m proto.Message) (*interceptors.Inference, error) {
	e := interceptors.TypedEnvelope(m)
	defer e.Release()
	i, err := call.Request(e)
	if err == nil {
		i.Hand()
	}
	return i, err
}

func answer(call *interceptors.Call, m proto.Message) error {
	e := interceptors.TypedEnvelope(m)
	defer e.Release()
	_, _, err := call.Response(e)
	return err
}

var alice = spiffeid.RequireFromString("spiffe://example.org/alice")

func info(method string, md metadata.MD) interceptors.CallInfo {
	return interceptors.CallInfo{
		FullMethod: method, Metadata: md,
		Peer: interceptors.Peer{ID: alice, Addr: address("127.0.0.1:4711")},
	}
}

// One trace runs from the client through the gateway to the model server, and
// each hop's span is the child of the hop's before.
func TestTrace(t *testing.T) {
	tests := []struct {
		name, method string
		// between: is the hop's RPC span the child of the inference span before it?
		between bool
		m       proto.Message
	}{
		{"unary", infer, true, response("1", "hello there")},
		{"multiplexed", stream, false, chunk("1", "hello there", true)},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			s := watch()
			chain := interceptors.New([]*interceptors.Backend{backend(t)}, s.policy)
			var calls []*interceptors.Call
			var md metadata.MD
			for _, client := range []bool{true, false, false} {
				in := info(tt.method, md)
				in.Client = client
				call, err := chain.Begin(t.Context(), in)
				if err != nil {
					t.Fatal(err)
				}
				if _, err := ask(call, request("llama", "1", "a prompt")); err != nil {
					t.Fatal(err)
				}
				calls = append(calls, call)
				md = call.Outgoing
			}
			for n := len(calls) - 1; n >= 0; n-- {
				if err := answer(calls[n], tt.m); err != nil {
					t.Fatal(err)
				}
				calls[n].End(nil)
			}
			var rpcs, inferences []sdktrace.ReadOnlySpan // the model server's first
			for _, sp := range s.spans.Ended() {
				if sp.Name() == tt.method[1:] {
					rpcs = append(rpcs, sp)
				} else if sp.Name() == "text_completion llama" {
					inferences = append(inferences, sp)
				} else {
					t.Errorf("unexpected span %q", sp.Name())
				}
			}
			if len(rpcs) != 3 || len(inferences) != 3 {
				t.Fatalf("%d RPC spans and %d inference spans, want 3 and 3", len(rpcs), len(inferences))
			}
			for n := range rpcs {
				if rpcs[n].SpanContext().TraceID() != rpcs[2].SpanContext().TraceID() {
					t.Error("more than one trace")
				}
				if inferences[n].Parent().SpanID() != rpcs[n].SpanContext().SpanID() {
					t.Errorf("hop %d: the inference span is not the child of the RPC span", n)
				}
				if n == 2 {
					if rpcs[n].Parent().IsValid() {
						t.Error("the client's span has a parent")
					}
					continue
				}
				want := rpcs[n+1]
				if tt.between {
					want = inferences[n+1]
				}
				if got := rpcs[n].Parent(); got.SpanID() != want.SpanContext().SpanID() || !got.IsRemote() {
					t.Errorf("hop %d: the RPC span's parent is %v, want %v", n, got.SpanID(), want.SpanContext().SpanID())
				}
			}
			if rpcs[2].SpanKind() != trace.SpanKindClient || rpcs[1].SpanKind() != trace.SpanKindServer ||
				inferences[1].SpanKind() != trace.SpanKindClient {
				t.Error("wrong span kinds")
			}
		})
	}
}

func TestParent(t *testing.T) {
	const valid = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
	tests := []struct {
		name   string
		md     metadata.MD
		public bool
		child  bool
		links  int
	}{
		{"none", nil, false, false, 0},
		{"child", metadata.Pairs("traceparent", valid), false, true, 0},
		{"public: a link", metadata.Pairs("traceparent", valid), true, false, 1},
		{"public: nothing to link", nil, true, false, 0},
		{"two of them", metadata.Pairs("traceparent", valid, "traceparent", valid), false, false, 0},
		{"garbage", metadata.Pairs("traceparent", "00-\n-x"), false, false, 0},
		{"all zero", metadata.Pairs("traceparent", "00-"+strings.Repeat("0", 32)+"-"+strings.Repeat("0", 16)+"-01"), true, false, 0},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			var opts []Option
			if tt.public {
				opts = append(opts, WithPublicEndpoint())
			}
			s := watch(opts...)
			chain := interceptors.New([]*interceptors.Backend{backend(t)}, s.policy)
			call, err := chain.Begin(t.Context(), info(health, tt.md))
			if err != nil {
				t.Fatal(err)
			}
			out := call.Outgoing.Get("traceparent")
			call.End(nil)
			sp := s.span(t, health[1:])
			if sp.Parent().IsValid() != tt.child || len(sp.Links()) != tt.links {
				t.Errorf("parent %v, %d links", sp.Parent(), len(sp.Links()))
			}
			if len(out) != 1 || !strings.Contains(out[0], sp.SpanContext().SpanID().String()) {
				t.Errorf("outgoing traceparent %q", out)
			}
		})
	}
	t.Run("public: a remote context that another put there", func(t *testing.T) {
		s := watch(WithPublicEndpoint())
		ctx := propagation.TraceContext{}.Extract(t.Context(), propagation.MapCarrier{"traceparent": valid})
		chain := interceptors.New([]*interceptors.Backend{backend(t)}, s.policy)
		call, err := chain.Begin(ctx, info(health, nil))
		if err != nil {
			t.Fatal(err)
		}
		call.End(nil)
		if sp := s.span(t, health[1:]); sp.Parent().IsValid() || len(sp.Links()) != 1 {
			t.Errorf("parent %v, %d links, want a link only", sp.Parent(), len(sp.Links()))
		}
	})
	t.Run("a span of this process", func(t *testing.T) {
		s := watch()
		ctx, local := sdktrace.NewTracerProvider().Tracer("t").Start(t.Context(), "local")
		chain := interceptors.New([]*interceptors.Backend{backend(t)}, s.policy)
		call, err := chain.Begin(ctx, info(health, metadata.Pairs("traceparent", valid)))
		if err != nil {
			t.Fatal(err)
		}
		call.End(nil)
		if got := s.span(t, health[1:]).Parent(); got.SpanID() != local.SpanContext().SpanID() {
			t.Errorf("parent %v, want the local span", got)
		}
	})
}

// What becomes of a call is said on its spans, in the metrics and in the log,
// and a refusal once in each.
func TestOutcomes(t *testing.T) {
	denial := func(r interceptors.Reason) *interceptors.Denial {
		d := interceptors.Deny("stub", r, "no").With("rule", "942100")
		d.Field = "inputs.text_input"
		return d
	}
	const rpc, inf = "rpc", "inference"
	tests := []struct {
		name    string
		method  string
		model   string
		policy  stub
		gate    bool
		end     error
		answers []string
		// want
		code      string
		rpcError  bool
		outcome   string // of the inference span; "" if there is none
		errorType string
		verdict   string // which span has the event
		warn      string // message of the only warning
		denials   int64
	}{
		{name: "served", answers: []string{"hello"}, code: "OK", outcome: "served"},
		{name: "refused at a gate", gate: true, policy: stub{allow: denial(interceptors.IdentityMissing)},
			code: "UNAUTHENTICATED", verdict: rpc, warn: "call refused", denials: 1},
		{name: "refused at begin", policy: stub{begin: denial(interceptors.MethodDenied)},
			code: "PERMISSION_DENIED", verdict: rpc, warn: "call refused", denials: 1},
		{name: "unknown method", method: "/evil.Service/Method",
			code: "UNIMPLEMENTED", rpcError: true, verdict: rpc, warn: "call refused", denials: 1},
		{name: "refused by the chain", model: "nonesuch", code: "PERMISSION_DENIED",
			outcome: "refused", errorType: "MODEL_DENIED", verdict: inf, warn: "inference refused", denials: 1},
		{name: "refused at start", policy: stub{start: denial(interceptors.PromptRejected)}, code: "PERMISSION_DENIED",
			outcome: "refused", errorType: "PROMPT_REJECTED", verdict: inf, warn: "inference refused", denials: 1},
		{name: "cut", policy: stub{response: denial(interceptors.BudgetCut)}, answers: []string{"hello"},
			code: "RESOURCE_EXHAUSTED", outcome: "cut", errorType: "BUDGET_CUT", verdict: inf, warn: "inference cut", denials: 1},
		{name: "a policy fails", policy: stub{start: errors.New("broken")}, code: "INTERNAL", rpcError: true,
			outcome: "refused", errorType: "INTERNAL", verdict: inf, warn: "inference refused", denials: 1},
		{name: "a policy panics", policy: stub{panics: "ouch"}, code: "INTERNAL", rpcError: true,
			outcome: "refused", errorType: "INTERNAL", verdict: inf, warn: "inference refused", denials: 1},
		{name: "upstream fails", end: status.Error(codes.Unavailable, "gone"), code: "UNAVAILABLE", rpcError: true,
			outcome: "failed", errorType: "UNAVAILABLE", warn: "inference failed"},
		{name: "upstream refuses", end: status.Error(codes.NotFound, "none"), code: "NOT_FOUND",
			outcome: "failed", errorType: "NOT_FOUND", warn: "inference failed"},
		{name: "not a gRPC code", end: status.Error(codes.Code(4242), "odd"), code: "UNKNOWN", rpcError: true,
			outcome: "failed", errorType: "UNKNOWN", warn: "inference failed"},
		{name: "the caller goes away", end: context.Canceled, code: "CANCELLED", outcome: "cancelled", errorType: "CANCELLED"},
		{name: "too late", end: fmt.Errorf("w: %w", context.DeadlineExceeded), code: "DEADLINE_EXCEEDED", rpcError: true,
			outcome: "failed", errorType: "DEADLINE_EXCEEDED", warn: "inference failed"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if tt.method == "" {
				tt.method = infer
			}
			if tt.model == "" {
				tt.model = "llama"
			}
			tt.policy.principal, tt.policy.tenant = alice.String(), "acme"
			s := watch()
			chain := interceptors.New([]*interceptors.Backend{backend(t)}, s.policy, &tt.policy)
			run := func() {
				if tt.gate {
					if err := chain.Allow(t.Context(), info(tt.method, nil)); err == nil {
						t.Fatal("allowed")
					}
					return
				}
				call, err := chain.Begin(t.Context(), info(tt.method, nil))
				if err != nil {
					return
				}
				_, err = ask(call, request(tt.model, "7", "a prompt of five words"))
				if err == nil {
					err = tt.end
				}
				for _, text := range tt.answers {
					if e := answer(call, response("7", text)); e != nil {
						err = e
					}
				}
				call.End(err)
			}
			run()

			name := tt.method[1:]
			if tt.method == "/evil.Service/Method" {
				name = "_OTHER"
			}
			sp := s.span(t, name)
			if got := attr(sp, "rpc.response.status_code"); got != tt.code {
				t.Errorf("status code %q, want %q", got, tt.code)
			}
			if got := sp.Status().Code == otelcodes.Error; got != tt.rpcError {
				t.Errorf("RPC span is an error: %v, want %v", got, tt.rpcError)
			}
			for key, want := range map[string]string{
				"rpc.system.name": "grpc", "rpc.method": name, "network.peer.address": "127.0.0.1",
				"sluice.principal": alice.String(),
			} {
				if got := attr(sp, key); got != want {
					t.Errorf("%s = %q, want %q", key, got, want)
				}
			}
			verdicts := map[string]map[string]string{rpc: event(sp, "sluice.verdict")}

			if tt.outcome != "" {
				model := tt.model
				if model == "nonesuch" {
					model = "other"
				}
				sp := s.span(t, "text_completion "+model)
				for key, want := range map[string]string{
					"sluice.outcome": tt.outcome, "error.type": tt.errorType, "gen_ai.operation.name": "text_completion",
					"gen_ai.request.model": tt.model, "gen_ai.request.max_tokens": "64", "sluice.tenant": "acme",
					"sluice.inference.id": "7",
				} {
					if got := attr(sp, key); got != want {
						t.Errorf("inference: %s = %q, want %q", key, got, want)
					}
				}
				verdicts[inf] = event(sp, "sluice.verdict")
				if got := points(t, s.metrics(t)["gen_ai.server.request.duration"]); len(got) != 1 {
					t.Errorf("durations %v", got)
				} else {
					for labels, n := range got {
						if n != 1 || strings.Contains(labels, "error.type") != (tt.errorType != "") ||
							!strings.Contains(labels, tt.errorType) || !strings.Contains(labels, "gen_ai.request.model="+model) {
							t.Errorf("duration of %s: %d", labels, n)
						}
					}
				}
				for labels, n := range points(t, s.metrics(t)["sluice.inferences.active"]) {
					if n != 0 {
						t.Errorf("%d active inferences left: %s", n, labels)
					}
				}
			} else if n := len(s.spans.Ended()); n != 1 {
				t.Errorf("%d spans, want that of the RPC alone", n)
			}
			for where, v := range verdicts {
				if (v != nil) != (where == tt.verdict) {
					t.Errorf("verdict on the %s span: %v", where, v)
				}
				if v != nil && v["sluice.policy"] == "stub" && tt.errorType != "INTERNAL" &&
					(v["sluice.field"] != "inputs.text_input" || v["sluice.denial.rule"] != "942100") {
					t.Errorf("verdict %v", v)
				}
			}
			var denials int64
			for _, n := range points(t, s.metrics(t)["sluice.denials"]) {
				denials += n
			}
			if denials != tt.denials {
				t.Errorf("%d denials counted, want %d", denials, tt.denials)
			}
			for labels, n := range points(t, s.metrics(t)["rpc.server.call.duration"]) {
				if n != 1 || !strings.Contains(labels, "rpc.response.status_code="+tt.code) || !strings.Contains(labels, "rpc.method="+name) {
					t.Errorf("call duration of %s: %d", labels, n)
				}
			}
			var warnings []string
			for line := range strings.Lines(s.log.String()) {
				var r map[string]any
				if err := json.Unmarshal([]byte(line), &r); err != nil {
					t.Fatal(err)
				}
				if r["level"] == "WARN" {
					warnings = append(warnings, r["msg"].(string))
					if r["trace_id"] != sp.SpanContext().TraceID().String() || r["principal"] != alice.String() || r["method"] != tt.method {
						t.Errorf("log record %v", r)
					}
				}
			}
			if got := strings.Join(warnings, "|"); got != tt.warn {
				t.Errorf("warnings %q, want %q", got, tt.warn)
			}
		})
	}
}

// On a multiplexed stream, an inference that the chain refused is told of
// although the call goes on.
func TestRefusedInBand(t *testing.T) {
	s := watch()
	chain := interceptors.New([]*interceptors.Backend{backend(t)}, s.policy)
	call, err := chain.Begin(t.Context(), info(stream, nil))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := ask(call, request("llama", "a", "one")); err != nil {
		t.Fatal(err)
	}
	if _, err := ask(call, request("nonesuch", "b", "two")); err == nil {
		t.Fatal("not refused")
	}
	if err := answer(call, chunk("a", "hello", true)); err != nil {
		t.Fatal(err)
	}
	call.End(nil)
	if got := attr(s.span(t, "text_completion other"), "error.type"); got != "MODEL_DENIED" {
		t.Errorf("error.type %q", got)
	}
	if got := attr(s.span(t, "text_completion llama"), "sluice.outcome"); got != "served" {
		t.Errorf("outcome %q", got)
	}
	if n := strings.Count(s.log.String(), `"level":"WARN"`); n != 1 {
		t.Errorf("%d warnings, want 1:\n%s", n, &s.log)
	}
}

// The times and counts of a streamed inference, on a clock that stands still
// unless told.
func TestStreamTimes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := watch(WithTenantLabel())
		policy := &stub{tenant: "acme", event: &interceptors.Event{Policy: "admit", Name: "queued", Attributes: []string{"pool", "gpu0"}}}
		chain := interceptors.New([]*interceptors.Backend{backend(t)}, s.policy, policy)
		call, err := chain.Begin(t.Context(), info(stream, nil))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := ask(call, request("llama", "a", "five words of a prompt")); err != nil {
			t.Fatal(err)
		}
		time.Sleep(50 * time.Millisecond)
		for n := range 5 { // 5 tokens, 100 ms apart
			if n > 0 {
				time.Sleep(100 * time.Millisecond)
			}
			if err := answer(call, chunk("a", fmt.Sprintf("word%d ", n), false)); err != nil {
				t.Fatal(err)
			}
		}
		time.Sleep(time.Second)
		if err := answer(call, &oip.ModelStreamInferResponse{InferResponse: &oip.ModelInferResponse{
			Id: "a", ModelName: "llama", Parameters: map[string]*oip.InferParameter{
				"triton_final_response": {ParameterChoice: &oip.InferParameter_BoolParam{BoolParam: true}},
			},
		}}); err != nil {
			t.Fatal(err)
		}
		call.End(nil)

		m := s.metrics(t)
		for name, want := range map[string]float64{
			"gen_ai.server.time_to_first_token":   .05,
			"gen_ai.server.time_per_output_token": .35, // by the convention, up to the end: 1.4 s for 4 tokens
			"gen_ai.server.request.duration":      1.45,
			"rpc.server.call.duration":            1.45,
		} {
			h, ok := m[name].Data.(metricdata.Histogram[float64])
			if !ok || len(h.DataPoints) != 1 || m[name].Unit != "s" {
				t.Errorf("%s: %+v", name, m[name])
				continue
			}
			if got := h.DataPoints[0].Sum; got < want-1e-9 || got > want+1e-9 {
				t.Errorf("%s = %v, want %v", name, got, want)
			}
		}
		const common = "gen_ai.operation.name=text_completion,gen_ai.provider.name=triton,gen_ai.request.model=llama,"
		usage := points(t, m["gen_ai.client.token.usage"])
		want := map[string]int64{
			common + "gen_ai.token.type=input,sluice.tenant=acme":  5,
			common + "gen_ai.token.type=output,sluice.tenant=acme": 5,
		}
		for k, v := range want {
			if usage[k] != v {
				t.Errorf("usage %v, want %v", usage, want)
			}
		}
		if got := points(t, m["sluice.events"]); got["sluice.event=queued,sluice.policy=admit"] != 1 || len(got) != 1 {
			t.Errorf("events %v", got)
		}
		sp := s.span(t, "text_completion llama")
		for key, want := range map[string]string{
			"gen_ai.usage.input_tokens": "5", "gen_ai.usage.output_tokens": "5", "gen_ai.provider.name": "triton",
			"gen_ai.response.time_to_first_chunk": "0.05", "gen_ai.request.stream": "true", "sluice.backend": "gpu",
		} {
			if got := attr(sp, key); got != want {
				t.Errorf("%s = %q, want %q", key, got, want)
			}
		}
		if got := event(sp, "sluice.queued"); got["sluice.policy"] != "admit" || got["sluice.pool"] != "gpu0" {
			t.Errorf("event %v", got)
		}
	})
}

// What a unary inference took says nothing of when its first token came, nor of the
// time between tokens.
func TestUnaryHasNoTimesOfTokens(t *testing.T) {
	s := watch()
	chain := interceptors.New([]*interceptors.Backend{backend(t)}, s.policy)
	serve(t, chain, infer, "llama", "a", nil)
	m := s.metrics(t)
	for _, name := range []string{"gen_ai.server.time_per_output_token", "gen_ai.server.time_to_first_token"} {
		if got := points(t, m[name]); len(got) != 0 {
			t.Errorf("%s: %v", name, got)
		}
	}
	if got := points(t, m["gen_ai.server.request.duration"]); len(got) != 1 {
		t.Errorf("durations: %v", got)
	}
}

func serve(t testing.TB, chain *interceptors.Chain, method, model, id string, md metadata.MD) {
	call, err := chain.Begin(context.Background(), info(method, md))
	if err != nil {
		return
	}
	if _, err := ask(call, request(model, id, "a prompt")); err != nil {
		call.End(err)
		return
	}
	err = nil
	if method == infer {
		err = answer(call, response(id, "an answer"))
	}
	call.End(err)
}

func TestBuckets(t *testing.T) {
	s := watch()
	chain := interceptors.New([]*interceptors.Backend{backend(t)}, s.policy)
	call, err := chain.Begin(t.Context(), info(stream, nil))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := ask(call, request("llama", "a", "one")); err != nil {
		t.Fatal(err)
	}
	for n := range 3 {
		if err := answer(call, chunk("a", "word ", n == 2)); err != nil {
			t.Fatal(err)
		}
	}
	call.End(nil)
	m := s.metrics(t)
	for name, want := range map[string]string{
		"rpc.server.call.duration":            "[0.005 0.01 0.025 0.05 0.075 0.1 0.25 0.5 0.75 1 2.5 5 7.5 10]",
		"gen_ai.server.request.duration":      "[0.01 0.02 0.04 0.08 0.16 0.32 0.64 1.28 2.56 5.12 10.24 20.48 40.96 81.92]",
		"gen_ai.server.time_to_first_token":   "[0.001 0.005 0.01 0.02 0.04 0.06 0.08 0.1 0.25 0.5 0.75 1 2.5 5 7.5 10]",
		"gen_ai.server.time_per_output_token": "[0.01 0.025 0.05 0.075 0.1 0.15 0.2 0.3 0.4 0.5 0.75 1 2.5]",
		"gen_ai.client.token.usage":           "[1 4 16 64 256 1024 4096 16384 65536 262144 1.048576e+06 4.194304e+06 1.6777216e+07 6.7108864e+07]",
	} {
		var bounds []float64
		switch d := m[name].Data.(type) {
		case metricdata.Histogram[float64]:
			bounds = d.DataPoints[0].Bounds
		case metricdata.Histogram[int64]:
			bounds = d.DataPoints[0].Bounds
		}
		if got := fmt.Sprint(bounds); got != want {
			t.Errorf("%s: %s, want %s", name, got, want)
		}
	}
}

// Whatever a caller, a model server or a policy's failure says, its text is in
// nothing that is exported.
func TestNoContent(t *testing.T) {
	const marker = "XYZZY-SECRET"
	tests := []struct {
		name   string
		policy stub
		end    error
	}{
		{name: "served"},
		{name: "denied, with a cause that quotes", policy: stub{start: &interceptors.Denial{
			Policy: "inspect", Reason: interceptors.PromptRejected, Message: "no: " + marker, Cause: errors.New(marker)}}},
		{name: "a policy fails", policy: stub{start: errors.New(marker)}},
		{name: "a policy panics", policy: stub{panics: marker}},
		{name: "output refused", policy: stub{response: &interceptors.Denial{Reason: interceptors.OutputRejected, Message: marker}}},
		{name: "upstream fails", end: status.Error(codes.Internal, marker)},
		{name: "handler fails", end: errors.New(marker)},
	}
	for _, tt := range tests {
		for _, method := range []string{infer, stream} {
			t.Run(tt.name+method[strings.LastIndex(method, "/"):], func(t *testing.T) {
				s := watch()
				chain := interceptors.New([]*interceptors.Backend{backend(t)}, s.policy, &tt.policy)
				call, err := chain.Begin(t.Context(), info(method, metadata.Pairs("x-note", marker, "authorization", marker, "baggage", "a="+marker)))
				if err != nil {
					t.Fatal(err)
				}
				_, err = ask(call, request("llama", "1", marker))
				if err == nil {
					err = tt.end
				}
				if err == nil {
					var m proto.Message = response("1", marker)
					if method == stream {
						m = chunk("1", marker, true)
					}
					err = answer(call, m)
				}
				call.End(err)
				if out := exported(t, s); strings.Contains(out, marker) {
					t.Errorf("exported: %s", out)
				} else if !strings.Contains(out, "text_completion llama") {
					t.Errorf("the search looks in the wrong place: %s", out)
				}
			})
		}
	}
}

// exported is everything that s exported, as text.
func exported(t testing.TB, s *seen) string {
	var b strings.Builder
	for _, stub := range tracetest.SpanStubsFromReadOnlySpans(s.spans.Ended()) {
		fmt.Fprintf(&b, "%+v\n", stub)
		for _, e := range stub.Events {
			fmt.Fprintf(&b, "%+v\n", e)
			for _, kv := range e.Attributes {
				fmt.Fprintln(&b, kv.Key, kv.Value.String())
			}
		}
		for _, kv := range stub.Attributes {
			fmt.Fprintln(&b, kv.Key, kv.Value.String())
		}
	}
	for name, m := range s.metrics(t) {
		fmt.Fprintln(&b, name, points(t, m))
	}
	b.WriteString(s.log.String())
	return b.String()
}

// Peers choose methods, models, ids, metadata and codes. None of that makes a
// new metric series.
func TestBoundedLabels(t *testing.T) {
	s := watch(WithModels(func(m string) bool { return m == "extra" }))
	chain := interceptors.New([]*interceptors.Backend{anyModel(t)}, s.policy)
	r := rand.New(rand.NewPCG(1, 2))
	text := func() string {
		b := make([]byte, r.IntN(300))
		for n := range b {
			b[n] = byte(r.UintN(256))
		}
		return string(b)
	}
	for n := range 600 {
		model := strings.ToValidUTF8(text(), "?")
		if n%3 == 0 {
			model = "extra"
		}
		method := []string{infer, stream, "/" + text(), text(), health}[r.IntN(5)]
		serve(t, chain, method, model, strings.ToValidUTF8(text(), "?"), metadata.Pairs("traceparent", text(), "tracestate", text()))
		call, err := chain.Begin(t.Context(), info(health, nil))
		if err != nil {
			t.Fatal(err)
		}
		call.End(status.Error(codes.Code(r.UintN(1<<20)), text()))
	}
	total := 0
	for name, m := range s.metrics(t) {
		for labels := range points(t, m) {
			total++
			if !strings.Contains(labels, "gen_ai.request.model") {
				continue
			}
			if !strings.Contains(labels, "model=extra") && !strings.Contains(labels, "model=other") {
				t.Errorf("%s has the series %q", name, labels)
			}
		}
	}
	if total == 0 || total > 60 {
		t.Errorf("%d series", total)
	}
	for _, sp := range s.spans.Ended() {
		for _, kv := range sp.Attributes() {
			if v := kv.Value.String(); len(v) > maxText || !utf8.ValidString(v) || strings.ContainsFunc(v, unicode.IsControl) {
				t.Fatalf("%s = %q", kv.Key, v)
			}
		}
		if len(sp.Name()) > 80 {
			t.Fatalf("span name %q", sp.Name())
		}
	}
	for line := range strings.Lines(s.log.String()) {
		if !json.Valid([]byte(line)) {
			t.Fatalf("log line %q", line)
		}
	}
}

func TestCacheIsBounded(t *testing.T) {
	built := 0
	c := cache[int, int]{build: func(k int) int { built++; return -k }}
	for n := range maxCached + 100 {
		for range 2 {
			if got := c.get(n); got != -n {
				t.Fatalf("get(%d) = %d", n, got)
			}
		}
	}
	if n := len(*c.entries.Load()); n != maxCached {
		t.Errorf("%d entries, want %d", n, maxCached)
	}
	if want := maxCached + 2*100; built != want {
		t.Errorf("built %d, want %d", built, want)
	}
}

func TestClean(t *testing.T) {
	long := strings.Repeat("a", maxText)
	tests := []struct{ name, in, want string }{
		{"empty", "", ""},
		{"plain", "llama-3 70B/v1", "llama-3 70B/v1"},
		{"unicode", "Übergröße 模型", "Übergröße 模型"},
		{"line break", "a\nlevel=ERROR msg=owned\r", `a\nlevel=ERROR msg=owned\r`},
		{"terminal escape", "\x1b[31mred\x07", `\x1b[31mred\a`},
		{"backslash", `a\n`, `a\\n`},
		{"bidi override", "a\u202eb", `a\u202eb`},
		{"line separator", "a\u2028b", `a\u2028b`},
		{"tag", "a\U000e0041b", `a\U000e0041b`},
		{"broken UTF-8", "a\xffb\xc3", `a\xffb\xc3`},
		{"just fits", long, long},
		{"just fits, with an escape", long[:maxText-2] + "\n", long[:maxText-2] + `\n`},
		{"too long", long + "b", long[:maxText-3] + "..."},
		{"cut before an escape", long[:maxText-4] + "\x00\x00", long[:maxText-4] + "..."},
		{"cut before a character", long[:maxText-4] + "模型", long[:maxText-4] + "..."},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if got := clean(tt.in); got != tt.want {
				t.Errorf("clean(%q) = %q, want %q", tt.in, got, tt.want)
			}
		})
	}
}

func FuzzClean(f *testing.F) {
	f.Add("a\nb")
	f.Add(strings.Repeat("模\x00", 100))
	f.Fuzz(func(t *testing.T, in string) {
		out := clean(in)
		if len(out) > maxText || !utf8.ValidString(out) {
			t.Fatalf("clean(%q) = %q", in, out)
		}
		for _, r := range out {
			if !unicode.IsPrint(r) {
				t.Fatalf("clean(%q) = %q", in, out)
			}
		}
	})
}

// The log names what lies outside of us, and only the type of all else.
func TestCause(t *testing.T) {
	tests := []struct {
		name      string
		cause     error
		want, not string
	}{
		{"network", fmt.Errorf("store says secret: %w", &net.OpError{Op: "dial", Net: "tcp", Err: errors.New("refused")}),
			`"cause":"dial tcp: refused"`, "secret"},
		{"deadline", fmt.Errorf("secret: %w", context.DeadlineExceeded), `"cause":"context deadline exceeded"`, "secret"},
		{"other", errors.New("secret"), `"cause_type":"*errors.errorString"`, "secret"},
		{"panic", interceptors.Recovered("p", "secret").Cause, `"stack":"goroutine`, "secret"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			s := watch()
			d := interceptors.Deny("stub", interceptors.PolicyUnavailable, "try later")
			d.Cause = tt.cause
			chain := interceptors.New([]*interceptors.Backend{backend(t)}, s.policy, &stub{start: d})
			serve(t, chain, infer, "llama", "1", nil)
			if out := s.log.String(); !strings.Contains(out, tt.want) || strings.Contains(out, tt.not) {
				t.Errorf("log %s", out)
			}
		})
	}
}

// Many inferences on one stream, from many goroutines.
func TestConcurrent(t *testing.T) {
	s := watch()
	ev := &interceptors.Event{Policy: "admit", Name: "queued"}
	chain := interceptors.New([]*interceptors.Backend{backend(t)}, s.policy, &stub{event: ev})
	call, err := chain.Begin(t.Context(), info(stream, nil))
	if err != nil {
		t.Fatal(err)
	}
	const n = 64
	var wg sync.WaitGroup
	for k := range n {
		wg.Go(func() {
			id := fmt.Sprint(k)
			model := "llama"
			if k%4 == 0 {
				model = "nonesuch"
			}
			if _, err := ask(call, request(model, id, "a prompt")); err != nil {
				return
			}
			if k%3 != 0 { // the others end with the call
				_ = answer(call, chunk(id, "word", false))
				_ = answer(call, chunk(id, "word", true))
			}
		})
	}
	wg.Wait()
	call.End(nil)
	m := s.metrics(t)
	var durations, denials int64
	for _, v := range points(t, m["gen_ai.server.request.duration"]) {
		durations += v
	}
	for _, v := range points(t, m["sluice.denials"]) {
		denials += v
	}
	if durations != n || denials != n/4 {
		t.Errorf("%d inferences and %d denials, want %d and %d", durations, denials, n, n/4)
	}
	for labels, v := range points(t, m["sluice.inferences.active"]) {
		if v != 0 {
			t.Errorf("%d still active: %s", v, labels)
		}
	}
	if started, ended := len(s.spans.Started()), len(s.spans.Ended()); started != ended || ended != n+1 {
		t.Errorf("%d spans started, %d ended, want %d", started, ended, n+1)
	}
}

// An unrecorded trace is still passed on, and named in the log.
func TestUnsampled(t *testing.T) {
	s := watch()
	s.policy.tracer = sdktrace.NewTracerProvider(sdktrace.WithSampler(sdktrace.NeverSample())).Tracer("t")
	chain := interceptors.New([]*interceptors.Backend{backend(t)}, s.policy)
	call, err := chain.Begin(t.Context(), info(infer, nil))
	if err != nil {
		t.Fatal(err)
	}
	_, err = ask(call, request("llama", "1", "p"))
	out := call.Outgoing.Get("traceparent")
	call.End(err)
	if len(out) != 1 || !strings.HasSuffix(out[0], "-00") {
		t.Fatalf("traceparent %q", out)
	}
	if id := strings.Split(out[0], "-")[1]; !strings.Contains(s.log.String(), `"trace_id":"`+id+`"`) {
		t.Errorf("the log lacks trace %s: %s", id, &s.log)
	}
}

func TestDefaults(t *testing.T) {
	p := New() // the globals, which do nothing
	chain := interceptors.New([]*interceptors.Backend{backend(t)}, p)
	serve(t, chain, infer, "llama", "1", metadata.Pairs("traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"))
}

func TestCarrierKeys(t *testing.T) {
	md := metadata.Pairs("a", "1", "b", "2")
	keys := carrier{&md}.Keys()
	slices.Sort(keys)
	if !slices.Equal(keys, []string{"a", "b"}) {
		t.Errorf("keys %q", keys)
	}
}

// address is a network address.
type address string

func (a address) Network() string { return "tcp" }
func (a address) String() string  { return string(a) }
