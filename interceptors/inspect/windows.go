package inspect

import (
	"unicode/utf8"

	"github.com/sluicegate/sluice/interceptors/inspect/classify"
)

// score takes a character for the classifier.
func (f *flow) score(c byte, class uint8, next int64) error {
	switch {
	case class == blank:
		f.normal = append(f.normal, ' ')
	case c == foreignByte:
		f.normal = appendNormal(f.normal, lastRune(f.text(next-utf8.UTFMax, next)))
	default:
		if c >= 'A' && c <= 'Z' {
			c |= 0x20
		}
		f.normal = append(f.normal, c)
	}
	if len(f.normal) < scoreWindow {
		return nil
	}
	err := f.scored()
	f.normal = f.normal[:copy(f.normal, f.normal[scoreStep:])]
	return err
}

func lastRune(b []byte) []byte {
	_, n := utf8.DecodeLastRune(b)
	return b[len(b)-n:]
}

// scored judges the classifier's window.
func (f *flow) scored() error {
	if len(f.normal) == 0 {
		return nil
	}
	found := overRates(classify.Judge(classify.Logit(f.normal), 0)) &^ f.scores
	f.scores |= found
	return f.decide(found, nil)
}

// made judges how the text is made, window by window.
func (f *flow) made() error {
	found := structure(f.raw, f.plan.mask)
	f.raw = f.raw[:0]
	return f.decide(found, nil)
}

// window has the rules with other operators judge the end of the text.
func (f *flow) window(to int64) error {
	err := f.part.judge(f, 0, nil, f.text(f.windows[0], to))
	f.marked = f.chars
	if f.windows = append(f.windows, to); len(f.windows) > f.plan.keep {
		f.windows = f.windows[:copy(f.windows, f.windows[1:])]
	}
	return err
}

// readWhole reads an answer that is one message.
func (f *flow) readWhole() error {
	s := borrow(f.part.policy.engine)
	defer s.put()
	s.whole(f.buf, f.plan.mask)
	if s.over {
		return tooDeep()
	}
	found := s.found & f.plan.mask
	if found == 0 && !f.plan.foreign {
		return nil
	}
	var list []match
	rest := found &^ kindMask // of which nobody knows where it is
	for _, m := range []*matcher{f.words, f.canary} {
		if m != nil {
			for _, h := range m.trail.hits {
				list = append(list, h)
				rest &^= h.found
			}
		}
	}
	for _, x := range s.spans {
		list = append(list, match{start: int64(x.start), end: int64(x.end), found: 1 << x.kind})
	}
	if rest != 0 {
		list = append(list, match{end: f.pos, found: rest})
	}
	return f.part.judge(f, found, list, f.buf)
}
