package gateway

import (
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	clusterpb "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	corepb "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	routepb "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	tlspb "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/resolver"
	"google.golang.org/grpc/xds"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/sluicegate/sluice/gateway/endpoints"
	"github.com/sluicegate/sluice/interceptors/config"
	"github.com/sluicegate/sluice/interceptors/identity"
	"github.com/sluicegate/sluice/proto/gen/inference"
	adminv1 "github.com/sluicegate/sluice/proto/gen/sluice/admin/v1"
	"github.com/sluicegate/sluice/test/controlplane"
)

// plane is a control plane that knows the name "models", and that gateways ask from now on.
func plane(t *testing.T) *controlplane.Plane {
	t.Helper()
	p := controlplane.Start(t, "models")
	r, err := xds.NewXDSResolverWithConfigForTesting(p.Bootstrap())
	if err != nil {
		t.Fatal(err)
	}
	resolver.Register(r)
	return p
}

// identities makes identities of one trust domain, gate.test.
func identities(t *testing.T) func(path string) *identity.Source {
	t.Helper()
	authority, err := identity.NewAuthority(spiffeid.RequireTrustDomainFromString("gate.test"))
	if err != nil {
		t.Fatal(err)
	}
	return func(path string) *identity.Source {
		t.Helper()
		s, err := authority.SourceFor(time.Hour, path)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = s.Close() })
		return s
	}
}

const controlled = `
identity: {development: {trust_domain: gate.test}, rules: [{principals: ["spiffe://gate.test/client"], methods: [inference], models: ["*"]}]}
backends: [{name: model, dialect: DIALECT_TRITON, spiffe_id: "spiffe://gate.test/models/*", address: "xds:///models"}]
pools: [{name: gpu, capacity: 1000, queue_length: 1000, models: [{model: "*"}]}]
budgets: [{name: day, tokens: 100000000}, {name: calls, requests: 1000000}]
`

// Servers come, go and move, and the control plane goes and comes back, while calls
// run: none fails, each server has proved who it is, and the books balance.
func TestXDSServersComeAndGo(t *testing.T) {
	p, source := plane(t), identities(t)
	creds := func(path string) grpc.ServerOption {
		return grpc.Creds(identity.ServerCredentials(source(path), nil))
	}
	a, first := modelServer(t, creds("/models/a"))
	b, second := modelServer(t, creds("/models/b"))
	c, third := modelServer(t, creds("/models/c"))
	p.Servers(first)
	g := openWith(t, controlled, config.Options{Source: source("/gateway")})
	g.pool.abandoned = true
	stop := g.load(8, grpc.WithTransportCredentials(identity.ClientCredentials(source("/client"), spiffeid.MatchAny(), nil)))
	asked := func(what string, seen func() int64) {
		t.Helper()
		before := seen()
		g.eventually(what, func() bool { return seen() > before+50 })
	}
	quiet := func(what string, seen, others func() int64) {
		t.Helper()
		g.eventually(what, func() bool {
			before := seen()
			asked("calls go on", others)
			return seen() == before
		})
	}
	asked("the first is asked", a.Seen)
	p.Servers(first, second)
	asked("one that came is asked", b.Seen)
	p.Servers(second)
	quiet("one that went is asked no more", a.Seen, b.Seen)
	p.Servers(third)
	asked("all moved", c.Seen)
	quiet("and none is left behind", b.Seen, c.Seen)
	p.Stop()
	asked("calls go on without a control plane", c.Seen)
	p.Servers(first)
	p.Run()
	asked("it is listened to again", a.Seen)
	quiet("as before", c.Seen, a.Seen)
	ok, failed, errs := stop()
	if failed != 0 || ok < 200 {
		t.Errorf("%d calls were served, %d failed: %v", ok, failed, errs[:min(3, len(errs))])
	}
	if got := g.charged(); got != ok {
		t.Errorf("%d were charged, %d were served", got, ok)
	}
}

// Whatever a control plane says of TLS, a server has to prove to us who it is.
func TestXDSDoesNotWeakenIdentity(t *testing.T) {
	socket := func(name string, m proto.Message) func(*clusterpb.Cluster) {
		return func(c *clusterpb.Cluster) {
			a, err := anypb.New(m)
			if err != nil {
				t.Fatal(err)
			}
			c.TransportSocket = &corepb.TransportSocket{Name: name, ConfigType: &corepb.TransportSocket_TypedConfig{TypedConfig: a}}
		}
	}
	source := identities(t)
	for name, tls := range map[string]func(*clusterpb.Cluster){
		"nothing is said": nil,
		"another authority is to be trusted": socket("envoy.transport_sockets.tls", &tlspb.UpstreamTlsContext{CommonTlsContext: &tlspb.CommonTlsContext{
			ValidationContextType: &tlspb.CommonTlsContext_ValidationContext{ValidationContext: &tlspb.CertificateValidationContext{
				CaCertificateProviderInstance: &tlspb.CertificateProviderPluginInstance{InstanceName: controlplane.Authority},
			}},
		}}),
	} {
		for who, c := range map[string]struct {
			creds []grpc.ServerOption
			want  string
		}{
			"who it should be": {[]grpc.ServerOption{grpc.Creds(identity.ServerCredentials(source("/models/a"), nil))}, "OK"},
			"somebody else":    {[]grpc.ServerOption{grpc.Creds(identity.ServerCredentials(source("/other"), nil))}, "Unavailable UPSTREAM_LOST"},
			"of another trust domain": {[]grpc.ServerOption{grpc.Creds(identity.ServerCredentials(identities(t)("/models/a"), nil))},
				"Unavailable UPSTREAM_LOST"},
			"in plaintext": {nil, "Unavailable UPSTREAM_LOST"},
		} {
			t.Run(name+", "+who, func(t *testing.T) {
				p := plane(t)
				p.Cluster = tls
				m, address := modelServer(t, c.creds...)
				p.Servers(address)
				g := openWith(t, controlled, config.Options{Source: source("/gateway")})
				client := g.client(grpc.WithTransportCredentials(identity.ClientCredentials(source("/client"), spiffeid.MatchAny(), nil)))
				for range 3 {
					_, err := client.ModelInfer(ctx(t), ask("echo", "a", "hello"))
					expect(t, "ModelInfer", err, c.want)
					noAddress(t, err, address)
				}
				if seen := m.Seen() > 0; seen != (c.want == "OK") {
					t.Errorf("the server was asked: %v", seen)
				}
			})
		}
	}
}

// A name that the control plane does not know, or knows no servers for, is no model
// server that can be reached; operators are told why.
func TestXDSNamesNothing(t *testing.T) {
	text := strings.Replace(base, "methods: [", "methods: [/sluice.admin.v1.EndpointsService/ListEndpoints, ", 1) +
		"listener: {address: x, admin_api: true}\n"
	for name, tc := range map[string]struct {
		target, why string
		gone        bool
	}{
		"a name that is not known":          {"xds:///nowhere", "nowhere", false},
		"a name without any servers":        {"xds:///models", "no", false},
		"a control plane that is not there": {"xds:///models", "xds", true},
	} {
		t.Run(name, func(t *testing.T) {
			if tc.target == "xds:///nowhere" && testing.Short() {
				t.Skip("grpc-go waits 15 s for a name that is not known yet")
			}
			p := plane(t)
			p.Servers()
			if tc.gone {
				p.Stop()
			}
			g := open(t, text, tc.target)
			for kind, call := range kinds {
				_, _, err := call(ctx(t), g.client())
				expect(t, kind, err, "Unavailable UPSTREAM_LOST")
				noAddress(t, err, tc.target)
			}
			g.eventually("it is seen", func() bool {
				r, err := adminv1.NewEndpointsServiceClient(g.dial()).ListEndpoints(ctx(t), &adminv1.ListEndpointsRequest{})
				e := r.GetEndpoints()
				return err == nil && len(e) == 1 && e[0].GetAddress() == tc.target && e[0].GetControlled() &&
					e[0].GetState() == adminv1.EndpointState_ENDPOINT_STATE_NOT_READY && strings.Contains(e[0].GetFailure(), tc.why)
			})
			// Once it has servers it is served, until it is forgotten.
			if tc.target == "xds:///models" {
				_, address := modelServer(t)
				p.Servers(address)
				if tc.gone {
					p.Run()
				}
				call := func() string {
					_, err := g.client().ModelInfer(ctx(t), ask("echo", "a", "hello"))
					return reasonOf(err)
				}
				g.eventually("it is served", func() bool { return call() == "OK" })
				p.Forget()
				g.eventually("it is not served", func() bool { return call() == "Unavailable UPSTREAM_LOST" })
			}
			g.Shutdown()
			if log := g.log.String(); !strings.Contains(log, "no model server can be had") || !strings.Contains(log, tc.target) {
				t.Errorf("the log does not say it: %s", log)
			}
		})
	}
}

// A sequence stays at a server where the control plane balances by its header.
func TestXDSSequencesStay(t *testing.T) {
	const servers, sequences = 3, 24
	p := plane(t)
	p.Cluster = func(c *clusterpb.Cluster) { c.LbPolicy = clusterpb.Cluster_RING_HASH }
	p.Route = func(r *routepb.RouteAction) {
		r.HashPolicy = []*routepb.RouteAction_HashPolicy{{PolicySpecifier: &routepb.RouteAction_HashPolicy_Header_{
			Header: &routepb.RouteAction_HashPolicy_Header{HeaderName: endpoints.SequenceHeader},
		}}}
	}
	var mu sync.Mutex
	at := make(map[string]map[int]bool)
	var addresses []string
	for n := range servers {
		s := grpc.NewServer()
		inference.RegisterGRPCInferenceServiceServer(s, &sequenced{seen: func(id string) {
			mu.Lock()
			defer mu.Unlock()
			if at[id] == nil {
				at[id] = make(map[int]bool)
			}
			at[id][n] = true
		}})
		addresses = append(addresses, serve(t, s))
	}
	p.Servers(addresses...)
	g := open(t, base, "xds:///models")
	c := g.client()
	for range 5 {
		for id := range sequences {
			if _, err := c.ModelInfer(ctx(t), ask("m", "", "hello", number("sequence_id", int64(id+1)))); err != nil {
				t.Fatal(err)
			}
		}
	}
	used := make(map[string]bool)
	for id, places := range at {
		if len(places) != 1 {
			t.Errorf("sequence %s was at %v", id, places)
		}
		used[fmt.Sprint(places)] = true
	}
	if len(used) < 2 {
		t.Errorf("only %v were used", used)
	}
}
