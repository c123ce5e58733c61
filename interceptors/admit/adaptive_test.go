package admit

import (
	"context"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/sluicegate/sluice/interceptors"
	configv1 "github.com/sluicegate/sluice/proto/gen/sluice/config/v1"
)

// server is a model server that works on so many inferences at once at full
// speed; with more, all of them are slower.
type server struct {
	slots   int64
	service time.Duration
}

func (s server) time(running int64) time.Duration {
	return s.service * time.Duration(max(s.slots, running)) / time.Duration(s.slots)
}

// drive keeps a pool full for a time, and returns the mean time to the first
// response in its last half.
func drive(t *testing.T, p *Policy, s server, length time.Duration) time.Duration {
	t.Helper()
	type run struct {
		*part
		i    *interceptors.Inference
		left float64 // of its service
	}
	const tick = 5 * time.Millisecond
	var running, waiting []*run
	var sum time.Duration
	var n time.Duration
	for at := time.Duration(0); at < length; at += tick {
		for len(waiting) < 8 {
			i := &interceptors.Inference{Model: "1", InputTokens: 10}
			v, d := begin(t, p, context.Background(), i, "", "")
			if d != nil {
				t.Fatal(d)
			}
			waiting = append(waiting, &run{v, i, 1})
		}
		left := waiting[:0]
		for _, r := range waiting {
			if !r.Ready() {
				left = append(left, r)
				continue
			}
			r.i.Handed, r.i.HandedAt = true, time.Now()
			running = append(running, r)
		}
		waiting = left
		time.Sleep(tick)
		done := float64(tick) / float64(s.time(int64(len(running))))
		rest := running[:0]
		for _, r := range running {
			if r.left -= done; r.left > 0 {
				rest = append(rest, r)
				continue
			}
			if at > length/2 {
				sum += time.Since(r.i.HandedAt)
				n++
			}
			if err := r.Response(nil); err != nil {
				t.Fatal(err)
			}
			r.End(well)
		}
		running = rest
	}
	for _, r := range append(waiting, running...) {
		r.End(cancelled)
	}
	atRest(t, p)
	return sum / max(1, n)
}

// adapting is a pool of 32 permits that wants first responses in 150 ms.
func adapting() *configv1.Pool {
	c := of(32, 100)
	c.Adaptive = &configv1.PoolAdaptive{FirstResponse: durationpb.New(150 * time.Millisecond), MinCapacity: 2}
	return c
}

// A server that can do 32 at once in 100 ms becomes four times slower, and fast
// again. A fixed capacity has every first response take four times as long.
func TestCapacityFollowsTheServer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		fast, slow := server{32, 100 * time.Millisecond}, server{8, 100 * time.Millisecond}
		fixed, p := policy(t, of(32, 100)), policy(t, adapting())
		if got := drive(t, p, fast, 5*time.Second); got > 110*time.Millisecond || p.Snapshot()[0].Capacity != 32 {
			t.Errorf("at full speed: %v with %d permits", got, p.Snapshot()[0].Capacity)
		}
		with, without := drive(t, p, slow, 10*time.Second), drive(t, fixed, slow, 10*time.Second)
		s := p.Snapshot()[0]
		if s.Capacity < 8 || s.Capacity > 14 || with > 170*time.Millisecond || without < 390*time.Millisecond {
			t.Errorf("four times slower: %v with %d permits, %v with 32", with, s.Capacity, without)
		}
		t.Logf("four times slower: first response after %v with %d permits, %v with a fixed 32", with, s.Capacity, without)
		if got := drive(t, p, fast, 10*time.Second); got > 110*time.Millisecond || p.Snapshot()[0].Capacity != 32 {
			t.Errorf("fast again: %v with %d permits", got, p.Snapshot()[0].Capacity)
		}
	})
}

func TestCapacityLearnsOnlyFromAnswers(t *testing.T) {
	slowly := func(t *testing.T, p *Policy, n int, end interceptors.Outcome, answered bool) int64 {
		for range n {
			i := &interceptors.Inference{Model: "1", Handed: true, HandedAt: time.Now()}
			v, d := begin(t, p, context.Background(), i, "", "")
			if d != nil {
				t.Fatal(d)
			}
			time.Sleep(time.Second)
			if answered {
				_ = v.Response(nil)
			}
			v.End(end)
		}
		return p.Snapshot()[0].Capacity
	}
	bubble("not from what was cancelled", t, func(t *testing.T) {
		if got := slowly(t, policy(t, adapting()), 100, cancelled, false); got != 32 {
			t.Errorf("%d permits", got)
		}
	})
	bubble("not further than the least", t, func(t *testing.T) {
		if got := slowly(t, policy(t, adapting()), 1000, well, true); got != 2 {
			t.Errorf("%d permits", got)
		}
	})
	bubble("forgets while nothing runs", t, func(t *testing.T) {
		p := policy(t, adapting())
		if got := slowly(t, p, 100, well, true); got >= 32 {
			t.Errorf("%d permits", got)
		}
		time.Sleep(idleTime)
		must(t, p, "1").End(well)
		if got := p.Snapshot()[0].Capacity; got != 32 {
			t.Errorf("%d permits after an idle time", got)
		}
		atRest(t, p)
	})
	bubble("does not grow beyond what is used", t, func(t *testing.T) {
		p := policy(t, adapting())
		low := slowly(t, p, 100, well, true)
		for range 100 { // one at a time, quick: it says nothing about more
			i := &interceptors.Inference{Model: "1", Handed: true, HandedAt: time.Now()}
			v, _ := begin(t, p, context.Background(), i, "", "")
			_ = v.Response(nil)
			v.End(well)
		}
		if got := p.Snapshot()[0].Capacity; got != low {
			t.Errorf("%d permits, want %d", got, low)
		}
	})
}
