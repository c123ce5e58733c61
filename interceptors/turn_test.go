package interceptors

import (
	"context"
	"errors"
	"sync"
	"testing"
	"testing/synctest"
)

// One at a time has the turn, and nobody waits for one that is free: else all
// would be blocked for ever, which ends the bubble.
func TestTurnsAreTakenOneAtATime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		turn := newTurn()
		var (
			wg   sync.WaitGroup
			held int
			all  int
		)
		gone, goAway := context.WithCancel(t.Context())
		defer goAway()
		for n := range 8 {
			wg.Go(func() {
				ctx := t.Context()
				if n%4 == 0 {
					ctx = gone
				}
				for range 500 {
					if turn.take(ctx) != nil {
						return
					}
					if held++; held != 1 {
						t.Error("two have the turn")
					}
					if all++; all == 100 {
						goAway()
					}
					held--
					turn.pass()
				}
			})
		}
		wg.Wait()
		if turn.held.Load() || turn.waiting.Load() != 0 || all < 6*500 {
			t.Errorf("held %t, %d wait, taken %d times", turn.held.Load(), turn.waiting.Load(), all)
		}
	})
}

// Who waits for its turn stops when its call ends, and the next one gets it.
func TestWhoWaitsForATurnMayGiveUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		turn := newTurn()
		if err := turn.take(t.Context()); err != nil {
			t.Fatal(err)
		}
		why := errors.New("aborted")
		ctx, abort := context.WithCancelCause(t.Context())
		gaveUp, took := make(chan error, 1), make(chan error, 1)
		go func() { gaveUp <- turn.take(ctx) }()
		go func() { took <- turn.take(t.Context()) }()
		synctest.Wait()
		abort(why)
		if err := <-gaveUp; !errors.Is(err, why) {
			t.Errorf("got %v, want %v", err, why)
		}
		synctest.Wait()
		if len(took) != 0 {
			t.Error("it has the turn beside another")
		}
		turn.pass()
		if err := <-took; err != nil {
			t.Error(err)
		}
	})
}
