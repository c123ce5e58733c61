package interceptors

import (
	"math/rand/v2"
	"sync"
	"sync/atomic"
)

// shards keep the lists of live calls apart, so that calls on many cores seldom
// wait for the same lock. Chosen.
const shards = 32

// Live are the calls in flight of one chain, or of several that follow one
// another as a configuration changes. The zero value is ready; safe for
// concurrent use; must not be copied.
type Live struct {
	lists [shards]struct {
		liveList
		_ [40]byte // to the end of a cache line
	}
	over atomic.Pointer[error] // set by Abort: what comes later is ended at once
}

// liveList is a list of calls, linked through them.
type liveList struct {
	mu    sync.Mutex
	first *Call
	size  int
}

// Chain makes a chain whose calls are among these.
func (l *Live) Chain(backends []*Backend, policies ...Policy) *Chain {
	return &Chain{policies: policies, backends: backends, live: l}
}

// Each calls f for every call that has begun and not ended, in no order. f may
// take its time: a call may end meanwhile, and calls that begin meanwhile may be
// left out.
func (l *Live) Each(f func(*Call)) {
	var calls []*Call
	for n := range l.lists {
		list := &l.lists[n]
		list.mu.Lock()
		for c := list.first; c != nil; c = c.next {
			calls = append(calls, c)
		}
		list.mu.Unlock()
		for _, c := range calls {
			f(c)
		}
		clear(calls) // or what has ended would be kept
		calls = calls[:0]
	}
}

// Len is the number of calls in flight.
func (l *Live) Len() (n int) {
	for k := range l.lists {
		list := &l.lists[k]
		list.mu.Lock()
		n += list.size
		list.mu.Unlock()
	}
	return n
}

// Abort ends all calls with an error, and those that are still to come: a peer
// that was told to go elsewhere may begin calls for a while.
func (l *Live) Abort(err error) {
	l.over.Store(&err)
	l.Each(func(c *Call) { c.Abort(err) })
}

func (l *Live) add(c *Call) {
	list := &l.lists[rand.Uint32()%shards].liveList //nolint:gosec // a secret it is not
	list.mu.Lock()
	c.list, c.next = list, list.first
	if c.next != nil {
		c.next.prev = c
	}
	list.first = c
	list.size++
	list.mu.Unlock()
	if err := l.over.Load(); err != nil { // after the call is in its list: Abort saw it, or we see Abort
		c.Abort(*err)
	}
}

// remove takes a call off the list that it is in, if any.
func (c *Call) remove() {
	list := c.list
	if list == nil {
		return
	}
	list.mu.Lock()
	defer list.mu.Unlock()
	if c.next != nil {
		c.next.prev = c.prev
	}
	if c.prev != nil {
		c.prev.next = c.next
	} else {
		list.first = c.next
	}
	c.prev, c.next = nil, nil
	list.size--
}
