package budget

import (
	"cmp"
	"errors"
	"fmt"
	"math"
	"math/bits"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/sluicegate/sluice/interceptors"
	"github.com/sluicegate/sluice/interceptors/internal/expression"
	configv1 "github.com/sluicegate/sluice/proto/gen/sluice/config/v1"
)

const (
	// defaultOutput is the output reserved for an inference that does not say
	// how much it wants, where neither the configuration nor experience says: a
	// paragraph, so that a stream tops up about once in a paragraph. Chosen.
	defaultOutput = 64
	// defaultTime is the GPU time reserved and topped up at once. Chosen: a stream
	// tops up once a second.
	defaultTime = time.Second
	// maxName is the longest name that an account keeps as it is. Chosen: SPIFFE
	// IDs and model names are shorter as a rule, and may be far longer.
	maxName = 256
)

// limit is one configured budget.
type limit struct {
	config    *configv1.Budget
	name      string
	metric    metric
	amount    int64 // of a window, in the metric's unit
	window    window
	overdraft int64
	soft      bool
	clamp     bool
	debt      bool
	models    map[string]bool
	by        [configv1.BudgetKey_BUDGET_KEY_MODEL + 1]bool
	own       *expression.Key // one more level; nil: there is none

	output  int64       // to reserve for an inference that does not say; 0: what was learned
	learned estimates   // of the models
	in, out int64       // weights of tokens
	trailer string      // in which callers are told what is left; "": they are not
	retired atomic.Bool // in no configuration any more
}

// metric is what a limit limits. Accounts count it in whole units, so that
// nothing is lost in rounding.
type metric string

const (
	tokens   metric = "tokens"
	requests metric = "requests"
	money    metric = "money"    // in thousandths of a millionth of the currency
	gpuTime  metric = "gpu_time" // in microseconds of one permit
)

// unit is how many units of an account make one of the configuration, and the
// decimal places in which people read them.
func (m metric) unit() (units int64, places int) {
	switch m {
	case money:
		return 1000, 9
	case gpuTime:
		return 1_000_000, 6
	}
	return 1, 0
}

// show is a number of units for people: tokens, the currency, seconds.
func (m metric) show(n int64) string {
	s := strconv.FormatInt(n, 10)
	_, places := m.unit()
	if places == 0 {
		return s
	}
	sign := ""
	if s[0] == '-' {
		sign, s = "-", s[1:]
	}
	for len(s) <= places {
		s = "0" + s
	}
	whole, part := s[:len(s)-places], strings.TrimRight(s[len(s)-places:], "0")
	if part == "" {
		return sign + whole
	}
	return sign + whole + "." + part
}

// price is what a million tokens cost, in millionths of the currency; which is
// also what one token costs, in millionths of millionths.
type price struct{ in, out int64 }

// anyModel in a price list stands for every model that has no price.
const anyModel = "*"

// newLimit reads a budget. An error begins with the field that is at fault.
func newLimit(b *configv1.Budget) (*limit, error) {
	m := &limit{
		config: proto.CloneOf(b),
		name:   b.GetName(), soft: b.GetSoft(), clamp: b.GetClamp(), debt: b.GetDebt(),
		in: 1, out: 1,
	}
	if err := m.amounts(b); err != nil {
		return nil, err
	}
	if err := m.window.read(b, m.amount); err != nil {
		return nil, err
	}
	if m.metric != tokens && (b.InputWeight != nil || b.OutputWeight != nil) {
		return nil, errors.New("input_weight: weights are for tokens; money has prices")
	}
	if b.InputWeight != nil {
		m.in = int64(b.GetInputWeight())
	}
	if b.OutputWeight != nil {
		m.out = int64(b.GetOutputWeight())
	}
	if m.in == 0 && m.out == 0 {
		return nil, errors.New("output_weight: both weights are 0, so that nothing would be counted")
	}
	if m.debt && !m.window.ends() {
		return nil, errors.New("debt: there is no next window to take it off; set window or calendar")
	}
	for n, k := range b.GetPer() {
		switch {
		case k <= configv1.BudgetKey_BUDGET_KEY_UNSPECIFIED || int(k) >= len(m.by):
			return nil, fmt.Errorf("per[%d]: %v is no key", n, k)
		case m.by[k]:
			return nil, fmt.Errorf("per[%d]: %v is there twice", n, k)
		}
		m.by[k] = true
	}
	if text := b.GetKey(); text != "" {
		var err error
		if m.own, err = expression.NewKey(text); err != nil {
			return nil, fmt.Errorf("key: %w", err)
		}
	}
	if b.GetTell() {
		if !m.by[configv1.BudgetKey_BUDGET_KEY_TENANT] && !m.by[configv1.BudgetKey_BUDGET_KEY_PRINCIPAL] {
			return nil, errors.New("tell: the account is of several tenants, who would learn what the others use; " +
				"add BUDGET_KEY_TENANT or BUDGET_KEY_PRINCIPAL to per")
		}
		m.trailer = "x-sluice-budget-" + m.name + "-remaining"
	}
	if len(b.GetModels()) > 0 {
		m.models = make(map[string]bool, len(b.GetModels()))
		for _, name := range b.GetModels() {
			m.models[name] = true
		}
	}
	return m, nil
}

// amounts reads what there is of what.
func (m *limit) amounts(b *configv1.Budget) error {
	for _, a := range []struct {
		metric metric
		amount uint64
	}{
		{tokens, b.GetTokens()}, {requests, b.GetRequests()}, {money, b.GetMoneyMicros()}, {gpuTime, b.GetGpuSeconds()},
	} {
		if a.amount == 0 {
			continue
		}
		if m.metric != "" {
			return fmt.Errorf("tokens: set tokens or requests or another amount, not both %s and %s", m.metric, a.metric)
		}
		m.metric, m.amount = a.metric, int64(min(a.amount, math.MaxInt64))
	}
	if m.metric == "" {
		return errors.New("tokens: set tokens or requests, or money_micros or gpu_seconds; there is no amount")
	}
	units, _ := m.metric.unit()
	most := uint64(math.MaxInt64 / units)
	for _, n := range []uint64{b.GetTokens(), b.GetRequests(), b.GetMoneyMicros(), b.GetGpuSeconds(), b.GetBurst(), b.GetOverdraft()} {
		if n > most/2 { // so that amount and overdraft together can be counted
			return fmt.Errorf("tokens: an amount is above %d", most/2)
		}
	}
	if b.GetDefaultOutputTokens() > math.MaxInt64 {
		return fmt.Errorf("default_output_tokens: it is above %d", int64(math.MaxInt64))
	}
	m.amount *= units
	m.overdraft = int64(b.GetOverdraft()) * units
	m.output = int64(b.GetDefaultOutputTokens())
	if m.metric == requests && (m.clamp || m.overdraft > 0 || m.debt) {
		return errors.New("requests: clamp, overdraft and debt are for what is used while an inference runs")
	}
	return nil
}

// priced sees to it that every model of a budget of money has a price.
func (m *limit) priced(prices map[string]price) error {
	if m.metric != money {
		return nil
	}
	if _, all := prices[anyModel]; all {
		return nil
	}
	if m.models == nil {
		return errors.New(`money_micros: models without a price could spend nothing or everything; give the budget models, or "*" a price in prices`)
	}
	for name := range m.models {
		if _, ok := prices[name]; !ok {
			return fmt.Errorf("models: %q has no price; add it to prices", name)
		}
	}
	return nil
}

// readPrices reads the price list. An error begins with the field that is at fault.
func readPrices(list []*configv1.Price) (map[string]price, error) {
	out := make(map[string]price, len(list))
	for n, p := range list {
		if _, twice := out[p.GetModel()]; twice {
			return nil, fmt.Errorf("prices[%d].model: %q has a price already", n, p.GetModel())
		}
		if max(p.GetInputMicrosPerMillion(), p.GetOutputMicrosPerMillion()) > math.MaxInt64 {
			return nil, fmt.Errorf("prices[%d]: a price is above %d", n, int64(math.MaxInt64))
		}
		out[p.GetModel()] = price{int64(p.GetInputMicrosPerMillion()), int64(p.GetOutputMicrosPerMillion())}
	}
	return out, nil
}

func (m *limit) applies(i *interceptors.Inference) bool { return m.models == nil || m.models[i.Model] }

// usage is what an inference has used, or may use.
type usage struct {
	input, output int64 // tokens
	time          int64 // microseconds since it was handed to the model server
}

// tariff is what the usage of one model costs an account: a sum of products,
// divided and rounded up. It never falls when the usage grows.
type tariff struct {
	input, output, time int64
	per                 int64
}

// tariff is how a limit counts the usage of an inference.
func (l *Ledger) tariff(m *limit, i *interceptors.Inference) tariff {
	switch m.metric {
	case money:
		p, ok := l.prices[i.Model]
		if !ok {
			p = l.prices[anyModel]
		}
		return tariff{input: p.in, output: p.out, per: 1000}
	case gpuTime:
		return tariff{time: l.permits(i), per: 1}
	case requests:
		return tariff{per: 1}
	}
	return tariff{input: m.in, output: m.out, per: 1}
}

// cost is the usage in units of an account, or the largest number there is.
func (t tariff) cost(u usage) int64 {
	sum := add(add(times(t.input, u.input), times(t.output, u.output)), times(t.time, u.time))
	if t.per == 1 || sum == math.MaxInt64 {
		return sum
	}
	n := sum / t.per
	if n*t.per < sum {
		n++
	}
	return n
}

// affords is the largest output with which the usage costs no more than an
// amount; below 0 if even without output it costs more.
func (t tariff) affords(u usage, amount int64) int64 {
	u.output = 0
	switch {
	case t.cost(u) > amount:
		return -1
	case t.output == 0:
		return math.MaxInt64
	}
	fixed := add(times(t.input, u.input), times(t.time, u.time))
	return (times(amount, t.per) - fixed) / t.output
}

// add is the sum of two numbers that are not negative, or the largest number
// there is: what callers and model servers say is not to be trusted to be small.
func add(a, b int64) int64 {
	if a > math.MaxInt64-b {
		return math.MaxInt64
	}
	return a + b
}

// times is their product, or the largest number there is.
func times(a, b int64) int64 {
	hi, lo := bits.Mul64(uint64(a), uint64(b))
	if hi != 0 || lo > math.MaxInt64 {
		return math.MaxInt64
	}
	return int64(lo)
}

// reserve is the output to reserve for an inference that does not say how much
// it wants, and to ask for when it needs more.
func (m *limit) reserve(model string) int64 {
	if m.output > 0 {
		return m.output
	}
	return cmp.Or(m.learned.get(model), defaultOutput)
}
