package gateway

import (
	"bytes"
	"compress/gzip"
	"io"
	goruntime "runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	"github.com/sluicegate/sluice/proto/gen/inference"
)

func encode(t testing.TB, m proto.Message) []byte {
	t.Helper()
	b, err := proto.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func zip(b []byte) []byte {
	var out bytes.Buffer
	w := gzip.NewWriter(&out)
	_, _ = w.Write(b)
	_ = w.Close()
	return out.Bytes()
}

// What only a door that sees the bytes can refuse. Each refusal is Trailers-Only,
// with its reason, and nothing has reached the model server.
func TestWireRefusals(t *testing.T) {
	good := encode(t, ask("echo", "a", "hello"))
	with := func(b ...byte) []byte { return append(slices.Clone(good), b...) }
	one := func(b []byte) []byte { return message(0, b) }
	many := encode(t, ask("echo", "a", "hello", func(r *inference.ModelInferRequest) {
		r.Inputs[0].Contents.BytesContents = slices.Repeat([][]byte{{}}, 20_000)
	}))
	const limited = "messages: {max_bytes: 4096}"
	big := encode(t, ask("echo", "a", strings.Repeat("x", 4097)))
	fits := encode(t, ask("echo", "a", strings.Repeat("x", 4096-len(encode(t, ask("echo", "a", strings.Repeat("x", 4000))))+4000)))
	if len(fits) != 4096 {
		t.Fatalf("a message of %d bytes", len(fits))
	}
	const malformed, ambiguous, large = "InvalidArgument MESSAGE_MALFORMED", "InvalidArgument MESSAGE_AMBIGUOUS", "ResourceExhausted MESSAGE_TOO_LARGE"
	for name, tc := range map[string]struct {
		config string
		body   []byte
		open   bool // no half-close
		md     []string
		unary  bool // only there
		// grpc-go does not give back what has arrived of a call and was not read.
		abandoned bool
		want      string
	}{
		"good":                            {body: one(good), want: "OK"},
		"good, gzip":                      {body: message(1, zip(good)), md: []string{"grpc-encoding", "gzip"}, want: "OK"},
		"gzip is announced and not used":  {body: one(good), md: []string{"grpc-encoding", "gzip"}, want: "OK"},
		"of the full size":                {config: limited, body: one(fits), want: "OK"},
		"not protobuf":                    {body: one([]byte("\xff\xff\xff")), want: malformed},
		"cut off":                         {body: one(good[:len(good)-1]), want: malformed},
		"bad UTF-8":                       {body: one([]byte("\x0a\x01\xff")), want: malformed},
		"model twice":                     {body: one(with(0x0a, 1, 'x')), want: ambiguous},
		"unknown field":                   {body: one(with(0xf8, 0x7f, 1)), want: ambiguous},
		"overlong varint":                 {body: one(append([]byte{0x0a, 0x84, 0x00, 'e', 'c', 'h', 'o'}, good[6:]...)), want: ambiguous},
		"group":                           {body: one(with(protowire.AppendTag(nil, 100, protowire.StartGroupType)[0], 0x06, 0xa4, 0x06)), want: ambiguous},
		"wrong wire type":                 {body: one(with(0x08, 1)), want: ambiguous},
		"too many fields":                 {body: one(many), want: large},
		"too large":                       {abandoned: true, config: limited, body: one(big), want: large},
		"too large, by what it says":      {body: []byte{0, 0xff, 0xff, 0xff, 0xff}, open: true, want: large},
		"too large when decompressed":     {config: limited, body: message(1, zip(big)), md: []string{"grpc-encoding", "gzip"}, want: large},
		"gzip bomb":                       {body: message(1, zip(make([]byte, 8<<20))), md: []string{"grpc-encoding", "gzip"}, want: large},
		"not gzip":                        {body: message(1, good), md: []string{"grpc-encoding", "gzip"}, want: malformed},
		"gzip cut off":                    {body: message(1, zip(good)[:20]), md: []string{"grpc-encoding", "gzip"}, want: malformed},
		"gzip and then something":         {body: message(1, append(zip(good), "more"...)), md: []string{"grpc-encoding", "gzip"}, want: malformed},
		"compressed, without an encoding": {body: message(1, zip(good)), want: malformed},
		"compressed, as it is":            {body: message(1, good), md: []string{"grpc-encoding", "identity"}, want: malformed},
		"flag 2":                          {body: message(2, good), want: malformed},
		"prefix cut off":                  {body: one(good)[:3], want: malformed},
		"message cut off":                 {abandoned: true, body: one(good)[:20], want: malformed},
		"message cut off after prefix":    {body: one(good)[:5], want: malformed},
		"no message":                      {body: nil, unary: true, want: malformed},
		"two messages":                    {abandoned: true, body: append(one(good), one(good)...), unary: true, want: malformed},
		"half a second message":           {body: append(one(good), 0, 0), unary: true, want: malformed},
		"silent":                          {config: "listener: {address: x, first_message_timeout: 0.05s}", open: true, want: "DeadlineExceeded MESSAGE_TIMEOUT"},
		"silent in mid-message":           {abandoned: true, config: "listener: {address: x, first_message_timeout: 0.05s}", body: one(good)[:20], open: true, want: "DeadlineExceeded MESSAGE_TIMEOUT"},
		"never ends":                      {config: "listener: {address: x, first_message_timeout: 0.05s}", body: one(good), open: true, unary: true, want: "DeadlineExceeded MESSAGE_TIMEOUT"},
		"unknown encoding":                {body: one(good), md: []string{"grpc-encoding", "snappy"}, want: "Unimplemented ENCODING_UNSUPPORTED"},
		"an encoding nobody knows":        {body: one(good), md: []string{"grpc-encoding", "rot13"}, want: "Unimplemented"}, // grpc-go answers before any handler runs, and so without a reason
	} {
		t.Run(name, func(t *testing.T) {
			var seen atomic.Int64
			g := open(t, base+tc.config, script(t, func(method string, ss grpc.ServerStream) error {
				seen.Add(1)
				return answerOne(method, ss)
			}))
			g.pool.abandoned = tc.abandoned
			for _, path := range []string{modelInfer, modelStreamInfer} {
				if tc.unary && path != modelInfer {
					continue
				}
				before := seen.Load()
				e := g.raw().call(path, !tc.open, tc.body, tc.md...)
				expect(t, path, e.err, tc.want)
				if tc.want == "OK" {
					continue
				}
				if !e.trailersOnly {
					t.Errorf("%s: the refusal came after headers", path)
				}
				if seen.Load() != before {
					t.Errorf("%s: it reached the model server", path)
				}
			}
		})
	}
}

// A compressed message costs what it may become, at most, and not what it could.
func TestBombsCostLittle(t *testing.T) {
	const bombs, size = 32, 16 << 20
	_, behind := modelServer(t)
	g := open(t, base+"messages: {max_bytes: 1073741824}", behind)
	bomb := message(1, zip(make([]byte, size)))
	if len(bomb) > size/900 {
		t.Fatalf("a bomb of %d bytes", len(bomb))
	}
	var peers []*peer
	for range bombs {
		peers = append(peers, g.raw())
	}
	var before, after goruntime.MemStats
	goruntime.ReadMemStats(&before)
	var wg sync.WaitGroup
	for _, p := range peers {
		wg.Go(func() {
			e := p.call(modelInfer, true, bomb, "grpc-encoding", "gzip")
			expect(t, "bomb", e.err, "ResourceExhausted MESSAGE_TOO_LARGE")
		})
	}
	wg.Wait()
	goruntime.ReadMemStats(&after)
	// All that was ever allocated: 1 MiB each, what grows on the way there, and the calls.
	if grown := (after.TotalAlloc - before.TotalAlloc) >> 20; grown > bombs*size>>20/4 {
		t.Errorf("%d MiB were allocated for bombs of %d MiB", grown, bombs*size>>20)
	} else {
		t.Logf("%d MiB were allocated for bombs of %d MiB", grown, bombs*size>>20)
	}
}

// A message that compresses well and is small may pass whatever the ratio.
func TestSmallMessagesMayCompressWell(t *testing.T) {
	_, behind := modelServer(t)
	g := open(t, base, behind)
	r := ask("echo", "a", strings.Repeat("a", 900<<10))
	out, err := g.client().ModelInfer(ctx(t), r, grpc.UseCompressor("gzip"))
	if err != nil || len(out.GetRawOutputContents()[0]) != 900<<10+4 {
		t.Errorf("got %v", err)
	}
}

// The refusals that the chain makes, as the wire has them.
func TestRefusalsAreTrailersOnly(t *testing.T) {
	for name, tc := range map[string]struct {
		config   string
		path     string
		edit     func(*inference.ModelInferRequest)
		before   int // calls that go well
		pushback string
		want     string
	}{
		"unknown method":    {path: "/inference.GRPCInferenceService/Nonsense", want: "Unimplemented METHOD_UNKNOWN"},
		"management":        {path: "/inference.GRPCInferenceService/RepositoryModelLoad", want: "Unauthenticated IDENTITY_MISSING"},
		"model":             {config: "pools: [{name: p, capacity: 1, models: [{model: x}]}]", path: modelInfer, want: "OK"},
		"rate":              {config: "budgets: [{name: r, requests: 1, window: 3600s}]", path: modelInfer, before: 1, pushback: "positive", want: "ResourceExhausted RATE_EXCEEDED"},
		"budget":            {config: "budgets: [{name: b, tokens: 10}]", path: modelInfer, edit: number("max_tokens", 20), pushback: "-1", want: "ResourceExhausted BUDGET_EXHAUSTED"},
		"unary by stream":   {path: modelStreamInfer, want: "OK"},
		"path with a query": {path: modelInfer + "?x", want: "Unimplemented METHOD_UNKNOWN"},
	} {
		t.Run(name, func(t *testing.T) {
			_, behind := modelServer(t)
			g := open(t, base+tc.config, behind)
			p := g.raw()
			r := ask("echo", "a", "hello")
			if tc.edit != nil {
				tc.edit(r)
			}
			good := message(0, encode(t, r))
			for range tc.before {
				expect(t, "before", p.call(tc.path, true, good).err, "OK")
			}
			e := p.call(tc.path, true, good)
			expect(t, "the call", e.err, tc.want)
			if tc.want == "OK" {
				return
			}
			if !e.trailersOnly {
				t.Error("it came after headers")
			}
			got := e.trailer["grpc-retry-pushback-ms"]
			if ms, err := strconv.Atoi(got); err == nil && ms > 0 {
				got = "positive"
			}
			if got != tc.pushback {
				t.Errorf("pushback %q, want %q", got, tc.pushback)
			}
		})
	}
}

// grpc-go's own client obeys the pushback: its policy would wait an hour before
// it tries again, the rate says that it may at once.
func TestPushbackIsObeyed(t *testing.T) {
	m, behind := modelServer(t)
	g := open(t, base+"budgets: [{name: r, requests: 1, window: 0.1s}]", behind)
	conn := g.dialRetrying(`{"methodConfig": [{"name": [{}], "retryPolicy": {"maxAttempts": 5,
		"initialBackoff": "3600s", "maxBackoff": "3600s", "backoffMultiplier": 1, "retryableStatusCodes": ["RESOURCE_EXHAUSTED"]}}]}`)
	c := inference.NewGRPCInferenceServiceClient(conn)
	for range 3 {
		if _, err := c.ModelInfer(ctx(t), ask("echo", "a", "hello")); err != nil {
			t.Fatal(err)
		}
	}
	if m.Seen() != 3 {
		t.Errorf("the model saw %d inferences, want 3", m.Seen())
	}
}

func (g *gate) dialRetrying(policy string) *grpc.ClientConn {
	g.t.Helper()
	conn, err := grpc.NewClient(g.address, insecureTransport, grpc.WithDefaultServiceConfig(policy))
	if err != nil {
		g.t.Fatal(err)
	}
	g.t.Cleanup(func() { _ = conn.Close() })
	return conn
}

// fed is a call's bytes, for the fuzzer.
type fed struct {
	wire
	b        []byte
	encoding string
}

func (f *fed) RecvCompress() string { return f.encoding }

func (f *fed) ReadMessageHeader(p []byte) error {
	n := copy(p, f.b)
	f.b = f.b[n:]
	switch {
	case n == 0:
		return io.EOF
	case n < len(p):
		return io.ErrUnexpectedEOF
	}
	return nil
}

func (f *fed) Read(n int) (mem.BufferSlice, error) {
	if n > len(f.b) {
		return nil, io.ErrUnexpectedEOF
	}
	b := f.b[:n]
	f.b = f.b[n:]
	return mem.BufferSlice{mem.SliceBuffer(b)}, nil
}

// Whatever the bytes are: no panic, no message over the limit, no buffer left.
func FuzzReceive(f *testing.F) {
	f.Add(message(0, []byte("hello")), false)
	f.Add(append(message(1, zip([]byte("hello"))), message(1, zip(make([]byte, 5000)))...), true)
	f.Add([]byte{0, 0xff, 0xff, 0xff, 0xff}, false)
	f.Add([]byte{2, 0, 0, 0, 0}, true)
	f.Fuzz(func(t *testing.T, b []byte, compressed bool) {
		pool := newCountingPool()
		r := receiver{wire: &fed{b: b}, limit: 4096, pool: pool}
		if compressed {
			r.wire.(*fed).encoding = "gzip"
		}
		for {
			e, err := r.message()
			if err != nil {
				break
			}
			if n := e.Size(); n > r.limit {
				t.Errorf("a message of %d bytes", n)
			}
			e.Release()
		}
		if n := pool.out.Load(); n != 0 {
			t.Errorf("%d buffers were not given back", n)
		}
	})
}
