package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"

	"github.com/sluicegate/sluice/interceptors/config"
	"github.com/sluicegate/sluice/interceptors/inspect"
	configv1 "github.com/sluicegate/sluice/proto/gen/sluice/config/v1"
)

// longestLine bounds a line of input: the largest message and room for JSON's
// escapes.
const longestLine = 6*config.DefaultMaxMessageBytes + 1<<10

// inspectCommand judges texts as prompts.
func inspectCommand(args []string, stdin io.Reader, stdout, stderr io.Writer) int {
	flags := newFlags("inspect", "[--config FILE] < JSONL", stderr,
		"Reads JSON lines {\"id\", \"text\"} and prints a JSON line for each, in the same order:\n"+
			"{\"id\", \"verdict\": allow|redact|deny, \"score\": 0 to 1, \"rules\": [ids]}. The text is not repeated.")
	file := flags.String("config", "", "take the inspect section of this configuration (default: the starter rules)")
	if code, ok := parse(flags, args, 0); !ok {
		return code
	}
	cfg := new(configv1.Inspect)
	if *file != "" {
		whole, err := config.Read(*file)
		if err != nil {
			return fail(stderr, "inspect", err)
		}
		if cfg = whole.GetInspect(); cfg == nil {
			return usageError(stderr, "inspect", "%s has no inspect section", *file)
		}
	}
	policy, err := inspect.New(cfg, "")
	if err != nil {
		return fail(stderr, "inspect", err)
	}
	in := bufio.NewScanner(stdin)
	in.Buffer(make([]byte, 64<<10), longestLine)
	out := bufio.NewWriter(stdout)
	enc := json.NewEncoder(out)
	for n := 1; in.Scan(); n++ {
		if len(in.Bytes()) == 0 {
			continue
		}
		var line struct {
			ID   json.RawMessage `json:"id"`
			Text *string         `json:"text"`
		}
		if err := json.Unmarshal(in.Bytes(), &line); err != nil || line.Text == nil {
			_ = out.Flush()
			return fail(stderr, "inspect", fmt.Errorf("line %d: want a JSON object with id and text", n))
		}
		v, err := policy.Text([]byte(*line.Text))
		if err != nil {
			_ = out.Flush()
			return fail(stderr, "inspect", fmt.Errorf("line %d: %w", n, err))
		}
		err = enc.Encode(struct {
			ID json.RawMessage `json:"id"`
			inspect.Verdict
		}{line.ID, v})
		if err != nil {
			return fail(stderr, "inspect", err)
		}
	}
	if err := in.Err(); err != nil {
		return fail(stderr, "inspect", err)
	}
	if err := out.Flush(); err != nil {
		return fail(stderr, "inspect", err)
	}
	return 0
}
