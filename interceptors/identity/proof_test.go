package identity

import (
	"context"
	"crypto/x509"
	"errors"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/codes"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"
)

// trust has a source trust the authorities of these, each for its own trust
// domain, and nobody else.
func trust(t testing.TB, s *Source, all ...*Authority) {
	t.Helper()
	m := &material{svid: svidOf(t, s), x509: make(map[spiffeid.TrustDomain]*x509bundle.Bundle), jwt: s.state().jwt}
	for _, a := range all {
		if m.x509[a.trustDomain] == nil {
			m.x509[a.trustDomain] = x509bundle.New(a.trustDomain)
		}
		m.x509[a.trustDomain].AddX509Authority(a.certificate)
	}
	s.use(m)
}

// proofOf is what a server with this source has of a client, after a handshake.
func proofOf(t *testing.T, s *Source, a *Authority, change func(*x509.Certificate)) AuthInfo {
	t.Helper()
	info, err, clientErr := serve(t, ServerCredentials(s, nil), dial(showing(odd(t, a, change))))
	if err != nil || clientErr != nil {
		t.Fatal(err, clientErr)
	}
	return info.(AuthInfo)
}

func TestRevoked(t *testing.T) {
	ours, next, other := newAuthority(t, testDomain), newAuthority(t, testDomain), newAuthority(t, otherDomain)
	for _, c := range []struct {
		name    string
		of      *Authority
		now     []*Authority
		revoked bool
	}{
		{"nothing changes", ours, []*Authority{ours, other}, false},
		{"another authority comes", ours, []*Authority{ours, next, other}, false},
		{"another one takes over", ours, []*Authority{next, other}, true},
		{"the bundle goes", ours, []*Authority{other}, true},
		{"the federation goes", other, []*Authority{ours}, true},
		{"another federation goes", ours, []*Authority{ours}, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := newAuthoritySource(t, ours, "/gateway")
			trust(t, s, ours, other)
			p := proofOf(t, s, c.of, func(*x509.Certificate) {})
			if err := p.Revoked(); err != nil {
				t.Fatalf("at once: %v", err)
			}
			trust(t, s, c.now...)
			if err := p.Revoked(); (err != nil) != c.revoked {
				t.Errorf("revoked: %v", err)
			}
			trust(t, s, ours, other) // it was a mistake
			if err := p.Revoked(); err != nil {
				t.Errorf("revoked for good: %v", err)
			}
		})
	}
}

// That a certificate has ended since is not a revocation; that its authority has
// gone is one all the same.
func TestRevokedIsNotExpired(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ours, next := newAuthority(t, testDomain), newAuthority(t, testDomain)
		s, err := ours.SourceFor(5*24*time.Hour, "/gateway")
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		svid := issue(t, ours, "/client")
		p := &proof{source: s, id: svid.ID, expires: svid.Certificates[0].NotAfter, chain: svid.Certificates}
		p.verdict.Store(new(verdict))
		time.Sleep(svidLife + time.Hour)
		if err := p.Revoked(); err != nil {
			t.Error(err)
		}
		trust(t, s, next)
		if err := p.Revoked(); err == nil {
			t.Error("not revoked")
		}
	})
}

// A reload that brings another source is a change like any other.
func TestRevokedAfterReplace(t *testing.T) {
	ours, other := newAuthority(t, testDomain), newAuthority(t, otherDomain)
	first, second := newAuthoritySource(t, ours, "/gateway"), newAuthoritySource(t, ours, "/gateway")
	trust(t, first, ours, other)
	p := proofOf(t, first, other, func(*x509.Certificate) {})
	q := proofOf(t, first, ours, func(*x509.Certificate) {})
	second.Replace(first)
	second.Replace(first) // once is enough
	if err := p.Revoked(); err == nil {
		t.Error("the other trust domain is not known any more")
	}
	if err := q.Revoked(); err != nil {
		t.Error(err)
	}
	if first.Generation() != second.Generation() || svidOf(t, first) != svidOf(t, second) {
		t.Error("the first source does not show what the second has")
	}
	off, err := Open(t.Context(), open(), nil)
	if err != nil {
		t.Fatal(err)
	}
	off.Replace(second)
	if err := q.Revoked(); !errors.Is(err, errInsecure) {
		t.Errorf("identity is off: %v", err)
	}
}

// Many calls ask at once while bundles come and go.
func TestRevokedConcurrently(t *testing.T) {
	ours, other := newAuthority(t, testDomain), newAuthority(t, otherDomain)
	s := newAuthoritySource(t, ours, "/gateway")
	trust(t, s, ours, other)
	p := proofOf(t, s, other, func(*x509.Certificate) {})
	var work sync.WaitGroup
	for range 4 {
		work.Go(func() {
			for range 2000 {
				_ = p.Revoked()
			}
		})
	}
	for n := range 100 {
		trust(t, s, slices.Clip([]*Authority{ours, other})[:1+n%2]...)
	}
	work.Wait()
	if err := p.Revoked(); err != nil {
		t.Error(err)
	}
	trust(t, s, ours)
	if p.Revoked() == nil {
		t.Error("the last change went unnoticed")
	}
}

// A client whose authority has gone is told to connect anew, and fails to; a
// server whose authority has gone is left, and what runs on it ends.
func TestRevokedConnections(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	ours, other := newAuthority(t, testDomain), newAuthority(t, otherDomain)
	t.Run("client", func(t *testing.T) {
		server, client := newAuthoritySource(t, ours, "/server"), newAuthoritySource(t, other, "/client")
		trust(t, server, ours, other)
		trust(t, client, ours, other)
		address := listen(t, ServerCredentials(server, nil), func(context.Context) error { return nil })
		caller := connect(t, address, ClientCredentials(client, spiffeid.MatchAny(), nil))
		stream, err := caller.Watch(ctx, &healthpb.HealthCheckRequest{})
		if err != nil {
			t.Fatal(err)
		}
		trust(t, server, ours)
		// Drained, not cut: the stream goes on, new calls find no way in.
		for {
			if _, err = caller.Check(ctx, &healthpb.HealthCheckRequest{}); err != nil {
				break
			}
		}
		if status.Code(err) != codes.Unavailable {
			t.Errorf("new calls: %v", err)
		}
		for range 10 {
			if _, err := stream.Recv(); err != nil {
				t.Fatalf("the stream: %v", err)
			}
		}
	})
	t.Run("server", func(t *testing.T) {
		server, client := newAuthoritySource(t, other, "/server"), newAuthoritySource(t, ours, "/client")
		trust(t, server, ours, other)
		trust(t, client, ours, other)
		address := listen(t, ServerCredentials(server, nil), func(context.Context) error { return nil })
		caller := connect(t, address, ClientCredentials(client, spiffeid.MatchAny(), nil))
		stream, err := caller.Watch(ctx, &healthpb.HealthCheckRequest{})
		if err != nil {
			t.Fatal(err)
		}
		trust(t, client, ours)
		for err == nil { // for revokedGrace
			_, err = stream.Recv()
		}
		if status.Code(err) != codes.Unavailable {
			t.Errorf("the stream: %v", err)
		}
		if _, err = caller.Check(ctx, &healthpb.HealthCheckRequest{}); status.Code(err) != codes.Unavailable {
			t.Errorf("new calls: %v", err)
		}
	})
}

// A source that nobody connects with any more keeps no connection.
func TestConnectionsAreForgotten(t *testing.T) {
	ours := newAuthority(t, testDomain)
	first, second := newAuthoritySource(t, ours, "/gateway"), newAuthoritySource(t, ours, "/gateway")
	a := proofOf(t, first, ours, func(*x509.Certificate) {})
	p := &proof{source: first, id: a.id, expires: a.expires, chain: a.chain}
	p.verdict.Store(a.verdict.Load())
	var b connection
	b.keep(discardClose{}, p, nil, func() {})
	_ = a.Close()
	second.Replace(first)
	if n := len(second.connections); n != 1 {
		t.Errorf("%d connections were handed on, of one", n)
	}
	b.Close()
	b.plan()
	if n := len(second.connections) + len(first.connections); n != 0 {
		t.Errorf("%d connections are kept", n)
	}
}

type discardClose struct{ discard }

func (discardClose) Close() error { return nil }

func BenchmarkRevoked(b *testing.B) {
	ours := newAuthority(b, testDomain)
	s := newAuthoritySource(b, ours, "/gateway")
	svid := issue(b, ours, "/client")
	p := &proof{source: s, id: svid.ID, expires: svid.Certificates[0].NotAfter, chain: svid.Certificates}
	p.verdict.Store(new(verdict))
	b.Run("unchanged", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			_ = p.Revoked()
		}
	})
	b.Run("changed", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			p.verdict.Store(new(verdict))
			_ = p.Revoked()
		}
	})
}
