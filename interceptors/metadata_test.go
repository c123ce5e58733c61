package interceptors

import (
	"math/rand/v2"
	"reflect"
	"slices"
	"strings"
	"testing"

	"google.golang.org/grpc/metadata"
)

func TestSanitize(t *testing.T) {
	for _, c := range []struct {
		name string
		keys []string
		kept bool
	}{
		{"the caller's own", []string{"x-request-id", "authorization", "traceparent", "tracestate", "baggage", "my-key-bin", "x-priority", "testing", "x-tokens"}, true},
		{"pseudo-headers", []string{":authority", ":path", ":method", ""}, false},
		{"of the connection", []string{"connection", "te", "trailer", "transfer-encoding", "upgrade", "keep-alive", "host", "content-type", "content-length", "user-agent"}, false},
		{"of gRPC", []string{"grpc-timeout", "grpc-encoding", "grpc-accept-encoding", "grpc-status", "grpc-previous-rpc-attempts", "grpc-trace-bin"}, false},
		{"who the caller is", []string{"x-forwarded-client-cert", "x-forwarded-for", "x-forwarded-host", "forwarded", "x-real-ip",
			"x-spiffe-id", "x-tenant", "x-tenant-id", "x-principal", "x-client-cert", "x-remote-user", "impersonate-user",
			"remote-user", "x-webauth-user", "x-consumer-username", "x-amzn-oidc-identity", "x-goog-iap-jwt-assertion",
			"x-ms-client-principal-id", "cf-access-jwt-assertion", "x-auth-request-email", "ssl-client-verify", "x-ssl-client-dn", "l5d-client-id", "x-sluice-tenant"}, false},
		{"what it may do", []string{"triton-grpc-protocol-infer-key", "triton-grpc-protocol-model-repository",
			"x-gateway-inference-fairness-id", "x-gateway-destination-endpoint", "x-envoy-internal", "x-envoy-original-path"}, false},
		{"twins", []string{"x_forwarded_client_cert", "x-forwarded_client-cert", "X-Forwarded-Client-Cert", "x.forwarded.for", "X_TENANT",
			"triton_grpc_protocol_infer_key", "x_gateway_inference_fairness_id", "L5D_CLIENT_ID"}, false},
		{"binary twins", []string{"x-tenant-bin", "x-forwarded-client-cert-bin"}, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			for _, key := range c.keys {
				got := Sanitize(metadata.MD{key: {"a", "b"}})
				switch {
				case c.kept && !slices.Equal(got[key], []string{"a", "b"}):
					t.Errorf("%q was not kept: %v", key, got)
				case !c.kept && len(got) != 0:
					t.Errorf("%q was kept: %v", key, got)
				}
			}
		})
	}
	if got := Sanitize(nil); got == nil || len(got) != 0 {
		t.Errorf("of nothing: %v", got)
	}
}

// Whoever changes the copy does not change what came in.
func TestSanitizeCopies(t *testing.T) {
	in := metadata.MD{"a": append(make([]string, 0, 8), "1"), "A": {"2"}}
	out := Sanitize(in)
	if got := slices.Sorted(slices.Values(out["a"])); !slices.Equal(got, []string{"1", "2"}) {
		t.Errorf("spellings of a key do not come together: %v", out)
	}
	out["a"][0] = "changed"
	_ = append(out["a"], "more")
	out.Set("b", "new")
	if !slices.Equal(in["a"], []string{"1"}) || in["a"][:2][1] != "" || len(in) != 2 {
		t.Errorf("changed: %v", in)
	}
}

// However its spelling is varied, no untrusted header passes, and nothing
// beside it is lost.
func TestNoSpellingPasses(t *testing.T) {
	r := rand.New(rand.NewPCG(5, 6))
	for range 20000 {
		prefix := untrusted[r.IntN(len(untrusted))]
		key := []byte(prefix + []string{"", "id", "-id", "client-cert"}[r.IntN(4)])
		for n, b := range key {
			switch r.IntN(3) {
			case 0:
				key[n] = strings.ToUpper(string(b))[0]
			case 1:
				if b == '-' {
					key[n] = "-_."[r.IntN(3)]
				}
			}
		}
		if !Untrusted(string(key)) {
			t.Fatalf("%q is trusted", key)
		}
		out := Sanitize(metadata.MD{string(key): {"spoof"}, "x-mine": {"1"}})
		if len(out) != 1 || out["x-mine"] == nil {
			t.Fatalf("%q: %v", key, out)
		}
	}
}

func FuzzSanitize(f *testing.F) {
	for _, key := range []string{"x-forwarded-client-cert", "x_tenant", "grpc-timeout", "te", "x-mine", ":path", "X-K\u212a"} {
		f.Add(key, "value")
	}
	f.Fuzz(func(t *testing.T, key, value string) {
		out := Sanitize(metadata.MD{key: {value}})
		again := Sanitize(out)
		for k, v := range out {
			if Untrusted(k) || Untrusted(strings.ToUpper(k)) || strings.HasPrefix(k, "grpc-") || k == "" || k[0] == ':' {
				t.Fatalf("%q passes", k)
			}
			if k != strings.ToLower(k) || !slices.Equal(v, []string{value}) {
				t.Fatalf("%q: %q became %q: %q", key, value, k, v)
			}
			if !slices.Equal(again[k], v) {
				t.Fatalf("%q passes once and not twice", k)
			}
		}
		if twin := strings.NewReplacer("-", "_").Replace(key); Untrusted(key) != Untrusted(twin) {
			t.Fatalf("%q and %q differ", key, twin)
		}
		if len(out) == 0 && !Untrusted(key) && !hopByHop(strings.ToLower(key)) && key != "" && key[0] != ':' &&
			!strings.HasPrefix(strings.ToLower(key), "grpc-") && !Untrusted(strings.ToLower(key)) {
			t.Fatalf("%q is lost", key)
		}
	})
}

func BenchmarkSanitize(b *testing.B) {
	b.ReportAllocs()
	md := metadata.Pairs(":authority", "h", "content-type", "application/grpc", "user-agent", "x", "traceparent", "00-0-0-0",
		"x-request-id", "1", "x-forwarded-for", "10.0.0.1", "authorization", "Bearer x")
	for b.Loop() {
		Sanitize(md)
	}
}

// A linked handler sees what a model server behind the gateway would, and the
// headers of its connection.
func TestLinkedHandlersSeeNoSpoofs(t *testing.T) {
	md := metadata.MD{":authority": {"a"}, "user-agent": {"u"}, "mine": {"1"}, "authorization": {"Bearer x"}}
	call := &Call{CallInfo: CallInfo{Metadata: md}, ctx: t.Context()}
	if got := call.incomingContext(); got != call.ctx {
		t.Error("a context was made for nothing")
	}
	md["x_tenant"], md["X-Forwarded-Client-Cert"] = []string{"root"}, []string{"By=x"}
	call.Outgoing = metadata.MD{"authorization": nil, "traceparent": {"t"}}
	got, _ := metadata.FromIncomingContext(call.incomingContext())
	if want := (metadata.MD{":authority": {"a"}, "user-agent": {"u"}, "mine": {"1"}}); !reflect.DeepEqual(got, want) {
		t.Errorf("the handler sees %v, want %v", got, want)
	}
	if len(md) != 6 {
		t.Errorf("the caller's metadata was changed: %v", md)
	}
}

func BenchmarkIncomingContext(b *testing.B) {
	call := &Call{CallInfo: CallInfo{Metadata: metadata.MD{":authority": {"a"}, "user-agent": {"u"}, "content-type": {"c"},
		"x-request-id": {"1"}, "traceparent": {"t"}, "authorization": {"Bearer x"}, "grpc-accept-encoding": {"gzip"}}}, ctx: b.Context()}
	b.ReportAllocs()
	for b.Loop() {
		if call.incomingContext() != call.ctx {
			b.Fatal("a new context")
		}
	}
}
