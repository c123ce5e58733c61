package admit

import (
	"time"

	"github.com/sluicegate/sluice/interceptors"
)

// The queue is a tree: a level for each priority, in it a line for each tenant,
// in that a lane for each principal, and in the lane who waits, by arrival. A
// lane is among its line's, and a line among its level's, only while the first
// in it may go as far as the caps of its principal and tenant are concerned: who
// is at a cap stands in nobody's way.

// level is the queue of one priority.
type level struct {
	ready   heap[*line] // by counter, then by arrival
	longest heap[*line] // by length for the tenant's weight
	work    float64     // nanoseconds of permits that wait
	weights int64       // of the tenants with a line
	size    int         // who waits

	priority int32
	wait     estimate // of those that queued here
}

// line is a tenant's part of a level.
type line struct {
	level  *level
	tenant *tenant
	lanes  heap[*lane] // by arrival of their first
	all    list
	work   float64
	key    int64 // the tenant's counter, when it was last looked at
	ready  int   // place among level.ready
	long   int   // place among level.longest
}

// lane is a principal's part of a line.
type lane struct {
	line      *line
	principal *principal
	waiters   list
	place     int // among line.lanes
}

// waiter is a permit with a place in the queue. What concerns the queue is
// guarded by pool.mu.
type waiter struct {
	permit
	seq      uint64 // order of arrival in its level
	level    int
	lane     *lane
	links    [2]link
	entered  time.Time           // zero if it did not have to wait
	rises    time.Time           // when it goes up a level; of no meaning in the first
	until    time.Time           // when the wait is over
	deadline time.Time           // when its work must begin to end in time; zero if it has no end
	early    bool                // the deadline is before the caller's
	why      interceptors.Reason // of the refusal, if it was driven out
	work     float64
	entry    int64 // weighted tokens that it costs before anything was answered
	bytes    int64
	settled  chan struct{} // closed when the wait is over, however it ended
}

// list is a list of waiters, linked through one of their links.
type list struct {
	first, last *waiter
	size        int64
	by          int
}

type link struct{ prev, next *waiter }

const (
	byLane = iota
	byLine
)

func (s *list) add(w *waiter) {
	w.links[s.by] = link{prev: s.last}
	if s.last == nil {
		s.first = w
	} else {
		s.last.links[s.by].next = w
	}
	s.last = w
	s.size++
}

func (s *list) remove(w *waiter) {
	at := w.links[s.by]
	if at.prev == nil {
		s.first = at.next
	} else {
		at.prev.links[s.by].next = at.next
	}
	if at.next == nil {
		s.last = at.prev
	} else {
		at.next.links[s.by].prev = at.prev
	}
	w.links[s.by] = link{}
	s.size--
}

func newLevel(priority int32) *level {
	return &level{
		priority: priority,
		ready: heap[*line]{
			less: func(a, b *line) bool {
				return a.key < b.key || a.key == b.key && a.lanes.top().waiters.first.seq < b.lanes.top().waiters.first.seq
			},
			place: func(s *line) *int { return &s.ready },
		},
		longest: heap[*line]{
			less:  func(a, b *line) bool { return a.all.size*b.tenant.weight > b.all.size*a.tenant.weight },
			place: func(s *line) *int { return &s.long },
		},
	}
}

// init makes a line ready for use.
func (s *line) init(v *level, t *tenant) {
	s.level, s.tenant = v, t
	s.all.by = byLine
	s.lanes.less = func(a, b *lane) bool { return a.waiters.first.seq < b.waiters.first.seq }
	s.lanes.place = func(c *lane) *int { return &c.place }
}

// top is the line whose turn it is, or nil. Counters only grow, also while
// their lines wait: so the first whose place is right is the least.
func (v *level) top() *line {
	for {
		s := v.ready.top()
		if s == nil {
			return nil
		}
		now := s.tenant.counter.Load()
		if now == s.key {
			return s
		}
		s.key = now
		v.ready.put(s)
	}
}

// join puts a waiter at the end of its lane.
func (l *pool) join(w *waiter) {
	l.seq++
	w.seq = l.seq
	c := &w.principal.lanes[w.level]
	w.lane = c
	s := c.line
	if s.all.size == 0 {
		s.level.weights += s.tenant.weight
	}
	c.waiters.add(w)
	s.all.add(w)
	l.wanted += w.weight
	s.work += w.work
	s.level.work += w.work
	s.level.longest.put(s)
	s.tenant.waiting++
	w.principal.waiting++
	l.waiting++
	s.level.size++
	l.bytes += w.bytes
	l.update(c)
}

// part takes a waiter out of its lane.
func (l *pool) part(w *waiter) {
	c := w.lane
	s := c.line
	// While the waiter is in both, in case the heaps look at it.
	s.lanes.remove(c)
	c.waiters.remove(w)
	s.all.remove(w)
	l.wanted -= w.weight
	s.work -= w.work
	s.level.work -= w.work
	if s.all.size == 0 {
		s.level.weights -= s.tenant.weight
		s.level.longest.remove(s)
		s.level.work -= s.work // what rounding left
		s.work = 0
	} else {
		s.level.longest.put(s)
	}
	s.tenant.waiting--
	w.principal.waiting--
	l.waiting--
	s.level.size--
	l.bytes -= w.bytes
	l.update(c)
}

// leave takes a waiter out of the queue, into another state, and wakes who waits.
func (l *pool) leave(w *waiter, s state) {
	l.part(w)
	w.state = s
	close(w.settled)
	if s != held {
		w.tenant.forget(w.principal)
	}
}

// rise moves a waiter up a level. Its tenant keeps its counter: it was not away.
func (l *pool) rise(w *waiter) {
	w.tenant.ready++
	l.part(w)
	w.level--
	l.join(w)
	w.tenant.ready--
}

// update has a lane, and its line, stand among those whose turn may be next, or not.
func (l *pool) update(c *lane) {
	if w := c.waiters.first; w != nil && c.principal.may(w.weight, l.principalPermits) {
		c.line.lanes.put(c)
	} else {
		c.line.lanes.remove(c)
	}
	l.updateLine(c.line)
}

func (l *pool) updateLine(s *line) {
	t := s.tenant
	c := s.lanes.top()
	if c == nil || !t.may(c.waiters.first.weight) {
		if s.ready > 0 {
			s.level.ready.remove(s)
			t.ready--
			l.ready--
		}
		return
	}
	if s.ready == 0 {
		if t.ready == 0 {
			t.lift(l.floor())
		}
		t.ready++
		l.ready++
	}
	s.key = t.counter.Load()
	s.level.ready.put(s)
}

// first is who goes next, of those that their caps let go, or nil.
func (l *pool) first() *waiter {
	for _, v := range l.levels {
		if s := v.top(); s != nil {
			return s.lanes.top().waiters.first
		}
	}
	return nil
}

// reserved is who goes next by its tenant's reserve, or nil.
func (l *pool) reserved() *waiter {
	for _, t := range l.reserves {
		for n := range t.lines {
			s := &t.lines[n]
			if s.ready == 0 {
				continue
			}
			if w := s.lanes.top().waiters.first; t.used+w.weight <= t.reserve {
				return w
			}
			break
		}
	}
	return nil
}

// displaced is who must give its place in a full queue to a newcomer: the newest
// of the lowest priority, if that is below the newcomer's, and else of the tenant
// whose line is longest for its weight, if it is longer than the newcomer's would
// be; or nil. (To drop from the longest queue is McKenney's stochastic fairness
// queueing, INFOCOM '90.)
func (l *pool) displaced(t *tenant, at int) *waiter {
	for n := len(l.levels) - 1; n >= at; n-- {
		s := l.levels[n].longest.top()
		switch {
		case s == nil:
			continue
		case n > at, s.all.size*t.weight > (t.lines[n].all.size+1)*s.tenant.weight:
			return s.all.last
		}
		return nil
	}
	return nil
}

// floor is the least counter of the tenants whose turn may be next; if there is
// none, of the one that went last.
func (l *pool) floor() (least int64) {
	if l.ready == 0 {
		if l.last == nil {
			return 0
		}
		return l.last.counter.Load()
	}
	found := false
	for _, v := range l.levels {
		if s := v.top(); s != nil && (!found || s.key < least) {
			least, found = s.key, true
		}
	}
	return least
}
