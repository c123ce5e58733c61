// Package admit holds inferences back until the GPU has room for them.
//
// A pool is a GPU, or a group of them, with a capacity in permits. An inference
// holds as many permits as its model weighs from before it is forwarded until
// it ends. Who finds no room waits in a queue that is bounded in length and in
// time, and in the order of arrival; who cannot be served in time is told so at
// once instead of after its deadline.
//
// The order is strict: an inference that would fit does not overtake a heavier
// one that came before it. Were it allowed to, a steady flow of small
// inferences would keep a large one waiting for ever, although it was first.
// The price is that permits may stand idle while the large one waits for its
// last.
//
// Nothing here runs in the background: what ends an inference passes its
// permits on.
package admit

import (
	"fmt"
	"math"
	"strconv"
	"time"

	"github.com/sluicegate/sluice/interceptors"
	"github.com/sluicegate/sluice/interceptors/dialect"
	"github.com/sluicegate/sluice/interceptors/fields"
	configv1 "github.com/sluicegate/sluice/proto/gen/sluice/config/v1"
)

// name is the policy's name in denials, events and metrics.
const name = "admit"

// defaultQueueTimeout is how long an inference waits where the configuration
// does not say: as long as people wait for an answer to begin. Chosen.
const defaultQueueTimeout = 5 * time.Second

// anyModel in a pool stands for every model that no pool names.
const anyModel = "*"

// Policy is the admission policy: the pools and which models run on them. It is
// safe for concurrent use.
type Policy struct {
	pools  []*pool
	models map[string]share
	others share // of models that no pool names; no pool: they are not limited
}

// share is what one inference of a model takes of its pool.
type share struct {
	pool   *pool
	weight int64
}

// New makes the policy of the configured pools. An error begins with the field
// that is at fault.
func New(pools []*configv1.Pool) (*Policy, error) {
	p := &Policy{models: make(map[string]share)}
	names := make(map[string]bool, len(pools))
	for n, c := range pools {
		if names[c.GetName()] {
			return nil, fmt.Errorf("pools[%d].name: there are two pools named %q; rename one", n, c.GetName())
		}
		names[c.GetName()] = true
		if err := p.add(c); err != nil {
			return nil, fmt.Errorf("pools[%d].%w", n, err)
		}
	}
	return p, nil
}

func (p *Policy) add(c *configv1.Pool) error {
	if c.GetCapacity() == 0 {
		return fmt.Errorf("capacity: it is 0, so that nothing could run; set the permits there are")
	}
	if len(c.GetModels()) == 0 {
		return fmt.Errorf("models: the pool names none and would limit nothing; name models, or \"*\" for all others")
	}
	timeout := defaultQueueTimeout
	if t := c.GetQueueTimeout(); t != nil {
		if err := t.CheckValid(); err != nil {
			return fmt.Errorf("queue_timeout: %w", err)
		}
		if timeout = t.AsDuration(); timeout <= 0 {
			return fmt.Errorf("queue_timeout: it is %v; it must be above 0, or absent for %v", timeout, defaultQueueTimeout)
		}
	}
	l := &pool{
		name:     c.GetName(),
		capacity: int64(c.GetCapacity()),
		length:   int(c.GetQueueLength()),
		timeout:  timeout,
	}
	l.queued = interceptors.Event{Policy: name, Name: "queued", Attributes: []string{"pool", l.name}}
	for n, m := range c.GetModels() {
		s := share{pool: l, weight: max(1, int64(m.GetWeight()))}
		if s.weight > l.capacity {
			return fmt.Errorf("models[%d]: %q weighs %d of %d permits and could never run; lower its weight or raise the capacity",
				n, m.GetModel(), s.weight, l.capacity)
		}
		other, taken := p.models[m.GetModel()]
		if m.GetModel() == anyModel {
			other, taken = p.others, p.others.pool != nil
			p.others = s
		} else {
			p.models[m.GetModel()] = s
		}
		if taken {
			return fmt.Errorf("models[%d]: %q is in pool %q already; a model is in one pool, once", n, m.GetModel(), other.pool.name)
		}
	}
	p.pools = append(p.pools, l)
	return nil
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

// PoolState is a pool at one moment.
type PoolState struct {
	Name string
	// Capacity and InUse are permits.
	Capacity, InUse int64
	// Waiting is the number of inferences in the queue.
	Waiting int
	// Hold is how long an inference that ended well held its permits, as a
	// moving average; 0 until one did.
	Hold time.Duration
}

// Snapshot is the state of every pool, in the order of the configuration. At
// rest, InUse and Waiting are 0.
func (p *Policy) Snapshot() []PoolState {
	out := make([]PoolState, len(p.pools))
	for n, l := range p.pools {
		out[n] = l.snapshot()
	}
	return out
}

// calls is the policy's part in every call: it keeps nothing of one.
type calls Policy

// Start takes the permits, or a place in the queue, or refuses.
func (c *calls) Start(i *interceptors.Inference) (interceptors.InferencePolicy, error) {
	s, ok := c.models[i.Model]
	if !ok {
		s = c.others
	}
	if s.pool == nil {
		return nil, nil
	}
	p := &permit{pool: s.pool, weight: s.weight}
	if s.pool.tryAcquire(p) {
		return p, nil
	}
	deadline, _ := i.Context().Deadline()
	queued, refused, wait := s.pool.enqueue(p, deadline)
	if refused != "" {
		return nil, s.pool.refusal(refused, wait).With("model", i.Model)
	}
	if queued {
		p.announce(i)
	}
	return p, nil
}

func (c *calls) End(interceptors.Outcome) {}

// announce tells the observers that the inference queued. If one panics the
// place in the queue is given up: the chain will not End what did not Start.
func (p *permit) announce(i *interceptors.Inference) {
	told := false
	defer func() {
		if !told {
			p.pool.release(p, false)
		}
	}()
	i.Emit(p.pool.queued)
	told = true
}

// Request has nothing to see: what is asked was weighed by its model.
func (p *permit) Request(*fields.Message) error { return nil }

// Response has nothing to see either.
func (p *permit) Response(*fields.Message) error { return nil }

// End gives the permits back, or the place in the queue. Only an inference that
// ended well teaches the pool how long one takes: what was cut, cancelled or
// failed ended early, and would make the waits look shorter than they are.
func (p *permit) End(o interceptors.Outcome) { p.pool.release(p, o.Err == nil) }

// refusals are what is told, by reason.
var refusals = map[interceptors.Reason]string{
	interceptors.ConcurrencyLimit:    "all permits of the pool are held, and it has no queue; try again later",
	interceptors.QueueFull:           "the queue for the pool's permits is full; try again later",
	interceptors.QueueTimeout:        "no permit was free within the pool's queue timeout; try again later",
	interceptors.DeadlineUnreachable: "no permit will be free before the deadline; set a longer one or try again later",
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
	d.Quota = &interceptors.Quota{Subject: "pool:" + l.name, Metric: "permits", ID: l.name, Limit: l.capacity}
	return d
}

// unknownWait is the retry delay of a pool that does not know yet how long an
// inference takes. Chosen: short for a language model, long for a small one.
const unknownWait = time.Second

// durationOf is a duration of so many nanoseconds, or the longest there is.
func durationOf(ns float64) time.Duration {
	if ns >= math.MaxInt64 {
		return math.MaxInt64
	}
	return time.Duration(ns)
}
