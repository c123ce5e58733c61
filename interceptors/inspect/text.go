package inspect

import (
	"strconv"
)

// Verdict is what became of a single text.
type Verdict struct {
	// Verdict is "allow", "deny" or "redact".
	Verdict string `json:"verdict"`
	// Score is how much it looks like an attack to the classifier, from 0 to 1,
	// whether a rule asks for that or not: about one of 10^4s harmless texts
	// reaches s, so that @sluiceScore 0.005 begins at .575. It is rounded to four
	// places, and 1 for a text that stands for more than is read.
	Score float64 `json:"score"`
	// Rules are the ids of the rules that matched. A rule that denies ends the
	// inspection.
	Rules []string `json:"rules"`
}

// Text inspects one text as if it were the prompt of a request, at the path
// "text". It says nothing of rules in shadow. The error is the engine's.
func (p *Policy) Text(prompt []byte) (Verdict, error) {
	return p.judgeAlone(text{place: inPrompt, name: "text", value: prompt})
}

// judgeAlone inspects a text as if it were all of a request.
func (p *Policy) judgeAlone(t text) (Verdict, error) {
	e := p.engine
	if t.place == notInspected {
		return Verdict{Verdict: "allow", Rules: []string{}}, nil
	}
	v := Verdict{Verdict: "allow", Rules: []string{}}
	s := borrow(e)
	defer s.put()
	s.whole(t.value, e.request.mask|scoreMask)
	if s.over {
		v.Verdict, v.Score = "deny", 1
		return v, nil
	}
	v.Score = places4(s.score)
	if t.found = s.found; e.request.reads(t.place)&scoreMask == 0 {
		t.found &^= scoreMask
	}
	if !e.request.needed(t.found) {
		return v, nil
	}
	o, err := e.decide([]text{t}, false)
	if err != nil {
		return v, err
	}
	if len(o.redactions) > 0 {
		v.Verdict = "redact"
	}
	if o.denied != nil {
		v.Verdict = "deny"
	}
	for _, h := range o.matched {
		if !h.rule.shadow {
			v.Rules = append(v.Rules, strconv.Itoa(h.rule.id))
		}
	}
	return v, nil
}
