package gateway

import (
	"context"
	"strings"
	"time"

	"google.golang.org/grpc"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	reflectionpb "google.golang.org/grpc/reflection/grpc_reflection_v1"
	reflectionalphapb "google.golang.org/grpc/reflection/grpc_reflection_v1alpha"
	"google.golang.org/protobuf/reflect/protodesc"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/descriptorpb"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/sluicegate/sluice/interceptors"
	"github.com/sluicegate/sluice/interceptors/dialect"
	adminv1 "github.com/sluicegate/sluice/proto/gen/sluice/admin/v1"
	configv1 "github.com/sluicegate/sluice/proto/gen/sluice/config/v1"
)

// Own is what a gateway with this listener serves itself, as its chain sees it, so
// that the rules decide about it: health (group "health"), and reflection and the
// admin API, which are management and must be named in full.
func Own(l *configv1.Listener) (*interceptors.Backend, error) {
	files := []protoreflect.FileDescriptor{healthpb.File_grpc_health_v1_health_proto}
	if l.GetReflection() {
		files = append(files,
			reflectionpb.File_grpc_reflection_v1_reflection_proto,
			reflectionalphapb.File_grpc_reflection_v1alpha_reflection_proto)
	}
	if l.GetAdminApi() {
		files = append(files, durationpb.File_google_protobuf_duration_proto, timestamppb.File_google_protobuf_timestamp_proto,
			adminv1.File_sluice_admin_v1_admin_proto, adminv1.File_sluice_admin_v1_pools_proto, adminv1.File_sluice_admin_v1_endpoints_proto)
	}
	set := new(descriptorpb.FileDescriptorSet)
	for _, f := range files {
		set.File = append(set.File, protodesc.ToFileDescriptorProto(f))
	}
	d, err := dialect.Fields(set, dialect.Options{})
	if err != nil {
		return nil, err
	}
	for name, m := range d.Methods {
		if strings.HasPrefix(name, "/grpc.health.v1.Health/") {
			m.Kind = dialect.Health
		}
	}
	return &interceptors.Backend{Name: "gateway", Dialect: d}, nil
}

// ownUnary guards what the gateway serves itself by the chain of the day.
func (g *Gateway) ownUnary(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
	rt := g.acquire()
	defer rt.release()
	return interceptors.UnaryServer(rt.guard.Chain)(ctx, req, info, handler)
}

// ownStream is ownUnary for streams. Calls that are forwarded come this way
// too, and are guarded in handle.
func (g *Gateway) ownStream(srv any, ss grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
	if srv == nil {
		return handler(srv, ss)
	}
	rt := g.acquire()
	defer rt.release()
	return interceptors.StreamServer(rt.guard.Chain)(srv, ss, info, handler)
}

// or is a duration, or its default if it is not set.
func or(d *durationpb.Duration, def time.Duration) time.Duration {
	if d == nil {
		return def
	}
	return d.AsDuration()
}

func orUint(v, def uint32) uint32 {
	if v == 0 {
		return def
	}
	return v
}
