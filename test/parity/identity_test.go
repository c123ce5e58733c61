package parity_test

import (
	"context"
	"crypto/tls"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"

	"github.com/sluicegate/sluice/proto/gen/inference"
)

// behind puts a world behind a door.
var behind = map[string]func(*world, string){"linked": (*world).link, "gateway": (*world).proxy}

// identities is a configuration in which alice alone may use a model.
func identities(lines string) string {
	return `
identity:
  development: {trust_domain: parity.test}
  recheck: 0.05s
` + lines + `
  rules:
  - principals: ["spiffe://parity.test/alice"]
    methods: [inference]
    models: [words, echo]
  - principals: ["spiffe://parity.test/proxy"]
    methods: [inference]
    models: [sum]
backends:
- name: model
  dialect: DIALECT_TRITON
pools:
- {name: gpu, capacity: 8, models: [{model: words}, {model: echo}]}
budgets:
- {name: all, tokens: 1000000}
`
}

// How a caller comes.
const (
	bare     = "" // with TLS, without a certificate
	unsealed = "plaintext"
)

// connect dials with the identity of a path, or bare, or in plaintext.
func (w *world) connect(as string) inference.GRPCInferenceServiceClient {
	w.t.Helper()
	var creds credentials.TransportCredentials
	switch as {
	case bare:
		creds = credentials.NewTLS(&tls.Config{InsecureSkipVerify: true, MinVersion: tls.VersionTLS13})
	case unsealed:
		creds = insecure.NewCredentials()
	default:
		return w.client(as)
	}
	conn, err := grpc.NewClient(w.address, grpc.WithTransportCredentials(creds), grpc.WithDisableRetry())
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { _ = conn.Close() })
	return inference.NewGRPCInferenceServiceClient(conn)
}

func (w *world) token(path string) string {
	w.t.Helper()
	token, err := w.authority.IssueJWT(path, []string{"sluice"}, time.Hour)
	if err != nil {
		w.t.Fatal(err)
	}
	return "Bearer " + token
}

func TestWhoCalls(t *testing.T) {
	const (
		optional  = "  client_certificate: CLIENT_CERTIFICATE_OPTIONAL\n  jwt: {audiences: [sluice]}"
		plaintext = "  plaintext_listener: true\n  jwt: {audiences: [sluice]}"
		jwt       = "  jwt: {audiences: [sluice], proxies: [\"spiffe://parity.test/proxy\"]}"
		xfcc      = "  forwarded: {proxies: [\"spiffe://parity.test/proxy\"]}"
		alice     = "By=spiffe://parity.test/proxy;Hash=00;Subject=\"CN=a,O=b\";URI=spiffe://parity.test/alice"
	)
	for _, tc := range []struct {
		name, config, as string
		token            string // "/path": of a principal; anything else as it is
		forwarded        []string
		want             string // OK, or a reason
		passes           bool   // the token reaches the model server
	}{
		{name: "certificate", as: "/alice", want: "OK"},
		{name: "somebody else's certificate", as: "/mallory", want: "METHOD_DENIED"},
		{name: "certificate and token, which is none of our business", as: "/alice", token: "/mallory", want: "OK", passes: true},

		{name: "token", config: optional, as: bare, token: "/alice", want: "OK"},
		{name: "somebody else's token", config: optional, as: bare, token: "/mallory", want: "METHOD_DENIED"},
		{name: "no token", config: optional, as: bare, want: "IDENTITY_MISSING"},
		{name: "bad token", config: optional, as: bare, token: "Bearer e30.e30.e30", want: "IDENTITY_UNTRUSTED"},
		{name: "optional certificate", config: optional, as: "/alice", want: "OK"},
		{name: "a token does not change who has a certificate", config: optional, as: "/mallory", token: "/alice", want: "METHOD_DENIED"},
		{name: "a stranger's word", config: optional, as: bare, forwarded: []string{alice}, want: "IDENTITY_MISSING"},

		{name: "plaintext and token", config: plaintext, as: unsealed, token: "/alice", want: "OK"},
		{name: "plaintext without token", config: plaintext, as: unsealed, want: "IDENTITY_MISSING"},
		{name: "plaintext and a stranger's word", config: plaintext, as: unsealed, forwarded: []string{alice}, want: "IDENTITY_MISSING"},

		{name: "token by a proxy", config: jwt, as: "/proxy", token: "/alice", want: "OK"},
		{name: "proxy without token", config: jwt, as: "/proxy", want: "MODEL_DENIED"},
		{name: "bad token by a proxy", config: jwt, as: "/proxy", token: "Basic YTpi", want: "IDENTITY_UNTRUSTED"},
		{name: "token by no proxy", config: jwt, as: "/mallory", token: "/alice", want: "METHOD_DENIED"},

		{name: "forwarded", config: xfcc, as: "/proxy", forwarded: []string{alice}, want: "OK"},
		{name: "forwarded by two", config: xfcc, as: "/proxy", forwarded: []string{"URI=spiffe://parity.test/mallory," + alice}, want: "OK"},
		{name: "the first proxy's word", config: xfcc, as: "/proxy", forwarded: []string{alice + ",URI=spiffe://parity.test/mallory"}, want: "METHOD_DENIED"},
		{name: "proxy without a word", config: xfcc, as: "/proxy", want: "MODEL_DENIED"},
		{name: "malformed word", config: xfcc, as: "/proxy", forwarded: []string{alice + `;Subject="`}, want: "IDENTITY_UNTRUSTED"},
		{name: "two words", config: xfcc, as: "/proxy", forwarded: []string{alice, alice}, want: "IDENTITY_UNTRUSTED"},
		{name: "forwarded by no proxy", config: xfcc, as: "/mallory", forwarded: []string{alice}, want: "METHOD_DENIED"},
		{name: "forwarded, and a token that passes on", config: xfcc, as: "/proxy", forwarded: []string{alice}, token: "/mallory", want: "OK", passes: true},
		{name: "both of one proxy", config: jwt + "\n" + xfcc, as: "/proxy", forwarded: []string{alice}, token: "/alice", want: "IDENTITY_UNTRUSTED"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			for door, put := range behind {
				t.Run(door, func(t *testing.T) {
					t.Parallel()
					w := newWorld(t)
					put(w, identities(tc.config))
					c := w.connect(tc.as)
					token := tc.token
					if strings.HasPrefix(token, "/") {
						token = w.token(token)
					}
					ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
					defer cancel()
					if token != "" {
						ctx = metadata.AppendToOutgoingContext(ctx, "authorization", token)
					}
					for _, v := range tc.forwarded {
						ctx = metadata.AppendToOutgoingContext(ctx, "x-forwarded-client-cert", v)
					}
					check := func(kind string, o outcome) {
						t.Helper()
						got := o.Reason
						if o.Code == codes.OK {
							got = "OK"
						}
						if got != tc.want {
							t.Errorf("%s: %+v, want %s", kind, o, tc.want)
						}
						seen := w.saw()
						if tc.want == "OK" && seen == nil {
							t.Errorf("%s: it did not reach the model server", kind)
						}
						if v := seen["authorization"]; tc.passes != slices.Equal(v, []string{token}) || !tc.passes && v != nil {
							t.Errorf("%s: of the token the model server saw %d values", kind, len(v))
						}
						if seen["x-forwarded-client-cert"] != nil {
							t.Errorf("%s: the model server saw what the proxy said", kind)
						}
					}
					check("unary", infer(ctx, t, c, request("echo", "", prompt("hello"))))
					all := converse(ctx, t, c, request("echo", "a", prompt("hello")))
					o := all["stream"]
					if o.Code == codes.OK {
						o = all["a"]
					}
					check("stream", o)
				})
			}
		})
	}
}

// No header by which a caller could pass for somebody else reaches a model
// server, from whomever it comes and however it is spelled.
func TestNoSpoofReachesTheModel(t *testing.T) {
	spoofs := []string{"x-forwarded-client-cert", "x-forwarded-for", "x-forwarded-user", "forwarded", "x-real-ip", "x-envoy-peer-metadata",
		"x-spiffe-id", "x-tenant", "x-tenant-id", "x-principal", "x-client-cert", "x-remote-user", "remote-user", "impersonate-user",
		"x-auth-request-user", "ssl-client-verify", "x-ssl-client-dn", "l5d-client-id", "triton-grpc-protocol-key", "x-sluice-tenant",
		"x-gateway-inference-fairness-id", "x-consumer-id", "x-ms-client-principal", "x-goog-iap-jwt-assertion"}
	const config = `  client_certificate: CLIENT_CERTIFICATE_OPTIONAL
  jwt: {audiences: [sluice]}
  forwarded: {proxies: ["spiffe://parity.test/proxy"]}`
	canonical := strings.NewReplacer("_", "-", ".", "-")
	for door, put := range behind {
		t.Run(door, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			put(w, identities(config))
			r := rand.New(rand.NewPCG(1, 2))
			from := map[string]inference.GRPCInferenceServiceClient{"certificate": w.client("/alice"), "token": w.connect(bare), "proxy": w.client("/proxy")}
			token := w.token("/alice")
			for round := range 30 {
				md := metadata.MD{"honest": {"yes"}}
				for _, key := range spoofs {
					if r.IntN(3) == 0 {
						continue
					}
					b := []byte(key)
					for n, c := range b {
						if c == '-' && key != "x-forwarded-client-cert" || c == '-' && round%2 == 0 {
							b[n] = "-_."[r.IntN(3)]
						} else if c != '-' && r.IntN(2) == 0 {
							b[n] = strings.ToUpper(string(c))[0]
						}
					}
					key = string(b)
					if r.IntN(4) == 0 {
						key += "-bin"
					}
					md.Append(key, "spoof")
				}
				for kind, c := range from {
					ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
					send := maps.Clone(md)
					switch kind {
					case "token":
						send["authorization"] = []string{token}
					case "proxy":
						delete(send, "x-forwarded-client-cert")
						send["x-forwarded-client-cert"] = []string{"URI=spiffe://parity.test/alice"}
					}
					ctx = metadata.NewOutgoingContext(ctx, send)
					var o outcome
					if o = infer(ctx, t, c, request("echo", "", prompt("hello"))); round%2 == 1 {
						_ = w.saw()
						o = converse(ctx, t, c, request("echo", "a", prompt("hello")))["stream"]
					}
					cancel()
					seen := w.saw()
					if o.Code != codes.OK || seen.Get("honest") == nil {
						t.Fatalf("%s: %+v, the model server saw %d headers", kind, o, len(seen))
					}
					for key, values := range seen {
						name := strings.TrimSuffix(canonical.Replace(strings.ToLower(key)), "-bin")
						if slices.Contains(spoofs, name) || slices.Contains(values, "spoof") || kind == "token" && name == "authorization" {
							t.Errorf("round %d, %s: %s reached the model server", round, kind, key)
						}
					}
				}
			}
		})
	}
}
