package gateway

import (
	"bytes"
	"encoding/binary"
	"io"
	"net"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/net/http2"
)

// honest makes a call on a connection of its own.
func (g *gate) honest() {
	g.t.Helper()
	if _, err := g.client().ModelInfer(ctx(g.t), ask("echo", "honest", "hello")); err != nil {
		g.t.Errorf("an honest call: %v", err)
	}
}

// cutOff reads until the connection ends.
func (p *peer) cutOff() {
	p.t.Helper()
	_, err := io.Copy(io.Discard, p.conn)
	if timeout, ok := err.(net.Error); ok && timeout.Timeout() {
		p.t.Error("the connection was not cut off")
	}
}

func TestRapidReset(t *testing.T) {
	const resets = 4000
	_, behind := modelServer(t)
	g := open(t, base, behind)
	g.pool.abandoned = true
	for name, more := range map[string]func(p *peer, id uint32) error{
		"at once": func(p *peer, id uint32) error { return nil },
		"with a message": func(p *peer, id uint32) error {
			return p.WriteData(id, true, message(0, encode(t, ask("words", "a", words(100), number("delay_ms", 1)))))
		},
	} {
		t.Run(name, func(t *testing.T) {
			p := g.raw()
			go func() { _, _ = io.Copy(io.Discard, p.conn) }()
			sent := 0
			for ; sent < resets; sent++ {
				id, err := p.begin(modelStreamInfer, false)
				if err == nil {
					err = more(p, id)
				}
				if err == nil {
					err = p.WriteRSTStream(id, http2.ErrCodeCancel)
				}
				if err != nil {
					break
				}
			}
			if sent == resets {
				p.cutOff()
			}
			g.honest()
		})
	}
	g.idle()
	if log := logOf(g); strings.Count(log, "closed a connection that floods") != 2 || !strings.Contains(log, "with=resets") {
		t.Errorf("the log says:\n%s", log)
	}
}

func logOf(g *gate) string {
	g.Shutdown()
	return g.log.String()
}

// A connection may reset calls for as long as it is not a flood.
func TestFewResetsAreNoFlood(t *testing.T) {
	_, behind := modelServer(t)
	g := open(t, base, behind)
	g.pool.abandoned = true
	p := g.raw()
	for range defaultMaxResets {
		id, err := p.begin(modelStreamInfer, false)
		if err == nil {
			err = p.WriteRSTStream(id, http2.ErrCodeCancel)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	e := p.call(modelInfer, true, message(0, encode(t, ask("echo", "a", "hello"))))
	expect(t, "a call after it", e.err, "OK")
}

func TestFrameFloods(t *testing.T) {
	_, behind := modelServer(t)
	g := open(t, base, behind)
	for name, frame := range map[string]func(p *peer, id uint32) error{
		"SETTINGS":              func(p *peer, _ uint32) error { return p.WriteSettings() },
		"empty DATA":            func(p *peer, id uint32) error { return p.WriteData(id, false, nil) },
		"PRIORITY":              func(p *peer, id uint32) error { return p.WritePriority(id, http2.PriorityParam{StreamDep: 0}) },
		"unknown":               func(p *peer, _ uint32) error { return p.WriteRawFrame(0x42, 0, 0, []byte("hello")) },
		"PING":                  func(p *peer, _ uint32) error { return p.WritePing(false, [8]byte{}) },
		"RST_STREAM of nothing": func(p *peer, id uint32) error { return p.WriteRSTStream(id, http2.ErrCodeCancel) },
	} {
		t.Run(name, func(t *testing.T) {
			p := g.raw()
			id, err := p.begin(modelStreamInfer, false)
			if err != nil {
				t.Fatal(err)
			}
			go func() {
				for n := 0; n < 100_000 && frame(p, id) == nil; n++ {
				}
			}()
			p.cutOff()
			g.honest()
		})
	}
	g.idle()
}

func TestHeaderFloods(t *testing.T) {
	_, behind := modelServer(t)
	g := open(t, base, behind)
	t.Run("CONTINUATION without end", func(t *testing.T) {
		p := g.raw()
		_ = p.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: p.fields(modelInfer)})
		go func() {
			block := p.fields(modelInfer, "x", strings.Repeat("x", 8<<10))
			for n := 0; n < 10_000 && p.WriteContinuation(1, false, block) == nil; n++ {
			}
		}()
		p.cutOff()
		g.honest()
	})
	t.Run("empty CONTINUATION", func(t *testing.T) {
		p := g.raw()
		_ = p.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: p.fields(modelInfer)})
		go func() {
			for n := 0; n < 100_000 && p.WriteContinuation(1, false, nil) == nil; n++ {
			}
		}()
		p.cutOff()
		g.honest()
	})
	t.Run("too large a list", func(t *testing.T) {
		// One entry of the table, named a thousand times, is 4 MiB from 6 KiB.
		p := g.raw()
		more := []string{}
		for range 1000 {
			more = append(more, "x", strings.Repeat("x", 4000))
		}
		id, err := p.begin(modelInfer, true, more...)
		if err != nil {
			t.Fatal(err)
		}
		if e := p.end(id); e.err == nil || e.trailer != nil {
			t.Errorf("it was answered: %+v", e)
		}
		g.honest()
	})
	t.Run("just fits", func(t *testing.T) {
		p := g.raw()
		e := p.call(modelInfer, true, message(0, encode(t, ask("echo", "a", "hello"))), "x", strings.Repeat("x", 15<<10))
		expect(t, "the call", e.err, "OK")
	})
}

func TestConcurrentStreamsAreLimited(t *testing.T) {
	_, behind := modelServer(t)
	g := open(t, base+"listener: {address: x, max_concurrent_streams: 3}", behind)
	g.pool.abandoned = true
	p := g.raw()
	for range 3 {
		if _, err := p.begin(modelInfer, false); err != nil {
			t.Fatal(err)
		}
	}
	id, err := p.begin(modelInfer, false)
	if err != nil {
		t.Fatal(err)
	}
	if e := p.end(id); e.err == nil || e.err.Error() != "RST_STREAM REFUSED_STREAM" {
		t.Errorf("one more than that: %+v", e)
	}
	g.eventually("three are at work", func() bool { return g.Guard().Live().Len() == 3 })
	g.honest()
}

func TestConnectionsAreLimited(t *testing.T) {
	_, behind := modelServer(t)
	g := open(t, base+"listener: {address: x, max_connections: 2}", behind)
	good := message(0, encode(t, ask("echo", "a", "hello")))
	first, second := g.raw(), g.raw()
	expect(t, "the first", first.call(modelInfer, true, good).err, "OK")
	expect(t, "the second", second.call(modelInfer, true, good).err, "OK")
	third := g.raw() // in the kernel's queue
	_ = third.conn.SetReadDeadline(time.Now().Add(50 * time.Millisecond))
	if _, err := third.ReadFrame(); err == nil {
		t.Error("a third connection was taken")
	}
	_ = first.conn.Close()
	_ = third.conn.SetReadDeadline(time.Now().Add(20 * time.Second))
	expect(t, "the third, once there is room", third.call(modelInfer, true, good).err, "OK")
}

// A connection that never says what it wants is let go of.
func TestSlowHandshake(t *testing.T) {
	_, behind := modelServer(t)
	g := open(t, base+"listener: {address: x, handshake_timeout: 0.05s}", behind)
	for name, hello := range map[string]string{"silent": "", "half a preface": preface[:10], "no settings": preface} {
		t.Run(name, func(t *testing.T) {
			conn, err := net.Dial("tcp", g.address)
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			_, _ = conn.Write([]byte(hello))
			_ = conn.SetReadDeadline(time.Now().Add(20 * time.Second))
			_, err = io.Copy(io.Discard, conn)
			if timeout, ok := err.(net.Error); ok && timeout.Timeout() {
				t.Error("the connection was kept")
			}
		})
	}
	g.eventually("none is left", func() bool {
		g.edge.mu.Lock()
		defer g.edge.mu.Unlock()
		return len(g.edge.young) == 0
	})
	g.honest()
}

// Resets are counted by time: a slow trickle of them is no flood.
func TestFloodsAreCountedInAWindow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		reset := frameBytes(frameReset, 0, make([]byte, 4))
		w := &watched{edge: &edge{maxResets: 5}, grown: true, began: time.Now()}
		for round := range 10 {
			for range 5 {
				if why := w.watch(reset); why != "" {
					t.Fatalf("round %d: %s", round, why)
				}
			}
			<-time.After(floodWindow + time.Second) // of the bubble
		}
		for range 5 {
			_ = w.watch(reset)
		}
		for n := 0; w.watch(reset) == ""; n++ {
			if n > 10 {
				t.Fatal("a flood is not seen")
			}
		}
	})
}

func frameBytes(kind, flags byte, payload []byte) []byte {
	b := binary.BigEndian.AppendUint32(nil, uint32(len(payload))<<8|uint32(kind))
	b = append(b, flags, 0, 0, 0, 1)
	return append(b, payload...)
}

// counts is what a reader of whole frames (golang.org/x/net/http2) counts.
func counts(b []byte) (resets, idle int) {
	if len(b) < len(preface) {
		return 0, 0
	}
	for b = b[len(preface):]; len(b) >= 9; {
		h, err := http2.ReadFrameHeader(bytes.NewReader(b))
		if err != nil {
			return resets, idle
		}
		switch h.Type {
		case http2.FrameRSTStream:
			resets++
		case http2.FrameSettings, http2.FramePriority:
			idle++
		case http2.FrameData:
			if h.Length == 0 && !h.Flags.Has(http2.FlagDataEndStream) {
				idle++
			}
		case http2.FrameContinuation:
			if h.Length == 0 {
				idle++
			}
		default:
			if h.Type > http2.FrameContinuation {
				idle++
			}
		}
		b = b[min(len(b), 9+int(h.Length)):]
	}
	return resets, idle
}

// The watcher counts the same however the bytes are cut, and as another reader does.
func FuzzWatch(f *testing.F) {
	all := []byte(preface)
	for _, frame := range [][]byte{
		frameBytes(frameSettings, 0, nil), frameBytes(frameReset, 0, make([]byte, 4)), frameBytes(frameData, 0, nil),
		frameBytes(frameData, flagEndStream, nil), frameBytes(frameData, 0, []byte("hello")), frameBytes(0x42, 0, make([]byte, 300)),
		frameBytes(frameContinuation, 0, nil), frameBytes(framePriority, 0, make([]byte, 5)), frameBytes(0x1, 4, make([]byte, 70)),
	} {
		all = append(all, frame...)
	}
	f.Add(all, []byte{1})
	f.Add(all, []byte{3, 7, 200})
	f.Add(all[:60], []byte{9})
	f.Add([]byte("GET / HTTP/1.1\r\n\r\n"), []byte{2})
	f.Fuzz(func(t *testing.T, b, cuts []byte) {
		w := &watched{edge: &edge{maxResets: 1 << 30}, grown: true, frames: frames{skip: len(preface)}, began: time.Now()}
		resets, idle := counts(b)
		if idle > maxIdleFrames {
			return
		}
		for rest, n := b, 0; len(rest) > 0; n++ {
			k := len(rest)
			if len(cuts) > 0 {
				k = min(k, 1+int(cuts[n%len(cuts)]))
			}
			if why := w.watch(rest[:k]); why != "" {
				t.Fatal(why)
			}
			rest = rest[k:]
		}
		if w.resets != resets || w.idle != idle {
			t.Errorf("counted %d resets and %d others, want %d and %d", w.resets, w.idle, resets, idle)
		}
	})
}
