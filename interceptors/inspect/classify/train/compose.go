package main

import (
	"math/rand/v2"
	"strings"

	"github.com/sluicegate/sluice/interceptors/inspect/classify/corpus"
)

// composedSource is the source of texts that are of no real one.
const composedSource = "composed"

// composed are texts of the generator.
func composed(n int, seed uint64) ([]row, error) {
	g, err := corpus.New(seed)
	if err != nil {
		return nil, err
	}
	var rows []row
	for range n {
		for _, t := range []corpus.Text{g.Attack(), g.Harmless()} {
			label := "benign"
			if t.Attack {
				label = "attack"
			}
			rows = append(rows, row{Source: composedSource, Label: label, Category: t.Category, Lang: t.Lang, Text: t.Text})
		}
	}
	return rows, nil
}

// mixed are real texts with composed ones in them, and real ones in composed
// wrappers: harmless documents with an injection and with a harmless sentence,
// attacks in a tool's result or an e-mail, and harmless texts in the same.
func mixed(rows []row, seed uint64) ([]row, error) {
	g, err := corpus.New(seed + 1)
	if err != nil {
		return nil, err
	}
	r := rand.New(rand.NewPCG(seed, 7)) //nolint:gosec // meant to repeat
	var out []row
	add := func(of row, label, category, text string) {
		of.Label, of.Category, of.Text = label, "mixed_"+category, text
		out = append(out, of)
	}
	for _, x := range rows {
		if encoded(x.Category) || x.Source == shareAlike {
			continue
		}
		switch {
		case x.Label == "attack" && strings.HasPrefix(x.Category, "injection") && len(x.Text) < 1500:
			if r.IntN(2) == 0 {
				add(x, "attack", "wrapped", g.Wrap(x.Text))
			}
		case x.Label == "benign" && len(x.Text) > 100 && len(x.Text) < 4000:
			for range perDocument {
				add(x, "attack", "injected", insert(r, x.Text, g.Order()))
				add(x, "benign", "inserted", insert(r, x.Text, g.Note()))
			}
		case x.Label == "benign" && len(x.Text) <= 100 && r.IntN(2) == 0:
			add(x, "benign", "wrapped", g.Wrap(x.Text))
		}
	}
	return out, nil
}

// perDocument is how many copies of a harmless document get an order, and as
// many a harmless sentence.
const perDocument = 1

// insert puts a sentence into a text: between two of its sentences, before or
// after it.
func insert(r *rand.Rand, text, sentence string) string {
	var ends []int
	for i := 0; i+1 < len(text); i++ {
		if (text[i] == '.' || text[i] == '?' || text[i] == '!') && text[i+1] == ' ' || text[i] == '\n' {
			ends = append(ends, i+1)
		}
	}
	ends = append(ends, 0, len(text))
	at := ends[r.IntN(len(ends))]
	return text[:at] + " " + sentence + " " + text[at:]
}
