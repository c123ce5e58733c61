package tokens

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strings"
)

// Bounds on a file, all several times those of the largest vocabularies in use (262,144 tokens,
// 33 MB). Chosen.
const (
	maxFile  = 128 << 20
	maxToken = 1 << 20 // ids
	maxAdded = 256     // bytes of an added token
)

// Error is what is wrong with the file of a tokenizer.
type Error struct {
	// File is the name of the file; "" where it was not read by name.
	File string
	// Line is the line of the file, from 1; 0 if that is not known.
	Line int
	// Field is the path to what is wrong, such as "model.merges[7]"; "" if it is the
	// whole file.
	Field string
	// Err says what is wrong with it.
	Err error

	path []any
}

func (e *Error) Error() string {
	var b strings.Builder
	if e.File != "" {
		b.WriteString(e.File + ":")
	}
	if e.Line > 0 {
		fmt.Fprintf(&b, "%d:", e.Line)
	}
	if b.Len() > 0 {
		b.WriteByte(' ')
	}
	if e.Field != "" {
		b.WriteString(e.Field + ": ")
	}
	return b.String() + e.Err.Error()
}

func (e *Error) Unwrap() error { return e.Err }

// wrong is an error in a field of a file: its path is of names and indices.
func wrong(err error, path ...any) *Error {
	e := &Error{Err: err, path: path}
	for n, p := range path {
		switch p := p.(type) {
		case int:
			e.Field += fmt.Sprintf("[%d]", p)
		case string:
			if n > 0 {
				e.Field += "."
			}
			e.Field += p
		}
	}
	return e
}

// ReadFile reads the file of a tokenizer: tokenizer.json of Hugging Face with a model of
// type BPE, or, if an encoding is named, the ranks of that tiktoken encoding
// (cl100k_base.tiktoken and the like). An error names the file, the line and the field;
// it is an [Error] where the file could be read.
func ReadFile(name, encoding string) (*Tokenizer, error) {
	info, err := os.Stat(name)
	if err != nil {
		return nil, err
	}
	if info.Size() > maxFile {
		return nil, fmt.Errorf("%s: the file is larger than %d MiB", name, maxFile>>20)
	}
	data, err := os.ReadFile(name)
	if err != nil {
		return nil, err
	}
	read := Read
	if encoding != "" {
		read = func(data []byte) (*Tokenizer, error) { return ReadRanks(data, encoding) }
	}
	t, err := read(data)
	if err != nil {
		var e *Error
		if errors.As(err, &e) {
			e.File = name
		}
		return nil, err
	}
	return t, nil
}

// Read reads a tokenizer.json. The error is an [Error].
func Read(data []byte) (*Tokenizer, error) {
	var f file
	if err := json.Unmarshal(data, &f); err != nil {
		return nil, invalid(data, err)
	}
	r := reader{file: &f, t: &Tokenizer{added: newAdded()}}
	if err := r.read(); err != nil {
		err.Line = line(data, err.path)
		return nil, err
	}
	return r.t, nil
}

// file is what of a tokenizer.json counts.
type file struct {
	Added []struct {
		ID      int64  `json:"id"`
		Content string `json:"content"`
	} `json:"added_tokens"`
	Normalizer *step `json:"normalizer"`
	Splitter   *step `json:"pre_tokenizer"`
	Model      struct {
		Type          *string         `json:"type"`
		SubwordPrefix string          `json:"continuing_subword_prefix"`
		WordSuffix    string          `json:"end_of_word_suffix"`
		FusesUnknown  bool            `json:"fuse_unk"`
		ByteFallback  bool            `json:"byte_fallback"`
		IgnoresMerges bool            `json:"ignore_merges"`
		Vocabulary    json.RawMessage `json:"vocab"`
		Merges        []merge         `json:"merges"`
	} `json:"model"`
}

// step is a normalizer or a pre-tokenizer: each has some of the fields.
type step struct {
	Type           string  `json:"type"`
	Normalizers    []step  `json:"normalizers"`
	Splitters      []step  `json:"pretokenizers"`
	Prepend        string  `json:"prepend"`
	Content        string  `json:"content"`
	Pattern        literal `json:"pattern"`
	Behavior       string  `json:"behavior"`
	AddPrefixSpace *bool   `json:"add_prefix_space"`
	UseRegex       *bool   `json:"use_regex"`
	Individual     bool    `json:"individual_digits"`
	Replacement    string  `json:"replacement"`
	PrependScheme  *string `json:"prepend_scheme"`
	Split          *bool   `json:"split"`
}

type literal struct {
	Regex  *string
	String *string
}

// merge is two tokens, in an array or in a string with a space between them. Both are "" if it is
// neither.
type merge [2]string

func (m *merge) UnmarshalJSON(b []byte) error {
	var list []string
	if len(b) > 0 && b[0] == '[' {
		_ = json.Unmarshal(b, &list)
	} else {
		var s string
		_ = json.Unmarshal(b, &s)
		list = strings.SplitN(s, " ", 2)
	}
	if len(list) == 2 {
		*m = merge(list)
	}
	return nil
}

// invalid says where a file is no JSON, or not of the form.
func invalid(data []byte, err error) *Error {
	e := &Error{Err: err}
	var syntax *json.SyntaxError
	var kind *json.UnmarshalTypeError
	switch {
	case errors.As(err, &syntax):
		e.Line = 1 + bytes.Count(data[:min(int(syntax.Offset), len(data))], []byte{'\n'})
	case errors.As(err, &kind):
		e.Line = 1 + bytes.Count(data[:min(int(kind.Offset), len(data))], []byte{'\n'})
		e.Field, e.Err = kind.Field, fmt.Errorf("a JSON %s cannot be used here", kind.Value)
	}
	return e
}

// line is the line of the value at a path, or of the innermost one around it that there is.
func line(data []byte, path []any) int {
	dec := json.NewDecoder(bytes.NewReader(data))
	at := int64(0)
	for _, p := range path {
		open, err := dec.Token()
		if err != nil || open != json.Delim('{') && open != json.Delim('[') {
			break
		}
		found := false
		for n := 0; dec.More() && !found; n++ {
			var key any = n
			if open == json.Delim('{') {
				if key, err = dec.Token(); err != nil {
					break
				}
			}
			if found = key == p; !found {
				var skipped json.RawMessage
				if dec.Decode(&skipped) != nil {
					break
				}
			}
		}
		if !found {
			break
		}
		at = dec.InputOffset()
	}
	// Of a list that is the end of the element before.
	for at < int64(len(data)) && bytes.IndexByte([]byte(" \t\r\n,:"), data[at]) >= 0 {
		at++
	}
	return 1 + bytes.Count(data[:at], []byte{'\n'})
}
