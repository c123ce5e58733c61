package main

import (
	"context"
	"fmt"
	"io"
	"math"
	"runtime"
	"time"
)

// run measures all phases and writes the report.
func run(ctx context.Context, w io.Writer, length time.Duration) error {
	guarded, err := open(ctx, true)
	if err != nil {
		return err
	}
	defer guarded.close()
	bare, err := open(ctx, false)
	if err != nil {
		return err
	}
	defer bare.close()
	both := map[string]float64{"one": 5 * capacity, "three": 5 * capacity}
	flooded := map[string]float64{"one": 100 * capacity / 4, "three": capacity} // "one" asks for 100 times its share
	light := map[string]float64{"one": capacity / 4, "three": capacity / 4}
	unloaded := guarded.load(ctx, "half the load", length, light)
	over := guarded.load(ctx, "ten times the load", length, both)
	after := guarded.load(ctx, "half the load again", length/2, light)
	flood := guarded.load(ctx, "one tenant floods", length, flooded)
	without := bare.load(ctx, "ten times the load, no admission", length, both)

	fmt.Fprintf(w, "# Overload\n\nA simulated GPU that can do %.0f inferences a second, %d at once in %v; a queue of %d for %v; callers wait for %v.\n"+
		"%s, %d cores. Each phase was measured for %v.\n\n", capacity, slots, service, queueLength, queueTimeout, deadline, runtime.Version(), runtime.NumCPU(), length)
	fmt.Fprint(w, "| | goodput / capacity | one : three | accepted p50, p99 | refused | refused after, p50 | too late | work for nobody |\n|---|---|---|---|---|---|---|---|\n")
	for _, f := range []*phase{unloaded, over, after, flood, without} {
		fmt.Fprintf(w, "| %s | %.3f | %d : %d | %v, %v | %d | %v | %d | %d |\n", f.name, f.goodput(), f.served["one"], f.served["three"],
			round(percentile(f.accepted, .5)), round(percentile(f.accepted, .99)), len(f.refuse), round(percentile(f.refuse, .5)), f.late, f.wasted)
	}
	fmt.Fprintln(w)
	line := func(met bool, format string, args ...any) {
		verdict := "FAIL"
		if met {
			verdict = "pass"
		}
		fmt.Fprintf(w, "- %s: %s\n", verdict, fmt.Sprintf(format, args...))
	}
	share := func(f *phase) float64 {
		return float64(f.served["three"]) / float64(max(1, f.served["one"]+f.served["three"]))
	}
	bound := 2*percentile(unloaded.accepted, .99) + queueTimeout
	line(over.goodput() >= .98, "goodput %.3f of capacity at ten times the load (>= .98)", over.goodput())
	line(math.Abs(share(over)-.75) <= .05*.75, "the heavier tenant has %.3f of what was served (.75, within 5 %%)", share(over))
	line(math.Abs(share(flood)-.75) <= .05*.75, "and %.3f while the other asks for 100 times its share", share(flood))
	line(percentile(over.accepted, .99) <= bound, "accepted p99 %v (<= %v: twice the unloaded one, and the queue)", round(percentile(over.accepted, .99)), round(bound))
	line(percentile(over.refuse, .5) < time.Millisecond, "refused after %v at the median (< 1ms, as the caller sees it)", round(percentile(over.refuse, .5)))
	line(over.wasted == 0, "work for callers that have gone: %d inferences (0)", over.wasted)
	line(len(after.refuse) == 0 && after.late == 0, "%d refused and %d late from a second after the overload on (0)", len(after.refuse), after.late)
	s := guarded.pools.Snapshot()[0]
	line(s.InUse == 0 && s.Waiting == 0, "%d permits and %d places left at the end (0)", s.InUse, s.Waiting)
	line(without.goodput() < over.goodput()/2, "without admission, goodput is %.3f (it collapses)", without.goodput())
	return nil
}

func round(d time.Duration) time.Duration {
	if d < 10*time.Millisecond {
		return d.Round(10 * time.Microsecond)
	}
	return d.Round(time.Millisecond)
}
