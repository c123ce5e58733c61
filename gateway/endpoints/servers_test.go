package endpoints

import (
	"context"
	"errors"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	orcapb "github.com/cncf/xds/go/xds/data/orca/v3"
	"golang.org/x/net/dns/dnsmessage"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/orca"
	"google.golang.org/grpc/resolver"
	"google.golang.org/grpc/resolver/manual"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/emptypb"

	configv1 "github.com/sluicegate/sluice/proto/gen/sluice/config/v1"
)

// ready are the addresses that can take calls.
func ready(s *Set) (out []string) {
	for _, e := range s.Snapshot() {
		if e.Ready {
			out = append(out, e.Address)
		}
	}
	slices.Sort(out)
	return out
}

func TestAListOfAddresses(t *testing.T) {
	a, b := server(t, "127.0.0.1:0", nil), server(t, "127.0.0.1:0", nil)
	s := dial(t, &configv1.Backend{Name: "models", Addresses: []string{a, b}}, Options{})
	s.Connect()
	until(t, "both are ready", func() bool { return len(ready(s)) == 2 })
	got := make(map[string]int)
	for range 100 {
		at, err := invoke(t, s)
		if err != nil {
			t.Fatal(err)
		}
		got[at]++
	}
	if got[a] == 0 || got[b] == 0 {
		t.Errorf("went to %v", got)
	}
}

func TestTargets(t *testing.T) {
	a := server(t, "127.0.0.1:0", nil)
	path := t.TempDir() + "/s"
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	g := grpc.NewServer(grpc.UnknownServiceHandler(func(any, grpc.ServerStream) error { return status.Error(codes.Aborted, "here") }))
	done := make(chan struct{})
	go func() { defer close(done); _ = g.Serve(l) }()
	defer func() { g.Stop(); <-done }()
	for _, target := range []string{a, "dns:///" + a, "passthrough:///" + a} {
		if _, err := invoke(t, dial(t, &configv1.Backend{Address: target}, Options{})); err != nil {
			t.Errorf("%s: %v", target, err)
		}
	}
	if _, err := invoke(t, dial(t, &configv1.Backend{Address: "unix://" + path}, Options{})); status.Code(err) != codes.Aborted {
		t.Errorf("unix: %v", err)
	}
	if _, err := Dial(&configv1.Backend{Address: "dns:///a:b:c"}, Options{}); err == nil || !strings.HasPrefix(err.Error(), "address: ") {
		t.Errorf("a bad one: %v", err)
	}
}

// What a control plane says of balancing holds, if the program can ask one.
func TestControlPlane(t *testing.T) {
	backend := &configv1.Backend{Address: "xds:///models"}
	fails := func(why string) {
		t.Helper()
		if _, err := Dial(backend, Options{}, grpc.WithTransportCredentials(insecure.NewCredentials())); err == nil || !strings.HasPrefix(err.Error(), "address: ") || !strings.Contains(err.Error(), why) {
			t.Errorf("got %v, want %s", err, why)
		}
	}
	if resolver.Get("xds") == nil { // it cannot be taken back
		fails("xDS is not built into this program")
	}
	r := manual.NewBuilderWithScheme("xds")
	resolver.Register(failing{r})
	fails("bootstrap (GRPC_XDS_BOOTSTRAP is to name the file")
	resolver.Register(r)
	for _, name := range outsiders {
		t.Setenv(name, "True")
		fails("unset " + name)
		t.Setenv(name, "")
	}
	a, b := server(t, "127.0.0.1:0", nil), server(t, "127.0.0.1:0", nil)
	r.InitialState(resolver.State{Endpoints: at(a, b)})
	s := dial(t, backend, Options{})
	if where, err := invoke(t, s); err != nil || where != "" {
		t.Errorf("went to %q, %v", where, err)
	}
	if n := len(s.Snapshot()); n != 0 {
		t.Errorf("%d servers are known", n)
	}
	s.Unavailable("of a call before") // all is well now
	if s.Failure() != nil {
		t.Errorf("failure %v", s.Failure())
	}
}

// failing is a resolver that cannot be made.
type failing struct{ resolver.Builder }

func (failing) Build(resolver.Target, resolver.ClientConn, resolver.BuildOptions) (resolver.Resolver, error) {
	return nil, errors.New("bootstrap")
}

// names is a DNS server with one name.
type names struct {
	mu        sync.Mutex
	addresses [][4]byte
}

func (n *names) set(a ...[4]byte) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.addresses = a
}

func (n *names) serve(t *testing.T) string {
	t.Helper()
	conn, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		buf := make([]byte, 1500)
		for {
			k, from, err := conn.ReadFrom(buf)
			if err != nil {
				return
			}
			var m dnsmessage.Message
			if m.Unpack(buf[:k]) != nil || len(m.Questions) != 1 {
				continue
			}
			m.Response, m.Authoritative, m.Additionals = true, true, nil
			n.mu.Lock()
			for _, a := range n.addresses {
				if q := m.Questions[0]; q.Type == dnsmessage.TypeA && strings.HasPrefix(q.Name.String(), "models.test.") {
					m.Answers = append(m.Answers, dnsmessage.Resource{
						Header: dnsmessage.ResourceHeader{Name: q.Name, Type: q.Type, Class: q.Class, TTL: 5},
						Body:   &dnsmessage.AResource{A: a},
					})
				}
			}
			n.mu.Unlock()
			out, err := m.Pack()
			if err == nil {
				_, _ = conn.WriteTo(out, from)
			}
		}
	}()
	t.Cleanup(func() { _ = conn.Close(); <-done })
	return conn.LocalAddr().String()
}

// A headless service of Kubernetes is such a name: it has an address for each pod.
func TestServersBehindAName(t *testing.T) {
	a := server(t, "127.0.0.1:0", nil)
	_, port, _ := net.SplitHostPort(a)
	b := server(t, "127.0.0.2:"+port, nil)
	var n names
	n.set([4]byte{127, 0, 0, 1})
	s := dial(t, &configv1.Backend{Address: "dns://" + n.serve(t) + "/models.test:" + port}, Options{})
	s.Connect()
	until(t, "the first is ready", func() bool { return slices.Equal(ready(s), []string{a}) })
	// What tend does every intervalSeconds.
	again := func() bool { s.refresh(time.Now(), true); return true }
	n.set([4]byte{127, 0, 0, 1}, [4]byte{127, 0, 0, 2})
	until(t, "both are ready", func() bool { return again() && slices.Equal(ready(s), []string{a, b}) })
	n.set([4]byte{127, 0, 0, 2})
	until(t, "the second alone is ready", func() bool { return again() && slices.Equal(ready(s), []string{b}) })
	n.set()
	for range 5 {
		again()
		if at, err := invoke(t, s); err != nil || at != b {
			t.Fatalf("the name has no address: went to %q, %v", at, err)
		}
	}
}

func TestServersSayThatTheyAreReady(t *testing.T) {
	t.Run("gRPC health", func(t *testing.T) {
		h := health.NewServer()
		a := server(t, "127.0.0.1:0", nil, func(s *grpc.Server) { healthpb.RegisterHealthServer(s, h) })
		b := server(t, "127.0.0.1:0", func(ss grpc.ServerStream) error {
			if m, _ := grpc.MethodFromServerStream(ss); strings.Contains(m, "Health") {
				return status.Error(codes.Unimplemented, "what?")
			}
			return nil
		})
		h.SetServingStatus("", healthpb.HealthCheckResponse_NOT_SERVING)
		s := dial(t, &configv1.Backend{Name: "m", Addresses: []string{a, b}, Readiness: configv1.Readiness_READINESS_GRPC_HEALTH}, Options{})
		until(t, "the other is ready", func() bool { return slices.Contains(ready(s), b) })
		for range 20 {
			if at, err := invoke(t, s); err != nil || at != b {
				t.Fatalf("went to %q, %v", at, err)
			}
		}
		h.SetServingStatus("", healthpb.HealthCheckResponse_SERVING)
		until(t, "both are ready", func() bool { return len(ready(s)) == 2 })
		h.SetServingStatus("", healthpb.HealthCheckResponse_NOT_SERVING)
		until(t, "it is not ready any more", func() bool { return slices.Equal(ready(s), []string{b}) })
	})
	t.Run("ServerReady", func(t *testing.T) {
		answers := map[string]struct {
			ok    bool
			reply string
			err   error
		}{
			"yes":      {true, "\x08\x01", nil},
			"no":       {false, "", nil},
			"no, too":  {false, "\x08\x00", nil},
			"changed":  {false, "\x08\x01\x08\x00", nil},
			"what?":    {true, "", status.Error(codes.Unimplemented, "")},
			"an error": {false, "", status.Error(codes.Internal, "")},
		}
		for name, c := range answers {
			var asked atomic.Int32
			a := server(t, "127.0.0.1:0", func(ss grpc.ServerStream) error {
				if m, _ := grpc.MethodFromServerStream(ss); m != serverReady {
					return nil
				}
				asked.Add(1)
				if c.err != nil {
					return c.err
				}
				if err := ss.SendMsg(raw(c.reply)); err != nil {
					return err
				}
				return errAnswered
			})
			s := dial(t, &configv1.Backend{Address: a, Readiness: configv1.Readiness_READINESS_SERVER_READY}, Options{})
			_, err := invoke(t, s)
			if (err == nil) != c.ok || asked.Load() != 1 {
				t.Errorf("%s: got %v, asked %d times", name, err, asked.Load())
			}
		}
	})
}

// reporting is a server's load.
type reporting struct{}

func (reporting) ServerMetrics() *orca.ServerMetrics {
	return &orca.ServerMetrics{AppUtilization: .75, NamedMetrics: map[string]float64{"num_requests_waiting": 5, "num_requests_running": 12}}
}

func TestServersReportTheirLoad(t *testing.T) {
	want := Load{Waiting: 5, Running: 12, Utilization: .75}
	for name, c := range map[string]struct {
		config *configv1.LoadReports
		ask    bool
	}{
		"with an answer": {nil, true},
		"out of band":    {&configv1.LoadReports{Orca: true}, false},
		"by metrics":     {&configv1.LoadReports{}, false},
	} {
		t.Run(name, func(t *testing.T) {
			var address string
			if c.ask {
				report, err := proto.Marshal(&orcapb.OrcaLoadReport{ApplicationUtilization: .75, NamedMetrics: reporting{}.ServerMetrics().NamedMetrics})
				if err != nil {
					t.Fatal(err)
				}
				address = server(t, "127.0.0.1:0", func(ss grpc.ServerStream) error {
					ss.SetTrailer(metadata.Pairs(binaryKey, string(report)))
					return nil
				})
			} else {
				address = server(t, "127.0.0.1:0", nil, func(g *grpc.Server) {
					if err := orca.Register(g, orca.ServiceOptions{ServerMetricsProvider: reporting{}}); err != nil {
						t.Fatal(err)
					}
				})
			}
			if c.config != nil && !c.config.GetOrca() {
				h := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write([]byte(vllm)) }))
				defer h.Close()
				_, port, _ := net.SplitHostPort(strings.TrimPrefix(h.URL, "http://"))
				c.config.MetricsUrl = "http://{host}:" + port + "/metrics"
				c.config.Interval = durationpb.New(100 * time.Millisecond)
			}
			var told atomic.Pointer[Load]
			s := dial(t, &configv1.Backend{Address: address, Load: c.config}, Options{Loaded: func(l Load) { told.Store(&l) }})
			if c.ask {
				ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
				defer cancel()
				var trailer metadata.MD
				call := &Call{Context: ctx}
				if err := s.Invoke(call, "/test.Test/Call", new(emptypb.Empty), new(emptypb.Empty), grpc.Trailer(&trailer)); err != nil {
					t.Fatal(err)
				}
				call.Report(trailer)
				call.End(Served)
			}
			until(t, "the load is told", func() bool { l := told.Load(); return l != nil && *l == want })
			if got := s.Snapshot()[0].Reported; got != want {
				t.Errorf("got %+v", got)
			}
		})
	}
}
