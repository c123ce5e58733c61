package inspect

import (
	"bytes"
	"cmp"
	"math"
	"slices"
	"strconv"
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
	// Thresholds are those of rules that ask for the score of this text, or of what is said in
	// it in a role; of rules that a plan evaluates.
	Thresholds []Threshold `json:"thresholds,omitempty"`
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

// Threshold is a score against the one from which on a rule matches.
type Threshold struct {
	Rule int `json:"rule"`
	// Of is the argument of @sluiceScore: "0.005", "tool:0.01".
	Of string `json:"of"`
	// From is the score that it begins at.
	From float64 `json:"from"`
	// Score is the text's, or what is said in it in that role; 0 if nothing is.
	Score float64 `json:"score"`
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
	out.Thresholds = p.engine.request.thresholds(&t, s.scores)
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
			Score:   places4(score),
			Pieces:  pieces(normal, logit),
		})
	}
	return out, nil
}

// thresholds are those of the plan's rules for a text.
func (p *plan) thresholds(t *text, scores [speakers]float32) (list []Threshold) {
	for _, r := range p.rules {
		if !slices.ContainsFunc(r.targets, func(x target) bool { return !x.names && x.takes(t) }) {
			continue
		}
		for by, name := range speakerNames {
			for i, rate := range scoreRates {
				if r.mask&scoreOf(firstScore<<i, speaker(by)) != 0 {
					list = append(list, Threshold{r.rule.id, name + strconv.FormatFloat(rate, 'g', -1, 64), places4(classify.Threshold(rate)), places4(scores[by])})
				}
			}
		}
	}
	return list
}

// places4 rounds a score to four places.
func places4(score float32) float64 { return math.Round(float64(score)*1e4) / 1e4 }

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
