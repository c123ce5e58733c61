package config

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	configv1 "github.com/sluicegate/sluice/proto/gen/sluice/config/v1"
)

func TestTokenizerErrors(t *testing.T) {
	dir := folder(t)
	write := func(name, text string) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("unigram.json", "{\n  \"model\": {\n    \"type\": \"Unigram\",\n    \"vocab\": {\"a\": 0}\n  }\n}\n")
	write("broken.json", "{\n  \"model\": {,\n")
	write("ranks.tiktoken", "IQ== 0\nIg== x\n")
	for _, test := range []struct{ name, tokenizer, want string }{
		{"no models", "{file: x.json}", ":2:3 tokenizers[0].models: must contain at least 1 item"},
		{"no file", "{models: [llama]}", " tokenizers[0].file: must be at least 1 characters"},
		{"a file that is not there", "{models: [llama], file: none.json}", ":2:27 tokenizers[0].file: stat " + dir + "/none.json: no such file"},
		{"a model that is none of ours", "{models: [llama], file: unigram.json}",
			":2:27 tokenizers[0].file: " + dir + `/unigram.json:3: model.type: a model of type "Unigram" cannot be used; only BPE can`},
		{"a file that is broken", "{models: [llama], file: broken.json}", ":2:27 tokenizers[0].file: " + dir + "/broken.json:2: invalid character ','"},
		{"ranks that are broken", "{models: [llama], file: ranks.tiktoken, encoding: cl100k_base}",
			":2:27 tokenizers[0].file: " + dir + "/ranks.tiktoken:2: a line must be a token in base64"},
		{"an encoding that is none", "{models: [llama], file: ranks.tiktoken, encoding: cl9}",
			":2:53 tokenizers[0].encoding: there is no tiktoken encoding \"cl9\"; use one of cl100k_base, "},
	} {
		t.Run(test.name, func(t *testing.T) {
			err := check(t, dir, "tokenizers:\n- "+test.tokenizer+"\n"+good)
			want := filepath.Join(dir, "sluice.yaml") + ":" + strings.TrimPrefix(test.want, ":")
			if strings.HasPrefix(test.want, " ") {
				want = test.want
			}
			if err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("got  %v\nwant %s", err, want)
			}
		})
	}
}

func TestTokenizersAreChosenByModel(t *testing.T) {
	file := filepath.Join(t.TempDir(), "tokenizer.json")
	data, err := os.ReadFile("../tokens/testdata/llama.json")
	if err != nil {
		t.Fatal(err)
	}
	write := func() {
		t.Helper()
		if err := os.WriteFile(file, data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write()
	list := []*configv1.Tokenizer{
		{Models: []string{"a", "org/llama-*-8b"}, File: "../tokens/testdata/gpt2.json"},
		{Models: []string{"b*"}, File: file},
		{Models: []string{"c"}, File: "../tokens/testdata/ranks.tiktoken", Encoding: "cl100k_base"},
		{Models: []string{"d"}, File: "../tokens/testdata/ranks.tiktoken", Encoding: "o200k_base"},
	}
	first, err := tokenizers(list, nil)
	if err != nil {
		t.Fatal(err)
	}
	g := &Guard{tokenizers: first}
	for model, want := range map[string]int{"a": 0, "org/llama-3.1-8b": 0, "org/llama-8b": -1, "b": 1, "bee": 1, "c": 2, "d": 3, "": -1, "e": -1} {
		got := g.tokenizer(model)
		if want < 0 && got != nil || want >= 0 && got != first[want].Tokenizer {
			t.Errorf("%q: not the tokenizer %d", model, want)
		}
	}
	// What did not change is not read again, and what did is.
	list[1].Models = []string{"other"}
	second, err := tokenizers(list, first)
	if err != nil {
		t.Fatal(err)
	}
	for n := range list {
		if second[n].Tokenizer != first[n].Tokenizer {
			t.Errorf("%d was read again", n)
		}
	}
	write()
	if err := os.Chtimes(file, time.Time{}, time.Now().Add(time.Hour)); err != nil {
		t.Fatal(err)
	}
	third, err := tokenizers(list, second)
	if err != nil {
		t.Fatal(err)
	}
	if third[1].Tokenizer == first[1].Tokenizer || third[0].Tokenizer != first[0].Tokenizer {
		t.Error("a file that changed must be read again, and no other")
	}
}

func TestNames(t *testing.T) {
	for _, c := range []struct {
		name, model string
		want        bool
	}{
		{"a", "a", true}, {"a", "ab", false}, {"*", "", true}, {"*", "a/b", true}, {"a*", "a", true}, {"a*", "ba", false},
		{"*a", "ba", true}, {"*a", "ab", false}, {"a*b", "ab", true}, {"a*b", "a", false}, {"a*a", "a", false},
		{"a*b*c", "aXbYc", true}, {"a*b*c", "aXcYb", false}, {"a*b*c", "abbc", true}, {"", "", true},
	} {
		if names(c.name, c.model) != c.want {
			t.Errorf("%q names %q: want %t", c.name, c.model, c.want)
		}
	}
}
