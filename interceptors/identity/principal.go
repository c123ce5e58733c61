package identity

import (
	"errors"
	"fmt"
	"time"

	"github.com/sluicegate/sluice/interceptors"
	"github.com/sluicegate/sluice/interceptors/internal/principals"
	configv1 "github.com/sluicegate/sluice/proto/gen/sluice/config/v1"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// How a caller proved its identity.
const (
	viaMTLS      = "mtls"
	viaJWT       = "jwt"
	viaForwarded = "forwarded"
)

// callers says what proves an identity.
type callers struct {
	insecure bool // nothing: there are none
	// certless are callers without a client certificate; they need a token.
	certless, plaintext bool
	audiences           []string // of tokens; nil: they count for nothing
	tokens              *tokens
	// Whose calls are made by whom a token names, and by whom the proxy says.
	tokenProxies, proxies principals.Set
}

// compileCallers reads the configuration. What could not have an effect is an error.
func compileCallers(c *configv1.Identity) (t callers, err error) {
	t = callers{
		insecure:  c.GetInsecure() != nil,
		plaintext: c.GetPlaintextListener(),
		certless:  c.GetPlaintextListener() || c.GetClientCertificate() == configv1.ClientCertificate_CLIENT_CERTIFICATE_OPTIONAL,
	}
	if t.insecure {
		for field, set := range map[string]bool{
			"client_certificate": c.GetClientCertificate() != 0, "plaintext_listener": c.GetPlaintextListener(),
			"jwt": c.GetJwt() != nil, "forwarded": c.GetForwarded() != nil,
		} {
			if set {
				return t, fmt.Errorf("identity.%s: with identity.insecure nobody has an identity; leave one of the two out", field)
			}
		}
		return t, nil
	}
	if t.plaintext {
		switch {
		case c.GetClientCertificate() != 0:
			return t, errors.New("identity.client_certificate: a plaintext listener sees no certificates; leave it out")
		case c.GetForwarded() != nil:
			return t, errors.New("identity.forwarded: a proxy is believed by its own certificate, and a plaintext listener sees none; leave it out")
		case len(c.GetJwt().GetProxies()) > 0:
			return t, errors.New("identity.jwt.proxies: a plaintext listener sees no proxy's certificate, and takes the token of every caller; leave it out")
		case c.GetJwt() == nil:
			return t, errors.New("identity.plaintext_listener: callers are known by their JWT-SVIDs there; add identity.jwt")
		}
	}
	if t.certless && c.GetJwt() == nil {
		return t, errors.New("identity.client_certificate: callers without one are known by their JWT-SVIDs; add identity.jwt")
	}
	if j := c.GetJwt(); j != nil {
		t.audiences = j.GetAudiences()
		if len(t.audiences) == 0 {
			return t, errors.New("identity.jwt.audiences: name at least one; a token for no particular audience would be good everywhere")
		}
		for n, a := range t.audiences {
			if a == "" {
				return t, fmt.Errorf("identity.jwt.audiences[%d]: it is empty", n)
			}
		}
		if len(j.GetProxies()) == 0 && !t.certless {
			return t, errors.New("identity.jwt: every caller has a certificate here, and is who that says; " +
				"name the proxies that pass tokens on (identity.jwt.proxies), or let callers come without a certificate (identity.client_certificate)")
		}
		if t.tokenProxies, err = parseProxies("jwt", j.GetProxies()); err != nil {
			return t, err
		}
	}
	if f := c.GetForwarded(); f != nil {
		if len(f.GetProxies()) == 0 {
			return t, errors.New("identity.forwarded.proxies: name at least one")
		}
		t.proxies, err = parseProxies("forwarded", f.GetProxies())
	}
	return t, err
}

func parseProxies(field string, texts []string) (principals.Set, error) {
	p, err := principals.ParseIDs(texts)
	if err != nil {
		return p, fmt.Errorf("identity.%s.proxies%w", field, err)
	}
	return p, nil
}

// caller is who makes a call.
type caller struct {
	id    spiffeid.ID // zero for anonymous
	via   string
	token time.Time // when the JWT-SVID ends; zero if there is none
}

// identify finds out who makes a call. It does not say whether the proof has
// expired.
func (t *callers) identify(c *interceptors.Call) (caller, error) {
	peer := &c.Peer
	if peer.ID.IsZero() {
		return t.withoutCertificate(c)
	}
	if peer.Proof != nil {
		if err := peer.Proof.Revoked(); err != nil {
			d := untrusted("the authority that issued this connection's certificate is not trusted any more; connect again with a certificate of one that is")
			d.Cause = err
			return caller{}, d
		}
	}
	var token, forwarded []string
	if t.tokenProxies.Match(peer.ID) {
		token = c.Metadata[tokenHeader]
	}
	if t.proxies.Match(peer.ID) {
		forwarded = c.Metadata[forwardedHeader]
	}
	switch {
	case token != nil && forwarded != nil:
		return caller{}, untrusted("the proxy sent a token and %s, and either could name the caller; "+
			"have it send one, or trust it for one (identity.jwt.proxies, identity.forwarded.proxies)", forwardedHeader)
	case token != nil:
		return t.byToken(token)
	case len(forwarded) > 1:
		return caller{}, untrusted("the call has %d values of the metadata %s; one proxy sends one", len(forwarded), forwardedHeader)
	case forwarded != nil:
		id, err := forwardedID(forwarded[0], peer.ID)
		if err != nil {
			return caller{}, untrusted("the metadata %s cannot be taken: %s", forwardedHeader, err)
		}
		return caller{id: id, via: viaForwarded}, nil
	}
	return caller{id: peer.ID, via: viaMTLS}, nil
}

// withoutCertificate is identify for a connection that proved no identity.
func (t *callers) withoutCertificate(c *interceptors.Call) (caller, error) {
	if t.insecure {
		return caller{via: anonymous}, nil
	}
	token := c.Metadata[tokenHeader]
	switch {
	case t.certless && token != nil:
		return t.byToken(token)
	case t.plaintext:
		return caller{}, missing(`send a JWT-SVID in the metadata authorization ("Bearer", a space, the token)`)
	case t.certless:
		return caller{}, missing(`connect with mutual TLS and an X.509-SVID, or send a JWT-SVID in the metadata authorization ("Bearer", a space, the token)`)
	}
	return caller{}, missing("connect with mutual TLS and an X.509-SVID")
}

func missing(remedy string) error {
	return interceptors.Deny(policyName, interceptors.IdentityMissing, "the caller has no identity; %s", remedy)
}

func (t *callers) byToken(values []string) (caller, error) {
	if t.tokens == nil {
		return caller{}, interceptors.Deny(policyName, interceptors.PolicyUnavailable, "there are no keys to verify JWT-SVIDs with")
	}
	v, err := t.tokens.verify(values)
	if err != nil {
		return caller{}, err
	}
	return caller{id: v.id, via: viaJWT, token: v.expires}, nil
}

// current refuses a caller whose certificate or token, or whose proxy's
// certificate, has expired for longer than the grace.
func (who *caller) current(c *interceptors.Call, grace time.Duration) error {
	if c.Peer.Expires.IsZero() && who.token.IsZero() {
		return nil
	}
	now := time.Now().Add(-grace)
	switch {
	case !c.Peer.Expires.IsZero() && !now.Before(c.Peer.Expires):
		return interceptors.Deny(policyName, interceptors.IdentityExpired,
			"the certificate that this connection was made with expired at %s; connect again with a new one",
			c.Peer.Expires.UTC().Format(time.RFC3339))
	case !who.token.IsZero() && !now.Before(who.token):
		return interceptors.Deny(policyName, interceptors.IdentityExpired,
			"the JWT-SVID expired at %s; call again with a new one", who.token.Add(-leeway).UTC().Format(time.RFC3339))
	}
	return nil
}
