package main

import (
	"fmt"
	"io"
	"math"
	"strings"
)

// vtcBound is how far the difference of what two tenants were served, over their
// weights, moves at most while both have something waiting: 2 max(wp L, wq M) / the
// least weight, as in "Fairness in Serving Large Language Models" (OSDI '24, theorem
// 4.4). An inference without text counts one, so that L is 1, and M is what fits into
// the GPU.
const vtcBound = 2 * slots

// plot draws that difference over time, and says how far it moved.
func plot(w io.Writer, r *result) (spread float64) {
	const columns, rows = 100, 17
	var low, high [columns]float64
	for n := range low {
		low[n], high[n] = math.Inf(1), math.Inf(-1)
	}
	weights := map[string]float64{"one": 1, "three": 3}
	diff, least, most := 0.0, math.Inf(1), math.Inf(-1)
	for _, c := range r.calls { // by their ends
		end := c.at + c.took
		if !served(c) || end < r.skip || end > r.length {
			continue
		}
		if c.tenant == "one" {
			diff += 1 / weights["one"]
		} else {
			diff -= 1 / weights["three"]
		}
		n := min(columns-1, int(float64(columns)*float64(end-r.skip)/float64(r.length-r.skip)))
		low[n], high[n] = min(low[n], diff), max(high[n], diff)
		least, most = min(least, diff), max(most, diff)
	}
	middle := (least + most) / 2
	fmt.Fprintf(w, "\nServed to \"one\" less what was served to \"three\", each over its weight, while \"one\" asks for 100 times its share.\n"+
		"= is the bound of Virtual Token Counters, %d inferences apart.\n\n```\n", vtcBound)
	step := (vtcBound + 4.) / (rows - 1)
	for row := range rows {
		at := middle + (float64(rows/2)-float64(row))*step
		line := []byte(strings.Repeat(" ", columns))
		for n := range line {
			switch {
			case high[n] >= at-step/2 && low[n] < at+step/2:
				line[n] = '#'
			case math.Abs(math.Abs(at-middle)-vtcBound/2) <= step/2:
				line[n] = '='
			}
		}
		fmt.Fprintf(w, "%6.1f |%s\n", at, strings.TrimRight(string(line), " "))
	}
	fmt.Fprintf(w, "       +%s\n        0%*v\n```\n\n", strings.Repeat("-", columns), columns-1, (r.length - r.skip).String())
	return most - least
}
