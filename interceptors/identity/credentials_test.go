package identity

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"math/big"
	"net"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/sluicegate/sluice/interceptors"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
)

// refusals collects what a Refused hook is told.
type refusals struct {
	mu      sync.Mutex
	reasons []interceptors.Reason
}

func (r *refusals) add(reason interceptors.Reason, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if err == nil {
		panic("a refusal without an error")
	}
	r.reasons = append(r.reasons, reason)
}

// loopback is two ends of a TCP connection: a handshake over a pipe would hang
// where one side has an alert to send and the other has stopped reading.
func loopback(t *testing.T) (client, server net.Conn) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	client, err = net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	server, err = l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []net.Conn{client, server} {
		_ = c.SetDeadline(time.Now().Add(20 * time.Second))
		t.Cleanup(func() { c.Close() })
	}
	return client, server
}

// serve makes one handshake as a server and has the client read one byte, since
// in TLS 1.3 the client learns of a refusal only then.
func serve(t *testing.T, creds credentials.TransportCredentials, client func(net.Conn) error) (credentials.AuthInfo, error, error) {
	t.Helper()
	near, far := loopback(t)
	clientErr := make(chan error, 1)
	go func() { clientErr <- client(near) }()
	conn, info, err := creds.ServerHandshake(far)
	if err == nil {
		if _, err := conn.Write([]byte{'!'}); err != nil {
			t.Error(err)
		}
		defer conn.Close()
	} else {
		far.Close() // as grpc-go's server does
	}
	return info, err, <-clientErr
}

// dial makes a TLS client of a configuration.
func dial(c *tls.Config) func(net.Conn) error {
	return func(conn net.Conn) error {
		conn = tls.Client(conn, c)
		defer conn.Close()
		_, err := conn.Read(make([]byte, 1))
		return err
	}
}

// showing is a client that shows a certificate and does not care about the server.
func showing(certificates ...tls.Certificate) *tls.Config {
	return &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"h2"}, Certificates: certificates}
}

// odd issues a certificate that an authority should not. It is signed like any other.
func odd(t testing.TB, a *Authority, change func(*x509.Certificate)) tls.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber:          big.NewInt(1),
		Subject:               pkix.Name{CommonName: "odd"},
		NotBefore:             time.Now().Add(-time.Hour),
		NotAfter:              time.Now().Add(time.Hour),
		KeyUsage:              x509.KeyUsageDigitalSignature,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
		BasicConstraintsValid: true,
		URIs:                  []*url.URL{{Scheme: "spiffe", Host: a.trustDomain.Name(), Path: "/client"}},
	}
	change(template)
	der, err := x509.CreateCertificate(rand.Reader, template, a.certificate, &key.PublicKey, a.key)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

func uri(u url.URL) func(*x509.Certificate) {
	return func(c *x509.Certificate) { c.URIs = []*url.URL{&u} }
}

func TestServerHandshake(t *testing.T) {
	const (
		good      = interceptors.Reason("")
		missing   = interceptors.IdentityMissing
		untrusted = interceptors.IdentityUntrusted
		expired   = interceptors.IdentityExpired
	)
	ours := newAuthority(t, testDomain)
	sameName := newAuthority(t, testDomain)
	other := newAuthority(t, spiffeid.RequireTrustDomainFromString("stranger.test"))
	federated := newAuthority(t, otherDomain)
	td := testDomain.Name()
	for _, c := range []struct {
		name   string
		client *tls.Config
		want   interceptors.Reason
	}{
		{"good", showing(odd(t, ours, func(*x509.Certificate) {})), good},
		{"no certificate", showing(), missing},
		{"another trust domain", showing(odd(t, other, func(*x509.Certificate) {})), untrusted},
		{"another trust domain's authority with our name", showing(odd(t, sameName, func(*x509.Certificate) {})), untrusted},
		{"our authority with another trust domain's name", showing(odd(t, ours, uri(url.URL{Scheme: "spiffe", Host: "stranger.test", Path: "/client"}))), untrusted},
		{"our authority with a federated trust domain's name", showing(odd(t, ours, uri(url.URL{Scheme: "spiffe", Host: "other.test", Path: "/client"}))), untrusted},
		{"a federated authority with our name", showing(odd(t, federated, uri(url.URL{Scheme: "spiffe", Host: td, Path: "/client"}))), untrusted},
		{"a federated authority itself", showing(tls.Certificate{Certificate: [][]byte{federated.certificate.Raw}, PrivateKey: federated.key}), untrusted},
		{"a federated trust domain, expired", showing(odd(t, federated, func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Second) })), expired},
		{"a federated trust domain, two URIs", showing(odd(t, federated, func(c *x509.Certificate) {
			c.URIs = append(c.URIs, &url.URL{Scheme: "spiffe", Host: td, Path: "/client"})
		})), untrusted},
		{"a federated trust domain, upper case", showing(odd(t, federated, uri(url.URL{Scheme: "spiffe", Host: "Other.test", Path: "/client"}))), untrusted},
		{"expired", showing(odd(t, ours, func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Second) })), expired},
		{"not yet valid", showing(odd(t, ours, func(c *x509.Certificate) { c.NotBefore = time.Now().Add(time.Minute) })), expired},
		{"CA as leaf", showing(odd(t, ours, func(c *x509.Certificate) { c.IsCA = true })), untrusted},
		{"leaf that may sign certificates", showing(odd(t, ours, func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageCertSign; c.IsCA = true })), untrusted},
		{"leaf that may sign revocations", showing(odd(t, ours, func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageCRLSign })), untrusted},
		{"leaf without digitalSignature", showing(odd(t, ours, func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageKeyAgreement })), untrusted},
		{"the authority itself", showing(tls.Certificate{Certificate: [][]byte{ours.certificate.Raw}, PrivateKey: ours.key}), untrusted},
		{"no URI", showing(odd(t, ours, func(c *x509.Certificate) { c.URIs = nil; c.DNSNames = []string{"client"} })), untrusted},
		{"two URIs", showing(odd(t, ours, func(c *x509.Certificate) {
			c.URIs = append(c.URIs, &url.URL{Scheme: "spiffe", Host: td, Path: "/admin"})
		})), untrusted},
		{"another scheme", showing(odd(t, ours, uri(url.URL{Scheme: "https", Host: td, Path: "/client"}))), untrusted},
		{"no path", showing(odd(t, ours, uri(url.URL{Scheme: "spiffe", Host: td}))), untrusted},
		{"query", showing(odd(t, ours, uri(url.URL{Scheme: "spiffe", Host: td, Path: "/client", RawQuery: "a=b"}))), untrusted},
		{"empty query", showing(odd(t, ours, uri(url.URL{Scheme: "spiffe", Host: td, Path: "/client", ForceQuery: true}))), untrusted},
		{"fragment", showing(odd(t, ours, uri(url.URL{Scheme: "spiffe", Host: td, Path: "/client", Fragment: "a"}))), untrusted},
		{"dots", showing(odd(t, ours, uri(url.URL{Scheme: "spiffe", Host: td, Path: "/client/../admin"}))), untrusted},
		{"escaped dots", showing(odd(t, ours, uri(url.URL{Scheme: "spiffe", Host: td, Path: "/client/../admin", RawPath: "/client/%2e%2e/admin"}))), untrusted},
		{"double slash", showing(odd(t, ours, uri(url.URL{Scheme: "spiffe", Host: td, Path: "//client"}))), untrusted},
		{"trailing slash", showing(odd(t, ours, uri(url.URL{Scheme: "spiffe", Host: td, Path: "/client/"}))), untrusted},
		{"upper-case trust domain", showing(odd(t, ours, uri(url.URL{Scheme: "spiffe", Host: "Sluice.Test", Path: "/client"}))), untrusted},
		{"port", showing(odd(t, ours, uri(url.URL{Scheme: "spiffe", Host: td + ":443", Path: "/client"}))), untrusted},
		{"user", showing(odd(t, ours, uri(url.URL{Scheme: "spiffe", Host: td, User: url.User("a"), Path: "/client"}))), untrusted},
		{"TLS 1.2", func() *tls.Config {
			c := showing(odd(t, ours, func(*x509.Certificate) {}))
			c.MaxVersion = tls.VersionTLS12
			return c
		}(), missing},
	} {
		t.Run(c.name, func(t *testing.T) {
			var refused refusals
			source := newAuthoritySource(t, ours, "/gateway")
			trust(t, source, ours, federated)
			// Where a certificate is optional, one that is shown must be good all the same.
			if len(c.client.Certificates) > 0 {
				var again refusals
				if info, err, _ := serve(t, OptionalServerCredentials(source, again.add), dial(c.client)); (err == nil) != (c.want == good) {
					t.Errorf("optional: %v", err)
				} else if _, ok := info.(interceptors.Verified); ok != (c.want == good) {
					t.Errorf("optional: it proved %v", info)
				} else if len(again.reasons) > 0 && again.reasons[0] != c.want {
					t.Errorf("optional: refused as %v", again.reasons)
				}
			}
			info, err, clientErr := serve(t, ServerCredentials(source, refused.add), dial(c.client))
			if c.want == good {
				if err != nil || clientErr != nil || len(refused.reasons) != 0 {
					t.Fatalf("server: %v; client: %v; refusals: %v", err, clientErr, refused.reasons)
				}
				id, _ := info.(interceptors.Verified).SVID()
				if id.String() != "spiffe://sluice.test/client" {
					t.Errorf("the peer is %s", id)
				}
				return
			}
			if err == nil || clientErr == nil || info != nil {
				t.Fatalf("not refused: server %v, client %v, %v", err, clientErr, info)
			}
			if len(refused.reasons) != 1 || refused.reasons[0] != c.want {
				t.Errorf("refused as %v, not %s: %v", refused.reasons, c.want, err)
			}
			if len(c.client.Certificates) == 0 && !strings.Contains(clientErr.Error(), "certificate required") {
				t.Errorf("the client is told %q, not what it lacks", clientErr)
			}
		})
	}
}

// A federated trust domain's members are known by their own names.
func TestServerHandshakeFederated(t *testing.T) {
	ours, other := newAuthority(t, testDomain), newAuthority(t, otherDomain)
	source := newAuthoritySource(t, ours, "/gateway")
	client := showing(odd(t, other, func(*x509.Certificate) {}))
	if _, err, _ := serve(t, ServerCredentials(source, nil), dial(client)); err == nil {
		t.Error("a stranger is let in")
	}
	trust(t, source, ours, other)
	info, err, _ := serve(t, ServerCredentials(source, nil), dial(client))
	if err != nil {
		t.Fatal(err)
	}
	if id, _ := info.(AuthInfo).SVID(); id.String() != "spiffe://other.test/client" {
		t.Errorf("it is %s", id)
	}
}

// Where a certificate is optional, a client without one connects and has no
// identity; TLS is as strict as ever.
func TestOptionalCertificate(t *testing.T) {
	ours := newAuthority(t, testDomain)
	source := newAuthoritySource(t, ours, "/gateway")
	creds := OptionalServerCredentials(source, nil)
	info, err, clientErr := serve(t, creds, dial(showing()))
	if err != nil || clientErr != nil {
		t.Fatal(err, clientErr)
	}
	if _, ok := info.(interceptors.Verified); ok {
		t.Errorf("nobody is verified as %v", info)
	}
	if err := credentials.CheckSecurityLevel(info, credentials.PrivacyAndIntegrity); err != nil {
		t.Error(err)
	}
	old := showing()
	old.MaxVersion = tls.VersionTLS12
	if _, err, _ := serve(t, creds, dial(old)); err == nil {
		t.Error("TLS 1.2 is let in")
	}
	cache := new(countingCache)
	resuming := showing()
	resuming.ClientSessionCache = cache
	for range 2 {
		if _, err, clientErr := serve(t, creds, dial(resuming)); err != nil || clientErr != nil {
			t.Fatal(err, clientErr)
		}
	}
	if n := cache.puts.Load(); n != 0 {
		t.Errorf("%d tickets were given out", n)
	}
}

func TestMatcher(t *testing.T) {
	for _, c := range []struct {
		pattern, id string
		want        bool
	}{
		{"spiffe://sluice.test/model", "spiffe://sluice.test/model", true},
		{"spiffe://sluice.test/model", "spiffe://sluice.test/model/a", false},
		{"spiffe://sluice.test/ns/*/sa/model", "spiffe://sluice.test/ns/a/sa/model", true},
		{"spiffe://sluice.test/**", "spiffe://other.test/model", false},
	} {
		m, err := Matcher(c.pattern)
		if err != nil {
			t.Fatal(err)
		}
		if err := m(spiffeid.RequireFromString(c.id)); (err == nil) != c.want {
			t.Errorf("%s as %s: %v", c.id, c.pattern, err)
		}
	}
	for _, pattern := range []string{"", "model", "spiffe://sluice.test", "spiffe://*/model", "spiffe://sluice.test/mod*"} {
		if _, err := Matcher(pattern); err == nil {
			t.Errorf("%q is a pattern", pattern)
		}
	}
}

func TestServerHandshakeWithoutALPNIsRefused(t *testing.T) {
	a := newAuthority(t, testDomain)
	c := showing(odd(t, a, func(*x509.Certificate) {}))
	c.NextProtos = nil
	var refused refusals
	_, err, _ := serve(t, ServerCredentials(newAuthoritySource(t, a, "/gateway"), refused.add), dial(c))
	if err == nil || len(refused.reasons) != 1 {
		t.Errorf("%v, %v", err, refused.reasons)
	}
}

// The measured trap: a resumed connection must not get past the decision. No
// ticket is given out, and the second connection is decided anew.
func TestNothingIsResumed(t *testing.T) {
	a := newAuthority(t, testDomain)
	source := newAuthoritySource(t, a, "/gateway")
	creds := ServerCredentials(source, nil)
	cache := new(countingCache)
	c := showing(odd(t, a, func(*x509.Certificate) {}))
	c.ClientSessionCache = cache
	for range 2 {
		if _, err, clientErr := serve(t, creds, dial(c)); err != nil || clientErr != nil {
			t.Fatal(err, clientErr)
		}
	}
	if n := cache.puts.Load(); n != 0 {
		t.Errorf("%d tickets were given out", n)
	}
	if cache.gets.Load() == 0 {
		t.Error("the client never looked for a ticket: the test says nothing")
	}
	// The authority leaves the bundle: the next connection is refused.
	source.use(&material{
		svid: svidOf(t, source),
		x509: map[spiffeid.TrustDomain]*x509bundle.Bundle{testDomain: x509bundle.FromX509Authorities(testDomain, nil)},
	})
	if _, err, _ := serve(t, creds, dial(c)); err == nil {
		t.Error("the client was let in again after its authority was removed")
	}
}

type countingCache struct{ puts, gets atomic.Int32 }

func (c *countingCache) Get(string) (*tls.ClientSessionState, bool) { c.gets.Add(1); return nil, false }
func (c *countingCache) Put(_ string, s *tls.ClientSessionState) {
	if s != nil {
		c.puts.Add(1)
	}
}

func TestClientHandshake(t *testing.T) {
	ours := newAuthority(t, testDomain)
	other := newAuthority(t, spiffeid.RequireTrustDomainFromString("other.test"))
	plain := func(*x509.Certificate) {}
	server := spiffeid.RequireFromString("spiffe://sluice.test/client") // what odd issues
	for _, c := range []struct {
		name     string
		server   tls.Certificate
		expected spiffeid.Matcher
		want     interceptors.Reason
	}{
		{"expected", odd(t, ours, plain), spiffeid.MatchID(server), ""},
		{"expected member", odd(t, ours, plain), spiffeid.MatchMemberOf(testDomain), ""},
		{"not expected", odd(t, ours, plain), spiffeid.MatchID(spiffeid.RequireFromString("spiffe://sluice.test/model")), interceptors.IdentityUntrusted},
		{"nothing expected", odd(t, ours, plain), nil, interceptors.IdentityUntrusted},
		{"another trust domain", odd(t, other, plain), spiffeid.MatchAny(), interceptors.IdentityUntrusted},
		{"expired", odd(t, ours, func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Second) }), spiffeid.MatchAny(), interceptors.IdentityExpired},
		{"two URIs", odd(t, ours, func(c *x509.Certificate) { c.URIs = append(c.URIs, c.URIs[0]) }), spiffeid.MatchAny(), interceptors.IdentityUntrusted},
	} {
		t.Run(c.name, func(t *testing.T) {
			near, far := loopback(t)
			done := make(chan struct{})
			go func() {
				defer close(done)
				conn := tls.Server(far, &tls.Config{
					Certificates: []tls.Certificate{c.server}, NextProtos: []string{"h2"}, ClientAuth: tls.RequireAnyClientCert,
				})
				_ = conn.Handshake()
				conn.Close()
			}()
			var refused refusals
			creds := ClientCredentials(newAuthoritySource(t, ours, "/gateway"), c.expected, refused.add)
			conn, info, err := creds.ClientHandshake(t.Context(), "some.host:443", near)
			<-done
			if c.want == "" {
				if err != nil {
					t.Fatal(err)
				}
				defer conn.Close()
				if id, _ := info.(interceptors.Verified).SVID(); id != server {
					t.Errorf("the server is %s", id)
				}
				return
			}
			if err == nil || len(refused.reasons) != 1 || refused.reasons[0] != c.want {
				t.Errorf("%v, refused as %v", err, refused.reasons)
			}
		})
	}
}

// A client that gives up while the handshake hangs is told so at once, and it
// does not count as a refusal.
func TestClientHandshakeGivenUp(t *testing.T) {
	near, _ := loopback(t)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	var refused refusals
	creds := ClientCredentials(newAuthoritySource(t, newAuthority(t, testDomain), "/gateway"), spiffeid.MatchAny(), refused.add)
	if _, _, err := creds.ClientHandshake(ctx, "h", near); err == nil || len(refused.reasons) != 0 {
		t.Errorf("%v, %v", err, refused.reasons)
	}
}

// The proof ends with the first certificate of the chain that ends.
func TestExpiresIsTheEndOfTheChain(t *testing.T) {
	soon, later := time.Now().Add(time.Hour), time.Now().Add(2*time.Hour)
	certificate := func(end time.Time) *x509.Certificate { return &x509.Certificate{NotAfter: end} }
	for _, c := range []struct {
		name   string
		chains [][]*x509.Certificate
		want   time.Time
	}{
		{"the leaf first", [][]*x509.Certificate{{certificate(soon), certificate(later)}}, soon},
		{"the authority first", [][]*x509.Certificate{{certificate(later), certificate(soon)}}, soon},
		{"the better chain", [][]*x509.Certificate{{certificate(later), certificate(soon)}, {certificate(later), certificate(later)}}, later},
		{"no chain", nil, time.Time{}},
	} {
		t.Run(c.name, func(t *testing.T) {
			if got := end(c.chains); !got.Equal(c.want) {
				t.Errorf("got %v, want %v", got, c.want)
			}
		})
	}
}

// Identity off is off for the server, which said so, and for nobody else.
func TestInsecureCredentials(t *testing.T) {
	source, err := Open(t.Context(), open(), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer source.Close()
	if got := ServerCredentials(source, nil).Info().SecurityProtocol; got != "insecure" {
		t.Errorf("server: %q", got)
	}
	near, far := loopback(t)
	go func() { // a server that is fine
		a, _ := NewAuthority(testDomain)
		s, _ := a.Source("/model")
		defer s.Close()
		_, _, _ = ServerCredentials(s, nil).ServerHandshake(far)
		far.Close()
	}()
	if _, _, err := ClientCredentials(source, spiffeid.MatchAny(), nil).ClientHandshake(t.Context(), "h", near); err == nil {
		t.Error("a client without an identity connected")
	}
}

// Through grpc-go: each side learns who the other is, with plain grpc.Creds and
// grpc.WithTransportCredentials.
func TestGRPC(t *testing.T) {
	a := newAuthority(t, testDomain)
	gateway := newAuthoritySource(t, a, "/gateway", localhost...)
	client := newAuthoritySource(t, a, "/client")

	var seen interceptors.Peer
	server := grpc.NewServer(grpc.Creds(ServerCredentials(gateway, nil)), grpc.UnaryInterceptor(
		func(ctx context.Context, req any, _ *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
			seen = interceptors.PeerFrom(ctx)
			return next(ctx, req)
		}))
	healthpb.RegisterHealthServer(server, health.NewServer())
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var serving sync.WaitGroup
	serving.Go(func() { _ = server.Serve(l) })
	defer serving.Wait()
	defer server.Stop()

	call := func(t *testing.T, creds credentials.TransportCredentials) (*peer.Peer, error) {
		t.Helper()
		conn, err := grpc.NewClient("passthrough:///"+l.Addr().String(), grpc.WithTransportCredentials(creds))
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		var p peer.Peer
		_, err = healthpb.NewHealthClient(conn).Check(t.Context(), &healthpb.HealthCheckRequest{}, grpc.Peer(&p))
		return &p, err
	}
	expected := spiffeid.MatchID(spiffeid.RequireFromString("spiffe://sluice.test/gateway"))

	t.Run("both sides know each other", func(t *testing.T) {
		p, err := call(t, ClientCredentials(client, expected, nil))
		if err != nil {
			t.Fatal(err)
		}
		svid, _ := client.GetX509SVID()
		if seen.ID != svid.ID || !seen.Expires.Equal(svid.Certificates[0].NotAfter) || seen.Addr == nil {
			t.Errorf("the server sees %+v", seen)
		}
		if id, _ := p.AuthInfo.(AuthInfo).SVID(); id.String() != "spiffe://sluice.test/gateway" {
			t.Errorf("the client sees %s", id)
		}
		if err := credentials.CheckSecurityLevel(p.AuthInfo, credentials.PrivacyAndIntegrity); err != nil {
			t.Error(err)
		}
		if p.AuthInfo.(AuthInfo).State.Version != tls.VersionTLS13 {
			t.Error("it is not TLS 1.3")
		}
	})
	t.Run("another server is refused", func(t *testing.T) {
		_, err := call(t, ClientCredentials(client, spiffeid.MatchID(spiffeid.RequireFromString("spiffe://sluice.test/model")), nil))
		if status.Code(err) != codes.Unavailable {
			t.Error(err)
		}
	})
	t.Run("plaintext is refused", func(t *testing.T) {
		if _, err := call(t, insecure.NewCredentials()); status.Code(err) != codes.Unavailable {
			t.Error(err)
		}
	})
	// What a client that knows nothing of SPIFFE does, such as gRPC in Python.
	for _, host := range localhost {
		t.Run("verified as "+host, func(t *testing.T) {
			roots := x509.NewCertPool()
			roots.AddCert(a.certificate)
			svid, _ := client.GetX509SVID()
			_, err := call(t, credentials.NewTLS(&tls.Config{RootCAs: roots, ServerName: host, Certificates: []tls.Certificate{{
				Certificate: [][]byte{svid.Certificates[0].Raw}, PrivateKey: svid.PrivateKey,
			}}}))
			if err != nil {
				t.Error(err)
			}
		})
	}
	t.Run("a client's certificate is no server's", func(t *testing.T) {
		roots := x509.NewCertPool()
		roots.AddCert(a.certificate)
		svid, _ := client.GetX509SVID()
		if _, err := svid.Certificates[0].Verify(x509.VerifyOptions{Roots: roots, DNSName: "localhost"}); err == nil {
			t.Error("a client may call itself localhost")
		}
	})
}

func BenchmarkServerHandshake(b *testing.B) {
	b.ReportAllocs()
	a := newAuthority(b, testDomain)
	creds := ServerCredentials(newAuthoritySource(b, a, "/gateway"), nil)
	client := showing(odd(b, a, func(*x509.Certificate) {}))
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	defer l.Close()
	for b.Loop() {
		near, err := net.Dial("tcp", l.Addr().String())
		if err != nil {
			b.Fatal(err)
		}
		far, err := l.Accept()
		if err != nil {
			b.Fatal(err)
		}
		done := make(chan error, 1)
		go func() { done <- tls.Client(near, client).Handshake() }()
		if _, _, err := creds.ServerHandshake(far); err != nil {
			b.Fatal(err)
		}
		if err := <-done; err != nil {
			b.Fatal(err)
		}
		near.Close()
		far.Close()
	}
}
