package budget

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/sluicegate/sluice/interceptors"
	configv1 "github.com/sluicegate/sluice/proto/gen/sluice/config/v1"
)

// Conservation, to the token, for each fault alone, and for all of them in turn: no
// step spends what was not granted, and when the fault is over the store knows all.
func TestConservationUnderFaults(t *testing.T) {
	names := slices.Sorted(maps.Keys(faults))
	for _, name := range append(names, "one after the other") {
		for policy, lost := range map[string]configv1.StoreLost{
			"held": configv1.StoreLost_STORE_LOST_HELD, "closed": configv1.StoreLost_STORE_LOST_CLOSED, "open": configv1.StoreLost_STORE_LOST_OPEN,
		} {
			all := name == "one after the other"
			if !all && (policy != "held" || testing.Short()) {
				continue
			}
			t.Run(name+"/"+policy, func(t *testing.T) {
				t.Parallel()
				m := newSharedMachine(t, newServer(t), 1, faultBudgets(lost))
				faulty, steps := false, 200
				if all {
					steps = 600
				}
				for n := range steps {
					if n%100 == 50 {
						fault := faults[name]
						if all {
							fault = faults[names[m.r.IntN(len(names))]]
						}
						m.proxy.set(t, fault)
						faulty = true
					}
					if n%100 == 85 {
						m.proxy.heal(t)
						m.heard()
						faulty = false
					}
					m.step()
					m.check(policy != "open")
				}
				if faulty {
					m.proxy.heal(t)
				}
				m.reconcile()
				t.Log(m.counts)
				if m.counts["begun"] < steps/10 && policy != "closed" || m.counts["begun"] < steps/30 {
					t.Error("hardly anything was begun: the test says little")
				}
			})
		}
	}
}

// A store that comes back without its data learns it again from the gateways that
// live: what was overspent meanwhile is no more than they held when it was lost.
func TestConservationWhenTheStoreForgets(t *testing.T) {
	s := newServer(t)
	m := newSharedMachine(t, s, 3, faultBudgets(configv1.StoreLost_STORE_LOST_HELD))
	held := map[string]int64{}
	for n := range 600 {
		if n%200 == 100 {
			for _, l := range m.gateways {
				for key, is := range ours(l) {
					held[key] += is.granted // all that it knew of
				}
			}
			s.kill()
			s.start(t)
			m.forgot = true
		}
		m.step()
		m.check(true)
	}
	m.reconcile()
	t.Log(m.counts)
	total := map[string]int64{}
	for g := range m.gateways {
		for key, n := range m.charged[g] {
			total[key] += n
		}
	}
	for key, n := range total {
		if _, most := m.capacity(key); n > most+held[key] {
			t.Errorf("%d were charged of %d, with %d held when the store was lost", n, most, held[key])
		}
	}
}

// While windows end, and answers are lost, no window gives more than the amount.
func TestConservationWhenWindowsEnd(t *testing.T) {
	const amount, window = 150, 300 * time.Millisecond
	m := newSharedMachine(t, newServer(t), 5, []*configv1.Budget{
		{Name: "all", Tokens: amount, Window: durationpb.New(window), DefaultOutputTokens: 5, Share: 12},
		{Name: "tenant", Tokens: amount, Window: durationpb.New(2 * window), DefaultOutputTokens: 5, Share: 12, Per: []configv1.BudgetKey{perTenant}},
	})
	m.rolls = true
	began := time.Now()
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for n := range 1200 {
		switch n % 200 {
		case 60:
			m.proxy.set(t, faults[[]string{"no answer", "requests are late", "late by chance", "cut in a reply"}[n/200%4]])
		case 80:
			m.proxy.heal(t)
		}
		for range 4 {
			m.step()
		}
		m.check(true)
		<-tick.C
	}
	m.proxy.heal(t)
	for _, f := range m.open {
		m.end(f)
	}
	windows := 2 + int64(time.Since(began)/window) // the first, and the one that is not over
	total := map[string]int64{}
	for g, l := range m.gateways {
		atRest(t, l)
		for key, n := range m.charged[g] {
			total[key] += n
		}
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	}
	for key, n := range total {
		if n > windows*amount {
			t.Errorf("%d were charged to %s in %d windows of %d", n, key, windows, amount)
		}
	}
	t.Log(m.counts, total, windows)
	if m.counts[string(interceptors.BudgetExhausted)] == 0 {
		t.Error("no window was used up: the test says little")
	}
}

// A gateway that is cut off for longer than a lease spends what it holds, and others are
// given that as well: what is overspent is no more, and in the end the store knows it.
func TestCutOffForLongerThanALease(t *testing.T) {
	const amount, part, cost = 100, 24, 2
	s := newServer(t)
	proxy := newToxiproxy(t, fmt.Sprintf("127.0.0.1:%d", s.port))
	budget := &configv1.Budget{Name: "b", Tokens: amount, DefaultOutputTokens: 1, Share: part}
	cutOff, other := ledger(t, budget), ledger(t, budget)
	share(t, cutOff, proxy.address, time.Second, faultTimeout)
	share(t, other, fmt.Sprintf("127.0.0.1:%d", s.port), time.Second, long)
	all := func(l *Ledger) (spent int64) {
		for {
			got, d := serve(t, l, "a", 1, 1)
			if spent += got; d != nil {
				return spent
			}
		}
	}
	within(t, 30*time.Second, "the first share", func() bool { got, _ := serve(t, cutOff, "a", 1, 1); return got == cost })
	within(t, 30*time.Second, "shares to arrive", func() bool { return !fetching(cutOff) })
	held := only(t, cutOff).Limit
	proxy.set(t, faults["nothing arrives"])
	total := cost + all(cutOff)
	if total > held {
		t.Errorf("%d were spent of the %d that were held", total, held)
	}
	spent := int64(0)
	within(t, 30*time.Second, "the share to come back", func() bool { spent += all(other); return spent > amount-held })
	if total += spent; total > amount+held {
		t.Errorf("%d were spent of %d, with %d held when the store was out of reach", total, amount, held)
	}
	proxy.heal(t)
	for _, l := range []*Ledger{cutOff, other} {
		within(t, 30*time.Second, "the store to be told", func() bool { return !fetching(l) && l.report(context.Background(), 0) })
	}
	client, err := other.shared.store.Connect()
	if err != nil {
		t.Fatal(err)
	}
	m := &sharedMachine{t: t, store: client}
	for key := range ours(other) {
		if gone, _, _ := m.theirs(key); gone != total {
			t.Errorf("the store says that %d are gone, want %d", gone, total)
		}
	}
	t.Logf("%d of %d were spent, with %d held when the store was out of reach", total, amount, held)
	_ = cutOff.Close()
	_ = other.Close()
}

// A message that was overtaken by a later one changes nothing.
func TestOvertakenMessagesAreDropped(t *testing.T) {
	s := newServer(t)
	l := s.gateway(t, time.Minute, long, &configv1.Budget{Name: "b", Tokens: 100, DefaultOutputTokens: 1, Share: 20})
	if _, d := serve(t, l, "a", 1, 1); d != nil {
		t.Fatal(d)
	}
	within(t, 30*time.Second, "shares to arrive", func() bool { return !fetching(l) })
	var h []hold
	l.table.all(func(a *account) { h = append(h, hold{account: a}) })
	now := l.lock(h)
	keys, overtaken := l.message(h, []ask{{want: 10, least: 10}}, now)
	unlock(h)
	client, err := l.shared.store.Connect()
	if err != nil {
		t.Fatal(err)
	}
	m := &sharedMachine{t: t, store: client}
	if _, d := serve(t, l, "a", 1, 1); d != nil {
		t.Fatal(d)
	}
	if !l.report(t.Context(), 0) {
		t.Fatal("the store was not told")
	}
	before := m.fields(keys[0])
	if _, err := l.shared.ask(t.Context(), keys, overtaken); err == nil || !strings.Contains(err.Error(), "late") {
		t.Errorf("a message that was overtaken: %v", err)
	}
	if after := m.fields(keys[0]); !maps.Equal(before, after) {
		t.Errorf("a message that was overtaken made %v of %v", after, before)
	}
	_ = l.Close()
}

// N callers at once, through two gateways, on a budget for K inferences: K are served.
func TestExactlyWhatFitsIsServed(t *testing.T) {
	const callers, fits, cost = 64, 37, 10
	budget := &configv1.Budget{Name: "b", Tokens: fits*cost + 3, Window: durationpb.New(time.Hour), Share: 1}
	run := func(t *testing.T, ledgers ...*Ledger) {
		var wg sync.WaitGroup
		var served sync.Map
		for n := range callers {
			wg.Go(func() {
				l := ledgers[n%len(ledgers)]
				i := infer(caller("a", fmt.Sprint(n)), "m", 4, cost-4)
				v, d := begin(t, l.Tokens(), i)
				if d != nil {
					if d.Reason != interceptors.BudgetExhausted {
						t.Error(d)
					}
					return
				}
				i.Handed, i.OutputTokens = true, cost-4
				if err := v.Response(nil); err != nil {
					t.Error(err)
				}
				v.End(interceptors.Outcome{})
				served.Store(n, true)
			})
		}
		wg.Wait()
		n := 0
		served.Range(func(any, any) bool { n++; return true })
		if n != fits {
			t.Errorf("%d served, want %d", n, fits)
		}
	}
	t.Run("memory", func(t *testing.T) { run(t, ledger(t, budget)) })
	t.Run("store", func(t *testing.T) {
		s := newServer(t)
		a, b := s.gateway(t, time.Minute, long, budget), s.gateway(t, time.Minute, long, budget)
		run(t, a, b)
		_ = a.Close()
		_ = b.Close()
	})
}

// What a gateway holds it may spend without the store, until its lease ends, and not a token after.
func TestWhatIsHeldEndsWithTheLease(t *testing.T) {
	s := newServer(t)
	l := s.gateway(t, time.Minute, faultTimeout, &configv1.Budget{Name: "b", Tokens: 100, Share: 20, DefaultOutputTokens: 1})
	var ahead atomic.Int64
	clock := l.clock
	l.clock = func() instant {
		now := clock()
		now.mono += time.Duration(ahead.Load())
		now.wall += ahead.Load()
		return now
	}
	if _, d := serve(t, l, "a", 1, 1); d != nil {
		t.Fatal(d)
	}
	s.cut(true)
	ahead.Store(int64(50 * time.Second))
	if _, d := serve(t, l, "a", 1, 1); d != nil {
		t.Errorf("within its lease: %v", d)
	}
	ahead.Store(int64(time.Minute + time.Second))
	if got, d := serve(t, l, "a", 1, 1); d == nil || d.Reason != interceptors.PolicyUnavailable {
		t.Errorf("after its lease: %d, %v, want POLICY_UNAVAILABLE", got, d)
	}
	s.down.Store(false)
	_ = l.Close()
}
