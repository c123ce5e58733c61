package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/sluicegate/sluice/gateway"
	"github.com/sluicegate/sluice/interceptors/admit"
	"github.com/sluicegate/sluice/interceptors/config"
	"github.com/sluicegate/sluice/interceptors/identity"
	"github.com/sluicegate/sluice/proto/gen/inference"
)

// place is a simulated GPU, and the way of each tenant to it.
type place struct {
	name    string
	gpu     *gpu
	clients map[string]inference.GRPCInferenceServiceClient
	pools   func() *admit.Policy // nil but for our gateway
	closes  []func()
}

func (p *place) close() {
	for n := len(p.closes) - 1; n >= 0; n-- {
		p.closes[n]()
	}
}

// open serves a GPU; the ways to it are made by the functions below.
func open(name string, slots int64) (p *place, address string, err error) {
	p = &place{name: name, gpu: newGPU(slots), clients: make(map[string]inference.GRPCInferenceServiceClient)}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, "", err
	}
	s := grpc.NewServer()
	inference.RegisterGRPCInferenceServiceServer(s, p.gpu)
	go func() { _ = s.Serve(l) }()
	ctx, cancel := context.WithCancel(context.Background())
	go p.gpu.run(ctx)
	p.closes = append(p.closes, cancel, s.Stop)
	return p, l.Addr().String(), nil
}

func (p *place) dial(tenant, address string, creds credentials.TransportCredentials) error {
	conn, err := grpc.NewClient(address, grpc.WithTransportCredentials(creds), grpc.WithDisableRetry())
	if err != nil {
		return err
	}
	p.closes = append(p.closes, func() { _ = conn.Close() })
	p.clients[tenant] = inference.NewGRPCInferenceServiceClient(conn)
	return nil
}

// plain are ways in plaintext.
func (p *place) plain(address string) error {
	return errors.Join(p.dial("one", address, insecure.NewCredentials()), p.dial("three", address, insecure.NewCredentials()))
}

// openBare is the GPU alone.
func openBare() (*place, error) {
	p, address, err := open("none", slots)
	if err != nil {
		return nil, err
	}
	return p, p.plain(address)
}

const gatewayConfig = `
listener: {address: "127.0.0.1:0", max_concurrent_streams: 10000, max_resets: 1000000, drain_timeout: 1s}
identity:
  files: {certificate: %[1]s/gateway.pem, key: %[1]s/gateway-key.pem, bundle: %[1]s/bundle.pem}
  tenant: "{1}"
  rules: [{principals: ["spiffe://bench.test/*"], methods: [inference], models: ["*"]}]
backends: [{name: gpu, address: "%[2]s", dialect: DIALECT_TRITON, plaintext: true}]
pools:
- name: gpu
  capacity: %[3]d
  queue_length: %[4]d
  queue_timeout: %[5]v
  models: [{model: "*"}]
  tenants: [{tenant: one, weight: 1}, {tenant: three, weight: 3}]
%[6]s`

// openSluice is our gateway before the GPU; callers are known by mTLS.
func openSluice(name, dir string, slots, queue int64, adaptive string) (*place, error) {
	p, behind, err := open(name, slots)
	if err != nil {
		return nil, err
	}
	authority, err := identity.NewAuthority(spiffeid.RequireTrustDomainFromString("bench.test"))
	if err != nil {
		return nil, err
	}
	svid, err := authority.Issue("/gateway", 24*time.Hour, "127.0.0.1")
	if err != nil {
		return nil, err
	}
	if err := authority.WriteFiles(dir, "gateway", svid); err != nil {
		return nil, err
	}
	cfg, err := config.Parse("overload.yaml", fmt.Appendf(nil, gatewayConfig, dir, behind, slots, queue, queueTimeout, adaptive))
	if err != nil {
		return nil, err
	}
	g, err := gateway.New(cfg, config.Options{Logger: slog.New(slog.NewTextHandler(io.Discard, nil))})
	if err != nil {
		return nil, err
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	go func() { _ = g.Serve(l) }()
	p.closes = append(p.closes, g.Shutdown)
	p.pools = func() *admit.Policy { return g.Guard().Pools() }
	for _, tenant := range []string{"one", "three"} {
		source, err := authority.Source("/" + tenant)
		if err != nil {
			return nil, err
		}
		if err := p.dial(tenant, l.Addr().String(), identity.ClientCredentials(source, spiffeid.MatchAny(), nil)); err != nil {
			return nil, err
		}
	}
	return p, nil
}

// peers are somebody else's proxies with their own limiters, as near to our pool as
// their configurations come: none of them tells tenants apart here, or knows of
// deadlines. test/bench/setup.sh installs them.
var peers = []struct{ name, config, args string }{
	{"envoy", `
static_resources:
  listeners:
  - address: {socket_address: {address: 127.0.0.1, port_value: LISTEN}}
    filter_chains:
    - filters:
      - name: envoy.filters.network.http_connection_manager
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: bench
          codec_type: HTTP2
          http_filters:
          - name: envoy.filters.http.router
            typed_config: {"@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}
          route_config:
            virtual_hosts:
            - {name: all, domains: ["*"], routes: [{match: {prefix: /}, route: {cluster: model, timeout: 0s}}]}
  clusters:
  - name: model
    circuit_breakers: {thresholds: [{max_requests: SLOTS, max_pending_requests: QUEUE}]}
    typed_extension_protocol_options:
      envoy.extensions.upstreams.http.v3.HttpProtocolOptions:
        "@type": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions
        explicit_http_config: {http2_protocol_options: {}}
    load_assignment:
      cluster_name: model
      endpoints: [{lb_endpoints: [{endpoint: {address: {socket_address: {address: 127.0.0.1, port_value: BACKEND}}}}]}]
`, "-c FILE --use-dynamic-base-id --log-level error --concurrency 1"},
	{"nginx", `
daemon off;
master_process off;
pid DIR/nginx-LISTEN.pid;
error_log stderr crit;
events {}
http {
  access_log off;
  client_body_temp_path DIR/nginx-body;
  proxy_temp_path DIR/nginx-proxy;
  fastcgi_temp_path DIR/nginx-fastcgi;
  uwsgi_temp_path DIR/nginx-uwsgi;
  scgi_temp_path DIR/nginx-scgi;
  limit_conn_zone $server_port zone=gpu:1m;
  limit_conn gpu SLOTS;
  upstream model { server 127.0.0.1:BACKEND; keepalive 64; }
  server {
    listen 127.0.0.1:LISTEN http2;
    keepalive_requests 100000000;
    location / { grpc_pass grpc://model; grpc_read_timeout 1h; grpc_send_timeout 1h; }
  }
}
`, "-c FILE -p DIR -e stderr"},
	{"haproxy", `
global
  tune.h2.max-concurrent-streams 10000
defaults
  mode http
  timeout connect 5s
  timeout client 1h
  timeout server 1h
  timeout queue TIMEOUTms
  http-reuse always
frontend bench
  bind 127.0.0.1:LISTEN proto h2
  http-request deny deny_status 503 if { queue(model) ge QUEUE }
  default_backend model
backend model
  server model 127.0.0.1:BACKEND proto h2 maxconn SLOTS
`, "-db -f FILE"},
}

// openPeer is a peer before the GPU.
func openPeer(n int, dir string) (*place, error) {
	peer := peers[n]
	path, err := program(peer.name)
	if err != nil {
		return nil, err
	}
	p, behind, err := open(peer.name, slots)
	if err != nil {
		return nil, err
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	address := l.Addr().String()
	_ = l.Close()
	_, port, _ := net.SplitHostPort(address)
	_, to, _ := net.SplitHostPort(behind)
	file := filepath.Join(dir, peer.name+".yaml")
	fill := strings.NewReplacer("LISTEN", port, "BACKEND", to, "DIR", dir, "FILE", file, "SLOTS", fmt.Sprint(slots),
		"QUEUE", fmt.Sprint(queueLength), "TIMEOUT", fmt.Sprint(queueTimeout.Milliseconds()))
	if err := os.WriteFile(file, []byte(fill.Replace(peer.config)), 0o600); err != nil {
		return nil, err
	}
	cmd := exec.Command(path, strings.Fields(fill.Replace(peer.args))...)
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	p.closes = append(p.closes, func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		conn, err := net.Dial("tcp", address)
		if err == nil {
			_ = conn.Close()
			break
		}
		if time.Now().After(end) {
			p.close()
			return nil, fmt.Errorf("%s does not listen: %w", peer.name, err)
		}
	}
	return p, p.plain(address)
}

// program finds somebody else's program: where BENCH_NAME says, on PATH, or where
// test/bench/setup.sh puts it.
func program(name string) (string, error) {
	if named := os.Getenv("BENCH_" + strings.ToUpper(name)); named != "" {
		return exec.LookPath(named)
	}
	if path, err := exec.LookPath(name); err == nil {
		return path, nil
	}
	cache := os.Getenv("SLUICE_CACHE")
	if cache == "" {
		home, err := os.UserHomeDir()
		if err != nil {
			return "", err
		}
		cache = filepath.Join(home, ".cache", "sluice")
	}
	return exec.LookPath(filepath.Join(cache, "bench", name))
}
