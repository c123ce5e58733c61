package inspect

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/sluicegate/sluice/interceptors"
	configv1 "github.com/sluicegate/sluice/proto/gen/sluice/config/v1"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
)

// asks has a policy judge a text alone.
func asks(t *testing.T, ctx context.Context, p *Policy, text string) (events []string, err error) {
	t.Helper()
	return judged(t, ctx, p, triton, prompt(text))
}

func TestGuardRemembers(t *testing.T) {
	for name, tt := range map[string]struct {
		edit  func(*configv1.Guard)
		texts []string
		pause time.Duration // between them
		want  []string
	}{
		"the same":         {nil, []string{"a", "a"}, time.Minute, []string{"a"}},
		"another":          {nil, []string{"a", "b"}, 0, []string{"a", "b"}},
		"for five minutes": {nil, []string{"a", "a", "a"}, 3 * time.Minute, []string{"a", "a"}},
		"as configured":    {func(g *configv1.Guard) { g.CacheTtl = duration(time.Second) }, []string{"a", "a"}, time.Second, []string{"a", "a"}},
		"nothing":          {func(g *configv1.Guard) { g.CacheEntries = proto.Uint32(0) }, []string{"a", "a"}, 0, []string{"a", "a"}},
		"two": {func(g *configv1.Guard) { g.CacheEntries = proto.Uint32(2) }, []string{"a", "b", "a", "c", "a", "b"}, 0,
			[]string{"a", "b", "c", "b"}},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var edits []func(*configv1.Guard)
				if tt.edit != nil {
					edits = append(edits, tt.edit)
				}
				g := says("unsafe")
				p := guardedBy(t, g, guardConfig(edits...))
				for _, text := range tt.texts {
					if _, err := asks(t, t.Context(), p, text); denialOf(t, err).Reason != interceptors.PromptRejected {
						t.Errorf("%s: %v", text, err)
					}
					time.Sleep(tt.pause)
				}
				if got := g.asked(); !slices.Equal(got, tt.want) {
					t.Errorf("asked %q, want %q", got, tt.want)
				}
				if n := len(p.guard.answers); n != p.guard.order.Len() || n > p.guard.entries {
					t.Errorf("%d answers, %d in order", n, p.guard.order.Len())
				}
			})
		})
	}
}

func TestGuardBudget(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := says("safe")
		p := guardedBy(t, g, guardConfig(func(g *configv1.Guard) { g.PerSecond, g.Burst = 2, 3 }))
		ask := func(text string) *interceptors.Denial {
			events, err := asks(t, t.Context(), p, text)
			if err == nil {
				return nil
			}
			if !slices.Equal(events, []string{"guard_skipped"}) {
				t.Errorf("%s: events %q", text, events)
			}
			return denialOf(t, err)
		}
		for n, want := range []bool{true, true, true, false, false} {
			d := ask(fmt.Sprint(n))
			if (d == nil) != want || d != nil && (d.Reason != interceptors.PolicyUnavailable || d.RetryAfter != 500*time.Millisecond) {
				t.Errorf("%d: %v", n, d)
			}
		}
		if d := ask("0"); d != nil { // what is known costs nothing
			t.Error(d)
		}
		time.Sleep(500 * time.Millisecond)
		if ask("5") != nil || ask("6") == nil {
			t.Error("half a second is one question")
		}
		time.Sleep(time.Hour)
		for n, want := range []bool{true, true, true, false} {
			if d := ask(fmt.Sprint("later ", n)); (d == nil) != want {
				t.Errorf("later %d: %v", n, d)
			}
		}
	})
}

func TestGuardDeadline(t *testing.T) {
	for name, tt := range map[string]struct {
		edit   func(*configv1.Guard)
		caller time.Duration
		want   time.Duration
		err    error // or POLICY_UNAVAILABLE
	}{
		"half a second": {func(*configv1.Guard) {}, time.Hour, 500 * time.Millisecond, nil},
		"as configured": {func(g *configv1.Guard) { g.Timeout = duration(2 * time.Second) }, time.Hour, 2 * time.Second, nil},
		"the caller's":  {func(*configv1.Guard) {}, 100 * time.Millisecond, 100 * time.Millisecond, context.DeadlineExceeded},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ctx, cancel := context.WithTimeout(t.Context(), tt.caller)
				defer cancel()
				began := time.Now()
				p := guardedBy(t, hangs(nil), guardConfig(tt.edit))
				_, err := asks(t, ctx, p, "hello")
				if took := time.Since(began); took != tt.want {
					t.Errorf("it took %v, want %v", took, tt.want)
				}
				switch {
				case tt.err == nil && denialOf(t, err).Reason != interceptors.PolicyUnavailable:
					t.Errorf("got %v", err)
				case tt.err != nil && !errors.Is(err, tt.err):
					t.Errorf("got %v, want %v", err, tt.err)
				}
				if failures := p.guard.failures; (failures == 0) != (tt.err != nil) {
					t.Errorf("%d failures of the model: a caller's deadline is none", failures)
				}
			})
		})
	}
}

func TestGuardIsAskedOnceAtATime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		until := make(chan struct{})
		g := hangs(until)
		p := guardedBy(t, g, guardConfig(func(g *configv1.Guard) { g.Timeout = duration(time.Minute) }))
		first, leave := context.WithCancel(t.Context())
		var all sync.WaitGroup
		var mu sync.Mutex
		got := make(map[string]int)
		begin := func(ctx context.Context) {
			all.Go(func() {
				events, err := asks(t, ctx, p, "hello")
				mu.Lock()
				defer mu.Unlock()
				got[fmt.Sprint(events, err)]++
			})
			time.Sleep(time.Millisecond)
		}
		begin(first)
		for range 9 {
			begin(t.Context())
		}
		if n := len(g.asked()); n != 1 {
			t.Errorf("asked %d times", n)
		}
		leave() // who asked goes away: one of the others asks
		time.Sleep(time.Millisecond)
		if n := len(g.asked()); n != 2 {
			t.Errorf("asked %d times after the first has gone", n)
		}
		close(until)
		all.Wait()
		if got["[] context canceled"] != 1 || got["[guard_asked] <nil>"] != 1 || got["[guard_shared] <nil>"] != 8 {
			t.Errorf("got %v", got)
		}
		if p.guard.failures != 0 || len(p.guard.asked) > 0 {
			t.Errorf("%d failures, %d asked", p.guard.failures, len(p.guard.asked))
		}
	})
}

// A model that fails is left alone, tried by one, and used again.
func TestGuardBreaker(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		fails := true
		g := &fakeGuard{answer: func(context.Context, string) ([]string, error) {
			time.Sleep(time.Millisecond)
			if fails {
				return nil, status.Error(codes.Unavailable, "down")
			}
			return []string{"safe"}, nil
		}}
		p := guardedBy(t, g, guardConfig())
		n := 0
		ask := func() []string {
			n++
			events, _ := asks(t, t.Context(), p, fmt.Sprint(n))
			return events
		}
		for range guardFailures {
			if got := ask(); !slices.Equal(got, []string{"guard_failed"}) {
				t.Fatalf("got %q", got)
			}
		}
		for range 3 {
			if got := ask(); !slices.Equal(got, []string{"guard_skipped"}) {
				t.Errorf("got %q", got)
			}
		}
		_, err := asks(t, t.Context(), p, "x")
		if d := denialOf(t, err); d.RetryAfter != guardPause {
			t.Errorf("retry after %v", d.RetryAfter)
		}
		time.Sleep(guardPause)
		if got := ask(); !slices.Equal(got, []string{"guard_failed"}) {
			t.Errorf("the try: %q", got)
		}
		if got := ask(); !slices.Equal(got, []string{"guard_skipped"}) {
			t.Errorf("after a try that failed: %q", got)
		}
		time.Sleep(guardPause)
		fails = false
		var others sync.WaitGroup
		others.Go(func() {
			if got := ask(); !slices.Equal(got, []string{"guard_asked"}) {
				t.Errorf("the second try: %q", got)
			}
		})
		time.Sleep(time.Microsecond)
		if got, _ := asks(t, t.Context(), p, "beside"); !slices.Equal(got, []string{"guard_skipped"}) {
			t.Errorf("beside the try: %q", got)
		}
		others.Wait()
		if got := ask(); !slices.Equal(got, []string{"guard_asked"}) {
			t.Errorf("at last: %q", got)
		}
		if len(g.asked()) != guardFailures+3 {
			t.Errorf("asked %d times", len(g.asked()))
		}
	})
}

// Nothing of a text is kept.
func TestGuardKeepsNoText(t *testing.T) {
	p := guardedBy(t, says("safe"), guardConfig())
	if _, err := asks(t, t.Context(), p, "a walrus"); err != nil {
		t.Fatal(err)
	}
	for d := range p.guard.answers {
		if d == newJudge(p.guard.config).digest([]byte("a walrus")) {
			t.Error("the hash has no key of its own")
		}
	}
	if len(p.guard.answers) != 1 {
		t.Errorf("%d answers", len(p.guard.answers))
	}
}
