package tokens

import (
	"unicode"
	"unicode/utf8"
)

// longWord is the number of bytes after which a word counts as one token more.
// English subword tokenizers write about four bytes a token; common words are
// one token however long. Sixteen leaves words whole and still makes a megabyte
// without a space cost 65,536 tokens; or one of nothing but spaces. Chosen, not
// measured.
const longWord = 16

// words counts the words of a text that arrives in pieces. A word is a run
// of characters without white space; characters of scripts that are written
// without spaces (CJK, Thai and their like) count one each, as does each
// further 16 bytes of a long word. The white space between words is free, but
// each 16 bytes of it on end count one. The zero value is ready.
type words struct {
	run     int // bytes of the word so far; 0 between words
	blank   int // bytes of white space so far; 0 in a word
	partial [utf8.UTFMax]byte
	n       int // bytes in partial: the beginning of a character that was cut
}

// add counts the words that begin in the next piece of the text. It takes
// time linear in the piece.
func (c *words) add(text []byte) int64 {
	var count int64
	for c.n > 0 && len(text) > 0 {
		c.partial[c.n] = text[0]
		c.n++
		text = text[1:]
		if p := c.partial[:c.n]; utf8.FullRune(p) {
			r, size := utf8.DecodeRune(p)
			count += c.rune(r, size)
			rest := append([]byte(nil), p[size:]...) // after a broken character only
			c.n = 0
			count += c.add(rest)
		}
	}
	for len(text) > 0 {
		if text[0] < utf8.RuneSelf {
			n, k := c.ascii(text)
			count, text = count+n, text[k:]
			continue
		}
		if !utf8.FullRune(text) {
			c.n = copy(c.partial[:], text)
			break
		}
		r, size := utf8.DecodeRune(text)
		count += c.rune(r, size)
		text = text[size:]
	}
	return count
}

// ascii counts the k bytes of text before the first that is not ASCII.
func (c *words) ascii(text []byte) (count int64, k int) {
	run, blank := c.run, c.blank // in registers: this is what most text is
	for k < len(text) && text[k] < utf8.RuneSelf {
		if b := text[k]; b == ' ' || b >= '\t' && b <= '\r' {
			run, blank = 0, blank+1
			if blank%longWord == 0 {
				count++
			}
		} else {
			if run%longWord == 0 {
				count++
			}
			run, blank = run+1, 0
		}
		k++
	}
	c.run, c.blank = run, blank
	return count, k
}

func (c *words) rune(r rune, size int) int64 {
	if unicode.IsSpace(r) {
		return c.space(size)
	}
	c.blank = 0
	if unspaced(r) {
		c.run = 0
		return 1
	}
	before := (c.run + longWord - 1) / longWord
	c.run += size
	return int64((c.run+longWord-1)/longWord - before)
}

func (c *words) space(size int) int64 {
	before := c.blank / longWord
	c.run, c.blank = 0, c.blank+size
	return int64(c.blank/longWord - before)
}

// unspaced reports whether a character belongs to a script that is written
// without spaces between words: from CJK radicals to Hangul and the
// supplementary ideographs, and Thai to Myanmar.
func unspaced(r rune) bool {
	return r >= 0x2E80 && r <= 0xD7FF || r >= 0xF900 && r <= 0xFAFF || r >= 0x20000 && r <= 0x3FFFF ||
		r >= 0x0E00 && r <= 0x109F || r >= 0x1780 && r <= 0x17FF
}
