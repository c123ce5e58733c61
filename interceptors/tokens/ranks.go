package tokens

import (
	"bytes"
	"encoding/base64"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
)

// The patterns of the tiktoken encodings.
const (
	cl100k = `(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+`
	o200k  = `[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|` +
		`[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|` +
		`\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+`
)

// encodings are what the files of the tiktoken encodings do not say: the pattern, and
// the tokens that are added.
var encodings = map[string]struct {
	pattern string
	added   map[string]int32
}{
	"r50k_base": {gpt2, map[string]int32{"<|endoftext|>": 50256}},
	"p50k_base": {gpt2, map[string]int32{"<|endoftext|>": 50256}},
	"cl100k_base": {cl100k, map[string]int32{"<|endoftext|>": 100257, "<|fim_prefix|>": 100258,
		"<|fim_middle|>": 100259, "<|fim_suffix|>": 100260, "<|endofprompt|>": 100276}},
	"o200k_base": {o200k, map[string]int32{"<|endoftext|>": 199999, "<|endofprompt|>": 200018}},
	"o200k_harmony": {o200k, map[string]int32{"<|startoftext|>": 199998, "<|endoftext|>": 199999, "<|return|>": 200002,
		"<|constrain|>": 200003, "<|channel|>": 200005, "<|start|>": 200006, "<|end|>": 200007, "<|message|>": 200008,
		"<|call|>": 200012, "<|endofprompt|>": 200018}},
}

// Encodings are the names of the tiktoken encodings that are known.
func Encodings() []string { return slices.Sorted(maps.Keys(encodings)) }

// ReadRanks reads the ranks of a tiktoken encoding: a line for each token, its bytes
// in base64 and its rank. The error is an [Error] if the encoding is known.
func ReadRanks(data []byte, encoding string) (*Tokenizer, error) {
	e, ok := encodings[encoding]
	if !ok {
		return nil, fmt.Errorf("there is no tiktoken encoding %q; use one of %s", encoding, strings.Join(Encodings(), ", "))
	}
	t := &Tokenizer{patterns: []*pattern{mustCompile(e.pattern)}, added: newAdded(), words: make(map[string]int32)}
	for n := 1; len(data) > 0; n++ {
		var row []byte
		row, data, _ = bytes.Cut(data, []byte{'\n'})
		if row = bytes.TrimSpace(row); len(row) == 0 {
			continue
		}
		if err := t.rankLine(row); err != nil {
			return nil, &Error{Line: n, Err: err}
		}
	}
	for b := range t.bytes {
		id, ok := t.words[string([]byte{byte(b)})]
		if !ok {
			return nil, &Error{Err: fmt.Errorf("the byte %#02x is no token; is this a file of tiktoken?", b)}
		}
		t.bytes[b] = id
	}
	// Any two tokens that together are one merge, and that of the lowest rank first.
	t.pairs = make(map[uint64]uint64, 2*len(t.words))
	for text, id := range t.words {
		for n := 1; n < len(text); n++ {
			left, ok := t.words[text[:n]]
			if !ok {
				continue
			}
			if right, ok := t.words[text[n:]]; ok {
				t.pairs[pairOf(left, right)] = uint64(id)<<32 | uint64(id)
				t.joints.add(text[:n], text[n:])
			}
		}
	}
	for text, id := range e.added {
		if int(id) >= len(t.byID) {
			t.byID = append(t.byID, make([]string, int(id)+1-len(t.byID))...)
		}
		t.byID[id] = text
		t.added.add(text, id)
	}
	return t, nil
}

var errRank = errors.New("a line must be a token in base64, a space, and its rank")

// rankLine reads one token.
func (t *Tokenizer) rankLine(row []byte) error {
	code, rank, _ := bytes.Cut(row, []byte{' '})
	text, err := base64.StdEncoding.DecodeString(string(code))
	id, bad := strconv.ParseUint(string(rank), 10, 32)
	switch {
	case err != nil || bad != nil || len(text) == 0:
		return errRank
	case id >= maxToken:
		return fmt.Errorf("a token's rank must be less than %d", maxToken)
	}
	if int(id) >= len(t.byID) {
		t.byID = append(t.byID, make([]string, int(id)+1-len(t.byID))...)
	}
	if t.byID[id] != "" {
		return fmt.Errorf("there is another token of the rank %d", id)
	}
	if _, ok := t.words[string(text)]; ok {
		return errors.New("there is another line of this token")
	}
	t.byID[id] = string(text)
	t.words[t.byID[id]] = int32(id)
	return nil
}
