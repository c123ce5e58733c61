package interceptors

import "testing"

func TestPlaceIsOnce(t *testing.T) {
	left := 0
	i := &Inference{Call: new(Call)}
	if !i.Place("a", func() { left++ }) || i.Place("b", func() { left += 10 }) || i.Server != "a" {
		t.Errorf("it is at %q", i.Server)
	}
	i.End(nil)
	i.End(nil)
	if left != 1 || i.Place("c", func() { left += 100 }) {
		t.Errorf("it was left %d times", left)
	}
}
