package main

import (
	"bufio"
	"encoding/csv"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"

	"github.com/sluicegate/sluice/interceptors/config"
	"github.com/sluicegate/sluice/interceptors/inspect"
)

// longestLine bounds a line of input: the largest message and room for JSON's
// escapes.
const longestLine = 6*config.DefaultMaxMessageBytes + 1<<10

// inspectCommand judges texts as prompts.
func inspectCommand(args []string, stdin io.Reader, stdout, stderr io.Writer) int {
	flags := newFlags("inspect", "[--config FILE] [--format jsonl|csv|text] < TEXTS", stderr,
		"Reads JSON lines {\"id\", \"text\"} and prints a JSON line for each, in the same order:\n"+
			"{\"id\", \"verdict\": allow|redact|deny, \"score\": 0 to 1, \"rules\": [ids]}. The text is not repeated.\n"+
			"A CSV file has a line of names first, one of which is text and one may be id; of plain text each line is a\n"+
			"text. Where there is no id it is the number of the text, from 1.")
	file := flags.String("config", "", "take the inspect section of this configuration (default: the starter rules)")
	format := flags.String("format", "jsonl", "of the input: jsonl, csv or text")
	if code, ok := parse(flags, args, 0); !ok {
		return code
	}
	read, ok := map[string]func(io.Reader, func(json.RawMessage, string) error) error{
		"jsonl": eachJSON, "csv": eachCSV, "text": eachLine}[*format]
	if !ok {
		return usageError(stderr, "inspect", "no format %q; take jsonl, csv or text", *format)
	}
	cfg, err := inspectSection(*file)
	if err != nil {
		return fail(stderr, "inspect", err)
	}
	policy, err := inspect.New(cfg, "")
	if err != nil {
		return fail(stderr, "inspect", err)
	}
	out := bufio.NewWriter(stdout)
	enc := json.NewEncoder(out)
	err = read(stdin, func(id json.RawMessage, text string) error {
		v, err := policy.Text([]byte(text))
		if err != nil {
			return err
		}
		return enc.Encode(struct {
			ID json.RawMessage `json:"id"`
			inspect.Verdict
		}{id, v})
	})
	if err := errors.Join(err, out.Flush()); err != nil {
		return fail(stderr, "inspect", err)
	}
	return 0
}

// eachJSON calls judge with the texts of JSON lines {"id", "text"}.
func eachJSON(in io.Reader, judge func(json.RawMessage, string) error) error {
	return lines(in, func(n int, b []byte) error {
		if len(b) == 0 {
			return nil
		}
		var line struct {
			ID   json.RawMessage `json:"id"`
			Text *string         `json:"text"`
		}
		if err := json.Unmarshal(b, &line); err != nil || line.Text == nil {
			return errors.New("want a JSON object with id and text")
		}
		return judge(line.ID, *line.Text)
	})
}

// eachLine calls judge with each line that is not empty.
func eachLine(in io.Reader, judge func(json.RawMessage, string) error) error {
	return lines(in, func(n int, b []byte) error {
		if len(b) == 0 {
			return nil
		}
		return judge(strconv.AppendInt(nil, int64(n), 10), string(b))
	})
}

// lines calls f with each line; an error names it.
func lines(in io.Reader, f func(n int, line []byte) error) error {
	s := bufio.NewScanner(in)
	s.Buffer(make([]byte, 64<<10), longestLine)
	for n := 1; s.Scan(); n++ {
		if err := f(n, s.Bytes()); err != nil {
			return fmt.Errorf("line %d: %w", n, err)
		}
	}
	return s.Err()
}

// eachCSV calls judge with the column text of a CSV file, and the column id if it
// has one.
func eachCSV(in io.Reader, judge func(json.RawMessage, string) error) error {
	r := csv.NewReader(in)
	names, err := r.Read()
	if err != nil {
		return fmt.Errorf("the line of names: %w", err)
	}
	text, id := slices.Index(names, "text"), slices.Index(names, "id")
	if text < 0 {
		return errors.New("line 1: no column is named text")
	}
	for n := 1; ; n++ {
		row, err := r.Read()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err // it names the line
		}
		of := strconv.AppendInt(nil, int64(n), 10)
		if id >= 0 {
			if of, err = json.Marshal(row[id]); err != nil {
				return err
			}
		}
		if err := judge(of, row[text]); err != nil {
			line, _ := r.FieldPos(text)
			return fmt.Errorf("line %d: %w", line, err)
		}
	}
}
