package main

import (
	"math"
	"math/rand/v2"

	"github.com/sluicegate/sluice/interceptors/inspect/classify"
)

// settings of the training.
type settings struct {
	epochs int
	rate   float64 // of learning, at first
	seed   uint64
}

// half is where the buckets of byte n-grams begin.
const half = classify.Buckets / 2

// learner holds the weights and AdaGrad's sums of squares.
type learner struct {
	w             *classify.Weights
	local, global []float32 // sums of squared gradients
	dense         []float32
	bias          float32
	settings
}

// forward is the logit of a text, and the window that counted.
func forward(w *classify.Weights, f *classify.Features) (logit float64, from, to int) {
	var sum float64
	before := 0
	var worst float64
	var prev float64
	start := 0
	for i, end := range f.Ends {
		var local float64
		for _, id := range f.IDs[start:end] {
			x := boosts[id/half]
			local += x * float64(w.Local[id])
			sum += x * float64(w.Global[id])
		}
		v, first := (local+prev)/classify.Norm(end-before), before
		if n := end - start; n >= classify.LeastAlone && local/classify.Norm(n) > v {
			v, first = local/classify.Norm(n), start
		}
		if i == 0 || v > worst {
			worst, from, to = v, first, end
		}
		prev = local
		before = start
		start = end
	}
	z := denseBoost*float64(w.Bias) + worst
	if n := len(f.IDs); n > 0 {
		z += sum / classify.Norm(n)
	}
	for _, d := range f.Dense {
		z += denseBoost * float64(w.Dense[d])
	}
	return z, from, to
}

// logit is the worst of a text's views.
func logit(w *classify.Weights, e *example) float64 {
	worst := math.Inf(-1)
	for i := range e.views {
		z, _, _ := forward(w, &e.views[i])
		worst = max(worst, z)
	}
	return worst
}

// train fits the weights to the examples.
func train(examples []*example, s settings) *classify.Weights {
	w := classify.NewWeights()
	l := &learner{w: w, settings: s,
		local: make([]float32, len(w.Local)), global: make([]float32, len(w.Global)), dense: make([]float32, len(w.Dense))}
	r := rand.New(rand.NewPCG(s.seed, 1)) //nolint:gosec // meant to repeat
	at := make([]int, len(examples))
	for i := range at {
		at[i] = i
	}
	for epoch := range s.epochs {
		r.Shuffle(len(at), func(i, j int) { at[i], at[j] = at[j], at[i] })
		rate := s.rate * (1 - float64(epoch)/float64(s.epochs))
		for _, i := range at {
			l.step(examples[i], rate)
		}
	}
	return w
}

func (l *learner) step(e *example, rate float64) {
	f := &e.views[0]
	z, from, to := forward(l.w, f)
	p := 1 / (1 + math.Exp(-z))
	g := p
	if e.attack {
		g = p - 1
	}
	g *= float64(e.weight)
	if math.Abs(g) < 1e-3 {
		return
	}
	update := func(w, h []float32, ids []uint32) {
		if len(ids) == 0 {
			return
		}
		u := g / classify.Norm(len(ids))
		for _, id := range ids {
			x := u * boosts[id/half]
			h[id] += float32(x * x)
			w[id] -= float32(rate / (math.Sqrt(float64(h[id])) + 1e-6) * x)
		}
	}
	update(l.w.Local, l.local, f.IDs[from:to])
	update(l.w.Global, l.global, f.IDs)
	g *= denseBoost // the bias is one of them
	for _, d := range f.Dense {
		l.dense[d] += float32(g * g)
		l.w.Dense[d] -= float32(rate / (math.Sqrt(float64(l.dense[d])) + 1e-6) * g)
	}
	l.bias += float32(g * g)
	l.w.Bias -= float32(rate / (math.Sqrt(float64(l.bias)) + 1e-6) * g)
}

// boosts are how much more a feature counts of words than of bytes: there are
// many more of these.
var boosts = [2]float64{4, 1}

// denseBoost is the same for dense features. Less would waste the rules; with
// more the model leans on them, and learns little from words.
const denseBoost = .2
