package gateway

import (
	"context"
	"log/slog"

	"github.com/sluicegate/sluice/interceptors"
	adminv1 "github.com/sluicegate/sluice/proto/gen/sluice/admin/v1"
)

// admin is the admin API over the budgets of the configuration of the day.
type admin struct {
	adminv1.UnimplementedBudgetsServiceServer
	*Gateway
}

// budgets are the budgets, until they are let go.
func (a admin) budgets() (adminv1.BudgetsServiceServer, func()) {
	rt := a.acquire()
	return rt.guard.Budgets().Admin(), rt.release
}

func (a admin) ListAccounts(ctx context.Context, r *adminv1.ListAccountsRequest) (*adminv1.ListAccountsResponse, error) {
	b, done := a.budgets()
	defer done()
	return b.ListAccounts(ctx, r)
}

func (a admin) GetAccount(ctx context.Context, r *adminv1.GetAccountRequest) (*adminv1.GetAccountResponse, error) {
	b, done := a.budgets()
	defer done()
	return b.GetAccount(ctx, r)
}

func (a admin) Grant(ctx context.Context, r *adminv1.GrantRequest) (*adminv1.GrantResponse, error) {
	b, done := a.budgets()
	defer done()
	out, err := b.Grant(ctx, r)
	a.changed(ctx, "a budget was granted more", r.GetName(), err, slog.Int64("amount", r.GetAmount()))
	return out, err
}

func (a admin) Reset(ctx context.Context, r *adminv1.ResetRequest) (*adminv1.ResetResponse, error) {
	b, done := a.budgets()
	defer done()
	out, err := b.Reset(ctx, r)
	a.changed(ctx, "a budget was reset", r.GetName(), err)
	return out, err
}

// changed logs who changed what: the peer of the connection, which may be a proxy.
func (a admin) changed(ctx context.Context, what string, n *adminv1.AccountName, err error, more ...any) {
	if err != nil {
		return
	}
	peer := interceptors.PeerFrom(ctx)
	a.log.With(more...).Info(what, "budget", n.GetBudget(), "trust_domain", n.GetTrustDomain(), "tenant", n.GetTenant(),
		"principal", n.GetPrincipal(), "model", n.GetModel(), "peer_id", peer.ID.String(), "peer", peer.Addr)
}
