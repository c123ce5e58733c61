package interceptors

import (
	"context"
	"net"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"
)

// Peer is who is at the other end of a connection.
type Peer struct {
	// ID is the SPIFFE ID that the connection's handshake proved; zero if it
	// proved none.
	ID spiffeid.ID
	// Expires is when the proof ends; zero if there is none.
	Expires time.Time
	// Addr is the network address, for people; nil if it is not known.
	Addr net.Addr
	// Proof is what the handshake proved, for those who want to know whether it
	// still holds; nil if it proved nothing.
	Proof Verified
}

// Verified is implemented by the AuthInfo of connections whose handshake
// verified an X.509-SVID. Only such a connection has an identity: what a
// certificate merely says does not count.
type Verified interface {
	credentials.AuthInfo
	// SVID is the peer's SPIFFE ID and the end of its certificate's life.
	SVID() (spiffeid.ID, time.Time)
	// Revoked is nil as long as the certificate would be verified again today:
	// not once its authority has left the trust bundle. Expiry is SVID's to say.
	// It is cheap while the bundle does not change.
	Revoked() error
}

// PeerFrom reads the peer from the context of a grpc-go server or client call.
func PeerFrom(ctx context.Context) Peer {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return Peer{}
	}
	out := Peer{Addr: p.Addr}
	if v, ok := p.AuthInfo.(Verified); ok {
		out.ID, out.Expires = v.SVID()
		out.Proof = v
	}
	return out
}
