package gateway

import "sync"

// live are the calls in flight, to be ended when a drain has lasted too long.
type live struct {
	mu    sync.Mutex
	calls map[*ender]struct{}
	over  error // set by abort: what comes later is ended at once
}

// ender ends one call with an error.
type ender struct{ abort func(error) }

// add takes note of a call. Its abort may be called at any time until remove,
// and at once.
func (l *live) add(abort func(error)) (remove func()) {
	e := &ender{abort}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.over != nil {
		abort(l.over)
		return func() {}
	}
	if l.calls == nil {
		l.calls = make(map[*ender]struct{})
	}
	l.calls[e] = struct{}{}
	return func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		delete(l.calls, e)
	}
}

// abort ends all calls, and those that are still to come: after the first
// GOAWAY a peer may begin calls for a while.
func (l *live) abort(err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.over = err
	for e := range l.calls {
		e.abort(err)
	}
}
