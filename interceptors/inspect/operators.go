package inspect

import (
	"fmt"
	"sort"
	"strconv"
	"strings"
	"sync"
	"unsafe"

	"github.com/corazawaf/coraza/v3/experimental/plugins"
	"github.com/corazawaf/coraza/v3/experimental/plugins/plugintypes"
	"github.com/sluicegate/sluice/interceptors/inspect/classify"
)

// A detector is one bit: bit i for kinds[i], the classes of phrases above.
const firstClass = 32

const (
	hiddenText uint64 = 1 << (firstClass + iota)
	classInjection
	classExtraction
	classJailbreak
	classExfiltration
	classTool
	canary
	oddScript
	repetition
	controls
	firstScore // the score of the classifier is over the threshold for scoreRates[0], and so on, for each speaker
)

// scoreRates are the arguments of @sluiceScore: shares of harmless texts. Beyond
// them the classifier was not measured.
var scoreRates = [...]float64{.05, .02, .01, .005, .002}

// scoreMask covers them for each speaker: the score of the whole text, and of what is said in it
// in each role (see roles.go).
const scoreMask = firstScore<<(int(speakers)*len(scoreRates)) - firstScore

// Masks of detectors by what they look at.
const (
	phraseMask    = hiddenText | classInjection | classExtraction | classJailbreak | classExfiltration | classTool
	surfaceMask   = phraseMask | canary | scoreMask // found in the stream of normalised text
	structureMask = oddScript | repetition | controls
)

// phraseClasses are the arguments of @sluicePhrases.
var phraseClasses = map[string]uint64{
	"hidden":       hiddenText,
	"injection":    classInjection,
	"extraction":   classExtraction,
	"jailbreak":    classJailbreak,
	"exfiltration": classExfiltration,
	"tool":         classTool,
	"canary":       canary,
}

// structureClasses are the arguments of @sluiceStructure.
var structureClasses = map[string]uint64{"script": oddScript, "repetition": repetition, "control": controls}

// kindClasses are the arguments of @sluicePersonal or @sluiceSecret.
func kindClasses(secret bool) map[string]uint64 {
	m := make(map[string]uint64)
	for i, k := range kinds {
		if k.secret == secret {
			m[k.name] = 1 << i
		}
	}
	return m
}

// scoreClasses are the arguments of @sluiceScore.
var scoreClasses = func() map[string]uint64 {
	m := make(map[string]uint64)
	for i, rate := range scoreRates {
		for by, name := range speakerNames {
			m[name+strconv.FormatFloat(rate, 'g', -1, 64)] = scoreOf(firstScore<<i, speaker(by))
		}
	}
	return m
}()

// thresholds are the scores for scoreRates.
var thresholds = func() (t [len(scoreRates)]float32) {
	for i, rate := range scoreRates {
		t[i] = classify.Threshold(rate)
	}
	return t
}()

// overRates are the detectors that a score of the classifier fires, of whole texts.
func overRates(score float32) (found uint64) {
	for i := range scoreRates {
		if score > thresholds[i] {
			found |= firstScore << i
		}
	}
	return found
}

// kindMask covers the detectors that find spans.
const kindMask uint64 = 1<<firstClass - 1

// operators are ours, by their names.
var operators = map[string]map[string]uint64{
	"sluicePhrases":   phraseClasses,
	"sluicePersonal":  kindClasses(false),
	"sluiceSecret":    kindClasses(true),
	"sluiceStructure": structureClasses,
	"sluiceScore":     scoreClasses,
}

func init() {
	for name, classes := range operators {
		plugins.RegisterOperator(name, func(o plugintypes.OperatorOptions) (plugintypes.Operator, error) {
			mask, err := parseDetectors(o.Arguments, classes)
			return detect(mask), err
		})
	}
	plugins.RegisterAction("redact", func() plugintypes.Action { return redact{} })
	plugins.RegisterAction("replace", func() plugintypes.Action { return &replaceBy{} })
	plugins.RegisterAction("truncate", func() plugintypes.Action { return &replaceBy{rest: true} })
	plugins.RegisterAction("annotate", func() plugintypes.Action { return annotate{} })
}

// parseDetectors reads a list of names, separated by commas or spaces.
func parseDetectors(list string, classes map[string]uint64) (mask uint64, err error) {
	names := strings.FieldsFunc(list, func(r rune) bool { return r == ',' || r == ' ' })
	for _, n := range names {
		if classes[n] == 0 {
			return 0, fmt.Errorf("no detector %q; there are %s", n, strings.Join(sorted(classes), ", "))
		}
		mask |= classes[n]
	}
	if mask == 0 {
		return 0, fmt.Errorf("name a detector: %s", strings.Join(sorted(classes), ", "))
	}
	return mask, nil
}

func sorted(m map[string]uint64) []string {
	names := make([]string, 0, len(m))
	for n := range m {
		names = append(names, n)
	}
	sort.Strings(names)
	return names
}

// passes are the transactions under way, by their ids: Coraza hands an operator
// nothing of ours but the id.
var passes sync.Map

// pass is one transaction: its texts, what was found in them before it began,
// and what its rules want done.
type pass struct {
	engine *engine
	base   string // every name and value
	names  uint64 // detectors that some rule asks for of names
	texts  []text
	last   struct {
		text *text // nil if what matched is no text as it came
		mask uint64
	}
	redactions []redaction
	over       bool // something could not be read whole
}

// redaction says that a rule wants what detectors found in a text replaced.
type redaction struct {
	rule     int
	text     *text
	mask     uint64
	replaces bool // by with, else by what it is
	with     string
	rest     bool // and all that follows
}

// index is that of the text that value is a part of, or of its name, or -1:
// what a transformation made is no part of any. It compares addresses: Coraza
// hands on what it was given.
func (p *pass) index(value string) int {
	if value == "" || p.base == "" {
		return -1
	}
	at := uintptr(unsafe.Pointer(unsafe.StringData(value))) - uintptr(unsafe.Pointer(unsafe.StringData(p.base)))
	if at >= uintptr(len(p.base)) {
		return -1
	}
	i := sort.Search(len(p.texts), func(i int) bool { return p.texts[i].at+len(p.texts[i].value) > int(at) })
	if i == len(p.texts) {
		return -1
	}
	return i
}

// read reads what is no text of the message as it came.
func (p *pass) read(value string, mask uint64) uint64 {
	s := borrow(p.engine)
	defer s.put()
	s.whole([]byte(value), mask)
	p.over = p.over || s.over
	return s.found
}

// lookup is the text that value is, or is the name of, or nil.
func (p *pass) lookup(value string) (t *text, name bool) {
	i := p.index(value)
	if i < 0 {
		return nil, false
	}
	t = &p.texts[i]
	switch start := unsafe.StringData(value); {
	case start == unsafe.StringData(p.base[t.at:]) && len(value) == len(t.value):
		return t, false
	case start == unsafe.StringData(p.base[t.at-len(t.name):]) && len(value) == len(t.name):
		return t, true
	}
	return nil, false
}

// detect is an operator: it matches where one of its detectors has fired. The
// texts were read before the transaction began; only what a transformation made
// is read here.
type detect uint64

func (d detect) Evaluate(tx plugintypes.TransactionState, value string) bool {
	v, ok := passes.Load(tx.ID())
	if !ok {
		return false // not a transaction of ours
	}
	p := v.(*pass)
	t, name := p.lookup(value)
	var found uint64
	switch {
	case t == nil:
		found = p.read(value, uint64(d))
	case name:
		if !t.seen {
			t.named, t.seen = p.read(value, p.names), true
		}
		found, t = t.named, nil
	default:
		found = t.found
	}
	if found&uint64(d) == 0 {
		return false
	}
	p.last.text, p.last.mask = t, uint64(d)&(kindMask|phraseMask|canary)
	return true
}

// redact is an action: what the rule's operator found is replaced.
type redact struct{}

func (redact) Init(_ plugintypes.RuleMetadata, data string) error {
	if data != "" {
		return fmt.Errorf("redact takes no argument")
	}
	return nil
}

func (redact) Evaluate(rule plugintypes.RuleMetadata, tx plugintypes.TransactionState) {
	wants(rule, tx, redaction{mask: kindMask})
}

// wants notes that a rule wants what its operator found replaced.
func wants(rule plugintypes.RuleMetadata, tx plugintypes.TransactionState, r redaction) {
	v, ok := passes.Load(tx.ID())
	if !ok {
		return
	}
	p := v.(*pass)
	r.rule = rule.ID()
	if r.rule == 0 {
		r.rule = rule.ParentID()
	}
	r.text, r.mask = p.last.text, p.last.mask&r.mask
	if r.text != nil && r.mask != 0 {
		p.redactions = append(p.redactions, r)
	}
}

func (redact) Type() plugintypes.ActionType { return plugintypes.ActionTypeNondisruptive }

// replaceBy is an action on outputs: what the rule's operator found, and maybe all
// that follows, is replaced by a text.
type replaceBy struct {
	with string
	rest bool
}

func (r *replaceBy) Init(_ plugintypes.RuleMetadata, data string) error {
	r.with = data
	return nil
}

func (r *replaceBy) Evaluate(rule plugintypes.RuleMetadata, tx plugintypes.TransactionState) {
	wants(rule, tx, redaction{mask: ^uint64(0), replaces: true, with: r.with, rest: r.rest})
}

func (*replaceBy) Type() plugintypes.ActionType { return plugintypes.ActionTypeNondisruptive }

// annotate is an action: the model server is told the rule's class. The policy
// does so for every rule that has matched; there is nothing to do before.
type annotate struct{}

func (annotate) Init(_ plugintypes.RuleMetadata, data string) error {
	if data != "" {
		return fmt.Errorf("annotate takes no argument")
	}
	return nil
}

func (annotate) Evaluate(plugintypes.RuleMetadata, plugintypes.TransactionState) {}

func (annotate) Type() plugintypes.ActionType { return plugintypes.ActionTypeNondisruptive }
