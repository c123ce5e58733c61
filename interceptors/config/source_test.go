package config

import (
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/sluicegate/sluice/interceptors/identity"
)

// What can be known of a source without opening it is known when a
// configuration is checked, with its line.
func TestSourceErrors(t *testing.T) {
	const text = `listener: {address: "127.0.0.1:0"}
identity:
  SOURCE
backends:
- name: gpu
  address: 127.0.0.1:1
  dialect: DIALECT_TRITON
  spiffe_id: spiffe://example.org/model/*
`
	for _, c := range []struct{ name, old, new, want string }{
		{"good", "SOURCE", "workload_api: {spiffe_id: spiffe://example.org/gateway}", ""},
		{"no socket", "SOURCE", "workload_api: {socket: /run/agent.sock}", ":3:26 identity.workload_api.socket: \"/run/agent.sock\" is no address"},
		{"which identity", "SOURCE", "workload_api: {spiffe_id: gateway}", ":3:29 identity.workload_api.spiffe_id: \"gateway\" is no SPIFFE ID"},
		{"no time", "SOURCE", "workload_api: {timeout: 0s}", ":3:27 identity.workload_api.timeout: must be greater than 0s"},
		{"federated", "SOURCE", "files: {certificate: a, key: b, bundle: c, federated: [{trust_domain: 'A b', bundle: d}]}",
			":3:73 identity.files.federated[0].trust_domain: \"A b\" is no trust domain"},
		{"federated twice", "SOURCE", "files: {certificate: a, key: b, bundle: c, federated: [{trust_domain: a, bundle: d}, {trust_domain: a, bundle: d}]}",
			":3:103 identity.files.federated[1].trust_domain: \"a\" is there already"},
		{"no keys", "SOURCE", "files: {certificate: a, key: b, bundle: c}\n  jwt: {audiences: [x]}", " identity.files.jwt_bundle: identity.jwt needs the keys"},
		{"no pattern", "/model/*", "/mod*", ":8:14 backends[0].spiffe_id: \"spiffe://example.org/mod*\""},
	} {
		t.Run(c.name, func(t *testing.T) {
			spoilt := strings.Replace(strings.Replace(text, c.old, c.new, 1), "SOURCE", "development: {}", 1)
			err := check(t, t.TempDir(), spoilt)
			if c.want == "" {
				if err != nil {
					t.Error(err)
				}
				return
			}
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got  %v\nwant %s", err, c.want)
			}
		})
	}
}

// A reload that does not change where the identity comes from keeps it.
func TestSameSource(t *testing.T) {
	const source = "  workload_api: {socket: unix:///a}\n"
	for _, c := range []struct {
		name, a, b string
		want       bool
	}{
		{"rules", source, source + "  rules: [{principals: ['spiffe://a/b'], methods: [health]}]\n", true},
		{"callers", source, source + "  tenant: '{path:1}'\n  tenants: [{principals: ['spiffe://a/b'], tenant: x}]\n" +
			"  client_certificate: CLIENT_CERTIFICATE_OPTIONAL\n  plaintext_listener: true\n  recheck: 2s\n  expiry_grace: 1s\n" +
			"  forwarded: {proxies: ['spiffe://a/b']}\n", true},
		{"jwt, for which the API has to be asked", source, source + "  jwt: {audiences: [x]}\n", false},
		{"audiences", source + "  jwt: {audiences: [x]}\n", source + "  jwt: {audiences: [y]}\n", true},
		{"jwt, for which the files are there", "  files: {certificate: a, key: b, bundle: c, jwt_bundle: d}\n",
			"  files: {certificate: a, key: b, bundle: c, jwt_bundle: d}\n  jwt: {audiences: [x]}\n", true},
		{"a socket", source, "  workload_api: {socket: unix:///b}\n", false},
		{"a federation", "  files: {certificate: a, key: b, bundle: c, federated: [{trust_domain: x, bundle: d}]}\n",
			"  files: {certificate: a, key: b, bundle: c}\n", false},
		{"another kind", source, "  insecure: {}\n", false},
	} {
		t.Run(c.name, func(t *testing.T) {
			const rest = "backends: [{name: gpu, dialect: DIALECT_TRITON}]\n"
			a, b := parse(t, "identity:\n"+c.a+rest), parse(t, "identity:\n"+c.b+rest)
			if got := sameSource(a.GetIdentity(), b.GetIdentity()); got != c.want {
				t.Errorf("the same: %t", got)
			}
		})
	}
}

// Names of files are relative to the configuration, those of bundles too.
func TestBundleFiles(t *testing.T) {
	dir := t.TempDir()
	ours, err := identity.NewAuthority(spiffeid.RequireTrustDomainFromString("ours.test"))
	if err != nil {
		t.Fatal(err)
	}
	other, err := identity.NewAuthority(spiffeid.RequireTrustDomainFromString("other.test"))
	if err != nil {
		t.Fatal(err)
	}
	svid, err := ours.Issue("/gateway", 0)
	if err == nil {
		err = ours.WriteFiles(dir, "gateway", svid)
	}
	if err != nil {
		t.Fatal(err)
	}
	put := func(name string, text []byte, err error) {
		t.Helper()
		if err == nil {
			err = os.WriteFile(filepath.Join(dir, name), text, 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	text, err := ours.JWTBundle().Marshal()
	put("ours.json", text, err)
	text, err = other.Bundle().Marshal()
	put("other.pem", text, err)
	text, err = other.JWTBundle().Marshal()
	put("other.json", text, err)
	put("sluice.yaml", []byte(`
identity:
  files:
    certificate: gateway.pem
    key: gateway-key.pem
    bundle: bundle.pem
    jwt_bundle: ours.json
    federated: [{trust_domain: other.test, bundle: other.pem, jwt_bundle: other.json}]
backends: [{name: gpu, dialect: DIALECT_TRITON, spiffe_id: "spiffe://other.test/model/*"}]
`), nil)
	g, err := Load(filepath.Join(dir, "sluice.yaml"), Options{Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	defer g.Close()
	for _, td := range []spiffeid.TrustDomain{ours.TrustDomain(), other.TrustDomain()} {
		if _, err := g.Source().GetX509BundleForTrustDomain(td); err != nil {
			t.Error(err)
		}
		if _, err := g.Source().GetJWTBundleForTrustDomain(td); err != nil {
			t.Error(err)
		}
	}
	if err := g.Ready(); err != nil {
		t.Error(err)
	}
	if _, err := g.DialOptions(); err != nil {
		t.Error(err)
	}
}

// What the listener speaks does not depend on what we show to model servers.
func TestListenerCredentials(t *testing.T) {
	for _, c := range []struct{ name, identity, want string }{
		{"identity off", "{insecure: {}}", "insecure"},
		{"mutual TLS", "{development: {}}", "tls"},
		{"optional", "{development: {}, client_certificate: CLIENT_CERTIFICATE_OPTIONAL, jwt: {audiences: [x]}}", "tls"},
		{"TLS ends before us", "{development: {}, plaintext_listener: true, jwt: {audiences: [x]}}", "insecure"},
	} {
		t.Run(c.name, func(t *testing.T) {
			g := build(t, parse(t, "identity: "+c.identity+"\nbackends: [{name: gpu, dialect: DIALECT_TRITON}]\n"), nil,
				Options{Logger: slog.New(slog.DiscardHandler)})
			defer g.Close()
			if got := g.ServerCredentials().Info().SecurityProtocol; got != c.want {
				t.Errorf("it speaks %s", got)
			}
			if c.identity != "{insecure: {}}" {
				creds, err := g.BackendCredentials(g.config.GetBackends()[0])
				if err != nil || creds.Info().SecurityProtocol != "tls" {
					t.Errorf("model servers: %v", err)
				}
			}
		})
	}
}
