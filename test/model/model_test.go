package model_test

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/proto"

	"github.com/sluicegate/sluice/proto/gen/inference"
	"github.com/sluicegate/sluice/test/model"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// serve runs the test in a bubble, with a server and a client of it.
func serve(t *testing.T, o model.Options, test func(context.Context, *model.Server, inference.GRPCInferenceServiceClient)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		l := bufconn.Listen(1 << 20)
		m := model.New(o)
		s := grpc.NewServer(grpc.WaitForHandlers(true))
		inference.RegisterGRPCInferenceServiceServer(s, m)
		go func() { _ = s.Serve(l) }()
		conn, err := grpc.NewClient("passthrough:///model",
			grpc.WithTransportCredentials(insecure.NewCredentials()),
			grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return l.DialContext(ctx) }))
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Hour)
		test(ctx, m, inference.NewGRPCInferenceServiceClient(conn))
		cancel()
		_ = conn.Close()
		s.Stop()
		synctest.Wait()
		for _, name := range m.Models() {
			if n := m.Stats(name).Active; n != 0 {
				t.Errorf("%s: %d inferences are still running", name, n)
			}
		}
	})
}

func ask(name, id, prompt string, change ...func(*inference.ModelInferRequest)) *inference.ModelInferRequest {
	r := &inference.ModelInferRequest{
		ModelName: name, Id: id,
		Inputs: []*inference.ModelInferRequest_InferInputTensor{{
			Name: "text_input", Datatype: "BYTES", Shape: []int64{1},
			Contents: &inference.InferTensorContents{BytesContents: [][]byte{[]byte(prompt)}},
		}},
	}
	for _, c := range change {
		c(r)
	}
	return r
}

func parameter(key string, v int64) func(*inference.ModelInferRequest) {
	return with(key, &inference.InferParameter{ParameterChoice: &inference.InferParameter_Int64Param{Int64Param: v}})
}

func flag(key string) func(*inference.ModelInferRequest) {
	return with(key, &inference.InferParameter{ParameterChoice: &inference.InferParameter_BoolParam{BoolParam: true}})
}

func with(key string, p *inference.InferParameter) func(*inference.ModelInferRequest) {
	return func(r *inference.ModelInferRequest) {
		if r.Parameters == nil {
			r.Parameters = make(map[string]*inference.InferParameter)
		}
		r.Parameters[key] = p
	}
}

func tensor(name, datatype string, c *inference.InferTensorContents) func(*inference.ModelInferRequest) {
	return func(r *inference.ModelInferRequest) {
		r.Inputs = append(r.Inputs, &inference.ModelInferRequest_InferInputTensor{
			Name: name, Datatype: datatype, Shape: []int64{1}, Contents: c,
		})
	}
}

// said is a message of a stream, in short: "id: text", "id: END" and "id: ERROR code".
func said(r *inference.ModelStreamInferResponse) string {
	out := r.GetInferResponse().GetId() + ":"
	if r.GetErrorMessage() != "" {
		out += " ERROR"
	}
	for n, o := range r.GetInferResponse().GetOutputs() {
		raw := r.GetInferResponse().GetRawOutputContents()[n]
		switch o.GetDatatype() {
		case "BYTES":
			out += string(raw[4:])
		case "UINT32":
			out += " " + o.GetName() + "=" + string(rune('0'+raw[0]))
		}
	}
	if r.GetInferResponse().GetParameters()["triton_final_response"].GetBoolParam() {
		out += " END"
	}
	return out
}

// stream sends the requests, half-closes, and returns what came back.
func stream(ctx context.Context, t *testing.T, c inference.GRPCInferenceServiceClient, reqs ...*inference.ModelInferRequest) ([]string, error) {
	t.Helper()
	s, err := c.ModelStreamInfer(ctx)
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range reqs {
		if err := s.Send(r); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.CloseSend(); err != nil {
		t.Fatal(err)
	}
	var got []string
	for {
		r, err := s.Recv()
		if errors.Is(err, io.EOF) {
			return got, nil
		}
		if err != nil {
			return got, err
		}
		got = append(got, said(r))
	}
}

func TestOneInferenceOfAStream(t *testing.T) {
	sampling := func(json string) func(*inference.ModelInferRequest) {
		return tensor("sampling_parameters", "BYTES", &inference.InferTensorContents{BytesContents: [][]byte{[]byte(json)}})
	}
	yes := &inference.InferTensorContents{BoolContents: []bool{true}}
	tests := []struct {
		name string
		req  *inference.ModelInferRequest
		want []string
	}{
		{"words one by one, with a hidden end", ask("words", "a", "to be or"), []string{"a:to", "a: be", "a: or"}},
		{"the end is shown to who asks", ask("words", "a", "to be", flag("triton_enable_empty_final_response")),
			[]string{"a:to", "a: be", "a: END"}},
		{"no id", ask("words", "", "to be"), []string{":to", ": be"}},
		{"limit in a parameter", ask("words", "a", "to be or", parameter("max_tokens", 2)), []string{"a:to", "a: be"}},
		{"limit in a tensor", ask("words", "a", "to be or",
			tensor("max_tokens", "INT32", &inference.InferTensorContents{IntContents: []int32{1}})), []string{"a:to"}},
		{"limit in JSON", ask("words", "a", "to be or", sampling(`{"max_tokens":1}`)), []string{"a:to"}},
		{"the smallest limit counts", ask("words", "a", "to be or", sampling(`{"max_tokens":3}`), parameter("max_tokens", 2)),
			[]string{"a:to", "a: be"}},
		{"JSON without a limit", ask("words", "a", "to be", sampling(`{"n":1}`)), []string{"a:to", "a: be"}},
		{"no words at all", ask("words", "a", " ", flag("triton_enable_empty_final_response")), []string{"a: END"}},
		{"usage is reported to who asks", ask("words", "a", "to be",
			tensor("return_num_input_tokens", "BOOL", yes), tensor("return_num_output_tokens", "BOOL", yes)),
			[]string{"a:to num_input_tokens=2 num_output_tokens=1", "a: be num_input_tokens=2 num_output_tokens=1"}},
		{"an answer of its own", ask("words", "a", "who?"), []string{"a:me"}},
		{"an alias", ask("chat", "a", "hi"), []string{"a:hi"}},
		{"a model that is not decoupled ends with its answer", ask("echo", "a", "to be"), []string{"a:to be END"}},
		{"no such model: no flag, because no model answered", ask("nobody", "a", "x"), []string{"a: ERROR"}},
		{"a bad limit is the model's answer", ask("words", "a", "x", parameter("max_tokens", 0)), []string{"a: ERROR END"}},
		{"bad JSON", ask("words", "a", "x", sampling(`{`)), []string{"a: ERROR END"}},
		{"wrong shape", ask("words", "a", "x", func(r *inference.ModelInferRequest) { r.Inputs[0].Shape = []int64{2} }),
			[]string{"a: ERROR END"}},
		{"raw and typed", ask("words", "a", "x", func(r *inference.ModelInferRequest) { r.RawInputContents = [][]byte{{1, 0, 0, 0, 'y'}} }),
			[]string{"a: ERROR END"}},
		{"raw that goes past its end", ask("words", "a", "x", func(r *inference.ModelInferRequest) {
			r.Inputs[0].Contents, r.RawInputContents = nil, [][]byte{{2, 0, 0, 0, 'y'}}
		}), []string{"a: ERROR END"}},
		{"raw", ask("words", "a", "x", func(r *inference.ModelInferRequest) {
			r.Inputs[0].Contents, r.RawInputContents = nil, [][]byte{{2, 0, 0, 0, 'h', 'o'}}
		}), []string{"a:ho"}},
		{"shared memory", ask("words", "a", "x", func(r *inference.ModelInferRequest) {
			r.Inputs[0].Parameters = map[string]*inference.InferParameter{"shared_memory_region": {}}
		}), []string{"a: ERROR END"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			o := model.Options{Answers: map[string]string{"who?": "me"}, Aliases: map[string]string{"chat": "words"}}
			serve(t, o, func(ctx context.Context, _ *model.Server, c inference.GRPCInferenceServiceClient) {
				got, err := stream(ctx, t, c, tt.req)
				if err != nil || !slices.Equal(got, tt.want) {
					t.Errorf("got %q, %v; want %q", got, err, tt.want)
				}
			})
		})
	}
}

func TestInferencesOfAStreamInterleave(t *testing.T) {
	serve(t, model.Options{Delay: 2 * time.Second}, func(ctx context.Context, m *model.Server, c inference.GRPCInferenceServiceClient) {
		got, err := stream(ctx, t, c,
			ask("words", "slow", "one two"),
			ask("nobody", "lost", "x"),
			ask("words", "quick", "1 2 3", parameter("delay_ms", 900)))
		want := []string{"lost: ERROR", "quick:1", "quick: 2", "slow:one", "quick: 3", "slow: two"}
		if err != nil || !slices.Equal(got, want) {
			t.Errorf("got %q, %v; want %q", got, err, want)
		}
		if n := m.Seen(); n != 2 {
			t.Errorf("seen: %d, want 2: nobody is no model", n)
		}
		if _, err := stream(ctx, t, c, ask("words", "alone", "four")); err != nil {
			t.Error(err)
		}
		if s := m.Stats("words"); s.MaxActive != 2 || s.Words != 6 || s.Inferences != 3 {
			t.Errorf("stats: %+v; want 3 inferences, 2 at once, 6 words", s)
		}
	})
}

func TestAnErrorEndsTheStreamIfAskedTo(t *testing.T) {
	serve(t, model.Options{}, func(ctx context.Context, m *model.Server, c inference.GRPCInferenceServiceClient) {
		ctx = metadata.AppendToOutgoingContext(ctx, "triton_grpc_error", "true")
		s, err := c.ModelStreamInfer(ctx)
		if err != nil {
			t.Fatal(err)
		}
		_ = s.Send(ask("words", "long", "one two", parameter("delay_ms", 60_000)))
		synctest.Wait()
		_ = s.Send(ask("nobody", "", "x"))
		if _, err = s.Recv(); status.Code(err) != codes.NotFound {
			t.Errorf("got %v, want NOT_FOUND", err)
		}
		synctest.Wait()
		if s := m.Stats("words"); s.Active != 0 || s.Canceled != 1 {
			t.Errorf("stats: %+v; the stream ended, so its other inference had to", s)
		}
	})
}

func TestCancellationIsNoticedAtOnce(t *testing.T) {
	serve(t, model.Options{Delay: time.Minute}, func(ctx context.Context, m *model.Server, c inference.GRPCInferenceServiceClient) {
		ctx, cancel := context.WithCancel(ctx)
		s, err := c.ModelStreamInfer(ctx)
		if err != nil {
			t.Fatal(err)
		}
		for _, id := range []string{"a", "b"} {
			_ = s.Send(ask("words", id, "one two"))
		}
		go func() { _, _ = c.ModelInfer(ctx, ask("echo", "", "x")) }()
		synctest.Wait()
		if n := m.Stats("words").Active + m.Stats("echo").Active; n != 3 {
			t.Fatalf("%d are running, want 3", n)
		}
		began := time.Now()
		cancel()
		synctest.Wait()
		if d := time.Since(began); d != 0 {
			t.Errorf("it took %v of the clock", d)
		}
		if w, e := m.Stats("words"), m.Stats("echo"); w.Active+e.Active != 0 || w.Canceled+e.Canceled != 3 {
			t.Errorf("words %+v, echo %+v; want none active, 3 canceled", w, e)
		}
	})
}

func TestUnary(t *testing.T) {
	numbers := func(v ...int32) *inference.ModelInferRequest {
		return &inference.ModelInferRequest{ModelName: "sum", Inputs: []*inference.ModelInferRequest_InferInputTensor{{
			Name: "values", Datatype: "INT32", Shape: []int64{int64(len(v))}, Contents: &inference.InferTensorContents{IntContents: v},
		}}}
	}
	tests := []struct {
		name string
		req  *inference.ModelInferRequest
		want string // the raw output
		code codes.Code
	}{
		{"echo", ask("echo", "a", "hi"), "\x02\x00\x00\x00hi", codes.OK},
		{"sum", numbers(1<<30, 1<<30, -1), string(binary.LittleEndian.AppendUint64(nil, 1<<31-1)), codes.OK},
		{"sum, raw", &inference.ModelInferRequest{ModelName: "sum", RawInputContents: [][]byte{{1, 0, 0, 0, 2, 0, 0, 0}},
			Inputs: []*inference.ModelInferRequest_InferInputTensor{{Name: "values", Datatype: "INT32", Shape: []int64{2}}}},
			string(binary.LittleEndian.AppendUint64(nil, 3)), codes.OK},
		{"decoupled", ask("words", "a", "hi"), "", codes.Unimplemented},
		{"no such model", ask("nobody", "a", "hi"), "", codes.NotFound},
		{"no such tensor", &inference.ModelInferRequest{ModelName: "echo"}, "", codes.InvalidArgument},
		{"wrong datatype", ask("sum", "", "", func(r *inference.ModelInferRequest) { r.Inputs[0].Name = "values" }), "", codes.InvalidArgument},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			serve(t, model.Options{}, func(ctx context.Context, _ *model.Server, c inference.GRPCInferenceServiceClient) {
				r, err := c.ModelInfer(ctx, tt.req)
				if status.Code(err) != tt.code {
					t.Fatalf("got %v, want %v", err, tt.code)
				}
				if got := string(slices.Concat(r.GetRawOutputContents()...)); got != tt.want {
					t.Errorf("got %q, want %q", got, tt.want)
				}
				if err == nil && r.GetId() != tt.req.GetId() {
					t.Errorf("id %q, want %q", r.GetId(), tt.req.GetId())
				}
			})
		})
	}
}

func TestAboutTheServer(t *testing.T) {
	serve(t, model.Options{}, func(ctx context.Context, m *model.Server, c inference.GRPCInferenceServiceClient) {
		live, err1 := c.ServerLive(ctx, &inference.ServerLiveRequest{})
		ready, err2 := c.ServerReady(ctx, &inference.ServerReadyRequest{})
		words, err3 := c.ModelReady(ctx, &inference.ModelReadyRequest{Name: "words"})
		nobody, err4 := c.ModelReady(ctx, &inference.ModelReadyRequest{Name: "nobody"})
		if err1 != nil || err2 != nil || err3 != nil || err4 != nil || !live.Live || !ready.Ready || !words.Ready || nobody.Ready {
			t.Errorf("live %v %v, ready %v %v, words %v %v, nobody %v %v", live, err1, ready, err2, words, err3, nobody, err4)
		}
		md, err := c.ModelMetadata(ctx, &inference.ModelMetadataRequest{Name: "sum"})
		want := &inference.ModelMetadataResponse{
			Name: "sum", Versions: []string{"1"}, Platform: "sluice",
			Inputs:  []*inference.ModelMetadataResponse_TensorMetadata{{Name: "values", Datatype: "INT32", Shape: []int64{-1}}},
			Outputs: []*inference.ModelMetadataResponse_TensorMetadata{{Name: "sum", Datatype: "INT64", Shape: []int64{1}}},
		}
		if err != nil || !proto.Equal(md, want) {
			t.Errorf("metadata: %v, %v", md, err)
		}
		if _, err := c.RepositoryModelLoad(ctx, &inference.RepositoryModelLoadRequest{}); status.Code(err) != codes.Unimplemented {
			t.Errorf("load: %v, want UNIMPLEMENTED", err)
		}
		if m.Seen() != 0 {
			t.Errorf("seen: %d, want 0: nothing was inferred", m.Seen())
		}
	})
}
