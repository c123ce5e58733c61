package config

import (
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/sluicegate/sluice/interceptors/tokens"
	configv1 "github.com/sluicegate/sluice/proto/gen/sluice/config/v1"
)

// tokenizer is a tokenizer at work, and what its file was like when it was read.
type tokenizer struct {
	*tokens.Tokenizer
	config  *configv1.Tokenizer
	size    int64
	changed time.Time
}

// tokenizers reads the files of tokenizers. Of a file that is as it was when it was
// read before, what was read then is taken: a large one takes a second.
func tokenizers(list []*configv1.Tokenizer, before []*tokenizer) ([]*tokenizer, error) {
	out := make([]*tokenizer, 0, len(list))
	for n, c := range list {
		if e := c.GetEncoding(); e != "" && !slices.Contains(tokens.Encodings(), e) {
			return nil, fmt.Errorf("tokenizers[%d].encoding: there is no tiktoken encoding %q; use one of %s",
				n, e, strings.Join(tokens.Encodings(), ", "))
		}
		info, err := os.Stat(c.GetFile())
		if err != nil {
			return nil, fmt.Errorf("tokenizers[%d].file: %w", n, err)
		}
		t := &tokenizer{config: c, size: info.Size(), changed: info.ModTime()}
		for _, b := range slices.Concat(before, out) {
			if b.config.GetFile() == c.GetFile() && b.config.GetEncoding() == c.GetEncoding() &&
				b.size == t.size && b.changed.Equal(t.changed) {
				t.Tokenizer = b.Tokenizer
			}
		}
		if t.Tokenizer == nil {
			if t.Tokenizer, err = tokens.ReadFile(c.GetFile(), c.GetEncoding()); err != nil {
				return nil, fmt.Errorf("tokenizers[%d].file: %w", n, err)
			}
		}
		out = append(out, t)
	}
	return out, nil
}

// tokenizer is the first that names a model; nil if none does.
func (g *Guard) tokenizer(model string) *tokens.Tokenizer {
	for _, t := range g.tokenizers {
		for _, name := range t.config.GetModels() {
			if names(name, model) {
				return t.Tokenizer
			}
		}
	}
	return nil
}

// names reports whether a name with "*" for any text names a model.
func names(name, model string) bool {
	first, rest, any := strings.Cut(name, "*")
	if !any {
		return name == model
	}
	model, ok := strings.CutPrefix(model, first)
	for ok {
		part, more, another := strings.Cut(rest, "*")
		if !another {
			return strings.HasSuffix(model, part)
		}
		_, model, ok = strings.Cut(model, part)
		rest = more
	}
	return false
}
