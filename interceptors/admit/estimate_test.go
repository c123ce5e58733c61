package admit

import (
	"context"
	"testing"
	"testing/synctest"
	"time"

	"github.com/sluicegate/sluice/interceptors"
	configv1 "github.com/sluicegate/sluice/proto/gen/sluice/config/v1"
)

// Who cannot end in time any more leaves the queue, before its deadline.
func TestWhoCannotMakeItLeaves(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := policy(t, of(2, 4))
		v := must(t, p, "1")
		time.Sleep(time.Second)
		v.End(well)
		held := must(t, p, "2")
		ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
		defer cancel()
		w, d := start(t, p, ctx, "1")
		if d != nil {
			t.Fatal(d)
		}
		out := waits(w, ctx)
		time.Sleep(time.Second - 1)
		pending(t, out)
		time.Sleep(1)
		if d := denial(t, ended(t, out)); d == nil || d.Reason != interceptors.DeadlineUnreachable {
			t.Errorf("%v, want DEADLINE_UNREACHABLE", d)
		}
		w.End(cancelled)
		held.End(cancelled)
		atRest(t, p)
	})
}

// Who would be late by a little, if it took as long as some do, is refused at once; but
// not for what few take.
func TestServiceHasAMargin(t *testing.T) {
	for name, test := range map[string]struct {
		took     []time.Duration
		deadline time.Duration // of one that waits for one second and then takes about one
		want     bool          // it is refused
	}{
		"always the same":        {[]time.Duration{1000, 1000, 1000, 1000}, 2001, false},
		"a little more or less":  {[]time.Duration{990, 1010, 990, 1010, 990, 1010}, 2010, true},
		"with time to spare":     {[]time.Duration{990, 1010, 990, 1010, 990, 1010}, 2060, false},
		"of all lengths":         {[]time.Duration{100, 2000, 100, 2000, 500, 1500}, 2000, true},
		"of all lengths, longer": {[]time.Duration{100, 2000, 100, 2000, 500, 1500}, 2300, false},
	} {
		bubble(name, t, func(t *testing.T) {
			c := of(1, 4)
			c.Models = []*configv1.PoolModel{{Model: "1"}}
			p := policy(t, c)
			for range 8 {
				for _, d := range test.took {
					v := must(t, p, "1")
					time.Sleep(d * time.Millisecond)
					v.End(well)
				}
			}
			mean := p.Snapshot()[0].Hold
			held := must(t, p, "1")
			ctx, cancel := context.WithTimeout(context.Background(), test.deadline*time.Millisecond*mean/time.Second)
			defer cancel()
			w, d := start(t, p, ctx, "1")
			if (d != nil) != test.want {
				t.Errorf("mean %v: %v, want a refusal %t", mean, d, test.want)
			}
			if w != nil {
				w.End(cancelled)
			}
			held.End(well)
			atRest(t, p)
		})
	}
}

// Each model has its own estimate, and an old one is forgotten.
func TestEstimates(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := of(1, 10)
		c.Models = []*configv1.PoolModel{{Model: "slow"}, {Model: "quick"}}
		p := policy(t, c)
		run := func(model string, d time.Duration) {
			v := must(t, p, model)
			time.Sleep(d)
			v.End(well)
		}
		run("slow", 10*time.Second)
		run("quick", time.Second)
		held := must(t, p, "slow")
		ctx, cancel := context.WithTimeout(context.Background(), 12*time.Second)
		defer cancel()
		if _, d := start(t, p, ctx, "slow"); d == nil || d.Reason != interceptors.DeadlineUnreachable {
			t.Errorf("slow: %v, want DEADLINE_UNREACHABLE", d)
		}
		w, d := start(t, p, ctx, "quick")
		if d != nil {
			t.Errorf("quick: %v", d)
		}
		w.End(cancelled)
		held.End(cancelled)
		time.Sleep(2 * time.Minute)
		held = must(t, p, "slow")
		late, cancel := context.WithTimeout(context.Background(), 12*time.Second)
		defer cancel()
		if w, d = start(t, p, late, "slow"); d != nil {
			t.Fatalf("after two minutes: %v", d)
		}
		w.End(cancelled)
		held.End(cancelled)
		atRest(t, p)
	})
}

func TestHoldTimesAreLearnedFromWhatEndedWell(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := policy(t, of(1, 1))
		run := func(d time.Duration, o interceptors.Outcome) time.Duration {
			v := must(t, p, "1")
			time.Sleep(d)
			v.End(o)
			return p.Snapshot()[0].Hold
		}
		for n, step := range []struct {
			hold time.Duration
			o    interceptors.Outcome
			want time.Duration
		}{
			{time.Second, cancelled, 0},
			{8 * time.Second, well, 8 * time.Second},
			{time.Minute, interceptors.Outcome{Err: interceptors.Deny("budget", interceptors.BudgetCut, "cut")}, 8 * time.Second},
			{16 * time.Second, well, 9 * time.Second},
			{time.Second, well, 8 * time.Second},
		} {
			if got := run(step.hold, step.o); got != step.want {
				t.Errorf("step %d: %v, want %v", n, got, step.want)
			}
		}
		// The time in the queue does not count.
		held, w := must(t, p, "1"), must(t, p, "1")
		time.Sleep(time.Second)
		held.End(cancelled)
		time.Sleep(8 * time.Second)
		w.End(well)
		if got := p.Snapshot()[0].Hold; got != 8*time.Second {
			t.Errorf("%v with the wait, want 8 s", got)
		}
	})
}
