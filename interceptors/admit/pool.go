package admit

import (
	"sync"
	"sync/atomic"
	"time"

	"github.com/sluicegate/sluice/interceptors"
)

// pool is a weighted semaphore with a queue.
type pool struct {
	name             string
	configured       int64 // capacity
	length           int   // of the queue, at most
	maxBytes         int64 // of the messages in the queue, at most; 0: no bound
	timeout, ageing  time.Duration
	principalPermits int64 // that a principal may hold; 0: no cap
	inputWeight      int64
	outputWeight     int64
	rules            map[string]rule // of tenants, by name
	others           rule            // of all other tenants
	reservedAll      int64           // permits reserved for tenants
	priorities       []priority
	normal           int                // the level of what no priority names
	queued           interceptors.Event // what is told of an inference that queues
	adaptive         *adaptive          // nil: the limit is fixed
	shared           *sharing           // nil: it is ours alone, or our part is
	replicas         int64              // gateways that have equal parts; 0: it is not divided

	// ceiling is the capacity there is: as configured, or as it was set since. It
	// changes under the lock.
	ceiling atomic.Int64

	// Permits are free, and whose turn it is needs more. It may be another's turn
	// when tenants are served.
	idle atomic.Bool

	mu       sync.Mutex
	limit    int64 // ceiling, or less while the model server is slow
	capacity int64 // limit, or less where we hold less of a shared pool
	leased   int64 // of a shared pool
	draining bool
	inUse    int64
	wanted   int64 // permits that are waited for
	kept     int64 // permits of reserves that are not in use
	tenants  map[string]*tenant
	reserves []*tenant // with a reserve
	sweepAt  int       // tenants
	last     *tenant   // that took permits
	levels   []*level  // the first goes first
	ready    int       // lines among those whose turn may be next
	waiting  int
	bytes    int64
	seq      uint64
	free     *permit // for use again, linked by next
	hold     estimate
	refused  map[interceptors.Reason]uint64

	forgotten int64 // weighted tokens that tenants were served whom we forgot
}

// rule is what a tenant gets.
type rule struct{ weight, cap, reserve int64 }

// permit is one inference's part of its pool. One that is granted at once is
// used again after its End.
type permit struct {
	pool      *pool
	model     *share
	tenant    *tenant
	principal *principal
	inference *interceptors.Inference
	waiter    *waiter // if it had to queue
	next      *permit // in pool.free
	spent     bool    // used again after End

	// Of the inference, like the calls of its methods.
	asked   int64 // permits by its tokens so far
	counted int64 // weighted tokens
	heard   bool  // the model server has answered
	written int64 // tokens of the output, when that was last a sample
	at      time.Time

	// Of pool.mu.
	weight int64
	state  state
	since  time.Time // when the permits were granted
}

// state is where a permit is in its life. It goes forward only.
type state uint8

const (
	idle    state = iota
	waiting       // in the queue
	held          // its weight is part of pool.inUse
	lapsed        // its turn came when nobody could use it any more, or it was driven out
	over          // given back
)

// fits reports whether so many permits are free for a tenant.
func (l *pool) fits(t *tenant, weight int64) bool {
	if l.inUse == 0 && (l.shared == nil || l.leased >= min(weight, l.ceiling.Load())) {
		return true
	}
	return l.inUse+weight+l.kept-min(t.kept(), weight) <= l.capacity
}

// open reports whether a newcomer may go on at once: there is room, and nobody
// waits whom it would overtake.
func (l *pool) open(t *tenant, p *principal, weight int64) bool {
	if l.draining || !t.may(weight) || !p.may(weight, l.principalPermits) || !l.fits(t, weight) {
		return false
	}
	if t.waiting == 0 {
		return l.ready == 0 || t.used+weight <= t.reserve
	}
	if l.ready > 0 || p.waiting > 0 {
		return false
	}
	for n := range t.lines {
		if t.lines[n].lanes.top() != nil { // waits for the tenant's cap
			return false
		}
	}
	return true
}

// tryAcquire takes the permits if they are free for the inference now.
func (l *pool) tryAcquire(s *share, i *interceptors.Inference, now time.Time) *permit {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.shared != nil {
		l.settle(now)
	}
	t := l.tenant(i.Call.Tenant)
	pr := l.principal(t, i.Call.Principal)
	asked := s.weigh(i)
	if !l.open(t, pr, min(asked, t.most)) {
		t.forget(pr)
		return nil
	}
	p := l.free
	if p == nil {
		p = new(permit)
	} else {
		l.free = p.next
	}
	l.begin(p, s, i, t, pr, asked)
	p.spent = true
	l.grant(p, now)
	return p
}

// begin fills a permit in.
func (l *pool) begin(p *permit, s *share, i *interceptors.Inference, t *tenant, pr *principal, asked int64) {
	*p = permit{pool: l, model: s, tenant: t, principal: pr, inference: i, asked: asked, weight: min(asked, t.most)}
	if p.counted = l.inputWeight * i.InputTokens; p.counted < p.weight {
		p.counted = p.weight // what has no text is fair by permits
	}
}

// grant hands a permit its weight.
func (l *pool) grant(p *permit, now time.Time) {
	t := p.tenant
	if t.ready == 0 {
		t.lift(l.floor())
	}
	p.state, p.since = held, now
	if l.adaptive != nil {
		l.resume(now)
	}
	l.use(p, p.weight)
	t.serve(p.entry())
	l.last = t
}

// entry is what the permit costs before anything was answered. It is the same
// as counted until then, but does not belong to the inference.
func (p *permit) entry() int64 {
	if p.waiter != nil {
		return p.waiter.entry
	}
	return p.counted
}

// enqueue takes a place in the queue, or says for what reason there is none;
// beside it is the predicted wait, 0 if nothing is known to predict it from. If
// permits were freed since tryAcquire it takes those, and neither queues nor
// refuses.
func (l *pool) enqueue(s *share, i *interceptors.Inference, until time.Time) (w *waiter, refused interceptors.Reason, wait, service time.Duration) {
	at := l.levelOf(i)
	deadline, _ := i.Context().Deadline()
	now := time.Now()
	l.mu.Lock()
	defer l.mu.Unlock()
	t := l.tenant(i.Call.Tenant)
	pr := l.principal(t, i.Call.Principal)
	asked := s.weigh(i)
	weight := min(asked, t.most)
	if l.shared != nil {
		l.settle(now)
	}
	if l.open(t, pr, weight) {
		w = l.newWaiter(s, i, t, pr, asked)
		l.grant(&w.permit, now)
		close(w.settled)
		return w, "", 0, 0
	}
	hold := l.holds(s, now)
	wait, service = l.predict(t, weight, at, hold, now), l.service(s, now)
	switch {
	case l.draining:
		refused = interceptors.Draining
	case l.shared != nil && l.shared.gone(now):
		refused = interceptors.PolicyUnavailable
	case l.length == 0:
		refused = interceptors.ConcurrencyLimit
	case !deadline.IsZero() && deadline.Sub(now) < sum(wait, service):
		refused = interceptors.DeadlineUnreachable
	case l.waiting >= l.length && !l.displace(t, at):
		refused = interceptors.QueueFull
	}
	if refused != "" {
		t.refused++
		l.refused[refused]++
		t.forget(pr)
		if l.shared != nil {
			l.shared.miss(weight)
		}
		return nil, refused, wait, service
	}
	w = l.newWaiter(s, i, t, pr, asked)
	w.state, w.level = waiting, at
	w.entered, w.rises = now, now.Add(l.ageing)
	if w.until = until; until.IsZero() {
		w.until = now.Add(l.timeout)
	}
	if !deadline.IsZero() {
		w.deadline, w.early = deadline.Add(-service), service > 0
	}
	w.work = float64(weight) * hold
	l.join(w)
	l.pass(now) // its turn may be before that of who waits for more permits than are free
	if w.state == held {
		w.entered = time.Time{}
	} else if l.shared != nil {
		l.shared.miss(0)
	}
	return w, "", wait, service
}

func (l *pool) newWaiter(s *share, i *interceptors.Inference, t *tenant, pr *principal, asked int64) *waiter {
	w := &waiter{settled: make(chan struct{})}
	l.begin(&w.permit, s, i, t, pr, asked)
	w.waiter, w.entry = w, w.counted
	return w
}

// displace drives out whoever must give its place to a newcomer.
func (l *pool) displace(t *tenant, at int) bool {
	w := l.displaced(t, at)
	if w == nil {
		return false
	}
	w.why = interceptors.QueueFull
	l.leave(w, lapsed)
	return true
}

// predict is how long a newcomer would wait: for the work that goes before it,
// and for its permits, at the rate at which a full pool gives permits back
// (Little's law). Before it goes what has a higher priority; of its own priority
// what its tenant has there, and what others are served in the meantime, which
// is by their weights, but no more than there is.
func (l *pool) predict(t *tenant, weight int64, at int, hold float64, now time.Time) time.Duration {
	var ahead float64
	for _, v := range l.levels[:at] {
		ahead += v.work
	}
	s := &t.lines[at]
	weights := s.level.weights
	if s.all.size == 0 {
		weights += t.weight
	}
	others := float64(weights)/float64(t.weight) - 1
	ahead += min(s.level.work, s.work+(s.work+float64(weight)*hold)*others)
	ahead += l.holds(nil, now) * float64(weight-(l.capacity-l.inUse))
	capacity := l.capacity
	if l.shared != nil {
		capacity = max(capacity, l.shared.part()) // more may be on its way
	}
	return durationOf(max(0, ahead/float64(max(1, capacity))))
}

// pass hands free permits to those whose turn it is, for as long as they do. Who
// could not use them any more, because its time is over, is passed by: it may
// not have noticed yet.
func (l *pool) pass(now time.Time) {
	if l.shared != nil {
		l.settle(now)
	}
	blocked := false
	for l.ready > 0 && !blocked {
		w := l.reserved()
		if w == nil {
			w = l.first()
		}
		switch {
		case w.expired(now):
			l.leave(w, lapsed)
		case l.fits(w.tenant, w.weight):
			l.leave(w, held)
			l.grant(&w.permit, now)
			w.tenant.wait.learn(now.Sub(w.entered), now)
			l.levels[w.level].wait.learn(now.Sub(w.entered), now)
		default:
			blocked = true
		}
	}
	if idle := blocked && l.inUse < l.capacity; idle != l.idle.Load() {
		l.idle.Store(idle)
	}
}

func (w *waiter) expired(now time.Time) bool {
	return !now.Before(w.until) || w.late(now)
}

// late reports whether the work would not end in time if it began now.
func (w *waiter) late(now time.Time) bool { return !w.deadline.IsZero() && !now.Before(w.deadline) }

// release ends a permit in whatever state it is. It may be called twice, but for
// one that is used again: only the first call counts. cost is what of the
// inference was not counted yet.
func (l *pool) release(p *permit, learn bool, cost int64) {
	now := time.Now()
	l.mu.Lock()
	defer l.mu.Unlock()
	switch p.state {
	case held:
		p.tenant.serve(cost)
		l.use(p, -p.weight)
		if learn {
			d := now.Sub(p.since)
			l.hold.learn(d, now)
			p.model.hold.learn(d, now)
		}
		if l.adaptive != nil && l.inUse == 0 {
			l.adaptive.idle = now
		}
	case waiting:
		l.leave(p.waiter, over)
	}
	p.state = over
	l.pass(now)
	if s := l.shared; s != nil && s.granted > max(s.target, l.inUse) {
		s.hasten() // there is something to give back
	}
	if p.spent {
		*p = permit{next: l.free}
		l.free = p
	}
}

// reweigh corrects what a running inference holds. It may come to hold more than
// is free, since it runs: then nobody else begins until there is room again.
func (l *pool) reweigh(p *permit, weight int64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	weight = min(weight, p.tenant.most)
	if p.state != held || weight == p.weight {
		return
	}
	l.use(p, weight-p.weight)
	p.weight = weight
	l.pass(time.Now())
}
