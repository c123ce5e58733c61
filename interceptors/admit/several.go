package admit

import (
	"context"
	"sync"
	"time"

	"github.com/sluicegate/sluice/interceptors"
	"github.com/sluicegate/sluice/interceptors/fields"
)

// several is an inference's part of more pools than one. It takes their permits
// one after the other, in the order of the configuration: who waits for a pool
// holds only earlier ones, so that nobody can wait for one that waits for it.
// The queue timeout of the first pool that it waits for is for all of them.
type several struct {
	inference *interceptors.Inference

	mu    sync.Mutex
	parts []*waiter
	next  *share    // to be taken yet
	until time.Time // when the wait is over, once it has begun
	ended bool
}

func startSeveral(s *share, i *interceptors.Inference) (interceptors.InferencePolicy, error) {
	v := &several{inference: i, next: s}
	began := false
	defer func() {
		if !began { // also if an observer panics
			v.End(interceptors.Outcome{Err: context.Canceled})
		}
	}()
	if err := v.advance(); err != nil {
		return nil, err
	}
	v.parts[len(v.parts)-1].announce(i)
	began = true
	return v, nil
}

// advance takes the permits of one pool after the other until it has to wait.
func (v *several) advance() error {
	v.mu.Lock()
	defer v.mu.Unlock()
	for v.next != nil && !v.ended {
		if n := len(v.parts); n > 0 && !v.parts[n-1].Ready() {
			return nil
		}
		w, err := v.next.queue(v.inference, v.until)
		if err != nil {
			return err
		}
		if v.until.IsZero() {
			v.until = w.until // zero if it did not have to wait
		}
		v.parts, v.next = append(v.parts, w), v.next.next
	}
	return nil
}

// Ready reports that the permits of all pools are held.
func (v *several) Ready() bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.next == nil && v.parts[len(v.parts)-1].Ready()
}

// Wait waits for one pool after the other.
func (v *several) Wait(ctx context.Context) error {
	for {
		v.mu.Lock()
		w, last := v.parts[len(v.parts)-1], v.next == nil
		v.mu.Unlock()
		err := w.Wait(ctx)
		if err == nil && !last {
			err = v.advance()
		}
		if err != nil {
			v.End(interceptors.Outcome{Err: err})
			return err
		}
		if last {
			return nil
		}
	}
}

// each calls f for the parts, under the lock: permits may be taken meanwhile.
func (v *several) each(f func(*permit) error) error {
	v.mu.Lock()
	defer v.mu.Unlock()
	for _, w := range v.parts {
		if err := f(&w.permit); err != nil {
			return err
		}
	}
	return nil
}

// Request is that of each part.
func (v *several) Request(m *fields.Message) error {
	return v.each(func(p *permit) error { return p.Request(m) })
}

// Response is that of each part.
func (v *several) Response(m *fields.Message) error {
	return v.each(func(p *permit) error { return p.Response(m) })
}

// End gives all permits back, or the place in the queue. Only the first counts.
func (v *several) End(o interceptors.Outcome) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.ended = true
	for n := len(v.parts) - 1; n >= 0; n-- {
		v.parts[n].End(o)
	}
}
