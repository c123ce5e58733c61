package main

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"
)

// maxRatio is the target: what Sluice may use of the processor with every policy
// on, against a pass-through that looks at nothing.
const maxRatio = 1.3

// report gathers figures.
type report struct {
	o       options
	began   time.Time
	load    string
	cells   map[string]map[string][]figures // by scenario and peer, one for each round
	order   []string                        // of the peers
	idle    map[string][]float64            // KiB of a stream, by peer
	targets []target
	leftOut []string
	micro   bytes.Buffer
}

type target struct {
	what, is, want string
	met            bool
}

func newReport(o options) *report {
	return &report{
		o: o, began: time.Now(), load: loadAverage(),
		cells: make(map[string]map[string][]figures), idle: make(map[string][]float64),
	}
}

func (r *report) add(scenario, peer string, f figures) {
	if r.cells[scenario] == nil {
		r.cells[scenario] = make(map[string][]figures)
	}
	r.cells[scenario][peer] = append(r.cells[scenario][peer], f)
	r.seen(peer)
}

// addIdle takes what an idle stream cost in one round, in KiB.
func (r *report) addIdle(peer string, kib float64) {
	r.idle[peer] = append(r.idle[peer], kib)
	r.seen(peer)
}

func (r *report) seen(peer string) {
	if !slices.Contains(r.order, peer) {
		r.order = append(r.order, peer)
	}
}

// beside is the pass-through that a peer is compared with.
func beside(peer string) string {
	if strings.HasSuffix(peer, overMTLS) {
		return bare + overMTLS
	}
	return bare
}

// ratios are of a figure to the pass-through's in the same round, sorted; nil
// if either was not measured.
func (r *report) ratios(scenario, peer string, of func(figures) float64) []float64 {
	var out []float64
	to := r.cells[scenario][beside(peer)]
	for n, f := range r.cells[scenario][peer] {
		if n < len(to) {
			out = append(out, of(f)/of(to[n]))
		}
	}
	slices.Sort(out)
	return out
}

func median(sorted []float64) float64 {
	n := len(sorted)
	if n%2 == 1 {
		return sorted[n/2]
	}
	return (sorted[n/2-1] + sorted[n/2]) / 2
}

func cpu(f figures) float64 { return f.cpu }

// judge makes the targets of the figures.
func (r *report) judge() {
	var out []target
	for _, peer := range []string{sluice, sluice + overMTLS} {
		for _, s := range scenarios {
			if x := r.ratios(s.name, peer, cpu); len(x) > 0 {
				out = append(out, target{
					fmt.Sprintf("%s, %s: processor time, to the %s's", s.name, peer, beside(peer)),
					fmt.Sprintf("%.2f", median(x)), fmt.Sprintf("at most %.1f", maxRatio), median(x) <= maxRatio,
				})
			}
		}
	}
	r.targets = append(out, r.targets...)
}

func (r *report) write(file string) error {
	r.judge()
	var b bytes.Buffer
	r.head(&b)
	for _, s := range scenarios {
		r.table(&b, s.name)
	}
	r.idleTable(&b)
	b.Write(r.micro.Bytes())
	for _, t := range r.targets {
		fmt.Fprintf(os.Stderr, "bench: %s %s: %s (%s)\n", verdict(t.met), t.what, t.is, t.want)
	}
	if file == "" {
		_, err := os.Stdout.Write(b.Bytes())
		return err
	}
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		return err
	}
	fmt.Fprintln(os.Stderr, "bench: wrote", file)
	return os.WriteFile(file, b.Bytes(), 0o644)
}

func verdict(met bool) string {
	if met {
		return "pass"
	}
	return "FAIL"
}

func (r *report) head(b *bytes.Buffer) {
	fmt.Fprintf(b, "# Benchmarks of %s\n\n", r.began.UTC().Format("2 January 2006, 15:04 MST"))
	fmt.Fprintf(b, "%s, %s/%s, %d processors; load average %s at the start, %s at the end. %d rounds of %v for each cell.\n\n",
		runtime.Version(), runtime.GOOS, runtime.GOARCH, runtime.NumCPU(), r.load, loadAverage(), r.o.rounds, r.o.phase)
	if r.o.quick {
		fmt.Fprint(b, "A quick run: the figures are rough.\n\n")
	}
	fmt.Fprint(b, "Sluice runs with identity, structure, inspection of requests (starter rules), a budget, a pool, tracing\n"+
		"(1 % sampled, the trace handed on to the model server in W3C headers) and metrics on; `+responses` inspects\n"+
		"answers too. The pass-through is plain grpc-go with the same windows; +tuned is with workers for streams and\n"+
		"a floor under its heap, too, as the gateway is. It looks at\n"+
		"nothing. Each is a process of its own, and so is the model server; client and all of\n"+
		"them share the processors. Ratios are to the pass-through in the same round.\n\n")
	if len(r.targets) > 0 {
		fmt.Fprint(b, "## Targets\n\n| | target | is | wanted |\n|---|---|---|---|\n")
		for _, t := range r.targets {
			fmt.Fprintf(b, "| %s | %s | %s | %s |\n", verdict(t.met), t.what, t.is, t.want)
		}
		fmt.Fprintln(b)
	}
	for _, line := range r.leftOut {
		fmt.Fprintf(b, "- %s\n", line)
	}
	if len(r.leftOut) > 0 {
		fmt.Fprintln(b)
	}
}

func (r *report) table(b *bytes.Buffer, scenario string) {
	if len(r.cells[scenario]) == 0 {
		return
	}
	fmt.Fprintf(b, "## %s\n\n", scenario)
	fmt.Fprint(b, "| proxy | CPU s for 1,000 calls | ratio (lowest to highest) | rate | p50 | p99 |\n|---|---|---|---|---|---|\n")
	for _, peer := range r.order {
		var own []float64
		for _, f := range r.cells[scenario][peer] {
			own = append(own, f.cpu)
		}
		if len(own) == 0 {
			continue
		}
		slices.Sort(own)
		fmt.Fprintf(b, "| %s | %.4f |", peer, median(own))
		x := r.ratios(scenario, peer, cpu)
		if len(x) == 0 {
			fmt.Fprint(b, " | | | |\n")
			continue
		}
		fmt.Fprintf(b, " %.2f (%.2f to %.2f) |", median(x), x[0], x[len(x)-1])
		for _, of := range []func(figures) float64{
			func(f figures) float64 { return f.rate },
			func(f figures) float64 { return f.p50 },
			func(f figures) float64 { return f.p99 },
		} {
			fmt.Fprintf(b, " %.2f |", median(r.ratios(scenario, peer, of)))
		}
		fmt.Fprintln(b)
	}
	fmt.Fprintln(b)
}

func (r *report) idleTable(b *bytes.Buffer) {
	if len(r.idle) == 0 {
		return
	}
	fmt.Fprintf(b, "## Memory of an idle stream\n\n%d streams on %d connections, each with one answer received. Resident memory, of ours after a collection.\n\n", idleCount, idleConns)
	fmt.Fprint(b, "| proxy | KiB for each stream |\n|---|---|\n")
	for _, peer := range r.order {
		if x := r.idle[peer]; len(x) > 0 {
			slices.Sort(x)
			fmt.Fprintf(b, "| %s | %.1f |\n", peer, median(x))
		}
	}
	fmt.Fprintln(b)
}

// loadAverage is the machine's over the last minute.
func loadAverage() string {
	text, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		return "unknown"
	}
	first, _, _ := strings.Cut(string(text), " ")
	return first
}
