package budget

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"strings"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"

	adminv1 "github.com/sluicegate/sluice/proto/gen/sluice/admin/v1"
)

// defaultPage and maxPage are how many accounts one answer lists: those of a
// thousand with the longest names are 1 MB. Chosen.
const defaultPage, maxPage = 100, 1000

// Admin is the ledger as the admin API has it. It decides nothing about who may
// call: put it behind a chain whose rules do. The ledger may be nil: then there are
// no budgets.
func (l *Ledger) Admin() adminv1.BudgetsServiceServer { return &admin{ledger: l} }

type admin struct {
	adminv1.UnimplementedBudgetsServiceServer
	ledger *Ledger
}

var errNone = status.Error(codes.FailedPrecondition, "no budgets are configured")

func (s *admin) ListAccounts(_ context.Context, r *adminv1.ListAccountsRequest) (*adminv1.ListAccountsResponse, error) {
	if s.ledger == nil {
		return nil, errNone
	}
	if r.GetPageSize() < 0 {
		return nil, status.Error(codes.InvalidArgument, "page_size: it must not be negative")
	}
	size := min(int(r.GetPageSize()), maxPage)
	if size == 0 {
		size = defaultPage
	}
	after, err := readToken(r.GetPageToken())
	if err != nil {
		return nil, err
	}
	accounts := s.ledger.Accounts(nameOf(r.GetFilter()), after, size+1)
	out := new(adminv1.ListAccountsResponse)
	if len(accounts) > size {
		accounts = accounts[:size]
		out.NextPageToken = token(accounts[size-1].Name())
	}
	for _, a := range accounts {
		out.Accounts = append(out.Accounts, a.proto())
	}
	return out, nil
}

func (s *admin) GetAccount(ctx context.Context, r *adminv1.GetAccountRequest) (*adminv1.GetAccountResponse, error) {
	if s.ledger == nil {
		return nil, errNone
	}
	a, err := s.ledger.Account(ctx, nameOf(r.GetName()))
	if err != nil {
		return nil, err
	}
	return &adminv1.GetAccountResponse{Account: a.proto()}, nil
}

func (s *admin) Grant(ctx context.Context, r *adminv1.GrantRequest) (*adminv1.GrantResponse, error) {
	if s.ledger == nil {
		return nil, errNone
	}
	a, err := s.ledger.Grant(ctx, nameOf(r.GetName()), r.GetAmount())
	if err != nil {
		return nil, err
	}
	return &adminv1.GrantResponse{Account: a.proto()}, nil
}

func (s *admin) Reset(ctx context.Context, r *adminv1.ResetRequest) (*adminv1.ResetResponse, error) {
	if s.ledger == nil {
		return nil, errNone
	}
	a, err := s.ledger.Reset(ctx, nameOf(r.GetName()))
	if err != nil {
		return nil, err
	}
	return &adminv1.ResetResponse{Account: a.proto()}, nil
}

func nameOf(n *adminv1.AccountName) Name {
	return Name{n.GetBudget(), n.GetTrustDomain(), n.GetTenant(), n.GetPrincipal(), n.GetModel(), n.GetKey()}
}

// token is a page token: the last name of the page.
func token(n Name) string {
	text, _ := json.Marshal([...][]byte{[]byte(n.Budget), []byte(n.TrustDomain), []byte(n.Tenant), []byte(n.Principal), []byte(n.Model), []byte(n.Key)})
	return base64.RawURLEncoding.EncodeToString(text)
}

func readToken(s string) (Name, error) {
	if s == "" {
		return Name{}, nil
	}
	var n [][]byte
	text, err := base64.RawURLEncoding.DecodeString(s)
	if err == nil {
		err = json.Unmarshal(text, &n)
	}
	if err != nil || len(n) != 6 {
		return Name{}, status.Error(codes.InvalidArgument, "page_token: it is none of ours; take next_page_token of the page before")
	}
	return Name{string(n[0]), string(n[1]), string(n[2]), string(n[3]), string(n[4]), string(n[5])}, nil
}

var metrics = map[string]adminv1.Metric{
	string(tokens):   adminv1.Metric_METRIC_TOKENS,
	string(requests): adminv1.Metric_METRIC_REQUESTS,
	string(money):    adminv1.Metric_METRIC_MONEY,
	string(gpuTime):  adminv1.Metric_METRIC_GPU_TIME,
}

func (a Account) proto() *adminv1.Account {
	text := func(s string) string { return strings.ToValidUTF8(s, "\uFFFD") } // a message may hold nothing else
	out := &adminv1.Account{
		Name: &adminv1.AccountName{Budget: a.Budget, TrustDomain: a.TrustDomain, Tenant: text(a.Tenant),
			Principal: text(a.Principal), Model: text(a.Model), Key: text(a.Key)},
		Metric: metrics[a.Metric],
		Limit:  a.Limit, Remaining: a.Remaining, Reserved: a.Reserved, Spent: a.Spent, Granted: a.Granted,
		Carried: a.Carried, Owed: a.Owed, Shared: a.Shared, SharedLeft: a.SharedLeft,
	}
	if !a.WindowEnds.IsZero() {
		out.WindowEnds = timestamppb.New(a.WindowEnds)
	}
	return out
}
