package corpus

import (
	"hash/fnv"
	"math/rand/v2"
	"strings"
	"testing"
	"unicode"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func generator(t *testing.T, seed uint64) *Generator {
	t.Helper()
	g, err := New(seed)
	if err != nil {
		t.Fatal(err)
	}
	return g
}

func TestSeeds(t *testing.T) {
	sum := func(seed uint64) uint64 {
		g, h := generator(t, seed), fnv.New64a()
		for range 200 {
			_, _ = h.Write([]byte(g.Attack().Text + g.Harmless().Text))
		}
		return h.Sum64()
	}
	if first, again := sum(1), sum(1); first != again {
		t.Error("the same seed gives other texts")
	}
	if sum(1) == sum(2) {
		t.Error("another seed gives the same texts")
	}
}

// TestDiverse holds that few texts come twice, that categories and languages
// occur, and that nothing of the grammar's own is left in them.
func TestDiverse(t *testing.T) {
	g := generator(t, 5)
	seen, kinds, langs := map[string]bool{}, map[string]int{}, map[string]int{}
	twice := 0
	const n = 5000
	for range n {
		for _, x := range []Text{g.Attack(), g.Harmless()} {
			if seen[x.Text] {
				twice++
			}
			seen[x.Text] = true
			langs[x.Lang]++
			kinds[x.Category]++
			if strings.TrimSpace(x.Text) == "" || strings.Contains(x.Text, slot) {
				t.Fatalf("category %s has the text %q", x.Category, x.Text)
			}
		}
	}
	if twice > n/10 {
		t.Errorf("%d of %d texts came twice", twice, 2*n)
	}
	for _, l := range append([]string{"en"}, languages...) {
		if langs[l] < n/200 {
			t.Errorf("%d texts in %s", langs[l], l)
		}
	}
	for _, list := range [][]kind{attacks, harmless} {
		for _, k := range list {
			if kinds[k.category] == 0 {
				t.Errorf("no text of the category %s", k.category)
			}
		}
	}
}

// TestWordings holds that 10,000 texts have many different runs of three words,
// for attacks and harmless texts alike, and that no run of six is in many texts.
func TestWordings(t *testing.T) {
	g := generator(t, 11)
	const n = 5000
	triples, sixes := [2]map[string]bool{{}, {}}, map[string]int{}
	for range n {
		for i, x := range []Text{g.Attack(), g.Harmless()} {
			words := strings.FieldsFunc(x.Text, func(r rune) bool { return !unicode.IsLetter(r) && !unicode.IsDigit(r) })
			seen := map[string]bool{}
			for j := range words {
				if j+3 <= len(words) {
					triples[i][strings.Join(words[j:j+3], " ")] = true
				}
				if j+6 <= len(words) {
					seen[strings.Join(words[j:j+6], " ")] = true
				}
			}
			for run := range seen {
				sixes[run]++
			}
		}
	}
	const least = 80_000
	if a, h := len(triples[0]), len(triples[1]); a < least || h < least {
		t.Errorf("%d runs of three words in %d attacks, %d in as many harmless texts, want %d", a, n, h, least)
	}
	for run, texts := range sixes {
		if texts >= 2*n/100 {
			t.Errorf("%q is in %d of %d texts", run, texts, 2*n)
		}
	}
}

// TestNothingIdle holds that all of the grammar is used.
func TestNothingIdle(t *testing.T) {
	g, err := parsed()
	if err != nil {
		t.Fatal(err)
	}
	used := map[string]bool{"joint": true}
	var visit func(name string)
	var walk func(n node)
	walk = func(n node) {
		if n.refers {
			visit(n.text)
		}
		for _, m := range append(n.choice, n.list...) {
			walk(m)
		}
	}
	done := map[string]bool{}
	visit = func(name string) {
		used[name] = true
		if done[name] {
			return
		}
		done[name] = true
		for _, n := range g[name] {
			walk(n)
		}
	}
	for _, list := range [][]kind{attacks, harmless} {
		for _, k := range list {
			visit(k.start)
			visit(k.slot)
		}
	}
	for _, l := range languages {
		for _, part := range []string{"_attack", "_inject", "_benign", "_inert", "_prose"} {
			if g[l+part] == nil {
				t.Errorf("no @%s", l+part)
			}
			visit(l + part)
		}
	}
	for name := range g {
		if !used[name] {
			t.Errorf("@%s is not used", name)
		}
	}
}

func TestGrammar(t *testing.T) {
	for _, c := range []struct {
		name, text, want string
	}{
		{"plain", "@a\nx y", "x y"},
		{"choice of one", "@a\n{x}", "x"},
		{"nested", "@a\n{{x|x}|x}{|}y", "xy"},
		{"line", "@a\nx|x", "x"},
		{"escapes", "@a\n\\{\\|\\}\\n", "{|}\n"},
		{"reference", "@a\n$b_c!\n@b_c\nz", "z!"},
		{"no reference", "@a\n$5 $", "$5 $"},
		{"raw", "@!a\n{\"k|\": \"$b\"}\\n\n@b\nz", "{\"k|\": \"z\"}\n"},
		{"weight", "@a\n*3 x", "x"},
	} {
		t.Run(c.name, func(t *testing.T) {
			g := make(grammar)
			if err := g.read(c.text); err != nil {
				t.Fatal(err)
			}
			var b strings.Builder
			g.expand(&b, rand.New(rand.NewPCG(1, 1)), "a", 0)
			if b.String() != c.want {
				t.Errorf("%q, want %q", b.String(), c.want)
			}
		})
	}
	for name, text := range map[string]string{"open": "@a\n{x|y", "shut": "@a\nx}", "nameless": "x"} {
		if err := make(grammar).read(text); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

func TestWrap(t *testing.T) {
	g := generator(t, 9)
	for range 300 {
		if w := g.Wrap("the payload"); !strings.Contains(w, "the payload") || w == "the payload" {
			t.Fatalf("wrapped as %q", w)
		}
	}
}
