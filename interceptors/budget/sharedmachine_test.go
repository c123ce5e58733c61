package budget

import (
	"context"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/redis/rueidis"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/sluicegate/sluice/interceptors"
	configv1 "github.com/sluicegate/sluice/proto/gen/sluice/config/v1"
)

// shared machine: gateways that share a real store, over a connection that fails, do
// at random what inferences do. The model is what every gateway was charged and holds,
// by account; it is compared after every step with what the gateways and the store say.
type sharedMachine struct {
	t        *testing.T
	r        *rand.Rand
	proxy    *toxiproxy
	store    rueidis.Client // straight to the store
	gateways []*Ledger
	open     []*flying
	charged  []map[string]int64 // by gateway and account
	forgot   bool               // the store has lost its data, at some time
	rolls    bool               // windows end: nobody says which one a charge is of
	counts   map[string]int
}

// flying is an inference in flight.
type flying struct {
	*interceptors.Inference
	v         *reservation
	gateway   int
	delivered int64
}

const faultTimeout = 50 * time.Millisecond // of the store: the default

// faultBudgets have all windows that a shared store knows; none ends meanwhile.
func faultBudgets(lost configv1.StoreLost) []*configv1.Budget {
	return []*configv1.Budget{
		{Name: "all", Tokens: 4000, Window: durationpb.New(time.Hour), DefaultOutputTokens: 5, Share: 60, StoreLost: lost},
		{Name: "tenant", Tokens: 150, Overdraft: 60, Clamp: true, DefaultOutputTokens: 5, Share: 12, StoreLost: lost, Per: []configv1.BudgetKey{perTenant}},
		{Name: "model", Tokens: 1200, Calendar: month, DefaultOutputTokens: 5, Share: 30, StoreLost: lost,
			Per: []configv1.BudgetKey{perTenant, perModel}, OutputWeight: new(uint32(2))},
	}
}

func newSharedMachine(t *testing.T, s *server, seed uint64, budgets []*configv1.Budget) *sharedMachine {
	t.Helper()
	address := fmt.Sprintf("127.0.0.1:%d", s.port)
	m := &sharedMachine{t: t, r: rand.New(rand.NewPCG(seed, 7)), proxy: newToxiproxy(t, address), counts: map[string]int{}}
	var err error
	if m.store, err = rueidis.NewClient(rueidis.ClientOption{InitAddress: []string{address}, DisableCache: true}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { m.store.Close() })
	for range 3 {
		l := ledger(t, budgets...)
		share(t, l, m.proxy.address, time.Minute, faultTimeout)
		m.gateways = append(m.gateways, l)
		m.charged = append(m.charged, map[string]int64{})
	}
	return m
}

// step does one thing at random.
func (m *sharedMachine) step() {
	if len(m.open) < 6 && m.r.IntN(2) == 0 {
		m.begin()
		return
	}
	if len(m.open) == 0 {
		return
	}
	n := m.r.IntN(len(m.open))
	f := m.open[n]
	if m.r.IntN(4) > 0 {
		f.OutputTokens += m.r.Int64N(4)
		f.ReportedOutput = m.r.Int64N(f.OutputTokens + 2)
		if denial(m.t, f.v.Response(nil)) == nil {
			f.delivered = f.OutputTokens
			return
		}
		m.counts["cut"]++
	}
	m.open = slices.Delete(m.open, n, n+1)
	m.end(f)
}

func (m *sharedMachine) begin() {
	g := m.r.IntN(len(m.gateways))
	i := infer(caller(fmt.Sprint("t", m.r.IntN(3)), "p"), fmt.Sprint("m", m.r.IntN(2)), 1+m.r.Int64N(5), m.r.Int64N(2)*m.r.Int64N(12))
	v, d := begin(m.t, m.gateways[g].Tokens(), i)
	if d != nil {
		m.counts[string(d.Reason)]++
		return
	}
	m.counts["begun"]++
	i.Handed = m.r.IntN(10) > 0
	m.open = append(m.open, &flying{Inference: i, v: v.(*reservation), gateway: g})
}

// end settles: charge = min(grant, max(own count, reported)).
func (m *sharedMachine) end(f *flying) {
	for n := range f.v.holds {
		h := &f.v.holds[n]
		charge := int64(0)
		if f.Handed {
			charge = min(h.granted(), h.tariff.cost(usage{input: f.InputTokens, output: max(f.OutputTokens, f.ReportedOutput)}))
			if h.tariff.cost(usage{input: f.InputTokens, output: f.delivered}) > charge {
				m.t.Errorf("%d tokens were delivered for a charge of %d", f.InputTokens+f.delivered, charge)
			}
		}
		m.charged[f.gateway][m.gateways[f.gateway].storeKey(h.account.key)] += charge
	}
	f.v.End(interceptors.Outcome{})
	f.v.End(interceptors.Outcome{}) // a second end changes nothing
}

// said is what a gateway says of an account. One that was evicted, because the store
// knew all of it, is opened again with nothing used: until it is known, what was
// used before its books were begun is in the store alone.
type said struct {
	granted, used, reserved int64
	known                   bool
	books                   int64
}

// ours is what a gateway says of its accounts.
func ours(l *Ledger) map[string]said {
	out := map[string]said{}
	l.table.all(func(a *account) {
		a.mu.Lock()
		defer a.mu.Unlock()
		out[l.storeKey(a.key)] = said{a.lease.granted, a.used, a.reserved, a.lease.known, a.lease.books}
	})
	return out
}

// fields are those of an account in the store.
func (m *sharedMachine) fields(key string) map[string]string {
	m.t.Helper()
	h, err := m.store.Do(context.Background(), m.store.B().Hgetall().Key(key).Build()).AsStrMap()
	if err != nil {
		m.t.Fatal(err)
	}
	return h
}

// before is what the store knows that a gateway used of an account before it began the
// books that it has now, whether or not they have arrived.
func (m *sharedMachine) before(key, gateway string, books int64) int64 {
	m.t.Helper()
	h := m.fields(key)
	if begun, told, ok := strings.Cut(h["b:"+gateway], " "); ok && begun == strconv.FormatInt(books, 10) {
		return number(told)
	}
	return number(h["u:"+gateway])
}

func number(text string) int64 {
	n, _ := strconv.ParseFloat(text, 64)
	return int64(n)
}

// theirs is what the store says of an account: what is gone, and what of that each
// gateway was granted and used.
func (m *sharedMachine) theirs(key string) (gone int64, granted, used map[string]int64) {
	m.t.Helper()
	granted, used = map[string]int64{}, map[string]int64{}
	for field, text := range m.fields(key) {
		switch {
		case field == "d":
			gone = number(text)
		case strings.HasPrefix(field, "a:"):
			granted[field[2:]] = number(text)
		case strings.HasPrefix(field, "u:"):
			used[field[2:]] = number(text)
		}
	}
	return gone, granted, used
}

func sum(of map[string]int64) (n int64) {
	for _, v := range of {
		n += v
	}
	return n
}

// reserved is what inferences in flight hold, by gateway and account.
func (m *sharedMachine) reserved() []map[string]int64 {
	out := make([]map[string]int64, len(m.gateways))
	for g := range m.gateways {
		out[g] = map[string]int64{}
	}
	for _, f := range m.open {
		for n := range f.v.holds {
			out[f.gateway][m.gateways[f.gateway].storeKey(f.v.holds[n].account.key)] += f.v.holds[n].granted()
		}
	}
	return out
}

// check compares with the model. What a gateway says is read first: the store may have
// granted what it does not know of, and not the other way round.
func (m *sharedMachine) check(strict bool) {
	m.t.Helper()
	reserved := m.reserved()
	keys := map[string]bool{}
	accounts := make([]map[string]said, len(m.gateways))
	for g, l := range m.gateways {
		accounts[g] = ours(l)
		for key, is := range accounts[g] {
			keys[key] = true
			want := m.charged[g][key] + reserved[g][key]
			if !m.rolls && is.used != want && !is.known {
				m.counts["forgotten by the gateway"]++
				want -= m.before(key, l.shared.gateway, is.books)
			}
			if !m.rolls && (is.used != want || is.reserved != reserved[g][key]) {
				m.t.Fatalf("gateway %d has used %d of an account and reserved %d of that, want %d and %d",
					g, is.used, is.reserved, want, reserved[g][key])
			}
			if strict && is.used > is.granted {
				m.t.Fatalf("gateway %d has used %d of the %d that it was granted", g, is.used, is.granted)
			}
		}
	}
	if !strict || m.forgot {
		return
	}
	for key := range keys {
		gone, granted, _ := m.theirs(key)
		amount, most := m.capacity(key)
		if gone != sum(granted) || gone > most {
			m.t.Fatalf("the store says that %d of %d are gone, and that gateways were granted %v", gone, most, granted)
		}
		if gone > amount {
			m.counts["overdrawn"]++
		}
		for g, l := range m.gateways {
			if is := accounts[g][key].granted; !m.rolls && is > granted[l.shared.gateway] {
				m.t.Fatalf("gateway %d has %d, and the store granted it %d", g, is, granted[l.shared.gateway])
			}
		}
	}
}

// capacity is what a full account has, and that with the overdraft.
func (m *sharedMachine) capacity(key string) (n, most int64) {
	for _, l := range m.gateways {
		l.table.all(func(a *account) {
			if l.storeKey(a.key) == key {
				n = a.limit.capacity()
				most = n + a.limit.overdraft
			}
		})
	}
	return n, most
}

// reconcile ends everything with the faults healed. The store then knows, to the token,
// what each gateway was charged; and when they are closed that nothing else is gone.
func (m *sharedMachine) reconcile() {
	m.t.Helper()
	for _, f := range m.open {
		m.end(f)
	}
	m.open = nil
	m.check(false)
	m.heard()
	keys := map[string]bool{}
	for g, l := range m.gateways {
		for key := range m.charged[g] {
			keys[key] = true
		}
		atRest(m.t, l)
		if err := l.Close(); err != nil {
			m.t.Error(err)
		}
	}
	for key := range keys {
		want := int64(0)
		for g := range m.gateways {
			want += m.charged[g][key]
		}
		if gone, granted, _ := m.theirs(key); gone != want || sum(granted) != want {
			m.t.Errorf("the store says that %d are gone, granted %v; want %d", gone, granted, want)
		}
	}
}

// heard waits until the store, which is back, has heard all that every gateway has to
// say: it then knows to the token what each was charged and what its inferences hold.
// Shares that are on their way must have arrived, or failed, before they can go back.
func (m *sharedMachine) heard() {
	m.t.Helper()
	reserved := m.reserved()
	for g, l := range m.gateways {
		within(m.t, 30*time.Second, "shares to arrive", func() bool { return !fetching(l) })
		within(m.t, 30*time.Second, "the store, which is back, to be told", func() bool { return l.report(context.Background(), 0) })
		keys := maps.Clone(m.charged[g])
		maps.Copy(keys, reserved[g])
		for key := range keys {
			want := m.charged[g][key] + reserved[g][key]
			if _, granted, used := m.theirs(key); used[l.shared.gateway] != want || granted[l.shared.gateway] != want {
				m.t.Fatalf("the store knows that gateway %d has used %d of %d, want %d and nothing held",
					g, used[l.shared.gateway], granted[l.shared.gateway], want)
			}
		}
	}
	m.check(false)
}

// fetching reports whether a share is on its way to a gateway.
func fetching(l *Ledger) (is bool) {
	l.table.all(func(a *account) {
		a.mu.Lock()
		defer a.mu.Unlock()
		is = is || a.lease.fetching
	})
	return is
}
