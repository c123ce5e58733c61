package admit

import (
	"math"
	"time"
)

// An estimate that nothing has confirmed for a minute, or for ten times what it
// says, is forgotten: what was slow before an idle time need not be after it.
// Chosen.
const (
	staleTime  = time.Minute
	staleTimes = 10
)

// estimate is a moving average of durations.
type estimate struct {
	ns  float64 // 0: unknown
	dev float64 // its mean deviation
	at  time.Time
}

// learn moves the average an eighth of the way to the newest value, as TCP does
// with round trips (RFC 6298): about the last dozen count.
func (e *estimate) learn(d time.Duration, now time.Time) {
	ns := max(1, float64(d)) // above 0: known
	if e.ns = e.known(now); e.ns == 0 {
		e.ns, e.dev = ns, 0
	}
	e.dev += (math.Abs(ns-e.ns) - e.dev) / 4
	e.ns += (ns - e.ns) / 8
	e.at = now
}

// known is the average in nanoseconds, or 0.
func (e *estimate) known(now time.Time) float64 {
	if now.Sub(e.at) > max(staleTime, durationOf(staleTimes*e.ns)) {
		return 0
	}
	return e.ns
}

// holds is how long an inference of a model holds its permits; if that is not
// known, or it is nil, how long any does. 0 if nothing is known.
func (l *pool) holds(s *share, now time.Time) float64 {
	if s != nil {
		if ns := s.hold.known(now); ns > 0 {
			return ns
		}
	}
	return l.hold.known(now)
}

// service is how long an inference of a model is to be given: as holds, and four mean
// deviations more (as RFC 6298 has it), so that one that just fits is not late by a
// little. No more than an eighth, though: where answers are of all lengths most end
// sooner.
func (l *pool) service(s *share, now time.Time) time.Duration {
	e := &s.hold
	if e.known(now) == 0 {
		e = &l.hold
	}
	ns := e.known(now)
	return durationOf(ns + min(4*e.dev, ns/8))
}

// durationOf is a duration of so many nanoseconds, or the longest there is.
func durationOf(ns float64) time.Duration {
	if ns >= math.MaxInt64 {
		return math.MaxInt64
	}
	return time.Duration(ns)
}

// sum of durations above 0, or the longest there is.
func sum(a, b time.Duration) time.Duration {
	if a > math.MaxInt64-b {
		return math.MaxInt64
	}
	return a + b
}
