package gateway

import (
	"context"
	"testing"
	"testing/synctest"
	"time"
)

func TestStall(t *testing.T) {
	const limit = 8 * time.Second
	for _, test := range []struct {
		name    string
		send    func(*stall)
		stalled bool
	}{
		{"nothing is sent", func(*stall) { time.Sleep(10 * limit) }, false},
		{"every message is read in time", func(s *stall) {
			for range 20 {
				s.begin()
				time.Sleep(limit - time.Second)
				s.end()
			}
		}, false},
		{"pauses between messages", func(s *stall) {
			for range 5 {
				s.begin()
				s.end()
				time.Sleep(2 * limit)
			}
		}, false},
		{"a message just in time", func(s *stall) { s.begin(); time.Sleep(limit); s.end(); time.Sleep(limit) }, false},
		{"one is not read", func(s *stall) { s.begin(); time.Sleep(limit + limit/4) }, true},
		{"the third is not read", func(s *stall) {
			for range 2 {
				s.begin()
				s.end()
			}
			time.Sleep(time.Second)
			s.begin()
			time.Sleep(limit + limit/4)
		}, true},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ctx, cancel := context.WithCancel(t.Context())
				defer cancel()
				var s stall
				times := 0
				s.watch(ctx, limit, func() { times++ })
				test.send(&s)
				s.stop()
				synctest.Wait()
				if got := times == 1; got != test.stalled {
					t.Errorf("stalled %d times, want it: %v", times, test.stalled)
				}
			})
		})
	}
}

func TestStallEndsWithTheCall(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		var s stall
		s.watch(ctx, time.Second, func() { t.Error("stalled after its end") })
		s.begin()
		cancel()
		time.Sleep(time.Minute)
		if s.timer.Stop() {
			t.Error("the watch goes on")
		}
	})
}
