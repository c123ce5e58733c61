package inspect

import (
	"slices"
	"strings"

	"github.com/corazawaf/coraza/v3/types"
)

// plan is what the rules of one direction need. If every rule begins with one
// of our operators, not negated and on the text as it is, then a message in
// which none of their detectors fires cannot match any. If the rules are no
// more than that, they are evaluated here; else Coraza does it. TestPlan holds
// that both decide the same.
type plan struct {
	mask    uint64 // detectors that some rule asks for
	foreign bool   // some rule asks for more: every message is a transaction
	partial bool   // some rule is not one of rules: what fires is a transaction
	edits   bool   // some rule has replace or truncate
	rules   []planned
	names   bool         // some rule reads names
	scored  [places]bool // where the classifier's score is asked for
	judged  uint64       // of the score, if it is asked for without a rule
}

// reads are the detectors to read texts of a place with.
func (p *plan) reads(at place) uint64 {
	if !p.scored[at] {
		return p.mask &^ scoreMask
	}
	return p.mask | p.judged
}

// judge has the score read of texts of some places, whatever the rules ask for.
func (p *plan) judge(at [places]bool) {
	p.judged = firstScore
	for n := range at {
		p.scored[n] = p.scored[n] || at[n]
	}
}

// score notes where a rule asks for the score; a rule that is not planned may
// ask for it everywhere.
func (p *plan) score(r *planned, known bool) {
	for _, t := range r.targets {
		for at := range t.places {
			p.scored[at] = p.scored[at] || t.places[at] && !t.names
		}
		p.scored[inNames] = p.scored[inNames] || t.names
	}
	if !known {
		p.scored = everywhere
	}
}

var everywhere = [places]bool{true, true, true, true, true}

// asks reports whether there is a rule at all.
func (p *plan) asks() bool { return p.foreign || p.partial || p.mask != 0 }

func (p *plan) needed(found uint64) bool { return p.foreign || found&p.mask != 0 }

// whole reports whether the plan decides without a transaction.
func (p *plan) whole() bool { return !p.foreign && !p.partial }

// planned is a rule that is one of our operators, targets and an action.
type planned struct {
	rule    *rule
	phase   types.RulePhase
	mask    uint64
	targets []target
	deny    bool
	redact  bool
	edits   []redaction // replace and truncate
}

// target is a variable of a rule: a collection, or its names, or one name of it.
type target struct {
	variable string
	places   [4]bool
	names    bool
	key      string   // "" for all
	except   []string // keys that are left out; "" for all
}

// targetKinds are the variables of the plan.
var targetKinds = map[string]target{
	"ARGS":          {places: [4]bool{inPrompt: true, inParameter: true, inIdentifier: true}},
	"ARGS_POST":     {places: [4]bool{inPrompt: true}},
	"ARGS_GET":      {places: [4]bool{inParameter: true}},
	"ARGS_PATH":     {places: [4]bool{inIdentifier: true}},
	"ARGS_NAMES":    {places: [4]bool{inPrompt: true, inParameter: true, inIdentifier: true}, names: true},
	"RESPONSE_ARGS": {places: [4]bool{inAnswer: true}},
}

// plainActions are actions that change nothing of what a rule decides.
var plainActions = map[string]bool{"id": true, "phase": true, "log": true, "nolog": true, "auditlog": true, "noauditlog": true,
	"severity": true, "tag": true, "msg": true, "rev": true, "ver": true, "maturity": true, "accuracy": true, "status": true, "pass": true, "annotate": true}

// planRule reads a rule; ok if it is no more than the plan knows.
func planRule(raw string, r *rule, phase types.RulePhase) (p planned, ok bool) {
	p = planned{rule: r, phase: phase}
	word, rest, _ := strings.Cut(strings.TrimSpace(raw), " ")
	vars, rest, _ := strings.Cut(strings.TrimSpace(rest), " ")
	if !strings.EqualFold(word, "SecRule") || strings.ContainsAny(raw, "\n\\`") {
		return p, false
	}
	if p.mask, ok = ownOperator(raw); !ok || !p.readTargets(vars) {
		return p, false
	}
	rest, ok = strings.CutPrefix(strings.TrimSpace(rest), `"`)
	_, rest, closed := strings.Cut(rest, `"`) // the operator, which ownOperator has read
	rest, opened := strings.CutPrefix(strings.TrimSpace(rest), `"`)
	rest, end := strings.CutSuffix(rest, `"`)
	if !ok || !closed || !opened || !end || strings.Contains(rest, `"`) {
		return p, false
	}
	for _, a := range splitActions(rest) {
		name, value, _ := strings.Cut(a, ":")
		switch name = strings.ToLower(strings.TrimSpace(name)); {
		case name == "deny":
			p.deny = true
		case name == "redact":
			p.redact = true
		case name == "replace" || name == "truncate":
			p.edits = append(p.edits, redaction{replaces: true, with: strings.Trim(strings.TrimSpace(value), "'"), rest: name == "truncate"})
		case name == "t" && strings.EqualFold(strings.TrimSpace(value), "none"):
		case !plainActions[name] || strings.Contains(value, "%{"):
			return p, false
		}
	}
	return p, !p.deny || !strings.Contains(","+strings.ReplaceAll(rest, " ", "")+",", ",pass,") // one of both
}

// splitActions splits at commas outside of quotes.
func splitActions(s string) (list []string) {
	quoted, from := false, 0
	for i := range len(s) {
		switch {
		case s[i] == '\'':
			quoted = !quoted
		case s[i] == ',' && !quoted:
			list = append(list, s[from:i])
			from = i + 1
		}
	}
	return append(list, s[from:])
}

// readTargets reads the variables of a rule.
func (p *planned) readTargets(vars string) bool {
	for _, v := range strings.Split(vars, "|") {
		v, not := strings.CutPrefix(v, "!")
		name, key, keyed := strings.Cut(v, ":")
		name = strings.ToUpper(name)
		t, ok := targetKinds[name]
		if !ok || keyed && (key == "" || strings.ContainsAny(key, `/'"`)) || not && !keyed {
			return false
		}
		t.variable, t.key = name, strings.ToLower(key)
		if !not {
			p.targets = append(p.targets, t)
			continue
		}
		found := false
		for i := range p.targets {
			if p.targets[i].variable == name {
				p.targets[i].except = append(slices.Clip(p.targets[i].except), t.key)
				found = true
			}
		}
		if !found {
			return false
		}
	}
	return len(p.targets) > 0
}

// takes reports whether a text is one of the target's.
func (t *target) takes(x *text) bool {
	return t.places[x.place] && (t.key == "" || strings.EqualFold(t.key, x.name)) &&
		!slices.ContainsFunc(t.except, func(k string) bool { return strings.EqualFold(k, x.name) })
}

// evaluate runs the rules of a whole plan over texts.
func (e *engine) evaluate(texts []text, answer bool) (o outcome, err error) {
	plan, phases := &e.request, []types.RulePhase{types.PhaseRequestHeaders, types.PhaseRequestBody}
	if answer {
		plan, phases = &e.answer, []types.RulePhase{types.PhaseResponseHeaders, types.PhaseResponseBody}
	}
	if len(texts) > e.limit {
		return o, errLimit
	}
	o.at = -1
	for _, phase := range phases {
		for i := range plan.rules {
			r := &plan.rules[i]
			if r.phase != phase {
				continue
			}
			first, err := e.matches(r, plan, texts, &o)
			if err != nil {
				return o, err
			}
			if first < 0 {
				continue
			}
			o.matched = append(o.matched, hit{r.rule, first})
			if r.deny && !r.rule.shadow {
				o.denied, o.at = r.rule, first
				return o, nil
			}
		}
	}
	return o, nil
}

// matches is the first text that a rule matches, -1 if none; what the rule
// wants redacted is added to the outcome.
func (e *engine) matches(r *planned, p *plan, texts []text, o *outcome) (first int, err error) {
	first = -1
	for t := range r.targets {
		target := &r.targets[t]
		for i := range texts {
			x := &texts[i]
			if !target.takes(x) {
				continue
			}
			found := x.found
			if target.names {
				if !x.seen {
					if x.named, err = e.readName(x.name, p.reads(inNames)); err != nil {
						return -1, err
					}
					x.seen = true
				}
				found = x.named
			}
			if found&r.mask == 0 {
				continue
			}
			if first < 0 || i < first {
				first = i
			}
			if kinds := r.mask & kindMask; r.redact && !target.names && kinds != 0 && !r.rule.shadow {
				o.redactions = append(o.redactions, redaction{rule: r.rule.id, text: x, mask: kinds})
			}
			for _, edit := range r.edits {
				if edit.rule, edit.text, edit.mask = r.rule.id, x, r.mask&(kindMask|phraseMask|canary); !target.names && !r.rule.shadow {
					o.redactions = append(o.redactions, edit)
				}
			}
		}
	}
	return first, nil
}

// readName reads the name of a text.
func (e *engine) readName(name string, mask uint64) (uint64, error) {
	s := borrow(e)
	defer s.put()
	s.whole([]byte(name), mask)
	if s.over {
		return 0, errDepth
	}
	return s.found, nil
}
