package gateway

import (
	"encoding/binary"
	"fmt"
	"net"
	"strings"
	"sync"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/sluicegate/sluice/interceptors/config"
	"github.com/sluicegate/sluice/interceptors/identity"
	"github.com/sluicegate/sluice/proto/gen/inference"
)

// limited has a pool and budgets whose books can be checked.
const limited = base + `
pools: [{name: gpu, capacity: 1000, queue_length: 1000, models: [{model: "*"}]}]
budgets: [{name: day, tokens: 100000000}, {name: calls, requests: 1000000}]
`

// noAddress checks that nothing in a status says where the model server is.
func noAddress(t *testing.T, err error, address string) {
	t.Helper()
	_, port, _ := net.SplitHostPort(address)
	if text := status.Convert(err).Proto().String(); strings.Contains(text, "127.0.0.1") || strings.Contains(text, port) {
		t.Errorf("the status tells the address: %s", text)
	}
}

func TestModelServerThatIsNotThere(t *testing.T) {
	l := listen(t)
	address := l.Addr().String()
	_ = l.Close()
	for kind, call := range kinds {
		t.Run(kind, func(t *testing.T) {
			g := open(t, limited, address)
			_, _, err := call(ctx(t), g.client())
			expect(t, "the call", err, "Unavailable UPSTREAM_LOST")
			noAddress(t, err, address)
		})
	}
}

// The model server dies under many streams that are at work.
func TestModelServerDiesInMidStream(t *testing.T) {
	const streams = 200
	s := grpc.NewServer()
	l := listen(t)
	var began sync.WaitGroup
	began.Add(streams)
	dead := make(chan struct{})
	inference.RegisterGRPCInferenceServiceServer(s, &scripted{stream: func(ss inference.GRPCInferenceService_ModelStreamInferServer) error {
		r, err := ss.Recv()
		if err != nil {
			return err
		}
		if err := ss.Send(chunk(r.ModelName, r.Id, "word")); err != nil {
			return err
		}
		began.Done()
		<-dead
		return nil
	}})
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = s.Serve(l)
	}()
	g := open(t, limited, l.Addr().String())
	g.pool.abandoned = true
	var ended sync.WaitGroup
	var delivered sync.WaitGroup
	delivered.Add(streams)
	clients := []inference.GRPCInferenceServiceClient{g.client(), g.client(), g.client(), g.client()}
	for n := range streams {
		ended.Go(func() {
			ss, err := clients[n%len(clients)].ModelStreamInfer(ctx(t))
			if err == nil {
				err = ss.Send(ask("words", fmt.Sprint(n), "hello"))
			}
			if err == nil {
				_, err = ss.Recv()
			}
			delivered.Done()
			if err != nil {
				t.Errorf("before: %v", err)
				return
			}
			_, err = drainStream(ss)
			expect(t, "a stream", err, "Unavailable UPSTREAM_LOST")
			noAddress(t, err, l.Addr().String())
		})
	}
	began.Wait()
	delivered.Wait()
	go s.Stop() // closes the connections at once, and waits for the handlers
	ended.Wait()
	close(dead)
	<-done
	g.eventually("all permits are back", func() bool { return g.Guard().Pools().Snapshot()[0].InUse == 0 })
	g.nothingHeld()
	for _, a := range g.Guard().Budgets().Snapshot() {
		if a.Metric == "tokens" && a.Spent < 2*streams { // a word asked and a word said, each
			t.Errorf("%d tokens were charged, want at least %d", a.Spent, 2*streams)
		}
		if a.Metric == "requests" && a.Spent != streams {
			t.Errorf("%d requests were charged, want %d", a.Spent, streams)
		}
	}
}

// scripted is a model server of functions.
type scripted struct {
	inference.UnimplementedGRPCInferenceServiceServer
	stream func(inference.GRPCInferenceService_ModelStreamInferServer) error
}

func (s *scripted) ModelStreamInfer(ss inference.GRPCInferenceService_ModelStreamInferServer) error {
	return s.stream(ss)
}

// liar is a model server that answers each call with the frames of a function.
func liar(t *testing.T, answer func(p *liarConn, stream uint32)) string {
	t.Helper()
	l := listen(t)
	var wg sync.WaitGroup
	var mu sync.Mutex
	var conns []net.Conn
	wg.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			mu.Lock()
			conns = append(conns, conn)
			mu.Unlock()
			wg.Go(func() { lie(conn, answer) })
		}
	})
	t.Cleanup(func() {
		_ = l.Close()
		mu.Lock()
		for _, c := range conns {
			_ = c.Close()
		}
		mu.Unlock()
		wg.Wait()
	})
	return l.Addr().String()
}

// liarConn is a connection of a liar.
type liarConn struct {
	*http2.Framer
	conn  net.Conn
	block strings.Builder
	enc   *hpack.Encoder
}

func (p *liarConn) headers(stream uint32, end bool, fields ...string) {
	p.block.Reset()
	for n := 0; n < len(fields); n += 2 {
		_ = p.enc.WriteField(hpack.HeaderField{Name: fields[n], Value: fields[n+1]})
	}
	_ = p.WriteHeaders(http2.HeadersFrameParam{StreamID: stream, BlockFragment: []byte(p.block.String()), EndHeaders: true, EndStream: end})
}

func (p *liarConn) ok(stream uint32) {
	p.headers(stream, false, ":status", "200", "content-type", "application/grpc")
}

func lie(conn net.Conn, answer func(*liarConn, uint32)) {
	defer conn.Close()
	p := &liarConn{Framer: http2.NewFramer(conn, conn), conn: conn}
	p.enc = hpack.NewEncoder(&p.block)
	hello := make([]byte, len(preface))
	if _, err := conn.Read(hello); err != nil {
		return
	}
	_ = p.WriteSettings()
	for {
		f, err := p.ReadFrame()
		if err != nil {
			return
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
		case *http2.DataFrame: // the first message has come; tests send small ones
			if len(f.Data()) > 0 {
				answer(p, f.StreamID)
			}
		}
	}
}

func TestModelServersThatLie(t *testing.T) {
	unary := message(0, encode(t, reply("echo", "a", "hello")))
	stream := message(0, encode(t, chunk("echo", "a", "hello")))
	stranger := message(0, encode(t, chunk("echo", "nobody", "hello")))
	const invalid, lost, large = "Internal UPSTREAM_INVALID", "Unavailable UPSTREAM_LOST", "ResourceExhausted MESSAGE_TOO_LARGE"
	data := func(bodies ...[]byte) func(*liarConn, uint32) {
		return func(p *liarConn, s uint32) {
			p.ok(s)
			for _, b := range bodies {
				_ = p.WriteData(s, false, b)
			}
			p.headers(s, true, "grpc-status", "0")
		}
	}
	rst := func(after bool, code http2.ErrCode) func(*liarConn, uint32) {
		return func(p *liarConn, s uint32) {
			if after {
				p.ok(s)
			}
			_ = p.WriteRSTStream(s, code)
		}
	}
	for name, tc := range map[string]struct {
		answer func(*liarConn, uint32)
		unary  string // "" leaves it out
		stream string
	}{
		"an honest unary answer": {answer: data(unary), unary: "OK"},
		"an honest stream":       {answer: data(stream), stream: "OK"},
		"closes before headers":  {answer: func(p *liarConn, _ uint32) { _ = p.conn.Close() }, unary: lost, stream: lost},
		"closes after headers":   {answer: func(p *liarConn, s uint32) { p.ok(s); _ = p.conn.Close() }, unary: lost, stream: lost},
		"closes in mid-message":  {answer: func(p *liarConn, s uint32) { p.ok(s); _ = p.WriteData(s, false, stream[:9]); _ = p.conn.Close() }, unary: lost, stream: lost},
		"OK without a message": {answer: func(p *liarConn, s uint32) {
			p.headers(s, true, ":status", "200", "content-type", "application/grpc", "grpc-status", "0")
		}, unary: invalid},
		"OK without, after headers":   {answer: data(), unary: invalid},
		"two messages":                {answer: data(unary, unary), unary: invalid},
		"a message and a bad one":     {answer: data(unary, []byte{7, 0, 0, 0, 0}), unary: invalid},
		"garbage":                     {answer: data(message(0, []byte("\xff\xff\xff\xff"))), unary: invalid, stream: invalid},
		"garbage after a message":     {answer: data(stream, message(0, []byte("\xff\xff\xff\xff"))), stream: invalid},
		"bad flag":                    {answer: data(message(9, []byte("hello"))), unary: invalid, stream: invalid},
		"compressed without encoding": {answer: data(message(1, []byte("hello"))), unary: invalid, stream: invalid},
		"cut off":                     {answer: data(unary[:8]), unary: invalid, stream: invalid},
		"no trailers":                 {answer: func(p *liarConn, s uint32) { p.ok(s); _ = p.WriteData(s, true, unary) }, unary: invalid},
		"no trailers, stream":         {answer: func(p *liarConn, s uint32) { p.ok(s); _ = p.WriteData(s, true, stream) }, stream: invalid},
		"larger than the limit":       {answer: data(message(0, encode(t, reply("echo", "a", strings.Repeat("x", 5000))))), unary: large, stream: large},
		"says 1 GiB": {answer: func(p *liarConn, s uint32) {
			p.ok(s)
			_ = p.WriteData(s, false, binary.BigEndian.AppendUint32([]byte{0}, 1<<30))
		}, unary: large, stream: large},
		"an inference nobody asked for": {answer: data(stranger), stream: invalid},
		"one more after the end":        {answer: data(stream, stranger), stream: invalid},
		"not gRPC":                      {answer: func(p *liarConn, s uint32) { p.headers(s, true, ":status", "404", "content-type", "text/html") }, unary: invalid, stream: invalid},
		"not gRPC, with a text": {answer: func(p *liarConn, s uint32) {
			p.headers(s, false, ":status", "403")
			_ = p.WriteData(s, true, []byte("at 127.0.0.1"))
		}, unary: invalid, stream: invalid},
		"a proxy without a server": {answer: func(p *liarConn, s uint32) { p.headers(s, true, ":status", "503") }, unary: lost, stream: lost},
		"bad status": {answer: func(p *liarConn, s uint32) {
			p.headers(s, true, ":status", "200", "content-type", "application/grpc", "grpc-status", "x")
		}, unary: invalid, stream: invalid},
		"headers twice":       {answer: func(p *liarConn, s uint32) { p.ok(s); p.ok(s) }, unary: invalid, stream: invalid},
		"reset":               {answer: rst(false, http2.ErrCodeInternal), unary: lost, stream: lost},
		"reset after headers": {answer: rst(true, http2.ErrCodeInternal), unary: lost, stream: lost},
		"refused":             {answer: rst(false, http2.ErrCodeRefusedStream), unary: lost, stream: lost},
		"cancelled":           {answer: rst(true, http2.ErrCodeCancel), unary: lost, stream: lost},
		"poses as a policy":   {answer: rst(false, http2.ErrCodeInadequateSecurity), unary: lost, stream: lost},
		"goes away": {answer: func(p *liarConn, s uint32) {
			p.ok(s)
			_ = p.WriteGoAway(0, http2.ErrCodeNo, []byte("127.0.0.1"))
			_ = p.conn.Close()
		}, unary: lost, stream: lost},
	} {
		for kind, want := range map[string]string{"unary": tc.unary, "stream": tc.stream} {
			if want == "" {
				continue
			}
			t.Run(name+"/"+kind, func(t *testing.T) {
				address := liar(t, tc.answer)
				g := open(t, limited+"messages: {max_bytes: 4096}", address)
				g.pool.abandoned = true
				_, _, err := kinds[kind](ctx(t), g.client())
				expect(t, kind, err, want)
				noAddress(t, err, address)
				g.eventually("the permit is back", func() bool { return g.Guard().Pools().Snapshot()[0].InUse == 0 })
			})
		}
	}
}

// The model server must prove the SPIFFE ID that is configured.
func TestModelServerOfAnotherIdentity(t *testing.T) {
	domain := spiffeid.RequireTrustDomainFromString("gate.test")
	authority, err := identity.NewAuthority(domain)
	if err != nil {
		t.Fatal(err)
	}
	source := func(path string) *identity.Source {
		s, err := authority.Source(path)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = s.Close() })
		return s
	}
	m, behind := modelServer(t, grpc.Creds(identity.ServerCredentials(source("/model"), nil)))
	for expected, want := range map[string]string{"/model": "OK", "/other": "Unavailable UPSTREAM_LOST"} {
		t.Run(expected, func(t *testing.T) {
			before := m.Seen()
			g := openWith(t, `
identity: {development: {trust_domain: gate.test}, rules: [{principals: ["spiffe://gate.test/client"], methods: [inference], models: ["*"]}]}
backends: [{name: model, dialect: DIALECT_TRITON, spiffe_id: "spiffe://gate.test`+expected+`"}]
`, config.Options{Source: source("/gateway")}, behind)
			c := g.client(grpc.WithTransportCredentials(identity.ClientCredentials(source("/client"), spiffeid.MatchAny(), nil)))
			_, err := c.ModelInfer(ctx(t), ask("echo", "a", "hello"))
			expect(t, "the call", err, want)
			noAddress(t, err, behind)
			if text := status.Convert(err).Proto().String(); strings.Contains(text, "spiffe:") {
				t.Errorf("the status tells identities: %s", text)
			}
			if seen := m.Seen() - before; (seen == 1) != (want == "OK") {
				t.Errorf("the model saw %d inferences", seen)
			}
		})
	}
}

// Whose word a status is.
func TestOfTransport(t *testing.T) {
	came := metadata.Pairs("content-type", "application/grpc")
	detailed, err := status.New(codes.Unavailable, "transport is closing").WithDetails(&errdetails.ErrorInfo{Reason: "R"})
	if err != nil {
		t.Fatal(err)
	}
	for name, tc := range map[string]struct {
		status          *status.Status
		header, trailer metadata.MD
		want            bool
	}{
		"nothing came":             {status.New(codes.Unavailable, "name resolver error: produced zero addresses"), nil, nil, true},
		"of no connection":         {status.New(codes.Unavailable, "last connection error: dial tcp 127.0.0.1:1"), nil, nil, true},
		"trailers alone":           {status.New(codes.Unavailable, "transport is closing"), nil, came, false},
		"headers, its own text":    {status.New(codes.Unavailable, "the GPU is gone"), came, nil, false},
		"headers, the transport's": {status.New(codes.Unavailable, "transport is closing"), came, nil, true},
		"with details":             {detailed, came, nil, false},
	} {
		if got := ofTransport(tc.status, tc.header, tc.trailer); got != tc.want {
			t.Errorf("%s: %v, want %v", name, got, tc.want)
		}
	}
}

// Every buffer is given back, whatever becomes of a call. The messages are large
// enough to be pooled, and read to their ends: what is left then is our own.
func TestBuffersAreGivenBack(t *testing.T) {
	const size = 9000
	long := strings.Repeat("x", size)
	for name, tc := range map[string]struct {
		config string
		edit   func(*inference.ModelInferRequest)
		answer func(method string, ss grpc.ServerStream) error
		want   map[string]string
	}{
		"allowed":         {want: map[string]string{"unary": "OK", "stream": "OK"}},
		"denied":          {config: "budgets: [{name: b, tokens: 10}]", want: map[string]string{"unary": "ResourceExhausted BUDGET_EXHAUSTED"}},
		"refused in band": {config: "budgets: [{name: b, tokens: 10}]", want: map[string]string{"stream": "OK"}},
		"output denied": {config: "inspect: {no_starter_rules: true, responses: true, rules: 'SecRule RESPONSE_ARGS \"@contains xxx\" \"id:100001,phase:4,deny\"'}",
			want: map[string]string{"unary": "PermissionDenied OUTPUT_REJECTED"}},
		"failed": {answer: func(string, grpc.ServerStream) error { return status.Error(codes.Internal, "no") },
			want: map[string]string{"unary": "Internal", "stream": "Internal"}},
		"answered twice": {answer: func(_ string, ss grpc.ServerStream) error {
			for range 2 {
				if err := ss.SendMsg(reply("echo", "a", long)); err != nil {
					return err
				}
			}
			return nil
		}, want: map[string]string{"unary": "Internal UPSTREAM_INVALID"}},
		"failed after an answer": {answer: func(method string, ss grpc.ServerStream) error {
			if err := ss.SendMsg(chunk("echo", "a", long)); err != nil {
				return err
			}
			return status.Error(codes.Internal, "no")
		}, want: map[string]string{"stream": "Internal"}},
		"answered a stranger": {answer: func(method string, ss grpc.ServerStream) error {
			return ss.SendMsg(chunk("echo", "stranger", long))
		}, want: map[string]string{"stream": "Internal UPSTREAM_INVALID"}},
	} {
		for kind, want := range tc.want {
			t.Run(name+"/"+kind, func(t *testing.T) {
				g := open(t, base+tc.config, script(t, func(method string, ss grpc.ServerStream) error {
					var b []byte
					if err := ss.RecvMsg(&b); err != nil {
						return err
					}
					if tc.answer != nil {
						return tc.answer(method, ss)
					}
					if method == modelStreamInfer {
						return ss.SendMsg(chunk("echo", "a", long))
					}
					return ss.SendMsg(reply("echo", "a", long))
				}))
				c := g.client()
				r := ask("echo", "a", long+" "+words(20), number("max_tokens", 20))
				var err error
				if kind == "unary" {
					_, err = c.ModelInfer(ctx(t), r)
				} else {
					var s inference.GRPCInferenceService_ModelStreamInferClient
					if s, err = c.ModelStreamInfer(ctx(t)); err == nil && s.Send(r) == nil && s.CloseSend() == nil {
						_, err = drainStream(s)
					}
				}
				expect(t, kind, err, want)
				if g.pool.taken.Load() == 0 {
					t.Error("no buffer was taken; the messages are too small")
				}
			})
		}
	}
}
