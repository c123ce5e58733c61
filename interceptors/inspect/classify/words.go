package classify

import (
	"errors"
	"fmt"
	"strings"
)

// Words are classes of words, by their hashes: so "disregard" and "vergiss" are
// known for what they mean, in whatever order the text has them. They are written
// down in train/words.txt, and kept with the weights.
type Words struct {
	tags    [wordSlots]uint32
	classes [wordSlots]uint8
}

const wordSlots = 1 << 13

// Classes of the skeleton that are not in the list.
const (
	classStart = iota // before the text
	classOther        // a word that is in no class
	classNumber
	classQuote
	classColon
	classStop // the end of a sentence
	classSign // any other
	classFinish
	classListed // the first of the list

	// meaning marks classes that stand for something, not only for grammar: they
	// make features together at a distance.
	meaning = 1 << 7
)

var signClass = func() (t [256]uint8) {
	for i := range t {
		t[i] = classSign
	}
	t['"'], t['`'], t[':'] = classQuote, classQuote, classColon
	t['.'], t['!'], t['?'] = classStop, classStop, classStop
	return t
}()

func slot(hash uint64) (at, tag uint32) { return uint32(hash >> (64 - 13)), uint32(hash>>19) | 1 }

// class is that of the word or pair of runes with this hash, 0 if it has none.
func (l *Words) class(hash uint64) uint8 {
	if l == nil {
		return 0
	}
	at, tag := slot(hash)
	for ; l.tags[at] != 0; at = (at + 1) % wordSlots {
		if l.tags[at] == tag {
			return l.classes[at]
		}
	}
	return 0
}

// ReadWords reads a list:
//
//	# comment
//	name: word other~ third+
//	- name: word
//
// A class may have several lines. The words of a script without spaces are of one
// rune or two. word~ stands for the forms of an English verb as well, word+
// for the plural, and the dash is before classes that are but grammar. The
// first line that has a word is the one that counts.
func ReadWords(list string, normalise func(string) string) (*Words, error) {
	l, known, filled := new(Words), map[string]uint8{}, 0
	for i, line := range strings.Split(list, "\n") {
		name, words, ok := strings.Cut(line, ": ")
		if line == "" || line[0] == '#' {
			continue
		}
		if !ok {
			return nil, fmt.Errorf("line %d: want name: words", i+1)
		}
		if known[name] == 0 {
			class := uint8(classListed + len(known))
			if class >= meaning {
				return nil, errors.New("more classes than fit")
			}
			if !strings.HasPrefix(name, "- ") {
				class |= meaning
			}
			known[name] = class
		}
		for _, word := range strings.Fields(words) {
			for _, form := range forms(word) {
				hash := hashOf(normalise(form))
				at, tag := slot(hash)
				for l.tags[at] != 0 && l.tags[at] != tag {
					at = (at + 1) % wordSlots
				}
				if l.tags[at] == tag {
					continue
				}
				if filled++; filled > wordSlots*4/5 {
					return nil, errors.New("more words than fit")
				}
				l.tags[at], l.classes[at] = tag, known[name]
			}
		}
	}
	return l, nil
}

// hashOf is what the scanner makes of a word, or of two runes that are words.
func hashOf(word string) uint64 {
	s := scanner{sink: new(Features)}
	s.write([]byte(word))
	if s.word != 0 {
		s.endWord(false)
	}
	if s.total == 2 {
		return (s.last[1]*mulPair ^ s.last[0]) * mulPair
	}
	return s.last[0]
}

// forms are the forms that an entry stands for.
func forms(entry string) []string {
	word, verb := strings.CutSuffix(entry, "~")
	if !verb {
		if word, plural := strings.CutSuffix(entry, "+"); plural {
			return []string{word, word + "s"}
		}
		return []string{entry}
	}
	stem := strings.TrimSuffix(word, "e")
	list := []string{word, word + "s", word + "es", stem + "ed", stem + "ing"}
	if y, ok := strings.CutSuffix(word, "y"); ok {
		list = append(list, y+"ies", y+"ied")
	}
	return list
}
