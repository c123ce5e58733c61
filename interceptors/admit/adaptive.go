package admit

import (
	"fmt"
	"time"

	configv1 "github.com/sluicegate/sluice/proto/gen/sluice/config/v1"
)

// An adaptive capacity is lowered to nine tenths when the first response takes
// too long, and raised by one permit when it does not and all permits are in use
// (AIMD; that this settles is Chiu and Jain, 1989, and that a tenth is a good
// step for model servers Clipper, NSDI '17, which sizes batches so). First
// responses, since the whole of an inference takes as long as its answer is: that
// says nothing about load. A target, since a baseline that is measured has to be
// found again by letting the pool run dry, and drifts up with what it watches.
const (
	backoff = 0.9
	// Samples that a decision is made of: as many as the capacity, within these. A
	// median of fewer than eight is noise; more than 32 only take time. Chosen.
	leastSamples, mostSamples = 8, 32
	// After this time with nothing running, the capacity is the configured one
	// again: what was slow before need not be slow any more. Chosen.
	idleTime = 10 * time.Second
)

// adaptive is what the capacity follows. Beside the settings it is guarded by
// pool.mu.
type adaptive struct {
	target time.Duration
	least  int64

	began      time.Time // of what is measured; what was granted before does not count
	fast, slow int64     // samples
	full       bool      // all permits were in use
	idle       time.Time // when nothing ran any more; zero while something does
}

// adapt makes the capacity adaptive.
func (l *pool) adapt(c *configv1.PoolAdaptive) error {
	target, err := positive("first_response", c.GetFirstResponse(), 0)
	switch least := max(1, int64(c.GetMinCapacity())); {
	case err != nil:
		return err
	case target == 0:
		return fmt.Errorf("first_response: say how long the first response may take")
	case least > l.ceiling:
		return fmt.Errorf("min_capacity: it is %d, above the capacity of %d", least, l.ceiling)
	default:
		l.adaptive = &adaptive{target: target, least: least}
		return nil
	}
}

// resume notes that something begins to run, at the latest now.
func (l *pool) resume(now time.Time) {
	a := l.adaptive
	if !a.idle.IsZero() && now.Sub(a.idle) >= idleTime {
		l.capacity = l.ceiling
		a.restart(now)
	}
	a.idle = time.Time{}
}

func (a *adaptive) restart(now time.Time) { a.began, a.fast, a.slow, a.full = now, 0, 0, false }

// sample learns from a first response. What was cancelled, cut or refused before
// it has none.
func (l *pool) sample(p *permit, now time.Time) {
	handed := p.inference.HandedAt
	if !p.inference.Handed {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	a := l.adaptive
	if p.since.Before(a.began) {
		return
	}
	a.full = a.full || l.ready > 0 || l.inUse >= l.capacity
	if now.Sub(handed) > a.target {
		a.slow++
	} else {
		a.fast++
	}
	enough := max(leastSamples, min(mostSamples, l.capacity))
	switch {
	case 2*a.slow > enough: // the median is above it, whatever comes
		l.capacity = max(a.least, min(l.capacity-1, int64(float64(l.capacity)*backoff)))
	case a.fast+a.slow < enough:
		return
	case a.full:
		l.capacity = min(l.ceiling, l.capacity+1)
	}
	a.restart(now)
	l.pass(now)
}
