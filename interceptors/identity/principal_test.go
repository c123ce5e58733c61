package identity

import (
	"errors"
	"fmt"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/sluicegate/sluice/interceptors"
	configv1 "github.com/sluicegate/sluice/proto/gen/sluice/config/v1"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
)

// shown is a proof that can be revoked.
type shown struct {
	credentials.TLSInfo
	revoked, broken atomic.Bool
}

func (s *shown) SVID() (spiffeid.ID, time.Time) { return spiffeid.ID{}, time.Time{} }

func (s *shown) Revoked() error {
	if s.broken.Load() {
		panic("broken")
	}
	if s.revoked.Load() {
		return errors.New("SECRET")
	}
	return nil
}

// of makes a configuration whose callers may do anything.
func of(edits ...func(*configv1.Identity)) *configv1.Identity {
	c := secure(allow("spiffe://sluice.test/**", "inference metadata health", "*"))
	for _, e := range edits {
		e(c)
	}
	return c
}

func withJWT(proxies ...string) func(*configv1.Identity) {
	return func(c *configv1.Identity) {
		c.Jwt = &configv1.JWTIdentity{Audiences: []string{"sluice"}, Proxies: proxies}
	}
}

func withForwarded(proxies ...string) func(*configv1.Identity) {
	return func(c *configv1.Identity) { c.Forwarded = &configv1.ForwardedIdentity{Proxies: proxies} }
}

func optional(c *configv1.Identity) {
	c.ClientCertificate = configv1.ClientCertificate_CLIENT_CERTIFICATE_OPTIONAL
}

func plaintext(c *configv1.Identity) { c.PlaintextListener = true }

func TestCallers(t *testing.T) {
	const (
		missing   = string(interceptors.IdentityMissing)
		untrusted = string(interceptors.IdentityUntrusted)
		expired   = string(interceptors.IdentityExpired)

		client = "spiffe://sluice.test/client"
		proxy  = "spiffe://sluice.test/proxy"
		other  = "spiffe://sluice.test/other"
	)
	a := newAuthority(t, testDomain)
	good := "Bearer " + jwtOf(t, a, "/client", 0)
	late := "Bearer " + jwtOf(t, a, "/client", -2*leeway)
	slow := "Bearer " + jwtOf(t, a, "/client", -leeway/2)
	const xfcc = "By=spiffe://sluice.test/proxy;URI=spiffe://sluice.test/client"
	for _, c := range []struct {
		name   string
		config *configv1.Identity
		peer   string
		md     []string
		want   string // principal and how, or a reason
	}{
		{"certificate", of(), client, nil, client + " mtls"},
		{"none", of(), "", nil, missing},
		{"token that counts for nothing", of(), client, []string{"authorization", good}, client + " mtls"},
		{"token without certificate, not allowed", of(), "", []string{"authorization", good}, missing},
		{"token without certificate, though proxies have tokens", of(withJWT(proxy)), "", []string{"authorization", good}, missing},

		{"optional: certificate", of(withJWT(), optional), other, nil, other + " mtls"},
		{"optional: token", of(withJWT(), optional), "", []string{"authorization", good}, client + " jwt"},
		{"optional: neither", of(withJWT(), optional), "", nil, missing},
		{"optional: bad token", of(withJWT(), optional), "", []string{"authorization", "Bearer x"}, untrusted},
		{"optional: two tokens", of(withJWT(), optional), "", []string{"authorization", good, "authorization", good}, untrusted},
		{"optional: expired token", of(withJWT(), optional), "", []string{"authorization", late}, expired},
		{"optional: a clock that is late", of(withJWT(), optional), "", []string{"authorization", slow}, client + " jwt"},
		{"optional: both, and the certificate counts", of(withJWT(), optional), other, []string{"authorization", good}, other + " mtls"},
		{"optional: certificate and a bad token", of(withJWT(), optional), other, []string{"authorization", "Basic x"}, other + " mtls"},
		{"optional: what a stranger forwards", of(withJWT(), optional), "", []string{forwardedHeader, xfcc}, missing},

		{"plaintext: token", of(withJWT(), plaintext), "", []string{"authorization", good}, client + " jwt"},
		{"plaintext: none", of(withJWT(), plaintext), "", nil, missing},
		{"plaintext: what a stranger forwards", of(withJWT(), plaintext), "", []string{forwardedHeader, xfcc}, missing},

		{"token by a proxy", of(withJWT(proxy)), proxy, []string{"authorization", good}, client + " jwt"},
		{"no token by a proxy", of(withJWT(proxy)), proxy, nil, proxy + " mtls"},
		{"bad token by a proxy", of(withJWT(proxy)), proxy, []string{"authorization", "Bearer x"}, untrusted},
		{"other credentials by a proxy", of(withJWT(proxy)), proxy, []string{"authorization", "Basic x"}, untrusted},
		{"token by somebody else", of(withJWT(proxy)), other, []string{"authorization", good}, other + " mtls"},
		{"proxies by pattern", of(withJWT("spiffe://sluice.test/*")), proxy, []string{"authorization", good}, client + " jwt"},

		{"forwarded", of(withForwarded(proxy)), proxy, []string{forwardedHeader, xfcc}, client + " forwarded"},
		{"nothing forwarded", of(withForwarded(proxy)), proxy, nil, proxy + " mtls"},
		{"forwarded by somebody else", of(withForwarded(proxy)), other, []string{forwardedHeader, xfcc}, other + " mtls"},
		{"forwarded, when nobody is believed", of(), proxy, []string{forwardedHeader, xfcc}, proxy + " mtls"},
		{"forwarded empty", of(withForwarded(proxy)), proxy, []string{forwardedHeader, ""}, untrusted},
		{"forwarded twice", of(withForwarded(proxy)), proxy, []string{forwardedHeader, xfcc, forwardedHeader, xfcc}, untrusted},
		{"forwarded malformed", of(withForwarded(proxy)), proxy, []string{forwardedHeader, xfcc + ";"}, untrusted},
		{"forwarded for another proxy", of(withForwarded("spiffe://sluice.test/*")), other, []string{forwardedHeader, xfcc}, untrusted},
		{"forwarded, and a token that passes on", of(withForwarded(proxy)), proxy, []string{forwardedHeader, xfcc, "authorization", good}, client + " forwarded"},
		{"token, and a certificate that counts for nothing", of(withJWT(proxy)), proxy, []string{forwardedHeader, xfcc, "authorization", good}, client + " jwt"},
		{"two words of one proxy", of(withJWT(proxy), withForwarded(proxy)), proxy, []string{forwardedHeader, xfcc, "authorization", good}, untrusted},
		{"one word of a proxy that has two", of(withJWT(proxy), withForwarded(proxy)), proxy, []string{forwardedHeader, xfcc}, client + " forwarded"},
		{"the other one", of(withJWT(proxy), withForwarded(proxy)), proxy, []string{"authorization", good}, client + " jwt"},
	} {
		t.Run(c.name, func(t *testing.T) {
			p := newPolicy(t, c.config)
			if c.config.Jwt != nil {
				p.callers.tokens = newTokens(c.config.Jwt.Audiences, keysOf(a), func() uint64 { return 1 })
			}
			call := callOf(c.peer, infer)
			call.Metadata = metadata.Pairs(c.md...)
			gate := reason(t, p.Allow(call))
			_, err := p.Begin(call)
			if got := reason(t, err); got != gate {
				t.Errorf("Allow says %q and Begin %q", gate, got)
			}
			if err != nil {
				if string(gate) != c.want || call.Principal != "" || !call.ID.IsZero() {
					t.Errorf("%v, principal %q; want %s", err, call.Principal, c.want)
				}
				return
			}
			who, err := p.callers.identify(call)
			if got := fmt.Sprint(who.id, " ", who.via); err != nil || got != c.want || call.Principal != who.id.String() || call.ID != who.id {
				t.Errorf("%s (%v), principal %q; want %s", got, err, call.Principal, c.want)
			}
			values, said := call.Outgoing["authorization"]
			if sends := !said || len(values) > 0; sends != (who.via != "jwt") {
				t.Errorf("the token goes on: %v", sends)
			}
		})
	}
}

func TestCallersRevoked(t *testing.T) {
	p := newPolicy(t, of(withForwarded("spiffe://sluice.test/proxy")))
	call := callOf("spiffe://sluice.test/proxy", infer)
	proof := new(shown)
	call.Peer.Proof = proof
	call.Metadata = metadata.Pairs(forwardedHeader, "URI=spiffe://sluice.test/client")
	part, err := p.Begin(call)
	if err != nil {
		t.Fatal(err)
	}
	proof.revoked.Store(true)
	inference := &interceptors.Inference{Call: call, Model: "m"}
	for what, err := range map[string]error{"Begin": second(p.Begin(call)), "Allow": p.Allow(call), "Authorize": authorize(part, inference)} {
		if got := reason(t, err); got != interceptors.IdentityUntrusted {
			t.Errorf("%s: %q", what, got)
		} else if strings.Contains(err.Error(), "SECRET") {
			t.Errorf("%s tells %v", what, err)
		}
	}
}

func second[T any](_ T, err error) error { return err }

// A token that is needed and cannot be verified is not believed.
func TestNoKeysForTokens(t *testing.T) {
	p := newPolicy(t, of(withJWT(), optional))
	p.Use(nil, nil)
	call := callOf("", infer)
	call.Metadata = metadata.Pairs("authorization", "Bearer x")
	if got := reason(t, p.Allow(call)); got != interceptors.PolicyUnavailable {
		t.Errorf("%q", got)
	}
}

func TestCallersThatCannotBe(t *testing.T) {
	const proxy = "spiffe://sluice.test/proxy"
	insecure := func(c *configv1.Identity) {
		c.Source = &configv1.Identity_Insecure{Insecure: &configv1.Insecure{}}
		c.Rules = nil
	}
	for _, c := range []struct {
		name   string
		config *configv1.Identity
		want   string
	}{
		{"insecure and jwt", of(insecure, withJWT()), "identity.jwt: with identity.insecure"},
		{"insecure and forwarded", of(insecure, withForwarded(proxy)), "identity.forwarded: with identity.insecure"},
		{"insecure and plaintext", of(insecure, plaintext), "identity.plaintext_listener: with identity.insecure"},
		{"insecure and optional", of(insecure, optional), "identity.client_certificate: with identity.insecure"},
		{"optional without jwt", of(optional), "identity.client_certificate: callers without one"},
		{"plaintext without jwt", of(plaintext), "identity.plaintext_listener: callers are known"},
		{"plaintext and optional", of(plaintext, withJWT(), optional), "identity.client_certificate: a plaintext listener"},
		{"plaintext and forwarded", of(plaintext, withJWT(), withForwarded(proxy)), "identity.forwarded: a proxy"},
		{"plaintext and proxies", of(plaintext, withJWT(proxy)), "identity.jwt.proxies: a plaintext listener"},
		{"jwt for nobody", of(withJWT()), "identity.jwt: every caller has a certificate"},
		{"jwt proxy", of(withJWT(proxy, "proxy")), "identity.jwt.proxies[1]: "},
		{"anonymous jwt proxy", of(withJWT("anonymous")), "identity.jwt.proxies[0]: "},
		{"forwarded by nobody", of(withForwarded()), "identity.forwarded.proxies: name at least one"},
		{"forwarded by a domain", of(withForwarded("spiffe://sluice.test")), "identity.forwarded.proxies[0]: "},
		{"no audience", of(withJWT(proxy), func(c *configv1.Identity) { c.Jwt.Audiences = nil }), "identity.jwt.audiences: "},
		{"empty audience", of(withJWT(proxy), func(c *configv1.Identity) { c.Jwt.Audiences = []string{"a", ""} }), "identity.jwt.audiences[1]: "},
	} {
		t.Run(c.name, func(t *testing.T) {
			if _, err := New(c.config); err == nil || !strings.HasPrefix(err.Error(), c.want) {
				t.Errorf("%v, want %q", err, c.want)
			}
		})
	}
}
