package interceptors

import (
	"context"
	"encoding/binary"
	"math"
	"strconv"

	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/encoding/protowire"
)

// Usage is the names under which a model server says in headers and trailers how many
// tokens a call used: those of metadata with a decimal number, or those in an ORCA
// report. "" is a number that it does not say.
type Usage struct{ Input, Output string }

const (
	// orcaKey is the metadata of an ORCA report (xds.data.orca.v3.OrcaLoadReport), and
	// orcaCosts and orcaNamed are its fields request_cost and named_metrics.
	orcaKey              = "endpoint-load-metrics-bin"
	orcaCosts, orcaNamed = 4, 8
	// maxReport bounds what is read of a report, in bytes. Chosen: one has some hundred.
	maxReport = 16 << 10
	// maxReported bounds what is believed: the largest number of tokens that a double counts.
	maxReported = 1 << 53
)

// Reported takes over what the model server says of the usage of a call in its header or
// trailer. A door calls it before the response of a unary call, and at the end of a stream.
// Of a stream that carries many inferences nothing is taken over, for it cannot be told
// whose that is. Safe at any time.
func (c *Call) Reported(md metadata.MD) {
	c.mu.Lock()
	i := c.single
	c.mu.Unlock()
	if i == nil || len(md) == 0 || i.Backend.Usage == (Usage{}) {
		return
	}
	input, output := i.Backend.Usage.read(md)
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.ended {
		return
	}
	i.toldOutput = max(i.toldOutput, output)
	i.ReportedInput, i.ReportedOutput = max(i.ReportedInput, input), max(i.ReportedOutput, output)
}

// read is what metadata say; 0 for what they do not.
func (u Usage) read(md metadata.MD) (input, output int64) {
	take := func(name string, n int64) {
		if name == u.Input {
			input = max(input, n)
		}
		if name == u.Output {
			output = max(output, n)
		}
	}
	for _, name := range []string{u.Input, u.Output} {
		for _, v := range md.Get(name) {
			if n, err := strconv.ParseInt(v, 10, 64); err == nil && name != "" && n <= maxReported {
				take(name, n)
			}
		}
	}
	if v := md[orcaKey]; len(v) == 1 && len(v[0]) <= maxReport {
		eachMetric([]byte(v[0]), take)
	}
	return input, output
}

// eachMetric calls found with the costs and metrics of an ORCA report that are numbers of
// something. What is malformed ends it.
func eachMetric(report []byte, found func(name string, n int64)) {
	for len(report) > 0 {
		number, kind, n := protowire.ConsumeTag(report)
		if n < 0 {
			return
		}
		report = report[n:]
		if kind != protowire.BytesType || number != orcaCosts && number != orcaNamed {
			if n = protowire.ConsumeFieldValue(number, kind, report); n < 0 {
				return
			}
			report = report[n:]
			continue
		}
		entry, n := protowire.ConsumeBytes(report)
		if n < 0 {
			return
		}
		report = report[n:]
		if name, v := entryOf(entry); v > 0 && v <= maxReported {
			found(name, int64(math.Ceil(v)))
		}
	}
}

// entryOf reads an entry of a map from text to double.
func entryOf(b []byte) (name string, v float64) {
	for len(b) > 0 {
		number, kind, n := protowire.ConsumeTag(b)
		size := 0
		if n > 0 {
			size = protowire.ConsumeFieldValue(number, kind, b[n:])
		}
		if n < 0 || size < 0 {
			return "", 0
		}
		value := b[n : n+size]
		switch {
		case number == 1 && kind == protowire.BytesType:
			text, _ := protowire.ConsumeBytes(value)
			name = string(text)
		case number == 2 && kind == protowire.Fixed64Type:
			v = math.Float64frombits(binary.LittleEndian.Uint64(value))
		}
		b = b[n+size:]
	}
	return name, v
}

// reports reports whether the model server says in headers or trailers what a call used.
func (c *Call) reports() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.single != nil && c.single.Backend.Usage != Usage{}
}

// reportingContext has what the handler of a unary call says in its header or trailer read
// for the usage.
func (c *Call) reportingContext(ctx context.Context) context.Context {
	if s := grpc.ServerTransportStreamFromContext(ctx); s != nil && c.reports() {
		return grpc.NewContextWithServerTransportStream(ctx, &reportingStream{s, c})
	}
	return ctx
}

// reportingStream is the stream of a unary call that a handler serves.
type reportingStream struct {
	grpc.ServerTransportStream
	call *Call
}

func (s *reportingStream) SetHeader(md metadata.MD) error {
	s.call.Reported(md)
	return s.ServerTransportStream.SetHeader(md)
}

func (s *reportingStream) SendHeader(md metadata.MD) error {
	s.call.Reported(md)
	return s.ServerTransportStream.SendHeader(md)
}

func (s *reportingStream) SetTrailer(md metadata.MD) error {
	s.call.Reported(md)
	return s.ServerTransportStream.SetTrailer(md)
}
