package endpoints

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"

	"google.golang.org/grpc/balancer"
	"google.golang.org/grpc/connectivity"
)

func TestTheLessLoadedOfTwoIsChosen(t *testing.T) {
	for name, c := range map[string]struct {
		set    func(a, b *endpoint)
		weight int64
		want   string // "" for either
	}{
		"equal":                           {func(a, b *endpoint) {}, 1, ""},
		"one has more":                    {func(a, b *endpoint) { a.load.Store(1) }, 1, "b"},
		"the other has more":              {func(a, b *endpoint) { a.load.Store(5); b.load.Store(6) }, 1, "a"},
		"permits, not calls":              {func(a, b *endpoint) { a.load.Store(8); b.load.Store(7) }, 4, "b"},
		"a permit costs more there":       {func(a, b *endpoint) { b.load.Store(3); a.cost.Store(5 * unitCost) }, 1, "b"},
		"not so much more":                {func(a, b *endpoint) { b.load.Store(5); a.cost.Store(5 * unitCost) }, 1, "a"},
		"said that it had too much to do": {func(a, b *endpoint) { a.busy.Store(1); b.load.Store(2) }, 1, "b"},
		"that does not keep all away":     {func(a, b *endpoint) { a.busy.Store(1); b.load.Store(4) }, 1, "a"},
	} {
		t.Run(name, func(t *testing.T) {
			s, cc := newSet(t, nil, "a", "b")
			c.set(s.of("a"), s.of("b"))
			got := make(map[string]bool)
			for range 200 {
				call := call()
				call.Hold(c.weight)
				where, err := cc.pick(call)
				if err != nil {
					t.Fatal(err)
				}
				got[where] = true
				call.End(Nothing)
			}
			if c.want == "" && len(got) != 2 || c.want != "" && (len(got) != 1 || !got[c.want]) {
				t.Errorf("went to %v, want %q", got, c.want)
			}
		})
	}
}

// A retry goes to another server if there is one, and takes its weight along.
func TestARetryGoesElsewhere(t *testing.T) {
	for _, n := range []int{1, 2, 5} {
		s, cc := newSet(t, nil, []string{"a", "b", "c", "d", "e"}[:n]...)
		for range 100 {
			c := call()
			c.Hold(3)
			first, _ := cc.pick(c)
			for _, e := range s.endpoints {
				if e.address != first {
					e.load.Add(100) // even so
				}
			}
			second, err := cc.pick(c)
			for _, e := range s.endpoints {
				if e.address != first {
					e.load.Add(-100)
				}
			}
			if err != nil || (first == second) != (n == 1) {
				t.Fatalf("of %d servers: first %s, then %s, %v", n, first, second, err)
			}
			for _, e := range s.Snapshot() {
				want := map[bool]int64{true: 1}[e.Address == second]
				if e.Load != 3*want || e.Calls != want {
					t.Fatalf("%s has %d permits and %d calls, want %d and %d", e.Address, e.Load, e.Calls, 3*want, want)
				}
			}
			c.End(Nothing)
		}
	}
}

// Many calls in flight are spread: the fullest server has little more than its part.
func TestCallsAreSpread(t *testing.T) {
	s, cc := newSet(t, nil, strings.Fields("a b c d e f g h")...)
	var all int64
	for range 4000 {
		c := call()
		w := 1 + rand.Int64N(4)
		c.Hold(w)
		if _, err := cc.pick(c); err != nil {
			t.Fatal(err)
		}
		all += w
	}
	most := slices.MaxFunc(s.Snapshot(), func(a, b State) int { return int(a.Load - b.Load) })
	if part := all / 8; most.Load > part+part/20 { // drawn without a choice it would be a tenth above, and more
		t.Errorf("%d of %d permits are at %s; its part is %d", most.Load, all, most.Address, part)
	}
}

// Whatever happens to calls, at rest no server is loaded.
func TestNothingIsLeftOnAServer(t *testing.T) {
	s, cc := newSet(t, nil, "a", "b", "c")
	var wg sync.WaitGroup
	picker := cc.now.Load().Picker
	for seed := range uint64(8) {
		wg.Go(func() {
			r := rand.New(rand.NewPCG(seed, 1))
			for range 500 {
				c := call()
				var helpers sync.WaitGroup
				for range r.IntN(12) {
					switch w := r.Int64N(5); r.IntN(4) {
					case 0:
						c.Hold(w)
					case 1:
						helpers.Go(func() { c.Hold(w); c.Release(w) })
					case 2:
						_, _ = pickFrom(picker, c)
					default:
						helpers.Go(func() { c.Release(w) })
					}
				}
				if r.IntN(2) == 0 {
					c.End(Nothing) // before some have released what they held
				}
				helpers.Wait()
				c.End(Nothing)
			}
		})
	}
	wg.Wait()
	for _, e := range s.Snapshot() {
		if e.Load != 0 || e.Calls != 0 {
			t.Errorf("%s has %d permits and %d calls", e.Address, e.Load, e.Calls)
		}
	}
}

// What can be picked follows what becomes of the connections.
func TestServersComeAndGo(t *testing.T) {
	s, cc := newSet(t, nil, "a", "b")
	expect := func(what string, state connectivity.State, want ...string) {
		t.Helper()
		got := make(map[string]bool)
		for range 100 {
			where, err := cc.pick(call())
			if err != nil {
				where = err.Error()
			}
			got[where] = true
		}
		if len(got) != len(want) || slices.ContainsFunc(want, func(w string) bool { return !got[w] }) || cc.now.Load().ConnectivityState != state {
			t.Errorf("%s: got %v, %v; want %v, %v", what, got, cc.now.Load().ConnectivityState, want, state)
		}
	}
	expect("both", connectivity.Ready, "a", "b")
	cc.is("a", connectivity.Idle)
	expect("one reconnects", connectivity.Ready, "b")
	cc.is("b", connectivity.Idle)
	expect("both reconnect", connectivity.Connecting, balancer.ErrNoSubConnAvailable.Error())
	cc.all(connectivity.TransientFailure, "a", "b")
	cc.all(connectivity.Connecting, "a", "b")
	expect("both fail, and are tried", connectivity.TransientFailure, errNotReady.Error())
	cc.ready("b")
	expect("one is back", connectivity.Ready, "b")
	if err := s.update(at("b", "c", "c")); err != nil {
		t.Fatal(err)
	}
	if !cc.conns["a"].left || cc.conns["b"].left {
		t.Errorf("a is to be left, b not")
	}
	cc.is("a", connectivity.Ready) // too late
	cc.is("a", connectivity.Shutdown)
	cc.ready("c")
	expect("one is another", connectivity.Ready, "b", "c")
	if err := s.update(nil); err == nil {
		t.Error("no address is no error")
	}
	expect("nothing is known", connectivity.Ready, "b", "c")
	if n := len(s.Snapshot()); n != 2 {
		t.Errorf("%d servers, want 2", n)
	}
}

func BenchmarkPick(b *testing.B) {
	for _, n := range []int{1, 2, 8, 64} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			var addresses []string
			for k := range n {
				addresses = append(addresses, fmt.Sprint("host", k))
			}
			_, cc := newSet(b, nil, addresses...)
			c := call()
			picker, info := cc.now.Load().Picker, balancer.PickInfo{Ctx: c}
			b.ReportAllocs()
			for b.Loop() {
				c.at = nil
				if _, err := picker.Pick(info); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
	b.Run("hold, pick, end", func(b *testing.B) {
		_, cc := newSet(b, nil, "a", "b", "c")
		c := call()
		picker, info := cc.now.Load().Picker, balancer.PickInfo{Ctx: c}
		b.ReportAllocs()
		for b.Loop() {
			c.at, c.weight, c.ended = nil, 0, false
			c.Hold(1)
			if _, err := picker.Pick(info); err != nil {
				b.Fatal(err)
			}
			c.End(Served)
		}
	})
	b.Run("sequence", func(b *testing.B) {
		_, cc := newSet(b, nil, "a", "b", "c")
		c := call("model\x00sequence")
		picker, info := cc.now.Load().Picker, balancer.PickInfo{Ctx: c}
		b.ReportAllocs()
		for b.Loop() {
			if _, err := picker.Pick(info); err != nil {
				b.Fatal(err)
			}
		}
	})
}
