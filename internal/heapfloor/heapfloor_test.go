package heapfloor

import (
	"runtime"
	"runtime/debug"
	"testing"
	"time"
)

func TestPercentFor(t *testing.T) {
	const mb = 1 << 20
	for _, c := range []struct {
		name        string
		floor, live uint64
		want        int
	}{
		{"nothing lives", 64 * mb, 0, maxPercent},
		{"little lives", 64 * mb, 8 * mb, 800},
		{"half the floor", 64 * mb, 32 * mb, 200},
		{"the floor", 64 * mb, 64 * mb, usual},
		{"far more than the floor", 64 * mb, 4096 * mb, usual},
	} {
		t.Run(c.name, func(t *testing.T) {
			got := percentFor(c.floor, c.live)
			if got != c.want {
				t.Errorf("got %d %%, want %d", got, c.want)
			}
			if garbage := uint64(got) * c.live / 100; garbage > max(c.floor, c.live) {
				t.Errorf("%d bytes of garbage before a collection: more than the floor and than what lives", garbage)
			}
		})
	}
}

// percent is what is in force.
func percent() int {
	p := debug.SetGCPercent(usual)
	debug.SetGCPercent(p)
	return p
}

func TestSet(t *testing.T) {
	t.Setenv("GOGC", "")
	runtime.GC()
	stop := Set(1 << 30)
	small := percent()
	if small <= usual {
		t.Errorf("%d %% with a small heap; want more than %d", small, usual)
	}
	ballast := make([]byte, 256<<20)
	for deadline := time.Now().Add(20 * time.Second); percent() >= small && time.Now().Before(deadline); {
		runtime.GC() // the finalizer runs some time after it
		runtime.Gosched()
	}
	runtime.KeepAlive(ballast)
	if got := percent(); got >= small {
		t.Errorf("%d %% with a heap grown by 256 MiB, as with a small one", got)
	}
	stop()
	runtime.GC()
	if got := percent(); got != usual {
		t.Errorf("%d %% after stop; want %d", got, usual)
	}
}

func TestEnvironmentWins(t *testing.T) {
	t.Setenv("GOGC", "200")
	before := percent()
	defer Set(1 << 30)()
	if got := percent(); got != before {
		t.Errorf("%d %%; GOGC is set, so it should have stayed %d", got, before)
	}
}
