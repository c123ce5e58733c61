package main

import (
	"fmt"
	"io"
	"os"

	"github.com/sluicegate/sluice/gateway/cmd/sluice/internal/scorecard"
	"github.com/sluicegate/sluice/interceptors/inspect"
	configv1 "github.com/sluicegate/sluice/proto/gen/sluice/config/v1"
)

// evalCommand measures the inspection with texts whose verdict is known.
func evalCommand(args []string, stdout, stderr io.Writer) int {
	flags := newFlags("eval", "--data DIR [--config FILE] [--html FILE] [--json FILE]", stderr,
		"Judges the texts in DIR/*.jsonl, JSON lines {\"id\", \"source\", \"label\": benign|attack|pii|secret, \"category\", \"text\"},\n"+
			"and prints how much of each category is found at which share of false positives, and how long it takes.\n"+
			"No text is repeated, in no file.")
	data := flags.String("data", "", "folder of the texts")
	file := flags.String("config", "", "take the inspect section of this configuration (default: the starter rules)")
	html := flags.String("html", "", "write a report with curves to this file")
	json := flags.String("json", "", "write all figures to this file")
	if code, ok := parse(flags, args, 0); !ok {
		return code
	}
	if *data == "" {
		return usageError(stderr, "eval", "--data names the folder of the texts")
	}
	judge, err := newJudge(*file)
	if err != nil {
		return fail(stderr, "eval", err)
	}
	card, err := scorecard.Measure(os.DirFS(*data), judge)
	if err != nil {
		return fail(stderr, "eval", fmt.Errorf("%s: %w", *data, err))
	}
	for _, out := range []struct {
		name  string
		write func(io.Writer) error
	}{{*html, card.HTML}, {*json, card.JSON}} {
		if out.name == "" {
			continue
		}
		f, err := os.Create(out.name)
		if err == nil {
			err = out.write(f)
			if e := f.Close(); err == nil {
				err = e
			}
		}
		if err != nil {
			return fail(stderr, "eval", err)
		}
	}
	if err := card.Text(stdout); err != nil {
		return fail(stderr, "eval", err)
	}
	return 0
}

// newJudge makes the judge of texts: the rules of a configuration, and the
// detectors of personal data and of secrets each by itself.
func newJudge(file string) (scorecard.Judge, error) {
	cfg, err := inspectSection(file)
	if err != nil {
		return nil, err
	}
	policy, err := inspect.New(cfg, "")
	if err != nil {
		return nil, err
	}
	personal, err := inspect.New(&configv1.Inspect{NoStarterRules: true, Rules: "Include @sluice/personal.conf"}, "")
	if err != nil {
		return nil, err
	}
	secrets, err := inspect.New(&configv1.Inspect{NoStarterRules: true, Rules: "Include @sluice/secrets.conf"}, "")
	if err != nil {
		return nil, err
	}
	return func(text []byte, took func()) (j scorecard.Judgement, err error) {
		v, err := policy.Text(text)
		if err != nil {
			return j, err
		}
		took()
		j.Denied, j.Score = v.Verdict == "deny", v.Score
		if v, err = personal.Text(text); err != nil {
			return j, err
		}
		j.Personal = v.Verdict != "allow"
		if v, err = secrets.Text(text); err != nil {
			return j, err
		}
		j.Secret = v.Verdict != "allow"
		return j, nil
	}, nil
}
