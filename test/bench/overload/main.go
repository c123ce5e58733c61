// Overload measures what admission is for: a simulated GPU behind the gateway gets ten
// times what it can do, from two tenants with the weights 1 and 3, open loop, over gRPC
// on loopback; then one of them floods; then callers have no time. The same goes for
// other proxies with their own limiters, as far as they are installed, and for the GPU
// alone. Then the GPU becomes slower and fast again, behind a fixed and behind adaptive
// capacities. It writes a report with a line for each target.
//
//	go run ./test/bench/overload -for 60s -out report.md
//
// server.go is the simulated GPU, places.go what stands before it, load.go the load,
// step.go the GPU that changes its speed, report.go the order of events and the report.
package main

import (
	"bytes"
	"context"
	"flag"
	"fmt"
	"os"
	"strings"
	"time"
)

const (
	slots        = 8
	queueLength  = 32
	queueTimeout = time.Second
	patience     = 2 * time.Second // of callers
	impatience   = 250 * time.Millisecond
	warmUp       = time.Second // of each load, not counted
)

func main() {
	length := flag.Duration("for", 4*time.Second, "how long each load is measured")
	only := flag.String("only", "sluice,none,envoy,nginx,haproxy,step", "what is measured, of these")
	out := flag.String("out", "", "the file that gets the report; empty: standard output")
	flag.Parse()
	chosen := make(map[string]bool)
	for name := range strings.SplitSeq(*only, ",") {
		chosen[name] = true
	}
	var text bytes.Buffer
	failed, err := report(context.Background(), &text, *length, chosen)
	if err == nil && *out != "" {
		err = os.WriteFile(*out, text.Bytes(), 0o644)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "overload:", err)
		os.Exit(1)
	}
	if *out == "" {
		fmt.Print(text.String())
	}
	if failed > 0 {
		fmt.Fprintf(os.Stderr, "overload: %d targets were missed\n", failed)
		os.Exit(1)
	}
}
