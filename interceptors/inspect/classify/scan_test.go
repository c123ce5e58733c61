package classify

import (
	"math/rand/v2"
	"testing"
)

// TestFeaturesAreWeighed holds that a text weighs, what the features weigh
// that the model is trained with.
func TestFeaturesAreWeighed(t *testing.T) {
	m := shipped()
	alphabet := []string{"ignore ", "all ", "previous ", "instructions", ". ", ", ", "the ", "don't ", "{\"a\": ", "[] <b> ", "é", "的", "😀", "x", " ", "internationalisation ", "7 ", "\xff", "'", "\n"}
	for seed := range uint64(3000) {
		r := rand.New(rand.NewPCG(seed, 1))
		var text []byte
		for range r.IntN(200) {
			text = append(text, alphabet[r.IntN(len(alphabet))]...)
		}
		f := Extract(text, m.words, 0)
		want := sums{model: m}
		from := 0
		for i, end := range f.Ends {
			want.add(f.IDs[from:end], f.Sizes[i], true)
			from = end
		}
		s := scanner{words: m.words, sums: sums{model: m}}
		cut := r.IntN(len(text) + 1)
		s.write(text[:cut])
		s.write(text[cut:])
		s.end()
		if s.sums != want {
			t.Fatalf("%q weighs %+v, its features %+v", text, s.sums, want)
		}
	}
}
