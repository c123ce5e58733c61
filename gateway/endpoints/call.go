package endpoints

import (
	"context"
	"math/rand/v2"
	"sync"

	"google.golang.org/grpc/balancer"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/resolver"
	"google.golang.org/grpc/status"
)

var resolveNow resolver.ResolveNowOptions

// Outcome is what a call says of the server that it went to.
type Outcome uint8

const (
	// Nothing is of a call that did not end by the server's doing.
	Nothing Outcome = iota
	// Served is of one that the server did, or refused with good reason.
	Served
	// Failed is of one whose connection was lost, or to which the server said UNAVAILABLE.
	Failed
	// Overloaded is of one to which the server said RESOURCE_EXHAUSTED.
	Overloaded
)

// Call is the context of one RPC to a model server, and its part in the choice.
// Context and Sequence are set before the RPC begins; the zero value of the rest
// is ready. It belongs to one RPC of one Set, and must not be copied.
type Call struct {
	context.Context
	// Sequence names the sequence that the RPC belongs to, and whose it is; "" if it
	// is free to go anywhere.
	Sequence string

	mu     sync.Mutex
	at     *endpoint
	weight int64 // in flight
	lost   bool
	ended  bool
}

type callKey struct{}

// Value implements context.Context.
func (c *Call) Value(key any) any {
	if key == (callKey{}) {
		return c
	}
	return c.Context.Value(key)
}

// Hold adds permits to what the server is loaded with, wherever the RPC goes;
// Release takes them off. End takes off the rest.
func (c *Call) Hold(weight int64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.ended {
		return
	}
	c.weight += weight
	if c.at != nil {
		c.at.load.Add(weight)
	}
}

// Release takes permits off that Hold added.
func (c *Call) Release(weight int64) { c.Hold(-weight) }

// Address is where the RPC went; "" if it went nowhere. After a retry it is the
// last server.
func (c *Call) Address() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.at == nil {
		return ""
	}
	return c.at.address
}

// Lost reports whether the RPC failed because the server that has its sequence is
// gone.
func (c *Call) Lost() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.lost
}

// End says how the RPC ended, once nothing of it is at work any more. Only the
// first End counts.
func (c *Call) End(o Outcome) {
	c.mu.Lock()
	if c.ended {
		c.mu.Unlock()
		return
	}
	c.ended = true
	e := c.at
	if e != nil {
		e.load.Add(-c.weight)
		e.calls.Add(-1)
	}
	c.mu.Unlock()
	if e != nil {
		e.learn(o)
	}
}

// Report reads what the server says of its load in a header or trailer, if it
// says something.
func (c *Call) Report(md metadata.MD) {
	if len(md) == 0 {
		return
	}
	l, ok := loadOf(md)
	if !ok {
		return
	}
	c.mu.Lock()
	e := c.at
	c.mu.Unlock()
	if e != nil {
		e.report(l, InCall)
	}
}

// goTo notes the server that the RPC goes to now.
func (c *Call) goTo(e *endpoint) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.move(e)
}

func (c *Call) move(e *endpoint) {
	if c.at == e {
		return
	}
	if !c.ended {
		if c.at != nil {
			c.at.load.Add(-c.weight)
			c.at.calls.Add(-1)
		}
		e.load.Add(c.weight)
		e.calls.Add(1)
	}
	c.at = e
}

// picker is the servers as they were at one moment.
type picker struct {
	set   *Set
	open  []*endpoint // that take calls
	homes []*endpoint // where a sequence may begin: those, and what is being connected
	err   error       // if none is open
}

// Pick implements balancer.Picker.
func (p *picker) Pick(info balancer.PickInfo) (balancer.PickResult, error) {
	c, _ := info.Ctx.Value(callKey{}).(*Call)
	switch {
	case c != nil && c.Sequence != "" && len(p.homes) > 0:
		return p.pickHome(c)
	case len(p.open) == 0:
		return balancer.PickResult{}, p.err
	case c == nil:
		return balancer.PickResult{SubConn: p.choose(nil, 1).sc}, nil
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	e := p.choose(c.at, max(1, c.weight))
	c.move(e)
	return balancer.PickResult{SubConn: e.sc}, nil
}

// choose is the less loaded of two servers, but not the one before if there is
// another.
func (p *picker) choose(before *endpoint, weight int64) *endpoint {
	n := uint64(len(p.open))
	if n == 1 {
		return p.open[0]
	}
	r := rand.Uint64() //nolint:gosec // no secret
	i := (r >> 32) * n >> 32
	j := (r & (1<<32 - 1)) * (n - 1) >> 32
	if j >= i {
		j++
	}
	a, b := p.open[i], p.open[j]
	switch {
	case before == a:
		return b
	case before == b:
		return a
	case b.score(weight) < a.score(weight):
		return b
	}
	return a
}

// busyCost is how many times heavier a server counts that said it had too much to
// do. Chosen: it still gets calls if all others are four times as loaded.
const busyCost = 4

// score is how loaded the server would be with so many more permits.
func (e *endpoint) score(weight int64) int64 {
	s := (e.load.Load() + weight) * int64(e.cost.Load())
	if e.busy.Load() > 0 {
		s *= busyCost
	}
	return s
}

// errLost ends an RPC at once: the picker's errors without a status would have
// grpc-go make the RPC again.
var errLost = status.Error(codes.Unavailable, ErrLost.Error())

// pickHome finds the server that has the call's sequence, or gives it one.
func (p *picker) pickHome(c *Call) (balancer.PickResult, error) {
	e, err := p.set.sequences.home(c.Sequence, p.homes)
	switch {
	case err != nil:
		c.mu.Lock()
		c.lost = true
		c.mu.Unlock()
		return balancer.PickResult{}, errLost
	case !e.is(connectivity.Ready):
		return balancer.PickResult{}, balancer.ErrNoSubConnAvailable // until it is
	}
	c.goTo(e)
	return balancer.PickResult{SubConn: e.sc}, nil
}
