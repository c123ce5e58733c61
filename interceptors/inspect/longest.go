package inspect

import (
	"fmt"
	"regexp/syntax"
	"strconv"
	"strings"

	configv1 "github.com/sluicegate/sluice/proto/gen/sluice/config/v1"
)

const (
	// defaultLongest is how many characters a match in an output has at most, where
	// its rule does not say. Keys and canaries have up to 100, phrases of the
	// dictionary rarely 200. Chosen.
	defaultLongest = 256
	// mostLongest is the most that a rule may say: more than that would have to be
	// held back of every answer.
	mostLongest = 4096
	// defaultHeld is how many bytes of messages are held for one inference: 256
	// characters, one a message, in messages of 250 bytes. Chosen.
	defaultHeld = 64 << 10
)

// longestTag says how many characters a match of a rule on outputs has at most.
const longestTag = "sluice/longest/"

// longest reads the tag of a rule; 0 if it has none.
func longest(tags []string) (int64, error) {
	for _, t := range tags {
		if v, ok := strings.CutPrefix(t, longestTag); ok {
			n, err := strconv.ParseInt(v, 10, 32)
			if err != nil || n < 16 || n > mostLongest {
				return 0, fmt.Errorf("tag %s%s: a match is from 16 to %d characters long", longestTag, v, mostLongest)
			}
			return n, nil
		}
	}
	return 0, nil
}

// bounded refuses a rule on outputs, or a part of a chain, whose match may be longer
// than it says: so much must be held back of a stream. said is the rule's tag, or 0.
func bounded(directive string, said int64) error {
	word, rest, _ := strings.Cut(directive, " ")
	vars, rest, _ := strings.Cut(strings.TrimSpace(rest), " ")
	if !strings.EqualFold(word, "SecRule") || said > 0 || !strings.Contains(strings.ToUpper(vars), "RESPONSE_ARGS") {
		return nil
	}
	op, ok := quoted(strings.TrimSpace(rest))
	if !ok {
		return nil
	}
	name, arg := "rx", op
	if op = strings.TrimPrefix(op, "!"); strings.HasPrefix(op, "@") {
		name, arg, _ = strings.Cut(op[1:], " ")
	}
	n := 0
	switch strings.ToLower(name) {
	case "rx":
		re, err := syntax.Parse(arg, syntax.Perl|syntax.DotNL)
		if err != nil {
			return nil // Coraza says so
		}
		n = mostOf(re)
	case "contains", "strmatch", "streq", "beginswith", "endswith", "containsword":
		n = len(arg)
	case "pm", "pmf":
		for _, w := range strings.Fields(arg) {
			n = max(n, len(w))
		}
	}
	const mend = "; bound what repeats, as in {0,64}, or say how long a match is with the tag '" + longestTag + "512'"
	switch {
	case n == unbounded:
		return fmt.Errorf("on outputs, which are streams, a match of @%s must not be of any length%s", name, mend)
	case n > defaultLongest:
		return fmt.Errorf("on outputs, which are streams, a match of @%s may have %d characters, and %d are the default%s", name, n, defaultLongest, mend)
	}
	return nil
}

// quoted is the string that text begins with.
func quoted(text string) (string, bool) {
	text, ok := strings.CutPrefix(text, `"`)
	for i := range len(text) {
		if text[i] == '"' && (i == 0 || text[i-1] != '\\') {
			return strings.ReplaceAll(text[:i], `\"`, `"`), ok
		}
	}
	return "", false
}

const unbounded = -1

// mostOf is the length of the longest match of a regular expression, in characters,
// or unbounded.
func mostOf(re *syntax.Regexp) int {
	most := 0
	switch re.Op {
	case syntax.OpLiteral:
		return len(re.Rune)
	case syntax.OpCharClass, syntax.OpAnyChar, syntax.OpAnyCharNotNL:
		return 1
	case syntax.OpCapture, syntax.OpQuest:
		return mostOf(re.Sub[0])
	case syntax.OpStar, syntax.OpPlus, syntax.OpRepeat:
		most = mostOf(re.Sub[0])
		switch {
		case most == 0:
			return 0
		case re.Op != syntax.OpRepeat, re.Max < 0, most < 0:
			return unbounded
		}
		return most * re.Max
	case syntax.OpConcat:
		for _, sub := range re.Sub {
			n := mostOf(sub)
			if n < 0 {
				return unbounded
			}
			most += n
		}
	case syntax.OpAlternate:
		for _, sub := range re.Sub {
			n := mostOf(sub)
			if n < 0 {
				return unbounded
			}
			most = max(most, n)
		}
	}
	return most
}

// planOutputs makes the plan of how outputs are read.
func (e *engine) planOutputs(cfg *configv1.Inspect) (err error) {
	p, o := &e.answer, &e.output
	o.mask, o.foreign = p.mask, p.foreign
	const found = kindMask | phraseMask | canary
	o.segments = o.mask&found != 0
	o.longest = max(o.longest, defaultLongest)
	o.holds = p.foreign || p.partial
	o.places = p.edits
	for _, r := range p.rules {
		o.holds = o.holds || (r.deny || r.redact || len(r.edits) > 0) && !r.rule.shadow && r.mask&found != 0
	}
	if o.foreign {
		o.window = max(o.window, defaultLongest)
		o.step = max(o.window/4, 16)
		o.keep = int((o.window+o.step-1)/o.step) + 1
	}
	if o.bytes = int(cfg.GetHoldBytes()); o.bytes == 0 {
		o.bytes = defaultHeld
	}
	if o.mask&phraseMask != 0 {
		o.words, err = somePhrases(o.mask & phraseMask)
	}
	return err
}
