package budget

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/sluicegate/sluice/interceptors"
	configv1 "github.com/sluicegate/sluice/proto/gen/sluice/config/v1"
)

// server is a real Redis or Valkey, behind a proxy that can be out of order.
type server struct {
	proxy
	cmd  *exec.Cmd
	path string
	dir  string
	real string // its own socket
	port int    // and port
}

func newServer(t testing.TB) *server {
	t.Helper()
	out, err := exec.Command(filepath.Join("testdata", "redis.sh")).Output()
	if exit := new(exec.ExitError); errors.As(err, &exit) && exit.ExitCode() == 77 {
		t.Skipf("%s", exit.Stderr)
	}
	if err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp("", "redis") //nolint:usetesting // a socket's path must be short
	if err != nil {
		t.Fatal(err)
	}
	s := &server{path: strings.TrimSpace(string(out)), dir: dir, real: filepath.Join(dir, "s"), port: freePort(t)}
	s.start(t)
	s.listen(t, s.real)
	t.Cleanup(func() {
		s.proxy.close()
		s.kill()
		_ = os.RemoveAll(dir)
	})
	return s
}

func (s *server) start(t testing.TB) {
	t.Helper()
	_ = os.Remove(s.real)
	s.cmd = exec.Command(s.path, "--bind", "127.0.0.1", "--port", strconv.Itoa(s.port), "--unixsocket", s.real, "--save", "", "--appendonly", "no", "--dir", s.dir)
	out, err := s.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := s.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	log := make([]byte, 0, 1<<16)
	for !strings.Contains(string(log), "accept connections at") {
		n, err := out.Read(log[len(log):cap(log)])
		if err != nil {
			t.Fatalf("%v\n%s", err, log)
		}
		log = log[:len(log)+n]
	}
	go func() { _, _ = io.Copy(io.Discard, out) }()
}

// freePort is a port of this machine that nobody has at the moment.
func freePort(t testing.TB) int {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port
}

func (s *server) kill() {
	_ = s.cmd.Process.Kill()
	_ = s.cmd.Wait()
}

// proxy passes connections on, late, or not at all.
type proxy struct {
	listener net.Listener
	delay    atomic.Int64 // of every answer
	down     atomic.Bool
	mute     atomic.Bool // requests arrive, answers do not
	mu       sync.Mutex
	conns    []net.Conn
	all      sync.WaitGroup
	answers  atomic.Int64
}

func (p *proxy) listen(t testing.TB, to string) {
	t.Helper()
	var err error
	if p.listener, err = net.Listen("tcp", "127.0.0.1:0"); err != nil {
		t.Fatal(err)
	}
	p.all.Go(func() {
		for {
			in, err := p.listener.Accept()
			if err != nil {
				return
			}
			out, err := net.Dial("unix", to)
			if err != nil || p.down.Load() {
				_ = in.Close()
				continue
			}
			p.mu.Lock()
			p.conns = append(p.conns, in, out)
			p.mu.Unlock()
			p.all.Go(func() { _, _ = io.Copy(out, in); _ = out.Close() })
			p.all.Go(func() {
				defer in.Close()
				b := make([]byte, 1<<16)
				for {
					n, err := out.Read(b)
					if err != nil {
						return
					}
					if d := p.delay.Load(); d > 0 {
						<-time.After(time.Duration(d))
					}
					p.answers.Add(1)
					if p.mute.Load() {
						continue
					}
					if _, err := in.Write(b[:n]); err != nil {
						return
					}
				}
			})
		}
	})
}

// cut ends all connections, and takes no more while it is down.
func (p *proxy) cut(down bool) {
	p.down.Store(down)
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, c := range p.conns {
		_ = c.Close()
	}
	p.conns = nil
}

func (p *proxy) close() {
	_ = p.listener.Close()
	p.cut(true)
	p.all.Wait()
}

// gateway is a ledger that shares its accounts. The lease is short, and what it
// waits for the store long, because the machine may be slow; unless told otherwise.
func (s *server) gateway(t testing.TB, lease, timeout time.Duration, budgets ...*configv1.Budget) *Ledger {
	t.Helper()
	l, err := New(budgets, WithPrices(machinePrices))
	if err != nil {
		t.Fatal(err)
	}
	share(t, l, s.listener.Addr().String(), lease, timeout)
	return l
}

// share has a ledger share its accounts in the store at an address.
func share(t testing.TB, l *Ledger, address string, lease, timeout time.Duration) {
	t.Helper()
	if err := l.Share(&configv1.Redis{Addresses: []string{address},
		Lease: durationpb.New(lease), Timeout: durationpb.New(timeout)}); err != nil {
		t.Fatal(err)
	}
}

// begin is what the chain does with an inference that may have to wait.
func begin(t testing.TB, p interceptors.Policy, i *interceptors.Inference) (interceptors.InferencePolicy, *interceptors.Denial) {
	t.Helper()
	i.Call.SetContext(context.Background())
	v, d := start(t, p, i)
	if w, ok := v.(interceptors.Waiter); ok && d == nil && !w.Ready() {
		if d = denial(t, w.Wait(context.Background())); d != nil {
			v.End(interceptors.Outcome{Err: d})
			return nil, d
		}
	}
	return v, d
}

// serve is a whole inference; it says what was delivered.
func serve(t testing.TB, l *Ledger, tenant string, in, out int64) (delivered int64, d *interceptors.Denial) {
	t.Helper()
	i := infer(caller(tenant, "p"), "m", in, 0)
	v, d := begin(t, l.Tokens(), i)
	if d != nil {
		return 0, d
	}
	i.Handed = true
	delivered = in
	for range out {
		i.OutputTokens++
		if d = denial(t, v.Response(nil)); d != nil {
			break
		}
		delivered++
	}
	v.End(interceptors.Outcome{})
	return delivered, d
}

const long = 5 * time.Second

func sharedBudgets() []*configv1.Budget {
	return []*configv1.Budget{
		{Name: "all", Tokens: 3000, Window: durationpb.New(time.Hour), DefaultOutputTokens: 5, Share: 50},
		{Name: "tenant", Tokens: 1000, Calendar: month, DefaultOutputTokens: 5, Share: 20, Per: []configv1.BudgetKey{perTenant}},
	}
}

// Gateways that share a store spend exactly what there is, all but what they still
// hold; and when those give back what they hold, exactly that.
func TestSharedBudgetIsSpentOnce(t *testing.T) {
	s := newServer(t)
	var all []*Ledger
	for range 3 {
		all = append(all, s.gateway(t, time.Minute, long, sharedBudgets()...))
	}
	var delivered atomic.Int64
	var wg sync.WaitGroup
	for n, l := range all {
		for w := range 4 {
			wg.Go(func() {
				r := rand.New(rand.NewPCG(uint64(n), uint64(w)))
				for range 500 {
					got, _ := serve(t, l, "a", 1, r.Int64N(12))
					delivered.Add(got)
				}
			})
		}
	}
	wg.Wait()
	if got := delivered.Load(); got > 1000 || got < 1000-3*40 {
		t.Errorf("%d delivered of 1000", got)
	}
	for _, l := range all[1:] {
		atRest(t, l)
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	}
	for range 100 {
		got, _ := serve(t, all[0], "a", 1, 0)
		delivered.Add(got)
	}
	if got := delivered.Load(); got != 1000 {
		t.Errorf("when the others have given back what they held: %d delivered of 1000", got)
	}
	_, d := serve(t, all[0], "a", 1, 5)
	if d == nil || d.Reason != interceptors.BudgetExhausted || d.RetryAfter <= 0 || d.Quota.ID != "tenant" {
		t.Errorf("%+v", d)
	}
	if got, d := serve(t, all[0], "b", 1, 5); d != nil || got != 6 {
		t.Errorf("another tenant: %d, %v", got, d)
	}
	_ = all[0].Close()
}

func TestSharedRequests(t *testing.T) {
	s := newServer(t)
	budget := &configv1.Budget{Name: "rate", Requests: 100, Window: durationpb.New(time.Hour), Share: 10}
	a, b := s.gateway(t, time.Minute, long, budget), s.gateway(t, time.Minute, long, budget)
	spend := func(l *Ledger) (n int) {
		for range 200 {
			v, d := begin(t, l.Rates(), infer(caller("a", "p"), "m", 1, 1))
			if d != nil {
				if d.Reason != interceptors.RateExceeded {
					t.Fatal(d)
				}
				continue
			}
			if n++; v != nil {
				v.End(interceptors.Outcome{})
			}
		}
		return n
	}
	n := spend(a)
	_ = a.Close()
	if n += spend(b); n != 100 {
		t.Errorf("%d requests, want 100", n)
	}
	_ = b.Close()
}

// What a gateway held that was lost comes back when its lease ends: so much may be
// overspent, and no more.
func TestLostGateway(t *testing.T) {
	s := newServer(t)
	budget := &configv1.Budget{Name: "b", Tokens: 100, Share: 40, DefaultOutputTokens: 5}
	lost := s.gateway(t, time.Second, long, budget)
	if got, d := serve(t, lost, "a", 1, 4); d != nil || got != 5 {
		t.Fatal(got, d)
	}
	lost.shared.stop() // as if it were killed: it tells nothing any more
	lost.shared.background.Wait()
	held := only(t, lost).Limit
	other := s.gateway(t, time.Second, long, budget)
	total := int64(0)
	for {
		got, d := serve(t, other, "a", 1, 0)
		if d != nil {
			break
		}
		total += got
	}
	if total != 100-held-1 { // the last one is too little for an input and an output
		t.Errorf("%d could be spent while the lost gateway holds %d", total, held)
	}
	// The lost one spent 5 and may have told so before it was lost, or not; and up to 5
	// are too little for an input and an output.
	const least, most = 100 - 5 - 5, 100
	deadline := time.Now().Add(30 * time.Second)
	for more := true; (total < least || more) && time.Now().Before(deadline); {
		got, _ := serve(t, other, "a", 1, 0)
		total += got
		more = got > 0
	}
	if total < least || total > most {
		t.Errorf("%d could be spent after the lease, want %d to %d", total, least, most)
	}
	_ = other.Close()
	lost.shared.store.Close()
}

// A store that does not answer costs an inference no more than the timeout, and
// then nothing; each budget does what it is told.
func TestStoreOutOfOrder(t *testing.T) {
	for _, fault := range []struct {
		name string
		set  func(*server)
	}{
		{"down", func(s *server) { s.cut(true) }},
		{"killed", func(s *server) { s.kill() }},
		{"mute", func(s *server) { s.mute.Store(true) }},
		{"slow", func(s *server) { s.delay.Store(int64(500 * time.Millisecond)) }},
	} {
		for lost, want := range map[configv1.StoreLost]string{
			configv1.StoreLost_STORE_LOST_HELD: "held", configv1.StoreLost_STORE_LOST_CLOSED: "closed", configv1.StoreLost_STORE_LOST_OPEN: "open",
		} {
			t.Run(fault.name+"/"+want, func(t *testing.T) {
				s := newServer(t)
				l := s.gateway(t, time.Minute, 50*time.Millisecond,
					&configv1.Budget{Name: "b", Tokens: 1000, Share: 100, StoreLost: lost, DefaultOutputTokens: 1})
				for n := 0; ; n++ { // the first may come before there is a connection
					if _, d := serve(t, l, "a", 1, 0); d == nil {
						break
					} else if n == 100 {
						t.Fatal(d)
					}
				}
				held := only(t, l).Remaining
				fault.set(s)
				served, refused := int64(0), 0
				for range 400 {
					got, d := serve(t, l, "a", 1, 0)
					served += got
					if d != nil {
						refused++
						if d.Reason != interceptors.PolicyUnavailable || d.RetryAfter <= 0 {
							t.Fatalf("%+v", d)
						}
					}
				}
				switch {
				case want == "open" && served != 400:
					t.Errorf("%d served, want all", served)
				case want == "held" && (served > 1000 || served < held-1 || refused == 0 && served < 400):
					t.Errorf("%d served and %d refused, want the %d that are held", served, refused, held)
				case want == "closed" && served > held+250:
					t.Errorf("%d served", served)
				}
				if !l.shared.lost() && want != "closed" && refused > breakAfter {
					t.Error("the store was asked again and again")
				}
				s.delay.Store(0)
				_ = l.Close()
			})
		}
	}
}

// After a partition everything that was spent is known again.
func TestReconciliation(t *testing.T) {
	s := newServer(t)
	budget := &configv1.Budget{Name: "b", Tokens: 1000, Window: durationpb.New(time.Hour), Share: 100, DefaultOutputTokens: 1,
		StoreLost: configv1.StoreLost_STORE_LOST_OPEN}
	a, b := s.gateway(t, time.Second, time.Second, budget), s.gateway(t, time.Second, time.Second, budget)
	total := int64(0)
	spend := func(l *Ledger, n int) {
		for range n {
			got, d := serve(t, l, "a", 1, 0)
			if d != nil {
				t.Fatal(d)
			}
			total += got
		}
	}
	spend(a, 30)
	spend(b, 30)
	s.cut(true)
	spend(a, 300)
	t.Run("the store comes back empty", func(t *testing.T) {
		s.kill()
		s.start(t)
	})
	s.cut(false)
	deadline := time.Now().Add(20 * time.Second)
	for a.shared.lost() || b.shared.lost() || s.spent(t, a, b) != total {
		if time.Now().After(deadline) {
			t.Fatalf("the store knows of %d, want %d", s.spent(t, a, b), total)
		}
		a.report(t.Context(), 0)
		b.report(t.Context(), 0)
	}
	_ = a.Close()
	_ = b.Close()
}

// spent is what the store says is gone, by another gateway that asks for nothing.
func (s *server) spent(t testing.TB, of ...*Ledger) int64 {
	t.Helper()
	var key string
	of[0].table.all(func(a *account) { key = of[0].storeKey(a.key) })
	client, err := of[0].shared.store.Connect()
	if err != nil {
		return -1
	}
	d, err := client.Do(context.Background(), client.B().Hget().Key(key).Field("d").Build()).AsFloat64()
	if err != nil {
		return -1
	}
	return int64(d)
}

func keyOf(t *testing.T, m *limit, tenant string) key {
	t.Helper()
	k, err := m.key(infer(caller(tenant, "x"), "m", 0, 0))
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// The store's answer is to the question, its keys hide the names, and all accounts
// of an inference are in one slot of a cluster.
func TestStoreKeys(t *testing.T) {
	l := ledger(t,
		&configv1.Budget{Name: "tenant", Tokens: 1, Per: []configv1.BudgetKey{perTenant}},
		&configv1.Budget{Name: "leaf", Tokens: 1, Per: []configv1.BudgetKey{perTenant, perPrincipal, perModel}})
	slot := func(k string) string { return k[strings.Index(k, "{"):strings.Index(k, "}")] }
	seen := map[string]bool{}
	for _, who := range [][2]string{{"a", "p"}, {"b", "p"}, {"a", "q"}, {"ap", ""}} {
		var slots []string
		for _, m := range l.limits {
			k := l.storeKey(keyOf(t, m, who[0]))
			slots = append(slots, slot(k))
			seen[k] = true
			if strings.Contains(k, "example") || len(k) > 80 {
				t.Errorf("key %q", k)
			}
		}
		if slots[0] != slots[1] {
			t.Errorf("an inference of %v needs two slots: %q", who, slots)
		}
	}
	a, b := keyOf(t, l.limits[0], "a"), keyOf(t, l.limits[0], "b")
	if slot(l.storeKey(a)) == slot(l.storeKey(b)) {
		t.Error("tenants that share no budget share a slot")
	}
	if digest("ab", "c") == digest("a", "bc") {
		t.Error("two accounts have one key")
	}
}

// At a steady load almost no inference waits for the network.
func TestFewInferencesWaitForTheStore(t *testing.T) {
	s := newServer(t)
	l := s.gateway(t, time.Minute, long, &configv1.Budget{Name: "b", Tokens: 1 << 40, Share: 10_000, DefaultOutputTokens: 8})
	waited := 0
	const n = 20_000
	for range n {
		i := infer(caller("a", "p"), "m", 1, 1)
		v, d := start(t, l.Tokens(), i)
		if d != nil {
			t.Fatal(d)
		}
		if w := v.(interceptors.Waiter); !w.Ready() {
			waited++
			if d := denial(t, w.Wait(context.Background())); d != nil {
				t.Fatal(d)
			}
		}
		i.Handed, i.OutputTokens = true, 1
		v.End(interceptors.Outcome{})
	}
	if waited > n/100 {
		t.Errorf("%d of %d waited", waited, n)
	}
	t.Logf("%d of %d waited, %d answers of the store", waited, n, s.answers.Load())
	_ = l.Close()
}

// Two gateways at random, with a store that fails at random: what is delivered is
// never more than the budget, and no gateway is stuck.
func TestConservationOfSharedBudgets(t *testing.T) {
	seeds := 6
	if testing.Short() {
		seeds = 2
	}
	for seed := range seeds {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			s := newServer(t)
			r := rand.New(rand.NewPCG(uint64(seed), 1))
			all := []*Ledger{s.gateway(t, time.Minute, time.Second, sharedBudgets()...), s.gateway(t, time.Minute, time.Second, sharedBudgets()...)}
			delivered := map[string]int64{}
			for n := range 800 {
				tenant := fmt.Sprint("t", r.IntN(4))
				got, _ := serve(t, all[r.IntN(2)], tenant, 1+r.Int64N(4), r.Int64N(10))
				delivered[tenant] += got
				switch {
				case n%50 == 10:
					s.cut(false)
				case n%200 == 20:
					s.mute.Store(true) // what was asked is done, but nobody is told
				case n%200 == 24:
					s.mute.Store(false)
					s.cut(false)
				}
			}
			s.mute.Store(false)
			s.cut(false)
			total := int64(0)
			for tenant, n := range delivered {
				if total += n; n > 1000 {
					t.Errorf("%s: %d delivered of 1000", tenant, n)
				}
			}
			if total > 3000 {
				t.Errorf("%d delivered of 3000", total)
			}
			for _, l := range all {
				atRest(t, l)
				_ = l.Close()
			}
			// All is given back: the store knows exactly what was delivered.
			last := s.gateway(t, time.Minute, long, sharedBudgets()...)
			rest := int64(0)
			for n := range 4 {
				for rest < 3000 {
					got, d := serve(t, last, fmt.Sprint("t", n), 1, 0)
					if rest += got; d != nil {
						break
					}
				}
			}
			if total+rest < 2999 || total+rest > 3000 { // one may be too little for an input and an output
				t.Errorf("%d delivered, and then %d: want 3000 in all", total, rest)
			}
			_ = last.Close()
		})
	}
}
