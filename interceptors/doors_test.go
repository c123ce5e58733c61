package interceptors

import (
	"context"
	"errors"
	"io"
	"net"
	"strings"
	"testing"

	"github.com/sluicegate/sluice/interceptors/dialect"
	"github.com/sluicegate/sluice/proto/gen/inference"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protodesc"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/descriptorpb"
)

const (
	serverStream1 = "/inference.GRPCInferenceService/Tell" // one request, many responses
	clientStream1 = "/inference.GRPCInferenceService/Take" // many requests, one response
)

// model is a model server that does as it is told.
type model struct {
	unary  func(context.Context, *inference.ModelInferRequest) (*inference.ModelInferResponse, error)
	stream func(grpc.ServerStream) error
}

var modelDesc = grpc.ServiceDesc{
	ServiceName: "inference.GRPCInferenceService",
	HandlerType: (*any)(nil),
	Methods: []grpc.MethodDesc{{MethodName: "ModelInfer", Handler: func(srv any, ctx context.Context, dec func(any) error, ic grpc.UnaryServerInterceptor) (any, error) {
		in := new(inference.ModelInferRequest)
		if err := dec(in); err != nil {
			return nil, err
		}
		h := func(ctx context.Context, req any) (any, error) {
			return srv.(*model).unary(ctx, req.(*inference.ModelInferRequest))
		}
		if ic == nil {
			return h(ctx, in)
		}
		return ic(ctx, in, &grpc.UnaryServerInfo{Server: srv, FullMethod: modelInfer}, h)
	}}},
	Streams: []grpc.StreamDesc{
		{StreamName: "ModelStreamInfer", ClientStreams: true, ServerStreams: true, Handler: streamHandler},
		{StreamName: "Tell", ServerStreams: true, Handler: streamHandler},
		{StreamName: "Take", ClientStreams: true, Handler: streamHandler},
	},
}

func streamHandler(srv any, ss grpc.ServerStream) error { return srv.(*model).stream(ss) }

// guarded is a connection to a model server behind the grpc-go server door.
func guarded(t *testing.T, c *Chain, m *model) *grpc.ClientConn {
	t.Helper()
	return connect(t, m,
		[]grpc.ServerOption{grpc.InTapHandle(Tap(c)), grpc.ChainUnaryInterceptor(UnaryServer(c)), grpc.ChainStreamInterceptor(StreamServer(c))})
}

// guarding is a connection, behind the client door, to a model server that has none.
func guarding(t *testing.T, c *Chain, m *model) *grpc.ClientConn {
	t.Helper()
	return connect(t, m, nil, grpc.WithUnaryInterceptor(UnaryClient(c)), grpc.WithStreamInterceptor(StreamClient(c)))
}

func connect(t *testing.T, m *model, server []grpc.ServerOption, client ...grpc.DialOption) *grpc.ClientConn {
	t.Helper()
	l := bufconn.Listen(1 << 16)
	s := grpc.NewServer(server...)
	s.RegisterService(&modelDesc, m)
	served := make(chan struct{})
	go func() { defer close(served); _ = s.Serve(l) }()
	conn, err := grpc.NewClient("passthrough:///bufconn", append(client,
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return l.DialContext(ctx) }),
		grpc.WithTransportCredentials(insecure.NewCredentials()))...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		conn.Close()
		s.Stop()
		<-served
	})
	return conn
}

// talk is the caller's end of a stream.
type talk struct {
	t *testing.T
	grpc.ClientStream
	cancel context.CancelFunc
}

func open(t *testing.T, conn *grpc.ClientConn, method string, desc *grpc.StreamDesc) *talk {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	t.Cleanup(cancel)
	return openWith(t, ctx, cancel, conn, method, desc)
}

func openWith(t *testing.T, ctx context.Context, cancel context.CancelFunc, conn *grpc.ClientConn, method string, desc *grpc.StreamDesc) *talk {
	t.Helper()
	cs, err := conn.NewStream(ctx, desc, method)
	if err != nil {
		t.Fatal(err)
	}
	return &talk{t, cs, cancel}
}

var bidi = &grpc.StreamDesc{ClientStreams: true, ServerStreams: true}

func (s *talk) send(m proto.Message) {
	s.t.Helper()
	if err := s.SendMsg(m); err != nil {
		s.t.Fatalf("send: %v", err)
	}
}

// receive is the next response as text: "id text", "id end" for one without
// text, with "!" before it if it is final; an error in band is "id ERROR text".
// The end of the stream is its error.
func (s *talk) receive() (string, error) {
	m := new(inference.ModelStreamInferResponse)
	if err := s.RecvMsg(m); err != nil {
		return "", err
	}
	r := m.GetInferResponse()
	out := r.GetId() + " "
	if r.GetParameters()["triton_final_response"].GetBoolParam() {
		out = "!" + out
	}
	switch {
	case m.ErrorMessage != "":
		return out + "ERROR " + m.ErrorMessage, nil
	case len(r.GetOutputs()) == 0:
		return out + "end", nil
	}
	return out + string(r.GetOutputs()[0].GetContents().GetBytesContents()[0]), nil
}

// expect checks the next responses, and the end: an error's text, "EOF" or
// nothing for a stream that goes on.
func (s *talk) expect(want ...string) {
	s.t.Helper()
	for _, w := range want {
		got, err := s.receive()
		if errors.Is(err, io.EOF) {
			got = "EOF"
		} else if err != nil {
			got = err.Error()
		}
		if got != w && !(strings.HasSuffix(w, "...") && strings.HasPrefix(got, strings.TrimSuffix(w, "..."))) {
			s.t.Fatalf("received %q, want %q", got, w)
		}
	}
}

func (s *talk) halfClose() {
	s.t.Helper()
	if err := s.CloseSend(); err != nil {
		s.t.Fatal(err)
	}
}

// take receives a request in the handler.
func take(t *testing.T, ss grpc.ServerStream) *inference.ModelInferRequest {
	t.Helper()
	m := new(inference.ModelInferRequest)
	if err := ss.RecvMsg(m); err != nil {
		t.Errorf("the handler received %v", err)
	}
	return m
}

// words answers each request with its words, one a message, and then ends it
// with an empty response if that was asked for.
func words(ss grpc.ServerStream) error {
	for {
		m := new(inference.ModelInferRequest)
		if err := ss.RecvMsg(m); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return err
		}
		for _, w := range strings.Fields(string(m.Inputs[0].Contents.BytesContents[0])) {
			if err := ss.SendMsg(chunk(m.Id, false, w)); err != nil {
				return err
			}
		}
		if m.Parameters["triton_enable_empty_final_response"].GetBoolParam() {
			if err := ss.SendMsg(chunk(m.Id, true)); err != nil {
				return err
			}
		}
	}
}

// oracle is a back end of the dialect with roles: the messages of the Open
// Inference Protocol, in methods that it does not have.
func oracle(t testing.TB) *Backend {
	t.Helper()
	set := new(descriptorpb.FileDescriptorSet)
	seen := make(map[string]bool)
	var add func(protoreflect.FileDescriptor)
	add = func(f protoreflect.FileDescriptor) {
		if seen[f.Path()] {
			return
		}
		seen[f.Path()] = true
		for n := range f.Imports().Len() {
			add(f.Imports().Get(n).FileDescriptor)
		}
		set.File = append(set.File, protodesc.ToFileDescriptorProto(f))
	}
	add(inference.File_inference_inference_proto)
	f := set.File[len(set.File)-1]
	method := func(name string, client, server bool) *descriptorpb.MethodDescriptorProto {
		return &descriptorpb.MethodDescriptorProto{Name: &name, ClientStreaming: &client, ServerStreaming: &server,
			InputType: proto.String(".inference.ModelInferRequest"), OutputType: proto.String(".inference.ModelInferResponse")}
	}
	f.Service[0].Method = []*descriptorpb.MethodDescriptorProto{method("Tell", false, true), method("Take", true, false)}
	return backend(t, "oracle", func(o dialect.Options) (*dialect.Dialect, error) { return dialect.Fields(set, o) })
}

func codeIs(t *testing.T, err error, code codes.Code, reason Reason) {
	t.Helper()
	if status.Code(err) != code || (reason != "" && !strings.HasPrefix(status.Convert(err).Message(), string(reason)+":")) {
		t.Errorf("got %v, want %v %s", err, code, reason)
	}
}
