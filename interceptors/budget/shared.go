package budget

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	_ "embed" // the script
	"encoding/hex"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/redis/rueidis"
	"google.golang.org/protobuf/proto"

	"github.com/sluicegate/sluice/interceptors/internal/redis"
	configv1 "github.com/sluicegate/sluice/proto/gen/sluice/config/v1"
)

const (
	// defaultLease is how long a gateway owns what it took. Chosen: a gateway that
	// was lost is missed within half a minute.
	defaultLease = 30 * time.Second
	// breakAfter failures on end the store is left alone for breakFor, then asked
	// again by one inference. Chosen.
	breakAfter, breakFor = 3, time.Second
	// maxShared is the largest amount that the script can count: its numbers are
	// exact to 2⁵³.
	maxShared = 1 << 52
	// repliesPerKey is how many values the script gives for every account.
	repliesPerKey = 8
)

//go:embed shared.lua
var sharedScript string

// errStore says that the store gave no answer.
var errStore = errors.New("the budget store cannot be reached")

// shared is a store that several gateways share. Each takes shares of the accounts
// for itself, which it alone spends: most inferences meet no network.
type shared struct {
	config  *configv1.Redis
	gateway string // who we are to the store
	script  *rueidis.Lua
	store   *redis.Client
	timeout time.Duration // of an answer
	lease   time.Duration
	number  atomic.Int64 // of messages

	mu      sync.Mutex
	holders int // ledgers

	failures atomic.Int64 // on end
	retry    atomic.Int64 // when the store is asked again, in Unix nanoseconds

	stop       context.CancelFunc
	background sync.WaitGroup
}

// lease is what a gateway holds of a shared account: granted of a window, until a
// moment. Guarded by the account's lock; but one message at a time is under way,
// whose sender has the gate.
type lease struct {
	gate     chan struct{}
	known    bool
	books    int64 // a number of what is told: another where it begins anew
	granted  int64
	told     int64 // used, as the store knows it
	stored   int64 // granted, as the store knows it; -1: that is not known
	until    time.Duration
	window   int64         // the store's
	ends     time.Duration // of the window; 0: never
	touched  time.Duration // when it was last taken of
	fetching bool          // a share is on its way
	left     int64         // in the store, when it last answered
	passed   string        // the threshold that what all spent has passed, and that nobody was told of; "": none
}

// books numbers what is told of shared accounts.
var books atomic.Int64

// newLease is that of an account of which the store has told nothing.
func newLease() *lease { return &lease{gate: make(chan struct{}, 1), books: books.Add(1)} }

// newShared reads the store's configuration. Nothing is dialed.
func newShared(c *configv1.Redis) (*shared, error) {
	store, err := redis.New(c)
	if err != nil {
		return nil, fmt.Errorf("budget_store.redis.%w", err)
	}
	var id [8]byte
	_, _ = rand.Read(id[:]) // never fails
	s := &shared{
		config:  c,
		gateway: hex.EncodeToString(id[:]),
		script:  rueidis.NewLuaScript(sharedScript),
		store:   store,
		timeout: store.Timeout,
		lease:   defaultLease,
	}
	if d := c.GetLease(); d != nil {
		s.lease = d.AsDuration()
	}
	return s, nil
}

// Share has the ledger share its accounts with other gateways, in a store. A ledger
// that follows one with the same store shares that too. Close it. A store that cannot
// be reached is no error.
func (l *Ledger) Share(c *configv1.Redis) error {
	if err := l.CanShare(); err != nil {
		return err
	}
	if s := l.earlierShared; s != nil && proto.Equal(s.config, c) {
		l.shared = s
	} else {
		s, err := newShared(c)
		if err != nil {
			return err
		}
		l.shared = s
		ctx, cancel := context.WithCancel(context.Background())
		s.stop = cancel
		s.background.Go(func() { s.keep(ctx, l) })
	}
	l.shared.mu.Lock()
	defer l.shared.mu.Unlock()
	l.shared.holders++
	return nil
}

// CanShare says what of the budgets a shared store cannot do.
func (l *Ledger) CanShare() error {
	for _, m := range l.limits {
		switch {
		case m.debt:
			return fmt.Errorf("budget_store.redis: budget %q has debt, which a shared store cannot do", m.name)
		case m.capacity()+m.overdraft > maxShared:
			return fmt.Errorf("budget_store.redis: the amount of budget %q is above what a shared store can count: %s",
				m.name, m.metric.show(maxShared))
		}
	}
	return nil
}

// leave gives back what is held.
func (s *shared) leave(l *Ledger) {
	s.mu.Lock()
	s.holders--
	last := s.holders == 0
	s.mu.Unlock()
	if !last {
		return
	}
	s.stop()
	s.background.Wait()
	ctx, cancel := context.WithTimeout(context.Background(), 20*s.timeout)
	defer cancel()
	for range breakAfter { // the first after a broken connection fails
		s.failures.Store(0)
		if l.report(ctx, 0) {
			break
		}
	}
	s.background.Wait() // for answers that come too late
	s.store.Close()
}

// lost reports whether the store is known not to answer.
func (s *shared) lost() bool { return s.failures.Load() >= breakAfter }

// allowed reports whether the store may be asked now.
func (s *shared) allowed(now int64) bool {
	if !s.lost() {
		return true
	}
	at := s.retry.Load()
	return now >= at && s.retry.CompareAndSwap(at, now+int64(breakFor))
}

// due reports whether it is time to ask a lost store again.
func (s *shared) due(now int64) bool { return now >= s.retry.Load() }

func (s *shared) failed(now int64) {
	if s.failures.Add(1) >= breakAfter {
		s.retry.Store(now + int64(breakFor))
	}
}

// tag is the part of a key that decides where a cluster keeps it: a hash of those
// names that every budget tells apart, so that all accounts of an inference are in
// one place, and those of callers who share none may be in others.
func (l *Ledger) tag(k key) string {
	names := [...]string{1: k.trustDomain, k.tenant, k.principal, k.model}
	own := k.own
	for _, m := range l.limits {
		for level := range names {
			if !m.by[level] {
				names[level] = ""
			}
		}
		if m.config.GetKey() != l.limits[0].config.GetKey() {
			own = ""
		}
	}
	return digest(append(names[:], own)...)[:16]
}

// storeKey names an account in the store. Names are hashed: they may hold any byte
// and be of any length, and no two accounts have the same key.
func (l *Ledger) storeKey(k key) string {
	return "sluice:{" + l.tag(k) + "}:" + digest(k.limit.name, k.trustDomain, k.tenant, k.principal, k.model, k.own)
}

// digest is a hash of names, each with its length.
func digest(names ...string) string {
	h := sha256.New()
	for _, n := range names {
		_, _ = fmt.Fprintf(h, "%d:%s", len(n), n)
	}
	return hex.EncodeToString(h.Sum(nil)[:16])
}

// share is what a gateway asks for at once.
func (m *limit) share() int64 {
	if n := int64(m.config.GetShare()); n > 0 {
		units, _ := m.metric.unit()
		return n * units
	}
	return max(1, m.capacity()/blocks)
}

// over ends a window of a shared account.
func (a *account) over() {
	a.window++
	a.carried += a.reserved
	a.used, a.reserved = 0, 0
	a.lease.granted, a.lease.told, a.lease.known, a.lease.books = 0, 0, false, books.Add(1)
}

// rollShared brings a shared account up to a moment.
func (a *account) rollShared(now instant) {
	e := a.lease
	if e.ends > 0 && now.mono >= e.ends {
		a.over()
		e.ends = 0
	}
	if now.mono >= e.until { // what we held is not ours any more
		e.granted = min(e.granted, a.used)
	}
}

// held is what may be taken of a shared account without asking.
func (a *account) held() int64 { return max(0, a.lease.granted-a.used) }

// quiet reports whether the store knows all of a shared account, and nothing of it
// is held.
func (a *account) quiet() bool {
	e := a.lease
	return e.told == a.used && e.stored == e.granted && e.granted == a.used
}

// prefetch asks for more of accounts of which less than half a share is left, so
// that the next inference need not wait. The accounts are locked.
func (s *shared) prefetch(l *Ledger, holds []hold, now instant) {
	var low []*account
	for n := range holds {
		a := holds[n].account
		e := a.lease
		e.touched = now.mono
		if !e.fetching && !s.lost() && a.held() < a.limit.share()/2 && e.left > 0 {
			e.fetching = true
			a.pins.Add(1)
			low = append(low, a)
		}
	}
	if low == nil {
		return
	}
	s.background.Go(func() {
		for _, a := range low {
			h := []hold{{account: a}}
			_ = s.exchange(context.Background(), l, h, func(asks []ask) bool {
				asks[0].want = a.limit.share()
				return true
			})
			a.mu.Lock()
			a.lease.fetching = false
			a.mu.Unlock()
			letGo(h)
		}
	})
}

// keep renews leases, three times in each, and tells what was used. What was not
// used for as long as a lease goes back.
func (s *shared) keep(ctx context.Context, l *Ledger) {
	tick := time.NewTicker(s.lease / 3)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			l.report(ctx, s.lease)
		}
	}
}

// report tells the store of every account that changed or is held. Those that were
// idle for a time give back what they hold. It reports whether the store has heard
// it all, and nothing is held.
func (l *Ledger) report(ctx context.Context, idle time.Duration) bool {
	var all []*account
	heard := true
	l.table.all(func(a *account) {
		a.pins.Add(1)
		all = append(all, a)
	})
	for _, a := range all {
		h := []hold{{account: a}}
		now := l.lock(h)
		e := a.lease
		if now.mono-e.touched >= idle {
			e.granted = min(e.granted, a.used)
		}
		silent := a.quiet()
		unlock(h)
		if !silent {
			err := l.shared.exchange(ctx, l, h, func([]ask) bool { return true })
			l.lock(h)
			heard = heard && err == nil && a.quiet()
			unlock(h)
		}
		letGo(h)
	}
	return heard
}
