package gateway

import (
	"encoding/binary"
	"errors"
	"net"
	"sync"
	"time"

	"google.golang.org/grpc/credentials"
)

// What one connection may send in floodWindow beside its calls. Each is far
// above what a client does that means well, and far below what it takes to keep
// a core busy: CVE-2023-44487 (rapid reset) and CVE-2019-9515, -9518 (SETTINGS
// and empty DATA floods) need thousands a second. grpc-go itself limits PING.
const (
	floodWindow      = 10 * time.Second
	defaultMaxResets = 200
	maxIdleFrames    = 1000 // SETTINGS, PRIORITY, empty DATA and CONTINUATION, unknown frames
)

var errFlood = errors.New("the peer floods the connection")

// edge are transport credentials of the listener: those of the configuration of
// the day, for each handshake anew. They watch what arrives on the connections
// that they make: HTTP/2 frames, after TLS.
type edge struct {
	credentials.TransportCredentials // of the first configuration

	acquire   func() (credentials.TransportCredentials, func())
	maxResets int
	closed    func(reason string)

	mu      sync.Mutex
	young   map[net.Conn]struct{} // have not said anything in HTTP/2 yet
	dropped bool
}

// ServerHandshake implements credentials.TransportCredentials.
func (e *edge) ServerHandshake(conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	if !e.begin(conn) {
		_ = conn.Close()
		return nil, nil, net.ErrClosed
	}
	creds, release := e.acquire()
	c, info, err := creds.ServerHandshake(conn)
	release()
	if err != nil {
		e.grown(conn)
		return nil, nil, err
	}
	return &watched{Conn: c, raw: conn, edge: e, frames: frames{skip: len(preface)}, began: time.Now()}, info, nil
}

// Clone implements credentials.TransportCredentials. There is nothing in it
// that anybody changes.
func (e *edge) Clone() credentials.TransportCredentials { return e }

func (e *edge) begin(conn net.Conn) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.dropped {
		return false
	}
	if e.young == nil {
		e.young = make(map[net.Conn]struct{})
	}
	e.young[conn] = struct{}{}
	return true
}

func (e *edge) grown(conn net.Conn) {
	e.mu.Lock()
	defer e.mu.Unlock()
	delete(e.young, conn)
}

// drop closes the connections whose handshake has not ended. grpc-go would wait
// for them, up to the handshake's time limit, before it tells the others that
// the server goes away.
func (e *edge) drop() {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.dropped = true
	for conn := range e.young {
		_ = conn.Close()
	}
}

// preface begins an HTTP/2 connection (RFC 9113, section 3.4).
const preface = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"

// The frame types that are counted (RFC 9113, section 6).
const (
	frameData         = 0x0
	framePriority     = 0x2
	frameReset        = 0x3
	frameSettings     = 0x4
	frameContinuation = 0x9 // the last; what is above is unknown
	flagEndStream     = 0x1
)

// frames follows the frames in a stream of bytes, cut anywhere.
type frames struct {
	skip   int // bytes of preface or payload still to come
	header [9]byte
	have   int // bytes of header
}

// next goes on to the end of the next frame's header. It returns what is left
// of b, and whether there was such a header.
func (f *frames) next(b []byte) ([]byte, bool) {
	k := min(f.skip, len(b))
	f.skip -= k
	b = b[k:]
	k = copy(f.header[f.have:], b)
	f.have += k
	b = b[k:]
	if f.have < len(f.header) {
		return b, false
	}
	f.have = 0
	f.skip = f.length()
	return b, true
}

func (f *frames) length() int { return int(binary.BigEndian.Uint32(f.header[:4]) >> 8) }
func (f *frames) kind() byte  { return f.header[3] }
func (f *frames) flags() byte { return f.header[4] }

// watched counts the frames that arrive on a connection, and closes one that
// floods. Only the goroutine that reads the connection touches its counters.
type watched struct {
	net.Conn
	raw   net.Conn // what it was made of
	edge  *edge
	grown bool

	frames
	began  time.Time
	resets int
	idle   int
}

// Read implements net.Conn.
func (w *watched) Read(p []byte) (int, error) {
	n, err := w.Conn.Read(p)
	if reason := w.watch(p[:n]); reason != "" {
		_ = w.Conn.Close()
		if w.edge.closed != nil {
			w.edge.closed(reason)
		}
		return 0, errFlood
	}
	return n, err
}

// Close implements net.Conn.
func (w *watched) Close() error {
	w.edge.grown(w.raw)
	return w.Conn.Close()
}

// watch follows the frames in the next bytes. It returns what there is too
// much of, if there is.
func (w *watched) watch(b []byte) string {
	for len(b) > 0 {
		rest, ok := w.next(b)
		if b = rest; !ok {
			continue
		}
		if !w.grown {
			w.grown = true
			w.edge.grown(w.raw)
		}
		if reason := w.count(); reason != "" {
			return reason
		}
	}
	return ""
}

func (w *watched) count() string {
	empty := w.length() == 0
	switch kind := w.kind(); {
	case kind == frameReset:
		w.resets++
	case kind == frameSettings, kind == framePriority, kind > frameContinuation,
		kind == frameContinuation && empty,
		kind == frameData && empty && w.flags()&flagEndStream == 0:
		w.idle++
	default:
		return ""
	}
	if w.resets <= w.edge.maxResets && w.idle <= maxIdleFrames {
		return ""
	}
	if now := time.Now(); now.Sub(w.began) > floodWindow {
		w.began, w.resets, w.idle = now, 0, 0
		return ""
	}
	if w.resets > w.edge.maxResets {
		return "resets"
	}
	return "frames"
}
