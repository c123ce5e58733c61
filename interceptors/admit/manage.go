package admit

import (
	"context"
	"fmt"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// Resize sets the capacity of a pool while it runs. Permits in use beyond a lower one
// are not taken away: nothing begins until enough have come back. Where gateways share
// the pool through a store it holds for all of them. It lasts until the pool's
// configuration changes, or for the life of the policy. Errors are gRPC statuses:
// NOT_FOUND, INVALID_ARGUMENT for a capacity that is too small for a model or for what
// is reserved, UNAVAILABLE if the store gave no answer, in which case it may have been
// done all the same. Safe for concurrent use.
func (p *Policy) Resize(ctx context.Context, name string, capacity int64) error {
	l, err := p.named(name)
	if err != nil {
		return err
	}
	if l.shared != nil && capacity > maxShared {
		return status.Errorf(codes.InvalidArgument, "capacity: a store can count to %d permits", int64(maxShared))
	}
	if least, why := p.leastOf(l); capacity < least {
		return status.Errorf(codes.InvalidArgument, "capacity: %d is too small, %s", capacity, why)
	}
	if l.shared != nil {
		return l.shared.tell(ctx, "resize", capacity)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.resize(capacity)
	l.pass(time.Now())
	return nil
}

// Drain has a pool refuse what is new, with DRAINING; what runs and what waits goes
// on. It is for all gateways that share the pool through a store. Errors are as of
// Resize.
func (p *Policy) Drain(ctx context.Context, name string) error { return p.drain(ctx, name, true) }

// Resume ends Drain.
func (p *Policy) Resume(ctx context.Context, name string) error { return p.drain(ctx, name, false) }

func (p *Policy) drain(ctx context.Context, name string, on bool) error {
	l, err := p.named(name)
	if err != nil {
		return err
	}
	if l.shared != nil {
		return l.shared.tell(ctx, map[bool]string{true: "drain", false: "resume"}[on], 0)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.draining = on
	return nil
}

// tell has the store change the pool for all gateways.
func (s *sharing) tell(ctx context.Context, what string, value int64) error {
	if err := s.ask(ctx, what, value); err != nil {
		return status.Error(codes.Unavailable, "the store of the pools gave no answer; look at the pool before you try again")
	}
	return nil
}

func (p *Policy) named(name string) (*pool, error) {
	for _, l := range p.pools {
		if l.name == name {
			return l, nil
		}
	}
	return nil, status.Errorf(codes.NotFound, "there is no pool %q", name)
}

// leastOf is the least capacity with which everything can run, and what needs it.
func (p *Policy) leastOf(l *pool) (int64, string) {
	least, why := max(1, l.reservedAll+1), "nothing could run"
	if l.reservedAll > 0 {
		why = fmt.Sprintf("%d permits are reserved", l.reservedAll)
	}
	heavy := func(name string, s *share) {
		for ; s != nil; s = s.next {
			if s.pool == l && s.weight+l.reservedAll > least {
				least, why = s.weight+l.reservedAll, fmt.Sprintf("model %q weighs %d permits", name, s.weight)
			}
		}
	}
	for name, s := range p.models {
		heavy(name, s)
	}
	heavy(anyModel, p.others)
	return least, why
}

// resize sets the capacity. Whoever calls it passes permits on.
func (l *pool) resize(capacity int64) {
	before := l.ceiling.Swap(capacity)
	if l.limit == before || l.limit > capacity {
		l.limit = capacity
	}
	for _, t := range l.tenants {
		t.most = l.most(t)
	}
	l.settle(time.Now())
}
