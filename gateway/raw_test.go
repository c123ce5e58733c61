package gateway

import (
	"bytes"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"net"
	"strconv"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	spb "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
)

// peer is a client that speaks HTTP/2 frame by frame, and as badly as it likes.
type peer struct {
	t    testing.TB
	conn net.Conn
	*http2.Framer
	block bytes.Buffer
	enc   *hpack.Encoder
	next  uint32
}

// raw connects and says what every client says first.
func (g *gate) raw() *peer {
	g.t.Helper()
	conn, err := net.Dial("tcp", g.address)
	if err != nil {
		g.t.Fatal(err)
	}
	return newPeer(g.t, conn)
}

func newPeer(t testing.TB, conn net.Conn) *peer {
	p := &peer{t: t, conn: conn, Framer: http2.NewFramer(conn, conn), next: 1}
	t.Cleanup(func() { _ = conn.Close() })
	_ = conn.SetDeadline(time.Now().Add(20 * time.Second)) // so that a test ends that would not
	p.enc = hpack.NewEncoder(&p.block)
	p.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
	if _, err := conn.Write([]byte(preface)); err != nil {
		t.Fatal(err)
	}
	if err := p.WriteSettings(); err != nil {
		t.Fatal(err)
	}
	return p
}

// fields encodes a call's headers.
func (p *peer) fields(path string, more ...string) []byte {
	p.block.Reset()
	all := append([]string{":method", "POST", ":scheme", "http", ":path", path, ":authority", "gateway",
		"content-type", "application/grpc", "te", "trailers"}, more...)
	for n := 0; n < len(all); n += 2 {
		_ = p.enc.WriteField(hpack.HeaderField{Name: all[n], Value: all[n+1]})
	}
	return p.block.Bytes()
}

// begin opens a call and returns its stream. An error is the connection's end.
func (p *peer) begin(path string, end bool, more ...string) (uint32, error) {
	id := p.next
	p.next += 2
	return id, p.WriteHeaders(http2.HeadersFrameParam{StreamID: id, BlockFragment: p.fields(path, more...), EndHeaders: true, EndStream: end})
}

// message is a gRPC message with its prefix.
func message(flag byte, body []byte) []byte {
	return append(binary.BigEndian.AppendUint32([]byte{flag}, uint32(len(body))), body...)
}

// ending is how a call ended.
type ending struct {
	err          error
	trailersOnly bool
	messages     int // bytes of data
	trailer      map[string]string
}

// end reads until the call has ended, in whatever way.
func (p *peer) end(id uint32) ending {
	p.t.Helper()
	var e ending
	headers := 0
	for {
		f, err := p.ReadFrame()
		if err != nil {
			e.err = err
			return e
		}
		switch f := f.(type) {
		case *http2.SettingsFrame:
			if !f.IsAck() {
				_ = p.WriteSettingsAck()
			}
		case *http2.PingFrame:
			if !f.IsAck() {
				_ = p.WritePing(true, f.Data)
			}
		case *http2.GoAwayFrame:
			if f.ErrCode != http2.ErrCodeNo {
				e.err = errors.New(f.ErrCode.String())
				return e
			}
		case *http2.RSTStreamFrame:
			if f.StreamID == id {
				e.err = errors.New("RST_STREAM " + f.ErrCode.String())
				return e
			}
		case *http2.DataFrame:
			if f.StreamID == id {
				e.messages += len(f.Data())
			}
		case *http2.MetaHeadersFrame:
			if f.StreamID != id {
				continue
			}
			headers++
			if !f.StreamEnded() {
				continue
			}
			e.trailersOnly = headers == 1
			e.trailer = make(map[string]string)
			for _, h := range f.Fields {
				e.trailer[h.Name] = h.Value
			}
			e.err = statusOf(e.trailer)
			return e
		}
	}
}

// statusOf reads a status as clients do.
func statusOf(trailer map[string]string) error {
	code, _ := strconv.Atoi(trailer["grpc-status"])
	s := &spb.Status{Code: int32(code), Message: trailer["grpc-message"]}
	if b, err := base64.RawStdEncoding.DecodeString(trailer["grpc-status-details-bin"]); err == nil && len(b) > 0 {
		_ = proto.Unmarshal(b, s)
	}
	if codes.Code(s.Code) == codes.OK {
		return nil
	}
	return status.ErrorProto(s)
}

// call makes a call whose body is these bytes, in one DATA frame after another.
func (p *peer) call(path string, half bool, body []byte, more ...string) ending {
	p.t.Helper()
	id, err := p.begin(path, false, more...)
	if err != nil {
		p.t.Fatal(err)
	}
	for {
		k := min(len(body), 16<<10)
		if err := p.WriteData(id, half && k == len(body), body[:k]); err != nil {
			p.t.Fatal(err)
		}
		if body = body[k:]; len(body) == 0 {
			return p.end(id)
		}
	}
}
