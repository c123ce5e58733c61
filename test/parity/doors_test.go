// Package parity_test runs one table of cases through every door of the chain:
// linked into a model server, and as the gateway before one.
package parity_test

import (
	"context"
	"io"
	"log/slog"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"go.uber.org/goleak"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/sluicegate/sluice/gateway"
	"github.com/sluicegate/sluice/interceptors"
	"github.com/sluicegate/sluice/interceptors/config"
	"github.com/sluicegate/sluice/interceptors/identity"
	"github.com/sluicegate/sluice/proto/gen/inference"
	configv1 "github.com/sluicegate/sluice/proto/gen/sluice/config/v1"
	"github.com/sluicegate/sluice/test/model"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// world is one door with a model server behind it, and an authority whose
// identities everyone has.
type world struct {
	t         *testing.T
	authority *identity.Authority
	model     *model.Server
	address   string
	guard     func() *config.Guard
	own       *identity.Source // nil: the authority issues it
	reload    func(text string)

	mu    sync.Mutex
	seen  metadata.MD
	asked []*inference.ModelInferRequest
	bare  bool // streams are answered as MLServer does
}

var domain = spiffeid.RequireTrustDomainFromString("parity.test")

// doors are the ways in.
var doors = map[string]func(t *testing.T, text string) *world{"linked": linked, "gateway": throughGateway}

func newWorld(t *testing.T) *world {
	t.Helper()
	authority, err := identity.NewAuthority(domain)
	if err != nil {
		t.Fatal(err)
	}
	return &world{t: t, authority: authority, model: model.New(model.Options{})}
}

func (w *world) source(path string) *identity.Source {
	w.t.Helper()
	s, err := w.authority.Source(path, "localhost", "127.0.0.1")
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { _ = s.Close() })
	return s
}

func (w *world) config(text string) *configv1.Config {
	w.t.Helper()
	cfg, err := config.Parse("parity.yaml", []byte(text))
	if err != nil {
		w.t.Fatalf("%v\n%s", err, text)
	}
	return cfg
}

func (w *world) options(path string) config.Options {
	o := config.Options{Source: w.own, Logger: slog.New(slog.DiscardHandler)}
	if o.Source == nil {
		o.Source = w.source(path)
	}
	return o
}

func (w *world) listen() net.Listener {
	w.t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		w.t.Fatal(err)
	}
	return l
}

// serve runs a grpc server until the test ends, and checks that nothing of the
// inferences is left.
func (w *world) serve(s *grpc.Server, l net.Listener) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = s.Serve(l)
	}()
	w.t.Cleanup(func() {
		s.Stop()
		<-done
	})
}

// linked is a model server with the chain linked in.
func linked(t *testing.T, text string) *world {
	w := newWorld(t)
	w.link(text)
	return w
}

func (w *world) link(text string) {
	w.t.Helper()
	o := w.options("/gateway")
	guard, err := config.Build(w.config(text), nil, o)
	if err != nil {
		w.t.Fatal(err)
	}
	guards := []*config.Guard{guard}
	w.t.Cleanup(func() {
		for _, g := range guards {
			g.Close()
		}
	})
	// The interceptors that a program adds come after the chain.
	s := grpc.NewServer(append(guard.ServerOptions(), append(w.watching(), grpc.WaitForHandlers(true))...)...)
	inference.RegisterGRPCInferenceServiceServer(s, w.model)
	l := w.listen()
	w.serve(s, l)
	w.address = l.Addr().String()
	w.guard = func() *config.Guard { return guard }
	w.reload = func(text string) {
		w.t.Helper()
		next, err := config.Build(w.config(text), guards[len(guards)-1], o)
		if err != nil {
			w.t.Fatal(err)
		}
		guards = append(guards, next)
		next.Enforce()
	}
}

// throughGateway is a model server behind the gateway.
func throughGateway(t *testing.T, text string) *world {
	w := newWorld(t)
	w.proxy(text)
	return w
}

func (w *world) proxy(text string) {
	w.t.Helper()
	s := grpc.NewServer(append(w.watching(), grpc.Creds(identity.ServerCredentials(w.source("/model"), nil)), grpc.WaitForHandlers(true))...)
	inference.RegisterGRPCInferenceServiceServer(s, w.model)
	behind := w.listen()
	w.serve(s, behind)

	parse := func(text string) *configv1.Config {
		cfg := w.config(text)
		cfg.Listener = &configv1.Listener{Address: "127.0.0.1:0"}
		cfg.Backends[0].Address = behind.Addr().String()
		return cfg
	}
	g, err := gateway.New(parse(text), w.options("/gateway"))
	if err != nil {
		w.t.Fatal(err)
	}
	l := w.listen()
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = g.Serve(l)
	}()
	w.t.Cleanup(func() {
		g.Shutdown()
		<-done
	})
	w.address = l.Addr().String()
	w.guard = g.Guard
	w.reload = func(text string) {
		w.t.Helper()
		if err := g.Reload(parse(text)); err != nil {
			w.t.Fatal(err)
		}
	}
}

// watching has a server note which metadata and which requests its handlers see.
func (w *world) watching() []grpc.ServerOption {
	note := func(ctx context.Context) {
		md, _ := metadata.FromIncomingContext(ctx)
		w.mu.Lock()
		defer w.mu.Unlock()
		w.seen = md
	}
	return []grpc.ServerOption{
		grpc.ChainUnaryInterceptor(func(ctx context.Context, req any, _ *grpc.UnaryServerInfo, h grpc.UnaryHandler) (any, error) {
			note(ctx)
			w.note(req)
			return h(ctx, req)
		}),
		grpc.ChainStreamInterceptor(func(srv any, ss grpc.ServerStream, _ *grpc.StreamServerInfo, h grpc.StreamHandler) error {
			note(ss.Context())
			ss = &noting{ss, w}
			w.mu.Lock()
			bare := w.bare
			w.mu.Unlock()
			if bare {
				return answerBare(ss)
			}
			return h(srv, ss)
		}),
	}
}

// note keeps a request as the model server gets it.
func (w *world) note(req any) {
	if r, ok := req.(*inference.ModelInferRequest); ok {
		w.mu.Lock()
		defer w.mu.Unlock()
		w.asked = append(w.asked, proto.CloneOf(r))
	}
}

// noting is a stream whose requests are noted.
type noting struct {
	grpc.ServerStream
	w *world
}

func (s *noting) RecvMsg(m any) error {
	err := s.ServerStream.RecvMsg(m)
	if err == nil {
		s.w.note(m)
	}
	return err
}

// answerBare answers each message of a stream as MLServer does.
func answerBare(ss grpc.ServerStream) error {
	for {
		r := new(inference.ModelInferRequest)
		if err := ss.RecvMsg(r); err == io.EOF {
			return nil
		} else if err != nil {
			return err
		}
		if err := ss.SendMsg(&inference.ModelInferResponse{ModelName: r.GetModelName(), Id: r.GetId()}); err != nil {
			return err
		}
	}
}

// saw is the metadata that the model server saw last, and forgets it.
func (w *world) saw() metadata.MD {
	w.mu.Lock()
	defer w.mu.Unlock()
	md := w.seen
	w.seen = nil
	return md
}

// client connects with the identity of a path.
func (w *world) client(path string) inference.GRPCInferenceServiceClient {
	return inference.NewGRPCInferenceServiceClient(w.dial(path))
}

func (w *world) dial(path string) *grpc.ClientConn {
	w.t.Helper()
	creds := identity.ClientCredentials(w.source(path), spiffeid.MatchMemberOf(domain), nil)
	conn, err := grpc.NewClient(w.address, grpc.WithTransportCredentials(creds), grpc.WithDisableRetry())
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { _ = conn.Close() })
	return conn
}

// quiet waits until no inference holds a permit or a reservation.
func (w *world) quiet() {
	w.t.Helper()
	g := w.guard()
	deadline := time.Now().Add(10 * time.Second)
	for {
		held := 0
		if p := g.Pools(); p != nil {
			for _, s := range p.Snapshot() {
				held += int(s.InUse) + s.Waiting
			}
		}
		if b := g.Budgets(); b != nil {
			for _, a := range b.Snapshot() {
				held += int(a.Reserved)
			}
		}
		if held == 0 {
			return
		}
		if time.Now().After(deadline) {
			w.t.Errorf("%d permits or tokens are still held", held)
			return
		}
		pause()
	}
}

// pause lets other goroutines run while something is awaited.
func pause() {
	t := time.NewTimer(time.Millisecond)
	<-t.C
}

// outcome is what a caller sees of one inference.
type outcome struct {
	Code   codes.Code
	Reason string
	// Retry is true if the caller is told when to try again.
	Retry bool
	// Quota is the metric of a QuotaFailure.
	Quota string
	// Text is what the model answered, if it did.
	Text string
}

// ofStatus reads an outcome from a status, and checks the form of its details.
func ofStatus(t *testing.T, err error, trailer metadata.MD) outcome {
	t.Helper()
	s := status.Convert(err)
	o := outcome{Code: s.Code()}
	if s.Code() == codes.OK {
		return o
	}
	infos := 0
	for _, d := range s.Details() {
		switch d := d.(type) {
		case *errdetails.ErrorInfo:
			infos++
			o.Reason = d.GetReason()
			if d.GetDomain() != interceptors.Domain {
				t.Errorf("domain %q", d.GetDomain())
			}
		case *errdetails.RetryInfo:
			o.Retry = true
		case *errdetails.QuotaFailure:
			o.Quota = d.GetViolations()[0].GetQuotaMetric()
		}
	}
	if infos != 1 {
		t.Errorf("%v has %d ErrorInfo, want 1", err, infos)
	}
	if !strings.HasPrefix(s.Message(), o.Reason+": ") {
		t.Errorf("message %q does not begin with its reason", s.Message())
	}
	pushback := trailer.Get("grpc-retry-pushback-ms")
	if want := o.Retry; want != (len(pushback) == 1 && pushback[0] != "-1") {
		t.Errorf("%s: retry %v, pushback %v", o.Reason, want, pushback)
	}
	return o
}

// infer makes one unary inference.
func infer(ctx context.Context, t *testing.T, c inference.GRPCInferenceServiceClient, req *inference.ModelInferRequest) outcome {
	t.Helper()
	var trailer metadata.MD
	resp, err := c.ModelInfer(ctx, req, grpc.Trailer(&trailer))
	o := ofStatus(t, err, trailer)
	if err == nil {
		o.Text = text(resp)
	}
	return o
}

// converse makes inferences on one stream, and half-closes after the last. The
// outcomes are by id; that of the stream itself is under "stream".
func converse(ctx context.Context, t *testing.T, c inference.GRPCInferenceServiceClient, reqs ...*inference.ModelInferRequest) map[string]outcome {
	t.Helper()
	out := make(map[string]outcome)
	s, err := c.ModelStreamInfer(ctx)
	if err != nil {
		out["stream"] = ofStatus(t, err, nil)
		return out
	}
	for _, r := range reqs {
		if err := s.Send(r); err != nil {
			break
		}
	}
	_ = s.CloseSend()
	for {
		resp, err := s.Recv()
		if err == io.EOF {
			out["stream"] = outcome{}
			return out
		}
		if err != nil {
			out["stream"] = ofStatus(t, err, s.Trailer())
			return out
		}
		r := resp.GetInferResponse()
		o := out[r.GetId()]
		o.Text += text(r)
		if resp.GetErrorMessage() != "" {
			p := r.GetParameters()
			if !p["triton_final_response"].GetBoolParam() {
				t.Errorf("a refusal in band is not final: %v", resp)
			}
			o.Reason = p["sluice_reason"].GetStringParam()
			o.Retry = p["sluice_retry_after_ms"] != nil
			o.Code = codeOf(p["sluice_code"].GetStringParam())
			if !strings.HasPrefix(resp.GetErrorMessage(), o.Reason+": ") {
				t.Errorf("error_message %q", resp.GetErrorMessage())
			}
		}
		out[r.GetId()] = o
	}
}

func codeOf(name string) codes.Code {
	var c codes.Code
	_ = c.UnmarshalJSON([]byte(`"` + name + `"`))
	return c
}

// text is the text of a response, or its numbers.
func text(r *inference.ModelInferResponse) string {
	var b strings.Builder
	for n, o := range r.GetOutputs() {
		if o.GetDatatype() != "BYTES" || n >= len(r.GetRawOutputContents()) {
			for _, e := range o.GetContents().GetBytesContents() {
				b.Write(e)
			}
			continue
		}
		raw := r.GetRawOutputContents()[n]
		for len(raw) >= 4 {
			size := int(raw[0]) | int(raw[1])<<8 | int(raw[2])<<16 | int(raw[3])<<24
			b.Write(raw[4 : 4+size])
			raw = raw[4+size:]
		}
	}
	return b.String()
}

// request makes an inference of a model.
func request(modelName, id string, edits ...func(*inference.ModelInferRequest)) *inference.ModelInferRequest {
	r := &inference.ModelInferRequest{ModelName: modelName, Id: id}
	for _, e := range edits {
		e(r)
	}
	return r
}

// prompt adds the tensor text_input with these elements.
func prompt(elements ...string) func(*inference.ModelInferRequest) {
	return func(r *inference.ModelInferRequest) {
		var contents [][]byte
		for _, e := range elements {
			contents = append(contents, []byte(e))
		}
		r.Inputs = append(r.Inputs, &inference.ModelInferRequest_InferInputTensor{
			Name: "text_input", Datatype: "BYTES", Shape: []int64{int64(len(elements))},
			Contents: &inference.InferTensorContents{BytesContents: contents},
		})
	}
}

func param(name string, value any) func(*inference.ModelInferRequest) {
	return func(r *inference.ModelInferRequest) {
		if r.Parameters == nil {
			r.Parameters = make(map[string]*inference.InferParameter)
		}
		r.Parameters[name] = parameter(value)
	}
}

func tensorParam(name string, value any) func(*inference.ModelInferRequest) {
	return func(r *inference.ModelInferRequest) {
		in := r.Inputs[len(r.Inputs)-1]
		if in.Parameters == nil {
			in.Parameters = make(map[string]*inference.InferParameter)
		}
		in.Parameters[name] = parameter(value)
	}
}

// shared adds a tensor that lies in shared memory.
func shared(r *inference.ModelInferRequest) {
	r.Inputs = append(r.Inputs, &inference.ModelInferRequest_InferInputTensor{Name: "text_input", Datatype: "BYTES", Shape: []int64{1}})
	tensorParam("shared_memory_region", "prompt")(r)
	tensorParam("shared_memory_byte_size", 10)(r)
}

func parameter(value any) *inference.InferParameter {
	switch v := value.(type) {
	case string:
		return &inference.InferParameter{ParameterChoice: &inference.InferParameter_StringParam{StringParam: v}}
	case int:
		return &inference.InferParameter{ParameterChoice: &inference.InferParameter_Int64Param{Int64Param: int64(v)}}
	case bool:
		return &inference.InferParameter{ParameterChoice: &inference.InferParameter_BoolParam{BoolParam: v}}
	}
	panic("no such parameter")
}

// words is a prompt of n words.
func words(n int) string {
	return strings.TrimSpace(strings.Join(slices.Repeat([]string{"word"}, n), " "))
}
