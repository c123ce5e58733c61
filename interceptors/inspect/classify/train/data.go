package main

import (
	"bufio"
	_ "embed"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"

	"github.com/sluicegate/sluice/interceptors/inspect"
	"github.com/sluicegate/sluice/interceptors/inspect/classify"
)

//go:embed words.txt
var wordList string

// words are the classes of words.
var words = func() *classify.Words {
	w, err := classify.ReadWords(wordList, func(s string) string { return string(inspect.Normalize(nil, []byte(s))) })
	if err != nil {
		panic("words.txt: " + err.Error())
	}
	return w
}()

// row is one text of the data.
type row struct {
	ID       string `json:"id"`
	Source   string `json:"source"`
	Label    string `json:"label"`
	Category string `json:"category"`
	Lang     string `json:"lang"`
	Text     string `json:"text"`
}

// example is a text as the model sees it.
type example struct {
	row
	attack bool
	rules  bool // some phrase of the rules is in it
	weight float32
	// views are the text and what it encodes; it is trained on the first alone,
	// and the worst counts.
	views []classify.Features
}

// files are those of the data that an attack detector learns from or is judged
// by. Plain harmful questions are no attacks on a model, nor harmless: left out.
var files = []string{"attack.jsonl", "attack_obfuscated.jsonl", "benign.jsonl", "benign_hard.jsonl"}

func readData(dir string) ([]row, error) {
	var rows []row
	for _, name := range files {
		f, err := os.Open(filepath.Join(dir, name))
		if err != nil {
			return nil, err
		}
		in := bufio.NewScanner(f)
		in.Buffer(nil, 16<<20)
		for n := 1; in.Scan(); n++ {
			var r row
			if err := json.Unmarshal(in.Bytes(), &r); err != nil {
				return nil, fmt.Errorf("%s:%d: %w", name, n, err)
			}
			rows = append(rows, r)
		}
		f.Close()
		if err := in.Err(); err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
	}
	return rows, nil
}

// How much harmless texts weigh, beside attacks with 1: what matters is how few of
// them score high. There are few real ones, and they are what most texts are like.
const (
	realHarmless     = 12
	composedHarmless = 2
)

func newExample(r row) *example {
	hits := classify.Classes(inspect.PhraseClasses([]byte(r.Text)))
	e := &example{row: r, attack: r.Label == "attack", rules: hits != 0, weight: 1}
	switch {
	case e.attack:
	case r.Source == composedSource || mixture(e):
		e.weight = composedHarmless
	default:
		e.weight = realHarmless
	}
	inspect.Views([]byte(r.Text), func(normal []byte) {
		e.views = append(e.views, classify.Extract(normal, words, hits))
		if t := classify.Turned(normal); t != nil {
			e.views = append(e.views, classify.Extract(t, words, hits))
		}
	})
	return e
}
