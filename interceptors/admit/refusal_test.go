package admit

import (
	"context"
	"testing"
	"time"

	"github.com/sluicegate/sluice/interceptors"
)

func TestRefusals(t *testing.T) {
	background := context.Background()
	quota := interceptors.Quota{Subject: "pool:gpu", Metric: "permits", ID: "gpu", Limit: 2}
	check := func(t *testing.T, d *interceptors.Denial, reason interceptors.Reason, retry time.Duration) {
		t.Helper()
		switch {
		case d == nil:
			t.Fatalf("not refused, want %s", reason)
		case d.Policy != "admit" || d.Reason != reason || d.RetryAfter != retry:
			t.Errorf("%s by %q with retry after %v; want %s after %v", d.Reason, d.Policy, d.RetryAfter, reason, retry)
		case reason == interceptors.DeadlineUnreachable && d.Quota != nil, reason != interceptors.DeadlineUnreachable && (d.Quota == nil || *d.Quota != quota):
			t.Errorf("quota %+v", d.Quota)
		case d.Metadata["pool"] != "gpu" || d.Message == "":
			t.Errorf("message %q, metadata %v", d.Message, d.Metadata)
		}
	}
	// learned is a pool that has seen inferences of ten seconds.
	learned := func(t *testing.T, queue uint32) *Policy {
		p := policy(t, of(2, queue))
		v := must(t, p, "1")
		time.Sleep(10 * time.Second)
		v.End(well)
		return p
	}
	bubble("no queue", t, func(t *testing.T) {
		p := policy(t, of(2, 0))
		v := must(t, p, "2")
		_, d := start(t, p, background, "1")
		check(t, d, interceptors.ConcurrencyLimit, time.Second) // nothing is known yet
		v.End(cancelled)
		atRest(t, p)
	})
	bubble("no queue, hold time known", t, func(t *testing.T) {
		p := learned(t, 0)
		v := must(t, p, "2")
		_, d := start(t, p, background, "1")
		check(t, d, interceptors.ConcurrencyLimit, 5*time.Second) // one of two permits
		v.End(cancelled)
		atRest(t, p)
	})
	bubble("queue full", t, func(t *testing.T) {
		p := learned(t, 2)
		a, b, c := must(t, p, "2"), must(t, p, "1"), must(t, p, "2")
		_, d := start(t, p, background, "1")
		check(t, d, interceptors.QueueFull, 20*time.Second) // 1 + 2 before it, and itself, over 2
		if d.Metadata["model"] != "1" {
			t.Errorf("metadata %v", d.Metadata)
		}
		for _, v := range []*part{c, b, a} {
			v.End(cancelled)
		}
		atRest(t, p)
	})
	bubble("waited too long", t, func(t *testing.T) {
		p := learned(t, 1)
		held, w := must(t, p, "2"), must(t, p, "1")
		time.Sleep(2 * time.Second) // until somebody waits
		out := waits(w, background)
		time.Sleep(3*time.Second - 1)
		pending(t, out)
		expect(t, p, 2, 1)
		time.Sleep(1)
		check(t, denial(t, ended(t, out)), interceptors.QueueTimeout, 10*time.Second)
		expect(t, p, 2, 0)
		w.End(cancelled)
		held.End(cancelled)
		atRest(t, p)
	})
	bubble("its turn comes when nobody waits any more", t, func(t *testing.T) {
		p := policy(t, of(2, 2))
		held, w, next := must(t, p, "2"), must(t, p, "2"), must(t, p, "1")
		next.permit().waiter.until = next.permit().waiter.until.Add(time.Hour)
		time.Sleep(5 * time.Second)
		held.End(cancelled)
		if w.Ready() || !next.Ready() {
			t.Error("want the permit passed by who came too late")
		}
		check(t, denial(t, w.Wait(background)), interceptors.QueueTimeout, time.Second)
		w.End(cancelled)
		next.End(cancelled)
		atRest(t, p)
	})
	bubble("deadline nearer than the wait", t, func(t *testing.T) {
		p := learned(t, 3)
		held := must(t, p, "2")
		short, cancel := context.WithTimeout(background, 15*time.Second-1)
		defer cancel()
		enough, cancel := context.WithTimeout(background, 15*time.Second) // 5 s until it begins, and 10 s for itself
		defer cancel()
		_, d := start(t, p, short, "1")
		check(t, d, interceptors.DeadlineUnreachable, 0)
		if d.Metadata["predictedWaitMs"] != "5000" || d.Metadata["predictedServiceMs"] != "10000" {
			t.Errorf("metadata %v", d.Metadata)
		}
		w, d := start(t, p, enough, "1")
		if d != nil {
			t.Errorf("%v, though its time is enough", d)
		}
		w.End(cancelled)
		held.End(cancelled)
		v, d := start(t, p, short, "1")
		if d != nil {
			t.Errorf("%v, though a permit is free", d)
		}
		v.End(cancelled)
		atRest(t, p)
	})
	bubble("nothing is predicted from nothing", t, func(t *testing.T) {
		p := policy(t, of(2, 3))
		held := must(t, p, "2")
		short, cancel := context.WithTimeout(background, 1)
		defer cancel()
		w, d := start(t, p, short, "1")
		if d != nil {
			t.Error(d)
		}
		w.End(cancelled)
		held.End(cancelled)
		atRest(t, p)
	})
	bubble("nobody queues after the deadline", t, func(t *testing.T) {
		p := policy(t, of(2, 3))
		held := must(t, p, "2")
		past, cancel := context.WithDeadline(background, time.Now().Add(-1))
		defer cancel()
		_, d := start(t, p, past, "1")
		check(t, d, interceptors.DeadlineUnreachable, 0)
		held.End(cancelled)
		atRest(t, p)
	})
	bubble("a waiter leaves at its deadline", t, func(t *testing.T) {
		p := policy(t, of(2, 3))
		held := must(t, p, "2")
		ctx, cancel := context.WithTimeout(background, time.Second)
		defer cancel()
		w, _ := start(t, p, ctx, "1")
		out := waits(w, ctx)
		time.Sleep(time.Second)
		if err := ended(t, out); err != context.DeadlineExceeded {
			t.Errorf("Wait: %v", err)
		}
		expect(t, p, 2, 0)
		late, _ := start(t, p, ctx, "1") // its deadline has passed; told by the turn
		held.End(cancelled)
		check(t, denial(t, late.Wait(background)), interceptors.DeadlineUnreachable, 0)
		atRest(t, p)
	})
}
