package identity_test

import (
	"context"
	"fmt"
	"net"

	"google.golang.org/grpc"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/sluicegate/sluice/interceptors"
	"github.com/sluicegate/sluice/interceptors/identity"
)

// A server and a client that know each other by their SPIFFE IDs, with
// identities from an authority inside the process.
func Example() {
	authority, err := identity.NewAuthority(spiffeid.RequireTrustDomainFromString("example.org"))
	if err != nil {
		panic(err)
	}
	us, err := authority.Source("/gateway")
	if err != nil {
		panic(err)
	}
	defer us.Close()
	them, err := authority.Source("/client")
	if err != nil {
		panic(err)
	}
	defer them.Close()

	server := grpc.NewServer(
		grpc.Creds(identity.ServerCredentials(us, nil)),
		grpc.UnaryInterceptor(func(ctx context.Context, req any, _ *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
			fmt.Println("called by", interceptors.PeerFrom(ctx).ID)
			return next(ctx, req)
		}))
	healthpb.RegisterHealthServer(server, health.NewServer())
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		panic(err)
	}
	go func() { _ = server.Serve(listener) }()
	defer server.Stop()

	gateway := spiffeid.RequireFromString("spiffe://example.org/gateway")
	conn, err := grpc.NewClient(listener.Addr().String(),
		grpc.WithTransportCredentials(identity.ClientCredentials(them, spiffeid.MatchID(gateway), nil)))
	if err != nil {
		panic(err)
	}
	defer conn.Close()
	answer, err := healthpb.NewHealthClient(conn).Check(context.Background(), &healthpb.HealthCheckRequest{})
	fmt.Println(answer.GetStatus(), err)
	// Output:
	// called by spiffe://example.org/client
	// SERVING <nil>
}
