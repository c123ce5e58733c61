package main

import (
	"net"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/proto"

	"github.com/sluicegate/sluice/interceptors"
	"github.com/sluicegate/sluice/interceptors/config"
	"github.com/sluicegate/sluice/proto/gen/inference"
)

const service = "/inference.GRPCInferenceService/"

// BenchmarkChain is the chain with every policy over raw messages, without a
// network: a whole unary call (two messages), and one chunk of a stream, with its
// turn to be delivered.
func BenchmarkChain(b *testing.B) {
	for _, answers := range []bool{false, true} {
		name := "requests"
		if answers {
			name = "requests+responses"
		}
		cfg, err := everything("127.0.0.1:1", "", answers)
		if err != nil {
			b.Fatal(err)
		}
		guard, err := config.Build(cfg, nil, configOptions())
		if err != nil {
			b.Fatal(err)
		}
		defer guard.Close()
		for _, message := range []struct {
			name    string
			request *inference.ModelInferRequest
		}{{"unary-200B", text("words")}, {"unary-1MB", tensor(1 << 20)}} {
			b.Run(message.name+"/"+name, func(b *testing.B) { benchUnary(b, guard.Chain, message.request) })
		}
		b.Run("chunk/"+name, func(b *testing.B) { benchChunk(b, guard.Chain) })
	}
}

func begin(b *testing.B, chain *interceptors.Chain, method string) *interceptors.Call {
	call, err := chain.Begin(b.Context(), interceptors.CallInfo{
		FullMethod: service + method,
		Metadata:   metadata.MD{"user-agent": {"bench"}, "content-type": {"application/grpc"}},
	})
	if err != nil {
		b.Fatal(err)
	}
	return call
}

// request takes a message through the chain up to the model server.
func request(b *testing.B, call *interceptors.Call, data mem.BufferSlice) {
	e := interceptors.RawEnvelope(data)
	i, err := call.Request(e)
	if err != nil {
		b.Fatal(err)
	}
	if err := i.Wait(call.Context()); err != nil || !i.Hand() {
		b.Fatal("the request may not go on:", err)
	}
	e.Encode()
}

// response takes one through the chain to the caller.
func response(b *testing.B, call *interceptors.Call, data mem.BufferSlice) {
	e := interceptors.RawAnswer(data)
	if _, v, err := call.Response(e); err != nil || v != interceptors.Deliver {
		b.Fatal("the response is not delivered:", v, err)
	}
	e.Encode()
}

func encoded(b *testing.B, m proto.Message) mem.BufferSlice {
	data, err := proto.Marshal(m)
	if err != nil {
		b.Fatal(err)
	}
	return mem.BufferSlice{mem.SliceBuffer(data)}
}

func benchUnary(b *testing.B, chain *interceptors.Chain, r *inference.ModelInferRequest) {
	answer, err := backend{}.ModelInfer(b.Context(), r)
	if err != nil {
		b.Fatal(err)
	}
	in, out := encoded(b, r), encoded(b, answer)
	b.ReportAllocs()
	for b.Loop() {
		call := begin(b, chain, "ModelInfer")
		request(b, call, in)
		response(b, call, out)
		call.End(nil)
	}
}

func benchChunk(b *testing.B, chain *interceptors.Chain) {
	r := text("words")
	out := encoded(b, chunk(r, false))
	call := begin(b, chain, "ModelStreamInfer")
	defer call.End(nil)
	request(b, call, encoded(b, r))
	s := interceptors.NewStream(call, nowhere{})
	b.ReportAllocs()
	for b.Loop() {
		if err := s.Response(s.Answer(out)); err != nil {
			b.Fatal(err)
		}
	}
}

// nowhere is a door that leads nowhere.
type nowhere struct{ interceptors.Door }

func (nowhere) Deliver(e *interceptors.Envelope) error {
	e.Encode()
	return nil
}

// BenchmarkPath is the whole way from a client to the model server and back,
// all in this process: directly, through a bare pass-through, and through the
// gateway with every policy on. The report of the program has the ratios.
func BenchmarkPath(b *testing.B) {
	dir := b.TempDir()
	source, err := writeIdentities(dir)
	if err != nil {
		b.Fatal(err)
	}
	defer func() { _ = source.Close() }()
	for _, path := range []struct {
		name  string
		certs string
		serve func(l net.Listener, backend, certs string) (func(), error)
	}{
		{"direct", "", nil},
		{"passthrough", "", servePassThrough},
		{"sluice", "", sluiceOnRequests},
		{"passthrough-mtls", dir, servePassThrough},
		{"sluice-mtls", dir, sluiceOnRequests},
	} {
		l := listen(b)
		address := l.Addr().String()
		b.Cleanup(serveBackend(l))
		creds := source
		if path.certs == "" {
			creds = nil
		}
		if path.serve != nil {
			l := listen(b)
			stop, err := path.serve(l, address, path.certs)
			if err != nil {
				b.Fatal(err)
			}
			b.Cleanup(stop)
			address = l.Addr().String()
		}
		conn, err := dial(address, creds)
		if err != nil {
			b.Fatal(err)
		}
		b.Cleanup(func() { _ = conn.Close() })
		c := inference.NewGRPCInferenceServiceClient(conn)
		for _, s := range scenarios {
			b.Run(strings.ReplaceAll(s.name, " ", "-")+"/"+path.name, func(b *testing.B) {
				b.ReportAllocs()
				start := processTime(b)
				for b.Loop() {
					if err := s.call(b.Context(), c, s.request); err != nil {
						b.Fatal(err)
					}
				}
				b.ReportMetric(float64(processTime(b)-start)/float64(b.N), "cpu-ns/op")
			})
		}
	}
}

func sluiceOnRequests(l net.Listener, backend, certs string) (func(), error) {
	return serveGateway(l, backend, certs, false)
}

func listen(tb testing.TB) net.Listener {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		tb.Fatal(err)
	}
	return l
}

// processTime is the processor time that this process has used: client, proxy
// and model server together.
func processTime(b *testing.B) time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// What is measured must be what is meant: each proxy carries each scenario, and
// the figures become a report that says pass or fail.
func TestScenarios(t *testing.T) {
	dir := t.TempDir()
	source, err := writeIdentities(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = source.Close() }()
	l := listen(t)
	defer serveBackend(l)()
	for _, test := range []struct {
		name, certs string
		serve       func(l net.Listener, backend, certs string) (func(), error)
	}{
		{bare, "", servePassThrough},
		{sluice, "", sluiceOnRequests},
		{sluiceAnswers, "", func(l net.Listener, backend, certs string) (func(), error) {
			return serveGateway(l, backend, certs, true)
		}},
		{bare + overMTLS, dir, servePassThrough},
		{sluice + overMTLS, dir, sluiceOnRequests},
	} {
		t.Run(test.name, func(t *testing.T) {
			front := listen(t)
			stop, err := test.serve(front, l.Addr().String(), test.certs)
			if err != nil {
				t.Fatal(err)
			}
			defer stop()
			creds := source
			if test.certs == "" {
				creds = nil
			}
			conn, err := dial(front.Addr().String(), creds)
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = conn.Close() }()
			for _, s := range scenarios {
				if took, _, err := call(t.Context(), []client{inference.NewGRPCInferenceServiceClient(conn)}, s, 0); err != nil {
					t.Errorf("%s: %v", s.name, err)
				} else if len(took) != s.callers {
					t.Errorf("%s: %d calls of %d callers", s.name, len(took), s.callers)
				}
			}
		})
	}
}

func TestReport(t *testing.T) {
	r := newReport(options{rounds: 3})
	for _, f := range []struct {
		peer string
		cpu  float64
	}{{bare, 1}, {sluice, 1.2}, {bare, 2}, {sluice, 2.6}, {bare, 1}, {sluice, 1.4}} {
		r.add(scenarios[0].name, f.peer, figures{cpu: f.cpu, rate: 1, p50: 1, p99: 1})
		r.add(scenarios[3].name, f.peer, figures{cpu: f.cpu * f.cpu, rate: 1, p50: 1, p99: 1})
	}
	r.leftOut = []string{"envoy: not measured"}
	file := t.TempDir() + "/report.md"
	if err := r.write(file); err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	text := string(data)
	for _, want := range []string{
		"| pass | unary 200 B text, sluice: processor time, to the pass-through's | 1.30 | at most 1.3 |",
		"| FAIL | stream of 200 chunks, sluice: processor time, to the pass-through's | 1.69 | at most 1.3 |",
		"1.30 (1.20 to 1.40)", "- envoy: not measured",
	} {
		if !strings.Contains(text, want) {
			t.Errorf("the report has no %q:\n%s", want, text)
		}
	}
}
