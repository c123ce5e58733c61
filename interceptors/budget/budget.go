// Package budget bounds what may be spent: tokens and requests, by trust
// domain, tenant, principal and model.
//
// A budget is an amount in a window of time, and has one account for every
// combination of its keys that occurs. An inference must fit in every account
// that applies to it, or takes nothing from any.
//
// Requests are spent when an inference begins, whatever becomes of it. Tokens
// are reserved when it begins (its input, and the output it asks for),
// compared with what it has used at every message, topped up where it needs
// more, and settled once when it ends:
//
//	charge = min(grant, max(own count, reported by the model server))
//
// A message that would go beyond what can be granted is not delivered: the
// inference is cut. So delivered ≤ charged ≤ grant, always. An inference that
// was never handed to the model server costs no tokens.
//
// Windows are fixed: one begins with the first use of a full account, and at its
// end the account is full again; so up to twice the amount can be spent in a
// time as long as a window that straddles two. They go by the monotonic clock.
// What is reserved in one window and not used when it is over is lost, not
// given to the next.
//
// Accounts live in memory, and end with the process. One that nobody holds and
// that is full is dropped when others are opened; those of a budget without a
// window must be remembered once they are used. A ledger holds at most
// 1,048,576 accounts; an inference that would need another is refused
// (POLICY_UNAVAILABLE).
//
// A [Ledger] gives two policies, because they stand at different places of the
// chain: [Ledger.Rates] before anything costly, [Ledger.Tokens] after
// inspection.
package budget

import (
	"math"
	"strconv"

	"github.com/sluicegate/sluice/interceptors"
	"github.com/sluicegate/sluice/interceptors/dialect"
	"github.com/sluicegate/sluice/interceptors/fields"
)

// name is the name of both policies in denials, events and metrics.
const name = "budget"

// Rates is the policy that spends a request from the budgets of requests
// (RATE_EXCEEDED), and refuses an inference early whose token account is empty
// (BUDGET_EXHAUSTED).
func (l *Ledger) Rates() interceptors.Policy { return (*rates)(l) }

// Tokens is the policy that reserves, tops up and settles tokens
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
	holds, err := l.open(requests, i, space[:0])
	if err != nil {
		return nil, err
	}
	took, short := l.take(holds, 1, 1)
	settle(holds, took)
	if short.account != nil {
		return nil, short.denial(i, interceptors.RateExceeded, "the requests of budget %q are used up")
	}
	if short := l.empty(tokens, i); short.account != nil {
		return nil, short.denial(i, interceptors.BudgetExhausted, "the tokens of budget %q are used up")
	}
	return nil, nil
}

func (r *ratesCall) End(interceptors.Outcome) {}

// reservations is the ledger as the late policy.
type reservations Ledger

func (r *reservations) Name() string { return name }

func (r *reservations) Begin(c *interceptors.Call) (interceptors.CallPolicy, error) {
	if !inference(c) || !(*Ledger)(r).has(tokens) {
		return nil, nil
	}
	return (*reservationsCall)(r), nil
}

type reservationsCall Ledger

// Start reserves. An inference that declares its output gets all of it or is
// refused. For one that does not, the default is a guess: if that does not fit,
// its input and one token do, and the rest is asked for as it comes.
func (r *reservationsCall) Start(i *interceptors.Inference) (interceptors.InferencePolicy, error) {
	l := (*Ledger)(r)
	v := &reservation{ledger: l, inference: i, input: i.InputTokens, step: math.MaxInt64}
	holds, err := l.open(tokens, i, v.space[:0])
	if err != nil {
		return nil, err
	}
	if len(holds) == 0 {
		return nil, nil
	}
	for n := range holds {
		v.step = min(v.step, holds[n].account.limit.output)
	}
	want := add(i.InputTokens, i.MaxOutputTokens)
	least := want
	if i.MaxOutputTokens <= 0 {
		want, least = add(i.InputTokens, v.step), add(i.InputTokens, 1)
	}
	took, short := l.take(holds, want, least)
	if short.account != nil {
		d := short.denial(i, interceptors.BudgetExhausted, "budget %q has too few tokens left for the input and the output asked for")
		letGo(holds)
		return nil, d
	}
	v.holds, v.grant = holds, took
	v.in = v.input
	return v, nil
}

func (r *reservationsCall) End(interceptors.Outcome) {}

// reservation is the tokens that one inference holds.
type reservation struct {
	ledger    *Ledger
	inference *interceptors.Inference
	holds     []hold
	space     [4]hold // enough for a budget at every level
	grant     int64   // what was taken of each account
	step      int64   // what a top-up asks for: the smallest default of the budgets
	input     int64   // our count of the input that may be forwarded
	in, out   int64   // what is used of the grant by all that was let through
	settled   bool
}

// used is what the inference has used: our own count is the floor under what
// the model server reports.
func (v *reservation) used() (in, out int64) {
	i := v.inference
	return max(v.input, i.ReportedInput), max(i.OutputTokens, i.ReportedOutput)
}

// Request tops up for what a later message adds to the input.
func (v *reservation) Request(*fields.Message) error {
	before := v.input
	v.input = max(before, v.inference.InputTokens)
	if err := v.cover(); err != nil {
		v.input = before // it is not forwarded
		return err
	}
	return nil
}

// Response tops up for what the message adds to the output.
func (v *reservation) Response(*fields.Message) error { return v.cover() }

// cover makes the grant cover what is used, or cuts the inference.
func (v *reservation) cover() error {
	in, out := v.used()
	if missing := add(in, out) - v.grant; missing > 0 {
		took, short := v.ledger.take(v.holds, max(missing, v.step), missing)
		if short.account != nil {
			return short.denial(v.inference, interceptors.BudgetCut, "the tokens of budget %q were used up on the way").
				With("tokensGranted", strconv.FormatInt(v.grant-v.in, 10)).
				With("tokensDelivered", strconv.FormatInt(v.out, 10))
		}
		v.grant += took
	}
	v.in, v.out = in, out
	return nil
}

// End settles. What the model server made beyond the grant is told, not charged.
func (v *reservation) End(interceptors.Outcome) {
	if v.settled {
		return
	}
	v.settled = true
	if !v.inference.Handed {
		settle(v.holds, 0)
		return
	}
	in, out := v.used()
	used := add(in, out)
	settle(v.holds, min(used, v.grant))
	if used > v.grant {
		v.inference.Emit(interceptors.Event{Policy: name, Name: "excess",
			Attributes: []string{"tokens", strconv.FormatInt(used-v.grant, 10)}})
	}
}

// denial says which budget is short, and what would help. The text has a verb
// for its name.
func (s *shortage) denial(i *interceptors.Inference, reason interceptors.Reason, text string) *interceptors.Denial {
	m := s.account.limit
	switch {
	case s.wanted > m.amount:
		text += "; it never has so many: ask for less"
	case s.retryAfter > 0:
		text += "; try again when it is refilled"
	default:
		text += ", and it is not refilled"
	}
	d := interceptors.Deny(name, reason, text, m.name).
		With("budget", m.name).
		With("limit", strconv.FormatInt(m.amount, 10)).
		With("remaining", strconv.FormatInt(s.remaining, 10)).
		With("requested", strconv.FormatInt(s.wanted, 10))
	d.RetryAfter = s.retryAfter
	d.Quota = &interceptors.Quota{Subject: m.subject(m.key(i)), Metric: string(m.metric), ID: m.name, Limit: m.amount}
	return d
}

// add is the sum of two numbers that are not negative, or the largest number
// there is: what callers and model servers say is not to be trusted to be small.
func add(a, b int64) int64 {
	if a > math.MaxInt64-b {
		return math.MaxInt64
	}
	return a + b
}
