package endpoints

import (
	"errors"
	"fmt"
	"testing"
	"time"

	"google.golang.org/grpc/balancer"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/status"
)

// where says where a sequence goes.
func where(t *testing.T, cc *fakeConn, sequence string) string {
	t.Helper()
	at, err := cc.pick(call(sequence))
	if err != nil {
		t.Fatalf("%s: %v", sequence, err)
	}
	return at
}

// Gateways that know the same servers send a sequence to the same one, and about as
// many to each.
func TestGatewaysAgreeOnSequences(t *testing.T) {
	_, one := newSet(t, nil, "10.0.0.1:8001", "10.0.0.2:8001", "10.0.0.3:8001")
	_, other := newSet(t, nil, "10.0.0.3:8001", "10.0.0.1:8001", "10.0.0.2:8001")
	count := make(map[string]int)
	const all = 3000
	for n := range all {
		s := fmt.Sprintf("model\x00%d", n)
		a, b := where(t, one, s), where(t, other, s)
		if a != b {
			t.Fatalf("%s: %s and %s", s, a, b)
		}
		count[a]++
	}
	for at, n := range count {
		if n < all/3*9/10 || n > all/3*11/10 {
			t.Errorf("%d of %d are at %s", n, all, at)
		}
	}
}

func TestASequenceStaysWhereItIs(t *testing.T) {
	s, cc := newSet(t, nil, "a", "b")
	before := make(map[string]string)
	for n := range 200 {
		k := fmt.Sprint(n)
		before[k] = where(t, cc, k)
	}
	// Another server comes, one of the old ones fails calls and is much loaded.
	if err := s.update(at("a", "b", "c")); err != nil {
		t.Fatal(err)
	}
	cc.ready("c")
	s.of("a").load.Store(1000)
	end(s, "b", Failed, 5)
	if len(ejected(s)) != 1 {
		t.Fatal("b is to be left alone")
	}
	begun := make(map[string]bool)
	for n := range 400 {
		k := fmt.Sprint(n)
		got := where(t, cc, k)
		if want, ok := before[k]; ok && got != want {
			t.Errorf("%s has gone from %s to %s", k, want, got)
		} else if !ok {
			begun[got] = true
		}
	}
	if !begun["c"] || begun["b"] {
		t.Errorf("new ones begin at %v", begun)
	}
}

func TestASequenceIsLostWithItsServer(t *testing.T) {
	for name, lose := range map[string]func(s *Set, cc *fakeConn){
		"it cannot be reached": func(_ *Set, cc *fakeConn) { cc.is("a", connectivity.TransientFailure) },
		"it is taken away":     func(s *Set, _ *fakeConn) { _ = s.update(at("b")) },
	} {
		t.Run(name, func(t *testing.T) {
			s, cc := newSet(t, nil, "a", "b")
			key := ""
			for n := 0; key == ""; n++ {
				if k := fmt.Sprint(n); where(t, cc, k) == "a" {
					key = k
				}
			}
			if n := s.Sequences()["a"]; n != 1 {
				t.Errorf("%d sequences are at a", n)
			}
			lose(s, cc)
			c := call(key)
			if _, err := cc.pick(c); status.Code(err) != codes.Unavailable || !c.Lost() {
				t.Errorf("got %v, lost %v", err, c.Lost())
			}
			if n := s.Sequences()["a"]; n != 0 {
				t.Errorf("%d sequences are at a, which is gone", n)
			}
			// It is said once: then it may begin anew.
			if got := where(t, cc, key); got != "b" {
				t.Errorf("it begins at %s", got)
			}
		})
	}
}

// While the connection to its server is made again, a sequence waits for it.
func TestASequenceWaitsForItsServer(t *testing.T) {
	_, cc := newSet(t, nil, "a", "b")
	at := where(t, cc, "s")
	cc.is(at, connectivity.Idle)
	c := call("s")
	if _, err := cc.pick(c); !errors.Is(err, balancer.ErrNoSubConnAvailable) || c.Lost() {
		t.Errorf("got %v", err)
	}
	cc.ready(at)
	if got, err := cc.pick(c); err != nil || got != at {
		t.Errorf("got %s, %v; want %s", got, err, at)
	}
}

// A stream takes sequences along that have no server, and no others.
func TestASequenceJoinsAStream(t *testing.T) {
	s, cc := newSet(t, nil, "a", "b")
	stream := call()
	stream.goTo(s.of("a"))
	foreign := ""
	for n := 0; foreign == ""; n++ {
		if k := fmt.Sprint(n); where(t, cc, k) == "b" {
			foreign = k
		}
	}
	if err := stream.Join("new"); err != nil {
		t.Errorf("new: %v", err)
	}
	if got := where(t, cc, "new"); got != "a" {
		t.Errorf("new is at %s", got)
	}
	if err := stream.Join("new"); err != nil {
		t.Errorf("again: %v", err)
	}
	if err := stream.Join(foreign); !errors.Is(err, ErrElsewhere) {
		t.Errorf("foreign: %v", err)
	}
	cc.is("b", connectivity.TransientFailure)
	if err := stream.Join(foreign); !errors.Is(err, ErrLost) {
		t.Errorf("foreign, lost: %v", err)
	}
}

func TestFewSequencesAreRemembered(t *testing.T) {
	bubble(t, nil, 2, func(s *Set, cc *fakeConn) {
		for n := range 3 * maxSequences {
			if _, err := cc.pick(call(fmt.Sprint(n))); err != nil {
				t.Fatal(err)
			}
		}
		size := func() int { return len(s.sequences.young) + len(s.sequences.old) }
		if n := size(); n > maxSequences || n < maxSequences/2 {
			t.Errorf("%d are remembered", n)
		}
		if s.sequences.find(fmt.Sprint(3*maxSequences-1)) == nil || s.sequences.find("0") != nil {
			t.Error("the wrong ones are remembered")
		}
		wait(sequenceSeconds*time.Second - time.Second)
		_, _ = cc.pick(call("used"))
		wait(sequenceSeconds * time.Second)
		if n := size(); n != 1 || s.sequences.find("used") == nil {
			t.Errorf("%d are remembered after a while", n)
		}
	})
}
