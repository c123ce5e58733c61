package admit

import (
	"context"
	"sync"
	"time"

	"github.com/sluicegate/sluice/interceptors"
)

// pool is a weighted semaphore with a queue.
type pool struct {
	name     string
	capacity int64
	length   int // of the queue, at most
	timeout  time.Duration
	queued   interceptors.Event // what is told of an inference that queues

	mu         sync.Mutex
	inUse      int64
	head, tail *permit // the queue, by arrival
	waiting    int     // permits in the queue
	ahead      int64   // their weights together
	hold       float64 // nanoseconds, moving average; 0 until known
}

// permit is one inference's part of its pool.
type permit struct {
	pool   *pool
	weight int64

	// All below is guarded by pool.mu; what concerns the queue is only set in it.
	state      state
	since      time.Time // when the permits were granted
	timeout    time.Time // when the wait ends
	deadline   time.Time // when the caller stops waiting; zero if it never does
	next, prev *permit
	settled    chan struct{} // closed when the wait is over, however it ended
}

// state is where a permit is in its life. It goes forward only.
type state uint8

const (
	idle    state = iota
	waiting       // in the queue
	held          // its weight is part of pool.inUse
	lapsed        // its turn came when nobody could use it any more
	over          // given back
)

// tryAcquire takes the permits if they are free and nobody waits for them.
func (l *pool) tryAcquire(p *permit) bool {
	now := time.Now()
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.take(p, now)
}

func (l *pool) take(p *permit, now time.Time) bool {
	if l.head != nil || l.inUse+p.weight > l.capacity {
		return false
	}
	l.inUse += p.weight
	p.state, p.since = held, now
	return true
}

// enqueue takes a place in the queue, or says for what reason there is none;
// beside it is the predicted wait, 0 if nothing is known to predict it from. If
// permits were freed since tryAcquire it takes those, and neither queues nor
// refuses.
func (l *pool) enqueue(p *permit, deadline time.Time) (queued bool, refused interceptors.Reason, wait time.Duration) {
	now := time.Now()
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.take(p, now) {
		return false, "", 0
	}
	wait = l.predict(p.weight)
	switch {
	case l.length == 0:
		return false, interceptors.ConcurrencyLimit, wait
	case l.waiting >= l.length:
		return false, interceptors.QueueFull, wait
	case !deadline.IsZero() && deadline.Sub(now) < wait:
		return false, interceptors.DeadlineUnreachable, wait
	}
	p.state = waiting
	p.timeout, p.deadline = now.Add(l.timeout), deadline
	p.settled = make(chan struct{})
	if p.prev = l.tail; p.prev == nil {
		l.head = p
	} else {
		p.prev.next = p
	}
	l.tail = p
	l.waiting++
	l.ahead += p.weight
	return true, "", wait
}

// predict is how long a newcomer of this weight would wait at the end of the
// queue: the permits that must be given back before its turn, over the rate at
// which a full pool gives them back, capacity / hold (Little's law).
func (l *pool) predict(weight int64) time.Duration {
	missing := l.ahead + weight - (l.capacity - l.inUse)
	return durationOf(l.hold * float64(missing) / float64(l.capacity))
}

// remove takes a permit out of the queue, into another state, and wakes who waits.
func (l *pool) remove(p *permit, s state) {
	if p.prev == nil {
		l.head = p.next
	} else {
		p.prev.next = p.next
	}
	if p.next == nil {
		l.tail = p.prev
	} else {
		p.next.prev = p.prev
	}
	p.prev, p.next = nil, nil
	l.waiting--
	l.ahead -= p.weight
	p.state = s
	close(p.settled)
}

// pass hands free permits to the head of the queue for as long as they do. Who
// could not use them any more, because its time is over, is passed by: it may
// not have noticed yet.
func (l *pool) pass(now time.Time) {
	for p := l.head; p != nil; p = l.head {
		switch {
		case p.expired(now):
			l.remove(p, lapsed)
		case l.inUse+p.weight <= l.capacity:
			l.remove(p, held)
			l.inUse += p.weight
			p.since = now
		default:
			return
		}
	}
}

func (p *permit) expired(now time.Time) bool {
	return !now.Before(p.timeout) || !p.deadline.IsZero() && !now.Before(p.deadline)
}

// release ends a permit in whatever state it is. It may be called twice: only
// the first call counts.
func (l *pool) release(p *permit, learn bool) {
	now := time.Now()
	l.mu.Lock()
	defer l.mu.Unlock()
	switch p.state {
	case held:
		l.inUse -= p.weight
		if learn {
			l.learn(now.Sub(p.since))
		}
	case waiting:
		l.remove(p, over)
	}
	p.state = over
	if l.head != nil {
		l.pass(now)
	}
}

// learn moves the average an eighth of the way to the newest value, as TCP does
// with round trips (RFC 6298): about the last dozen inferences count.
func (l *pool) learn(d time.Duration) {
	ns := max(1, float64(d)) // above 0: known
	if l.hold == 0 {
		l.hold = ns
		return
	}
	l.hold += (ns - l.hold) / 8
}

// Ready reports that the permits are held.
func (p *permit) Ready() bool {
	p.pool.mu.Lock()
	defer p.pool.mu.Unlock()
	return p.state == held
}

// Wait blocks until the permits are granted, the pool's queue timeout has
// passed since the inference queued, or the context ends. If it returns an
// error neither permits nor a place in the queue are left.
func (p *permit) Wait(ctx context.Context) error {
	l := p.pool
	if p.Ready() {
		return nil
	}
	timer := time.NewTimer(time.Until(p.timeout))
	defer timer.Stop()
	select {
	case <-p.settled:
	case <-timer.C:
	case <-ctx.Done():
	}
	now := time.Now()
	l.mu.Lock()
	was, passed := p.state, !p.deadline.IsZero() && !now.Before(p.deadline)
	wait := l.predict(p.weight)
	l.mu.Unlock()
	switch {
	case ctx.Err() != nil:
		// Granted at the same moment or not: nobody is there to use it.
		l.release(p, false)
		return ctx.Err()
	case was == held:
		return nil
	}
	l.release(p, false)
	switch {
	case was == over:
		return interceptors.Deny(name, interceptors.Draining, "the inference ended while it waited for a permit")
	case passed:
		return l.refusal(interceptors.DeadlineUnreachable, wait)
	}
	return l.refusal(interceptors.QueueTimeout, wait)
}

func (l *pool) snapshot() PoolState {
	l.mu.Lock()
	defer l.mu.Unlock()
	return PoolState{Name: l.name, Capacity: l.capacity, InUse: l.inUse, Waiting: l.waiting, Hold: durationOf(l.hold)}
}
