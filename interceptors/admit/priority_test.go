package admit

import (
	"context"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/metadata"

	"github.com/sluicegate/sluice/interceptors"
	configv1 "github.com/sluicegate/sluice/proto/gen/sluice/config/v1"
)

// order ends what runs, one after the other, and returns the names of those that
// were granted, as they were.
func order(t *testing.T, running *part, waiting map[string]*part) (names string) {
	t.Helper()
	for {
		running.End(well)
		running = nil
		for name, v := range waiting {
			if v.Ready() {
				if running != nil {
					t.Error("two were granted")
				}
				names += name
				running = v
				delete(waiting, name)
			}
		}
		if running == nil {
			return names
		}
	}
}

func TestPriorities(t *testing.T) {
	pool := func() *configv1.Pool {
		c := of(1, 10)
		c.Priorities = []*configv1.PoolPriority{
			{Priority: 5, Principals: []string{"spiffe://a/urgent/*"}},
			{Priority: -1, Principals: []string{"spiffe://a/batch/**", "anonymous"}},
		}
		return c
	}
	bubble("the higher goes first", t, func(t *testing.T) {
		p := policy(t, pool())
		held := as(t, p, "", "spiffe://a/x")
		waiting := map[string]*part{
			"c": as(t, p, "", "spiffe://a/batch/x"), "b": as(t, p, "", "spiffe://a/x"), "a": as(t, p, "", "spiffe://a/urgent/x")}
		if got := order(t, held, waiting); got != "abc" {
			t.Errorf("order %s", got)
		}
		atRest(t, p)
	})
	bubble("who waits grows older", t, func(t *testing.T) {
		p := policy(t, pool())
		held := as(t, p, "", "spiffe://a/x")
		batch := as(t, p, "", "anonymous")
		out := waits(batch, context.Background())
		time.Sleep(defaultQueueTimeout/4 + 1)
		batchSoon := as(t, p, "", "spiffe://a/x") // the same level by now
		time.Sleep(defaultQueueTimeout/4 + 1)
		urgent := as(t, p, "", "spiffe://a/urgent/x") // and again
		pending(t, out)
		if got := order(t, held, map[string]*part{"a": batch, "b": urgent, "c": batchSoon}); got != "abc" {
			t.Errorf("order %s", got)
		}
		if err := <-out; err != nil && denial(t, err).Reason != interceptors.Draining { // the grant, or the end, as it came to see it
			t.Error(err)
		}
		atRest(t, p)
	})
	bubble("a lower one gives its place", t, func(t *testing.T) {
		c := pool()
		c.QueueLength = 1
		p := policy(t, c)
		held, batch := as(t, p, "", "spiffe://a/x"), as(t, p, "", "anonymous")
		out := waits(batch, context.Background())
		urgent := as(t, p, "", "spiffe://a/urgent/x")
		if d := denial(t, ended(t, out)); d == nil || d.Reason != interceptors.QueueFull {
			t.Errorf("%v, want QUEUE_FULL", d)
		}
		if _, d := begin(t, p, context.Background(), &interceptors.Inference{Model: "1"}, "", "anonymous"); d == nil || d.Reason != interceptors.QueueFull {
			t.Errorf("%v, want QUEUE_FULL", d)
		}
		batch.End(cancelled)
		urgent.End(cancelled)
		held.End(well)
		atRest(t, p)
	})
	bubble("an urgent small one does not wait for a large one", t, func(t *testing.T) {
		c := pool()
		c.Capacity, c.Models[2].Weight = 3, 3
		p := policy(t, c)
		held, large := must(t, p, "1"), must(t, p, "3")
		urgent := as(t, p, "", "spiffe://a/urgent/x")
		if large.Ready() || !urgent.Ready() {
			t.Error("the urgent one waits, and there is room")
		}
		held.End(well)
		urgent.End(well)
		large.End(well)
		atRest(t, p)
	})
	bubble("by condition", t, func(t *testing.T) {
		c := of(1, 10)
		c.Priorities = []*configv1.PoolPriority{
			{Priority: 5, When: `tenant == "gold"`}, {Priority: 4, When: `parameters["n"] == 1`}, {Priority: -5, When: `metadata["x-batch"][0] == "yes"`},
		}
		l := policy(t, c).pools[0] // levels 5, 4, 0, -5
		for name, test := range map[string]struct {
			call *interceptors.Call
			want int
		}{
			"it holds": {&interceptors.Call{Tenant: "gold"}, 0},
			"what cannot be told raises nothing, and lowers": {&interceptors.Call{}, 3},
			"false": {&interceptors.Call{CallInfo: interceptors.CallInfo{Metadata: metadata.MD{"x-batch": {"no"}}}}, 2},
		} {
			if got := l.levelOf(&interceptors.Inference{Model: "1", Call: test.call}); got != test.want {
				t.Errorf("%s: level %d, want %d", name, got, test.want)
			}
		}
		if _, err := New([]*configv1.Pool{{Name: "p", Capacity: 1, Models: c.Models, Priorities: []*configv1.PoolPriority{{When: "tenant"}}}}); err == nil ||
			!strings.Contains(err.Error(), "priorities[0].when: it is a string") {
			t.Error(err)
		}
	})
	bubble("by model and method", t, func(t *testing.T) {
		c := of(1, 10)
		c.Priorities = []*configv1.PoolPriority{{Priority: 1, Models: []string{"2"}}, {Priority: 2, Methods: []string{"/a.B/C"}}}
		l := policy(t, c).pools[0]
		for want, i := range []*interceptors.Inference{
			{Model: "1", Call: &interceptors.Call{CallInfo: interceptors.CallInfo{FullMethod: "/a.B/C"}}},
			{Model: "2", Call: &interceptors.Call{CallInfo: interceptors.CallInfo{FullMethod: "/a.B/C"}}}, // the first rule
			{Model: "1", Call: &interceptors.Call{}},
		} {
			if got := l.levelOf(i); got != want {
				t.Errorf("level %d, want %d", got, want)
			}
		}
	})
}
