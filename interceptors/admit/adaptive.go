package admit

import (
	"errors"
	"fmt"
	"math"
	"time"

	configv1 "github.com/sluicegate/sluice/proto/gen/sluice/config/v1"
)

// An adaptive limit follows the times that answers take, in one of two ways.
//
// With targets it is lowered to nine tenths when the median is above one, and raised
// by one permit when none is and all permits are in use (AIMD; that this settles is
// Chiu and Jain, 1989, and that a tenth is a good step for model servers Clipper,
// NSDI '17, which sizes batches so). It ends where the operator said.
//
// Without targets it follows the gradient: how much slower answers are than usual
// (TCP Vegas, Brakmo and Peterson, SIGCOMM '94, which compares with the least round
// trip seen; and Netflix' concurrency-limits, 2018, which compares with a slow average
// and leaves room for a queue of the limit's square root). What is usual is measured,
// so nobody need know it; but it can only be found again by letting the pool run dry,
// and it drifts up with what it watches: a server that stays slow becomes the usual one.
//
// The times are that to the first response, which says how long the server lets work
// wait, and that of each token after it, which says how many it works on at once. The
// whole of an inference takes as long as its answer is: that says nothing about load.
const (
	backoff = 0.9
	// Samples that a decision is made of: as many as the limit, within these. A
	// median of fewer than eight is noise; more than 32 only take time. Chosen.
	leastSamples, mostSamples = 8, 32
	// After this time with nothing running, the limit is the capacity again, and what
	// was usual is forgotten: what was slow before need not be slow any more. Chosen.
	idleTime = 10 * time.Second
	// tokenSample is how many tokens of an inference a sample of the time per token is
	// made of: fewer are noise where a response carries several. Chosen.
	tokenSample = 16
	// tolerance is how much slower than usual is not slow yet: as concurrency-limits
	// has it. steepest is the least that a decision leaves of the limit.
	tolerance, steepest = 1.5, 0.5
	// What is usual follows faster answers by an eighth of the way for each decision,
	// as TCP does with round trips; slower ones too while permits are free, for then
	// nothing waits; but by a sixty-fourth while all are in use. Chosen: a minute of a
	// server that does a thousand inferences in it.
	quick, slow = 1. / 8, 1. / 64
)

// adaptive is what the limit follows. Beside the settings it is guarded by pool.mu.
type adaptive struct {
	least    int64
	gradient bool
	first    signal // time to the first response
	token    signal // time of a token after it
	waiting  crowd

	began time.Time // of what is measured; what was granted before does not count
	full  bool      // all permits were in use
	idle  time.Time // when nothing ran any more; zero while something does
}

// signal is one of the times.
type signal struct {
	target     time.Duration // 0: there is none
	fast, slow int64         // samples
	sum        float64       // of them, in nanoseconds
	usual      float64       // 0: not known yet
}

// adapt makes the limit adaptive.
func (l *pool) adapt(c *configv1.PoolAdaptive) error {
	first, err := positive("first_response", c.GetFirstResponse(), 0)
	if err != nil {
		return err
	}
	token, err := positive("output_token", c.GetOutputToken(), 0)
	if err != nil {
		return err
	}
	switch least := max(1, int64(c.GetMinCapacity())); {
	case first == 0 && token == 0 && !c.GetGradient() && c.GetMaxWaiting() == 0:
		return errors.New("first_response: say how long the first response may take, or output_token, or set gradient or max_waiting")
	case (first > 0 || token > 0) && c.GetGradient():
		return errors.New("gradient: it has no targets; leave first_response and output_token out")
	case least > l.ceiling.Load():
		return fmt.Errorf("min_capacity: it is %d, above the capacity of %d", least, l.ceiling.Load())
	default:
		l.adaptive = &adaptive{
			least: least, gradient: c.GetGradient(), first: signal{target: first}, token: signal{target: token},
			waiting: crowd{most: float64(c.GetMaxWaiting()), alone: first == 0 && token == 0 && !c.GetGradient()},
		}
		return nil
	}
}

// resume notes that something begins to run, at the latest now.
func (l *pool) resume(now time.Time) {
	a := l.adaptive
	if !a.idle.IsZero() && now.Sub(a.idle) >= idleTime {
		l.limit = l.ceiling.Load()
		l.settle(now)
		a.first.usual, a.token.usual = 0, 0
		a.restart(now)
	}
	a.idle = time.Time{}
}

func (a *adaptive) restart(now time.Time) {
	a.began, a.full = now, false
	a.first.clear()
	a.token.clear()
}

func (s *signal) clear() { s.fast, s.slow, s.sum = 0, 0, 0 }

func (s *signal) add(d time.Duration) {
	s.sum += float64(d)
	if s.target > 0 && d > s.target {
		s.slow++
	} else {
		s.fast++
	}
}

func (s *signal) count() int64 { return s.fast + s.slow }

// answered learns from a response. What was cancelled, cut or refused before it has
// none; what is cut later teaches what it took until then.
func (p *permit) answered() {
	a, i := p.pool.adaptive, p.inference
	if !i.Handed {
		return
	}
	written := max(i.OutputTokens, i.ReportedOutput)
	if p.heard && (written < p.written+tokenSample || !a.gradient && a.token.target == 0) {
		return
	}
	now := time.Now()
	if !p.heard {
		p.pool.sample(p, &a.first, now.Sub(i.HandedAt), now)
	} else {
		p.pool.sample(p, &a.token, now.Sub(p.at)/time.Duration(written-p.written), now)
	}
	p.at, p.written = now, written
}

// sample takes a time into account.
func (l *pool) sample(p *permit, s *signal, d time.Duration, now time.Time) {
	l.mu.Lock()
	defer l.mu.Unlock()
	a := l.adaptive
	if p.state != held || p.since.Before(a.began) && s == &a.first || p.at.Before(a.began) && s == &a.token {
		return
	}
	a.full = a.full || l.ready > 0 || l.inUse >= l.capacity
	if a.waiting.alone {
		return
	}
	s.add(d)
	enough := max(leastSamples, min(mostSamples, l.limit))
	if a.gradient {
		if s.count() < enough {
			return
		}
		next := a.slope(l.limit, l.ceiling.Load())
		if next < l.limit || !a.waiting.crowded(now) {
			l.limit = next
		}
	} else {
		switch {
		case 2*s.slow > enough: // the median is above it, whatever comes
			l.limit = max(a.least, min(l.limit-1, int64(float64(l.limit)*backoff)))
		case s.count() < enough || s.target == 0:
			return
		case a.full && !a.first.tooSlow() && !a.token.tooSlow() && !a.waiting.crowded(now):
			l.limit = min(l.ceiling.Load(), l.limit+1)
		}
	}
	l.settle(now)
	a.restart(now)
	l.pass(now)
}

// tooSlow reports that more than half of the samples are above the target.
func (s *signal) tooSlow() bool { return s.slow > s.fast }

// slope is the limit that follows from how much slower answers are than usual.
func (a *adaptive) slope(limit, ceiling int64) int64 {
	g := min(a.first.slope(a.full), a.token.slope(a.full))
	next := float64(limit) * g
	if a.full || g < 1 {
		next += math.Sqrt(float64(limit))
	}
	if g < 1 {
		next = min(next, float64(limit))
	}
	return max(a.least, min(ceiling, int64(math.Round(next))))
}

// slope is how much of the limit the samples leave: all of it while they are not much
// slower than usual. It learns what is usual.
func (s *signal) slope(full bool) float64 {
	if s.count() < leastSamples/2 {
		return 1
	}
	mean := s.sum / float64(s.count())
	if s.usual == 0 {
		s.usual = mean
	}
	g := max(steepest, min(1, tolerance*s.usual/mean))
	step := quick
	if mean > s.usual && full {
		step = slow
	}
	s.usual += (mean - s.usual) * step
	return g
}
