package gateway

import (
	"context"
	"encoding/binary"
	"errors"
	"io"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/encoding"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/sluicegate/sluice/interceptors"
)

// What a compressed message may become. 100 times its size is far more than text
// or tensors of weights and pixels compress to, and a tenth of what gzip can do
// to zeros; a message that stays under freeExpansion costs too little to matter.
const (
	maxExpansion  = 100
	freeExpansion = 1 << 20
)

// wire is grpc-go's own stream under a grpc.ServerStream: these are its methods
// (v1.85.0). RecvMsg and SendMsg end the call by themselves when they fail, with
// a status that has no reason, before anybody can give it one. So messages are
// read here; and a call that is aborted gets its status first, which then wakes
// whoever waits for the caller to send or to read.
type wire interface {
	ReadMessageHeader([]byte) error
	Read(int) (mem.BufferSlice, error)
	RecvCompress() string
	WriteStatus(*status.Status) error
	SetTrailer(metadata.MD) error
}

// wireOf finds the wire of a call.
func wireOf(ctx context.Context) (wire, error) {
	w, ok := grpc.ServerTransportStreamFromContext(ctx).(wire)
	if !ok {
		return nil, interceptors.Deny("gateway", interceptors.Internal, "the gateway was built with a grpc-go whose streams it does not know")
	}
	return w, nil
}

var well = status.New(codes.OK, "")

// finish ends a call with the status of an error, and what is being read or
// written of it. Only the first status counts.
func finish(w wire, err error) {
	var d *interceptors.Denial
	if errors.As(err, &d) {
		_ = w.SetTrailer(d.Trailer())
	}
	s := well
	if err != nil {
		s = status.Convert(interceptors.StatusOf(err))
	}
	_ = w.WriteStatus(s)
}

// receiver reads the messages of one call.
type receiver struct {
	wire
	limit int // bytes, of a message as it came and as it is meant
	pool  mem.BufferPool
}

// message reads the next one; io.EOF if the caller has sent its last. What else
// it returns is a *Denial, or comes of the caller having gone: the call's
// context says so.
func (r *receiver) message() (*interceptors.Envelope, error) {
	var header [5]byte // compressed or not; length
	if err := r.ReadMessageHeader(header[:]); err != nil {
		return nil, broken(err)
	}
	length := binary.BigEndian.Uint32(header[1:])
	if uint64(length) > uint64(r.limit) {
		return nil, r.tooLarge()
	}
	data, err := r.Read(int(length))
	if err != nil {
		if errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
		return nil, broken(err)
	}
	switch header[0] {
	case 0:
		return interceptors.RawEnvelope(data), nil
	case 1:
		defer data.Free()
		return r.inflate(data)
	}
	data.Free()
	return nil, interceptors.Deny("gateway", interceptors.MessageMalformed,
		"the message frame cannot be read: its first byte is neither 0 nor 1 (compressed)")
}

// end reads the end of a request that is one message.
func (r *receiver) end() error {
	var header [5]byte
	switch err := r.ReadMessageHeader(header[:]); {
	case err == nil:
		return interceptors.Deny("gateway", interceptors.MessageMalformed, "the method takes one message, and a second one came")
	case errors.Is(err, io.EOF):
		return nil
	default:
		return broken(err)
	}
}

func broken(err error) error {
	if errors.Is(err, io.ErrUnexpectedEOF) {
		return interceptors.Deny("gateway", interceptors.MessageMalformed, "the message ends before its length says so")
	}
	return err
}

func (r *receiver) tooLarge() error {
	return interceptors.Deny("gateway", interceptors.MessageTooLarge,
		"the message is larger than the %d bytes that the gateway takes", r.limit)
}

// inflate decompresses a message. It stops as soon as that becomes too much, so
// that memory is bounded by the limits and not by what the caller wrote.
func (r *receiver) inflate(data mem.BufferSlice) (*interceptors.Envelope, error) {
	malformed := interceptors.Deny("gateway", interceptors.MessageMalformed, "the message cannot be decompressed")
	c := encoding.GetCompressor(r.RecvCompress())
	if c == nil { // grpc-go has refused a name that nobody knows
		malformed.Message = "the message says that it is compressed, and the call's grpc-encoding does not say how"
		return nil, malformed
	}
	from := data.Reader()
	defer from.Close()
	in := &counted{Reader: from}
	z, err := c.Decompress(in)
	if err != nil {
		return nil, malformed
	}
	if closer, ok := z.(io.Closer); ok {
		defer closer.Close()
	}
	out, err := mem.ReadAll(&inflated{from: z, in: in, limit: r.limit}, r.pool)
	switch {
	case err == nil:
		return interceptors.RawEnvelope(out), nil
	case errors.Is(err, errExpands):
		err = interceptors.Deny("gateway", interceptors.MessageTooLarge,
			"the message expands to more than %d times its size; send it uncompressed", maxExpansion)
	case errors.Is(err, errLarge):
		err = r.tooLarge()
	default:
		err = malformed
	}
	out.Free()
	return nil, err
}

var (
	errExpands = errors.New("expands too much")
	errLarge   = errors.New("too large")
)

// counted counts what is read.
type counted struct {
	io.Reader
	n int
}

func (c *counted) Read(p []byte) (int, error) {
	n, err := c.Reader.Read(p)
	c.n += n
	return n, err
}

// inflated is the decompressed message, as far as it may go.
type inflated struct {
	from  io.Reader
	in    *counted
	limit int
	n     int
}

func (i *inflated) Read(p []byte) (int, error) {
	n, err := i.from.Read(p)
	i.n += n
	switch {
	case i.n > i.limit:
		return n, errLarge
	case i.n > freeExpansion && i.n > maxExpansion*i.in.n:
		return n, errExpands
	}
	return n, err
}
