// Package classify scores how much a text looks like an attack on a language
// model: a linear model over hashed n-grams of words and of classes of words, with
// the rules that fired as features.
//
// The model reads the normalised text in one pass, in constant memory and
// without allocating. The mean weight of the whole text counts, and that of the
// worst of the windows of about two dozen words that it is made of. So a sentence
// hidden in a long document is seen, though it weighs less than if it stood alone.
//
// The weights are made by the program in train, from public data and from the
// texts that package corpus composes; DATASHEET.md says of what and how well.
package classify

import (
	_ "embed"
	"math"
	"math/bits"
	"sync"
)

// Classes are the classes of rules that fired on a text, a bit for each.
type Classes uint16

// The classes.
const (
	Hidden Classes = 1 << iota
	Injection
	Extraction
	Jailbreak
	Exfiltration
	Tool

	classBits = 6
)

//go:embed weights.bin
var weights []byte

var shipped = sync.OnceValue(func() *Model {
	m, err := Load(weights)
	if err != nil {
		panic("classify: weights.bin: " + err.Error())
	}
	return m
})

// Score judges a whole normalised text with the embedded model. See
// [Model.Score].
func Score(normalised []byte, hits Classes) float32 { return shipped().Score(normalised, hits) }

// Score judges a whole normalised text for which rules of these classes fired,
// from 0 to 1: of benign texts, about 10^-4s reach a score of s. So .5 stands
// for one benign text in a hundred, .75 for one in a thousand.
func (m *Model) Score(normalised []byte, hits Classes) float32 {
	return m.Calibrate(m.Logit(normalised, hits))
}

// Logit is the sum of weights behind a score. English written backwards, or with
// its letters moved by thirteen, is also read turned back: what it says counts if
// it is worse.
func (m *Model) Logit(normalised []byte, hits Classes) float32 {
	s := scanner{words: m.words, sums: sums{model: m}}
	s.write(normalised)
	s.end()
	z := s.logit(hits)
	if t := s.turned(normalised); t != nil {
		s = scanner{words: m.words, sums: sums{model: m}}
		s.write(t)
		s.end()
		z = max(z, s.logit(hits))
	}
	return z
}

// Logit is the sum of weights of a whole normalised text with the embedded
// model, without those of rules: see [Judge].
func Logit(normalised []byte) float32 { return shipped().Logit(normalised, 0) }

// Judge is the score of a text whose views have the sum logit at most, and for
// which rules of these classes fired: what [Score] gives for the worst of them.
func Judge(logit float32, hits Classes) float32 {
	m := shipped()
	return m.Calibrate(logit + m.weigh(fired(hits)))
}

// shortest is added to the length of texts: less would have a word or two be
// sure of what they are.
const shortest = 12

// few is how many bytes a text must have to be judged by all of its weights: of one that is
// shorter as much counts as it has of them. Three short words are too little to refuse anybody for.
const few = 24

// Norm is what the sum over a text of n bytes is divided by. It is close to their
// number: a little more is made of longer texts, which say more.
func Norm(n int) float32 {
	if n < len(norms) {
		return norms[n]
	}
	return norm(n)
}

func norm(n int) float32 { return float32(math.Pow(4*float64(n+shortest), .95)) }

// norms are those of windows.
var norms = func() (t [2 * (blockBytes + 1)]float32) {
	for n := range t {
		t[n] = norm(n)
	}
	return t
}()

// Threshold is the score that a share of benign texts reaches. The shares were
// measured on sources that the model had not learned from, and doubled.
func Threshold(rate float64) float32 { return -float32(math.Log10(rate)) / 4 }

// The shares of benign texts that may be refused, for [Threshold]: of what a
// user writes, and of what a model is given to read (documents, results of
// tools), which has less reason to speak to a model.
const (
	UserRate     = .005
	DocumentRate = .01
)

// LeastAlone is how many bytes a block must have to be a window by itself: a few
// words say too little.
const LeastAlone = 90

// A text is as bad as its worst window and the whole of it, by these shares.
// The window has more, since of a document that hides an attack little is one; the
// whole has its part, since what is harmless in most places mostly is so in all.
// The more windows a text has, the higher the worst of them is by chance: about with
// the logarithm of their number.
const (
	WindowShare = 1.4
	WholeShare  = .6

	perFold = .1
)

// Crowd is what the sum of a text of so many blocks is lowered by.
func Crowd(blocks int) float32 {
	if blocks <= 2 {
		return 0
	}
	return perFold * float32(math.Log(float64(blocks)/2))
}

// sums are the weights of a text so far.
type sums struct {
	model  *Model
	block  int32    // of this block
	before [2]int32 // weights and bytes of the block before
	blocks int
	worst  float32 // of the windows, without scale
	whole  int64
}

func (s *sums) add(ids []uint32, size int, block bool) {
	t, sum := s.model.table, s.block
	for len(ids) >= 4 {
		sum += int32(int8(t[ids[0]])) + int32(int8(t[ids[1]])) + int32(int8(t[ids[2]])) + int32(int8(t[ids[3]]))
		ids = ids[4:]
	}
	for _, id := range ids {
		sum += int32(int8(t[id]))
	}
	s.block = sum
	if block {
		s.close(size)
	}
}

// close ends a block of so many bytes: with the one before it, it is a window.
func (s *sums) close(size int) {
	v := float32(s.block+s.before[0]) / Norm(size+int(s.before[1]))
	if s.blocks > 0 && size >= LeastAlone {
		v = max(v, float32(s.block)/Norm(size))
	}
	if s.blocks == 0 || v > s.worst {
		s.worst = v
	}
	s.blocks++
	s.whole += int64(s.block)
	s.before = [2]int32{s.block, int32(size)}
	s.block = 0
}

// logit is the sum for the text that was written.
func (s *scanner) logit(hits Classes) float32 {
	m := s.sums.model
	sum := WindowShare * s.sums.worst
	if s.length > 0 {
		sum += WholeShare * float32(s.sums.whole) / Norm(s.length)
	}
	if s.length < few {
		sum *= float32(s.length) / few
	}
	return m.bias + m.scale*sum - Crowd(s.sums.blocks) + m.weigh(s.dense(hits))
}

// weigh is the sum of a set of dense features.
func (m *Model) weigh(set uint64) (sum float32) {
	for ; set != 0; set &= set - 1 {
		sum += m.dense[bits.TrailingZeros64(set)]
	}
	return sum
}

// Calibrate is the score of a sum of weights.
func (m *Model) Calibrate(logit float32) float32 {
	k := m.knots
	at := func(i int) float32 { return max(0, Threshold(float64(k[i].Rate))) }
	if logit <= k[0].Logit {
		return at(0) / (1 + k[0].Logit - logit)
	}
	for i := 1; i < len(k); i++ {
		if logit <= k[i].Logit {
			part := (logit - k[i-1].Logit) / (k[i].Logit - k[i-1].Logit)
			return at(i-1) + part*(at(i)-at(i-1))
		}
	}
	top := at(len(k) - 1) // beyond what was measured it nears 1
	return 1 - (1-top)/(1+(logit-k[len(k)-1].Logit)/4)
}
