package identity

import (
	"crypto/x509"
	"sync"
	"sync/atomic"
	"time"

	"github.com/sluicegate/sluice/interceptors"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc/credentials"
)

// AuthInfo is what a handshake proved. It is an interceptors.Verified.
type AuthInfo struct {
	credentials.TLSInfo
	*proof
}

var _ interceptors.Verified = AuthInfo{}

// proof is the chain of certificates that the peer showed, and what we think of
// it today.
type proof struct {
	source     *Source
	id         spiffeid.ID
	expires    time.Time
	chain      []*x509.Certificate
	connection *connection

	mu      sync.Mutex // of changes to verdict
	verdict atomic.Pointer[verdict]
}

// verdict is what one state of the source says of a chain.
type verdict struct {
	generation uint64
	bundle     *x509bundle.Bundle // of the peer's trust domain; nil if there is none
	err        error
}

// SVID is the peer's SPIFFE ID, and when its certificate or one above it ends.
func (p *proof) SVID() (spiffeid.ID, time.Time) { return p.id, p.expires }

// Revoked is nil as long as the peer's certificates would be verified again:
// not once their authority has left the bundle of its trust domain, or we have
// no such bundle any more. They are looked at again after the bundle has changed
// (50 µs); else it costs a few nanoseconds. Expiry is SVID's to say.
func (p *proof) Revoked() error {
	m := p.source.state()
	if m == nil {
		return errInsecure
	}
	if v := p.verdict.Load(); v.generation == m.generation {
		return v.err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	v := p.verdict.Load()
	if m = p.source.state(); m == nil {
		return errInsecure
	}
	if v.generation == m.generation { // somebody else has looked meanwhile
		return v.err
	}
	next := &verdict{m.generation, m.x509[p.id.TrustDomain()], v.err}
	if next.bundle != v.bundle {
		// By the clock of the proof: that it has ended since is no revocation.
		at := time.Now()
		if at.After(p.expires) {
			at = p.expires
		}
		_, _, next.err = x509svid.Verify(p.chain, m, x509svid.WithTime(at))
	}
	p.verdict.Store(next)
	return next.err
}

// Drain has calls that begin from now on take another connection, for which the
// peer has to prove itself anew; those in flight go on. It does not block. For
// gRPC it is a GOAWAY: to the peer on the server side, to ourselves on the client
// side. Peers that know their SVID is near its end need no telling.
func (p *proof) Drain() { p.connection.drain() }

// Close closes the connection, with all calls on it.
func (p *proof) Close() error { return p.connection.Close() }
