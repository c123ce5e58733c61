package gateway

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/sluicegate/sluice/interceptors"
	"github.com/sluicegate/sluice/interceptors/config"
	"github.com/sluicegate/sluice/proto/gen/inference"
	configv1 "github.com/sluicegate/sluice/proto/gen/sluice/config/v1"
	"github.com/sluicegate/sluice/test/model"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const (
	modelInfer       = "/inference.GRPCInferenceService/ModelInfer"
	modelStreamInfer = "/inference.GRPCInferenceService/ModelStreamInfer"
	serverReady      = "/inference.GRPCInferenceService/ServerReady"
)

// base is plaintext and lets everyone do what is not management.
const base = `
identity:
  insecure: {}
  rules: [{principals: [anonymous], methods: [inference, metadata, health], models: ["*"]}]
backends: [{name: model, dialect: DIALECT_TRITON, plaintext: true}]
`

// gate is a gateway before a model server, over loopback TCP.
type gate struct {
	*Gateway
	t       *testing.T
	address string
	log     *bytes.Buffer
	pool    *countingPool
	served  chan error
}

// open starts a gateway with this configuration, whose back ends are at these
// addresses. When the test ends it is shut down, and then nothing may be left:
// no permit, no reservation, no buffer.
func open(t *testing.T, text string, backends ...string) *gate {
	t.Helper()
	return openWith(t, text, config.Options{}, backends...)
}

func openWith(t *testing.T, text string, o config.Options, backends ...string) *gate {
	t.Helper()
	g := &gate{t: t, pool: newCountingPool(), log: new(bytes.Buffer), served: make(chan error, 1)}
	o.Logger = slog.New(slog.NewTextHandler(&locked{w: g.log}, nil))
	var err error
	if g.Gateway, err = newGateway(parse(t, text, backends...), o, g.pool); err != nil {
		t.Fatalf("%v\n%s", err, text)
	}
	l := listen(t)
	g.address = l.Addr().String()
	go func() { g.served <- g.Serve(l) }()
	t.Cleanup(func() {
		g.Shutdown()
		if err := <-g.served; err != nil {
			t.Errorf("Serve: %v", err)
		}
		g.nothingHeld()
		g.pool.check(t)
	})
	return g
}

// parse reads a configuration and fills in what no test cares for.
func parse(t testing.TB, text string, backends ...string) *configv1.Config {
	t.Helper()
	cfg, err := config.Parse("gateway.yaml", []byte(text))
	if err != nil {
		t.Fatalf("%v\n%s", err, text)
	}
	if cfg.Listener == nil {
		cfg.Listener = new(configv1.Listener)
	}
	for n, b := range cfg.Backends {
		if n < len(backends) {
			b.Address = backends[n]
		}
	}
	return cfg
}

// nothingHeld checks that no inference holds a permit or a reservation, and
// that the books balance.
func (g *gate) nothingHeld() {
	g.t.Helper()
	if p := g.Guard().Pools(); p != nil {
		for _, s := range p.Snapshot() {
			if s.InUse != 0 || s.Waiting != 0 {
				g.t.Errorf("pool %s: %d permits are held, %d inferences wait", s.Name, s.InUse, s.Waiting)
			}
		}
	}
	if b := g.Guard().Budgets(); b != nil {
		for _, a := range b.Snapshot() {
			if a.Reserved != 0 || a.Carried != 0 || a.Remaining+a.Spent != a.Limit || a.Remaining < 0 {
				g.t.Errorf("account %+v: something is still reserved, or the sums differ", a)
			}
		}
	}
}

// dial connects a client that does not retry.
func (g *gate) dial(o ...grpc.DialOption) *grpc.ClientConn {
	g.t.Helper()
	o = append([]grpc.DialOption{insecureTransport, grpc.WithDisableRetry()}, o...)
	conn, err := grpc.NewClient(g.address, o...)
	if err != nil {
		g.t.Fatal(err)
	}
	g.t.Cleanup(func() { _ = conn.Close() })
	return conn
}

var insecureTransport = grpc.WithTransportCredentials(insecure.NewCredentials())

func (g *gate) client(o ...grpc.DialOption) inference.GRPCInferenceServiceClient {
	return inference.NewGRPCInferenceServiceClient(g.dial(o...))
}

func listen(t testing.TB) net.Listener {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// modelServer runs an honest model server, and returns its address.
func modelServer(t *testing.T, o ...grpc.ServerOption) (*model.Server, string) {
	t.Helper()
	m := model.New(model.Options{})
	s := grpc.NewServer(append(o, grpc.WaitForHandlers(true))...)
	inference.RegisterGRPCInferenceServiceServer(s, m)
	return m, serve(t, s)
}

// script runs a model server that does as the function says, with raw messages.
func script(t *testing.T, f func(method string, ss grpc.ServerStream) error, o ...grpc.ServerOption) string {
	t.Helper()
	s := grpc.NewServer(append(o,
		grpc.ForceServerCodecV2(rawCodec{}),
		grpc.MaxRecvMsgSize(1<<30), grpc.MaxSendMsgSize(1<<30),
		grpc.WaitForHandlers(true),
		grpc.UnknownServiceHandler(func(_ any, ss grpc.ServerStream) error {
			method, _ := grpc.MethodFromServerStream(ss)
			return f(method, ss)
		}))...)
	return serve(t, s)
}

func serve(t *testing.T, s *grpc.Server) string {
	t.Helper()
	l := listen(t)
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = s.Serve(l)
	}()
	t.Cleanup(func() {
		s.Stop()
		<-done
	})
	return l.Addr().String()
}

// rawCodec takes and gives []byte.
type rawCodec struct{}

func (rawCodec) Marshal(v any) (mem.BufferSlice, error) {
	switch v := v.(type) {
	case []byte:
		return mem.BufferSlice{mem.SliceBuffer(v)}, nil
	case proto.Message:
		b, err := proto.Marshal(v)
		return mem.BufferSlice{mem.SliceBuffer(b)}, err
	}
	return nil, fmt.Errorf("rawCodec: %T", v)
}

func (rawCodec) Unmarshal(data mem.BufferSlice, v any) error {
	switch v := v.(type) {
	case *[]byte:
		*v = data.Materialize()
		return nil
	case proto.Message:
		return proto.Unmarshal(data.Materialize(), v)
	}
	return fmt.Errorf("rawCodec: %T", v)
}

func (rawCodec) Name() string { return "proto" }

// countingPool counts the buffers that were taken and not given back.
type countingPool struct {
	mem.BufferPool
	// abandoned says that grpc-go may keep some: it does not give back what has
	// arrived of a call and nobody has read when the call ends.
	abandoned bool

	taken atomic.Int64
	out   atomic.Int64
}

func newCountingPool() *countingPool {
	return &countingPool{BufferPool: mem.DefaultBufferPool()}
}

func (p *countingPool) Get(n int) *[]byte {
	p.taken.Add(1)
	p.out.Add(1)
	return p.BufferPool.Get(n)
}

func (p *countingPool) Put(b *[]byte) {
	p.out.Add(-1)
	p.BufferPool.Put(b)
}

func (p *countingPool) check(t *testing.T) {
	t.Helper()
	if !p.abandoned && !until(func() bool { return p.out.Load() == 0 }) {
		t.Errorf("%d of %d buffers were not given back", p.out.Load(), p.taken.Load())
	}
}

// locked is a writer that many may use.
type locked struct {
	mu sync.Mutex
	w  io.Writer
}

func (l *locked) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.w.Write(p)
}

// until waits for something that other goroutines bring about. It is false if
// that does not come in ten seconds.
func until(ok func() bool) bool {
	timeout := time.NewTimer(10 * time.Second)
	defer timeout.Stop()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for !ok() {
		select {
		case <-tick.C:
		case <-timeout.C:
			return false
		}
	}
	return true
}

func (g *gate) eventually(what string, ok func() bool) {
	g.t.Helper()
	if !until(ok) {
		g.t.Fatalf("this did not come about: %s", what)
	}
}

// ctx is a context for calls that should come to an end by themselves.
func ctx(t testing.TB) context.Context {
	c, cancel := context.WithTimeout(context.Background(), time.Minute)
	t.Cleanup(cancel)
	return c
}

// reasonOf is the code and the reason of an error, such as
// "ResourceExhausted MESSAGE_TOO_LARGE"; without a reason, the code alone.
func reasonOf(err error) string {
	s := status.Convert(err)
	out := s.Code().String()
	for _, d := range s.Details() {
		if info, ok := d.(*errdetails.ErrorInfo); ok && info.GetDomain() == interceptors.Domain {
			out += " " + info.GetReason()
		}
	}
	return out
}

func expect(t testing.TB, what string, err error, want string) {
	t.Helper()
	if got := reasonOf(err); got != want {
		t.Errorf("%s: got %s (%v), want %s", what, got, err, want)
	}
}

// ask is an inference with a prompt.
func ask(name, id, prompt string, edits ...func(*inference.ModelInferRequest)) *inference.ModelInferRequest {
	r := &inference.ModelInferRequest{
		ModelName: name, Id: id,
		Inputs: []*inference.ModelInferRequest_InferInputTensor{{
			Name: "text_input", Datatype: "BYTES", Shape: []int64{1},
			Contents: &inference.InferTensorContents{BytesContents: [][]byte{[]byte(prompt)}},
		}},
	}
	for _, e := range edits {
		e(r)
	}
	return r
}

func number(name string, v int64) func(*inference.ModelInferRequest) {
	return parameter(name, &inference.InferParameter{ParameterChoice: &inference.InferParameter_Int64Param{Int64Param: v}})
}

func parameter(name string, p *inference.InferParameter) func(*inference.ModelInferRequest) {
	return func(r *inference.ModelInferRequest) {
		if r.Parameters == nil {
			r.Parameters = make(map[string]*inference.InferParameter)
		}
		r.Parameters[name] = p
	}
}

// answer to an inference, for scripts.
func reply(name, id, text string) *inference.ModelInferResponse {
	raw := append([]byte{byte(len(text)), byte(len(text) >> 8), byte(len(text) >> 16), 0}, text...)
	return &inference.ModelInferResponse{
		ModelName: name, Id: id,
		Outputs: []*inference.ModelInferResponse_InferOutputTensor{{
			Name: "text_output", Datatype: "BYTES", Shape: []int64{1}}},
		RawOutputContents: [][]byte{raw},
	}
}

func chunk(name, id, text string) *inference.ModelStreamInferResponse {
	return &inference.ModelStreamInferResponse{InferResponse: reply(name, id, text)}
}

func words(n int) string { return strings.Join(slices.Repeat([]string{"word"}, n), " ") }

// drain reads a stream to its end, and counts its messages.
func drainStream(s inference.GRPCInferenceService_ModelStreamInferClient) (n int, err error) {
	for {
		if _, err := s.Recv(); errors.Is(err, io.EOF) {
			return n, nil
		} else if err != nil {
			return n, err
		}
		n++
	}
}

func quietOptions() config.Options {
	return config.Options{Logger: slog.New(slog.DiscardHandler)}
}
