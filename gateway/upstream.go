package gateway

import (
	"context"
	"google.golang.org/grpc/encoding/gzip"
	"google.golang.org/grpc/experimental"
	"strings"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/encoding"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/sluicegate/sluice/interceptors"
)

// acceptGzip has model servers offered the one compression that we read.
var acceptGzip = experimental.AcceptCompressors(gzip.Name)

// upstream is a model server: one connection that all calls share. More than
// one made it slower (writes batch less).
type upstream struct {
	name       string
	conn       *grpc.ClientConn
	codec      encoding.CodecV2
	maskErrors bool
}

// failed makes an error of a call to the model server the error that the
// caller gets. The server's own status passes as it is, with its metadata; what
// grpc-go says would tell addresses and has no reason, and does not pass.
func (u *upstream) failed(call *interceptors.Call, ss grpc.ServerStream, err error, header, trailer metadata.MD) error {
	if cause := context.Cause(call.Context()); cause != nil {
		return cause // we gave it up
	}
	s := status.Convert(err)
	if ofTransport(s, header, trailer) {
		return u.lost(s)
	}
	if h := passable(header); h != nil {
		_ = ss.SetHeader(h)
	}
	passTrailer(ss, trailer)
	if u.maskErrors {
		return status.Error(s.Code(), interceptors.MaskedError)
	}
	if text := call.Unquote(s.Message()); text != s.Message() {
		p := s.Proto()
		p.Message = text
		return status.ErrorProto(p)
	}
	return err
}

// lost says what became of a call that the model server did not end itself.
func (u *upstream) lost(s *status.Status) error {
	switch text := s.Message(); {
	case s.Code() == codes.DeadlineExceeded:
		return context.DeadlineExceeded // the transport saw it first
	case s.Code() == codes.ResourceExhausted && strings.HasPrefix(text, "grpc: received message"):
		return interceptors.Deny("gateway", interceptors.MessageTooLarge, "the model server's answer is larger than the gateway takes").
			With("backend", u.name)
	case s.Code() == codes.Unavailable, s.Code() == codes.Canceled, strings.HasPrefix(text, reset):
		return interceptors.Deny("gateway", interceptors.UpstreamLost, "the model server cannot be reached, or was lost").
			With("backend", u.name)
	}
	return u.invalid("the model server does not answer as gRPC has it")
}

func (u *upstream) invalid(text string) error {
	return interceptors.Deny("gateway", interceptors.UpstreamInvalid, "%s", text).With("backend", u.name)
}

// ofTransport tells a status that grpc-go made from a server's. A server's comes
// with headers or, alone, with a content-type in its trailers. grpc-go's comes
// without either; or after headers, with one of its texts; and one comes beside
// the server's trailers, which says that there is no answer.
func ofTransport(s *status.Status, header, trailer metadata.MD) bool {
	if strings.HasPrefix(s.Message(), noAnswer) {
		return true
	}
	if len(trailer) > 0 {
		return false
	}
	if header == nil {
		return true
	}
	if len(s.Details()) > 0 {
		return false
	}
	for _, text := range transportTexts {
		if strings.HasPrefix(s.Message(), text) {
			return true
		}
	}
	return false
}

const (
	reset    = "stream terminated by RST_STREAM"
	noAnswer = "cardinality violation: received no response message"
)

// transportTexts begin what grpc-go v1.85.0 says of a call whose headers have
// come: stream.go, rpc_util.go and internal/transport. A server that says the
// same is taken for a lost one, which does no harm.
var transportTexts = []string{
	reset,
	"connection error: ", "error reading from server", "closing transport due to: ", "transport",
	"the connection is draining", "the stream is rejected", "the client connection is closing",
	"server closed the stream without sending trailers", "a HEADERS frame cannot appear", "peer header list size exceeded",
	"grpc: ", "cardinality violation: ", "unexpected EOF", "malformed header", "unexpected HTTP status code",
}

func bufferOf(b []byte) mem.BufferSlice { return mem.BufferSlice{mem.SliceBuffer(b)} }
