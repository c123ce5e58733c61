// Package corpus composes texts to train and test the classifier with: attacks
// on language models, and harmless texts that look like them.
//
// The texts come from a grammar (folder grammar) that was written from
// knowledge of the techniques: intents, wordings, wrappers, positions,
// languages, and noise. It takes no sentence from elsewhere. Whatever attacks are made of
// (topics, names, documents to hide in, ways to ask) harmless texts are made of
// too, so that only what makes an attack tells them apart.
package corpus

import (
	"math/rand/v2"
	"strings"
	"sync"
)

// Version changes when the same seed gives other texts.
const Version = 6

// Text is a composed text.
type Text struct {
	Attack   bool
	Category string
	Lang     string // ISO 639-1
	Text     string
}

// Generator composes texts. It is not safe for concurrent use.
type Generator struct {
	g grammar
	r *rand.Rand
}

var parsed = sync.OnceValues(readGrammar)

// New is a generator; equal seeds give equal texts. An error is one of the
// grammar.
func New(seed uint64) (*Generator, error) {
	g, err := parsed()
	if err != nil {
		return nil, err
	}
	return &Generator{g: g, r: rand.New(rand.NewPCG(seed, Version))}, nil //nolint:gosec // meant to repeat
}

// kind is a kind of text: what it is made of, and what is put into its slot.
type kind struct {
	category string
	start    string
	slot     string
	weight   int
}

var attacks = []kind{
	{"hijack", "hj", "", 22},
	{"override", "override_attack", "", 14},
	{"override", "unlock", "", 4},
	{"extraction", "leak", "", 26},
	{"extraction", "extract_attack", "", 14},
	{"jailbreak", "jx", "", 24},
	{"jailbreak", "epic", "", 8},
	{"jailbreak", "jailbreak_attack", "", 10},
	{"jailbreak", "jb_short", "", 5},
	{"hidden", "hidden_task", "", 7},
	{"form", "form", "", 18},
	{"plain", "plain", "", 20},
	{"override", "spoken", "", 70},
	{"extraction", "asking", "", 70},
	{"jailbreak", "coaxed", "", 70},
	{"drift", "drift", "", 20},
	{"persuasion", "persuade", "", 10},
	{"memory", "persist", "", 3},
	{"suffix", "suffix_attack", "", 2},
	{"exfiltration", "exfil_attack", "", 3},
	{"exfiltration", "inj_leak", "", 3},
	{"indirect", "injection", "", 3},
	{"indirect", "inj", "", 5},
	{"foreign", "others_attack", "", 2},
	{"tool", "json_carrier", "persist", 2},
	{"tool", "json_carrier", "stray", 3},
	{"tool", "json_carrier", "injection", 4},
	{"tool", "json_carrier", "bare_action", 4},
	{"tool", "json_carrier", "inj", 9},
	{"tool", "json_carrier", "inj_bare", 9},
	{"mail", "mail_carrier", "stray", 3},
	{"mail", "mail_carrier", "injection", 3},
	{"mail", "mail_carrier", "inj", 6},
	{"document", "doc_carrier", "override_attack", 2},
	{"document", "doc_carrier", "persist", 2},
	{"document", "doc_carrier", "exfil", 2},
	{"document", "doc_carrier", "stray", 6},
	{"document", "doc_carrier", "hj", 3},
	{"document", "doc_carrier", "leak", 2},
	{"document", "doc_carrier", "injection", 5},
	{"document", "doc_carrier", "inj", 9},
	{"document", "long_carrier", "inj", 10},
	{"document", "long_carrier", "inj_bare", 3},
	{"document", "long_carrier", "stray", 4},
	{"document", "long_carrier", "form", 3},
	{"document", "long_carrier", "injection", 3},
	{"document", "long_carrier", "hj", 2},
	{"document", "long_carrier", "leak", 2},
	{"tool", "data_carrier", "inj", 8},
	{"tool", "data_carrier", "inj_bare", 8},
	{"tool", "data_carrier", "stray", 2},
	{"tool", "data_carrier", "form", 2},
	{"tool", "data_carrier", "hj", 2},
	{"tool", "data_carrier", "leak", 1},
	{"document", "long_carrier", "planted", 10},
	{"document", "doc_carrier", "planted", 6},
	{"document", "long_carrier", "spoken", 3},
	{"tool", "data_carrier", "planted", 10},
	{"tool", "data_carrier", "planted_bare", 8},
	{"tool", "json_carrier", "planted", 6},
	{"tool", "json_carrier", "planted_bare", 6},
	{"mail", "mail_carrier", "planted", 6},
	{"page", "html_carrier", "planted", 4},
	{"code", "code_carrier", "planted", 3},
	{"document", "planted", "", 4},
	{"document", "tucked", "", 40},
	{"slipped", "slipped", "", 30},
	{"document", "doc_carrier", "slipped", 14},
	{"document", "long_carrier", "slipped", 14},
	{"document", "readme_carrier", "slipped", 4},
	{"tool", "data_carrier", "slipped", 10},
	{"tool", "json_carrier", "slipped", 8},
	{"mail", "mail_carrier", "slipped", 6},
	{"page", "html_carrier", "slipped", 5},
	{"code", "code_carrier", "slipped", 3},
	{"document", "genre", "", 8},
	{"document", "long_carrier", "genre", 6},
	{"document", "doc_carrier", "genre", 4},
	{"tool", "data_carrier", "genre", 6},
	{"mail", "mail_carrier", "genre", 3},
	{"code", "code_carrier", "genre", 2},
	{"document", "readme_carrier", "planted", 8},
	{"document", "readme_carrier", "inj", 6},
	{"document", "readme_carrier", "hj", 2},
	{"document", "readme_carrier", "spoken", 4},
	{"page", "html_carrier", "stray", 2},
	{"page", "html_carrier", "injection", 2},
	{"page", "html_carrier", "inj", 4},
	{"code", "code_carrier", "injection", 2},
	{"code", "code_carrier", "inj", 4},
}

var harmless = []kind{
	{"ordinary", "ordinary", "", 12},
	{"linked", "linked", "", 70},
	{"document", "readme_carrier", "inert", 16},
	{"document", "readme_carrier", "among_people", 10},
	{"document", "readme_carrier", "turns", 4},
	{"chat", "followup", "", 8},
	{"chat", "chat", "", 7},
	{"chat", "talk", "", 22},
	{"near", "near", "", 26},
	{"chat", "ask", "", 26},
	{"exercise", "exercise", "", 5},
	{"exercise", "lesson", "", 26},
	{"technical", "tech", "", 12},
	{"agent", "machine", "", 12},
	{"security", "sec", "", 12},
	{"image", "image", "", 2},
	{"people", "people", "", 7},
	{"people", "vice_safe", "", 8},
	{"sum", "sum", "", 8},
	{"others", "others", "", 12},
	{"roleplay", "rp", "", 30},
	{"chat", "curt", "", 40},
	{"document", "tucked_safe", "", 40},
	{"slipped", "slipped_safe", "", 40},
	{"document", "doc_carrier", "slipped_safe", 14},
	{"document", "long_carrier", "slipped_safe", 14},
	{"document", "readme_carrier", "slipped_safe", 4},
	{"tool", "data_carrier", "slipped_safe", 10},
	{"tool", "json_carrier", "slipped_safe", 8},
	{"mail", "mail_carrier", "slipped_safe", 6},
	{"page", "html_carrier", "slipped_safe", 5},
	{"code", "code_carrier", "slipped_safe", 3},
	{"chat", "turns", "", 70},
	{"near", "wonder", "", 70},
	{"roleplay", "parts", "", 70},
	{"note", "among_people", "", 10},
	{"chat", "readers", "", 40},
	{"document", "long_carrier", "among_people", 12},
	{"document", "doc_carrier", "among_people", 8},
	{"tool", "data_carrier", "among_people", 16},
	{"tool", "json_carrier", "among_people", 12},
	{"mail", "mail_carrier", "among_people", 8},
	{"page", "html_carrier", "among_people", 4},
	{"code", "code_carrier", "among_people", 3},
	{"document", "doc_carrier", "turns", 3},
	{"roleplay", "brief", "", 12},
	{"roleplay", "roleplay", "", 7},
	{"roleplay", "long_roleplay", "", 7},
	{"ignore", "ordinary_ignore", "", 6},
	{"security", "security_note", "", 8},
	{"note", "benign_note", "", 8},
	{"office", "office", "", 14},
	{"request", "office_user", "", 8},
	{"request", "human_request", "", 3},
	{"system", "system_prompt", "", 5},
	{"coding", "coding", "", 4},
	{"tool", "json_carrier", "inert", 12},
	{"tool", "json_carrier", "office", 8},
	{"mail", "mail_carrier", "inert", 6},
	{"mail", "mail_carrier", "office", 6},
	{"document", "doc_carrier", "inert", 12},
	{"document", "doc_carrier", "rp_ask", 3},
	{"document", "long_carrier", "inert", 36},
	{"document", "long_carrier", "office", 10},
	{"document", "long_carrier", "lesson", 3},
	{"document", "passage", "", 24},
	{"tool", "data_carrier", "inert", 14},
	{"tool", "data_carrier", "office", 12},
	{"tool", "data_carrier", "rp_ask", 2},
	{"tool", "data_carrier", "machine", 5},
	{"document", "long_carrier", "machine", 4},
	{"page", "html_carrier", "inert", 5},
	{"code", "code_carrier", "inert", 5},
	{"document", "doc_carrier", "tech", 3},
	{"document", "doc_carrier", "sec", 2},
	{"tool", "json_carrier", "tech", 2},
}

// Attack composes an attack.
func (g *Generator) Attack() Text { return g.make(attacks, true) }

// Harmless composes a harmless text.
func (g *Generator) Harmless() Text { return g.make(harmless, false) }

func (g *Generator) make(kinds []kind, attack bool) Text {
	if g.r.IntN(100) < foreignShare {
		return g.foreign(attack)
	}
	k := pick(g.r, kinds)
	text := g.Expand(k.start)
	if k.slot != "" {
		text = strings.ReplaceAll(text, slot, g.Expand(k.slot))
	}
	if g.r.IntN(14) == 0 {
		text = g.among(text)
	}
	return Text{Attack: attack, Category: k.category, Lang: "en", Text: g.typed(text)}
}

// among puts a text among harmless ones, as turns of a conversation or parts of
// a document.
func (g *Generator) among(text string) string {
	parts := []string{text}
	for range 1 + g.r.IntN(3) {
		other := pick(g.r, harmless)
		t := strings.ReplaceAll(g.Expand(other.start), slot, g.Expand("inert"))
		if g.r.IntN(3) == 0 {
			parts = append(parts, t)
		} else {
			parts = append([]string{t}, parts...)
		}
	}
	joint := g.Expand("joint")
	return strings.TrimPrefix(joint, "\n") + strings.Join(parts, joint)
}

// languages, beside English, and foreignShare, the percentage of texts in them.
var languages = []string{"de", "fr", "es", "it", "pt", "nl", "pl", "ru", "tr", "zh", "ja", "ko", "ar", "hi"}

const foreignShare = 28

// foreign composes a text in another language, by itself or in an English
// wrapper, as it is where documents and chats are not in the language of the
// program around them.
func (g *Generator) foreign(attack bool) Text {
	lang := languages[g.r.IntN(len(languages))]
	own, slotted := lang+"_benign", lang+"_inert"
	if attack {
		own, slotted = lang+"_attack", lang+"_inject"
	}
	t := Text{Attack: attack, Category: "foreign", Lang: lang}
	switch g.r.IntN(5) {
	case 0:
		t.Text = g.Wrap(g.Expand(slotted))
	case 1:
		t.Text = g.Expand(lang+"_prose") + " " + g.Expand(slotted) + " " + g.Expand(lang+"_prose")
	case 2:
		t.Text = g.Expand(own)
		if !attack { // harmless texts are long, too
			t.Text = g.Expand(lang+"_prose") + " " + t.Text + " " + g.Expand(lang+"_ask") + " " + g.Expand(slotted)
		}
	default:
		t.Text = g.Expand(own)
	}
	return t
}

// slot is what a carrier has in place of what it carries.
const slot = "\x00"

// Expand is a text of a name in the grammar.
func (g *Generator) Expand(name string) string {
	var b strings.Builder
	g.g.expand(&b, g.r, name, 0)
	return b.String()
}

var orders = []string{
	"injection", "inj", "inj", "inj", "inj_bare", "genre", "genre", "stray", "drift", "form", "override_attack", "hj",
	"planted", "planted", "planted", "planted_bare", "tuck_bad", "tuck_bad", "spoken", "asking",
	"slipped", "slipped", "slipped",
}

var notes = []string{"inert", "inert", "inert", "inert", "slipped_safe"}

// Note is what people write in the place of an order: it is harmless.
func (g *Generator) Note() string { return g.Expand(notes[g.r.IntN(len(notes))]) }

// Order is what an attacker hides in something to be read.
func (g *Generator) Order() string {
	if g.r.IntN(8) == 0 {
		return g.Expand(languages[g.r.IntN(len(languages))] + "_inject")
	}
	return g.Expand(orders[g.r.IntN(len(orders))])
}

// Wrap puts a text into something to be read: a tool's result, an e-mail, a
// document, a page or code.
func (g *Generator) Wrap(text string) string {
	carriers := []string{
		"json_carrier", "json_carrier", "data_carrier", "data_carrier", "mail_carrier", "doc_carrier", "long_carrier",
		"html_carrier", "code_carrier", "readme_carrier",
	}
	return strings.ReplaceAll(g.Expand(carriers[g.r.IntN(len(carriers))]), slot, text)
}

func pick(r *rand.Rand, kinds []kind) kind {
	sum := 0
	for _, k := range kinds {
		sum += k.weight
	}
	n := r.IntN(sum)
	for _, k := range kinds {
		if n -= k.weight; n < 0 {
			return k
		}
	}
	return kinds[0]
}
