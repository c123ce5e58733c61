package inspect

import "strconv"

// Verdict is what became of a single text.
type Verdict struct {
	// Verdict is "allow", "deny" or "redact".
	Verdict string `json:"verdict"`
	// Score is how sure the rules are that it is an attack, from 0 to 1: that of
	// the severest rule that matched, CRITICAL .9, ERROR .8, WARNING .6, NOTICE .4,
	// a rule without a severity .5. It is not a probability yet.
	Score float64 `json:"score"`
	// Rules are the ids of the rules that matched. A rule that denies ends the
	// inspection.
	Rules []string `json:"rules"`
}

// Text inspects one text as if it were the prompt of a request, at the path
// "text". It says nothing of rules in shadow. The error is the engine's.
func (p *Policy) Text(prompt []byte) (Verdict, error) {
	e := p.engine
	v := Verdict{Verdict: "allow", Rules: []string{}}
	s := borrow(e)
	defer s.put()
	s.whole(prompt, e.request.mask)
	if s.over {
		v.Verdict, v.Score = "deny", 1
		return v, nil
	}
	if !e.request.needed(s.found) {
		return v, nil
	}
	o, err := e.decide([]text{{place: inPrompt, name: "text", value: prompt, found: s.found}}, false)
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
			v.Score = max(v.Score, h.rule.severity)
			v.Rules = append(v.Rules, strconv.Itoa(h.rule.id))
		}
	}
	return v, nil
}
