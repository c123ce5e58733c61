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

// following is a pool of 32 permits that follows the gradient.
func following() *configv1.Pool {
	c := of(32, 100)
	c.Adaptive = &configv1.PoolAdaptive{Gradient: true, MinCapacity: 2}
	return c
}

// A server that becomes four times slower, and fast again, of which nobody said how
// fast it should be.
func TestGradientFollowsTheServer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		quick, slowed := server{32, 100 * time.Millisecond}, server{8, 100 * time.Millisecond}
		p := policy(t, following())
		if got := drive(t, p, quick, 5*time.Second); got > 110*time.Millisecond || p.Snapshot()[0].Capacity != 32 {
			t.Errorf("at full speed: %v with %d permits", got, p.Snapshot()[0].Capacity)
		}
		got := drive(t, p, slowed, 5*time.Second)
		s := p.Snapshot()[0]
		if s.Capacity < 8 || s.Capacity > 24 || got > 300*time.Millisecond {
			t.Errorf("four times slower: %v with %d permits", got, s.Capacity)
		}
		t.Logf("four times slower: first response after %v with %d permits", got, s.Capacity)
		if got := drive(t, p, quick, 10*time.Second); got > 110*time.Millisecond || p.Snapshot()[0].Capacity != 32 {
			t.Errorf("fast again: %v with %d permits", got, p.Snapshot()[0].Capacity)
		}
		// It takes a server that stays slow for the usual one.
		_ = drive(t, p, slowed, 5*time.Minute)
		if got := p.Snapshot()[0].Capacity; got != 32 {
			t.Errorf("after five minutes: %d permits", got)
		}
	})
}

// write has all that run write tokens for a time. A token takes base as long as no
// more than slots do.
func write(t *testing.T, p *Policy, slots int, base, length time.Duration) {
	t.Helper()
	type run struct {
		*part
		i    *interceptors.Inference
		next time.Time
	}
	var all []*run
	for end := time.Now().Add(length); time.Now().Before(end); time.Sleep(time.Millisecond) {
		for len(all) < 40 {
			i := &interceptors.Inference{Model: "1", InputTokens: 10}
			v, d := begin(t, p, context.Background(), i, "", "")
			if d != nil {
				t.Fatal(d)
			}
			all = append(all, &run{v, i, time.Time{}})
		}
		running := 0
		for _, r := range all {
			if r.Ready() {
				running++
			}
		}
		pace := base * time.Duration(max(running, slots)) / time.Duration(slots)
		left := all[:0]
		for _, r := range all {
			switch now := time.Now(); {
			case !r.Ready():
			case !r.i.Handed:
				r.i.Handed, r.i.HandedAt, r.next = true, now, now.Add(10*time.Millisecond)
			case !now.Before(r.next):
				r.i.OutputTokens++
				r.next = now.Add(pace)
				if err := r.Response(nil); err != nil {
					t.Fatal(err)
				}
				if r.i.OutputTokens == 100 {
					r.End(well)
					continue
				}
			}
			left = append(left, r)
		}
		all = left
	}
	for _, r := range all {
		r.End(cancelled)
	}
	atRest(t, p)
}

// Each stream's first response comes at once: only the time per token tells how many
// the server works on.
func TestCapacityFollowsTheTimePerToken(t *testing.T) {
	for name, c := range map[string]*configv1.PoolAdaptive{
		"target":   {OutputToken: durationpb.New(15 * time.Millisecond), FirstResponse: durationpb.New(time.Second)},
		"gradient": {Gradient: true},
	} {
		bubble(name, t, func(t *testing.T) {
			pool := of(32, 100)
			pool.Adaptive = c
			p := policy(t, pool)
			write(t, p, 32, 10*time.Millisecond, 10*time.Second)
			if got := p.Snapshot()[0].Capacity; got != 32 {
				t.Errorf("at full speed: %d permits", got)
			}
			write(t, p, 8, 10*time.Millisecond, 20*time.Second)
			if got := p.Snapshot()[0].Capacity; got < 7 || got > 22 {
				t.Errorf("four times slower: %d permits", got)
			}
			t.Logf("four times slower: %d permits", p.Snapshot()[0].Capacity)
			time.Sleep(idleTime)
			must(t, p, "1").End(well)
			if got := p.Snapshot()[0].Capacity; got != 32 {
				t.Errorf("%d permits after an idle time", got)
			}
		})
	}
}

// What was cancelled before its first response teaches nothing; nor do responses that
// say nothing of a full pool raise it.
func TestGradientLearnsOnlyFromAnswers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := policy(t, following())
		run := func(n int, d time.Duration, answered bool) {
			for range n {
				i := &interceptors.Inference{Model: "1", Handed: true, HandedAt: time.Now()}
				v, denied := begin(t, p, context.Background(), i, "", "")
				if denied != nil {
					t.Fatal(denied)
				}
				time.Sleep(d)
				if answered {
					_ = v.Response(nil)
					v.End(well)
				} else {
					v.End(cancelled)
				}
			}
		}
		run(64, 10*time.Millisecond, true)
		run(1000, time.Second, false)
		if a := p.pools[0].adaptive; a.first.usual != float64(10*time.Millisecond) || p.Snapshot()[0].Capacity != 32 {
			t.Errorf("usual %v, %d permits", time.Duration(a.first.usual), p.Snapshot()[0].Capacity)
		}
		run(64, 100*time.Millisecond, true)
		low := p.Snapshot()[0].Capacity
		if low >= 32 {
			t.Errorf("%d permits of a server that is ten times slower", low)
		}
		run(500, 10*time.Millisecond, true) // one at a time: it says nothing about more
		if got := p.Snapshot()[0].Capacity; got > low {
			t.Errorf("%d permits, want no more than %d", got, low)
		}
		time.Sleep(idleTime)
		must(t, p, "1").End(well)
		if a := p.pools[0].adaptive; a.first.usual != 0 || p.Snapshot()[0].Capacity != 32 {
			t.Errorf("after an idle time: usual %v, %d permits", time.Duration(a.first.usual), p.Snapshot()[0].Capacity)
		}
	})
}
