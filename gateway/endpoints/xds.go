package endpoints

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	"google.golang.org/grpc"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/resolver"

	configv1 "github.com/sluicegate/sluice/proto/gen/sluice/config/v1"
)

// xdsScheme is the scheme of targets for which a control plane says where the servers
// are, and how calls are balanced and made again. None of that is ours then, and
// nothing is known of the servers here. What a server has to prove stays ours: grpc-go
// takes TLS from the control plane only where the program asks it to, by credentials
// of another kind. grpc-go's client for it is the program's to import: it makes a
// program larger by 20 MB.
const xdsScheme = "xds"

// Controlled reports whether a control plane chooses among a back end's servers.
func Controlled(c *configv1.Backend) bool {
	scheme, _, _ := strings.Cut(c.GetAddress(), ":")
	return strings.EqualFold(scheme, xdsScheme)
}

// outsiders are the switches of grpc-go for what a control plane could have it send
// parts of a call to. They are off by default.
var outsiders = []string{"GRPC_EXPERIMENTAL_XDS_EXT_PROC_ON_CLIENT", "GRPC_EXPERIMENTAL_XDS_EXT_AUTHZ_ON_CLIENT"}

// obey connects to the control plane at once: what is wrong with how it is to be
// reached is an error of the configuration.
func (s *Set) obey(opts []grpc.DialOption) error {
	for _, name := range outsiders {
		if strings.EqualFold(os.Getenv(name), "true") {
			return fmt.Errorf("address: a control plane could have what is in calls sent elsewhere; unset %s", name)
		}
	}
	first := &built{Builder: resolver.Get(xdsScheme)}
	if first.Builder == nil {
		return errors.New("address: xDS is not built into this program; use DNS, " +
			"or a program without the build tag noxds, or one that imports google.golang.org/grpc/xds")
	}
	conn, err := grpc.NewClient(s.config.GetAddress(), append(opts, grpc.WithIdleTimeout(0), grpc.WithNoProxy(), grpc.WithResolvers(first))...)
	if err != nil {
		return fmt.Errorf("address: %w", err)
	}
	conn.Connect()
	if first.err != nil {
		_ = conn.Close()
		return fmt.Errorf("address: %w (GRPC_XDS_BOOTSTRAP is to name the file that says where the control plane is)", first.err)
	}
	s.ClientConn = conn
	return nil
}

// built keeps the error of making a resolver, which else only calls would see.
type built struct {
	resolver.Builder
	err error
}

func (b *built) Build(t resolver.Target, cc resolver.ClientConn, o resolver.BuildOptions) (r resolver.Resolver, err error) {
	r, b.err = b.Builder.Build(t, cc, o)
	return r, b.err
}

// SequenceHeader is the metadata in which a control plane finds what to balance by, so
// that a sequence stays at one server: a "ring_hash" policy and a hash policy of this
// header.
const SequenceHeader = "x-sluice-sequence"

// SequenceHash is its value for a sequence. It does not tell the sequence's name.
func SequenceHash(sequence string) string { return strconv.FormatUint(hash(sequence, ""), 16) }

// Unavailable notes why a call came to no server. Where a control plane chooses that
// is all that is known of them; it is logged when it changes.
func (s *Set) Unavailable(why string) {
	if s.ClientConn == nil || !Controlled(s.config) || s.GetState() != connectivity.TransientFailure {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.failure != nil && s.failure.Error() == why {
		return
	}
	s.failure = errors.New(why)
	s.log.Warn("no model server can be had", "backend", s.config.GetName(), "address", s.config.GetAddress(), "error", why)
}
