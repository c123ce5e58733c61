// Package budget bounds what may be spent: tokens, requests, money and GPU time,
// by trust domain, tenant, principal and model.
//
// A budget is an amount in a window of time, and has one account for every
// combination of its keys that occurs. An inference must fit in every account
// that applies to it, or takes nothing from any.
//
// Requests are spent when an inference begins, whatever becomes of it. All else
// is reserved when it begins (its input, and the output it asks for), compared
// with what it has used at every message, topped up where it needs more, and
// settled once when it ends:
//
//	charge = min(grant, max(own count, reported by the model server))
//
// A message that would go beyond what can be granted is not delivered, or of a
// streamed answer, where a budget says so (cut: CUT_SPLICE) and the model has a
// tokenizer, up to the last token that fits: the inference is cut. So delivered ≤
// charged ≤ grant, always. An inference that
// was never handed to the model server costs nothing. What the model server wrote
// counts, also what a policy held back or took out of it. An attempt that is made
// again is another inference: it is charged for what it used itself. The header
// grpc-previous-rpc-attempts is the caller's word, and buys nothing.
//
// Money is a price for each token of the input and of the output, by model. GPU
// time runs from when the inference is handed to the model server until it ends,
// times the permits that it holds; what is used between the last message and the
// end is beyond the grant if that does not cover it.
//
// A window with a length begins with the first use of a full account, and at its
// end the account is full again; so up to twice the amount can be spent in a
// time as long as a window that straddles two. A window of the calendar begins for
// all at once. A token bucket is refilled steadily. Lengths and rates go by the
// monotonic clock, calendars by the wall clock of a time zone: one that jumps ahead
// begins a window early, one that goes back does not begin it again. What is
// reserved in one window and not used when it is over is lost, not given to the
// next.
//
// Accounts live in memory, and end with the process; with a state file
// ([Ledger.Open]) they do not. What is granted is then written down before, in
// blocks of a hundredth of the amount: after a crash the block in use counts as
// spent, and nothing is spent twice. One that nobody holds and
// that is full is dropped when others are opened; those of a budget without a
// window must be remembered once they are used. A ledger holds at most
// 1,048,576 accounts; an inference that would need another is refused
// (POLICY_UNAVAILABLE).
//
// Gateways can share their accounts in Redis or Valkey ([Ledger.Share]). Each takes
// shares of an account for a time, its lease, and spends them without asking; an
// inference waits for the store only where its gateway's share is too small. The store
// is asked for all accounts of an inference at once, by one script, in its own time.
// A gateway may refuse while another still holds a share. What a lost gateway held
// comes back when its lease ends, also what it had spent of that and not told of: so
// much can be overspent, and no more. When the store does not answer, a gateway goes on with what it holds, or begins nothing, or
// everything, as each budget says; what it used it tells when the store is back, also
// if that has forgotten all.
//
// Where a ledger is made [WithCharges], observers of an inference are told what each
// budget was charged. Operators see accounts, grant to them and reset them while
// inferences run ([Ledger.Admin]): that is written to the state file, and holds for all
// gateways that share a store.
//
// A budget that is to tell callers what is left does so in the trailer
// x-sluice-budget-NAME-remaining of every call with an inference of theirs that it
// applied to: what the account had left when the last of these ended, less what
// others hold; with a shared store, as far as this gateway knows.
//
// A [Ledger] gives two policies, because they stand at different places of the
// chain: [Ledger.Rates] before anything costly, [Ledger.Tokens] after
// inspection.
package budget

import (
	"math"
	"slices"

	"github.com/sluicegate/sluice/interceptors"
	"github.com/sluicegate/sluice/interceptors/dialect"
)

// name is the name of both policies in denials, events and metrics.
const name = "budget"

// Rates is the policy that spends a request from the budgets of requests
// (RATE_EXCEEDED), and refuses an inference early of which another account is
// empty (BUDGET_EXHAUSTED).
func (l *Ledger) Rates() interceptors.Policy { return (*rates)(l) }

// Tokens is the policy that reserves, tops up and settles what an inference uses
// (BUDGET_EXHAUSTED at the start, BUDGET_CUT in mid-stream).
func (l *Ledger) Tokens() interceptors.Policy { return (*reservations)(l) }

func inference(c *interceptors.Call) bool {
	return c.Method != nil && c.Method.Kind == dialect.Inference
}

// rates is the ledger as the early policy. It keeps nothing of a call, and so
// is its own part in every call.
type rates Ledger

func (r *rates) Name() string { return name }

func (r *rates) Begin(c *interceptors.Call) (interceptors.CallPolicy, error) {
	if !inference(c) || len(r.limits) == 0 {
		return nil, nil
	}
	return (*ratesCall)(r), nil
}

type ratesCall Ledger

func (r *ratesCall) Start(i *interceptors.Inference) (interceptors.InferencePolicy, error) {
	l := (*Ledger)(r)
	var space [4]hold
	holds, err := l.open(perRequest, i, space[:0])
	if err != nil {
		return nil, err
	}
	if err := l.closed(holds); err != nil {
		letGo(holds)
		return nil, err
	}
	for n := range holds {
		holds[n].want, holds[n].least = 1, 1
	}
	short, err := l.take(holds, false)
	if err == nil && short.account != nil && l.shared != nil {
		return &turn{waiting: waiting{pending: true}, ledger: l, inference: i, holds: slices.Clone(holds)}, nil
	}
	l.spend(i, holds)
	letGo(holds)
	if err != nil {
		return nil, err
	}
	if short.account != nil {
		return nil, short.overRate(i)
	}
	if short := l.empty(i); short.account != nil {
		return nil, short.denial(i, interceptors.BudgetExhausted, "the "+short.account.limit.metric.noun()+" of budget %q are used up")
	}
	return nil, nil
}

// spend settles requests, of which all that was taken is spent.
func (l *Ledger) spend(i *interceptors.Inference, holds []hold) {
	for n := range holds {
		h := &holds[n]
		l.charged(i, h.account.limit, h.granted(), 0)
		h.settle(h.granted(), 0).tell(i)
	}
}

func (r *ratesCall) End(interceptors.Outcome) {}

// reservations is the ledger as the late policy.
type reservations Ledger

func (r *reservations) Name() string { return name }

func (r *reservations) Begin(c *interceptors.Call) (interceptors.CallPolicy, error) {
	if !inference(c) || !slices.ContainsFunc(r.limits, perUsage) {
		return nil, nil
	}
	return (*reservationsCall)(r), nil
}

type reservationsCall Ledger

// Start reserves. An inference that declares its output gets all of it or is
// refused, or clamped. For one that does not, what is reserved is a guess: if that
// does not fit, its input and one token do, and the rest is asked for as it comes.
func (r *reservationsCall) Start(i *interceptors.Inference) (interceptors.InferencePolicy, error) {
	v := &reservation{ledger: (*Ledger)(r), inference: i, input: i.InputTokens, step: math.MaxInt64}
	var err error
	if v.holds, err = v.ledger.open(perUsage, i, v.space[:0]); err != nil {
		return nil, err
	}
	if len(v.holds) == 0 {
		return nil, nil
	}
	err = v.ledger.closed(v.holds)
	var short shortage
	if err == nil {
		short, err = v.begin()
	}
	if err == nil && short.account == nil {
		return v, nil
	}
	if err == nil && v.ledger.shared != nil {
		v.pending = true // the store is asked while the inference waits
		return v, nil
	}
	letGo(v.holds)
	if err != nil {
		return nil, err
	}
	return nil, short.exhausted(i)
}

func (r *reservationsCall) End(interceptors.Outcome) {}
