// Package admit holds inferences back until the GPU has room for them.
//
// A pool is a GPU, or a group of them, with a capacity in permits. An inference
// holds as many permits as its model weighs, or as its tokens do, from before it
// is forwarded until it ends. Who finds no room waits in a queue that is bounded
// in length, in bytes and in time; who cannot be served in time is told so at
// once instead of after its deadline.
//
// The queue has priorities, in which those who wait grow older and rise. Inside
// a priority it is fair between tenants: the next is the one that was served the
// fewest tokens for its weight. Inside a tenant it is first come, first served.
//
// The order is strict: an inference that would fit does not overtake a heavier
// one whose turn it is. Were it allowed to, a steady flow of small inferences
// would keep a large one waiting for ever. The price is that permits may stand
// idle while the large one waits for its last. Only who waits for a cap of its
// own tenant or principal is overtaken, and who has a reserve need not wait for
// others.
//
// What ends an inference passes its permits on; nothing runs in the background, but
// for pools that gateways share through a store (shared.go).
package admit

import (
	"context"
	"strconv"
	"sync"
	"time"

	"github.com/sluicegate/sluice/interceptors"
	"github.com/sluicegate/sluice/interceptors/dialect"
	"github.com/sluicegate/sluice/interceptors/fields"
	"github.com/sluicegate/sluice/interceptors/internal/redis"
)

// name is the policy's name in denials, events and metrics.
const name = "admit"

// anyModel in a pool stands for every model that no pool names.
const anyModel = "*"

// Policy is the admission policy: the pools and which models run on them. It is
// safe for concurrent use.
type Policy struct {
	pools  []*pool
	models map[string]*share
	others *share // of models that no pool names; nil: they are not limited

	// Of pools that gateways share through a store.
	mu         sync.Mutex
	holders    int
	client     *redis.Client
	stop       context.CancelFunc
	background sync.WaitGroup
}

// share is what an inference of a model takes of a pool.
type share struct {
	pool     *pool
	weight   int64
	tokens   int64 // for one permit; 0: the weight is fixed
	output   int64 // tokens, where the caller does not say
	together bool
	next     *share // of the pool that it takes permits of after this one
	hold     estimate
}

// weigh is how many permits an inference takes, by what is known of it.
func (s *share) weigh(i *interceptors.Inference) int64 {
	if s.tokens == 0 {
		return s.weight
	}
	input, output := i.InputTokens, i.MaxOutputTokens
	if i.ReportedInput > 0 {
		input = i.ReportedInput
	}
	if output <= 0 {
		output = s.output
	}
	output = max(output, i.OutputTokens, i.ReportedOutput)
	ceiling := s.pool.ceiling.Load()
	most := ceiling * s.tokens // nor can the sum overflow then
	need := min(input, most) + min(output, most)
	return max(1, min(ceiling, (need+s.tokens-1)/s.tokens))
}

// Permits is how many permits an inference takes, of all its pools, by what is known
// of it; 1 if it is in none. It is called as a policy is, and does not block.
func (p *Policy) Permits(i *interceptors.Inference) (n int64) {
	s, ok := p.models[i.Model]
	if !ok {
		s = p.others
	}
	for ; s != nil; s = s.next {
		n += s.weigh(i)
	}
	return max(1, n)
}

// Name is "admit".
func (p *Policy) Name() string { return name }

// Begin is interested in inferences that we serve. Those that we send to
// another server are that server's to admit.
func (p *Policy) Begin(c *interceptors.Call) (interceptors.CallPolicy, error) {
	if c.Client || c.Method == nil || c.Method.Kind != dialect.Inference || len(p.pools) == 0 {
		return nil, nil
	}
	return (*calls)(p), nil
}

// calls is the policy's part in every call: it keeps nothing of one.
type calls Policy

// Start takes the permits, or a place in the queue, or refuses.
func (c *calls) Start(i *interceptors.Inference) (interceptors.InferencePolicy, error) {
	s, ok := c.models[i.Model]
	if !ok {
		s = c.others
	}
	switch {
	case s == nil:
		return nil, nil
	case s.next != nil:
		return startSeveral(s, i)
	}
	if p := s.pool.tryAcquire(s, i, time.Now()); p != nil {
		return p, nil
	}
	w, err := s.queue(i, time.Time{})
	if err != nil {
		return nil, err
	}
	w.announce(i)
	return w, nil
}

// queue takes a place in the queue, until a time or for the pool's timeout, or
// the permits if they are free meanwhile, or refuses.
func (s *share) queue(i *interceptors.Inference, until time.Time) (*waiter, error) {
	w, refused, wait, service := s.pool.enqueue(s, i, until)
	if refused == "" {
		return w, nil
	}
	d := s.pool.refusal(refused, wait).With("model", i.Model)
	if refused == interceptors.DeadlineUnreachable && service > 0 {
		d = d.With("predictedServiceMs", strconv.FormatInt(service.Milliseconds(), 10))
	}
	return nil, d
}

func (c *calls) End(interceptors.Outcome) {}

// announce tells the observers that the inference queued, if it did. If one
// panics the place in the queue is given up: the chain will not End what did not
// Start.
func (w *waiter) announce(i *interceptors.Inference) {
	if w.entered.IsZero() {
		return
	}
	told := false
	defer func() {
		if !told {
			w.pool.release(&w.permit, false, 0)
		}
	}()
	i.Emit(w.pool.queued)
	told = true
}

// Deaf reports that responses change nothing: there is no queue in which tenants
// compete, and neither weight nor capacity follow what is answered.
func (p *permit) Deaf() bool {
	return p.pool.length == 0 && p.pool.adaptive == nil && p.model.tokens == 0
}

// Request bounds the bytes that wait, and counts the tokens of later messages.
func (p *permit) Request(m *fields.Message) error {
	if p.waiter != nil && p.pool.maxBytes > 0 && m != nil {
		if err := p.pool.carry(p.waiter, int64(m.Size())); err != nil {
			return err
		}
	}
	p.follow()
	return nil
}

// Response counts what is answered.
func (p *permit) Response(*fields.Message) error {
	if p.pool.adaptive != nil {
		p.answered()
	}
	p.heard = true
	p.follow()
	return nil
}

// follow charges the tenant what was served since, and corrects the weight.
func (p *permit) follow() {
	if p.model.tokens > 0 {
		if need := p.model.weigh(p.inference); need != p.asked {
			p.asked = need
			p.pool.reweigh(p, need)
		}
	}
	if cost := p.cost(); cost > 0 {
		p.counted += cost
		p.tenant.serve(cost)
		if l := p.pool; l.idle.Load() {
			l.mu.Lock()
			l.pass(time.Now())
			l.mu.Unlock()
		}
	}
}

// cost is what the inference was served, in weighted tokens, and was not counted.
func (p *permit) cost() int64 {
	i := p.inference
	return p.pool.inputWeight*max(i.InputTokens, i.ReportedInput) +
		p.pool.outputWeight*max(i.OutputTokens, i.ReportedOutput) - p.counted
}

// End gives the permits back, or the place in the queue. Only an inference that
// ended well teaches the pool how long one takes: what was cut, cancelled or
// failed ended early, and would make the waits look shorter than they are.
func (p *permit) End(o interceptors.Outcome) {
	if p.inference == nil { // it has ended, and waits to be used again
		return
	}
	p.pool.release(p, o.Err == nil, max(0, p.cost()))
}

// carry counts the bytes of a message that waits, or refuses it.
func (l *pool) carry(w *waiter, size int64) error {
	l.mu.Lock()
	for w.state == waiting && l.bytes+size > l.maxBytes {
		if size > l.maxBytes || !l.displace(w.tenant, w.level) || w.state != waiting {
			wait := l.predict(w.tenant, w.weight, w.level, l.holds(w.model, time.Now()), time.Now())
			w.tenant.refused++
			l.refused[interceptors.QueueFull]++
			l.mu.Unlock()
			return l.refusal(interceptors.QueueFull, wait).With("model", w.inference.Model)
		}
	}
	if w.state == waiting {
		w.bytes += size
		l.bytes += size
	}
	l.pass(time.Now()) // who was displaced may have been in the way
	l.mu.Unlock()
	return nil
}

// refusals are what is told, by reason.
var refusals = map[interceptors.Reason]string{
	interceptors.ConcurrencyLimit:    "all permits of the pool that the caller may have are held, and it has no queue; try again later",
	interceptors.QueueFull:           "the queue for the pool's permits is full; try again later",
	interceptors.QueueTimeout:        "no permit was free within the pool's queue timeout; try again later",
	interceptors.Draining:            "the pool is being emptied; try another server, or again later",
	interceptors.PolicyUnavailable:   "the store of the pool's permits cannot be reached; try again later",
	interceptors.DeadlineUnreachable: "no permit will be free early enough to end before the deadline; set a longer one or try again later",
}

// refusal makes a denial. wait is what a newcomer would have to wait, or 0 if
// that is not known.
func (l *pool) refusal(reason interceptors.Reason, wait time.Duration) *interceptors.Denial {
	d := interceptors.Deny(name, reason, "%s", refusals[reason]).With("pool", l.name)
	if reason == interceptors.DeadlineUnreachable {
		// A retry with the same deadline helps only by luck; so none is proposed.
		return d.With("predictedWaitMs", strconv.FormatInt(wait.Milliseconds(), 10))
	}
	if wait <= 0 {
		wait = unknownWait
	}
	d.RetryAfter = max(wait, time.Millisecond) // a millisecond is the least that the pushback trailer can say
	if reason != interceptors.Draining && reason != interceptors.PolicyUnavailable {
		d.Quota = &interceptors.Quota{Subject: "pool:" + l.name, Metric: "permits", ID: l.name, Limit: l.ceiling.Load()}
	}
	return d
}

// unknownWait is the retry delay of a pool that does not know yet how long an
// inference takes. Chosen: short for a language model, long for a small one.
const unknownWait = time.Second
