package identity

import (
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	configv1 "github.com/sluicegate/sluice/proto/gen/sluice/config/v1"
	workloadpb "github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"
)

// api is a Workload API that says what a test tells it to.
type api struct {
	workloadpb.UnimplementedSpiffeWorkloadAPIServer

	socket string
	server *grpc.Server
	served chan struct{}

	mu      sync.Mutex
	changed chan struct{} // closed and replaced with each change
	svids   *workloadpb.X509SVIDResponse
	keys    *workloadpb.JWTBundlesResponse
	err     error
}

func newAPI(t *testing.T) *api {
	t.Helper()
	dir, err := os.MkdirTemp("", "sluice") //nolint:usetesting // the name of a socket must be short
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return &api{socket: filepath.Join(dir, "agent.sock"), changed: make(chan struct{}), err: status.Error(codes.PermissionDenied, "no identity issued")}
}

func (a *api) start(t *testing.T) {
	t.Helper()
	l, err := net.Listen("unix", a.socket)
	if err != nil {
		t.Fatal(err)
	}
	server, served := grpc.NewServer(), make(chan struct{})
	workloadpb.RegisterSpiffeWorkloadAPIServer(server, a)
	a.server, a.served = server, served
	go func() {
		defer close(served)
		_ = server.Serve(l)
	}()
	t.Cleanup(func() { server.Stop(); <-served })
}

func (a *api) stop() { a.server.Stop(); <-a.served }

func (a *api) set(change func()) {
	a.mu.Lock()
	defer a.mu.Unlock()
	change()
	close(a.changed)
	a.changed = make(chan struct{})
}

// say has the API give out these identities, and bundles, from now on.
func (a *api) say(t *testing.T, own *Authority, federated []*Authority, svids ...*x509svid.SVID) {
	t.Helper()
	out := &workloadpb.X509SVIDResponse{FederatedBundles: make(map[string][]byte)}
	keys := &workloadpb.JWTBundlesResponse{Bundles: make(map[string][]byte)}
	for _, svid := range svids {
		chain, key, err := svid.MarshalRaw()
		if err != nil {
			t.Fatal(err)
		}
		out.Svids = append(out.Svids, &workloadpb.X509SVID{SpiffeId: svid.ID.String(), X509Svid: chain, X509SvidKey: key, Bundle: own.certificate.Raw})
	}
	for _, f := range federated {
		out.FederatedBundles[f.trustDomain.IDString()] = f.certificate.Raw
	}
	for _, f := range append(federated, own) {
		text, err := f.JWTBundle().Marshal()
		if err != nil {
			t.Fatal(err)
		}
		keys.Bundles[f.trustDomain.IDString()] = text
	}
	a.set(func() { a.svids, a.keys, a.err = out, keys, nil })
}

// watch sends what there is, now and after each change.
func (a *api) watch(ctx context.Context, send func() error) error {
	if md, _ := metadata.FromIncomingContext(ctx); len(md.Get("workload.spiffe.io")) != 1 {
		return status.Error(codes.InvalidArgument, "the security header is missing")
	}
	for {
		a.mu.Lock()
		err, changed := a.err, a.changed
		if err == nil {
			err = send()
		}
		a.mu.Unlock()
		if err != nil {
			return err
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return status.FromContextError(ctx.Err()).Err()
		}
	}
}

func (a *api) FetchX509SVID(_ *workloadpb.X509SVIDRequest, s grpc.ServerStreamingServer[workloadpb.X509SVIDResponse]) error {
	return a.watch(s.Context(), func() error { return s.Send(a.svids) })
}

func (a *api) FetchJWTBundles(_ *workloadpb.JWTBundlesRequest, s grpc.ServerStreamingServer[workloadpb.JWTBundlesResponse]) error {
	return a.watch(s.Context(), func() error { return s.Send(a.keys) })
}

func (a *api) config() *configv1.Identity {
	return fromAPI(&configv1.WorkloadAPI{Socket: "unix://" + a.socket})
}

func fromAPI(c *configv1.WorkloadAPI) *configv1.Identity {
	return &configv1.Identity{Source: &configv1.Identity_WorkloadApi{WorkloadApi: c}}
}

// renewals are what a source says of its renewals, in order.
type renewals chan error

func (r renewals) add(err error) { r <- err }

// wait waits for the next.
func (r renewals) wait(t *testing.T) error {
	t.Helper()
	select {
	case err := <-r:
		return err
	case <-time.After(20 * time.Second):
		t.Fatal("nothing was renewed")
		return nil
	}
}

var otherDomain = spiffeid.RequireTrustDomainFromString("other.test")

func TestWorkloadAPI(t *testing.T) {
	ours, other := newAuthority(t, testDomain), newAuthority(t, otherDomain)
	a := newAPI(t)
	first := issue(t, ours, "/gateway")
	a.say(t, ours, []*Authority{other}, first, issue(t, ours, "/second"))
	a.start(t)
	renewed := make(renewals, 100)
	t.Setenv("SPIFFE_ENDPOINT_SOCKET", "unix://"+a.socket)
	c := fromAPI(new(configv1.WorkloadAPI)) // the socket is the environment's
	c.Jwt = &configv1.JWTIdentity{Audiences: []string{"x"}}
	s, err := Open(t.Context(), c, renewed.add)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	serial := func() string { return svidOf(t, s).Certificates[0].SerialNumber.String() }
	is := func(svid *x509svid.SVID) bool { return serial() == svid.Certificates[0].SerialNumber.String() }
	if !is(first) || s.TrustDomain() != testDomain || s.Ready() != nil {
		t.Errorf("we are %s, ready: %v", svidOf(t, s).ID, s.Ready())
	}
	for _, authority := range []*Authority{ours, other} {
		if b, err := s.GetX509BundleForTrustDomain(authority.trustDomain); err != nil || !b.Equal(authority.Bundle()) {
			t.Errorf("bundle of %s: %v", authority.trustDomain, err)
		}
		if b, err := s.GetJWTBundleForTrustDomain(authority.trustDomain); err != nil || !b.Equal(authority.JWTBundle()) {
			t.Errorf("keys of %s: %v", authority.trustDomain, err)
		}
	}

	// A rotation, and the end of the federation.
	generation := s.Generation()
	second := issue(t, ours, "/gateway")
	a.say(t, ours, nil, second)
	for !is(second) || s.state().jwt[otherDomain] != nil {
		if err := renewed.wait(t); err != nil {
			t.Fatal(err)
		}
	}
	if s.Generation() == generation {
		t.Error("the generation is the same")
	}
	if _, err := s.GetX509BundleForTrustDomain(otherDomain); err == nil || !strings.Contains(err.Error(), "other.test") {
		t.Errorf("the federated bundle is still there: %v", err)
	}

	// The API goes away, and comes back: the identity stays until then.
	a.stop()
	err = renewed.wait(t)
	for err == nil { // of the change before, which came in two parts
		err = renewed.wait(t)
	}
	if !strings.Contains(err.Error(), "identity.workload_api: unix://"+a.socket) {
		t.Errorf("reported %v", err)
	}
	if !is(second) {
		t.Error("the identity went away with the API")
	}
	third := issue(t, ours, "/gateway")
	a.say(t, ours, nil, third)
	a.start(t)
	back := time.Now()
	for renewed.wait(t) != nil || !is(third) {
	}
	if took := time.Since(back); took > 5*time.Second { // far above what it takes: 1 s
		t.Errorf("it took %v to notice that the API is back", took)
	}

	// It has nothing for us any more: reported, and the last identity stays.
	a.set(func() { a.err = status.Error(codes.PermissionDenied, "no identity issued") })
	for {
		err := renewed.wait(t)
		if err != nil && strings.Contains(err.Error(), "registration entry") {
			break
		}
	}
	if !is(third) {
		t.Error("the identity went away with the entry")
	}
}

// Which of several, and what is done when it is not there any more.
func TestWorkloadAPIPicks(t *testing.T) {
	ours, other := newAuthority(t, testDomain), newAuthority(t, otherDomain)
	a := newAPI(t)
	a.say(t, ours, []*Authority{other}, issue(t, ours, "/first"), issue(t, ours, "/second"))
	a.start(t)
	renewed := make(renewals, 100)
	c := a.config()
	c.GetWorkloadApi().SpiffeId = "spiffe://sluice.test/second"
	s, err := Open(t.Context(), c, renewed.add)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if id := svidOf(t, s).ID; id.Path() != "/second" {
		t.Errorf("we are %s", id)
	}
	if _, err := s.GetJWTBundleForTrustDomain(testDomain); err == nil {
		t.Error("there are JWT keys that nobody asked for")
	}

	// It is gone, and so is the federation: the first is reported, the second done.
	a.say(t, ours, nil, issue(t, ours, "/first"))
	if err := renewed.wait(t); err == nil || !strings.Contains(err.Error(), "spiffe://sluice.test/first") {
		t.Errorf("reported %v", err)
	}
	if id := svidOf(t, s).ID; id.Path() != "/second" {
		t.Errorf("we are %s now", id)
	}
	if _, err := s.GetX509BundleForTrustDomain(otherDomain); err == nil {
		t.Error("a bundle that is gone is still in force")
	}
}

func TestWorkloadAPIErrors(t *testing.T) {
	ours := newAuthority(t, testDomain)
	for _, c := range []struct {
		name  string
		api   func(t *testing.T, a *api)
		spoil func(c *configv1.WorkloadAPI)
		want  []string
	}{
		{"no identity", func(t *testing.T, a *api) { a.start(t) }, nil,
			[]string{"no identity within 700ms from unix://", "no identity issued", "registration entry"}},
		{"no socket", func(*testing.T, *api) {}, nil, []string{"agent.sock", "no such file", "start the agent"}},
		{"nobody listens", func(t *testing.T, a *api) {
			l, err := net.ListenUnix("unix", &net.UnixAddr{Name: a.socket, Net: "unix"})
			if err != nil {
				t.Fatal(err)
			}
			l.SetUnlinkOnClose(false)
			l.Close()
		}, nil, []string{"connection refused", "nobody listens"}},
		{"it says nothing", func(t *testing.T, a *api) {
			l, err := net.Listen("unix", a.socket)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { l.Close() })
		}, nil, []string{"no identity within"}},
		{"expired", func(t *testing.T, a *api) {
			svid, err := ours.Issue("/gateway", -time.Second)
			if err != nil {
				t.Fatal(err)
			}
			a.say(t, ours, nil, svid)
			a.start(t)
		}, nil, []string{"expired"}},
		{"not that one", func(t *testing.T, a *api) {
			a.say(t, ours, nil, issue(t, ours, "/a"), issue(t, ours, "/b"))
			a.start(t)
		}, func(c *configv1.WorkloadAPI) { c.SpiffeId = "spiffe://sluice.test/gateway" },
			[]string{"no SVID of spiffe://sluice.test/gateway", "spiffe://sluice.test/a, spiffe://sluice.test/b", "spiffe_id"}},
		{"no bundle it can read", func(t *testing.T, a *api) {
			a.say(t, ours, nil, issue(t, ours, "/a"))
			a.set(func() { a.svids.FederatedBundles["spiffe://other.test"] = []byte("hello") })
			a.start(t)
		}, nil, []string{"x509"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			a := newAPI(t)
			c.api(t, a)
			cfg := a.config()
			cfg.GetWorkloadApi().Timeout = durationpb.New(700 * time.Millisecond)
			if c.spoil != nil {
				c.spoil(cfg.GetWorkloadApi())
			}
			s, err := Open(t.Context(), cfg, nil)
			if err == nil {
				s.Close()
				t.Fatal("no error")
			}
			for _, want := range append(c.want, "identity.workload_api", a.socket) {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("%q lacks %q", err, want)
				}
			}
		})
	}
}

func TestWorkloadAPIConfigurationErrors(t *testing.T) {
	t.Setenv("SPIFFE_ENDPOINT_SOCKET", "")
	for _, c := range []struct {
		name   string
		config *configv1.WorkloadAPI
		env    string
		want   string
	}{
		{"no socket", &configv1.WorkloadAPI{}, "", "identity.workload_api.socket: say where"},
		{"a path", &configv1.WorkloadAPI{Socket: "/run/agent.sock"}, "", "identity.workload_api.socket: \"/run/agent.sock\""},
		{"a host name", &configv1.WorkloadAPI{Socket: "tcp://agent:80"}, "", "identity.workload_api.socket"},
		{"a path in the environment", &configv1.WorkloadAPI{}, "/run/agent.sock", "SPIFFE_ENDPOINT_SOCKET"},
		{"no SPIFFE ID", &configv1.WorkloadAPI{Socket: "unix:///x", SpiffeId: "gateway"}, "", "identity.workload_api.spiffe_id: \"gateway\""},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Setenv("SPIFFE_ENDPOINT_SOCKET", c.env)
			if _, err := Open(t.Context(), fromAPI(c.config), nil); err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("%v lacks %q", err, c.want)
			}
		})
	}
}

// Whoever waits for an identity can be told to stop.
func TestWorkloadAPICancelled(t *testing.T) {
	a := newAPI(t)
	ctx, cancel := context.WithCancelCause(t.Context())
	stop := errors.New("terminated")
	time.AfterFunc(50*time.Millisecond, func() { cancel(stop) })
	if _, err := Open(ctx, a.config(), nil); !errors.Is(err, stop) {
		t.Errorf("%v", err)
	}
}
