package classify

import (
	"math/bits"
	"slices"
)

// Features are what the model sees of a text.
type Features struct {
	// IDs are the buckets of its n-grams, block after block.
	IDs []uint32
	// Ends are where its blocks end in IDs, and Sizes how many bytes they have.
	Ends, Sizes []int
	// Dense are the dense features that it has.
	Dense []uint8
}

// Extract gives the features of a normalised text for which rules of these
// classes fired.
func Extract(normalised []byte, words *Words, hits Classes) Features {
	var f Features
	s := scanner{words: words, sink: &f}
	s.write(normalised)
	s.end()
	set := s.dense(hits)
	for set != 0 {
		f.Dense = append(f.Dense, uint8(bits.TrailingZeros64(set)))
		set &= set - 1
	}
	return f
}

func (f *Features) add(ids []uint32, size int, block bool) {
	f.IDs = append(f.IDs, ids...)
	if block {
		f.Ends, f.Sizes = append(f.Ends, len(f.IDs)), append(f.Sizes, size)
	}
}

// fired are the dense features of rules.
func fired(hits Classes) (set uint64) {
	hits &= 1<<classBits - 1
	set = uint64(hits) << denseHit
	if hits != 0 {
		set |= 1 << denseAny
	}
	if hits&(hits-1) != 0 {
		set |= 1 << denseMany
	}
	return set
}

// dense are the dense features, a bit for each.
func (s *scanner) dense(hits Classes) (set uint64) {
	set = fired(hits)
	if s.data {
		set |= 1 << denseData
	}
	share := func(n, most int) int { return min(most-1, bits.Len(uint(n*64/max(s.length, 1)))) }
	set |= 1 << (denseSigns + share(s.signs, 6))
	set |= 1 << (denseBeyond + share(s.foreign, 4))
	return set
}

// step is what one step of a byte is worth for these weights.
func step(weights []float32) float32 {
	all := make([]float32, 0, len(weights))
	for _, w := range weights {
		all = append(all, max(w, -w))
	}
	slices.Sort(all)
	if top := all[len(all)-1-len(all)/10000]; top > 0 {
		return top / 127
	}
	return 1
}
