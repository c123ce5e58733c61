package admit

import (
	"context"
	"time"

	"github.com/sluicegate/sluice/interceptors"
)

// Ready reports that the permits are held.
func (w *waiter) Ready() bool {
	w.pool.mu.Lock()
	defer w.pool.mu.Unlock()
	return w.state == held
}

// Wait blocks until the permits are granted, the wait is over (by the pool's
// timeout, since the deadline can no longer be met, or since another took the
// place), or the context ends. If it returns an error neither permits nor a
// place in the queue are left.
func (w *waiter) Wait(ctx context.Context) error {
	l := w.pool
	if w.Ready() {
		return nil
	}
	timer := time.NewTimer(time.Until(w.alarm()))
	defer timer.Stop()
	for ringing := true; ringing; {
		select {
		case <-w.settled:
			ringing = false
		case <-ctx.Done():
			ringing = false
		case <-timer.C:
			if ringing = l.age(w); ringing {
				timer.Reset(time.Until(w.alarm()))
			}
		}
	}
	now := time.Now()
	l.mu.Lock()
	was := w.state
	wait := l.predict(w.tenant, w.weight, w.level, l.holds(w.model, now), now)
	l.mu.Unlock()
	switch {
	case ctx.Err() != nil:
		// Granted at the same moment or not: nobody is there to use it.
		l.release(&w.permit, false, 0)
		return ctx.Err()
	case was == held:
		return nil
	}
	l.release(&w.permit, false, 0)
	reason := w.why
	switch {
	case was == over:
		return interceptors.Deny(name, interceptors.Draining, "the inference ended while it waited for a permit")
	case reason != "":
	case l.shared != nil && l.unreachable(now):
		reason = interceptors.PolicyUnavailable
	case w.late(now):
		reason = interceptors.DeadlineUnreachable
	default:
		reason = interceptors.QueueTimeout
	}
	l.count(w.tenant, reason)
	return l.refusal(reason, wait)
}

// alarm is when something is to be done about a waiter.
func (w *waiter) alarm() time.Time {
	w.pool.mu.Lock()
	defer w.pool.mu.Unlock()
	at := w.until
	if w.early && w.deadline.Before(at) { // else the context says so
		at = w.deadline
	}
	if w.level > 0 && w.rises.Before(at) {
		at = w.rises
	}
	return at
}

// age moves a waiter up whose time for that has come. It reports whether it may
// go on waiting.
func (l *pool) age(w *waiter) bool {
	now := time.Now()
	l.mu.Lock()
	defer l.mu.Unlock()
	if w.state != waiting || w.expired(now) {
		return w.state == held // by settled, then
	}
	if w.level > 0 && !now.Before(w.rises) {
		w.rises = now.Add(l.ageing)
		l.rise(w)
		l.pass(now)
	}
	return true
}

// count counts a refusal.
func (l *pool) count(t *tenant, reason interceptors.Reason) {
	l.mu.Lock()
	defer l.mu.Unlock()
	t.refused++
	l.refused[reason]++
}
