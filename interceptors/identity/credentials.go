package identity

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"sync/atomic"
	"time"

	"github.com/sluicegate/sluice/interceptors"
	"github.com/sluicegate/sluice/interceptors/internal/principals"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
)

// Refused is called for each handshake that fails, by many goroutines at once.
// The reason is IDENTITY_EXPIRED, IDENTITY_UNTRUSTED, or IDENTITY_MISSING if the
// handshake ended before the peer showed a certificate: it has none, does not
// speak TLS 1.3 or went away; POLICY_UNAVAILABLE if we have no valid identity
// ourselves. The error is for the log; it may quote the peer's
// certificate and must not become a metric's label.
type Refused func(reason interceptors.Reason, err error)

// ServerCredentials are for servers. The peer must prove an X.509-SVID of our
// trust domain or of a federated one: TLS 1.3, HTTP/2, no resumption. The
// connection's AuthInfo is then an AuthInfo. Whether its SVID has expired since,
// and what it may do, is the Policy's to decide for each call; the connection is
// drained before. Refused may be nil.
//
// If the configuration turned identity off these are plaintext credentials.
func ServerCredentials(source *Source, refused Refused) credentials.TransportCredentials {
	if source.Insecure() {
		return insecure.NewCredentials()
	}
	return &transport{source: source, expected: spiffeid.MatchAny(), refused: refused}
}

// OptionalServerCredentials are like ServerCredentials, but a peer that shows no
// certificate at all connects too. Its connection has no AuthInfo, only a
// credentials.TLSInfo, and so no identity.
func OptionalServerCredentials(source *Source, refused Refused) credentials.TransportCredentials {
	if source.Insecure() {
		return insecure.NewCredentials()
	}
	return &transport{source: source, expected: spiffeid.MatchAny(), optional: true, refused: refused}
}

// ClientCredentials are for clients. The server must prove an X.509-SVID of our
// trust domain or of a federated one that the matcher expects; its host name does
// not matter. A nil matcher expects nothing and refuses every server. The
// connection is drained before its SVID or our own ends. Refused may be nil.
//
// If the configuration turned identity off every handshake fails: plaintext to
// a server is a decision of its own.
func ClientCredentials(source *Source, expected spiffeid.Matcher, refused Refused) credentials.TransportCredentials {
	if expected == nil {
		expected = func(spiffeid.ID) error { return errors.New("no server is expected") }
	}
	return &transport{source: source, expected: expected, refused: refused}
}

// Matcher matches the SPIFFE IDs that a pattern stands for, as in the principals
// of a rule.
func Matcher(text string) (spiffeid.Matcher, error) {
	p, err := principals.ParsePattern(text)
	if err != nil {
		return nil, err
	}
	return func(id spiffeid.ID) error {
		if !p.Match(id) {
			return fmt.Errorf("%q is not expected here, only %s", id, text)
		}
		return nil
	}, nil
}

// transport is TLS as SPIFFE uses it: both sides show an X.509-SVID, and a
// name is a SPIFFE ID.
type transport struct {
	source   *Source
	expected spiffeid.Matcher
	optional bool // the client's certificate
	refused  Refused
}

// handshake is the state of one handshake.
type handshake struct {
	*transport
	seen  atomic.Bool    // the peer showed a certificate
	shown *x509svid.SVID // what we showed
	proof *proof         // nil until the peer has proved who it is
}

func (t *transport) ClientHandshake(ctx context.Context, authority string, conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	h := &handshake{transport: t}
	conn, info, err := h.done(credentials.NewTLS(h.config()).ClientHandshake(ctx, authority, conn))
	if err != nil || h.proof == nil {
		return conn, info, err
	}
	c := new(clientConnection)
	c.keep(conn, h.proof, h.shown, c.goAway)
	return c, info, nil
}

func (t *transport) ServerHandshake(conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	h := &handshake{transport: t}
	conn, info, err := h.done(credentials.NewTLS(h.config()).ServerHandshake(conn))
	if err != nil || h.proof == nil {
		return conn, info, err
	}
	c := new(serverConnection)
	c.keep(conn, h.proof, nil, c.goAway)
	return c, info, nil
}

func (t *transport) Info() credentials.ProtocolInfo {
	return credentials.ProtocolInfo{SecurityProtocol: "tls"}
}

func (t *transport) Clone() credentials.TransportCredentials { c := *t; return &c }

// OverrideServerName does nothing: host names do not matter here.
func (t *transport) OverrideServerName(string) error { return nil }

// config is for one handshake of either side. The certificate is checked in
// VerifyConnection, which runs in every handshake; VerifyPeerCertificate does
// not run in a resumed one. There is none anyway: the server gives out no
// tickets, the client keeps no session.
func (h *handshake) config() *tls.Config {
	ask := tls.RequireAnyClientCert
	if h.optional {
		ask = tls.RequestClientCert
	}
	return &tls.Config{
		MinVersion: tls.VersionTLS13,
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
			return h.certificate()
		},
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			return h.certificate()
		},
		ClientAuth:             ask,
		SessionTicketsDisabled: true,
		InsecureSkipVerify:     true, //nolint:gosec // skips the host name; VerifyConnection verifies the SPIFFE ID
		VerifyConnection:       h.verify,
	}
}

func (h *handshake) certificate() (*tls.Certificate, error) {
	svid, err := h.source.GetX509SVID()
	if err != nil {
		return nil, err
	}
	h.shown = svid
	out := &tls.Certificate{PrivateKey: svid.PrivateKey, Leaf: svid.Certificates[0]}
	for _, c := range svid.Certificates {
		out.Certificate = append(out.Certificate, c.Raw)
	}
	return out, nil
}

func (h *handshake) verify(state tls.ConnectionState) error {
	h.seen.Store(len(state.PeerCertificates) > 0)
	if h.optional && len(state.PeerCertificates) == 0 {
		return nil
	}
	m := h.source.state()
	if m == nil {
		return errInsecure
	}
	id, chains, err := x509svid.Verify(state.PeerCertificates, m)
	if err != nil {
		return err
	}
	// What the X.509-SVID standard (4.1, 4.3) asks for beyond that.
	switch leaf := state.PeerCertificates[0]; {
	case id.Path() == "":
		return fmt.Errorf("the SPIFFE ID %q has no path", id)
	case leaf.KeyUsage&x509.KeyUsageDigitalSignature == 0:
		return fmt.Errorf("the certificate of %q lacks the key usage digitalSignature", id)
	}
	if err := h.expected(id); err != nil {
		return err
	}
	h.proof = &proof{source: h.source, id: id, expires: end(chains), chain: state.PeerCertificates}
	h.proof.verdict.Store(&verdict{generation: m.generation, bundle: m.x509[id.TrustDomain()]})
	return nil
}

// end is when the last of the chains stops being valid.
func end(chains [][]*x509.Certificate) (last time.Time) {
	for _, chain := range chains {
		first := chain[0].NotAfter
		for _, c := range chain {
			if c.NotAfter.Before(first) {
				first = c.NotAfter
			}
		}
		if first.After(last) {
			last = first
		}
	}
	return last
}

func (h *handshake) done(conn net.Conn, info credentials.AuthInfo, err error) (net.Conn, credentials.AuthInfo, error) {
	if err == nil {
		t, ok := info.(credentials.TLSInfo)
		switch {
		case ok && h.proof != nil:
			return conn, AuthInfo{t, h.proof}, nil
		case ok && h.optional && len(t.State.PeerCertificates) == 0:
			return conn, t, nil
		}
		_ = conn.Close()
		err = errors.New("identity: the handshake proved no identity")
	}
	gaveUp := errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded)
	if h.refused != nil && !gaveUp { // a client's dial that was given up may still be running
		h.refused(h.reason(err), err)
	}
	return nil, nil, err
}

func (h *handshake) reason(err error) interceptors.Reason {
	var invalid x509.CertificateInvalidError
	switch {
	case errors.Is(err, errOwnExpired):
		return interceptors.PolicyUnavailable
	case !h.seen.Load():
		return interceptors.IdentityMissing
	case errors.As(err, &invalid) && invalid.Reason == x509.Expired:
		return interceptors.IdentityExpired
	}
	return interceptors.IdentityUntrusted
}
