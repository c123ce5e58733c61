// Package heapfloor has small heaps collected less often.
//
// Go collects when the heap has grown by as much as was live (GOGC=100). A process
// with little that lives and much that passes through, as a proxy, so collects many
// times a second, and pays for each collection: the gateway a twentieth of its
// processor time. With a floor it collects when that many bytes were allocated, or as
// much as was live, whichever is more. That takes at most floor bytes more memory.
package heapfloor

import (
	"os"
	"runtime"
	"runtime/debug"
	"runtime/metrics"
	"sync/atomic"
)

const (
	usual = 100 // per cent, as Go has it
	// maxPercent is for heaps with next to nothing in them.
	maxPercent = 10_000
	// Setting the percentage stops the world: it is left if it is nearly right.
	near = 10 // per cent of it
)

// Set has the garbage collector wait for floor bytes of garbage, from now on until
// stop is called, which brings Go's own default back. It does nothing if the
// environment sets GOGC: whoever runs the process knows better. GOMEMLIMIT holds as
// ever. It changes the whole process, so it is for programs and not for libraries;
// one Set at a time.
func Set(floor uint64) (stop func()) {
	if floor == 0 || os.Getenv("GOGC") != "" {
		return func() {}
	}
	f := &follower{floor: floor, percent: usual}
	f.follow(new(collected))
	return func() {
		f.stopped.Store(true)
		debug.SetGCPercent(usual)
	}
}

// collected is nobody's: its finalizer runs after each collection. It is too large
// for the allocator of tiny objects, which have no finalizers of their own.
type collected struct{ _ [4]*byte }

type follower struct {
	floor   uint64
	percent int // of the only goroutine that runs finalizers
	stopped atomic.Bool
}

func (f *follower) follow(c *collected) {
	if f.stopped.Load() {
		return
	}
	f.set(percentFor(f.floor, live()))
	runtime.SetFinalizer(c, f.follow)
}

func (f *follower) set(percent int) {
	if d := percent - f.percent; d*100 <= near*f.percent && -d*100 <= near*f.percent {
		return
	}
	f.percent = percent
	debug.SetGCPercent(percent)
}

// percentFor is how much a heap may grow.
func percentFor(floor, live uint64) int {
	if live >= floor {
		return usual
	}
	return int(min(floor*100/max(live, 1), maxPercent))
}

// live is what the last collection left, in bytes.
func live() uint64 {
	s := []metrics.Sample{{Name: "/gc/heap/live:bytes"}}
	metrics.Read(s)
	if s[0].Value.Kind() != metrics.KindUint64 {
		return 0
	}
	return s[0].Value.Uint64()
}
