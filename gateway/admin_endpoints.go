package gateway

import (
	"cmp"
	"context"
	"slices"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/sluicegate/sluice/gateway/endpoints"
	adminv1 "github.com/sluicegate/sluice/proto/gen/sluice/admin/v1"
)

// adminEndpoints is the admin API over the model servers of the configuration of the day.
type adminEndpoints struct {
	adminv1.UnimplementedEndpointsServiceServer
	*Gateway
}

func (a adminEndpoints) ListEndpoints(_ context.Context, r *adminv1.ListEndpointsRequest) (*adminv1.ListEndpointsResponse, error) {
	rt := a.acquire()
	defer rt.release()
	out, found := new(adminv1.ListEndpointsResponse), r.GetBackend() == ""
	for _, b := range rt.guard.Backends() {
		if r.GetBackend() == "" || r.GetBackend() == b.Name {
			found = true
			out.Endpoints = append(out.Endpoints, rt.upstreams[b].endpoints()...)
		}
	}
	if !found {
		return nil, status.Errorf(codes.NotFound, "there is no back end %q", r.GetBackend())
	}
	return out, nil
}

// endpoints are the model servers of a back end by address; where none is known yet,
// what is said of them in the configuration.
func (u *upstream) endpoints() []*adminv1.Endpoint {
	var out []*adminv1.Endpoint
	sequences := u.servers.Sequences()
	for _, s := range u.servers.Snapshot() {
		e := &adminv1.Endpoint{
			Backend: u.name, Address: s.Address, Calls: s.Calls, Permits: s.Load,
			Sequences: int64(sequences[s.Address]), Failures: int64(s.Failures),
		}
		switch {
		case s.Ejected && s.Ready:
			e.State, e.EjectedUntil = adminv1.EndpointState_ENDPOINT_STATE_EJECTED, timestamppb.New(s.Until)
		case s.Ready:
			e.State = adminv1.EndpointState_ENDPOINT_STATE_READY
		case s.Failure != nil:
			e.State, e.Failure = adminv1.EndpointState_ENDPOINT_STATE_NOT_READY, s.Failure.Error()
		default:
			e.State = adminv1.EndpointState_ENDPOINT_STATE_CONNECTING
		}
		if !s.Heard.IsZero() {
			e.Reported = &adminv1.ReportedLoad{
				Source: sources[s.Source], At: timestamppb.New(s.Heard.Truncate(time.Millisecond)),
				Waiting: s.Reported.Waiting, Running: s.Reported.Running, Utilization: s.Reported.Utilization,
			}
		}
		out = append(out, e)
	}
	if len(out) == 0 {
		return u.unknown()
	}
	slices.SortFunc(out, func(a, b *adminv1.Endpoint) int { return cmp.Compare(a.Address, b.Address) })
	return out
}

var sources = map[endpoints.Source]adminv1.LoadSource{
	endpoints.InCall:    adminv1.LoadSource_LOAD_SOURCE_CALL,
	endpoints.OutOfBand: adminv1.LoadSource_LOAD_SOURCE_ORCA,
	endpoints.Metrics:   adminv1.LoadSource_LOAD_SOURCE_METRICS,
}

// unknown stands for model servers of which none is known.
func (u *upstream) unknown() (out []*adminv1.Endpoint) {
	addresses := u.config.GetAddresses()
	if len(addresses) == 0 {
		addresses = []string{u.config.GetAddress()}
	}
	state, failure := adminv1.EndpointState_ENDPOINT_STATE_CONNECTING, ""
	switch u.servers.GetState() {
	case connectivity.Idle:
		state = adminv1.EndpointState_ENDPOINT_STATE_IDLE
	case connectivity.Ready:
		state = adminv1.EndpointState_ENDPOINT_STATE_READY
	case connectivity.TransientFailure:
		state = adminv1.EndpointState_ENDPOINT_STATE_NOT_READY
		if err := u.servers.Failure(); err != nil {
			failure = err.Error()
		}
	}
	for _, a := range addresses {
		out = append(out, &adminv1.Endpoint{Backend: u.name, Address: a, State: state, Failure: failure, Controlled: endpoints.Controlled(u.config)})
	}
	return out
}
