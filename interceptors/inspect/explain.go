package inspect

import (
	"bytes"
	"cmp"
	"math"
	"slices"
	"strings"

	"github.com/sluicegate/sluice/interceptors/fields"
	"github.com/sluicegate/sluice/interceptors/inspect/classify"
)

// Explanation says how the verdict on a text came about, for whoever tunes the
// rules. Unlike a [Verdict] it holds the text.
type Explanation struct {
	Verdict
	// Matched are the rules that matched, in order, those in shadow too.
	Matched []Match `json:"matched"`
	// Detectors are those that fired, by the names that rules give them.
	Detectors []string `json:"detectors"`
	// Views are the text as the detectors read it, and each text that it stands
	// for; at most 64.
	Views []View `json:"views"`
}

// Match is a rule that matched.
type Match struct {
	ID     int    `json:"id"`
	Class  string `json:"class,omitempty"`
	Shadow bool   `json:"shadow,omitempty"`
}

// View is one reading of a text.
type View struct {
	// Text is the normalised form.
	Text string `json:"text"`
	// Phrases are the classes of phrases that are found in it.
	Phrases []string `json:"phrases,omitempty"`
	// Score is the classifier's.
	Score float64 `json:"score"`
	// Pieces are what made the score higher, what most did first; at most 5.
	Pieces []Piece `json:"pieces,omitempty"`
}

// Piece is a part of a view, of 8 words or a 200th of them.
type Piece struct {
	Text string `json:"text"`
	// Weight is by how much the classifier's sum of weights falls without it.
	Weight float64 `json:"weight"`
}

const (
	maxViews    = 64
	mostPieces  = 5
	pieceWords  = 8
	pieceShares = 200
)

// Explain inspects a text of a request's field as [Policy.Text] does a prompt, and
// says how it came to the verdict. It takes some hundred times as long.
func (p *Policy) Explain(role fields.Role, path string, value []byte) (Explanation, error) {
	t := text{place: placeOf(role), name: path, value: value}
	v, err := p.judgeAlone(t)
	if err != nil {
		return Explanation{}, err
	}
	out := Explanation{Verdict: v, Matched: []Match{}, Detectors: []string{}, Views: []View{}}
	s := borrow(p.engine)
	defer s.put()
	var views [][]byte
	s.yield = func(normal []byte) {
		if len(views) < maxViews && !slices.ContainsFunc(views, func(b []byte) bool { return bytes.Equal(b, normal) }) {
			views = append(views, bytes.Clone(normal))
		}
	}
	s.whole(value, p.engine.request.reads(t.place)|scoreMask|phraseMask)
	s.yield = nil
	found := s.found
	out.Detectors = append(out.Detectors, sortedDetectors(found&^scoreMask)...)
	if !s.over && p.engine.request.needed(found) {
		t.found = found &^ scoreMask
		if p.engine.request.reads(t.place)&scoreMask != 0 {
			t.found = found
		}
		o, err := p.engine.decide([]text{t}, false)
		if err != nil {
			return Explanation{}, err
		}
		for _, h := range o.matched {
			out.Matched = append(out.Matched, Match{h.rule.id, h.rule.class, h.rule.shadow})
		}
	}
	for _, normal := range views {
		s.start(len(normal), phraseMask)
		s.match(normal)
		logit := classify.Logit(normal)
		score := classify.Judge(logit, classify.Classes(s.found&phraseMask>>firstClass))
		out.Views = append(out.Views, View{
			Text:    string(normal),
			Phrases: sortedDetectors(s.found & phraseMask),
			Score:   math.Round(float64(score)*1e4) / 1e4,
			Pieces:  pieces(normal, logit),
		})
	}
	return out, nil
}

// sortedDetectors are the names of detectors.
func sortedDetectors(found uint64) (names []string) {
	for _, classes := range operators {
		for name, bit := range classes {
			if found&bit != 0 {
				names = append(names, name)
			}
		}
	}
	slices.Sort(names)
	return names
}

// pieces are the parts of a text without which it would look less like an attack.
func pieces(normal []byte, logit float32) (out []Piece) {
	words := strings.Fields(string(normal))
	size := max(pieceWords, len(words)/pieceShares)
	for from := 0; from < len(words) && len(words) > size; from += size {
		to := min(from+size, len(words))
		without := strings.Join(slices.Concat(words[:from], words[to:]), " ")
		if w := logit - classify.Logit([]byte(without)); w > 0 {
			out = append(out, Piece{strings.Join(words[from:to], " "), math.Round(float64(w)*100) / 100})
		}
	}
	slices.SortStableFunc(out, func(a, b Piece) int { return cmp.Compare(b.Weight, a.Weight) })
	return out[:min(len(out), mostPieces)]
}
