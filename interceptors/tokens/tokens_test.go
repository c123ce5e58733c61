package tokens

import (
	"math/rand/v2"
	"strings"
	"testing"
	"unicode/utf8"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestCount(t *testing.T) {
	for _, c := range []struct {
		name, text string
		want       int64
	}{
		{"nothing", "", 0},
		{"a word", "hello", 1},
		{"words", "one two\tthree\nfour", 4},
		{"many words", strings.Repeat("a ", 100), 100},
		{"white space around", "  one  ", 1},
		{"a word of 16 bytes", strings.Repeat("a", 16), 1},
		{"a word of 17 bytes", strings.Repeat("a", 17), 2},
		{"a long word", strings.Repeat("a", 1<<20), 1 << 16},
		{"15 spaces", strings.Repeat(" ", 15), 0},
		{"a megabyte of nothing", strings.Repeat("\n", 1<<20), 1 << 16},
		{"characters without spaces", "日本語", 3},
		{"Thai", "ไทย", 3},
		{"Hangul counts by character", "한국어", 3},
		{"mixed", "GPU日本", 3},
		{"an ideographic space", "a\u3000b", 2},
		{"a no-break space", "a\u00a0b", 2},
		{"accents", "grüße", 1},
		{"emoji", "😀", 1},
		{"not UTF-8", "\xff\xfe", 1},
		{"NUL", "\x00", 1},
		{"zero width", "\u200b", 1},
	} {
		t.Run(c.name, func(t *testing.T) {
			if got := Count([]byte(c.text)); got != c.want {
				t.Errorf("got %d, want %d", got, c.want)
			}
		})
	}
}

// alphabet has what tells the branches apart.
var alphabet = []string{"a", "word", " ", "\n", "\t", "\u00a0", "\u3000", "é", "日", "ไ", "😀", "\xff", "\xe6\x97", "\xf0\x9f", "0123456789abcdef", "                "}

func randomText(r *rand.Rand) string {
	var b strings.Builder
	for range r.IntN(30) {
		b.WriteString(alphabet[r.IntN(len(alphabet))])
	}
	return b.String()
}

func TestTheCountDoesNotDependOnTheCuts(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	for range 20000 {
		checkCuts(t, randomText(r), r)
	}
}

func checkCuts(t *testing.T, text string, r *rand.Rand) {
	// What the text ends with may be the beginning of a character: end it.
	text += "."
	want := Count([]byte(text))
	var c Counter
	var got int64
	for rest := text; len(rest) > 0; {
		n := 1 + r.IntN(min(5, len(rest)))
		got += c.Add([]byte(rest[:n]))
		rest = rest[n:]
	}
	if got != want {
		t.Fatalf("%q: %d in pieces, %d whole", text, got, want)
	}
}

func TestMoreTextNeverCostsLess(t *testing.T) {
	r := rand.New(rand.NewPCG(3, 4))
	for range 5000 {
		a, b := randomText(r), randomText(r)
		if Count([]byte(a+b)) < Count([]byte(a)) && utf8.ValidString(a) {
			t.Fatalf("%q costs less than %q", a+b, a)
		}
	}
}

func TestAddAllocatesNothing(t *testing.T) {
	text, half := []byte("one two grüße 日本語 \xe6"), []byte("\x97\xa5 three")
	if n := testing.AllocsPerRun(100, func() {
		var c Counter
		c.Add(text)
		c.Add(half)
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

func FuzzTheCountDoesNotDependOnTheCuts(f *testing.F) {
	f.Add("one two", uint64(1))
	f.Add("\xe6\x97\xa5\xf0\x9f", uint64(2))
	f.Fuzz(func(t *testing.T, text string, seed uint64) {
		checkCuts(t, text, rand.New(rand.NewPCG(seed, 0)))
	})
}

func BenchmarkCount(b *testing.B) {
	text := []byte(strings.Repeat("The quick brown fox jumps over the lazy dog. ", 100))
	b.SetBytes(int64(len(text)))
	for b.Loop() {
		Count(text)
	}
}
