package tokens

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"unicode/utf8"
)

// load reads a tokenizer of the tests; ranks are read as an encoding.
var load = func() func(testing.TB, string) *Tokenizer {
	var mu sync.Mutex
	known := make(map[string]*Tokenizer)
	return func(t testing.TB, name string) *Tokenizer {
		t.Helper()
		mu.Lock()
		defer mu.Unlock()
		if known[name] == nil {
			file, encoding := filepath.Join("testdata", name+".json"), ""
			if _, ok := encodings[name]; ok {
				file, encoding = filepath.Join("testdata", "ranks.tiktoken"), name
			}
			tok, err := ReadFile(file, encoding)
			if err != nil {
				t.Fatal(err)
			}
			known[name] = tok
		}
		return known[name]
	}
}()

var tokenizers = []string{"llama", "splits", "sentencepiece", "gpt2", "digits", "cl100k_base", "o200k_base", "r50k_base"}

// expected is what the libraries that the files are made for say; see testdata/train.py.
type expected struct {
	Texts []string             `json:"texts"`
	IDs   map[string][][]int64 `json:"ids"`
}

func readExpected(t testing.TB) (e expected) {
	t.Helper()
	data, err := os.ReadFile(filepath.Join("testdata", "expected.json"))
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(data, &e); err != nil {
		t.Fatal(err)
	}
	return e
}

func TestTokenizersSayWhatTheirLibrariesSay(t *testing.T) {
	e := readExpected(t)
	for _, name := range tokenizers {
		t.Run(name, func(t *testing.T) {
			tok := load(t, name)
			for n, text := range e.Texts {
				want := e.IDs[name][n]
				if tok.prefix != noPrefix && strings.Contains(text, "|>") {
					// Whether a space is put before or after an added token is not looked at.
					d := tok.Count([]byte(text)) - int64(len(want))
					if most := int64(strings.Count(text, "|>")); d < -most || d > most {
						t.Errorf("%q: %d tokens too many", text, d)
					}
					continue
				}
				if strings.Contains(text, "<|") && encodings[name].pattern != "" {
					continue // there they were told to read added tokens as text
				}
				if got := tok.Encode([]byte(text), nil); !slices.Equal(got, want) {
					t.Errorf("%q:\n got %v\nwant %v", text, got, want)
				}
				if got := tok.Count([]byte(text)); got != int64(len(want)) {
					t.Errorf("%q: counted %d, want %d", text, got, len(want))
				}
			}
		})
	}
}

func TestDecodeIsTheTextAgain(t *testing.T) {
	e := readExpected(t)
	for _, name := range tokenizers {
		t.Run(name, func(t *testing.T) {
			tok := load(t, name)
			for n, text := range e.Texts {
				want := text
				switch {
				case tok.prefix != noPrefix && strings.Contains(text, "|>"):
					continue // they put spaces beside added tokens
				case name == "sentencepiece" && text != "":
					want = " " + strings.ReplaceAll(text, space, " ")
				case name == "gpt2" && text != "" && text[0] != ' ':
					want = " " + text
				}
				got, err := tok.Decode(e.IDs[name][n], []byte("before:"))
				if err != nil {
					t.Fatal(err)
				}
				if string(got) != "before:"+want {
					t.Errorf("got %q, want %q", got, want)
				}
			}
		})
	}
}

func TestDecodeRefusesWhatIsNoToken(t *testing.T) {
	tok := load(t, "llama")
	for _, id := range []int64{-1, int64(len(tok.byID)), 1 << 40} {
		got, err := tok.Decode([]int64{65, id}, nil)
		if err == nil || err.Error() != "token 2 of 2 is not in the vocabulary" {
			t.Errorf("%d: %q, %v", id, got, err)
		}
	}
}

// pieces are what tells the branches of the patterns apart, runs that the window cuts
// among them.
var pieces = []string{"a", "B", "the", " token", "'s", "'ll", "'", "1", "234", " ", "  ", "\n", "\r\n", "\t", "é", "日本", "हि", "e\u0301",
	"😀", "!", " ...", "—", "\u00a0", "\u3000", "\xff", "\xe6\x97", "\xf0\x9f", "\x80", "<", "<|", "<|end|>", "<|start|>", space,
	strings.Repeat("x", 300), strings.Repeat(" ", 280), strings.Repeat("日", 100), strings.Repeat("-", 255), strings.Repeat("7", 300), "camelCase", "HTTP"}

func randomPieces(r *rand.Rand, most int) string {
	var b strings.Builder
	for range r.IntN(most) {
		p := pieces[r.IntN(len(pieces))]
		if len(p) > 100 && r.IntN(4) > 0 {
			p = "-"
		}
		b.WriteString(p)
	}
	return b.String()
}

// checkPrefixes holds that after every chunk the count is that of the text so far.
func checkPrefixes(t *testing.T, tok *Tokenizer, text string, r *rand.Rand) {
	t.Helper()
	c := tok.Counter()
	got := int64(0)
	for at := 0; at < len(text); {
		n := 1 + r.IntN(min(1+r.IntN(20), len(text)-at))
		got += c.Add([]byte(text[at : at+n]))
		at += n
		if want := tok.Count([]byte(text[:at])); got != want {
			t.Fatalf("%q: %d in chunks, %d whole", text[:at], got, want)
		}
		if len(c.tail) > window+maxAdded {
			t.Fatalf("%q: %d bytes are kept", text[:at], len(c.tail))
		}
	}
}

func TestTheCountIsThatOfTheTextSoFar(t *testing.T) {
	for _, name := range tokenizers {
		t.Run(name, func(t *testing.T) {
			tok, r := load(t, name), rand.New(rand.NewPCG(1, 2))
			for range 150 {
				checkPrefixes(t, tok, randomPieces(r, 25), r)
			}
		})
	}
}

// Texts in which the window ends where more text could change what is there.
func TestTheCountWhereTheWindowEnds(t *testing.T) {
	for _, name := range tokenizers {
		tok := load(t, name)
		for _, run := range []string{"-", "x", " ", "\n", "日", "7", "\x01"} {
			for n := window - 6; n < window+6; n++ {
				for _, rest := range []string{"<|end|>", "<|end|><|end|>", "日", "\xe6\x97", " x", "\n\n", "'s"} {
					text := strings.Repeat(run, n/len(run)) + rest
					c := tok.Counter()
					got := c.Add([]byte(text[:len(text)-len(rest)-1]))
					for at := len(text) - len(rest) - 1; at < len(text); at++ {
						got += c.Add([]byte{text[at]})
					}
					if want := tok.Count([]byte(text)); got != want {
						t.Fatalf("%s: %d times %q and %q: %d in chunks, %d whole", name, n/len(run), run, rest, got, want)
					}
				}
			}
		}
	}
}

func TestBreakBeginsAnotherText(t *testing.T) {
	for _, name := range tokenizers {
		tok := load(t, name)
		c := tok.Counter()
		got := c.Add([]byte("the tok"))
		c.Break()
		got += c.Add([]byte("en the"))
		if want := tok.Count([]byte("the tok")) + tok.Count([]byte("en the")); got != want {
			t.Errorf("%s: %d, want %d", name, got, want)
		}
	}
}

func TestCopy(t *testing.T) {
	tok := load(t, "llama")
	a := tok.Counter()
	a.Add([]byte("the tok"))
	b := tok.Counter()
	b.Add([]byte("something else, and much longer than the other"))
	b.Copy(&a)
	a.Add([]byte("XXXXXXXXXXXXXXX")) // in the room that b must not share
	want := tok.Count([]byte("the token")) - tok.Count([]byte("the tok"))
	if got := b.Add([]byte("en")); got != want {
		t.Errorf("got %d, want %d", got, want)
	}
}

func TestFits(t *testing.T) {
	r := rand.New(rand.NewPCG(5, 6))
	for _, name := range tokenizers {
		t.Run(name, func(t *testing.T) {
			tok := load(t, name)
			for range 300 {
				checkFits(t, tok, randomPieces(r, 6), randomPieces(r, 12), int64(r.IntN(30)))
			}
		})
	}
}

// checkFits holds that what fits fits, is whole characters, and is as much as can be.
func checkFits(t *testing.T, tok *Tokenizer, before, text string, most int64) {
	t.Helper()
	c := tok.Counter()
	c.Add([]byte(before))
	cost := func(n int) int64 {
		var d Counter
		d.Copy(&c)
		return d.Add([]byte(text[:n]))
	}
	n := c.Fits([]byte(text), most)
	if n > 0 && cost(n) > most {
		t.Fatalf("%q after %q: %d bytes cost %d, for %d", text, before, n, cost(n), most)
	}
	if n < len(text) && utf8.ValidString(text) && !utf8.ValidString(text[:n]) {
		t.Fatalf("%q: %d bytes end in a character", text, n)
	}
	if utf8.ValidString(before+text) && cost(len(text)) <= most && n < len(text) {
		t.Fatalf("%q after %q: all fits in %d, and %d bytes are taken", text, before, most, n)
	}
	if again := c.Fits([]byte(text), most); again != n {
		t.Fatalf("%q: the counter changed", text)
	}
}

func TestFitsWithoutATokenizer(t *testing.T) {
	var c Counter
	if n := c.Fits([]byte("one two"), 10); n != 0 {
		t.Errorf("%d bytes fit", n)
	}
}

func TestFitsByToken(t *testing.T) {
	tok := load(t, "llama")
	text := []byte(" the budget of a tenant, 日本")
	ids := tok.Encode(text, nil)
	for n := range ids {
		whole, _ := tok.Decode(ids[:n], nil)
		whole = whole[:known(whole)]
		c := tok.Counter()
		if got := c.Fits(text, int64(n)); got != len(whole) {
			t.Errorf("%d tokens: %d bytes, want %d", n, got, len(whole))
		}
	}
}

// merged is what a text is merged to without bounds and without shortcuts.
func merged(tok *Tokenizer, text []byte) int {
	var m merger
	return len(tok.merge(&m, text))
}

func TestALongRunCostsLittleMore(t *testing.T) {
	for _, name := range []string{"llama", "sentencepiece", "o200k_base"} {
		tok := load(t, name)
		for _, unit := range []string{"a", "token", "x", "z", "日", "ab", "Ω"} {
			text := bytes.Repeat([]byte(unit), 4000/len(unit))
			got, want := tok.Count(text), int64(merged(tok, text))
			if d, most := got-want, 3*int64(len(text)/window+1); d < -most || d > most {
				t.Errorf("%s: 4000 bytes of %q are %d tokens, and %d if nothing is cut", name, unit, got, want)
			}
		}
	}
}

// TestWorkIsLinear counts what is done for texts that could make it quadratic.
func TestWorkIsLinear(t *testing.T) {
	for _, name := range tokenizers {
		tok := load(t, name)
		for _, unit := range []string{"a", "A", "aA", " ", " \n", "\n ", "1", "!", "'", "日", "हि", "\u0301", "\x80", "<|", "<|end|>", space, "a" + space} {
			text := bytes.Repeat([]byte(unit), 20000/len(unit))
			steps, longest := 0, 0
			for _, p := range tok.patterns {
				for at := 0; at < len(text); {
					s := search{p: p, text: text[at:min(len(text), at+window)]}
					n := max(1, s.match(p.start, 0))
					steps, longest, at = steps+s.steps, max(longest, s.steps), at+n
				}
			}
			if longest > maxSteps/2 || steps > 40*len(text) {
				t.Errorf("%s: %q: %d steps, %d in one search", name, unit, steps, longest)
			}
			sum := 0
			tok.split(text, len(text)+1, func(piece []byte, _ int32, _ bool) {
				if sum += len(piece); len(piece) > window {
					t.Errorf("%s: %q: a piece of %d bytes", name, unit, len(piece))
				}
			})
			if sum != len(text) {
				t.Errorf("%s: %q: the pieces have %d bytes of %d", name, unit, sum, len(text))
			}
		}
	}
}

func TestSteadyStreamsAllocateNothing(t *testing.T) {
	for _, name := range tokenizers {
		tok := load(t, name)
		c := tok.Counter()
		text, half := []byte(" the budget of a tenant, \xe6"), []byte("\x97\xa5 xyzzyxyzzy 42!")
		c.Add(text)
		least := math.Inf(1)
		for range 50 { // the race detector drops some of what a pool keeps
			least = min(least, testing.AllocsPerRun(1, func() { c.Add(half); c.Add(text) }))
		}
		if least != 0 {
			t.Errorf("%s: %v allocations", name, least)
		}
	}
}

func TestCountersRunAtOnce(t *testing.T) {
	tok := load(t, "llama")
	text := []byte(strings.Repeat("the budget of a tenant is 42 tokens. ", 50))
	want := tok.Count(text)
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for range 20 {
				if got := tok.Count(text); got != want {
					t.Errorf("got %d, want %d", got, want)
				}
			}
		})
	}
	wg.Wait()
}

const small = `{
  "added_tokens": [
    {"id": 4, "content": "<s>"}
  ],
  "normalizer": null,
  "pre_tokenizer": {
    "type": "ByteLevel",
    "add_prefix_space": false
  },
  "model": {
    "type": "BPE",
    "vocab": {
      "a": 0,
      "b": 1,
      "ab": 2,
      "abb": 3
    },
    "merges": [
      "a b",
      ["ab", "b"]
    ]
  }
}`

func TestReadSmall(t *testing.T) {
	tok, err := Read([]byte(small))
	if err != nil {
		t.Fatal(err)
	}
	got := tok.Encode([]byte("abbab<s>ac"), nil)
	if want := []int64{3, 2, 4, 0, -1}; !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
}

func TestReadErrors(t *testing.T) {
	for _, c := range []struct{ name, old, new, want string }{
		{"no JSON", `"merges"`, `merges`, "18: invalid character 'm' looking for beginning of object key string"},
		{"not a tokenizer", `"vocab"`, `"words"`, "10: model.vocab: there is no vocabulary; is this a tokenizer.json?"},
		{"another model", `"BPE"`, `"Unigram"`, `11: model.type: a model of type "Unigram" cannot be used; only BPE can`},
		{"another kind of value", `"type": "BPE"`, `"type": 7`, "11: model.type: a JSON number cannot be used here"},
		{"a vocabulary that is a list", `"a": 0,`, `"a": "x",`, "12: model.vocab: it must name tokens and their ids"},
		{"an id below zero", `"ab": 2`, `"ab": -2`, "15: model.vocab.ab: a token's id must be less than 1048576"},
		{"a large id", `"ab": 2`, `"ab": 99999999`, "15: model.vocab.ab: a token's id must be less than 1048576"},
		{"a merge of an unknown token", `["ab", "b"]`, `["ab", "x"]`, "20: model.merges[1]: the vocabulary does not have a token of it"},
		{"a merge to an unknown token", `["ab", "b"]`, `["ab", "ab"]`, "20: model.merges[1]: the vocabulary does not have the token that it makes"},
		{"a merge of one token", `"a b"`, `"ab"`, "19: model.merges[0]: it must be two tokens, in a list or with a space between them"},
		{"a merge of three", `["ab", "b"]`, `["a", "b", "b"]`, "20: model.merges[1]: it must be two tokens, in a list or with a space between them"},
		{"a merge that is a number", `["ab", "b"]`, `7`, "20: model.merges[1]: it must be two tokens, in a list or with a space between them"},
		{"an added token without text", `"<s>"`, `""`, "3: added_tokens[0].content: an added token must have 1 to 256 bytes"},
		{"an added token with a large id", `"id": 4`, `"id": 4000000`, "3: added_tokens[0].id: a token's id must be less than 1048576"},
		{"a normalizer", `"normalizer": null`, `"normalizer": {"type": "Lowercase"}`, `5: normalizer: a normalizer of type "Lowercase" cannot be used in this way`},
		{"one in a list", `"normalizer": null`, `"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"},` + "\n" + `{"type": "Strip"}]}`,
			`6: normalizer.normalizers[1]: a normalizer of type "Strip" cannot be used in this way`},
		{"a pre-tokenizer", `"ByteLevel"`, `"BertPreTokenizer"`, `6: pre_tokenizer: a pre-tokenizer of type "BertPreTokenizer" cannot be used in this way`},
		{"a space before each piece", `"type": "ByteLevel",
    "add_prefix_space": false`, `"type": "Sequence", "pretokenizers": [{"type": "Digits"},
    {"type": "ByteLevel"}]`, "8: pre_tokenizer.pretokenizers[1].add_prefix_space: a space before each piece cannot be used"},
		{"a pattern", `"type": "ByteLevel"`, `"type": "Split", "behavior": "Isolated", "pattern": {"Regex": "(?<=a)b"}`,
			"7: pre_tokenizer.pattern: this regular expression cannot be used: "},
		{"a behavior", `"type": "ByteLevel"`, `"type": "Split", "behavior": "MergedWithNext", "pattern": {"String": "x"}`,
			`7: pre_tokenizer.behavior: a split with the behavior "MergedWithNext" cannot be used; only Isolated and Removed can`},
		{"a suffix of words", `"type": "BPE"`, `"type": "BPE", "end_of_word_suffix": "</w>"`, "11: model.end_of_word_suffix: a suffix of words cannot be used"},
		{"a prefix of subwords", `"type": "BPE"`, `"type": "BPE", "continuing_subword_prefix": "##"`, "11: model.continuing_subword_prefix: a prefix of subwords cannot be used"},
	} {
		t.Run(c.name, func(t *testing.T) {
			if strings.Count(small, c.old) != 1 {
				t.Fatalf("%q is not there once", c.old)
			}
			file := filepath.Join(t.TempDir(), "tokenizer.json")
			if err := os.WriteFile(file, []byte(strings.Replace(small, c.old, c.new, 1)), 0o600); err != nil {
				t.Fatal(err)
			}
			_, err := ReadFile(file, "")
			if err == nil || !strings.HasPrefix(err.Error(), file+":"+c.want) {
				t.Errorf("got %v\nwant %s:%s", err, file, c.want)
			}
			var e *Error
			if !errors.As(err, &e) || e.Line == 0 {
				t.Errorf("it is no Error with a line")
			}
		})
	}
}

func TestReadRanksErrors(t *testing.T) {
	var all strings.Builder
	for b := range 256 {
		fmt.Fprintf(&all, "%s %d\n", b64(string([]byte{byte(b)})), b)
	}
	for _, c := range []struct{ name, text, want string }{
		{"no base64", "!! 300", "257: a line must be a token in base64, a space, and its rank"},
		{"no rank", b64("ab"), "257: a line must be a token in base64, a space, and its rank"},
		{"an empty token", " 300", "257: a line must be a token in base64, a space, and its rank"},
		{"a rank twice", b64("ab") + " 7", "257: there is another token of the rank 7"},
		{"a token twice", b64("a") + " 300", "257: there is another line of this token"},
		{"a large rank", b64("ab") + " 9999999", "257: a token's rank must be less than 1048576"},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, err := ReadRanks([]byte(all.String()+c.text+"\n"), "cl100k_base")
			if err == nil || err.Error() != c.want {
				t.Errorf("got %v, want %s", err, c.want)
			}
		})
	}
	if _, err := ReadRanks([]byte(b64("a")+" 0\n"), "cl100k_base"); err == nil || !strings.Contains(err.Error(), "is no token") {
		t.Errorf("a file without all bytes: %v", err)
	}
	if _, err := ReadRanks(nil, "cl9"); err == nil || !strings.Contains(err.Error(), `no tiktoken encoding "cl9"; use one of cl100k_base, `) {
		t.Errorf("an unknown encoding: %v", err)
	}
}

func b64(text string) string {
	b, _ := json.Marshal([]byte(text))
	return strings.Trim(string(b), `"`)
}

func TestReadFileErrors(t *testing.T) {
	if _, err := ReadFile(filepath.Join(t.TempDir(), "none.json"), ""); !errors.Is(err, os.ErrNotExist) {
		t.Error(err)
	}
	big := filepath.Join(t.TempDir(), "big.json")
	if err := os.WriteFile(big, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(big, maxFile+1); err != nil {
		t.Fatal(err)
	}
	if _, err := ReadFile(big, ""); err == nil || !strings.Contains(err.Error(), "larger than 128 MiB") {
		t.Error(err)
	}
}

// FuzzRead holds that a file is refused or can be used, and then counts the same
// however a text is cut.
func FuzzRead(f *testing.F) {
	f.Add([]byte(small), "abab<s> b", uint64(1))
	for _, name := range []string{"llama", "sentencepiece", "splits", "gpt2", "digits"} {
		data, err := os.ReadFile(filepath.Join("testdata", name+".json"))
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data, "The budget of 42 tokens, 日本語 <|end|>", uint64(2))
	}
	f.Fuzz(func(t *testing.T, data []byte, text string, seed uint64) {
		tok, err := Read(data)
		if err != nil || len(text) > 1000 {
			return
		}
		checkPrefixes(t, tok, text, rand.New(rand.NewPCG(seed, 0)))
		_, _ = tok.Decode(tok.Encode([]byte(text), nil), nil)
	})
}

func FuzzReadRanks(f *testing.F) {
	data, err := os.ReadFile(filepath.Join("testdata", "ranks.tiktoken"))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(data, "The budget")
	f.Fuzz(func(t *testing.T, data []byte, text string) {
		if tok, err := ReadRanks(data, "cl100k_base"); err == nil {
			tok.Count([]byte(text))
		}
	})
}

// FuzzTokenizer holds that the count does not depend on the cuts, and that what
// fits fits.
func FuzzTokenizer(f *testing.F) {
	f.Add("The budget of 42 tokens,\r\n\r\n 日本語 <|end|>'s", uint8(0), uint64(1), uint8(3))
	f.Add(strings.Repeat("x", 600)+" \n\n  \t", uint8(1), uint64(2), uint8(9))
	f.Add("\xff\xe6\x97 \xf0\x9f", uint8(2), uint64(3), uint8(1))
	f.Fuzz(func(t *testing.T, text string, which uint8, seed uint64, most uint8) {
		if len(text) > 2000 {
			return
		}
		tok, r := load(t, tokenizers[int(which)%len(tokenizers)]), rand.New(rand.NewPCG(seed, 0))
		checkPrefixes(t, tok, text, r)
		at := r.IntN(len(text) + 1)
		checkFits(t, tok, text[:at], text[at:], int64(most))
	})
}

func BenchmarkTokenizer(b *testing.B) {
	prose := strings.Repeat("A budget is an amount in a window of time, and has one account for each of its keys. ", 50)
	for _, name := range []string{"llama", "sentencepiece", "splits"} {
		tok := load(b, name)
		for _, c := range []struct {
			name string
			text string
		}{{"200", prose[:200]}, {"4096", prose[:4096]}, {"one letter", strings.Repeat("a", 4096)}} {
			b.Run(name+"/"+c.name, func(b *testing.B) {
				b.ReportAllocs()
				b.SetBytes(int64(len(c.text)))
				for b.Loop() {
					tok.Count([]byte(c.text))
				}
			})
		}
		b.Run(name+"/stream", func(b *testing.B) {
			b.ReportAllocs()
			c, at := tok.Counter(), 0
			text := []byte(prose)
			for b.Loop() {
				if at+5 > len(text) {
					at = 0
					c.Break()
				}
				c.Add(text[at : at+5])
				at += 5
			}
		})
	}
}
