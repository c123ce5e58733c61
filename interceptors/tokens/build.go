package tokens

import (
	"encoding/json"
	"errors"
	"fmt"
	"regexp/syntax"
	"strconv"
	"strings"
	"unicode/utf8"
)

// space is what SentencePiece writes for a space.
const space = "\u2581"

// The patterns of pre-tokenizers that have none of their own. gpt2 is that of GPT-2.
const (
	gpt2        = `'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+`
	digit       = `\p{N}`
	digits      = `\p{N}+`
	punctuation = "[!-/:-@\\[-`{-~\\p{P}]"
	spaced      = "[ \u2581]+[^ \u2581]*|[^ \u2581]+" // words with the spaces before them
	eachSpace   = "[ \u2581]?[^ \u2581]+|[ \u2581]"
	anything    = `(?s:.+)`
)

// reader makes a tokenizer of its file.
type reader struct {
	file       *file
	t          *Tokenizer
	vocabulary map[string]int64
	bytewise   bool // tokens are written in the alphabet of bytes
	spaces     bool // tokens have space for a space
}

func (r *reader) read() *Error {
	m := &r.file.Model
	switch {
	case m.Vocabulary == nil:
		return wrong(errors.New("there is no vocabulary; is this a tokenizer.json?"), "model", "vocab")
	case m.Type != nil && *m.Type != "BPE":
		return wrong(fmt.Errorf("a model of type %q cannot be used; only BPE can", *m.Type), "model", "type")
	case m.SubwordPrefix != "":
		return wrong(errors.New("a prefix of subwords cannot be used"), "model", "continuing_subword_prefix")
	case m.WordSuffix != "":
		return wrong(errors.New("a suffix of words cannot be used"), "model", "end_of_word_suffix")
	}
	if err := json.Unmarshal(m.Vocabulary, &r.vocabulary); err != nil || len(r.vocabulary) == 0 {
		return wrong(errors.New("it must name tokens and their ids"), "model", "vocab")
	}
	if r.file.Normalizer != nil {
		if err := r.normalizer(r.file.Normalizer, "normalizer"); err != nil {
			return err
		}
	}
	if r.file.Splitter != nil {
		if err := r.splitter(r.file.Splitter, "pre_tokenizer"); err != nil {
			return err
		}
	}
	if err := r.tokens(); err != nil {
		return err
	}
	crosses, err := r.merges()
	if err != nil {
		return err
	}
	if len(r.t.patterns) == 0 {
		whole := anything
		if r.spaces && !crosses { // then no token spans two words
			whole = spaced
		}
		r.t.patterns = []*pattern{mustCompile(whole)}
	}
	r.words()
	return nil
}

func mustCompile(text string) *pattern {
	p, err := compile(text)
	if err != nil {
		panic(err)
	}
	return p
}

// normalizer reads how a text is changed first.
func (r *reader) normalizer(s *step, path ...any) *Error {
	switch {
	case s.Type == "Sequence":
		for n := range s.Normalizers {
			if err := r.normalizer(&s.Normalizers[n], append(path[:len(path):len(path)], "normalizers", n)...); err != nil {
				return err
			}
		}
	case s.Type == "NFC":
	case s.Type == "Prepend" && s.Prepend == space:
		r.t.prefix = alwaysAdded
	case s.Type == "Replace" && s.Pattern.String != nil && *s.Pattern.String == " " && s.Content == space:
		r.spaces = true
	default:
		return wrong(fmt.Errorf("a normalizer of type %q cannot be used in this way", s.Type), path...)
	}
	return nil
}

// splitter reads how a text is split into pieces.
func (r *reader) splitter(s *step, path ...any) *Error {
	split := ""
	switch {
	case s.Type == "Sequence":
		for n := range s.Splitters {
			if err := r.splitter(&s.Splitters[n], append(path[:len(path):len(path)], "pretokenizers", n)...); err != nil {
				return err
			}
		}
	case s.Type == "ByteLevel":
		r.bytewise = true
		if s.AddPrefixSpace == nil || *s.AddPrefixSpace {
			if len(r.t.patterns) > 0 {
				return wrong(errors.New("a space before each piece cannot be used"), append(path, "add_prefix_space")...)
			}
			r.t.prefix = prefixed
		}
		if s.UseRegex == nil || *s.UseRegex {
			split = gpt2
		}
	case s.Type == "Metaspace" && s.Replacement == space:
		r.spaces = true
		if s.PrependScheme != nil && *s.PrependScheme != "never" ||
			s.PrependScheme == nil && (s.AddPrefixSpace == nil || *s.AddPrefixSpace) {
			r.t.prefix = prefixed
		}
		if s.Split == nil || *s.Split {
			split = eachSpace
		}
	case s.Type == "Digits":
		if split = digits; s.Individual {
			split = digit
		}
	case s.Type == "Punctuation" && (s.Behavior == "" || s.Behavior == "Isolated"):
		split = punctuation
	case s.Type != "Split":
		return wrong(fmt.Errorf("a pre-tokenizer of type %q cannot be used in this way", s.Type), path...)
	case r.spaces && s.Pattern.String != nil && *s.Pattern.String == " ": // there are none
	case s.Behavior != "Isolated" && s.Behavior != "Removed":
		return wrong(fmt.Errorf("a split with the behavior %q cannot be used; only Isolated and Removed can", s.Behavior), append(path, "behavior")...)
	case s.Pattern.Regex != nil:
		split = *s.Pattern.Regex
	case s.Pattern.String != nil:
		split = quote(*s.Pattern.String)
	}
	if split == "" {
		return nil
	}
	p, err := compile(split)
	if err != nil {
		return wrong(err, append(path, "pattern")...)
	}
	r.t.patterns = append(r.t.patterns, p)
	return nil
}

// quote is the expression of a literal text.
func quote(text string) string {
	return (&syntax.Regexp{Op: syntax.OpLiteral, Rune: []rune(text)}).String()
}

// tokens reads the vocabulary and the added tokens.
func (r *reader) tokens() *Error {
	t, most := r.t, int64(0)
	for text, id := range r.vocabulary {
		if id < 0 || id >= maxToken {
			return wrong(fmt.Errorf("a token's id must be less than %d", maxToken), "model", "vocab", text)
		}
		most = max(most, id)
	}
	for n, a := range r.file.Added {
		if a.ID < 0 || a.ID >= maxToken {
			return wrong(fmt.Errorf("a token's id must be less than %d", maxToken), "added_tokens", n, "id")
		}
		if a.Content == "" || len(a.Content) > maxAdded {
			return wrong(fmt.Errorf("an added token must have 1 to %d bytes", maxAdded), "added_tokens", n, "content")
		}
		most = max(most, a.ID)
	}
	t.byID = make([]string, most+1)
	for text, id := range r.vocabulary {
		t.byID[id] = r.plain(text)
	}
	for _, a := range r.file.Added {
		t.byID[a.ID] = a.Content
		t.added.add(a.Content, int32(a.ID))
	}
	for b := range t.bytes {
		name := string(letters[b])
		if !r.bytewise {
			name = fmt.Sprintf("<0x%02X>", b)
		}
		t.bytes[b] = none
		if id, ok := r.vocabulary[name]; ok && (r.bytewise || r.file.Model.ByteFallback) {
			t.bytes[b] = int32(id)
		}
	}
	if r.bytewise {
		return nil
	}
	t.fuses = r.file.Model.FusesUnknown
	t.runes = make(map[rune]int32)
	for text, id := range r.vocabulary {
		if c, size := utf8.DecodeRuneInString(text); size == len(text) {
			t.runes[c] = int32(id)
		}
	}
	if id, ok := r.vocabulary[space]; ok && r.spaces {
		t.runes[' '] = int32(id)
	}
	return nil
}

// letters are the alphabet of bytes: those that can be printed stand for themselves.
var letters = func() (out [256]rune) {
	next := rune(256)
	for b := range out {
		if b > ' ' && b < 0x7f || b > 0xa0 && b != 0xad {
			out[b] = rune(b)
		} else {
			out[b] = next
			next++
		}
	}
	return out
}()

// bytesOf are the bytes of the letters.
var bytesOf = func() map[rune]byte {
	out := make(map[rune]byte, len(letters))
	for b, r := range letters {
		out[r] = byte(b)
	}
	return out
}()

// plain is the text that a token of the vocabulary stands for.
func (r *reader) plain(token string) string {
	if r.bytewise {
		out := make([]byte, 0, len(token))
		for _, c := range token {
			b, ok := bytesOf[c]
			if !ok { // not of this alphabet: it stands for itself
				return token
			}
			out = append(out, b)
		}
		return string(out)
	}
	if r.file.Model.ByteFallback && len(token) == len("<0x00>") && strings.HasPrefix(token, "<0x") {
		if b, err := strconv.ParseUint(token[3:5], 16, 8); err == nil {
			return string([]byte{byte(b)})
		}
	}
	if r.spaces {
		return strings.ReplaceAll(token, space, " ")
	}
	return token
}

// merges reads the merges, and reports whether one makes a token of the end of a
// word and the beginning of the next.
func (r *reader) merges() (crosses bool, err *Error) {
	r.t.pairs = make(map[uint64]uint64, len(r.file.Model.Merges))
	if !r.bytewise {
		r.t.joints.runes = make(map[[2]rune]struct{})
	}
	for n, m := range r.file.Model.Merges {
		var ids [3]int64
		for k, text := range [...]string{m[0], m[1], m[0] + m[1]} {
			id, ok := r.vocabulary[text]
			switch {
			case m[0] == "" || m[1] == "":
				return false, wrong(errors.New("it must be two tokens, in a list or with a space between them"), "model", "merges", n)
			case !ok && k == 2:
				return false, wrong(errors.New("the vocabulary does not have the token that it makes"), "model", "merges", n)
			case !ok:
				return false, wrong(errors.New("the vocabulary does not have a token of it"), "model", "merges", n)
			}
			ids[k] = id
		}
		r.t.pairs[pairOf(int32(ids[0]), int32(ids[1]))] = uint64(n)<<32 | uint64(ids[2])
		r.t.joints.add(r.plain(m[0]), r.plain(m[1]))
		crosses = crosses || strings.HasPrefix(m[1], space) && !strings.HasSuffix(m[0], space)
	}
	return crosses, nil
}

// words finds the texts that are one token.
func (r *reader) words() {
	t := r.t
	words := make(map[string]int32, len(r.vocabulary))
	m := t.merger()
	for token, id := range r.vocabulary {
		text := r.plain(token)
		if len(text) > window {
			continue
		}
		if r.file.Model.IgnoresMerges {
			words[text] = int32(id)
		} else if s := t.merge(m, []byte(text)); len(s) == 1 && s[0].id == int32(id) {
			words[text] = int32(id)
		}
	}
	t.words = words
}
