package gateway

import (
	"context"
	"log/slog"

	"github.com/sluicegate/sluice/interceptors"
	adminv1 "github.com/sluicegate/sluice/proto/gen/sluice/admin/v1"
)

// adminPools is the admin API over the pools of the configuration of the day.
type adminPools struct {
	adminv1.UnimplementedPoolsServiceServer
	*Gateway
}

// pools are the pools, until they are let go.
func (a adminPools) pools() (adminv1.PoolsServiceServer, func()) {
	rt := a.acquire()
	return rt.guard.Pools().Admin(), rt.release
}

func (a adminPools) ListPools(ctx context.Context, r *adminv1.ListPoolsRequest) (*adminv1.ListPoolsResponse, error) {
	p, done := a.pools()
	defer done()
	return p.ListPools(ctx, r)
}

func (a adminPools) GetPool(ctx context.Context, r *adminv1.GetPoolRequest) (*adminv1.GetPoolResponse, error) {
	p, done := a.pools()
	defer done()
	return p.GetPool(ctx, r)
}

func (a adminPools) ResizePool(ctx context.Context, r *adminv1.ResizePoolRequest) (*adminv1.ResizePoolResponse, error) {
	p, done := a.pools()
	defer done()
	out, err := p.ResizePool(ctx, r)
	a.changed(ctx, "a pool was resized", r.GetName(), err, slog.Int64("capacity", r.GetCapacity()))
	return out, err
}

func (a adminPools) DrainPool(ctx context.Context, r *adminv1.DrainPoolRequest) (*adminv1.DrainPoolResponse, error) {
	p, done := a.pools()
	defer done()
	out, err := p.DrainPool(ctx, r)
	a.changed(ctx, "a pool is being drained", r.GetName(), err)
	return out, err
}

func (a adminPools) ResumePool(ctx context.Context, r *adminv1.ResumePoolRequest) (*adminv1.ResumePoolResponse, error) {
	p, done := a.pools()
	defer done()
	out, err := p.ResumePool(ctx, r)
	a.changed(ctx, "a pool takes inferences again", r.GetName(), err)
	return out, err
}

// changed logs who changed what: the peer of the connection, which may be a proxy.
func (a adminPools) changed(ctx context.Context, what, pool string, err error, more ...any) {
	if err != nil {
		return
	}
	peer := interceptors.PeerFrom(ctx)
	a.log.With(more...).Info(what, "pool", pool, "peer_id", peer.ID.String(), "peer", peer.Addr)
}
