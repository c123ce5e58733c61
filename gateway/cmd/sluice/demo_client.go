package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/propagation"
	"go.opentelemetry.io/otel/trace"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/sluicegate/sluice/interceptors"
	"github.com/sluicegate/sluice/interceptors/identity"
	"github.com/sluicegate/sluice/proto/gen/inference"
	configv1 "github.com/sluicegate/sluice/proto/gen/sluice/config/v1"
)

// client is one caller's connection.
type client struct {
	name string
	conn *grpc.ClientConn
	inference.GRPCInferenceServiceClient
}

// result is what became of one inference, as its caller saw it.
type result struct {
	code    codes.Code
	reason  interceptors.Reason
	message string
	text    string
	words   int           // messages with output
	retry   time.Duration // RetryInfo or its like in a stream
	first   time.Duration // until the first output
	took    time.Duration
	span    trace.SpanContext // the caller's
	in, out int64             // tokens, as the gateway counted them; -1 if it did not
}

func (d *demo) startClients() error {
	d.clients = make(map[string]*client)
	expected := spiffeid.RequireFromString("spiffe://sluice.dev/gateway")
	for _, name := range []string{"alice", "bob", "mallory"} {
		source, err := identity.Open(context.Background(), &configv1.Identity{Source: &configv1.Identity_Files{Files: &configv1.IdentityFiles{
			Certificate: d.file(name + ".pem"), Key: d.file(name + "-key.pem"), Bundle: d.file("bundle.pem"),
		}}}, nil)
		if err != nil {
			return err
		}
		d.onClose(func() { _ = source.Close() })
		if err := d.dial(name, d.address, identity.ClientCredentials(source, spiffeid.MatchID(expected), nil)); err != nil {
			return err
		}
		if name == "alice" { // who tries to go around the gateway
			around := identity.ClientCredentials(source, spiffeid.MatchMemberOf(source.TrustDomain()), nil)
			if err := d.dial("around", d.modelAt, around); err != nil {
				return err
			}
		}
	}
	pem, err := os.ReadFile(d.file("bundle.pem"))
	if err != nil {
		return err
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(pem)
	d.nobody = &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS13, NextProtos: []string{"h2"}}
	return d.dial("nobody", d.address, credentials.NewTLS(d.nobody))
}

func (d *demo) dial(name, address string, creds credentials.TransportCredentials) error {
	conn, err := grpc.NewClient(address, grpc.WithTransportCredentials(creds), grpc.WithDisableRetry())
	if err != nil {
		return err
	}
	d.onClose(func() { _ = conn.Close() })
	d.clients[name] = &client{name, conn, inference.NewGRPCInferenceServiceClient(conn)}
	return nil
}

// call makes a call with a span of its own, which its metadata carries.
func (d *demo) call(ctx context.Context, method string, do func(context.Context) error) (result, error) {
	ctx, span := d.tracer.Tracer("demo").Start(ctx, method, trace.WithSpanKind(trace.SpanKindClient))
	carried := propagation.MapCarrier{}
	propagation.TraceContext{}.Inject(ctx, carried)
	for k, v := range carried {
		ctx = metadata.AppendToOutgoingContext(ctx, k, v)
	}
	began := time.Now()
	err := do(ctx)
	r := result{took: time.Since(began), span: span.SpanContext(), in: -1, out: -1}
	span.End()
	r.status(err)
	return r, err
}

// status reads an error as any client can.
func (r *result) status(err error) {
	s := status.Convert(err)
	r.code, r.message = s.Code(), s.Message()
	for _, detail := range s.Details() {
		switch d := detail.(type) {
		case *errdetails.ErrorInfo:
			r.reason = interceptors.Reason(d.GetReason())
		case *errdetails.RetryInfo:
			r.retry = d.GetRetryDelay().AsDuration()
		}
	}
}

// infer makes a unary inference.
func (d *demo) infer(ctx context.Context, who string, req *inference.ModelInferRequest) result {
	d.remember(req)
	var resp *inference.ModelInferResponse
	r, err := d.call(ctx, "ModelInfer", func(ctx context.Context) (err error) {
		resp, err = d.clients[who].ModelInfer(ctx, req)
		return err
	})
	if err == nil {
		r.text, r.words, r.first = textOf(resp), 1, r.took
	}
	return r
}

// raw sends bytes in place of a ModelInferRequest.
func (d *demo) raw(ctx context.Context, who string, message []byte) result {
	r, _ := d.call(ctx, "ModelInfer", func(ctx context.Context) error {
		var resp []byte
		return d.clients[who].conn.Invoke(ctx, inference.GRPCInferenceService_ModelInfer_FullMethodName,
			message, &resp, rawMessages)
	})
	return r
}

var rawMessages = grpc.ForceCodecV2(bytesCodec{})

// bytesCodec sends and receives messages as they are.
type bytesCodec struct{}

func (bytesCodec) Marshal(v any) (mem.BufferSlice, error) {
	return mem.BufferSlice{mem.SliceBuffer(v.([]byte))}, nil
}

func (bytesCodec) Unmarshal(data mem.BufferSlice, v any) error {
	*v.(*[]byte) = data.Materialize()
	return nil
}

func (bytesCodec) Name() string { return "proto" }

// stream makes inferences on one stream, all at once. The results are in the
// order of the requests; the span is that of the whole call.
func (d *demo) stream(ctx context.Context, who string, reqs ...*inference.ModelInferRequest) []result {
	results := make([]result, len(reqs))
	index := make(map[string]int, len(reqs))
	for n, req := range reqs {
		d.remember(req)
		index[req.GetId()] = n
	}
	began := time.Now()
	whole, err := d.call(ctx, "ModelStreamInfer", func(ctx context.Context) error {
		s, err := d.clients[who].ModelStreamInfer(ctx)
		if err != nil {
			return err
		}
		for _, req := range reqs {
			if err := s.Send(req); err != nil {
				break // Recv says why
			}
		}
		if err := s.CloseSend(); err != nil {
			return err
		}
		for {
			m, err := s.Recv()
			if errors.Is(err, io.EOF) {
				return nil
			}
			if err != nil {
				return err
			}
			n, ok := index[m.GetInferResponse().GetId()]
			if !ok {
				return fmt.Errorf("an answer to an inference that nobody asked for: %q", m.GetInferResponse().GetId())
			}
			results[n].take(m, time.Since(began))
		}
	})
	for n := range results {
		r := &results[n]
		r.span, r.in, r.out = whole.span, -1, -1
		if err != nil && r.code == codes.OK {
			r.status(err)
			r.took = whole.took
		}
	}
	return results
}

// take takes one message of a stream.
func (r *result) take(m *inference.ModelStreamInferResponse, at time.Duration) {
	r.took = at
	resp := m.GetInferResponse()
	if m.GetErrorMessage() != "" {
		p := resp.GetParameters()
		r.code, r.message = codes.Unknown, m.GetErrorMessage()
		if name := p["sluice_code"].GetStringParam(); name != "" {
			_ = r.code.UnmarshalJSON([]byte(`"` + name + `"`))
		}
		r.reason = interceptors.Reason(p["sluice_reason"].GetStringParam())
		r.retry = time.Duration(p["sluice_retry_after_ms"].GetInt64Param()) * time.Millisecond
		return
	}
	if text := textOf(resp); text != "" {
		if r.words++; r.words == 1 {
			r.first = at
		}
		r.text += text
	}
}

// measured adds what the gateway's spans say of the inferences of one call, in
// order of their ids' appearance. It waits for the gateway to end its span.
func (d *demo) measured(ctx context.Context, ids []string, results ...*result) {
	rpc := d.collector.await(ctx, results[0].span.SpanID(), "gateway")
	if rpc == nil {
		return
	}
	for _, s := range d.collector.children(rpc.SpanContext().SpanID(), "gateway") {
		var id string
		in, out := int64(-1), int64(-1)
		for _, a := range s.Attributes() {
			switch a.Key {
			case attribute.Key("sluice.inference.id"):
				id = a.Value.AsString()
			case "gen_ai.usage.input_tokens":
				in = a.Value.AsInt64()
			case "gen_ai.usage.output_tokens":
				out = a.Value.AsInt64()
			}
		}
		for n, r := range results {
			if n < len(ids) && ids[n] == id {
				r.in, r.out = in, out
			}
		}
	}
}

// remember notes the prompts that were sent.
func (d *demo) remember(req *inference.ModelInferRequest) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, in := range req.GetInputs() {
		for _, b := range in.GetContents().GetBytesContents() {
			d.sent = append(d.sent, string(b))
		}
	}
}

// textOf is the text of a raw text_output.
func textOf(r *inference.ModelInferResponse) string {
	for n, o := range r.GetOutputs() {
		if o.GetName() != "text_output" || n >= len(r.GetRawOutputContents()) {
			continue
		}
		var text strings.Builder
		for b := r.GetRawOutputContents()[n]; len(b) >= 4; {
			size := min(uint32(len(b)-4), binary.LittleEndian.Uint32(b))
			text.Write(b[4 : 4+size])
			b = b[4+size:]
		}
		return text.String()
	}
	return ""
}

// prompt makes a request with a typed text_input.
func prompt(model, text string, change ...func(*inference.ModelInferRequest)) *inference.ModelInferRequest {
	r := &inference.ModelInferRequest{
		ModelName: model,
		Inputs: []*inference.ModelInferRequest_InferInputTensor{{
			Name: "text_input", Datatype: "BYTES", Shape: []int64{1},
			Contents: &inference.InferTensorContents{BytesContents: [][]byte{[]byte(text)}},
		}},
		Parameters: make(map[string]*inference.InferParameter),
	}
	for _, c := range change {
		c(r)
	}
	return r
}

func withID(id string) func(*inference.ModelInferRequest) {
	return func(r *inference.ModelInferRequest) { r.Id = id }
}

func withDelay(d time.Duration) func(*inference.ModelInferRequest) {
	return func(r *inference.ModelInferRequest) {
		r.Parameters["delay_ms"] = &inference.InferParameter{
			ParameterChoice: &inference.InferParameter_Int64Param{Int64Param: d.Milliseconds()},
		}
	}
}

func withParameter(key, text string) func(*inference.ModelInferRequest) {
	return func(r *inference.ModelInferRequest) {
		r.Parameters[key] = &inference.InferParameter{
			ParameterChoice: &inference.InferParameter_StringParam{StringParam: text},
		}
	}
}

// inRaw moves the tensor into raw_input_contents, where tritonclient writes it.
func inRaw(r *inference.ModelInferRequest) {
	text := r.Inputs[0].Contents.BytesContents[0]
	r.Inputs[0].Contents = nil
	r.RawInputContents = [][]byte{append(binary.LittleEndian.AppendUint32(nil, uint32(len(text))), text...)}
}
