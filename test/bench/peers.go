package main

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// peer is a proxy that can be measured.
type peer struct {
	name  string
	mtls  bool
	start func(profile string) (*child, error)
}

// The names of our own.
const (
	bare          = "pass-through"
	tuned         = "pass-through+tuned"
	sluice        = "sluice"
	sluiceAnswers = "sluice+responses"
	overMTLS      = " mTLS"
)

// peersOf are the peers that there are, and a line for each that there is not.
// dir holds the certificates, and gets configurations.
func peersOf(o options, dir, backend string) (peers []peer, left []string) {
	ours := func(name, role, certs string) {
		peers = append(peers, peer{name, certs != "", func(profile string) (*child, error) {
			return startChild(role, backend, certs, profile)
		}})
	}
	ours(bare, "passthrough", "")
	ours(tuned, "passthrough+tuned", "")
	ours(sluice, "sluice", "")
	ours(sluiceAnswers, "sluice+responses", "")
	ours(bare+overMTLS, "passthrough", dir)
	ours(sluice+overMTLS, "sluice", dir)
	for _, t := range []struct{ name, config, args string }{
		{"envoy", envoyConfig, "-c FILE --use-dynamic-base-id --log-level error"},
		{"nginx", nginxConfig, "-c FILE -p DIR -e stderr"},
		{"haproxy", haproxyConfig, "-db -f FILE"},
	} {
		if !chosen(o.peers, t.name) {
			continue
		}
		path, err := program(t.name)
		if err != nil {
			left = append(left, fmt.Sprintf("%s: not measured; test/bench/setup.sh did not install it, it is not on PATH, and BENCH_%s does not name it",
				t.name, strings.ToUpper(t.name)))
			continue
		}
		peers = append(peers, peer{t.name, false, func(string) (*child, error) {
			return startPeer(path, dir, backend, t.name, t.config, t.args)
		}})
	}
	kept := peers[:0]
	for _, p := range peers {
		if chosen(o.peers, p.name) {
			kept = append(kept, p)
		}
	}
	return kept, left
}

// program finds somebody else's proxy: where BENCH_NAME says, on PATH, or where
// setup.sh puts it.
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

// startPeer runs somebody else's proxy at a free port.
func startPeer(path, dir, backend, name, config, args string) (*child, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	address := l.Addr().String()
	if err := l.Close(); err != nil {
		return nil, err
	}
	_, port, _ := net.SplitHostPort(address)
	_, to, _ := net.SplitHostPort(backend)
	file := filepath.Join(dir, name+"-"+port+".yaml")
	config = strings.NewReplacer("LISTEN", port, "BACKEND", to, "DIR", dir).Replace(config)
	if err := os.WriteFile(file, []byte(config), 0o600); err != nil {
		return nil, err
	}
	argv := []string{path}
	for a := range strings.FieldsSeq(args) {
		argv = append(argv, strings.NewReplacer("FILE", file, "DIR", dir).Replace(a))
	}
	return startProgram(address, argv...)
}

// The least configurations that pass gRPC through, in plaintext, one process
// each, with the gateway's windows where they can be set.
const (
	envoyConfig = `
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
          http2_protocol_options: {initial_stream_window_size: 1048576, initial_connection_window_size: 16777216}
          http_filters:
          - name: envoy.filters.http.router
            typed_config: {"@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}
          route_config:
            virtual_hosts:
            - name: all
              domains: ["*"]
              routes: [{match: {prefix: /}, route: {cluster: model, timeout: 0s}}]
  clusters:
  - name: model
    typed_extension_protocol_options:
      envoy.extensions.upstreams.http.v3.HttpProtocolOptions:
        "@type": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions
        explicit_http_config:
          http2_protocol_options: {initial_stream_window_size: 1048576, initial_connection_window_size: 16777216}
    load_assignment:
      cluster_name: model
      endpoints: [{lb_endpoints: [{endpoint: {address: {socket_address: {address: 127.0.0.1, port_value: BACKEND}}}}]}]
`
	nginxConfig = `
daemon off;
master_process off;
pid DIR/nginx-LISTEN.pid;
error_log stderr error;
events {}
http {
  access_log off;
  client_body_temp_path DIR/nginx-body;
  proxy_temp_path DIR/nginx-proxy;
  fastcgi_temp_path DIR/nginx-fastcgi;
  uwsgi_temp_path DIR/nginx-uwsgi;
  scgi_temp_path DIR/nginx-scgi;
  upstream model { server 127.0.0.1:BACKEND; keepalive 64; }
  server {
    listen 127.0.0.1:LISTEN http2;
    client_max_body_size 0;
    keepalive_requests 100000000;
    http2_body_preread_size 1m;
    location / { grpc_pass grpc://model; grpc_read_timeout 1h; grpc_send_timeout 1h; }
  }
}
`
	haproxyConfig = `
defaults
  mode http
  timeout connect 5s
  timeout client 1h
  timeout server 1h
  http-reuse always
frontend bench
  bind 127.0.0.1:LISTEN proto h2
  default_backend model
backend model
  server model 127.0.0.1:BACKEND proto h2
`
)
