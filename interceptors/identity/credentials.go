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
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
)

// AuthInfo is what a handshake proved. It is an interceptors.Verified.
type AuthInfo struct {
	credentials.TLSInfo
	id      spiffeid.ID
	expires time.Time
}

var _ interceptors.Verified = AuthInfo{}

// SVID is the peer's SPIFFE ID, and when its certificate or one above it ends.
func (a AuthInfo) SVID() (spiffeid.ID, time.Time) { return a.id, a.expires }

// Refused is called for each handshake that fails, by many goroutines at once.
// The reason is IDENTITY_EXPIRED, IDENTITY_UNTRUSTED, or IDENTITY_MISSING if the
// handshake ended before the peer showed a certificate: it has none, does not
// speak TLS 1.3 or went away. The error is for the log; it may quote the peer's
// certificate and must not become a metric's label.
type Refused func(reason interceptors.Reason, err error)

// ServerCredentials are for servers. The peer must prove an X.509-SVID of our
// trust domain: TLS 1.3, HTTP/2, no resumption. The connection's AuthInfo is
// then an AuthInfo. Whether its SVID has expired since, and what it may do, is
// the Policy's to decide for each call. Refused may be nil.
//
// If the configuration turned identity off these are plaintext credentials.
func ServerCredentials(source *Source, refused Refused) credentials.TransportCredentials {
	if source.Insecure() {
		return insecure.NewCredentials()
	}
	return &transport{source: source, expected: spiffeid.MatchAny(), refused: refused}
}

// ClientCredentials are for clients. The server must prove an X.509-SVID of our
// trust domain that the matcher expects; its host name does not matter. A nil
// matcher expects nothing and refuses every server. Refused may be nil.
//
// If the configuration turned identity off every handshake fails: plaintext to
// a server is a decision of its own.
func ClientCredentials(source *Source, expected spiffeid.Matcher, refused Refused) credentials.TransportCredentials {
	if expected == nil {
		expected = func(spiffeid.ID) error { return errors.New("no server is expected") }
	}
	return &transport{source: source, expected: expected, refused: refused}
}

// transport is TLS as SPIFFE uses it: both sides show an X.509-SVID, and a
// name is a SPIFFE ID.
type transport struct {
	source   *Source
	expected spiffeid.Matcher
	refused  Refused
}

// handshake is the state of one handshake.
type handshake struct {
	*transport
	seen    atomic.Bool // the peer showed a certificate
	id      spiffeid.ID
	expires time.Time
}

func (t *transport) ClientHandshake(ctx context.Context, authority string, conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	h := &handshake{transport: t}
	return h.done(credentials.NewTLS(h.config()).ClientHandshake(ctx, authority, conn))
}

func (t *transport) ServerHandshake(conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	h := &handshake{transport: t}
	return h.done(credentials.NewTLS(h.config()).ServerHandshake(conn))
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
	return &tls.Config{
		MinVersion: tls.VersionTLS13,
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
			return h.certificate()
		},
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			return h.certificate()
		},
		ClientAuth:             tls.RequireAnyClientCert,
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
	out := &tls.Certificate{PrivateKey: svid.PrivateKey, Leaf: svid.Certificates[0]}
	for _, c := range svid.Certificates {
		out.Certificate = append(out.Certificate, c.Raw)
	}
	return out, nil
}

func (h *handshake) verify(state tls.ConnectionState) error {
	h.seen.Store(len(state.PeerCertificates) > 0)
	id, chains, err := x509svid.Verify(state.PeerCertificates, h.source)
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
	h.id, h.expires = id, end(chains)
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
		if t, ok := info.(credentials.TLSInfo); ok && !h.id.IsZero() {
			return conn, AuthInfo{t, h.id, h.expires}, nil
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
	case !h.seen.Load():
		return interceptors.IdentityMissing
	case errors.As(err, &invalid) && invalid.Reason == x509.Expired:
		return interceptors.IdentityExpired
	}
	return interceptors.IdentityUntrusted
}
