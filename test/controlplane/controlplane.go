// Package controlplane runs an xDS control plane for tests: the server of
// go-control-plane on loopback.
package controlplane

import (
	"context"
	"fmt"
	"net"
	"strconv"
	"testing"

	clusterpb "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	corepb "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpointpb "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	listenerpb "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	routepb "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	routerpb "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/router/v3"
	managerpb "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	discoverypb "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/envoyproxy/go-control-plane/pkg/cache/types"
	"github.com/envoyproxy/go-control-plane/pkg/cache/v3"
	"github.com/envoyproxy/go-control-plane/pkg/resource/v3"
	"github.com/envoyproxy/go-control-plane/pkg/server/v3"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

// node is what clients call themselves.
const node = "gateway"

// Plane is a control plane that knows one name. Its methods are for one goroutine.
type Plane struct {
	// Cluster and Route change what is said of the name, if they are not nil.
	Cluster func(*clusterpb.Cluster)
	Route   func(*routepb.RouteAction)

	t       testing.TB
	name    string
	address string
	cache   cache.SnapshotCache
	version int
	server  *grpc.Server
	done    chan struct{}
}

// Start runs a control plane for xds:///name until the test ends. It knows no servers.
func Start(t testing.TB, name string) *Plane {
	t.Helper()
	p := &Plane{t: t, name: name, address: "127.0.0.1:0", cache: cache.NewSnapshotCache(false, cache.IDHash{}, nil)}
	p.Run()
	t.Cleanup(p.Stop)
	return p
}

// Run starts it again after Stop, where it was.
func (p *Plane) Run() {
	p.t.Helper()
	l, err := net.Listen("tcp", p.address)
	if err != nil {
		p.t.Fatal(err)
	}
	p.address = l.Addr().String()
	ctx, cancel := context.WithCancel(context.Background())
	s := grpc.NewServer()
	discoverypb.RegisterAggregatedDiscoveryServiceServer(s, server.NewServer(ctx, p.cache, nil))
	done := make(chan struct{})
	p.server, p.done = s, done
	go func() {
		defer close(done)
		defer cancel()
		_ = s.Serve(l)
	}()
}

// Stop ends it, and every connection to it. What it knows stays.
func (p *Plane) Stop() {
	p.server.Stop()
	<-p.done
}

// Bootstrap is the file that tells clients where it is, and of an authority, Authority,
// that the plane may have them trust.
func (p *Plane) Bootstrap() []byte {
	return fmt.Appendf(nil, `{"xds_servers": [{"server_uri": %q, "channel_creds": [{"type": "insecure"}], "server_features": ["xds_v3"]}],
"certificate_providers": {%q: {"plugin_name": "file_watcher", "config": {"ca_certificate_file": "none.pem"}}}, "node": {"id": %q}}`,
		p.address, Authority, node)
}

// Authority is the name of an authority in Bootstrap.
const Authority = "other"

// Servers has the name stand for these servers.
func (p *Plane) Servers(addresses ...string) {
	p.t.Helper()
	cluster := &clusterpb.Cluster{
		Name:                 p.name,
		ClusterDiscoveryType: &clusterpb.Cluster_Type{Type: clusterpb.Cluster_EDS},
		EdsClusterConfig: &clusterpb.Cluster_EdsClusterConfig{
			EdsConfig: &corepb.ConfigSource{ConfigSourceSpecifier: &corepb.ConfigSource_Ads{Ads: new(corepb.AggregatedConfigSource)}},
		},
	}
	if p.Cluster != nil {
		p.Cluster(cluster)
	}
	action := &routepb.RouteAction{ClusterSpecifier: &routepb.RouteAction_Cluster{Cluster: p.name}}
	if p.Route != nil {
		p.Route(action)
	}
	listener := &listenerpb.Listener{Name: p.name, ApiListener: &listenerpb.ApiListener{ApiListener: p.any(&managerpb.HttpConnectionManager{
		RouteSpecifier: &managerpb.HttpConnectionManager_RouteConfig{RouteConfig: &routepb.RouteConfiguration{
			Name: p.name,
			VirtualHosts: []*routepb.VirtualHost{{Name: p.name, Domains: []string{"*"}, Routes: []*routepb.Route{{
				Match:  &routepb.RouteMatch{PathSpecifier: &routepb.RouteMatch_Prefix{Prefix: "/"}},
				Action: &routepb.Route_Route{Route: action},
			}}}},
		}},
		HttpFilters: []*managerpb.HttpFilter{{
			Name: "router", ConfigType: &managerpb.HttpFilter_TypedConfig{TypedConfig: p.any(new(routerpb.Router))},
		}},
	})}}
	place := &endpointpb.LocalityLbEndpoints{
		Locality: &corepb.Locality{Zone: "one"}, LoadBalancingWeight: wrapperspb.UInt32(1),
	}
	for _, a := range addresses {
		host, port, err := net.SplitHostPort(a)
		if err != nil {
			p.t.Fatal(err)
		}
		n, _ := strconv.ParseUint(port, 10, 16)
		place.LbEndpoints = append(place.LbEndpoints, &endpointpb.LbEndpoint{
			HostIdentifier: &endpointpb.LbEndpoint_Endpoint{Endpoint: &endpointpb.Endpoint{
				Address: &corepb.Address{Address: &corepb.Address_SocketAddress{SocketAddress: &corepb.SocketAddress{
					Address: host, PortSpecifier: &corepb.SocketAddress_PortValue{PortValue: uint32(n)},
				}}},
			}},
		})
	}
	p.say(map[resource.Type][]types.Resource{
		resource.ListenerType: {listener},
		resource.ClusterType:  {cluster},
		resource.EndpointType: {&endpointpb.ClusterLoadAssignment{ClusterName: p.name, Endpoints: []*endpointpb.LocalityLbEndpoints{place}}},
	})
}

// Forget has the name stand for nothing.
func (p *Plane) Forget() {
	p.t.Helper()
	p.say(map[resource.Type][]types.Resource{resource.ListenerType: {}, resource.ClusterType: {}, resource.EndpointType: {}})
}

func (p *Plane) say(resources map[resource.Type][]types.Resource) {
	p.t.Helper()
	p.version++
	snapshot, err := cache.NewSnapshot(strconv.Itoa(p.version), resources)
	if err == nil {
		err = p.cache.SetSnapshot(context.Background(), node, snapshot)
	}
	if err != nil {
		p.t.Fatal(err)
	}
}

func (p *Plane) any(m proto.Message) *anypb.Any {
	p.t.Helper()
	a, err := anypb.New(m)
	if err != nil {
		p.t.Fatal(err)
	}
	return a
}
