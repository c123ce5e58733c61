package inspect

import (
	"encoding/base64"
	"encoding/hex"
	"math/rand/v2"
	"testing"
)

// TestNoise sends what has no meaning, a megabyte of each kind, as programs do that
// measure a gateway: nothing is read into it.
func TestNoise(t *testing.T) {
	const size = 1 << 20
	from := func(alphabet string) func(*rand.Rand) string {
		return func(r *rand.Rand) string {
			b := make([]byte, size)
			for i := range b {
				b[i] = alphabet[r.IntN(len(alphabet))]
			}
			return string(b)
		}
	}
	bytes := func(r *rand.Rand) []byte {
		b := make([]byte, size*3/4)
		for i := range b {
			b[i] = byte(r.Uint32())
		}
		return b
	}
	const letters = "abcdefghijklmnopqrstuvwxyz"
	p := newPolicy(t, nil)
	for _, c := range []struct {
		name string
		make func(*rand.Rand) string
	}{
		{"frequent letters", from(" etaoinshrdlu")},
		{"letters", from(" " + letters)},
		{"letters without a space", from(letters)},
		{"digits", from(" 0123456789")},
		{"base64", func(r *rand.Rand) string { return base64.StdEncoding.EncodeToString(bytes(r)) }},
		{"hex", func(r *rand.Rand) string { return hex.EncodeToString(bytes(r)) }},
		{"one letter", from("a")},
		{"bytes", func(r *rand.Rand) string { return string(bytes(r)) }},
	} {
		t.Run(c.name, func(t *testing.T) {
			for seed := range uint64(3) {
				text := c.make(rand.New(rand.NewPCG(seed, 1))) //nolint:gosec // the same texts each time
				if v, err := p.Text([]byte(text)); err != nil || v.Verdict != "allow" {
					t.Errorf("seed %d: %+v, %v", seed, v, err)
				}
			}
		})
	}
}
