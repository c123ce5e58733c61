package tokens

import (
	"errors"
	"fmt"
	"math"
	"regexp/syntax"
	"slices"
	"strings"
	"unicode"
	"unicode/utf8"
)

// window is the most bytes of one piece. A longer run without a place to split
// (letters, spaces, dashes) is split within every 256 bytes, where no merge can cross if
// there is such a place; else it may be a few tokens longer than the model's own
// tokenizer has it. In return no piece costs more than a fixed amount of work. 256 holds
// all words of prose, and the longest token of common vocabularies (128 spaces) twice.
// Chosen.
const window = 256

// pattern is a regular expression of the kind that tokenizers split text with:
// alternatives of runs of classes of characters. It finds what a backtracking engine
// finds, in bounded time, and tells how far it looked, so that a match can be told from
// one that more text could change.
type pattern struct {
	code  []instruction
	start int
	ascii [utf8.RuneSelf]uint64 // the classes of a character, by bit
	pages []uint16              // index in table, for every 256 characters
	table [][256]uint64
	sets  [][]rune // the classes, as ranges
	blank uint64
	begin uint64 // the classes that a match can begin with; 0 if it can be empty
}

type operation uint8

const (
	matched     operation = iota
	run                   // min to max characters of a class
	alternative           // the first of several that matches
	noText                // what follows is white space, or the end: (?!\S)
)

type instruction struct {
	op       operation
	set      uint64
	min, max int
	next     int
	choices  []choice
}

// choice is an alternative, and the classes that its first character is of; 0 if
// it may have none.
type choice struct {
	at    int
	first uint64
}

// White space as Unicode has it: that is what tokenizers mean by \s, and not what
// regexp means by it.
const blanks = `\x{9}-\x{d}\x{20}\x{85}\x{a0}\x{1680}\x{2000}-\x{200a}\x{2028}\x{2029}\x{202f}\x{205f}\x{3000}`

// The lookahead, which regexp does not know, as a character that no text has.
const (
	lookahead     = `(?!\S)`
	lookaheadRune = 0x10FFFF
)

// compile reads a regular expression.
func compile(text string) (*pattern, error) {
	plain, err := rewrite(text)
	if err != nil {
		return nil, err
	}
	re, err := syntax.Parse(plain, syntax.Perl)
	if err != nil {
		return nil, fmt.Errorf("this regular expression cannot be used: %w", err)
	}
	p := &pattern{code: []instruction{{op: matched}}}
	if p.blank, err = p.class(blankRanges()); err != nil {
		return nil, err
	}
	if p.start, err = p.compile(re, 0); err != nil {
		return nil, err
	}
	for n := range p.code {
		for k := range p.code[n].choices {
			c := &p.code[n].choices[k]
			c.first = p.first(c.at)
		}
	}
	p.begin = p.first(p.start)
	p.classify()
	return p, nil
}

// rewrite puts what tokenizers mean in the words of regexp.
func rewrite(text string) (string, error) {
	if len(text) > 1<<12 {
		return "", errors.New("a regular expression of more than 4096 bytes cannot be used")
	}
	text = strings.ReplaceAll(text, lookahead, `\x{10FFFF}`)
	var b strings.Builder
	in := false // a bracket
	for i := 0; i < len(text); i++ {
		c := text[i]
		if c != '\\' || i+1 == len(text) {
			in = c == '[' || in && c != ']'
			b.WriteByte(c)
			continue
		}
		i++
		switch {
		case text[i] == 's' && in:
			b.WriteString(blanks)
		case text[i] == 's':
			b.WriteString("[" + blanks + "]")
		case text[i] == 'S' && !in:
			b.WriteString("[^" + blanks + "]")
		case text[i] == 'd':
			b.WriteString(`\p{Nd}`)
		case strings.IndexByte(`SDwWbBhHA`, text[i]) >= 0:
			return "", fmt.Errorf(`a regular expression with \%c cannot be used`, text[i])
		default:
			b.WriteByte('\\')
			b.WriteByte(text[i])
		}
	}
	return b.String(), nil
}

func blankRanges() []rune {
	re, err := syntax.Parse("["+blanks+"]", syntax.Perl)
	if err != nil {
		panic(err)
	}
	return re.Rune
}

var errForm = errors.New("a regular expression of this form cannot be used: " +
	"only alternatives of runs of classes of characters, and (?!\\S), can")

// compile makes the instructions of an expression that goes on at next.
func (p *pattern) compile(re *syntax.Regexp, next int) (int, error) {
	lo, hi, sub := 1, 1, re
	switch re.Op {
	case syntax.OpEmptyMatch:
		return next, nil
	case syntax.OpCapture:
		return p.compile(re.Sub[0], next)
	case syntax.OpConcat:
		var err error
		for n := len(re.Sub) - 1; n >= 0 && err == nil; n-- {
			next, err = p.compile(re.Sub[n], next)
		}
		return next, err
	case syntax.OpAlternate:
		in := instruction{op: alternative}
		for _, s := range re.Sub {
			at, err := p.compile(s, next)
			if err != nil {
				return 0, err
			}
			in.choices = append(in.choices, choice{at: at})
		}
		return p.add(in)
	case syntax.OpLiteral:
		if len(re.Rune) == 1 && re.Rune[0] == lookaheadRune {
			return p.add(instruction{op: noText, set: p.blank, next: next})
		}
		for n := len(re.Rune) - 1; n >= 0; n-- {
			one := *re
			one.Rune = re.Rune[n : n+1]
			at, err := p.run(&one, 1, 1, next)
			if err != nil {
				return 0, err
			}
			next = at
		}
		return next, nil
	case syntax.OpStar:
		lo, hi, sub = 0, math.MaxInt, re.Sub[0]
	case syntax.OpPlus:
		hi, sub = math.MaxInt, re.Sub[0]
	case syntax.OpQuest:
		lo, sub = 0, re.Sub[0]
	case syntax.OpRepeat:
		lo, hi, sub = re.Min, re.Max, re.Sub[0]
		if hi < 0 {
			hi = math.MaxInt
		}
	}
	if re.Flags&syntax.NonGreedy != 0 && re != sub {
		return 0, errForm
	}
	for sub.Op == syntax.OpCapture {
		sub = sub.Sub[0]
	}
	if ranges(sub) == nil && re.Op == syntax.OpQuest {
		at, err := p.compile(sub, next)
		if err != nil {
			return 0, err
		}
		return p.add(instruction{op: alternative, choices: []choice{{at: at}, {at: next}}})
	}
	return p.run(sub, lo, hi, next)
}

func (p *pattern) add(in instruction) (int, error) {
	if len(p.code) == 1<<10 {
		return 0, errors.New("this regular expression is too long")
	}
	p.code = append(p.code, in)
	return len(p.code) - 1, nil
}

func (p *pattern) run(re *syntax.Regexp, lo, hi, next int) (int, error) {
	r := ranges(re)
	if r == nil {
		return 0, errForm
	}
	set, err := p.class(r)
	if err != nil {
		return 0, err
	}
	return p.add(instruction{op: run, set: set, min: lo, max: hi, next: next})
}

// ranges are the characters that an expression of one character matches; nil if it
// is another.
func ranges(re *syntax.Regexp) []rune {
	switch {
	case re.Op == syntax.OpCharClass && len(re.Rune) > 0:
		return re.Rune
	case re.Op == syntax.OpAnyChar:
		return []rune{0, utf8.MaxRune}
	case re.Op == syntax.OpAnyCharNotNL:
		return []rune{0, '\n' - 1, '\n' + 1, utf8.MaxRune}
	case re.Op != syntax.OpLiteral || len(re.Rune) != 1 || re.Rune[0] == lookaheadRune:
		return nil
	case re.Flags&syntax.FoldCase == 0:
		return []rune{re.Rune[0], re.Rune[0]}
	}
	var out []rune
	for r := re.Rune[0]; ; {
		out = append(out, r, r)
		if r = unicode.SimpleFold(r); r == re.Rune[0] {
			return out
		}
	}
}

// class is the bit of a class of characters.
func (p *pattern) class(r []rune) (uint64, error) {
	n := slices.IndexFunc(p.sets, func(s []rune) bool { return slices.Equal(s, r) })
	if n < 0 {
		if len(p.sets) == 64 {
			return 0, errors.New("this regular expression has more than 64 classes of characters")
		}
		n = len(p.sets)
		p.sets = append(p.sets, slices.Clone(r))
	}
	return 1 << n, nil
}

// first is the classes of the first character of what is matched from an
// instruction on; 0 if there may be none.
func (p *pattern) first(at int) (sets uint64) {
	in := &p.code[at]
	switch {
	case in.op == run && in.min > 0:
		return in.set
	case in.op == run:
		if rest := p.first(in.next); rest != 0 {
			return in.set | rest
		}
	case in.op == alternative:
		for _, c := range in.choices {
			f := p.first(c.at)
			if f == 0 {
				return 0
			}
			sets |= f
		}
		return sets
	}
	return 0
}

// classify writes down the classes of every character.
func (p *pattern) classify() {
	at := make([]int, len(p.sets)) // the range that each class has got to
	known := make(map[[256]uint64]uint16)
	for start := rune(0); start <= utf8.MaxRune; start += 256 {
		var page [256]uint64
		for n, set := range p.sets {
			for at[n] < len(set) && set[at[n]+1] < start {
				at[n] += 2
			}
			for k := at[n]; k < len(set) && set[k] < start+256; k += 2 {
				for r := max(start, set[k]); r <= min(start+255, set[k+1]); r++ {
					page[r-start] |= 1 << n
				}
			}
		}
		index, ok := known[page]
		if !ok {
			index = uint16(len(p.table))
			known[page] = index
			p.table = append(p.table, page)
		}
		p.pages = append(p.pages, index)
	}
	copy(p.ascii[:], p.table[p.pages[0]][:])
}

// of is the classes and the size of the character at the beginning of text.
func (p *pattern) of(text []byte) (sets uint64, size int) {
	if text[0] < utf8.RuneSelf {
		return p.ascii[text[0]], 1
	}
	r, size := utf8.DecodeRune(text)
	return p.table[p.pages[r>>8]][r&255], size
}

// find is the length of the match at the beginning of text, 0 if there is none, and
// how many bytes were looked at; one more than there are if the end was.
func (p *pattern) find(text []byte) (n, far int) {
	s := search{p: p, text: text}
	return max(0, s.match(p.start, 0)), s.far
}

// maxSteps bounds one search. The patterns of the vocabularies in use stay below three
// times the window on any text; one that was written to take long gives up.
const maxSteps = 8 * window

// search is one search for a match.
type search struct {
	p     *pattern
	text  []byte
	far   int
	steps int // instructions, and characters of runs
}

// look is the classes of the character at pos, 0 at the end, and its size.
func (s *search) look(pos int) (sets uint64, size int) {
	if pos == len(s.text) {
		s.far = len(s.text) + 1
		return 0, 0
	}
	sets, size = s.p.of(s.text[pos:])
	s.far = max(s.far, pos+size)
	return sets, size
}

// match is the end of the match from an instruction on, or -1.
func (s *search) match(at, pos int) int {
	for {
		if s.steps++; s.steps > maxSteps {
			s.far = len(s.text) + 1
			return -1
		}
		in := &s.p.code[at]
		switch in.op {
		case matched:
			return pos
		case noText:
			if sets, size := s.look(pos); size > 0 && sets&in.set == 0 {
				return -1
			}
			at = in.next
		case alternative:
			sets, _ := s.look(pos)
			for _, c := range in.choices {
				if c.first != 0 && c.first&sets == 0 {
					continue
				}
				if end := s.match(c.at, pos); end >= 0 {
					return end
				}
			}
			return -1
		case run:
			n, end := s.run(in, pos)
			s.steps += n
			if n < in.min {
				return -1
			}
			next := &s.p.code[in.next]
			if next.op == matched {
				return end
			}
			for ; n > in.min; n-- {
				if found := s.match(in.next, end); found >= 0 {
					return found
				}
				_, size := utf8.DecodeLastRune(s.text[:end])
				end -= size
			}
			at, pos = in.next, end
		}
	}
}

// run is the longest run, in characters, and its end.
func (s *search) run(in *instruction, pos int) (n, end int) {
	text := s.text
	for n < in.max && pos < len(text) {
		var sets uint64
		size := 1
		if b := text[pos]; b < utf8.RuneSelf {
			sets = s.p.ascii[b]
		} else {
			sets, size = s.p.of(text[pos:])
		}
		if sets&in.set == 0 {
			s.far = max(s.far, pos+size)
			return n, pos
		}
		n, pos = n+1, pos+size
	}
	if n < in.max {
		s.far = len(text) + 1
	} else {
		s.far = max(s.far, pos)
	}
	return n, pos
}
