// Bench measures the gateway beside a bare grpc-go pass-through, each in a
// process of its own, and writes a report that says which targets are met.
//
// Rates and times depend on the machine and on what else it does, so every
// figure that counts is a ratio: of Sluice to the pass-through, in the same
// round of the same run. What is compared is the processor time that the proxy
// used; other load on the machine moves it least.
//
// main.go is the order of events; child.go the processes; proxies.go and
// backend.go what they run; peers.go other people's proxies; load.go the
// scenarios; micro.go what is measured without a network; report.go the report.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"
)

// options are what a run is asked for.
type options struct {
	quick     bool
	out       string
	rounds    int
	phase     time.Duration // of one scenario through one proxy in one round
	peers     string        // names, separated by commas; empty: all
	scenarios string
	profiles  string
	bench     string
	count     int
}

func main() {
	if len(os.Args) > 1 && os.Args[1] == "child" {
		exit(runChild(os.Args[2:]))
	}
	var o options
	flag.BoolVar(&o.quick, "quick", false, "three short rounds, over in 90 s; says little on a busy machine")
	flag.StringVar(&o.out, "out", "", "the file that gets the report; empty: standard output")
	flag.IntVar(&o.rounds, "rounds", 15, "rounds; figures are medians of them")
	flag.DurationVar(&o.phase, "phase", 600*time.Millisecond, "how long a proxy is under load, for each scenario and round")
	flag.StringVar(&o.peers, "peers", "", "measure only the proxies with these names, separated by commas")
	flag.StringVar(&o.scenarios, "scenarios", "", "measure only the scenarios with these names, separated by commas")
	flag.StringVar(&o.profiles, "profiles", "", "a folder that gets a CPU profile of each of our proxies")
	flag.StringVar(&o.bench, "bench", ".", "Go benchmarks to run too, as for go test; empty: none")
	flag.IntVar(&o.count, "count", 1, "how often to run each Go benchmark")
	flag.Parse()
	if o.quick {
		o.rounds, o.phase = min(o.rounds, 3), min(o.phase, 300*time.Millisecond)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	exit(run(ctx, o))
}

func exit(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
	os.Exit(0)
}

// chosen reports whether a comma-separated list is empty or has the name.
func chosen(list, name string) bool {
	if list == "" {
		return true
	}
	for s := range strings.SplitSeq(list, ",") {
		if s == name {
			return true
		}
	}
	return false
}

func run(ctx context.Context, o options) error {
	dir, err := os.MkdirTemp("", "sluice-bench-")
	if err != nil {
		return err
	}
	defer func() { _ = os.RemoveAll(dir) }()
	mtls, err := writeIdentities(dir)
	if err != nil {
		return err
	}
	defer func() { _ = mtls.Close() }()
	backend, err := startChild("backend", "", "", "")
	if err != nil {
		return err
	}
	defer backend.stop()

	r := newReport(o)
	peers, left := peersOf(o, dir, backend.address)
	r.leftOut = left
	if err := rounds(ctx, o, r, peers, mtls); err != nil {
		return err
	}
	if chosen(o.scenarios, idleStreams) {
		if err := idle(ctx, o, r, peers, mtls); err != nil {
			return err
		}
	}
	var failed error // is told when the report is written
	if o.bench != "" {
		failed = errors.Join(r.scanner(), r.goBenchmarks(ctx, o))
	}
	return errors.Join(failed, r.write(o.out))
}
