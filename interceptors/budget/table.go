package budget

import (
	"hash/maphash"
	"sync"
	"sync/atomic"
)

const (
	// maxAccounts bounds the memory of a ledger. An account is about 180 bytes
	// and its names: 271 MB for a million with names of 60 bytes. Chosen.
	maxAccounts = 1 << 20
	// sweep is how many other accounts the making of one looks at, to evict
	// what is idle and full: with four, the idle settle at a third of the others.
	// In a ledger that is full it looks harder.
	sweep, sweepFull = 4, 64
	// shards are the parts of the table that grow on their own.
	shards = 64
)

// table finds accounts by their keys. To find one takes no lock, so that callers
// who share no account do not wait for each other; to make one takes that of a
// shard.
type table struct {
	seed   maphash.Seed
	max    int64
	size   atomic.Int64
	shards [shards]shard
}

// shard is an open-addressed hash table. Its slots are written with mu held, and
// read without.
type shard struct {
	slots atomic.Pointer[[]atomic.Pointer[account]]
	mu    sync.Mutex
	used  int      // slots with an account, or where one was
	hand  int      // where the next sweep begins
	_     [32]byte // to a cache line
}

// dropped is in the place of an account that was evicted: those behind it must
// still be found.
var dropped = new(account)

// gone in account.pins says that the account was evicted.
const gone = -1 << 62

func newTable() *table { return &table{seed: maphash.MakeSeed(), max: maxAccounts} }

// find is the account of a key, pinned; nil if there is none.
func (t *table) find(k key) *account {
	h := maphash.Comparable(t.seed, k)
	return t.shards[h%shards].find(k, h)
}

func (s *shard) find(k key, h uint64) *account {
	slots := s.slots.Load()
	if slots == nil {
		return nil
	}
	for n := home(h, *slots); ; n = (n + 1) % len(*slots) {
		switch a := (*slots)[n].Load(); {
		case a == nil:
			return nil
		case a != dropped && a.key == k && a.pin():
			return a
		}
	}
}

// home is where the search for a hash begins; the low bits chose the shard.
func home(h uint64, slots []atomic.Pointer[account]) int {
	return int(h / shards % uint64(len(slots)))
}

// pin keeps an account from being evicted; false if it was.
func (a *account) pin() bool {
	if a.pins.Add(1) > 0 {
		return true
	}
	a.pins.Add(-1)
	return false
}

// open is the account of a key, pinned, made by fill if there is none; nil if
// there are too many.
func (t *table) open(k key, now instant, fill func(*account)) *account {
	h := maphash.Comparable(t.seed, k)
	s := &t.shards[h%shards]
	if a := s.find(k, h); a != nil {
		return a
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if a := s.find(k, h); a != nil {
		return a
	}
	s.evict(t, now)
	if t.size.Add(1) > t.max {
		t.size.Add(-1)
		return nil
	}
	a := &account{key: k.clone()}
	a.pins.Store(1)
	fill(a)
	s.insert(t, a)
	return a
}

// insert puts an account into the table, which it makes anew if more than three
// quarters of its slots were used.
func (s *shard) insert(t *table, a *account) {
	slots := s.slots.Load()
	if slots == nil || 4*s.used >= 3*len(*slots) {
		var live []*account
		if slots != nil {
			for n := range *slots {
				if old := (*slots)[n].Load(); old != nil && old != dropped {
					live = append(live, old)
				}
			}
		}
		fresh := make([]atomic.Pointer[account], max(8, 2*(len(live)+1)))
		for _, old := range live {
			put(fresh, t, old)
		}
		s.used, s.hand = len(live), 0
		slots = &fresh
		defer s.slots.Store(slots)
	}
	put(*slots, t, a)
	s.used++
}

func put(slots []atomic.Pointer[account], t *table, a *account) {
	n := home(maphash.Comparable(t.seed, a.key), slots)
	for slots[n].Load() != nil {
		n = (n + 1) % len(slots)
	}
	slots[n].Store(a)
}

// evict looks at some accounts of a shard, other ones each time, and drops
// those that are as good as new: nobody holds them, and they are full or will
// be at the next use.
func (s *shard) evict(t *table, now instant) {
	slots := s.slots.Load()
	if slots == nil {
		return
	}
	most := sweep
	if t.size.Load() >= t.max {
		most = sweepFull
	}
	for looked := 0; looked < len(*slots) && most > 0; looked++ {
		s.hand = (s.hand + 1) % len(*slots)
		a := (*slots)[s.hand].Load()
		if a == nil || a == dropped {
			continue
		}
		most--
		if a.evict(now) {
			(*slots)[s.hand].Store(dropped)
			t.size.Add(-1)
		}
	}
}

// evict marks an account as gone if nobody holds it and it is as good as new.
func (a *account) evict(now instant) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.fresh(now) && a.pins.CompareAndSwap(0, gone)
}

// all calls visit with every account.
func (t *table) all(visit func(*account)) {
	for n := range t.shards {
		slots := t.shards[n].slots.Load()
		if slots == nil {
			continue
		}
		for k := range *slots {
			if a := (*slots)[k].Load(); a != nil && a != dropped && a.pin() {
				visit(a)
				a.pins.Add(-1)
			}
		}
	}
}
