package inspect

import (
	"unicode"
	"unicode/utf8"
)

const (
	// mixedWords is how many words of several scripts make a text odd: a
	// foreign name or a unit is one or two. Chosen.
	mixedWords = 3
	// repeatWindow bytes with fewer than leastGrams different runs of eight
	// bytes say the same again and again: of prose 1,800 are different, of a
	// table of numbers 900, of a sentence repeated as many as it is long.
	repeatWindow, leastGrams = 2048, 160
)

// structure tells what is odd about the make of a text: its scripts, its
// repetitions, its control characters.
func structure(text []byte, mask uint64) (found uint64) {
	if mask&oddScript != 0 && !isFolded(text) && mixesScripts(text) {
		found |= oddScript
	}
	if mask&repetition != 0 && repeats(text) {
		found |= repetition
	}
	if mask&controls != 0 && !isFolded(text) && controlled(text) {
		found |= controls
	}
	return found
}

// mixesScripts reports whether several words have letters of Latin and of a
// script that looks like it.
func mixesScripts(text []byte) bool {
	words, letters := 0, 0
	var latin, other bool
	for i := 0; i <= len(text); {
		r, n := rune(0), 1
		if i < len(text) {
			r, n = utf8.DecodeRune(text[i:])
		}
		i += n
		switch {
		case r < utf8.RuneSelf && letter(byte(r)):
			latin = true
			letters++
		case r >= utf8.RuneSelf && unicode.IsLetter(r):
			latin = latin || unicode.Is(unicode.Latin, r)
			other = other || unicode.In(r, unicode.Cyrillic, unicode.Greek, unicode.Armenian, unicode.Cherokee, unicode.Lisu)
			letters++
		case r >= utf8.RuneSelf && unicode.In(r, unicode.Mn, unicode.Cf):
		default:
			if latin && other && letters > 3 {
				if words++; words == mixedWords {
					return true
				}
			}
			latin, other, letters = false, false, 0
		}
	}
	return false
}

// repeats reports whether some window says the same again and again.
func repeats(text []byte) bool {
	for ; len(text) >= repeatWindow; text = text[repeatWindow:] {
		var seen [repeatWindow / 16]uint64 // four bits for each place
		grams, hash := 0, uint64(0)
		for i, c := range text[:repeatWindow] {
			hash = hash<<8 | uint64(c)
			if i < 7 {
				continue
			}
			h := hash * 0x9E3779B97F4A7C15 >> 51
			if bit := uint64(1) << (h & 63); seen[h>>6]&bit == 0 {
				seen[h>>6] |= bit
				grams++
			}
		}
		if grams < leastGrams {
			return true
		}
	}
	return false
}

// controlled reports whether one byte of a hundred, and four at least, is a
// control character or no UTF-8.
func controlled(text []byte) bool {
	n := 0
	for i := 0; i < len(text); {
		r, size := utf8.DecodeRune(text[i:])
		i += size
		if r == utf8.RuneError && size == 1 || r < ' ' && (r < '\t' || r > '\r') || r >= 0x7F && r < 0xA0 && r != 0x85 {
			n++
		}
	}
	return n >= 4 && n*100 >= len(text)
}
