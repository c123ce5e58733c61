package main

import (
	"context"
	"fmt"
	"io"
	"maps"
	"math"
	"os"
	"runtime"
	"slices"
	"strings"
	"time"

	"google.golang.org/grpc/codes"
)

// report measures everything and writes it down. It says how many targets were missed.
func report(ctx context.Context, w io.Writer, length time.Duration, chosen map[string]bool) (failed int, err error) {
	dir, err := os.MkdirTemp("", "overload")
	if err != nil {
		return 0, err
	}
	defer os.RemoveAll(dir)
	capacity := perSecond(slots)
	fmt.Fprintf(w, "# Overload\n\nA simulated GPU that can do %.0f inferences a second, %d at once in %v; each beyond that costs all of them %.0f %%.\n"+
		"Where there is a queue: %d places, %v. Two tenants, with the weights 1 and 3. Callers wait for %v, those without time for %v.\n"+
		"Open loop over gRPC on loopback; our gateway speaks mTLS with the callers, the others plaintext. %s, %d cores; each load was measured for %v.\n\n",
		capacity, slots, service, 100*thrash, queueLength, queueTimeout, patience, impatience, runtime.Version(), runtime.NumCPU(), length)

	stageOf := func(name string, deadline time.Duration, one, three float64) stage {
		return stage{name: name, length: warmUp + length, skip: warmUp, deadline: deadline, rates: map[string]float64{"one": one, "three": three}}
	}
	over := stageOf("ten times the load", patience, 5*capacity, 5*capacity)
	flood := stageOf("one floods", patience, 100*capacity/4, capacity) // a hundred times its share; the other more than its own
	hurry := stageOf("no time", impatience, 5*capacity, 5*capacity)
	light := stageOf("half the load", patience, capacity/4, capacity/4)
	again := light
	again.name, again.skip, again.length = "half the load again", 0, max(5*time.Second, length/4)

	head := func() {
		fmt.Fprint(w, "| | goodput / capacity | one : three | accepted p50, p99 | refused after p50, p99 | refused with | too late | work for nobody |\n"+
			"|---|---|---|---|---|---|---|---|\n")
	}
	line := func(met bool, format string, args ...any) {
		verdict := "pass"
		if !met {
			verdict = "FAIL"
			failed++
		}
		fmt.Fprintf(w, "- %s: %s\n", verdict, fmt.Sprintf(format, args...))
	}
	var guarded, loaded float64
	if chosen["sluice"] {
		p, err := openSluice("sluice", dir, slots, queueLength, "")
		if err != nil {
			return failed, err
		}
		unloaded := p.load(ctx, light)[0]
		rs := p.load(ctx, over, again)
		flooded := p.load(ctx, flood)[0]
		rushed := p.load(ctx, hurry)[0]
		s := p.pools().Snapshot()[0]
		p.close()
		fmt.Fprint(w, "## Sluice\n\n")
		head()
		for _, r := range []*result{unloaded, rs[0], rs[1], flooded, rushed} {
			r.row(w, r.name)
		}
		fmt.Fprintln(w)
		loaded, guarded = rs[0].goodput(), flooded.share("three")
		usual := percentile(unloaded.took(served), .99)
		bound := 2*usual + queueTimeout
		p99, median := percentile(rs[0].took(served), .99), percentile(rs[0].took(refused), .5)
		line(loaded >= .98, "goodput %.3f of capacity at ten times the load (>= .98)", loaded)
		line(math.Abs(rs[0].share("three")-.75) <= .05*.75, "the heavier tenant has %.3f of what was served (.75, within 5 %%)", rs[0].share("three"))
		line(math.Abs(guarded-.75) <= .05*.75, "and %.3f while the other asks for 100 times its share", guarded)
		line(p99 <= bound, "accepted p99 %v (<= %v: twice the unloaded one, and the queue)", round(p99), round(bound))
		line(median < time.Millisecond, "refused after %v at the median (< 1ms, as the caller sees it)", round(median))
		line(rs[0].refused[codes.ResourceExhausted] == len(rs[0].took(refused)), "every refusal is RESOURCE_EXHAUSTED")
		settled := rs[1].settled(2 * usual)
		line(settled < 2*time.Second, "%v after the overload ended the last call began that was refused, or slower than twice the unloaded p99 (< 2s)", round(settled))
		line(rs[0].wasted+rushed.wasted == 0, "work for callers that had gone: %d inferences at ten times the load, %d with no time (0)", rs[0].wasted, rushed.wasted)
		line(rushed.goodput() >= .9, "goodput %.3f for callers whose deadlines are shorter than the queue (>= .9)", rushed.goodput())
		line(s.InUse == 0 && s.Waiting == 0, "%d permits and %d places left at the end (0)", s.InUse, s.Waiting)
		spread := plot(w, flooded)
		line(spread <= vtcBound, "served over weight, the tenants' difference moved by %.1f inferences while one flooded (<= %.0f, the bound of Virtual Token Counters)", spread, float64(vtcBound))
		fmt.Fprintln(w)
	}
	if err := others(ctx, w, dir, chosen, head, over, flood, hurry, line, loaded); err != nil {
		return failed, err
	}
	if chosen["step"] {
		return failed, steps(ctx, w, dir, length, line)
	}
	return failed, nil
}

// others measures the GPU alone, and other proxies.
func others(ctx context.Context, w io.Writer, dir string, chosen map[string]bool, head func(), over, flood, hurry stage,
	line func(bool, string, ...any), loaded float64) error {
	fmt.Fprint(w, "## Others\n\nEnvoy: circuit breaker with as many requests as the GPU takes. nginx: limit_conn. HAProxy: maxconn, with a queue like ours.\n"+
		"Envoy and nginx have no queue that holds HTTP/2 requests back, so that the GPU waits for the next; none of them tells tenants apart.\n\n")
	head()
	measure := func(p *place, stages ...stage) (first *result) {
		for _, s := range stages {
			r := p.load(ctx, s)[0]
			r.row(w, p.name+", "+s.name)
			if first == nil {
				first = r
			}
		}
		p.close()
		return first
	}
	var left []string
	for n, peer := range peers {
		if !chosen[peer.name] {
			continue
		}
		if _, err := program(peer.name); err != nil {
			left = append(left, peer.name+": not measured; test/bench/setup.sh installs it")
			continue
		}
		p, err := openPeer(n, dir)
		if err != nil {
			return err
		}
		measure(p, over, flood, hurry)
	}
	var bare *result
	if chosen["none"] {
		p, err := openBare()
		if err != nil {
			return err
		}
		bare = measure(p, over)
	}
	fmt.Fprintln(w)
	for _, l := range left {
		fmt.Fprintf(w, "%s\n\n", l)
	}
	if bare != nil && loaded > 0 {
		line(bare.goodput() < loaded/2, "without admission, goodput is %.3f (it collapses)", bare.goodput())
		fmt.Fprintln(w)
	}
	return nil
}

// row writes a result as a line of the table.
func (r *result) row(w io.Writer, name string) {
	accepted, refusals := r.took(served), r.took(refused)
	var with []string
	for _, c := range slices.Sorted(maps.Keys(r.refused)) {
		with = append(with, fmt.Sprintf("%d %s", r.refused[c], c))
	}
	after := "-"
	if len(refusals) > 0 {
		after = fmt.Sprintf("%v, %v", round(percentile(refusals, .5)), round(percentile(refusals, .99)))
	}
	fmt.Fprintf(w, "| %s | %.3f | %.2f : %.2f | %v, %v | %s | %s | %d | %d |\n", name, r.goodput(), r.share("one"), r.share("three"),
		round(percentile(accepted, .5)), round(percentile(accepted, .99)), after, strings.Join(with, ", "), len(r.took(late)), r.wasted)
}

func round(d time.Duration) time.Duration {
	if d < 10*time.Millisecond {
		return d.Round(10 * time.Microsecond)
	}
	return d.Round(time.Millisecond)
}
