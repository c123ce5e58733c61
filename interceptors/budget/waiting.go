package budget

import (
	"context"
	"sync"
	"time"

	"github.com/sluicegate/sluice/interceptors"
	"github.com/sluicegate/sluice/interceptors/fields"
)

// waiting is the state of what may have to wait for the shared store before it
// holds anything. It may end while it waits.
type waiting struct {
	mu      sync.Mutex
	pending bool // nothing is held yet
	asking  bool // Wait is at work
	settled bool
	timer   *time.Timer // when the GPU time that was granted is used up; nil: it is not limited
}

// Ready reports that there is nothing to wait for.
func (w *waiting) Ready() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return !w.pending
}

// settle ends it, and reports whether there is something held to be settled: once.
func (w *waiting) settle(holds []hold) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.settled {
		return false
	}
	w.settled = true
	if w.timer != nil {
		w.timer.Stop()
	}
	if w.pending && !w.asking {
		letGo(holds)
	}
	return !w.pending
}

// clampTries is how often an inference asks for less, because others took what was
// left. Chosen.
const clampTries = 3

// wait asks the store for an inference, and then takes. Where there is too little, less may have it
// ask for less. If that fails nothing is held.
func (w *waiting) wait(ctx context.Context, l *Ledger, i *interceptors.Inference, holds []hold, take func() (shortage, error),
	less func() bool, denial func(shortage) *interceptors.Denial) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.settled {
		return context.Canceled
	}
	var lost, err error
	var short shortage
	for tries := 0; ; tries++ {
		w.asking = true
		w.mu.Unlock()
		lost = l.store(ctx, holds, false)
		l.thresholds(i, holds)
		w.mu.Lock()
		w.asking = false
		if w.settled {
			letGo(holds)
			return context.Canceled
		}
		if short, err = take(); err != nil || short.account == nil || lost != nil || tries == clampTries || !less() {
			break
		}
	}
	switch {
	case err != nil:
		return err
	case short.account != nil && lost != nil:
		return lost
	case short.account != nil:
		return denial(short)
	}
	w.pending = false
	return nil
}

// Wait asks the shared store for what the inference needs.
func (v *reservation) Wait(ctx context.Context) error {
	err := v.wait(ctx, v.ledger, v.inference, v.holds, v.begin, v.less, func(s shortage) *interceptors.Denial { return s.exhausted(v.inference) })
	if err == nil && v.first != nil {
		v.clamp(v.first)
	}
	v.first = nil
	return err
}

// turn is a request that is not spent yet, because the shared store must be asked.
type turn struct {
	waiting
	ledger    *Ledger
	inference *interceptors.Inference
	holds     []hold
}

// Wait spends it.
func (t *turn) Wait(ctx context.Context) error {
	return t.wait(ctx, t.ledger, t.inference, t.holds, func() (shortage, error) { return t.ledger.take(t.holds, false) },
		func() bool { return false }, func(s shortage) *interceptors.Denial { return s.overRate(t.inference) })
}

// Request and Response have nothing to see.
func (t *turn) Request(*fields.Message) error  { return nil }
func (t *turn) Response(*fields.Message) error { return nil }

// End keeps it spent.
func (t *turn) End(interceptors.Outcome) {
	if !t.settle(t.holds) {
		return
	}
	t.ledger.spend(t.inference, t.holds)
	letGo(t.holds)
}
