package gateway

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"go.opentelemetry.io/otel/propagation"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/encoding/gzip"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/sluicegate/sluice/interceptors"
	"github.com/sluicegate/sluice/interceptors/config"
	"github.com/sluicegate/sluice/interceptors/dialect"
	"github.com/sluicegate/sluice/interceptors/telemetry"
	"github.com/sluicegate/sluice/proto/gen/inference"
)

// kinds are a unary call and a stream with one message, as the same thing.
var kinds = map[string]func(context.Context, inference.GRPCInferenceServiceClient) (header, trailer metadata.MD, err error){
	"unary": func(ctx context.Context, c inference.GRPCInferenceServiceClient) (header, trailer metadata.MD, err error) {
		_, err = c.ModelInfer(ctx, ask("echo", "a", "hello"), grpc.Header(&header), grpc.Trailer(&trailer))
		return header, trailer, err
	},
	"stream": func(ctx context.Context, c inference.GRPCInferenceServiceClient) (header, trailer metadata.MD, err error) {
		s, err := c.ModelStreamInfer(ctx)
		if err != nil {
			return nil, nil, err
		}
		if err := s.Send(ask("echo", "a", "hello")); err != nil {
			return nil, nil, err
		}
		if err := s.CloseSend(); err != nil {
			return nil, nil, err
		}
		_, err = drainStream(s)
		header, _ = s.Header()
		return header, s.Trailer(), err
	},
}

// answerOne answers one message, whatever the method.
func answerOne(method string, ss grpc.ServerStream) error {
	var req []byte
	if err := ss.RecvMsg(&req); err != nil {
		return err
	}
	if method == modelStreamInfer {
		return ss.SendMsg(chunk("echo", "a", "hello"))
	}
	return ss.SendMsg(reply("echo", "a", "hello"))
}

func TestMetadataPassesOn(t *testing.T) {
	for kind, call := range kinds {
		t.Run(kind, func(t *testing.T) {
			var seen metadata.MD
			g := open(t, base, script(t, func(method string, ss grpc.ServerStream) error {
				seen, _ = metadata.FromIncomingContext(ss.Context())
				_ = ss.SetHeader(metadata.Pairs("h", "1", "h", "2", "h-bin", "\x00\xff"))
				ss.SetTrailer(metadata.Pairs("t", "1", "t", "2", "t-bin", "\xfe\x00"))
				return answerOne(method, ss)
			}))
			out := metadata.NewOutgoingContext(ctx(t), metadata.Pairs("k", "1", "k", "2", "k-bin", "\x00\x01\xff", "empty", ""))
			header, trailer, err := call(out, g.client(grpc.WithUserAgent("caller")))
			if err != nil {
				t.Fatal(err)
			}
			for what, got := range map[string][2][]string{
				"request":          {seen["k"], {"1", "2"}},
				"binary request":   {seen["k-bin"], {"\x00\x01\xff"}},
				"empty request":    {seen["empty"], {""}},
				"header":           {header["h"], {"1", "2"}},
				"binary header":    {header["h-bin"], {"\x00\xff"}},
				"trailer":          {trailer["t"], {"1", "2"}},
				"binary trailer":   {trailer["t-bin"], {"\xfe\x00"}},
				"encodings":        {seen["grpc-accept-encoding"], {"gzip"}},
				"nothing invented": {slices.Sorted(maps.Keys(seen)), {":authority", "content-type", "empty", "grpc-accept-encoding", "k", "k-bin", "user-agent"}},
			} {
				if !slices.Equal(got[0], got[1]) {
					t.Errorf("%s: got %q, want %q", what, got[0], got[1])
				}
			}
			if ua := seen["user-agent"]; len(ua) != 1 || !strings.HasPrefix(ua[0], "sluice ") {
				t.Errorf("user-agent %q is not ours", ua)
			}
		})
	}
}

func TestDeadlinePassesOn(t *testing.T) {
	for kind, call := range kinds {
		t.Run(kind, func(t *testing.T) {
			var deadline time.Time
			var ok bool
			g := open(t, base, script(t, func(method string, ss grpc.ServerStream) error {
				deadline, ok = ss.Context().Deadline()
				return answerOne(method, ss)
			}))
			c := g.client()
			if _, _, err := call(context.Background(), c); err != nil || ok {
				t.Errorf("without a deadline: error %v, deadline %v", err, ok)
			}
			with, cancel := context.WithTimeout(context.Background(), time.Hour)
			defer cancel()
			end, _ := with.Deadline()
			if _, _, err := call(with, c); err != nil || !ok {
				t.Fatalf("with a deadline: error %v, deadline %v", err, ok)
			}
			// It is sent as a time left, so that each hop may round it up by its unit.
			if late := deadline.Sub(end); late > 5*time.Second || late < -time.Minute {
				t.Errorf("the deadline is %v later than the caller's", late)
			}
		})
	}
}

func TestDeadlineEndsACall(t *testing.T) {
	for kind, call := range kinds {
		t.Run(kind, func(t *testing.T) {
			gone := make(chan error, 1)
			g := open(t, base+"pools: [{name: gpu, capacity: 1, models: [{model: echo}]}]", script(t, func(_ string, ss grpc.ServerStream) error {
				<-ss.Context().Done()
				gone <- ss.Context().Err()
				return nil
			}))
			short, cancel := context.WithTimeout(context.Background(), 100*time.Millisecond)
			defer cancel()
			_, _, err := call(short, g.client())
			expect(t, "the call", err, "DeadlineExceeded")
			if err := <-gone; err == nil {
				t.Error("the model server was not told")
			}
		})
	}
}

func TestHeadersArriveBeforeMessages(t *testing.T) {
	for name, md := range map[string]metadata.MD{"with metadata": metadata.Pairs("h", "1"), "bare": nil} {
		t.Run(name, func(t *testing.T) {
			goOn := make(chan struct{})
			g := open(t, base, script(t, func(method string, ss grpc.ServerStream) error {
				if err := ss.SendHeader(md); err != nil {
					return err
				}
				<-goOn
				return answerOne(method, ss)
			}))
			s, err := g.client().ModelStreamInfer(ctx(t))
			if err != nil {
				t.Fatal(err)
			}
			if err := s.Send(ask("echo", "a", "hello")); err != nil {
				t.Fatal(err)
			}
			header, err := s.Header() // blocks for ever if they wait for the message
			if err != nil || !slices.Equal(header["h"], md["h"]) {
				t.Errorf("got %v, %v", header, err)
			}
			close(goOn)
			if n, err := drainStream(s); n != 1 || err != nil {
				t.Errorf("got %d messages, %v", n, err)
			}
		})
	}
}

func TestStatusPassesUnchanged(t *testing.T) {
	full, err := status.New(codes.NotFound, "no such thing: ü % \n").WithDetails(
		&errdetails.ErrorInfo{Reason: "R", Domain: "model.example", Metadata: map[string]string{"a": "b"}},
		&errdetails.DebugInfo{Detail: "d"})
	if err != nil {
		t.Fatal(err)
	}
	after := func(send bool, s *status.Status) func(string, grpc.ServerStream) error {
		return func(method string, ss grpc.ServerStream) error {
			ss.SetTrailer(metadata.Pairs("t", "1", "grpc-retry-pushback-ms", "7"))
			if send && method == modelStreamInfer {
				if err := answerOne(method, ss); err != nil {
					return err
				}
			} else if send {
				_ = ss.SendHeader(nil)
			}
			return s.Err()
		}
	}
	plain := func(c codes.Code) *status.Status { return status.New(c, "because") }
	for name, tc := range map[string]struct {
		script func(string, grpc.ServerStream) error
		masked bool
		want   *status.Status
	}{
		"at once":                 {script: after(false, full), want: full},
		"after headers":           {script: after(true, full), want: full},
		"the server's cancelled":  {script: after(false, plain(codes.Canceled)), want: plain(codes.Canceled)},
		"the server's deadline":   {script: after(false, plain(codes.DeadlineExceeded)), want: plain(codes.DeadlineExceeded)},
		"the server's overload":   {script: after(true, plain(codes.ResourceExhausted)), want: plain(codes.ResourceExhausted)},
		"the server's own outage": {script: after(true, plain(codes.Unavailable)), want: plain(codes.Unavailable)},
		"like the transport's":    {script: after(false, status.New(codes.Unavailable, "connection to the GPU lost")), want: status.New(codes.Unavailable, "connection to the GPU lost")},
		"like it, after headers":  {script: after(true, status.New(codes.Unavailable, "connection to the GPU lost")), want: status.New(codes.Unavailable, "connection to the GPU lost")},
		"a code of its own":       {script: after(false, plain(codes.Code(99))), want: plain(codes.Code(99))},
		"masked":                  {script: after(false, full), masked: true, want: status.New(codes.NotFound, "the model server reported an error")},
		"masked, cancelled":       {script: after(false, plain(codes.Canceled)), masked: true, want: status.New(codes.Canceled, "the model server reported an error")},
	} {
		for kind, call := range kinds {
			t.Run(name+"/"+kind, func(t *testing.T) {
				text := base
				if tc.masked {
					text = strings.Replace(base, "plaintext: true", "plaintext: true, mask_errors: true", 1)
				}
				g := open(t, text, script(t, tc.script))
				_, trailer, err := call(ctx(t), g.client())
				if got := status.Convert(err); !proto.Equal(got.Proto(), tc.want.Proto()) {
					t.Errorf("got  %v\nwant %v", got.Proto(), tc.want.Proto())
				}
				if !slices.Equal(trailer["t"], []string{"1"}) || !slices.Equal(trailer["grpc-retry-pushback-ms"], []string{"7"}) {
					t.Errorf("trailer %v", trailer)
				}
			})
		}
	}
}

// Headers that say who a caller is, in the spellings that servers take for the
// same, written down here apart from the list that is under test.
var spoofs = []string{
	"x-forwarded-client-cert", "x-forwarded-for", "forwarded", "x-real-ip", "x-envoy-original-path", "x-envoy-peer-metadata",
	"x-spiffe-id", "x-tenant", "x-tenant-id", "x-principal", "x-client-cert", "x-remote-user", "x-remote-group",
	"impersonate-user", "x-auth-request-user", "ssl-client-verify", "x-ssl-cert", "l5d-client-id", "l5d-dst-override",
	"triton-grpc-protocol-x", "triton-grpc-protocol-shared-memory", "x-sluice-principal", "x-gateway-destination-endpoint",
}

func TestIdentityHeadersNeverPass(t *testing.T) {
	var seen metadata.MD
	g := open(t, base, script(t, func(method string, ss grpc.ServerStream) error {
		seen, _ = metadata.FromIncomingContext(ss.Context())
		return answerOne(method, ss)
	}))
	c := g.client()
	r := rand.New(rand.NewPCG(1, 2))
	respell := func(key string) string {
		b := []byte(key)
		for n, c := range b {
			switch {
			case c == '-':
				b[n] = "-_."[r.IntN(3)]
			case r.IntN(2) == 0:
				b[n] = strings.ToUpper(string(c))[0]
			}
		}
		return string(b)
	}
	canonical := strings.NewReplacer("_", "-", ".", "-")
	for round := range 50 {
		var pairs []string
		for _, key := range spoofs {
			key = respell(key)
			if r.IntN(4) == 0 {
				key += "-bin"
			}
			pairs = append(pairs, key, "spoof")
		}
		pairs = append(pairs, "honest", "yes", "x-request-id", "1")
		for kind, call := range kinds {
			if _, _, err := call(metadata.AppendToOutgoingContext(ctx(t), pairs...), c); err != nil {
				t.Fatal(err)
			}
			for key, values := range seen {
				if slices.Contains(values, "spoof") {
					t.Errorf("round %d, %s: %s reached the model server", round, kind, key)
				}
				for _, spoof := range spoofs {
					if strings.TrimSuffix(canonical.Replace(strings.ToLower(key)), "-bin") == spoof {
						t.Errorf("round %d, %s: %s reached the model server", round, kind, key)
					}
				}
			}
			if seen.Get("honest") == nil || seen.Get("x-request-id") == nil {
				t.Errorf("round %d, %s: an honest header is gone: %v", round, kind, seen)
			}
		}
	}
}

func TestTraceContextIsReplaced(t *testing.T) {
	const trace = "0af7651916cd43dd8448eb211c80319c"
	for kind, call := range kinds {
		t.Run(kind, func(t *testing.T) {
			var seen metadata.MD
			provider := sdktrace.NewTracerProvider()
			defer func() { _ = provider.Shutdown(context.Background()) }()
			g := openWith(t, base, config.Options{Telemetry: []telemetry.Option{
				telemetry.WithTracerProvider(provider), telemetry.WithPropagator(propagation.TraceContext{})}},
				script(t, func(method string, ss grpc.ServerStream) error {
					seen, _ = metadata.FromIncomingContext(ss.Context())
					return answerOne(method, ss)
				}))
			out := metadata.AppendToOutgoingContext(ctx(t), "traceparent", "00-"+trace+"-b7ad6b7169203331-01")
			if _, _, err := call(out, g.client()); err != nil {
				t.Fatal(err)
			}
			got := seen["traceparent"]
			if len(got) != 1 || !strings.Contains(got[0], trace) || strings.Contains(got[0], "b7ad6b7169203331") {
				t.Errorf("the model server got %q, want one of the same trace and a span of ours", got)
			}
		})
	}
}

// What is forwarded is what came, to the byte, in both directions. The stream's
// messages have an id of their own and ask for a visible end, so that there is
// nothing to add to them, and each answer is final, so that the id is free again.
func TestMessagesAreByteIdentical(t *testing.T) {
	r := rand.New(rand.NewPCG(3, 4))
	random := func(n int) []byte {
		b := make([]byte, n)
		for i := range b {
			b[i] = byte(r.Uint32())
		}
		return b
	}
	tensor := func(n int) (req, resp []byte) {
		data := random(n)
		q, err := proto.Marshal(&inference.ModelInferRequest{ModelName: "echo", Id: "a",
			Parameters: map[string]*inference.InferParameter{"triton_enable_empty_final_response": {
				ParameterChoice: &inference.InferParameter_BoolParam{BoolParam: true}}},
			Inputs:           []*inference.ModelInferRequest_InferInputTensor{{Name: "x", Datatype: "UINT8", Shape: []int64{int64(n)}}},
			RawInputContents: [][]byte{data}})
		if err != nil {
			t.Fatal(err)
		}
		p, err := proto.Marshal(&inference.ModelInferResponse{ModelName: "echo", Id: "a",
			Parameters: map[string]*inference.InferParameter{"triton_final_response": {
				ParameterChoice: &inference.InferParameter_BoolParam{BoolParam: true}}},
			Outputs:           []*inference.ModelInferResponse_InferOutputTensor{{Name: "y", Datatype: "UINT8", Shape: []int64{int64(n)}}},
			RawOutputContents: [][]byte{data}})
		if err != nil {
			t.Fatal(err)
		}
		return q, p
	}
	for _, size := range []int{0, 1, 16<<10 - 3, 16 << 10, 70_000, 1<<20 + 1, 8 << 20} {
		req, resp := tensor(size)
		stream := append([]byte{0x12}, appendVarint(nil, uint64(len(resp)))...) // infer_response, field 2
		stream = append(stream, resp...)
		for _, compressed := range []bool{false, true} {
			if compressed && size > 2<<20 {
				continue // compression is slow, and nothing else happens to it
			}
			t.Run(fmt.Sprintf("%d bytes, gzip %v", size, compressed), func(t *testing.T) {
				got := make(chan []byte, 4)
				g := open(t, base, script(t, func(method string, ss grpc.ServerStream) error {
					for {
						var b []byte
						if err := ss.RecvMsg(&b); err != nil {
							return nil
						}
						got <- b
						answer := resp
						if method == modelStreamInfer {
							answer = stream
						}
						if err := ss.SendMsg(answer); err != nil {
							return err
						}
						if method != modelStreamInfer {
							return nil
						}
					}
				}))
				o := []grpc.CallOption{grpc.ForceCodecV2(rawCodec{}), grpc.MaxCallRecvMsgSize(1 << 30)}
				if compressed {
					o = append(o, grpc.UseCompressor(gzip.Name))
				}
				conn := g.dial()
				var back []byte
				if err := conn.Invoke(ctx(t), modelInfer, req, &back, o...); err != nil {
					t.Fatal(err)
				}
				if !bytes.Equal(<-got, req) || !bytes.Equal(back, resp) {
					t.Error("unary: a message changed on the way")
				}
				s, err := conn.NewStream(ctx(t), &grpc.StreamDesc{ClientStreams: true, ServerStreams: true}, modelStreamInfer, o...)
				if err != nil {
					t.Fatal(err)
				}
				for range 2 {
					if err := s.SendMsg(req); err != nil {
						t.Fatal(err)
					}
					if err := s.RecvMsg(&back); err != nil {
						t.Fatal(err)
					}
					if !bytes.Equal(back, stream) {
						t.Error("stream: a response changed on the way")
					}
					if b := <-got; !bytes.Equal(b, req) {
						t.Errorf("stream: a request changed on the way:\n%x\n%x", b[:min(100, len(b))], req[:min(100, len(req))])
					}
				}
				if err := s.CloseSend(); err != nil {
					t.Fatal(err)
				}
				if err := s.RecvMsg(&back); err == nil {
					t.Error("there is one message more")
				}
			})
		}
	}
}

func appendVarint(b []byte, v uint64) []byte {
	for ; v >= 0x80; v >>= 7 {
		b = append(b, byte(v)|0x80)
	}
	return append(b, byte(v))
}

// behind is a context whose deadline passed and whose timer has not fired yet.
type behind struct{ context.Context }

func (behind) Deadline() (time.Time, bool) { return time.Now().Add(-time.Millisecond), true }

// unsent takes a trailer nowhere.
type unsent struct{ grpc.ServerStream }

func (unsent) SetTrailer(metadata.MD) {}

// A model server may end a call at its deadline, with CANCELLED, a little before our own
// timer does: Triton does.
func TestAModelServerMayBeFirstToSeeTheDeadline(t *testing.T) {
	d, err := dialect.Triton(dialect.Options{})
	if err != nil {
		t.Fatal(err)
	}
	chain := interceptors.New([]*interceptors.Backend{{Name: "b", Dialect: d}})
	failed := func(ctx context.Context, code codes.Code) error {
		call, err := chain.Begin(ctx, interceptors.CallInfo{FullMethod: inference.GRPCInferenceService_ModelInfer_FullMethodName})
		if err != nil {
			t.Fatal(err)
		}
		defer call.End(nil)
		return new(upstream).failed(&forwarding{call: call, ss: unsent{}}, status.Error(code, "of the server"), nil, metadata.Pairs("x", "y"))
	}
	if err := failed(behind{t.Context()}, codes.Canceled); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("CANCELLED after the deadline: got %v", err)
	}
	if err := failed(behind{t.Context()}, codes.InvalidArgument); status.Code(err) != codes.InvalidArgument {
		t.Errorf("INVALID_ARGUMENT after the deadline: got %v", err)
	}
	long, cancel := context.WithTimeout(t.Context(), time.Hour)
	defer cancel()
	if err := failed(long, codes.Canceled); status.Code(err) != codes.Canceled {
		t.Errorf("CANCELLED before the deadline: got %v", err)
	}
}
