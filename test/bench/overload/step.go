package main

import (
	"context"
	"fmt"
	"io"
	"time"
)

// The GPU that changes its speed works on this many at once, then on so many for a
// while: a neighbour takes its memory.
const wideSlots, narrowSlots = 16, 4

// variants are capacities to compare.
var variants = []struct{ name, config string }{
	{"fixed", ""},
	{"AIMD, 150 ms", "  adaptive: {first_response: 150ms, min_capacity: 2}\n"},
	{"gradient", "  adaptive: {gradient: true, min_capacity: 2}\n"},
}

// steps measures how capacities follow a GPU whose speed changes.
func steps(ctx context.Context, w io.Writer, dir string, length time.Duration, line func(bool, string, ...any)) error {
	before, during, after := max(5*time.Second, length/6), max(10*time.Second, length/3), max(10*time.Second, length/3)
	fmt.Fprintf(w, "## A GPU that becomes slower\n\nIt works on %d at once, for %v; on %d for %v; and on %d again for %v. Twice its first capacity is asked for throughout.\n"+
		"Settled: from then on every second's goodput is at least .8 of what the GPU can do.\n\n", wideSlots, before, narrowSlots, during, wideSlots, after)
	fmt.Fprint(w, "| | goodput before | goodput slower | settled after | permits | handed to answered p50, p99 | goodput again | settled after | permits |\n|---|---|---|---|---|---|---|---|---|\n")
	type outcome struct {
		slower, again         float64
		settled, settledAgain time.Duration
	}
	got := make(map[string]outcome)
	for _, v := range variants {
		p, err := openSluice(v.name, dir, wideSlots, queueLength, v.config)
		if err != nil {
			return err
		}
		rates := map[string]float64{"one": perSecond(wideSlots), "three": perSecond(wideSlots)}
		part := func(name string, length time.Duration) stage {
			return stage{name: name, length: length, rates: rates, deadline: 10 * time.Second}
		}
		change := func(slots int64) { p.gpu.slots.Store(slots) }
		var permits [2]int64
		slow := time.AfterFunc(before, func() { change(narrowSlots) })
		fast := time.AfterFunc(before+during, func() {
			permits[0] = p.pools().Snapshot()[0].Capacity
			change(wideSlots)
		})
		rs := p.load(ctx, part("before", before), part("slower", during), part("again", after))
		permits[1] = p.pools().Snapshot()[0].Capacity
		slow.Stop()
		fast.Stop()
		rs[0].capacity, rs[1].capacity, rs[2].capacity = perSecond(wideSlots), perSecond(narrowSlots), perSecond(wideSlots)
		o := outcome{slower: rs[1].goodput(), again: rs[2].goodput(), settled: follows(rs[1], rs), settledAgain: follows(rs[2], rs)}
		got[v.name] = o
		times := p.gpu.times(before, before+during)
		fmt.Fprintf(w, "| %s | %.3f | %.3f | %s | %d | %v, %v | %.3f | %s | %d |\n", v.name, rs[0].goodput(), o.slower, within(o.settled, during), permits[0],
			round(percentile(times, .5)), round(percentile(times, .99)), o.again, within(o.settledAgain, after), permits[1])
		p.close()
	}
	fmt.Fprintln(w)
	fixed, aimd, gradient := got[variants[0].name], got[variants[1].name], got[variants[2].name]
	line(aimd.settled < 5*time.Second && aimd.slower > fixed.slower, "with a target the capacity settles %v after the GPU became slower (< 5s), goodput %.3f; fixed %.3f", aimd.settled, aimd.slower, fixed.slower)
	line(aimd.settledAgain < 5*time.Second, "and %v after it became fast again (< 5s)", aimd.settledAgain)
	line(gradient.slower > fixed.slower, "with the gradient, goodput %.3f", gradient.slower)
	fmt.Fprintln(w)
	return nil
}

func within(d, length time.Duration) string {
	if d >= length {
		return "never"
	}
	return d.String()
}

// follows is the second of a stage from which on goodput is at least .8; its length if
// there is none.
func follows(of *result, all []*result) time.Duration {
	var began time.Duration
	ends := make(map[int]int) // served, by second of the stage
	for _, r := range all {
		if r == of {
			break
		}
		began += r.length
	}
	var start time.Duration
	for _, r := range all {
		for _, c := range r.calls {
			if end := start + c.at + c.took - began; served(c) && end >= 0 && end < of.length {
				ends[int(end/time.Second)]++
			}
		}
		start += r.length
	}
	n := int(of.length / time.Second)
	for n > 0 && float64(ends[n-1]) >= .8*of.capacity {
		n--
	}
	if n == int(of.length/time.Second) {
		return of.length
	}
	return time.Duration(n) * time.Second
}
