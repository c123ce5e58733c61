package inspect

import (
	"fmt"
	"strings"
)

const (
	// wholeCanary is the longest canary, in bytes of normalised text, that must
	// appear whole. Of a longer one canaryWindow bytes in a row are enough,
	// counted from every second word: so about sixty characters of it, ten
	// words, do not pass, and a turn of phrase does. Chosen.
	wholeCanary, canaryWindow = 64, 48
	// leastCanary is the shortest: a shorter one would be found by chance.
	leastCanary = 8
)

// newCanaries compiles texts that must not appear, as words and spelled without
// anything between them; nil without any.
func newCanaries(texts []string) (words, spelled *automaton, err error) {
	if len(texts) == 0 {
		return nil, nil, nil
	}
	words, spelled = &automaton{}, &automaton{}
	for _, a := range []*automaton{words, spelled} {
		b := &builder{entries: make(map[string]*word), symbol: make(map[byte]byte), spelled: a == spelled}
		for n, text := range texts {
			plain := strings.TrimSpace(string(appendNormal(nil, []byte(text))))
			if len(plain) < leastCanary {
				return nil, nil, fmt.Errorf("canaries[%d]: %d characters are left of it, which chance may bring; take a longer one", n, len(plain))
			}
			views := []func(string) string{func(s string) string { return s }}
			if len(plain) <= wholeCanary && !b.spelled {
				views = append(views, rot13, reversed)
			}
			for _, piece := range canaryPieces(plain) {
				for _, view := range views {
					b.add("*"+piece+"*", view, step{gap: -1, found: canary})
				}
			}
		}
		if err := b.build(a); err != nil {
			return nil, nil, fmt.Errorf("canaries: %w: they are too long together", err)
		}
	}
	return words, spelled, nil
}

// canaryPieces are the pieces of a normalised canary, any of which tells it.
func canaryPieces(plain string) (pieces []string) {
	if len(plain) <= wholeCanary {
		return []string{plain}
	}
	odd := false
	for i := 0; i+canaryWindow <= len(plain); i++ {
		if i > 0 && (wordByte(plain[i-1]) || !wordByte(plain[i])) {
			continue
		}
		if odd = !odd; odd {
			pieces = append(pieces, strings.TrimSpace(strings.ToValidUTF8(plain[i:i+canaryWindow], "")))
		}
	}
	if len(pieces) == 0 { // one long word
		pieces = append(pieces, strings.ToValidUTF8(plain[:canaryWindow], ""))
	}
	return pieces
}
