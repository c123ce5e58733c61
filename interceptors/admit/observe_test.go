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

func crowded(capacity uint32, a *configv1.PoolAdaptive) *configv1.Pool {
	return &configv1.Pool{Name: "gpu", Capacity: capacity, Adaptive: a, Models: []*configv1.PoolModel{{Model: "1"}}}
}

// fill takes permits until there are none, for inferences that run.
func fill(t *testing.T, p *Policy) (held []*part) {
	t.Helper()
	for {
		v, d := begin(t, p, context.Background(), &interceptors.Inference{Model: "1", Handed: true, HandedAt: time.Now()}, "", "")
		if d != nil {
			return held
		}
		held = append(held, v)
	}
}

func TestServersThatReportAQueueGetLess(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := policy(t, crowded(100, &configv1.PoolAdaptive{MaxWaiting: 4, MinCapacity: 50}))
		capacity := func() int64 { return p.Snapshot()[0].Capacity }
		report := func(n float64, models ...string) {
			time.Sleep(2 * time.Second)
			p.Observe(models, n)
		}
		held := fill(t, p)
		for _, c := range []struct {
			what   string
			n      float64
			models []string
			want   int64
		}{
			{"as many as may", 4, nil, 100},
			{"more", 5, nil, 90},
			{"still more", 50, []string{"0", "1"}, 81},
			{"another model's servers", 50, []string{"2"}, 81},
			{"fewer, and all permits are in use", 0, nil, 82},
			{"more again", 9, []string{"1", "1"}, 73},
			{"and so on", 9, nil, 65}, {"and so on", 9, nil, 58}, {"and so on", 9, nil, 52},
			{"down to the least", 9, nil, 50}, {"and no further", 9, nil, 50},
		} {
			if report(c.n, c.models...); capacity() != c.want {
				t.Errorf("%s: %d permits, want %d", c.what, capacity(), c.want)
			}
		}
		p.Observe(nil, 9)
		p.Observe(nil, 0)
		if capacity() != 50 {
			t.Errorf("%d permits: reports at once are one", capacity())
		}
		for _, v := range held {
			v.End(interceptors.Outcome{})
		}
		report(0)
		before := capacity()
		report(0)
		report(0)
		if capacity() != before {
			t.Errorf("from %d to %d permits, which nobody uses", before, capacity())
		}
		time.Sleep(idleTime)
		fill(t, p)[0].End(interceptors.Outcome{})
		if capacity() != 100 {
			t.Errorf("%d permits after an idle time", capacity())
		}
	})
}

// A pool that follows times does not go up while its servers report a queue, or
// for long after the last report.
func TestAQueueHoldsTheTimesBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := policy(t, crowded(16, &configv1.PoolAdaptive{FirstResponse: durationpb.New(time.Hour), MaxWaiting: 1}))
		capacity := func() int64 { return p.Snapshot()[0].Capacity }
		fast := func() { // answers that are fast, of a pool that is full
			held := fill(t, p)
			for _, v := range held {
				if err := v.Response(nil); err != nil {
					t.Fatal(err)
				}
			}
			for _, v := range held {
				v.End(interceptors.Outcome{})
			}
		}
		p.Observe(nil, 2)
		p.Observe(nil, 2)
		if capacity() != 14 {
			t.Fatalf("%d permits", capacity())
		}
		for range 3 {
			time.Sleep(time.Second)
			fast()
		}
		if capacity() != 14 {
			t.Errorf("%d permits: it went up while the servers have a queue", capacity())
		}
		for range 9 {
			time.Sleep(time.Second)
			fast()
		}
		if capacity() != 16 {
			t.Errorf("%d permits: nothing is reported any more", capacity())
		}
		held := fill(t, p)
		p.Observe(nil, 2)
		time.Sleep(2 * time.Second)
		p.Observe(nil, 0)
		if capacity() != 14 {
			t.Errorf("%d permits: it goes up by its times alone", capacity())
		}
		for _, v := range held {
			v.End(interceptors.Outcome{})
		}
	})
}

func BenchmarkObserve(b *testing.B) {
	p := policy(b, crowded(100, &configv1.PoolAdaptive{MaxWaiting: 4}))
	for b.Loop() {
		p.Observe(nil, 1)
	}
}
