package admit

import "time"

// crowd is what model servers say of queues of their own. It is guarded by
// pool.mu.
type crowd struct {
	most  float64 // that may wait; 0: any number
	alone bool    // no time is watched

	last time.Time // when more waited; zero if not at the last report
	at   time.Time // of the last decision
}

const (
	// reportLife is how long a report of many that wait keeps the limit from going
	// up. Chosen: some reports may be lost.
	reportLife = 10 * time.Second
	// reportStep is the least time between two decisions: what begins after one has
	// to show in what is reported. Chosen: half of the time between reports.
	reportStep = time.Second
)

func (w *crowd) crowded(now time.Time) bool {
	return !w.last.IsZero() && now.Sub(w.last) < reportLife
}

// Observe takes in how many inferences wait in the queues of the model servers that
// serve these models; of every model, if there are none. Pools of theirs that have a
// max_waiting follow it. It is safe for concurrent use and does not block.
func (p *Policy) Observe(models []string, waiting float64) {
	now := time.Now()
	if len(models) == 0 {
		for _, l := range p.pools {
			l.observe(waiting, now)
		}
		return
	}
	seen := make(map[*pool]bool, 1)
	for _, m := range models {
		s, ok := p.models[m]
		if !ok {
			s = p.others
		}
		for ; s != nil; s = s.next {
			if !seen[s.pool] {
				seen[s.pool] = true
				s.pool.observe(waiting, now)
			}
		}
	}
}

// observe lowers the limit to nine tenths, or raises it by one permit.
func (l *pool) observe(n float64, now time.Time) {
	if l.adaptive == nil || l.adaptive.waiting.most == 0 {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	a := l.adaptive
	w := &a.waiting
	w.last = time.Time{}
	if n > w.most {
		w.last = now
	}
	if now.Sub(w.at) < reportStep {
		return
	}
	w.at = now
	full := a.full || l.ready > 0 || l.inUse >= l.capacity
	switch {
	case n > w.most:
		l.limit = max(a.least, min(l.limit-1, int64(float64(l.limit)*backoff)))
	case w.alone && full:
		l.limit = min(l.ceiling.Load(), l.limit+1)
		a.full = false
	default:
		return
	}
	l.settle(now)
	l.pass(now)
}
