package admit

import (
	"cmp"
	"context"
	"maps"
	"slices"
	"strings"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	adminv1 "github.com/sluicegate/sluice/proto/gen/sluice/admin/v1"
)

// maxTenants is how many tenants of a pool one answer lists: those of a thousand with
// the longest names are 1 MB. Chosen.
const maxTenants = 1000

// Admin is the policy as the admin API has it. It decides nothing about who may call:
// put it behind a chain whose rules do. The policy may be nil: then there are no pools.
func (p *Policy) Admin() adminv1.PoolsServiceServer {
	if p == nil {
		p = new(Policy)
	}
	return &admin{policy: p}
}

type admin struct {
	adminv1.UnimplementedPoolsServiceServer
	policy *Policy
}

func (s *admin) ListPools(context.Context, *adminv1.ListPoolsRequest) (*adminv1.ListPoolsResponse, error) {
	out := new(adminv1.ListPoolsResponse)
	for _, l := range s.policy.Snapshot() {
		p := l.proto()
		p.Tenants = nil
		out.Pools = append(out.Pools, p)
	}
	return out, nil
}

func (s *admin) GetPool(_ context.Context, r *adminv1.GetPoolRequest) (*adminv1.GetPoolResponse, error) {
	p, err := s.show(r.GetName(), nil)
	return &adminv1.GetPoolResponse{Pool: p}, err
}

func (s *admin) ResizePool(ctx context.Context, r *adminv1.ResizePoolRequest) (*adminv1.ResizePoolResponse, error) {
	p, err := s.show(r.GetName(), s.policy.Resize(ctx, r.GetName(), r.GetCapacity()))
	return &adminv1.ResizePoolResponse{Pool: p}, err
}

func (s *admin) DrainPool(ctx context.Context, r *adminv1.DrainPoolRequest) (*adminv1.DrainPoolResponse, error) {
	p, err := s.show(r.GetName(), s.policy.Drain(ctx, r.GetName()))
	return &adminv1.DrainPoolResponse{Pool: p}, err
}

func (s *admin) ResumePool(ctx context.Context, r *adminv1.ResumePoolRequest) (*adminv1.ResumePoolResponse, error) {
	p, err := s.show(r.GetName(), s.policy.Resume(ctx, r.GetName()))
	return &adminv1.ResumePoolResponse{Pool: p}, err
}

// show is a pool after what was done to it.
func (s *admin) show(name string, err error) (*adminv1.Pool, error) {
	if err != nil {
		return nil, err
	}
	for _, l := range s.policy.Snapshot() {
		if l.Name == name {
			return l.proto(), nil
		}
	}
	return nil, status.Errorf(codes.NotFound, "there is no pool %q", name)
}

func (s *PoolState) proto() *adminv1.Pool {
	out := &adminv1.Pool{
		Name: s.Name, Configured: s.Configured, Capacity: s.Ceiling, Available: s.Capacity, InUse: s.InUse,
		Waiting: int64(s.Waiting), QueueLength: int64(s.Length), WaitingBytes: s.WaitingBytes, Draining: s.Draining,
		Hold: known(s.Hold), TenantCount: int64(len(s.Tenants)),
	}
	for _, r := range slices.Sorted(maps.Keys(s.Refused)) {
		out.Refused = append(out.Refused, &adminv1.Refused{Reason: string(r), Count: int64(min(s.Refused[r], 1<<62))})
	}
	for _, p := range s.Priorities {
		out.Priorities = append(out.Priorities, &adminv1.PriorityState{Priority: p.Priority, Waiting: int64(p.Waiting), Wait: known(p.Wait)})
	}
	tenants := slices.Clone(s.Tenants)
	if len(tenants) > maxTenants {
		slices.SortStableFunc(tenants, func(a, b TenantState) int {
			return cmp.Or(cmp.Compare(b.InUse, a.InUse), cmp.Compare(b.Waiting, a.Waiting), cmp.Compare(b.Served, a.Served))
		})
		tenants = tenants[:maxTenants]
		slices.SortFunc(tenants, func(a, b TenantState) int { return cmp.Compare(a.Tenant, b.Tenant) })
	}
	for _, t := range tenants {
		out.Tenants = append(out.Tenants, &adminv1.TenantState{
			Tenant: strings.ToValidUTF8(t.Tenant, "\uFFFD"), // a message may hold nothing else
			Weight: t.Weight, InUse: t.InUse, Reserved: t.Reserved, Waiting: int64(t.Waiting), Wait: known(t.Wait),
			Served: t.Served, Share: t.Share, Refused: int64(min(t.Refused, 1<<62)),
		})
	}
	if s.Sharing != nil {
		out.Sharing = &adminv1.Sharing{Gateways: s.Sharing.Gateways, InUse: s.Sharing.InUse, Lost: s.Sharing.Lost}
	}
	return out
}

// known is a duration, or nothing for 0.
func known(d time.Duration) *durationpb.Duration {
	if d == 0 {
		return nil
	}
	return durationpb.New(d)
}
