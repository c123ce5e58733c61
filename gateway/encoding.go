package gateway

import (
	"errors"
	"io"

	"google.golang.org/grpc/encoding"
	"google.golang.org/grpc/encoding/gzip"

	"github.com/sluicegate/sluice/interceptors"
)

// refusedEncodings are compressions that gRPC clients know and the gateway does
// not take. grpc-go answers a call in an encoding that it has never heard of
// before any handler runs, with UNIMPLEMENTED and no reason; so that these calls
// get theirs, it has to have heard of them. Registration is for the process, as
// all of grpc-go's is; calls to model servers still offer gzip alone.
var refusedEncodings = []refusedEncoding{"br", "deflate", "lz4", "snappy", "x-snappy-framed", "zstd"}

func init() {
	for _, e := range refusedEncodings {
		if encoding.GetCompressor(string(e)) == nil {
			encoding.RegisterCompressor(e)
		}
	}
}

// refusedEncoding is the name of a compression that is not there.
type refusedEncoding string

var errRefused = errors.New("the encoding is not supported")

func (e refusedEncoding) Name() string                             { return string(e) }
func (refusedEncoding) Compress(io.Writer) (io.WriteCloser, error) { return nil, errRefused }
func (refusedEncoding) Decompress(io.Reader) (io.Reader, error)    { return nil, errRefused }

// checkEncoding refuses a call whose messages may come in an encoding that is
// not supported: they could not be read.
func checkEncoding(name string) error {
	switch name {
	case "", encoding.Identity, gzip.Name:
		return nil
	}
	return interceptors.Deny("gateway", interceptors.EncodingUnsupported,
		"the call's grpc-encoding is not supported; send messages uncompressed or in gzip").With("supported", "identity,gzip")
}
