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

// learner holds the weights and AdaGrad's sums of squares.
type learner struct {
	w       *classify.Weights
	buckets []float32 // sums of squared gradients
	dense   []float32
	bias    float32
	settings
}

// window is a part of a text: features, and how many bytes they are of.
type window struct{ from, to, size int }

// forward is the logit of a text, and the window that counted.
func forward(w *classify.Weights, f *classify.Features) (logit float64, most window) {
	var sum, worst, before float64
	var last window
	for i, end := range f.Ends {
		here := window{last.to, end, f.Sizes[i]}
		var local float64
		for _, id := range f.IDs[here.from:here.to] {
			local += boost(id) * float64(w.Buckets[id])
		}
		sum += local
		both := window{last.from, end, here.size + last.size}
		v := (local + before) / float64(classify.Norm(both.size))
		if i > 0 && here.size >= classify.LeastAlone {
			if x := local / float64(classify.Norm(here.size)); x > v {
				v, both = x, here
			}
		}
		if i == 0 || v > worst {
			worst, most = v, both
		}
		before, last = local, here
	}
	z := denseBoost*float64(w.Bias) + classify.WindowShare*worst - float64(classify.Crowd(len(f.Ends)))
	if len(f.IDs) > 0 {
		z += classify.WholeShare * sum / float64(classify.Norm(length(f)))
	}
	for _, d := range f.Dense {
		z += denseBoost * float64(w.Dense[d])
	}
	return z, most
}

// length is that of a text in bytes.
func length(f *classify.Features) (n int) {
	for _, size := range f.Sizes {
		n += size
	}
	return n
}

// logit is the worst of a text's views.
func logit(w *classify.Weights, e *example) float64 {
	worst := math.Inf(-1)
	for i := range e.views {
		z, _ := forward(w, &e.views[i])
		worst = max(worst, z)
	}
	return worst
}

// train fits the weights to the examples.
func train(examples []*example, s settings) *classify.Weights {
	w := classify.NewWeights(words)
	l := &learner{w: w, settings: s, buckets: make([]float32, len(w.Buckets)), dense: make([]float32, len(w.Dense))}
	r := rand.New(rand.NewPCG(s.seed, 1)) //nolint:gosec // meant to repeat
	at := make([]int, len(examples))
	for i := range at {
		at[i] = i
	}
	for epoch := range s.epochs {
		r.Shuffle(len(at), func(i, j int) { at[i], at[j] = at[j], at[i] })
		for n, i := range at {
			done := (float64(epoch) + float64(n)/float64(len(at))) / float64(s.epochs)
			l.step(examples[i], s.rate*max(1-done, .02))
		}
	}
	return w
}

func (l *learner) step(e *example, rate float64) {
	f := &e.views[0]
	z, most := forward(l.w, f)
	p := 1 / (1 + math.Exp(-z))
	g := p
	if e.attack {
		g = p - 1
	}
	g *= float64(e.weight)
	if math.Abs(g) < 1e-3 {
		return
	}
	update := func(ids []uint32, size int, share float64) {
		u := g * share / float64(classify.Norm(size))
		for _, id := range ids {
			x := u * boost(id)
			l.buckets[id] += float32(x * x)
			l.w.Buckets[id] -= float32(rate / (math.Sqrt(float64(l.buckets[id])) + 1e-6) * x)
		}
	}
	update(f.IDs[most.from:most.to], most.size, classify.WindowShare)
	update(f.IDs, length(f), classify.WholeShare)
	g *= denseBoost // the bias is one of them
	for _, d := range f.Dense {
		l.dense[d] += float32(g * g)
		l.w.Dense[d] -= float32(rate / (math.Sqrt(float64(l.dense[d])) + 1e-6) * g)
	}
	l.bias += float32(g * g)
	l.w.Bias -= float32(rate / (math.Sqrt(float64(l.bias)) + 1e-6) * g)
}

// boost is how much more a feature counts than a weight of 1 would have it: words tell
// more than classes of words, of which there are many more features.
func boost(id uint32) float64 {
	if classify.KindOf(id) == classify.WordNgram {
		return 4
	}
	return 2
}

// denseBoost is the same for dense features. Less would waste the rules; with
// more the model leans on them, and learns little from words.
const denseBoost = .2
