package inspect

import (
	"cmp"
	"embed"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"unsafe"

	"github.com/corazawaf/coraza/v3"
	"github.com/corazawaf/coraza/v3/experimental"
	"github.com/corazawaf/coraza/v3/experimental/plugins/plugintypes"
	"github.com/corazawaf/coraza/v3/types"
	configv1 "github.com/sluicegate/sluice/proto/gen/sluice/config/v1"
)

//go:embed rules
var rulesFS embed.FS

//go:embed phrases.txt
var phrasesText string

// dictionaries are compiled once; they are the same for every policy.
var dictionaries = sync.OnceValues(func() (d struct{ words, spelled *automaton }, err error) {
	if d.words, err = parsePhrases(phrasesText, phraseClasses, false); err == nil {
		d.spelled, err = parsePhrases(phrasesText, phraseClasses, true)
	}
	if err != nil {
		err = fmt.Errorf("phrases.txt: %w", err)
	}
	return d, err
})

// argumentLimit is how many texts one message may have. Coraza passes over what
// comes after its own limit without a word, so that one is set to this, and
// reaching it is a refusal. The limit on fields of a message is far below.
const argumentLimit = 1 << 20

// engine is a compiled rule set. It is immutable and safe for concurrent use.
type engine struct {
	waf     coraza.WAF
	txs     experimental.WAFWithOptions
	rules   map[int]*rule
	limit   int
	request plan
	answer  plan
	output  outputPlan
	flows   sync.Pool // of *flow

	annotates bool // some rule has the action
	reads     bool // outputs

	canary, canarySpelled *automaton // nil without canaries

	names *names
}

// rule is what is told of a rule.
type rule struct {
	id       int
	class    string
	shadow   bool
	annotate bool // the model server is told
	log      bool // a match is an event, whatever else it is
}

// source is a piece of SecLang.
type source struct {
	field string // of the configuration
	name  string
	text  []byte
}

func newEngine(cfg *configv1.Inspect, dir string) (*engine, error) {
	if _, err := dictionaries(); err != nil {
		return nil, err
	}
	var err error
	var sources []source
	if !cfg.GetNoStarterRules() {
		text, err := rulesFS.ReadFile("rules/starter.conf")
		if err != nil {
			return nil, err
		}
		sources = append(sources, source{"no_starter_rules", embedded + "starter.conf", text})
	}
	for n, name := range cfg.GetRuleFiles() {
		field := fmt.Sprintf("rule_files[%d]", n)
		if !filepath.IsAbs(name) && !strings.HasPrefix(name, embedded) {
			name = filepath.Join(dir, name)
		}
		if strings.HasPrefix(name, embedded) {
			sources = append(sources, source{field: field, name: name})
			continue
		}
		name, err := filepath.Abs(name)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", field, err)
		}
		sources = append(sources, source{field: field, name: name})
	}
	for i := range sources {
		if sources[i].text == nil {
			if sources[i].text, err = readRules(sources[i].name); err != nil {
				return nil, fmt.Errorf("%s: %w", sources[i].field, err)
			}
		}
	}
	if r := cfg.GetRules(); strings.TrimSpace(r) != "" {
		sources = append(sources, source{inline, inline, []byte(r)})
	}
	e := &engine{limit: argumentLimit, names: new(names)}
	if e.canary, e.canarySpelled, err = newCanaries(cfg.GetCanaries()); err != nil {
		return nil, err
	}
	e.reads = cfg.GetResponses()
	if err := e.compile(sources, cfg.GetShadow()); err != nil {
		return nil, locate(sources, err)
	}
	return e, e.planOutputs(cfg)
}

// inline is the field of rules in the configuration itself, and what they are
// called in errors.
const inline = "rules"

// locate says in which field, file and line the directive is that Coraza
// refuses: it names the file at best.
func locate(sources []source, err error) error {
	var at *ruleError
	if errors.As(err, &at) {
		return located(sources, at)
	}
	fails := func(s []source) error { return new(engine).compile(s, nil) }
	for i := range sources {
		err := fails(sources[:i+1])
		if err == nil {
			continue
		}
		ends := directives(sources[i].text)
		some := slices.Clone(sources[:i+1])
		n, _ := slices.BinarySearchFunc(ends, 0, func(d directive, _ int) int {
			some[i].text = sources[i].text[:d.end]
			if fails(some) == nil {
				return -1
			}
			return 1
		})
		if n < len(ends) {
			return located(sources, &ruleError{sources[i].name, ends[n].line, errors.New(reason(err))})
		}
		return fmt.Errorf("%s: %s: %s", sources[i].field, sources[i].name, reason(err))
	}
	if errors.Is(err, errShadow) {
		return err
	}
	return fmt.Errorf("%s: %w", inline, err)
}

// located puts the field before an error in a rule. A file that others include
// has none of its own.
func located(sources []source, at *ruleError) error {
	if at.file == inline {
		return at
	}
	for _, s := range sources {
		if s.name == at.file {
			return fmt.Errorf("%s: %w", s.field, at)
		}
	}
	return fmt.Errorf("%s: %w", inline, at)
}

var errShadow = errors.New("there is no such rule")

// reason is Coraza's error without its account of where it was.
func reason(err error) string {
	s := err.Error()
	for _, p := range []string{"invalid WAF config from file: ", "failed to parse string: ", "failed to readfile: "} {
		s = strings.TrimPrefix(s, p)
	}
	return s
}

// compile makes the WAF and the plans.
func (e *engine) compile(sources []source, shadow []uint32) error {
	files := &ruleFS{files: make(map[string][]byte), outputs: e.reads}
	cfg := coraza.NewWAFConfig().WithRootFS(files).WithDirectives("SecRuleEngine On")
	for _, s := range sources {
		files.files[s.name] = s.text
		cfg = cfg.WithDirectivesFromFile("/" + s.name) // the slash: not relative to another file
	}
	for _, id := range shadow {
		cfg = cfg.WithDirectives(fmt.Sprintf("SecRuleUpdateActionById %d \"pass\"", id))
	}
	cfg = cfg.WithDirectives("SecAuditEngine Off\nSecRequestBodyAccess Off\nSecResponseBodyAccess Off\nSecArgumentsLimit " +
		strconv.Itoa(max(e.limit, 1)))
	e.rules = make(map[int]*rule)
	var bad error
	cfg = experimental.WAFConfigWithRuleObserver(cfg, func(m types.RuleMetadata) {
		if err := e.observe(m); err != nil && bad == nil {
			bad = err
		}
	})
	waf, err := coraza.NewWAF(cfg)
	if files.err != nil {
		return files.err
	}
	if bad != nil {
		return bad
	}
	for n, id := range shadow {
		r := e.rules[int(id)]
		if r == nil {
			return fmt.Errorf("shadow[%d]: %w: %d", n, errShadow, id)
		}
		r.shadow = true
	}
	if err != nil {
		return err
	}
	if files.foreign {
		e.request.foreign, e.answer.foreign = true, true
	}
	if n := len(e.request.rules) + len(e.answer.rules); files.partial || waf.(experimental.WAFWithRules).RulesCount() != n {
		e.request.partial, e.answer.partial = true, true
	}
	for _, p := range []*plan{&e.request, &e.answer} {
		if p.foreign || p.partial {
			p.scored = everywhere
		}
		for _, r := range p.rules {
			p.names = p.names || slices.ContainsFunc(r.targets, func(t target) bool { return t.names })
		}
	}
	e.waf, e.txs = waf, waf.(experimental.WAFWithOptions)
	return nil
}

// observe learns a rule and what the plan has to know of it.
func (e *engine) observe(m types.RuleMetadata) error {
	if m.SecMark() != "" {
		return nil
	}
	r := &rule{id: m.ID(), class: "rule"}
	for _, t := range m.Tags() {
		if c, ok := strings.CutPrefix(t, "class/"); ok {
			r.class = c
		}
	}
	e.rules[r.id] = r
	raw := m.Raw()
	fail := func(what string) error {
		return &ruleError{strings.TrimPrefix(m.File(), "/"), m.Line(), fmt.Errorf("rule %d: %s", m.ID(), what)}
	}
	p := &e.request
	switch m.Phase() {
	case types.PhaseRequestHeaders, types.PhaseRequestBody:
	case types.PhaseResponseHeaders, types.PhaseResponseBody:
		p = &e.answer
	default:
		return fail("its phase never runs; requests are phases 1 and 2, responses 3 and 4")
	}
	lower := strings.ToLower(raw)
	if hasAction(lower, "redact") && !strings.Contains(lower, "@sluicepersonal") && !strings.Contains(lower, "@sluicesecret") {
		return fail("redact needs @sluicePersonal or @sluiceSecret, which know what to replace")
	}
	said, err := longest(m.Tags())
	if err != nil {
		return fail(err.Error())
	}
	if edits := strings.Contains(lower, "replace:") || strings.Contains(lower, "truncate:"); edits {
		if !strings.Contains(lower, "@sluicepersonal") && !strings.Contains(lower, "@sluicesecret") && !strings.Contains(lower, "@sluicephrases") {
			return fail("replace and truncate need @sluicePersonal, @sluiceSecret or @sluicePhrases, which know what to replace")
		}
		p.edits = true
		if p == &e.request {
			return fail("replace and truncate go with responses; in a request use redact, or deny it")
		}
	}
	r.log, r.annotate = hasAction(lower, "log"), hasAction(lower, "annotate")
	if asks, _ := ownOperator(raw); p == &e.answer && asks&roleMask != 0 {
		return fail("the score of a role goes with requests; in a response ask for that of all, as in @sluiceScore 0.005")
	} else if p == &e.answer && asks&(1<<kindAddress) != 0 {
		return fail("address goes with requests: a streamed response cannot be held back for the words around a number")
	}
	if r.annotate && p == &e.answer {
		return fail("annotate goes with requests: what it tells is sent before there is a response")
	}
	e.annotates = e.annotates || r.annotate
	mask, ok := ownOperator(raw)
	if foreign := !ok || transforms(raw); foreign {
		p.foreign = true
		if p == &e.answer {
			e.output.window = max(e.output.window, cmp.Or(said, defaultLongest))
		}
	} else if p == &e.answer {
		e.output.longest = max(e.output.longest, said)
	}
	p.mask |= mask
	one, ok := planRule(raw, r, m.Phase())
	if ok {
		p.rules = append(p.rules, one)
	}
	if mask&scoreMask != 0 {
		p.score(&one, ok)
	}
	p.partial = p.partial || !ok
	if hasAction(lower, "chain") { // the rest of it, which is not told of, may ask for anything
		p.mask = ^uint64(0)
		if p == &e.answer {
			p.mask &^= scoreMask
		}
	}
	return nil
}

func hasAction(raw, action string) bool {
	return slices.Contains(strings.FieldsFunc(raw, func(r rune) bool {
		return r == ',' || r == '"' || r == ' ' || r == '\t' || r == '\n'
	}), action)
}

// ownOperator reads the operator of a rule; ok if it is ours, and not negated.
func ownOperator(raw string) (mask uint64, ok bool) {
	rest := strings.TrimSpace(raw)
	word, rest, _ := strings.Cut(rest, " ")
	if !strings.EqualFold(word, "SecRule") {
		return 0, false
	}
	_, rest, _ = strings.Cut(strings.TrimSpace(rest), " ") // the variables have no spaces, or the rule is foreign
	rest, ok = strings.CutPrefix(strings.TrimSpace(rest), `"@`)
	if !ok {
		return 0, false
	}
	op, _, ok := strings.Cut(rest, `"`)
	if !ok {
		return 0, false
	}
	name, args, _ := strings.Cut(op, " ")
	classes := operators[name]
	if classes == nil {
		return 0, false
	}
	mask, err := parseDetectors(args, classes)
	return mask, err == nil
}

// text is one argument of a transaction.
type text struct {
	place place
	name  string
	value []byte
	found uint64 // detectors that fired
	named uint64 // detectors that fire on the name, once it was read
	seen  bool   // it was
	at    int    // of the value in pass.base
	field int    // index in the message, or -1

}

// place is the collection that an argument is in.
type place uint8

const (
	inPrompt     place = iota // ARGS_POST
	inParameter               // ARGS_GET
	inIdentifier              // ARGS_PATH
	inAnswer                  // RESPONSE_ARGS
	inNames                   // ARGS_NAMES: no text is there, names of texts are
	places
)

// outcome is what a transaction decided.
type outcome struct {
	denied     *rule
	at         int // the text that it was denied for, or -1
	redactions []redaction
	matched    []hit
}

// hit is a rule that matched, and the first text that it matched, or -1.
type hit struct {
	rule *rule
	text int
}

var (
	errEngine = errors.New("the rule engine failed")
	errLimit  = errors.New("more texts than the rule engine takes")
	errDepth  = errors.New("the text stands for more text than is inspected")

	transactionID atomic.Uint64
)

// decide runs the rules over texts, in a transaction where they need one.
func (e *engine) decide(texts []text, answer bool) (outcome, error) {
	p := &e.request
	if answer {
		p = &e.answer
	}
	if p.whole() {
		return e.evaluate(texts, answer)
	}
	return e.judge(texts, answer)
}

// judge runs the rules over texts in a transaction.
func (e *engine) judge(texts []text, answer bool) (o outcome, err error) {
	if len(texts) > e.limit {
		return o, errLimit
	}
	defer func() {
		if v := recover(); v != nil { // its value may quote the text
			err = errEngine
		}
	}()
	n := 0
	for i := range texts {
		n += len(texts[i].value) + len(texts[i].name)
	}
	// One copy of all that Coraza sees: it keeps views of it until its
	// transaction is used again, the message's buffers live shorter.
	buf := make([]byte, 0, n)
	for i := range texts {
		buf = append(buf, texts[i].name...)
		texts[i].at = len(buf)
		buf = append(buf, texts[i].value...)
	}
	p := &pass{engine: e, base: unsafe.String(unsafe.SliceData(buf), len(buf)), names: e.request.reads(inNames), texts: texts}
	if answer {
		p.names = e.answer.reads(inNames)
	}
	id := strconv.FormatUint(transactionID.Add(1), 36)
	passes.Store(id, p)
	defer passes.Delete(id)
	tx := e.txs.NewTransactionWithOptions(experimental.Options{ID: id})
	defer func() {
		if tx.Close() != nil && err == nil {
			err = errEngine
		}
	}()
	for i := range texts {
		t := &texts[i]
		value := p.base[t.at : t.at+len(t.value)]
		name := p.base[t.at-len(t.name) : t.at]
		switch t.place {
		case inPrompt:
			tx.AddPostRequestArgument(name, value)
		case inParameter:
			tx.AddGetRequestArgument(name, value)
		case inIdentifier:
			tx.AddPathRequestArgument(name, value)
		case inAnswer:
			tx.AddResponseArgument(name, value)
		}
	}
	state, ok := tx.(plugintypes.TransactionState)
	if !ok || state.Variables().ArgumentsLimitReached().Get() == "1" {
		return o, errLimit
	}
	if answer {
		if tx.ProcessResponseHeaders(200, "HTTP/2.0") == nil {
			_, err = tx.ProcessResponseBody()
		}
	} else if tx.ProcessRequestHeaders() == nil {
		_, err = tx.ProcessRequestBody()
	}
	switch {
	case err != nil:
		return o, errEngine
	case p.over:
		return o, errDepth
	}
	o.at = -1
	matched := tx.MatchedRules()
	for _, m := range matched {
		r := e.rules[m.Rule().ID()]
		if r == nil {
			continue
		}
		h := hit{r, -1}
		for _, d := range m.MatchedDatas() {
			if i := p.index(d.Value()); i >= 0 && (h.text < 0 || i < h.text) {
				h.text = i // in order of the message, whatever Coraza's is
			}
		}
		o.matched = append(o.matched, h)
	}
	if in := tx.Interruption(); in != nil {
		o.denied = e.rules[in.RuleID]
		if o.denied == nil {
			o.denied = &rule{id: in.RuleID, class: "rule"}
		}
		for _, h := range o.matched {
			if h.rule == o.denied {
				o.at = h.text
			}
		}
	}
	for _, r := range p.redactions {
		for _, h := range o.matched { // an action runs also where the rest of its chain does not match
			if h.rule.id == r.rule && !h.rule.shadow {
				o.redactions = append(o.redactions, r)
				break
			}
		}
	}
	return o, nil
}
