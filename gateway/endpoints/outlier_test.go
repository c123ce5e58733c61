package endpoints

import (
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/connectivity"
	"google.golang.org/protobuf/types/known/durationpb"

	configv1 "github.com/sluicegate/sluice/proto/gen/sluice/config/v1"
)

// bubble runs a test in which time is the test's. The set is closed in it.
func bubble(t *testing.T, c *configv1.Backend, servers int, f func(s *Set, cc *fakeConn)) {
	synctest.Test(t, func(t *testing.T) {
		var addresses []string
		for n := range servers {
			addresses = append(addresses, fmt.Sprint("host", n))
		}
		s, cc := newSet(t, c, addresses...)
		synctest.Wait()
		f(s, cc)
	})
}

// end has calls to a server end so.
func end(s *Set, address string, o Outcome, times int) {
	for range times {
		c := call()
		c.goTo(s.of(address))
		c.End(o)
	}
}

func ejected(s *Set) (out []string) {
	for _, e := range s.Snapshot() {
		if e.Ejected {
			out = append(out, e.Address)
		}
	}
	return out
}

func wait(d time.Duration) {
	<-time.After(d)
	synctest.Wait()
}

func TestWhoFailsInARowIsLeftAlone(t *testing.T) {
	for name, c := range map[string]struct {
		config  *configv1.Outliers
		servers int
		do      func(s *Set)
		want    string
	}{
		"five times":              {nil, 2, func(s *Set) { end(s, "host0", Failed, 5) }, "[host0]"},
		"four times":              {nil, 2, func(s *Set) { end(s, "host0", Failed, 4) }, "[]"},
		"not in a row":            {nil, 2, func(s *Set) { end(s, "host0", Failed, 4); end(s, "host0", Served, 1); end(s, "host0", Failed, 4) }, "[]"},
		"as configured":           {&configv1.Outliers{Failures: 2}, 2, func(s *Set) { end(s, "host0", Failed, 2) }, "[host0]"},
		"too much to do":          {nil, 2, func(s *Set) { end(s, "host0", Overloaded, 50) }, "[]"},
		"nobody's fault":          {nil, 2, func(s *Set) { end(s, "host0", Nothing, 50) }, "[]"},
		"the only one":            {nil, 1, func(s *Set) { end(s, "host0", Failed, 50) }, "[]"},
		"the last one":            {&configv1.Outliers{MaxPercent: percent(100)}, 2, func(s *Set) { end(s, "host0", Failed, 5); end(s, "host1", Failed, 50) }, "[host0]"},
		"half of them":            {nil, 4, func(s *Set) { end(s, "host0", Failed, 5); end(s, "host1", Failed, 5); end(s, "host2", Failed, 5) }, "[host0 host1]"},
		"one in any case":         {&configv1.Outliers{MaxPercent: percent(1)}, 4, func(s *Set) { end(s, "host0", Failed, 5); end(s, "host1", Failed, 5) }, "[host0]"},
		"none, if configured":     {&configv1.Outliers{MaxPercent: percent(0)}, 4, func(s *Set) { end(s, "host0", Failed, 50) }, "[]"},
		"one that is not ready":   {nil, 2, func(s *Set) { s.of("host0").state.Store(uint32(connectivity.Connecting)); end(s, "host0", Failed, 5) }, "[]"},
		"where others are not up": {nil, 2, func(s *Set) { s.of("host1").state.Store(uint32(connectivity.Connecting)); end(s, "host0", Failed, 5) }, "[]"},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, &configv1.Backend{Outliers: c.config}, c.servers, func(s *Set, cc *fakeConn) {
				c.do(s)
				if got := fmt.Sprint(ejected(s)); got != c.want {
					t.Fatalf("left alone are %s, want %s", got, c.want)
				}
				for range 50 {
					where, err := cc.pick(call())
					if err != nil || c.want == "["+where+"]" {
						t.Fatalf("picked %s, %v", where, err)
					}
				}
			})
		})
	}
}

func percent(n uint32) *uint32 { return &n }

func TestWhoWasLeftAloneComesBack(t *testing.T) {
	const first = 7 * time.Second
	bubble(t, &configv1.Backend{Outliers: &configv1.Outliers{Ejection: durationpb.New(first)}}, 2, func(s *Set, cc *fakeConn) {
		for n, want := range []time.Duration{first, 2 * first, 3 * first} { // growing
			end(s, "host0", Failed, 5)
			wait(want - 2*time.Second)
			if len(ejected(s)) != 1 {
				t.Fatalf("time %d: it is back too early", n+1)
			}
			wait(3 * time.Second) // it is looked at each second
			if len(ejected(s)) != 0 {
				t.Fatalf("time %d: it is not back", n+1)
			}
			got := make(map[string]bool)
			for range 100 {
				where, _ := cc.pick(call())
				got[where] = true
			}
			if len(got) != 2 {
				t.Fatalf("time %d: only %v is picked", n+1, got)
			}
			end(s, "host0", Failed, 4)
			if len(ejected(s)) != 0 {
				t.Fatalf("time %d: what it did before counts again", n+1)
			}
			end(s, "host0", Served, 1)
		}
		wait(time.Minute) // in which it does not fail
		end(s, "host0", Failed, 5)
		wait(first + time.Second)
		if len(ejected(s)) != 0 {
			t.Error("what it did long ago is not forgiven")
		}
	})
}

// If only those that are left alone can be reached, they are used.
func TestLeftAloneIsBetterThanNothing(t *testing.T) {
	bubble(t, nil, 2, func(s *Set, cc *fakeConn) {
		end(s, "host0", Failed, 5)
		cc.is("host1", connectivity.TransientFailure)
		if where, err := cc.pick(call()); err != nil || where != "host0" {
			t.Errorf("picked %q, %v", where, err)
		}
	})
}

func TestWhoServesLessThanOthersIsLeftAlone(t *testing.T) {
	for name, c := range map[string]struct {
		servers, calls, bad int
		want                string
	}{
		"much less":          {6, 200, 100, "[host0]"},
		"as the others":      {6, 200, 0, "[]"},
		"too few servers":    {4, 200, 100, "[]"},
		"too few calls":      {6, 90, 45, "[]"},
		"a little is enough": {6, 200, 20, "[host0]"}, // where the others have no fault at all
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, nil, c.servers, func(s *Set, _ *fakeConn) {
				for n := range c.servers {
					bad := 0
					if n == 0 {
						bad = c.bad
					}
					for k := range c.calls { // never in a row
						o := Served
						if bad > 0 && k%2 == 1 {
							o, bad = Failed, bad-1
						}
						end(s, fmt.Sprint("host", n), o, 1)
					}
				}
				wait(intervalSeconds*time.Second + time.Millisecond)
				if got := fmt.Sprint(ejected(s)); got != c.want {
					t.Errorf("left alone are %s, want %s", got, c.want)
				}
			})
		})
	}
}

// Who has too much to do gets less for a second.
func TestWhoHasTooMuchToDoIsSpared(t *testing.T) {
	bubble(t, nil, 2, func(s *Set, cc *fakeConn) {
		end(s, "host0", Overloaded, 1)
		end(s, "host1", Nothing, 0)
		wait(900 * time.Millisecond)
		for range 50 {
			if where, _ := cc.pick(call()); where != "host1" {
				t.Fatalf("picked %s", where)
			}
		}
		wait(2 * time.Second)
		got := make(map[string]bool)
		for range 100 {
			where, _ := cc.pick(call())
			got[where] = true
		}
		if len(got) != 2 {
			t.Errorf("later, only %v is picked", got)
		}
	})
}

func TestNamesAreLookedUpAgain(t *testing.T) {
	bubble(t, nil, 1, func(_ *Set, cc *fakeConn) {
		for n := 1; n <= 3; n++ {
			wait(intervalSeconds * time.Second)
			if int(cc.resolved.Load()) != n {
				t.Fatalf("asked %d times, want %d", cc.resolved.Load(), n)
			}
		}
	})
}
