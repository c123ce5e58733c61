package budget

import (
	"cmp"
	"slices"
	"strconv"
	"time"

	"github.com/sluicegate/sluice/interceptors"
	"github.com/sluicegate/sluice/interceptors/fields"
	configv1 "github.com/sluicegate/sluice/proto/gen/sluice/config/v1"
)

// reservation is what one inference holds.
type reservation struct {
	waiting
	ledger    *Ledger
	inference *interceptors.Inference
	holds     []hold
	space     [4]hold         // enough for a budget at every level
	step      int64           // output that a top-up asks for: the smallest of the budgets
	input     int64           // our count of the input that may be forwarded
	through   usage           // of all that was let through
	output    int64           // what the output is clamped to; 0: it is not
	timed     bool            // GPU time is limited
	first     *fields.Message // to be clamped once the store has said to what; nil: it is not
}

// begin reserves what the inference asks for.
func (v *reservation) begin() (shortage, error) {
	i := v.inference
	for n := range v.holds {
		h := &v.holds[n]
		v.step = min(v.step, h.account.limit.reserve(i.Model))
		v.timed = v.timed || h.tariff.time > 0
	}
	v.through = usage{input: i.InputTokens}
	output := cmp.Or(v.output, i.MaxOutputTokens)
	want := usage{i.InputTokens, output, defaultTime.Microseconds()}
	least := usage{i.InputTokens, output, 1}
	if output <= 0 {
		want.output, least.output = v.step, 1
	}
	for n := range v.holds {
		h := &v.holds[n]
		h.want, h.least = h.tariff.cost(want), h.tariff.cost(least)
	}
	now := v.ledger.lock(v.holds)
	defer unlock(v.holds)
	if v.clamps() && v.ledger.shared == nil {
		v.fit(least)
	}
	short, err := v.ledger.taken(v.holds, false, now)
	if v.timed && err == nil && short.account == nil {
		v.watch()
	}
	return short, err
}

// clamps reports whether the output that is asked for may be lowered.
func (v *reservation) clamps() bool {
	return v.inference.MaxOutputTokens > 1 && slices.ContainsFunc(v.holds, func(h hold) bool { return h.account.limit.clamp })
}

// less lowers the output that is asked for to what the shared store had left when it last
// answered, if that is less.
func (v *reservation) less() bool {
	if !v.clamps() {
		return false
	}
	v.ledger.lock(v.holds)
	defer unlock(v.holds)
	before := v.output
	v.fit(usage{v.inference.InputTokens, cmp.Or(v.output, v.inference.MaxOutputTokens), 1})
	return v.output != before
}

// fit lowers the output that is asked for to what the accounts with clamp have.
func (v *reservation) fit(asked usage) {
	output := asked.output
	for n := range v.holds {
		if h := &v.holds[n]; h.account.limit.clamp && !h.account.limit.soft {
			room := h.account.room(false)
			if e := h.account.lease; e != nil {
				room = add(max(0, room), max(0, e.left))
			}
			output = min(output, h.tariff.affords(asked, room))
		}
	}
	if output == asked.output {
		return
	}
	asked.output = max(1, output)
	v.output = asked.output
	for n := range v.holds {
		h := &v.holds[n]
		h.least = h.tariff.cost(asked)
		h.want = h.least
	}
}

// used is what the inference has used: our own count is the floor under what
// the model server reports.
func (v *reservation) used() usage {
	i := v.inference
	u := usage{input: max(v.input, i.ReportedInput), output: max(i.OutputTokens, i.ReportedOutput)}
	if v.timed && i.Handed {
		u.time = max(0, time.Since(i.HandedAt).Microseconds())
	}
	return u
}

// Request tops up for what a later message adds to the input.
func (v *reservation) Request(m *fields.Message) error {
	ready := v.Ready()
	switch {
	case ready:
		v.clamp(m)
	case v.first == nil && v.clamps():
		v.first = m
	}
	before := v.input
	v.input = max(before, v.inference.InputTokens)
	if !ready {
		return nil
	}
	if err := v.cover(nil); err != nil {
		v.input = before // it is not forwarded
		return err
	}
	return nil
}

// clamp lowers the limit on the output in the first message.
func (v *reservation) clamp(m *fields.Message) {
	if v.output > 0 && !v.inference.Handed {
		clamp(m, v.inference.MaxOutputTokens, v.output)
		v.output = 0
	}
}

// Response tops up for what the message adds to the output.
func (v *reservation) Response(m *fields.Message) error { return v.cover(m) }

// cover makes the grant cover what is used, or cuts the inference: at a message, or in a
// response where the budget says so.
func (v *reservation) cover(response *fields.Message) error {
	u := v.used()
	for n := range v.holds {
		if h := &v.holds[n]; h.tariff.cost(u) <= h.granted() {
			continue
		}
		short, err := v.topUp(u)
		switch {
		case err != nil:
			return err
		case short.account == nil:
		case response != nil && short.account.limit.config.GetCut() == configv1.Cut_CUT_SPLICE && v.splice(response, u):
			v.inference.CutAfter(v.cut(&short))
			return nil
		default:
			return v.cut(&short)
		}
		break
	}
	v.through = u
	return nil
}

// splice takes what there is left for output, and cuts that in a response of a
// stream to it. It reports whether some of it is to be delivered.
func (v *reservation) splice(m *fields.Message, u usage) bool {
	if !v.inference.Call.Method.ServerStreams {
		return false // there is one message: it or the refusal
	}
	fits, err := v.rest(u)
	if err != nil || fits <= v.through.output {
		return false
	}
	left := v.inference.FitOutput(m, fits-v.through.output)
	if left > 0 {
		u.output = v.through.output + left
		v.through = u
	}
	return left > 0
}

// rest takes what the accounts have left for the output of an inference, and is how
// much output is granted then.
func (v *reservation) rest(u usage) (int64, error) {
	now := v.ledger.lock(v.holds)
	defer unlock(v.holds)
	for n := range v.holds {
		if h := &v.holds[n]; !h.free {
			u.output = min(u.output, h.tariff.affords(u, add(h.granted(), max(0, h.account.room(true)))))
		}
	}
	if u.output < 0 {
		return u.output, nil
	}
	for n := range v.holds {
		h := &v.holds[n]
		h.want = max(0, h.tariff.cost(u)-h.granted())
		h.least = h.want
	}
	short, err := v.ledger.taken(v.holds, true, now)
	if short.account != nil {
		return 0, nil
	}
	return u.output, err
}

// topUp takes what the grant lacks, and some in advance if there is so much.
func (v *reservation) topUp(u usage) (shortage, error) {
	for n := range v.holds {
		h := &v.holds[n]
		h.want, h.least = 0, max(0, h.tariff.cost(u)-h.granted())
		if h.least > 0 {
			h.want = max(h.least, h.tariff.cost(usage{output: v.step, time: defaultTime.Microseconds()}))
		}
	}
	short, err := v.ledger.take(v.holds, true)
	if err == nil && short.account != nil && v.ledger.shared != nil {
		lost := v.ledger.store(v.inference.Context(), v.holds, true)
		v.ledger.thresholds(v.inference, v.holds)
		if short, err = v.ledger.take(v.holds, true); short.account != nil && lost != nil {
			err = lost
		}
	}
	return short, err
}

// cut is the refusal of an inference that has begun.
func (v *reservation) cut(short *shortage) *interceptors.Denial {
	m := short.account.limit
	d := short.denial(v.inference, interceptors.BudgetCut, "the "+m.metric.noun()+" of budget %q were used up on the way").
		With("tokensDelivered", strconv.FormatInt(v.through.output, 10))
	for n := range v.holds {
		if h := &v.holds[n]; h.account == short.account && h.tariff.output > 0 {
			d = d.With("tokensGranted", strconv.FormatInt(max(0, h.tariff.affords(v.through, h.granted())), 10))
		}
	}
	return d
}

// End settles. What was used beyond the grant is told, not charged.
func (v *reservation) End(o interceptors.Outcome) {
	if !v.settle(v.holds) {
		return
	}
	defer letGo(v.holds)
	i := v.inference
	var u usage // nothing is charged that the model server did not get
	if i.Handed {
		u = v.used()
	}
	var excess []string
	for n := range v.holds {
		h := &v.holds[n]
		cost := h.tariff.cost(u)
		charge := min(cost, h.granted())
		m := h.account.limit
		if over := cost - charge; over > 0 && !slices.Contains(excess, string(m.metric)) {
			excess = append(excess, string(m.metric), m.metric.show(over))
		}
		v.ledger.charged(i, m, charge, cost-charge)
		h.settle(charge, cost-charge).tell(i)
		if j := v.ledger.journal; j != nil && cost > charge && m.debt {
			if err := j.owes(h.account, v.ledger.clock()); err != nil {
				i.Emit(interceptors.Event{Policy: name, Name: "unwritten", Attributes: []string{"budget", m.name}})
			}
		}
		if i.Handed && o.Err == nil && m.output == 0 {
			m.learned.learn(i.Model, u.output)
		}
	}
	if excess != nil {
		i.Emit(interceptors.Event{Policy: name, Name: "excess", Attributes: excess})
	}
	if i.ReportedOutput > 0 && drifts(i.OutputTokens, i.ReportedOutput) {
		i.Emit(interceptors.Event{Policy: name, Name: "drift", Attributes: []string{
			"counted", strconv.FormatInt(i.OutputTokens, 10), "reported", strconv.FormatInt(i.ReportedOutput, 10)}})
	}
}

// charged tells observers what a budget was charged, if they want to know.
func (l *Ledger) charged(i *interceptors.Inference, m *limit, amount, excess int64) {
	if !l.charges || amount == 0 && excess == 0 {
		return
	}
	told := []string{"budget", m.name, "unit", string(m.metric), "amount", m.metric.show(amount)}
	if excess > 0 {
		told = append(told, "excess", m.metric.show(excess))
	}
	i.Emit(interceptors.Event{Policy: name, Name: "charged", Attributes: told})
}

// drifts reports whether two counts differ by more than a tenth of the larger:
// what tokenizers of one family differ by on prose. Chosen.
func drifts(a, b int64) bool { return max(a, b)-min(a, b) > max(a, b)/10 }

// spending is what a settlement made of an account: what it has left, and the highest
// threshold that was passed.
type spending struct {
	limit  *limit
	left   int64
	passed string
}

// thresholds are the shares of a budget, in percent, at which it is told that
// they are spent.
var thresholds = [...]struct {
	percent int64
	text    string
}{{100, "100"}, {80, "80"}, {50, "50"}}

// passed is the highest threshold of an amount that what is spent has passed; "" if it
// passed none.
func passed(all, before, after int64) string {
	if after <= before {
		return ""
	}
	for _, t := range thresholds {
		if at := all/100*t.percent + all%100*t.percent/100; before < at && after >= at {
			return t.text
		}
	}
	return ""
}

// tell tells the caller what is left, and emits the highest threshold that was passed.
func (s spending) tell(i *interceptors.Inference) {
	if s.limit.trailer != "" {
		i.Call.SetTrailer(s.limit.trailer, s.limit.metric.show(s.left))
	}
	s.limit.threshold(i, s.passed)
}

// threshold emits a threshold; "" is none.
func (m *limit) threshold(i *interceptors.Inference, percent string) {
	if percent != "" {
		i.Emit(interceptors.Event{Policy: name, Name: "threshold", Attributes: []string{"budget", m.name, "percent", percent}})
	}
}

// thresholds emits those that a shared store told of, also if the inference was refused.
func (l *Ledger) thresholds(i *interceptors.Inference, holds []hold) {
	for n := range holds {
		a := holds[n].account
		a.mu.Lock()
		percent := a.lease.passed
		a.lease.passed = ""
		a.mu.Unlock()
		a.limit.threshold(i, percent)
	}
}

// exhausted refuses an inference for which too little is left.
func (s *shortage) exhausted(i *interceptors.Inference) *interceptors.Denial {
	return s.denial(i, interceptors.BudgetExhausted,
		"budget %q has too "+s.account.limit.metric.few()+" left for the input and the output asked for")
}

// overRate refuses one request too many.
func (s *shortage) overRate(i *interceptors.Inference) *interceptors.Denial {
	return s.denial(i, interceptors.RateExceeded, "the requests of budget %q are used up")
}

// noun and few are the metric in sentences.
func (m metric) noun() string {
	switch m {
	case money:
		return "means"
	case gpuTime:
		return "GPU seconds"
	}
	return string(m)
}

func (m metric) few() string {
	if m == money {
		return "little money"
	}
	return "few " + m.noun()
}

// denial says which budget is short, and what would help. The text has a verb
// for its name.
func (s *shortage) denial(i *interceptors.Inference, reason interceptors.Reason, text string) *interceptors.Denial {
	m := s.account.limit
	switch {
	case s.wanted > m.capacity():
		text += "; it never has so many: ask for less"
	case s.retryAfter > 0:
		text += "; try again when it is refilled"
	default:
		text += ", and it is not refilled"
	}
	units, _ := m.metric.unit()
	d := interceptors.Deny(name, reason, text, m.name).
		With("budget", m.name).
		With("limit", m.metric.show(s.limit)).
		With("remaining", m.metric.show(max(0, s.remaining))).
		With("requested", m.metric.show(s.wanted))
	d.RetryAfter = s.retryAfter
	d.Quota = &interceptors.Quota{Subject: m.subject(s.account.key), Metric: string(m.metric), ID: m.name, Limit: s.limit / units}
	return d
}
