package admit

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	_ "embed" // the script
	"encoding/hex"
	"errors"
	"fmt"
	"strconv"
	"sync"
	"time"

	"github.com/redis/rueidis"

	"github.com/sluicegate/sluice/interceptors/internal/redis"
	configv1 "github.com/sluicegate/sluice/proto/gen/sluice/config/v1"
)

const (
	// defaultLease is how long permits stay a gateway's own. Chosen: a GPU whose
	// gateway was killed stands idle for no longer than people wait for an answer.
	defaultLease = 5 * time.Second
	// beat is how often a gateway that holds permits speaks with the store, hurry
	// how often at most one does that wants more. Chosen: what another needs is free
	// in a tenth of a second; twenty gateways cost the store 200 calls a second.
	beat, hurry = 100 * time.Millisecond, 10 * time.Millisecond
	// lostAfter questions without an answer the store counts as lost. Chosen.
	lostAfter = 3
	// maxShared is the largest capacity that the script can count: its numbers are
	// exact to 2⁵³.
	maxShared = 1 << 31
)

//go:embed shared.lua
var sharedScript string

// sharing is how a pool is shared with other gateways through a store. Permits are
// leased: a gateway holds some for a time, renews them, and alone decides what they
// are used for; no inference waits for the network as long as they are enough. A
// lease is good for half its length after it was last asked for, by our own clock:
// what began before has the other half to end in before the store gives the permits
// to others. One that has ended in the store is not renewed but begun anew, with an
// epoch of its own, and what was held is lost.
//
// Who is to hold how much is shared.lua's to say: it divides a pool among gateways as
// they want it, max-min fair, and what nobody wants in equal parts.
type sharing struct {
	pool    *pool
	client  *redis.Client
	script  *rueidis.Lua
	key     string
	gateway string // who we are to the store
	lease   time.Duration
	lost    configv1.StoreLost
	kick    chan struct{}

	turn sync.Mutex // one question at a time

	// Guarded by pool.mu.
	granted  int64     // permits that are ours
	target   int64     // that we should hold; fewer: give back
	until    time.Time // when they are not ours any more; zero if they never were
	epoch    int64
	number   int64     // of questions
	failed   int64     // questions, on end
	gateways int64     // as the store last knew; 0 if it never answered
	running  int64     // permits in use in all gateways
	refused  int64     // permits that were wanted, and refused, since the last question
	busy     time.Time // something was wanted
	asleep   bool      // nothing was for a lease: all went back
	left     bool      // closed: nothing is asked any more
}

// Share connects the pools that gateways share through a store, in the background
// from now on; it blocks once for each, for the store's timeout at most. A store that
// cannot be reached is no error. Every Share needs a Close. A policy whose pools
// are not shared needs no store.
func (p *Policy) Share(c *configv1.Redis) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.holders++; p.holders > 1 || !p.Shared() {
		return nil
	}
	client, err := redis.New(c)
	if err != nil {
		p.holders--
		return fmt.Errorf("redis.%w", err)
	}
	var id [8]byte
	_, _ = rand.Read(id[:]) // never fails
	ctx, cancel := context.WithCancel(context.Background())
	p.client, p.stop = client, cancel
	script := rueidis.NewLuaScript(sharedScript)
	for _, l := range p.pools {
		if s := l.shared; s != nil {
			s.client, s.script, s.gateway = client, script, hex.EncodeToString(id[:])
			p.background.Go(func() { s.keep(ctx) })
		}
	}
	for _, l := range p.pools {
		if s := l.shared; s != nil {
			_ = s.ask(ctx, "", 0) // so that what begins at once need not wait
		}
	}
	return nil
}

// Shared reports whether gateways share a pool through a store.
func (p *Policy) Shared() bool {
	for _, l := range p.pools {
		if l.shared != nil {
			return true
		}
	}
	return false
}

// Close gives back what is leased, with the last Close. Inferences must have ended.
func (p *Policy) Close() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.holders--; p.holders > 0 || p.stop == nil {
		return
	}
	p.stop()
	p.background.Wait()
	for _, l := range p.pools {
		if s := l.shared; s != nil {
			for range lostAfter { // the first after a broken connection fails
				if s.ask(context.Background(), "leave", 0) == nil {
					break
				}
			}
		}
	}
	p.client.Close()
	p.stop = nil
}

// share makes the pool shared.
func (l *pool) share(c *configv1.PoolShare) error {
	if c.GetReplicas() > 0 {
		part := l.ceiling.Load() / int64(c.GetReplicas())
		if part == 0 {
			return fmt.Errorf("replicas: %d permits are not enough for %d gateways; share it through redis, without replicas",
				l.ceiling.Load(), c.GetReplicas())
		}
		l.replicas = int64(c.GetReplicas())
		l.configured = part
		l.ceiling.Store(part)
		l.limit = part
		return nil
	}
	if l.ceiling.Load() > maxShared {
		return fmt.Errorf("a store can count to %d permits", int64(maxShared))
	}
	sum := sha256.Sum256([]byte(l.name))
	l.shared = &sharing{
		pool: l, lease: defaultLease, lost: c.GetStoreLost(), kick: make(chan struct{}, 1),
		key: "sluice:pool:{" + hex.EncodeToString(sum[:16]) + "}",
	}
	if c.GetLease() != nil {
		l.shared.lease = c.GetLease().AsDuration()
	}
	return nil
}

// keep renews the lease, and asks for more or gives back.
func (s *sharing) keep(ctx context.Context) {
	timer := time.NewTimer(beat)
	defer timer.Stop()
	last := time.Now()
	for {
		select {
		case <-ctx.Done():
			return
		case <-s.kick:
			if early := hurry - time.Since(last); early > 0 {
				timer.Reset(early)
				continue
			}
		case <-timer.C:
		}
		last = time.Now()
		_ = s.ask(ctx, "", 0)
		timer.Reset(s.pause())
	}
}

// pause is when the store is to be asked again.
func (s *sharing) pause() time.Duration {
	l := s.pool
	l.mu.Lock()
	defer l.mu.Unlock()
	switch {
	case s.failed > 0:
		return beat
	case s.granted > max(l.inUse, s.target):
		return hurry // there is something to give back
	case s.asleep:
		return s.lease / 3 // we are only counted
	}
	return beat
}

// hasten asks the store soon. It does not block.
func (s *sharing) hasten() {
	select {
	case s.kick <- struct{}{}:
	default:
	}
}

// miss notes that permits were wanted and there were none: refused ones are told to
// the store, which cannot know them from the queue.
func (s *sharing) miss(refused int64) {
	s.refused += refused
	if s.granted < s.pool.ceiling.Load() {
		s.hasten()
	}
}

// over reports that the permits are not ours any more, by the clock that goes
// faster: one stands still while the machine sleeps, the other can be set.
func (s *sharing) over(now time.Time) bool {
	return !now.Before(s.until) || now.UnixNano() >= s.until.UnixNano()
}

// gone reports that nothing can begin because of the store.
func (s *sharing) gone(now time.Time) bool {
	return s.over(now) && s.lost != configv1.StoreLost_STORE_LOST_OPEN
}

// may is how many permits the pool can give out at a moment.
func (s *sharing) may(now time.Time) int64 {
	switch {
	case !s.over(now):
		return min(s.granted, s.target)
	case s.lost == configv1.StoreLost_STORE_LOST_OPEN:
		return s.part()
	}
	return 0
}

// part is an equal part.
func (s *sharing) part() int64 { return max(1, s.pool.ceiling.Load()/max(1, s.gateways)) }

var errStore = errors.New("the store of the pools gave no answer")

// ask tells the store how things are, has it do something, and takes its answer.
func (s *sharing) ask(ctx context.Context, what string, value int64) error {
	s.turn.Lock()
	defer s.turn.Unlock()
	sent := time.Now()
	args := s.question(sent, what, value)
	if args == nil {
		return errStore
	}
	ctx, cancel := context.WithTimeout(ctx, s.client.Timeout)
	defer cancel()
	client, err := s.client.Connect()
	var reply []string
	if err == nil {
		reply, err = s.script.Exec(ctx, client, []string{s.key}, args).AsStrSlice()
	}
	switch {
	case err != nil:
	case len(reply) == 2 && reply[0] == "left":
		return nil
	case len(reply) != 10 || reply[0] != "ok" || reply[1] != s.key || reply[2] != args[1]:
		err = errors.New("the store answers another question")
		s.client.Reset()
	}
	l := s.pool
	now := time.Now()
	l.mu.Lock()
	defer l.mu.Unlock()
	if err != nil {
		if s.failed++; s.failed >= lostAfter && s.lost == configv1.StoreLost_STORE_LOST_CLOSED {
			s.until = time.Time{}
		}
		l.pass(now)
		return fmt.Errorf("%w: %w", errStore, err)
	}
	var n [10]int64
	for k := 3; k < len(n); k++ {
		n[k], _ = strconv.ParseInt(reply[k], 10, 64) // the script writes nothing else
	}
	s.failed = 0
	s.granted, s.target, s.gateways, s.running, s.epoch = n[3], n[4], n[5], n[6], n[9]
	s.until = sent.Add(s.lease / 2)
	l.draining = n[8] == 1
	if l.ceiling.Load() != n[7] {
		l.resize(n[7])
	}
	l.pass(now)
	return nil
}

// question is what the script wants to know; nil if nothing is to be asked any more.
// What it says we hold is all that we hold from then on, whether it arrives or not.
func (s *sharing) question(now time.Time, what string, value int64) []string {
	l := s.pool
	l.mu.Lock()
	defer l.mu.Unlock()
	if s.left && what != "leave" {
		return nil
	}
	s.left = what == "leave"
	s.number++
	wanted, need := l.inUse+s.refused, int64(0)
	if l.ready > 0 {
		wanted += l.wanted
		if w := l.first(); l.inUse == 0 {
			need = w.weight
		}
	} else if l.inUse == 0 {
		need = s.refused
	}
	s.refused = 0
	// A capacity that adapts wants no more than it lets run.
	wanted = max(l.inUse, min(wanted, l.limit))
	need = min(need, l.ceiling.Load())
	if wanted > 0 || s.busy.IsZero() {
		s.busy = now
	}
	s.asleep = l.length > 0 && now.Sub(s.busy) >= s.lease // without a queue, what comes cannot wait for permits
	good := !s.over(now)
	switch {
	case !good:
		s.granted = 0
	case s.asleep:
		s.target = 0
		fallthrough
	default:
		s.granted = max(l.inUse, min(s.granted, s.target))
	}
	l.settle(now)
	args := []string{s.gateway}
	for _, n := range []int64{s.number, s.epoch, bit(good), s.lease.Milliseconds(), l.configured, s.granted, l.inUse, wanted, need, bit(!s.asleep)} {
		args = append(args, strconv.FormatInt(n, 10))
	}
	return append(args, what, strconv.FormatInt(value, 10))
}

func bit(b bool) int64 {
	if b {
		return 1
	}
	return 0
}

// settle has the capacity be what it is at a moment.
func (l *pool) settle(now time.Time) {
	l.capacity = l.limit
	if l.shared != nil {
		l.leased = l.shared.may(now)
		l.capacity = min(l.limit, l.leased)
	}
}

// unreachable reports that nothing begins since the store does not answer.
func (l *pool) unreachable(now time.Time) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.shared.gone(now)
}
