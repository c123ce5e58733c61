package endpoints

import (
	"google.golang.org/grpc/resolver"
)

// listScheme is the scheme of targets that stand for Backend.addresses.
const listScheme = "sluice-addresses"

// resolvers are grpc-go's, for the targets that it knows by itself, and the one for
// lists. They tell the balancer which Set it works for.
func (s *Set) resolvers() []resolver.Builder {
	out := []resolver.Builder{list{s}}
	for _, scheme := range []string{"dns", "passthrough", "unix", "unix-abstract"} {
		switch b := resolver.Get(scheme).(type) {
		case nil:
		case resolver.AuthorityOverrider:
			out = append(out, overriding{named{b.(resolver.Builder), s}, b})
		default:
			out = append(out, named{b, s})
		}
	}
	return out
}

// named is a resolver whose addresses say which Set they are for.
type named struct {
	resolver.Builder
	set *Set
}

func (b named) Build(t resolver.Target, cc resolver.ClientConn, o resolver.BuildOptions) (resolver.Resolver, error) {
	return b.Builder.Build(t, marked{cc, b.set}, o)
}

// overriding is one that also says what the servers are called.
type overriding struct {
	named
	resolver.AuthorityOverrider
}

// list resolves to the addresses of a Set.
type list struct{ set *Set }

func (list) Scheme() string { return listScheme }

func (b list) Build(_ resolver.Target, cc resolver.ClientConn, _ resolver.BuildOptions) (resolver.Resolver, error) {
	var state resolver.State
	for _, a := range b.set.config.GetAddresses() {
		state.Endpoints = append(state.Endpoints, resolver.Endpoint{Addresses: []resolver.Address{{Addr: a}}})
	}
	_ = marked{cc, b.set}.UpdateState(state) // fails only once the connection is closed
	return settled{}, nil
}

// settled is a resolver that has nothing more to say.
type settled struct{}

func (settled) ResolveNow(resolver.ResolveNowOptions) {}
func (settled) Close()                                {}

type setKey struct{}

type marked struct {
	resolver.ClientConn
	set *Set
}

func (m marked) UpdateState(s resolver.State) error {
	s.Attributes = s.Attributes.WithValue(setKey{}, m.set)
	return m.ClientConn.UpdateState(s)
}
