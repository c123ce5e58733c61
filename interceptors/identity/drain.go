package identity

import (
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
)

// A connection may live for longer than the SVIDs that it was made with, but an
// identity is good only as long as its SVID. So a connection is drained before:
// calls that begin after that take a new one, made with the SVIDs of the day,
// and calls in flight go on. HTTP/2 has a frame for it, GOAWAY with the highest
// possible stream (RFC 9113, section 6.8). grpc-go offers no way to have it sent
// for one connection, so we put it between the frames that go by.

const (
	// soon is what is not worth a new connection: it goes on until the SVID ends.
	// Chosen: some handshakes.
	soon = 100 * time.Millisecond
	// revokedGrace is how long calls to a server whose certificate was revoked may
	// go on. Chosen: enough for short ones to end.
	revokedGrace = 5 * time.Second
)

// due is when a connection is to be drained because of an SVID: when a quarter of
// its life is left, or somewhat less, so that not all do so in the same instant.
// Chosen: SPIRE has renewed it when half is left, cert-manager's CSI driver when a
// third is. If there is less left already its owner is late, and it is half of what
// is left.
func due(begins, ends, now time.Time) time.Time {
	quarter := ends.Sub(begins) / 4
	at := ends.Add(-quarter)
	if quarter > 4 {
		at = at.Add(rand.N(quarter / 4)) //nolint:gosec // no secret
	}
	if at.After(now) {
		return at
	}
	left := ends.Sub(now)
	if left < 2*soon {
		return ends
	}
	return now.Add(left / 2)
}

// connection is drained when an SVID that it was made with is near its end or
// does not count any more.
type connection struct {
	net.Conn
	proof *proof
	shown *x509svid.SVID // our own, on the client side; nil on the server's
	due   time.Time      // because of the peer's SVID

	mu     sync.Mutex // of plan and close
	closed bool
	timer  *time.Timer
	end    *time.Timer // of a connection to a server that was revoked
}

// keep begins to look after a connection. goAway drains it; it may be called
// more than once.
func (c *connection) keep(conn net.Conn, p *proof, shown *x509svid.SVID, goAway func()) {
	c.Conn, c.proof, c.shown = conn, p, shown
	c.due = due(p.chain[0].NotBefore, p.expires, time.Now())
	c.timer = time.AfterFunc(time.Until(c.due), goAway)
	p.connection = c
	p.source.add(c)
}

// plan sets the time to drain. Source calls it once, and after each change.
//
// Our own SVID counts only once there is a newer one to show: until then another
// connection would be no better. A server does not ask its clients to come back
// because its own SVID ends; they know when it does.
func (c *connection) plan() {
	revoked := c.proof.Revoked() != nil
	shown := c.proof.source.state()
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		c.proof.source.remove(c) // it may have been added meanwhile
		return
	}
	at := c.due
	switch {
	case revoked:
		at = time.Now()
		if c.shown != nil && c.end == nil {
			c.end = time.AfterFunc(revokedGrace, func() { _ = c.Close() })
		}
	case c.shown != nil && shown != nil && shown.svid != c.shown:
		leaf := c.shown.Certificates[0]
		quarter := leaf.NotAfter.Sub(leaf.NotBefore) / 4
		if own := leaf.NotAfter.Add(-quarter); own.Before(at) {
			at = own
		}
	}
	c.timer.Reset(time.Until(at))
}

// drain is for now, whatever the plan.
func (c *connection) drain() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.due = time.Now()
	if !c.closed {
		c.timer.Reset(0)
	}
}

// Close implements net.Conn.
func (c *connection) Close() error {
	c.mu.Lock()
	c.closed = true
	c.timer.Stop()
	if c.end != nil {
		c.end.Stop()
	}
	c.mu.Unlock()
	c.proof.source.remove(c)
	return c.Conn.Close()
}

// goAwayFrame says that no stream should begin from now on, and that those that
// have begun go on.
var goAwayFrame = [17]byte{
	0, 0, 8, frameGoAway, 0, 0, 0, 0, 0, // of the connection
	0x7f, 0xff, 0xff, 0xff, // the last stream: any
	0, 0, 0, 0, // NO_ERROR
}

// The frame types that matter (RFC 9113, section 6).
const (
	frameHeaders      = 0x1
	framePushPromise  = 0x5
	frameGoAway       = 0x7
	frameContinuation = 0x9
	flagEndHeaders    = 0x4
)

// frames follows the frames that a server sends, cut anywhere. It reads their
// headers only.
type frames struct {
	payload int // bytes still to come
	header  [9]byte
	have    int  // bytes of header
	begun   bool // the first frame has begun, which must be SETTINGS
	open    bool // a header block goes on in the next frame
	goAway  bool // there was a GOAWAY
}

// step goes on within b, which is not empty, to the end of a header or a payload
// at most. It returns how many bytes that was.
func (f *frames) step(b []byte) int {
	if f.payload > 0 {
		n := min(f.payload, len(b))
		f.payload -= n
		return n
	}
	n := copy(f.header[f.have:], b)
	if f.have += n; f.have == len(f.header) {
		f.have = 0
		f.begun = true
		f.payload = int(binary.BigEndian.Uint32(f.header[:4]) >> 8)
		switch f.header[3] {
		case frameHeaders, framePushPromise, frameContinuation:
			f.open = f.header[4]&flagEndHeaders == 0
		case frameGoAway:
			f.goAway = true
		}
	}
	return n
}

func (f *frames) follow(b []byte) {
	for len(b) > 0 {
		b = b[f.step(b):]
	}
}

// between reports that another frame may be put in here.
func (f *frames) between() bool {
	return f.payload == 0 && f.have == 0 && f.begun && !f.open
}

// left is how many bytes at least come before the next place to put a frame in.
func (f *frames) left() int {
	if f.payload > 0 {
		return f.payload
	}
	return len(f.header) - f.have
}

// serverConnection puts a GOAWAY among the frames that the server writes.
type serverConnection struct {
	connection

	writing sync.Mutex
	frames  frames
	asked   bool // for a GOAWAY
}

// Write implements net.Conn.
func (c *serverConnection) Write(b []byte) (int, error) {
	c.writing.Lock()
	defer c.writing.Unlock()
	if !c.asked || c.frames.goAway {
		c.frames.follow(b)
		return c.Conn.Write(b)
	}
	n := 0
	for n < len(b) && !c.frames.between() {
		n += c.frames.step(b[n:])
	}
	if n > 0 {
		if n, err := c.Conn.Write(b[:n]); err != nil {
			return n, err
		}
	}
	if err := c.tell(); err != nil || n == len(b) {
		return n, err
	}
	c.frames.follow(b[n:])
	rest, err := c.Conn.Write(b[n:])
	return n + rest, err
}

// tell writes the GOAWAY if this is a place for it. The server's own, when it
// shuts down, says more: ours must not follow it.
func (c *serverConnection) tell() error {
	if c.frames.goAway || !c.frames.between() {
		return nil
	}
	c.frames.goAway = true
	_, err := c.Conn.Write(goAwayFrame[:])
	return err
}

// goAway tells the client, now or with the next write. It waits for the write at
// hand.
func (c *serverConnection) goAway() {
	c.writing.Lock()
	defer c.writing.Unlock()
	c.asked = true
	_ = c.tell() // a connection that is lost tells its reader so
}

// clientConnection puts a GOAWAY among the frames that the client reads.
type clientConnection struct {
	connection

	frames frames      // only the goroutine that reads touches it
	rest   []byte      // of the GOAWAY, once it has begun
	asked  atomic.Bool // for a GOAWAY that has not been read in full

	waking   sync.Mutex
	told     bool      // goAway was called
	woken    bool      // the deadline in force is ours
	deadline time.Time // the one that the reader wants
}

// Read implements net.Conn.
func (c *clientConnection) Read(b []byte) (int, error) {
	for {
		part := b
		if c.asked.Load() && len(b) > 0 {
			if n := c.tell(b); n > 0 {
				return n, nil
			}
			part = b[:min(len(b), c.frames.left())] // not past the next place for it
		}
		n, err := c.Conn.Read(part)
		c.frames.follow(part[:n])
		if n == 0 && errors.Is(err, os.ErrDeadlineExceeded) && c.rearm() {
			continue
		}
		return n, err
	}
}

// tell reads the GOAWAY if this is a place for it.
func (c *clientConnection) tell(b []byte) int {
	if c.rest == nil {
		if c.frames.goAway { // the server's own says it too
			c.asked.Store(false)
			return 0
		}
		if !c.frames.between() {
			return 0
		}
		c.rest = goAwayFrame[:]
	}
	n := copy(b, c.rest)
	if c.rest = c.rest[n:]; len(c.rest) == 0 {
		c.frames.goAway = true
		c.asked.Store(false)
	}
	return n
}

// goAway has the reader read a GOAWAY, and wakes it if it waits.
func (c *clientConnection) goAway() {
	c.waking.Lock()
	defer c.waking.Unlock()
	if c.told {
		return
	}
	c.told, c.woken = true, true
	c.asked.Store(true)
	_ = c.Conn.SetReadDeadline(time.Unix(1, 0)) // reads of TLS go on after a timeout; writes would not
}

// rearm puts back the reader's own deadline, if it was ours that passed.
func (c *clientConnection) rearm() bool {
	c.waking.Lock()
	defer c.waking.Unlock()
	if !c.woken {
		return false
	}
	c.woken = false
	return c.Conn.SetReadDeadline(c.deadline) == nil
}

// SetReadDeadline implements net.Conn.
func (c *clientConnection) SetReadDeadline(t time.Time) error {
	c.waking.Lock()
	defer c.waking.Unlock()
	c.deadline, c.woken = t, false
	return c.Conn.SetReadDeadline(t)
}

// SetDeadline implements net.Conn.
func (c *clientConnection) SetDeadline(t time.Time) error {
	if err := c.SetReadDeadline(t); err != nil {
		return err
	}
	return c.Conn.SetWriteDeadline(t)
}
