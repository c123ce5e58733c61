package identity

import (
	"sync"
	"sync/atomic"
	"time"

	"github.com/sluicegate/sluice/interceptors"
)

// Watch judges calls in flight again, by the policy of the day: at once when
// another is put in force, and every Identity.recheck. Who has lost access is
// cut off, be it by the rules, because the authority behind its certificate or
// token is not trusted any more, or because that has expired and the grace is
// over. Where one of the inferences of a stream has lost its model, it alone is
// refused, in band. Safe for concurrent use. Close it when done.
type Watch struct {
	live   *interceptors.Live
	policy atomic.Pointer[Policy]

	changed chan struct{} // another policy is in force
	stop    chan struct{}
	once    sync.Once
	stopped sync.WaitGroup
}

// NewWatch begins to watch calls. Nothing is judged before Enforce.
func NewWatch(live *interceptors.Live) *Watch {
	w := &Watch{live: live, changed: make(chan struct{}, 1), stop: make(chan struct{})}
	w.stopped.Go(w.run)
	return w
}

// Enforce puts a policy in force for all calls, also those that began under
// another. It does not wait.
func (w *Watch) Enforce(p *Policy) {
	w.policy.Store(p)
	select {
	case w.changed <- struct{}{}:
	default:
	}
}

// Close ends the watch and waits until it has ended.
func (w *Watch) Close() {
	w.once.Do(func() { close(w.stop) })
	w.stopped.Wait()
}

func (w *Watch) run() {
	tick := time.NewTicker(defaultRecheck)
	defer tick.Stop()
	for {
		select {
		case <-w.stop:
			return
		case <-w.changed:
			tick.Reset(w.policy.Load().recheck)
		case <-tick.C:
		}
		if p := w.policy.Load(); p != nil {
			w.live.Each(p.judge)
		}
	}
}

// judge decides again about a call and its inferences.
func (p *Policy) judge(c *interceptors.Call) {
	if c.Client {
		return
	}
	defer func() {
		if v := recover(); v != nil { // who cannot be judged is not let go on
			c.Abort(interceptors.Recovered(policyName, v))
		}
	}()
	m, open := c.Open()
	who, g, err := p.stays(c, m)
	if err == nil {
		err = who.mayCall(c, g)
	}
	if err != nil {
		c.Abort(err)
		return
	}
	for _, i := range open {
		if !p.keeps(who, g, i) {
			i.Cut(interceptors.NoModel(policyName, i.Model))
		}
	}
}

// keeps reports whether the caller may still use the model of an inference.
// Parameters that nobody kept, because no rule asked for them when it began,
// decide nothing in its favour.
func (p *Policy) keeps(who caller, g *grant, i *interceptors.Inference) bool {
	e := environment{Call: i.Call, Via: who.via, Peer: i.Call.Peer.ID, Inference: i}
	if a, ok := i.Part(policyName).(*asked); ok {
		if kept := a.kept.Load(); kept != nil {
			e.Parameters = *kept
		}
	}
	return g.allows(i.Model, i.Version, &e)
}
