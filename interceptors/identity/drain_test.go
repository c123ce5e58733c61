package identity

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/sluicegate/sluice/interceptors"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"
)

func TestDue(t *testing.T) {
	begins := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	ends := begins.Add(16 * time.Minute)
	for _, c := range []struct {
		name           string
		now, from, til time.Duration
	}{
		{"new", 0, 12 * time.Minute, 13 * time.Minute},
		{"renewed at half", 8 * time.Minute, 12 * time.Minute, 13 * time.Minute},
		{"late", 14 * time.Minute, 15 * time.Minute, 15 * time.Minute},
		{"very late", 16*time.Minute - soon, 16 * time.Minute, 16 * time.Minute},
		{"over", 17 * time.Minute, 16 * time.Minute, 16 * time.Minute},
	} {
		t.Run(c.name, func(t *testing.T) {
			for range 100 {
				if at := due(begins, ends, begins.Add(c.now)).Sub(begins); at < c.from || at > c.til {
					t.Fatalf("drained after %v", at)
				}
			}
		})
	}
	if at := due(begins, begins, begins); !at.Equal(begins) {
		t.Errorf("no life at all: %v", at)
	}
}

// conversation is frames such as a server sends, and where other frames fit in.
func conversation(t testing.TB) (text []byte, gaps map[int]bool) {
	t.Helper()
	var b bytes.Buffer
	f := http2.NewFramer(&b, nil)
	gaps = make(map[int]bool)
	gap := func(err error) {
		if err != nil {
			t.Fatal(err)
		}
		gaps[b.Len()] = true
	}
	var block bytes.Buffer
	if err := hpack.NewEncoder(&block).WriteField(hpack.HeaderField{Name: ":status", Value: "200"}); err != nil {
		t.Fatal(err)
	}
	gap(f.WriteSettings(http2.Setting{ID: http2.SettingMaxFrameSize, Val: 16384}))
	gap(f.WriteSettingsAck())
	gap(f.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: block.Bytes(), EndHeaders: true}))
	gap(f.WriteData(1, false, nil))
	gap(f.WriteData(1, false, bytes.Repeat([]byte("data"), 20)))
	if err := f.WriteHeaders(http2.HeadersFrameParam{StreamID: 3, BlockFragment: block.Bytes()}); err != nil {
		t.Fatal(err)
	}
	if err := f.WriteContinuation(3, false, nil); err != nil {
		t.Fatal(err)
	}
	gap(f.WriteContinuation(3, true, nil))
	gap(f.WritePing(true, [8]byte{}))
	gap(f.WriteData(1, true, []byte{7, 7, 7}))
	return b.Bytes(), gaps
}

// wire is the connection beneath: what is written, and what there is to read.
type wire struct {
	net.Conn
	mu      sync.Mutex
	written bytes.Buffer
	unread  []byte
	cuts    []byte // how much one read takes, in turn
}

func (w *wire) Write(b []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.written.Write(b)
}

func (w *wire) Read(b []byte) (int, error) {
	if len(w.unread) == 0 {
		return 0, io.EOF
	}
	n := cut(&w.cuts)
	n = copy(b, w.unread[:min(n, len(w.unread))])
	w.unread = w.unread[n:]
	return n, nil
}

func (w *wire) SetReadDeadline(time.Time) error { return nil }

// cut takes the next length; when there are none left, all.
func cut(cuts *[]byte) int {
	if len(*cuts) == 0 {
		return 1 << 12
	}
	n := int((*cuts)[0])
	*cuts = (*cuts)[1:]
	return 1 + n%64
}

// inserted checks that the text is the conversation with one GOAWAY in a gap, and
// returns where that is.
func inserted(t testing.TB, got, text []byte, gaps map[int]bool) int {
	t.Helper()
	at := bytes.Index(got, goAwayFrame[:])
	if at < 0 {
		t.Fatal("there is no GOAWAY")
	}
	rest := append(append([]byte(nil), got[:at]...), got[at+len(goAwayFrame):]...)
	if !bytes.Equal(rest, text) {
		t.Fatalf("the frames are not what they were: %x", got)
	}
	if !gaps[at] {
		t.Fatalf("a GOAWAY within a frame or a header block, at %d: %x", at, got)
	}
	return at
}

// However the frames are cut into writes and reads, and whenever it is asked
// for, the GOAWAY stands between two of them, in the first place that there is.
func FuzzGoAway(f *testing.F) {
	text, _ := conversation(f)
	for n := range text { // byte by byte, everywhere
		f.Add(make([]byte, len(text)), uint16(n))
	}
	f.Add([]byte{}, uint16(0))
	f.Add([]byte{8, 0, 17, 63, 2, 1}, uint16(40))
	f.Fuzz(func(t *testing.T, cuts []byte, when uint16) {
		text, gaps := conversation(t)
		asked := int(when) % (len(text) - 3) // the last frame has to come yet
		first := func(from int) int {
			for !gaps[from] {
				from++
			}
			return from
		}

		var server serverConnection
		down := new(wire)
		server.Conn = down
		for rest, cuts, done := text, cuts, 0; len(rest) > 0; {
			n := min(cut(&cuts), len(rest))
			if done <= asked && asked < done+n { // before this write
				server.goAway()
				server.goAway()
				if at := goAwayIn(down.written.Bytes()); at >= 0 && at != done {
					t.Fatalf("written at %d, when %d had been", at, done)
				}
				asked = done
			}
			if m, err := server.Write(rest[:n]); m != n || err != nil {
				t.Fatalf("wrote %d of %d: %v", m, n, err)
			}
			rest, done = rest[n:], done+n
		}
		if at := inserted(t, down.written.Bytes(), text, gaps); at != first(asked) {
			t.Fatalf("asked at %d, it came at %d and not at %d", asked, at, first(asked))
		}

		var client clientConnection
		client.Conn = &wire{unread: text, cuts: cuts}
		asked = int(when) % (len(text) - 3)
		var got []byte
		told := -1
		for sizes := append([]byte(nil), cuts...); ; {
			if told < 0 && len(got) >= asked {
				client.goAway()
				client.goAway()
				told = len(got)
			}
			b := make([]byte, cut(&sizes))
			n, err := client.Read(b)
			got = append(got, b[:n]...)
			if err == io.EOF {
				break
			}
			if err != nil {
				t.Fatal(err)
			}
		}
		if told == len(text) { // it was all read in one go: too late for this one
			return
		}
		if at := inserted(t, got, text, gaps); at != first(told) {
			t.Fatalf("asked at %d, it came at %d and not at %d", told, at, first(told))
		}
	})
}

func goAwayIn(b []byte) int { return bytes.Index(b, goAwayFrame[:]) }

// Where the server has said GOAWAY itself, with a stream, ours must not follow.
func TestNoSecondGoAway(t *testing.T) {
	var b bytes.Buffer
	f := http2.NewFramer(&b, nil)
	if err := errors.Join(f.WriteSettings(), f.WriteGoAway(5, http2.ErrCodeNo, nil), f.WriteData(1, true, []byte("x"))); err != nil {
		t.Fatal(err)
	}
	var server serverConnection
	down := new(wire)
	server.Conn = down
	if _, err := server.Write(b.Bytes()); err != nil {
		t.Fatal(err)
	}
	server.goAway()
	if !bytes.Equal(down.written.Bytes(), b.Bytes()) {
		t.Error("the server said it twice")
	}
	var client clientConnection
	client.Conn = &wire{unread: b.Bytes(), cuts: []byte{20}}
	got := make([]byte, 1<<10)
	n, err := client.Read(got)
	if err != nil {
		t.Fatal(err)
	}
	client.goAway()
	for err == nil {
		var m int
		m, err = client.Read(got[n:])
		n += m
	}
	if !bytes.Equal(got[:n], b.Bytes()) {
		t.Errorf("the client read it twice: %x", got[:n])
	}
}

// A reader that waits for the server is woken, and a deadline of its own holds.
func TestReaderIsWoken(t *testing.T) {
	near, far := loopback(t)
	var client clientConnection
	client.Conn = near
	settings := []byte{0, 0, 0, 4, 0, 0, 0, 0, 0}
	if _, err := far.Write(settings); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 100)
	if n, err := client.Read(b); n != len(settings) || err != nil {
		t.Fatal(n, err)
	}
	time.AfterFunc(20*time.Millisecond, client.goAway)
	if n, err := client.Read(b); err != nil || !bytes.Equal(b[:n], goAwayFrame[:]) {
		t.Fatalf("%x, %v", b[:n], err)
	}
	if _, err := far.Write(settings); err != nil {
		t.Fatal(err)
	}
	if n, err := client.Read(b); n != len(settings) || err != nil {
		t.Fatalf("it reads no more: %v", err)
	}
	if err := client.SetDeadline(time.Now().Add(-time.Second)); err != nil {
		t.Fatal(err)
	}
	if _, err := client.Read(b); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("its deadline does not hold: %v", err)
	}
}

// long is a stream that goes on for as long as the client asks.
type long struct {
	healthpb.UnimplementedHealthServer
	check func(context.Context) error
}

func (l *long) Check(ctx context.Context, _ *healthpb.HealthCheckRequest) (*healthpb.HealthCheckResponse, error) {
	return &healthpb.HealthCheckResponse{}, l.check(ctx)
}

func (l *long) Watch(_ *healthpb.HealthCheckRequest, s grpc.ServerStreamingServer[healthpb.HealthCheckResponse]) error {
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case <-s.Context().Done():
			return nil
		case <-tick.C:
		}
		if err := s.Send(&healthpb.HealthCheckResponse{}); err != nil {
			return err
		}
	}
}

// dials are a client's connections to a server.
type dials struct {
	credentials.TransportCredentials
	made atomic.Int32
}

func (d *dials) ClientHandshake(ctx context.Context, authority string, conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	d.made.Add(1)
	return d.TransportCredentials.ClientHandshake(ctx, authority, conn)
}

func (d *dials) Clone() credentials.TransportCredentials { return d }

// listen serves until the test ends.
func listen(t *testing.T, creds credentials.TransportCredentials, check func(context.Context) error) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	server := grpc.NewServer(grpc.Creds(creds))
	healthpb.RegisterHealthServer(server, &long{check: check})
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = server.Serve(l)
	}()
	t.Cleanup(func() { server.Stop(); <-done })
	return l.Addr().String()
}

func connect(t *testing.T, address string, creds credentials.TransportCredentials) healthpb.HealthClient {
	t.Helper()
	conn, err := grpc.NewClient("passthrough:///"+address, grpc.WithTransportCredentials(creds), grpc.WithDisableRetry())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return healthpb.NewHealthClient(conn)
}

// How long the SVIDs of TestRotation live, and how many of such lives it takes.
// Certificates have whole seconds.
const shortLife, lives = 3 * time.Second, 3

// unexpiredPeer refuses, as the Policy does, a call on a connection whose SVID has
// ended.
func unexpiredPeer(ctx context.Context) error {
	p := interceptors.PeerFrom(ctx)
	if p.Proof == nil || !time.Now().Before(p.Expires) || p.Proof.Revoked() != nil {
		return status.Error(codes.Unauthenticated, "expired")
	}
	return nil
}

// Short SVIDs under load: no call fails, no stream breaks, and no connection
// serves calls for longer than the SVIDs that it was made with. On the server's
// side alone, for clients that know nothing of it; and on the client's.
func TestRotation(t *testing.T) {
	t.Parallel()
	const life = shortLife
	var all sync.WaitGroup
	defer all.Wait()
	for _, c := range []struct {
		name           string
		server, client time.Duration
		plain          string // who does not look after connections
	}{
		{"the client's SVID, by the server", time.Hour, life, "client"},
		{"the client's SVID, by the client", time.Hour, life, "server"},
		{"the server's SVID, by the client", life, time.Hour, "server"},
		{"both", life, life, ""},
	} {
		all.Go(func() {
			t.Run(c.name, func(t *testing.T) { rotate(t, c.server, c.client, c.plain) })
		})
	}
}

func rotate(t *testing.T, server, client time.Duration, plain string) {
	a := newAuthority(t, testDomain)
	source := func(path string, ttl time.Duration) *Source {
		s, err := a.SourceFor(ttl, path)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { s.Close() })
		return s
	}
	door := ServerCredentials(source("/server", server), nil)
	if plain == "server" {
		door = unguarded{door}
	}
	address := listen(t, door, unexpiredPeer)
	creds := ClientCredentials(source("/client", client), spiffeid.MatchMemberOf(testDomain), nil)
	if plain == "client" {
		creds = unguarded{creds}
	}
	count := &dials{TransportCredentials: creds}
	caller := connect(t, address, count)

	ctx, cancel := context.WithTimeout(t.Context(), lives*shortLife)
	defer cancel()
	var calls, messages atomic.Int64
	failed := make(chan error, 100)
	var work sync.WaitGroup
	for range 4 {
		work.Go(func() {
			stream, err := caller.Watch(t.Context(), &healthpb.HealthCheckRequest{})
			for err == nil && ctx.Err() == nil {
				_, err = stream.Recv()
				messages.Add(1)
			}
			if err != nil {
				failed <- fmt.Errorf("stream: %w", err)
			}
		})
		work.Go(func() {
			tick := time.NewTicker(time.Millisecond) // two cores, and others need them
			defer tick.Stop()
			for ctx.Err() == nil {
				<-tick.C
				if _, err := caller.Check(t.Context(), &healthpb.HealthCheckRequest{}); err != nil {
					failed <- fmt.Errorf("call: %w", err)
					return
				}
				calls.Add(1)
			}
		})
	}
	work.Wait()
	close(failed)
	for err := range failed {
		t.Error(err)
	}
	t.Logf("%d calls, %d messages, %d connections", calls.Load(), messages.Load(), count.made.Load())
	if n := count.made.Load(); n < lives || n > 20*lives {
		t.Errorf("%d connections in %d lives", n, lives)
	}
}

// unguarded are credentials whose connections are left alone.
type unguarded struct {
	credentials.TransportCredentials
}

func (u unguarded) ClientHandshake(ctx context.Context, authority string, conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	out, info, err := u.TransportCredentials.ClientHandshake(ctx, authority, conn)
	if c, ok := out.(*clientConnection); ok {
		out = c.alone()
	}
	return out, info, err
}

func (u unguarded) ServerHandshake(conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	out, info, err := u.TransportCredentials.ServerHandshake(conn)
	if c, ok := out.(*serverConnection); ok {
		out = c.alone()
	}
	return out, info, err
}

func (u unguarded) Clone() credentials.TransportCredentials { return u }

// alone is what is beneath a connection that nobody looks after any more.
func (c *connection) alone() net.Conn {
	c.proof.source.remove(c)
	c.mu.Lock()
	defer c.mu.Unlock()
	c.timer.Stop()
	return c.Conn
}

func BenchmarkServerWrite(b *testing.B) {
	for _, payload := range []int{64, 1 << 10, 16 << 10} {
		b.Run(fmt.Sprint(payload), func(b *testing.B) {
			b.ReportAllocs()
			var text bytes.Buffer
			f := http2.NewFramer(&text, nil)
			const frames = 32
			for range frames {
				if err := f.WriteData(1, false, make([]byte, payload)); err != nil {
					b.Fatal(err)
				}
			}
			var c serverConnection
			c.Conn = discard{}
			for b.Loop() {
				_, _ = c.Write(text.Bytes())
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/frames, "ns/frame")
		})
	}
}

type discard struct{ net.Conn }

func (discard) Write(b []byte) (int, error) { return len(b), nil }
