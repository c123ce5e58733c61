// Package tokens counts tokens: with the model's own tokenizer where there is one, or words.
//
// Where the model server reports its count, that counts. This package's count is the
// floor under it. With a [Tokenizer] it is the count of the text so far, as if it ended
// there, after every piece of it; without, it counts words, which is cheap. Either is
// the same however the text is cut into pieces.
package tokens

import "unicode/utf8"

// Counter counts the tokens of a text that arrives in pieces. The zero value is ready,
// and counts words; [Tokenizer.Counter] makes one that counts tokens. It is not safe for
// concurrent use.
type Counter struct {
	words     words
	tokenizer *Tokenizer
	tail      []byte // what more text may still change
	tokens    int64  // of the tail, as it stands
	begun     bool
}

// Counter makes a counter of the tokens of one text.
func (t *Tokenizer) Counter() Counter { return Counter{tokenizer: t} }

// Count is the number of tokens in a whole text.
func (t *Tokenizer) Count(text []byte) int64 {
	c := t.Counter()
	return c.Add(text)
}

// Add counts the next piece of the text: how many tokens the text so far has more
// than before. It may have fewer, as where letters become a word that is one token.
// It takes time linear in the piece, and what of the text before may still change, which
// is less than a kilobyte and mostly a word.
func (c *Counter) Add(text []byte) int64 {
	if c.tokenizer == nil {
		return c.words.add(text)
	}
	if len(text) == 0 {
		return 0
	}
	text = c.join(text)
	settled, done, open := c.tokenizer.measure(text, known(text))
	c.tail = append(c.tail[:0], text[settled:]...)
	if cap(c.tail) > maxTail {
		c.tail = append(make([]byte, 0, window), c.tail...)
	}
	more := done + open - c.tokens
	c.tokens = open
	return more
}

// maxTail is the most room that a counter keeps from one piece of text to the next.
const maxTail = 4 << 10

// join puts the tail before the next piece of the text.
func (c *Counter) join(text []byte) []byte {
	if p := c.tokenizer.prefix; !c.begun && (p == alwaysAdded || p == prefixed && text[0] != ' ') {
		c.tail = append(c.tail[:0], ' ')
	}
	c.begun = true
	if len(c.tail) == 0 {
		return text
	}
	c.tail = append(c.tail, text...)
	return c.tail
}

// known is how much of a text is there for certain if more may follow: all but the
// beginning of a character.
func known(text []byte) int {
	for n := 1; n < utf8.UTFMax && n <= len(text); n++ {
		if last := text[len(text)-n:]; utf8.RuneStart(last[0]) {
			if !utf8.FullRune(last) {
				return len(text) - n
			}
			break
		}
	}
	return len(text)
}

// Break ends the text: what follows is another.
func (c *Counter) Break() {
	c.words = words{}
	c.tail, c.tokens, c.begun = c.tail[:0], 0, false
}

// Copy makes the counter what another is. It keeps its own room.
func (c *Counter) Copy(from *Counter) {
	tail := append(c.tail[:0], from.tail...)
	*c = *from
	c.tail = tail
}

// Fits is how many bytes of the next piece of the text can be added for no more
// than so many tokens more: up to the end of a token, and of a character. It needs a
// tokenizer; without, nothing fits. The counter stays as it was.
func (c *Counter) Fits(text []byte, tokens int64) int {
	if c.tokenizer == nil || len(text) == 0 {
		return 0
	}
	var at Counter
	at.Copy(c)
	whole := at.join(text)
	before := len(whole) - len(text)
	ends := c.tokenizer.ends(whole)
	// The beginning of a text may split into other tokens than it does as a part of the
	// whole, so each end is tried. The first is nearly always right.
	n := int(min(int64(len(ends)), max(0, tokens+c.tokens))) - 1
	for least := max(0, n-7); n >= least && ends[n] > before; n-- {
		fits := text[:ends[n]-before]
		fits = fits[:known(fits)]
		at.Copy(c)
		if len(fits) > 0 && at.Add(fits) <= tokens {
			return len(fits)
		}
	}
	return 0
}

// Count is the number of words in a whole text.
func Count(text []byte) int64 {
	var c Counter
	return c.Add(text)
}
