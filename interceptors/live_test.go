package interceptors

import (
	"context"
	"errors"
	"math/rand/v2"
	"sync"
	"testing"
)

// those are the calls that Each finds.
func those(l *Live) map[*Call]int {
	found := make(map[*Call]int)
	l.Each(func(c *Call) { found[c]++ })
	return found
}

func TestLiveHasWhatHasBegunAndNotEnded(t *testing.T) {
	c := New([]*Backend{triton(t)})
	l := c.live
	open := make(map[*Call]bool)
	for range 2000 {
		if len(open) > 0 && rand.N(5) < 2 {
			for call := range open {
				call.End(nil)
				call.End(nil)
				delete(open, call)
				break
			}
			continue
		}
		call, err := c.Begin(t.Context(), CallInfo{FullMethod: modelInfer})
		if err != nil {
			t.Fatal(err)
		}
		open[call] = true
	}
	found := those(l)
	if l.Len() != len(open) || len(found) != len(open) {
		t.Errorf("%d found, %d counted, want %d", len(found), l.Len(), len(open))
	}
	for call := range open {
		if found[call] != 1 {
			t.Errorf("a call was found %d times", found[call])
		}
		call.End(nil)
	}
	if found := those(l); len(found) != 0 || l.Len() != 0 {
		t.Errorf("%d calls are left", len(found))
	}
}

func TestWhatIsRefusedIsNotLive(t *testing.T) {
	refusal := Deny("p", Internal, "no")
	p := &scripted{name: "p", journal: new(journal), begin: func(*Call) error { return refusal }}
	c := New([]*Backend{triton(t)}, p)
	if _, err := c.Begin(t.Context(), CallInfo{FullMethod: modelInfer}); !errors.Is(err, refusal) {
		t.Fatal(err)
	}
	if n := c.live.Len(); n != 0 {
		t.Errorf("%d calls are in flight", n)
	}
}

// Chains that follow one another have their calls in one place.
func TestLiveIsShared(t *testing.T) {
	var l Live
	backends := []*Backend{triton(t)}
	for range 2 {
		call, err := l.Chain(backends).Begin(t.Context(), CallInfo{FullMethod: modelInfer})
		if err != nil {
			t.Fatal(err)
		}
		defer call.End(nil)
	}
	if n := l.Len(); n != 2 {
		t.Errorf("%d calls, want both", n)
	}
}

// A call that comes when all were aborted is ended at once.
func TestLiveIsOverForGood(t *testing.T) {
	var l Live
	c := l.Chain([]*Backend{triton(t)})
	begin := func() *Call {
		call, err := c.Begin(t.Context(), CallInfo{FullMethod: modelInfer})
		if err != nil {
			t.Fatal(err)
		}
		return call
	}
	over := errors.New("over")
	ended, before := begin(), begin()
	ended.End(nil)
	l.Abort(over)
	after := begin()
	for n, call := range []*Call{ended, before, after} {
		want := over
		if n == 0 {
			want = context.Canceled
		}
		if got := context.Cause(call.Context()); got != want {
			t.Errorf("call %d ended with %v, want %v", n, got, want)
		}
		call.End(nil)
	}
}

// Calls begin and end while others look on and abort.
func TestLiveIsSafe(t *testing.T) {
	c := New([]*Backend{triton(t)})
	var wg sync.WaitGroup
	for n := range 8 {
		wg.Go(func() {
			for range 200 {
				if n == 0 {
					c.live.Each(func(call *Call) {
						call.Open()
						call.Abort(context.Canceled)
					})
					continue
				}
				call, err := c.Begin(context.Background(), CallInfo{FullMethod: modelInfer})
				if err != nil {
					t.Error(err)
					return
				}
				call.End(nil)
			}
		})
	}
	wg.Wait()
	if n := c.live.Len(); n != 0 {
		t.Errorf("%d calls are left", n)
	}
}

func BenchmarkLive(b *testing.B) {
	var l Live
	b.ReportAllocs()
	b.RunParallel(func(pb *testing.PB) {
		c := new(Call)
		for pb.Next() {
			l.add(c)
			c.remove()
		}
	})
}
