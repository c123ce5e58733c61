package gateway

import (
	"context"
	"errors"
	"strings"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/encoding"
	"google.golang.org/grpc/encoding/gzip"
	"google.golang.org/grpc/experimental"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/sluicegate/sluice/gateway/endpoints"
	"github.com/sluicegate/sluice/interceptors"
	"github.com/sluicegate/sluice/interceptors/config"
	configv1 "github.com/sluicegate/sluice/proto/gen/sluice/config/v1"
)

// acceptGzip has model servers offered the one compression that we read.
var acceptGzip = experimental.AcceptCompressors(gzip.Name)

// upstream is the model servers of a back end: one connection to each, which all
// calls share. More than one made it slower (writes batch less).
type upstream struct {
	name       string
	servers    *endpoints.Set
	codec      encoding.CodecV2
	maskErrors bool

	// What it was made of, and how many configurations use it.
	config   *configv1.Backend
	source   any // whose certificates they see
	maxBytes int
	holders  atomic.Int32
}

// release lets it go; the last one closes it.
func (u *upstream) release() {
	if u.holders.Add(-1) == 0 {
		_ = u.servers.Close()
	}
}

// unansweredBytes is how much of a request is kept until the model server answers, so
// that it can be sent to another one. It is grpc-go's default: a larger request is
// kept only where the configuration asks for retries.
const unansweredBytes = 256 << 10

// dial connects to the model servers of a back end, or takes over the connections
// that there are, if nothing of it changes.
func (g *Gateway) dial(cfg *configv1.Backend, b *interceptors.Backend, guard *config.Guard, before *runtime) (*upstream, error) {
	if cfg.GetAddress() == "" && len(cfg.GetAddresses()) == 0 {
		return nil, errors.New("address: the gateway needs the model server's address")
	}
	if before != nil {
		for _, u := range before.upstreams {
			if proto.Equal(u.config, cfg) && u.source == guard.Source() && u.maxBytes == guard.MaxMessageBytes() {
				u.holders.Add(1)
				return u, nil
			}
		}
	}
	creds, err := guard.BackendCredentials(cfg)
	if err != nil {
		return nil, err
	}
	u := &upstream{
		name: b.Name, codec: g.codec, maskErrors: cfg.GetMaskErrors(),
		config: cfg, source: guard.Source(), maxBytes: guard.MaxMessageBytes(),
	}
	u.holders.Store(1)
	kept := unansweredBytes
	if cfg.GetRetries() > 0 {
		kept = u.maxBytes + added
	}
	u.servers, err = endpoints.Dial(cfg, endpoints.Options{Logger: g.log, Loaded: func(l endpoints.Load) { g.loaded(cfg, l) }},
		grpc.WithTransportCredentials(creds),
		grpc.WithUserAgent("sluice"),
		grpc.WithDefaultCallOptions(
			grpc.MaxCallRecvMsgSize(u.maxBytes),
			grpc.MaxCallSendMsgSize(u.maxBytes+added),
			grpc.MaxRetryRPCBufferSize(kept),
		),
		grpc.WithMaxHeaderListSize(maxUpstreamHeader),
		grpc.WithStaticStreamWindowSize(streamWindow),
		grpc.WithStaticConnWindowSize(connWindow),
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: 100 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: maxBackoff},
			MinConnectTimeout: connectTimeout,
		}),
		experimental.WithBufferPool(g.pool),
	)
	if err != nil {
		return nil, err
	}
	return u, nil
}

// loaded tells the pools how much waits at a back end's model servers.
func (g *Gateway) loaded(b *configv1.Backend, l endpoints.Load) {
	if rt := g.runtime.Load(); rt != nil && rt.guard.Pools() != nil {
		rt.guard.Pools().Observe(b.GetModels(), l.Waiting)
	}
}

// Servers are the model servers of each back end at one moment, by its name.
func (g *Gateway) Servers() map[string][]endpoints.State {
	out := make(map[string][]endpoints.State)
	for _, u := range g.runtime.Load().upstreams {
		out[u.name] = u.servers.Snapshot()
	}
	return out
}

// place begins the choice of a server for an inference. It returns how much of one
// that takes.
func (c *forwarding) place(i *interceptors.Inference) (weight int64) {
	c.at.Context = forwarded(c.call)
	if i.Sequence != "" {
		c.at.Sequence = sequenceOf(i)
		if endpoints.Controlled(c.rt.upstreams[i.Backend].config) {
			c.at.Context = metadata.AppendToOutgoingContext(c.at.Context, endpoints.SequenceHeader, endpoints.SequenceHash(c.at.Sequence))
		}
	}
	weight = weightOf(i)
	c.at.Hold(weight)
	return weight
}

// sequenceOf is what a sequence is remembered by. That of another caller is another
// one: nobody learns of it, is told in its stead that it is lost, or holds it back.
func sequenceOf(i *interceptors.Inference) string {
	return i.Call.Principal + "\x00" + i.Model + "\x00" + i.Sequence
}

// weightOf is how much of a server an inference takes: its permits, or one.
func weightOf(i *interceptors.Inference) int64 {
	if p, ok := i.Part("admit").(interface{ Weight() int64 }); ok {
		return p.Weight()
	}
	return 1
}

// joined has a later inference of a stream count where the stream is. An error ends
// the call: its sequence is elsewhere, or lost.
func (c *forwarding) joined(i *interceptors.Inference) error {
	if i.Sequence != "" {
		switch err := c.at.Join(sequenceOf(i)); {
		case errors.Is(err, endpoints.ErrElsewhere):
			return interceptors.Deny("gateway", interceptors.RouteConflict,
				"the sequence is at another model server than this stream; open another stream for it").With("model", i.Model)
		case err != nil:
			return sequenceLost()
		}
	}
	weight := weightOf(i)
	c.at.Hold(weight)
	c.placed(i, weight)
	return nil
}

// placed has the inference take its weight off the server when it ends.
func (c *forwarding) placed(i *interceptors.Inference, weight int64) {
	if !i.Place(c.at.Address(), func() { c.at.Release(weight) }) {
		c.at.Release(weight) // it was there before, or has ended
	}
}

func sequenceLost() *interceptors.Denial {
	d := interceptors.Deny("gateway", interceptors.SequenceLost, "the model server that had the sequence is gone; begin the sequence anew")
	d.RetryAfter = interceptors.NoRetry
	return d
}

// served notes that the model server did what was asked.
func (c *forwarding) served(header, trailer metadata.MD) {
	c.ended = endpoints.Served
	c.at.Report(header)
	c.at.Report(trailer)
}

// failed makes an error of a call to the model server the error that the
// caller gets. The server's own status passes as it is, with its metadata; what
// grpc-go says would tell addresses and has no reason, and does not pass.
func (u *upstream) failed(c *forwarding, err error, header, trailer metadata.MD) error {
	call, ss := c.call, c.ss
	if cause := call.Cause(); cause != nil {
		return cause // we gave it up
	}
	var last interface {
		error
		GRPCStatus() *status.Status
	}
	if errors.As(err, &last) {
		err = last // without what grpc-go says of retries around it
	}
	s := status.Convert(err)
	switch {
	case c.at.Lost():
		return sequenceLost()
	case s.Code() == codes.Canceled && late(call.Context()):
		return context.DeadlineExceeded // the model server's clock was a little faster than ours
	case ofTransport(s, header, trailer):
		if s.Code() != codes.DeadlineExceeded && s.Code() != codes.ResourceExhausted {
			c.ended = endpoints.Failed
		}
		return u.lost(s)
	case s.Code() == codes.Unavailable:
		c.ended = endpoints.Failed
	case s.Code() == codes.ResourceExhausted:
		c.ended = endpoints.Overloaded
	default:
		c.ended = endpoints.Served
	}
	c.at.Report(header)
	c.at.Report(trailer)
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

// late reports whether the deadline has passed: the timer that ends the context may
// be behind.
func late(ctx context.Context) bool {
	d, ok := ctx.Deadline()
	return ok && !time.Now().Before(d)
}

// lost says what became of a call that the model server did not end itself.
func (u *upstream) lost(s *status.Status) error {
	if s.Code() == codes.Unavailable {
		u.servers.Unavailable(s.Message())
	}
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
