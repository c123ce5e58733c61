package endpoints

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/balancer"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/resolver"
	"google.golang.org/grpc/resolver/dns"
	"google.golang.org/protobuf/types/known/emptypb"

	configv1 "github.com/sluicegate/sluice/proto/gen/sluice/config/v1"
)

func TestMain(m *testing.M) {
	dns.SetMinResolutionInterval(time.Millisecond)
	goleak.VerifyTestMain(m)
}

// fakeConn is grpc-go, as far as a Set sees it.
type fakeConn struct {
	balancer.ClientConn
	conns    map[string]*fakeSubConn
	resolved atomic.Int32
	now      atomic.Pointer[balancer.State]
}

type fakeSubConn struct {
	balancer.SubConn
	address string
	follow  func(balancer.SubConnState)
	left    bool
}

func (s *fakeSubConn) Connect()  {}
func (s *fakeSubConn) Shutdown() { s.left = true }

func (c *fakeConn) NewSubConn(at []resolver.Address, o balancer.NewSubConnOptions) (balancer.SubConn, error) {
	s := &fakeSubConn{address: at[0].Addr, follow: o.StateListener}
	c.conns[s.address] = s
	return s, nil
}
func (c *fakeConn) UpdateState(s balancer.State)          { c.now.Store(&s) }
func (c *fakeConn) ResolveNow(resolver.ResolveNowOptions) { c.resolved.Add(1) }
func (c *fakeConn) pick(call *Call) (string, error)       { return pickFrom(c.now.Load().Picker, call) }
func (c *fakeConn) ready(addresses ...string)             { c.all(connectivity.Ready, addresses...) }

func (c *fakeConn) is(address string, s connectivity.State) {
	c.conns[address].follow(balancer.SubConnState{ConnectivityState: s})
}

func (c *fakeConn) all(s connectivity.State, addresses ...string) {
	for _, a := range addresses {
		c.is(a, s)
	}
}

func pickFrom(p balancer.Picker, call *Call) (string, error) {
	r, err := p.Pick(balancer.PickInfo{Ctx: call})
	if err != nil {
		return "", err
	}
	return r.SubConn.(*fakeSubConn).address, nil
}

// newSet makes a set without a network. What it is closed with stops tend.
func newSet(t testing.TB, c *configv1.Backend, addresses ...string) (*Set, *fakeConn) {
	t.Helper()
	cc := &fakeConn{conns: make(map[string]*fakeSubConn)}
	s := &Set{config: c, outliers: newOutliers(c.GetOutliers()), interval: defaultInterval, log: slog.New(slog.DiscardHandler)}
	s.open(cc)
	if err := s.update(at(addresses...)); err != nil {
		t.Fatal(err)
	}
	cc.ready(addresses...)
	t.Cleanup(s.close)
	return s, cc
}

func at(addresses ...string) (out []resolver.Endpoint) {
	for _, a := range addresses {
		out = append(out, resolver.Endpoint{Addresses: []resolver.Address{{Addr: a}}})
	}
	return out
}

func call(sequence ...string) *Call {
	c := &Call{Context: context.Background()}
	if len(sequence) > 0 {
		c.Sequence = sequence[0]
	}
	return c
}

// of finds a server.
func (s *Set) of(address string) *endpoint {
	s.mu.Lock()
	defer s.mu.Unlock()
	i := slices.IndexFunc(s.endpoints, func(e *endpoint) bool { return e.address == address })
	return s.endpoints[i]
}

// dial makes a set of real servers.
func dial(t *testing.T, c *configv1.Backend, o Options) *Set {
	t.Helper()
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	s, err := Dial(c, o, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	return s
}

// errAnswered says that the answer was sent.
var errAnswered = errors.New("answered")

// server runs a gRPC server that answers any unary call with nothing; f may be nil.
func server(t *testing.T, address string, f func(ss grpc.ServerStream) error, register ...func(*grpc.Server)) string {
	t.Helper()
	l, err := net.Listen("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	s := grpc.NewServer(grpc.UnknownServiceHandler(func(_ any, ss grpc.ServerStream) error {
		if err := ss.RecvMsg(new(emptypb.Empty)); err != nil && err != io.EOF {
			return err
		}
		if f != nil {
			if err := f(ss); errors.Is(err, errAnswered) {
				return nil
			} else if err != nil {
				return err
			}
		}
		return ss.SendMsg(new(emptypb.Empty))
	}))
	for _, r := range register {
		r(s)
	}
	done := make(chan struct{})
	go func() { defer close(done); _ = s.Serve(l) }()
	t.Cleanup(func() { s.Stop(); <-done })
	return l.Addr().String()
}

// invoke makes a call, and says where it went.
func invoke(t *testing.T, s *Set) (string, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	c := &Call{Context: ctx}
	c.Hold(1)
	err := s.Invoke(c, "/test.Test/Call", new(emptypb.Empty), new(emptypb.Empty))
	c.End(Served)
	return c.Address(), err
}

// until waits for something that other goroutines bring about.
func until(t *testing.T, what string, ok func() bool) {
	t.Helper()
	timeout := time.NewTimer(20 * time.Second)
	defer timeout.Stop()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for !ok() {
		select {
		case <-tick.C:
		case <-timeout.C:
			t.Fatalf("this did not come about: %s", what)
		}
	}
}

// raw is an answer of these bytes.
func raw(b string) *emptypb.Empty {
	m := new(emptypb.Empty)
	m.ProtoReflect().SetUnknown([]byte(b))
	return m
}
