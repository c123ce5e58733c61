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
const Version = 2

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
	{"override", "override_attack", "", 22},
	{"extraction", "extract_attack", "", 18},
	{"jailbreak", "jailbreak_attack", "", 16},
	{"jailbreak", "jb_short", "", 6},
	{"hidden", "hidden_task", "", 7},
	{"override", "unlock", "", 4},
	{"memory", "persist", "", 3},
	{"tool", "json_carrier", "persist", 2},
	{"document", "doc_carrier", "persist", 2},
	{"suffix", "suffix_attack", "", 2},
	{"exfiltration", "exfil_attack", "", 4},
	{"indirect", "injection", "", 4},
	{"tool", "json_carrier", "injection", 8},
	{"tool", "json_carrier", "bare_action", 6},
	{"mail", "mail_carrier", "injection", 6},
	{"document", "doc_carrier", "injection", 10},
	{"page", "html_carrier", "injection", 4},
	{"code", "code_carrier", "injection", 4},
	{"document", "doc_carrier", "override_attack", 2},
	{"document", "doc_carrier", "exfil", 2},
	{"document", "doc_carrier", "stray", 6},
	{"mail", "mail_carrier", "stray", 3},
	{"page", "html_carrier", "stray", 2},
	{"tool", "json_carrier", "stray", 3},
}

var harmless = []kind{
	{"ordinary", "ordinary", "", 12},
	{"chat", "followup", "", 10},
	{"chat", "chat", "", 8},
	{"exercise", "exercise", "", 7},
	{"image", "image", "", 2},
	{"people", "people", "", 8},
	{"sum", "sum", "", 8},
	{"others", "others", "", 4},
	{"roleplay", "roleplay", "", 12},
	{"roleplay", "long_roleplay", "", 9},
	{"ignore", "ordinary_ignore", "", 8},
	{"security", "security_note", "", 8},
	{"note", "benign_note", "", 8},
	{"system", "system_prompt", "", 5},
	{"coding", "coding", "", 4},
	{"request", "human_request", "", 4},
	{"tool", "json_carrier", "inert", 12},
	{"mail", "mail_carrier", "inert", 7},
	{"document", "doc_carrier", "inert", 10},
	{"page", "html_carrier", "inert", 4},
	{"code", "code_carrier", "inert", 4},
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
	if g.r.IntN(10) == 0 {
		text = g.misspell(text)
	}
	return Text{Attack: attack, Category: k.category, Lang: "en", Text: text}
}

// misspell makes a typing error in one word of eight or so: a letter is left out,
// doubled, or changes places with the next.
func (g *Generator) misspell(text string) string {
	b := []byte(text)
	for i := 2; i+2 < len(b); i++ {
		if c := b[i] | 0x20; c < 'a' || c > 'z' || b[i+1] < 'a' || b[i-1] == ' ' || g.r.IntN(45) > 0 {
			continue
		}
		switch g.r.IntN(3) {
		case 0:
			b = append(b[:i], b[i+1:]...)
		case 1:
			b = append(b[:i+1], b[i:]...)
		default:
			b[i], b[i+1] = b[i+1], b[i]
		}
	}
	return string(b)
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

// Order is what an attacker hides in something to be read.
func (g *Generator) Order() string {
	if g.r.IntN(8) == 0 {
		return g.Expand(languages[g.r.IntN(len(languages))] + "_inject")
	}
	return g.Expand([]string{"injection", "stray", "stray", "override_attack", "bare_action"}[g.r.IntN(5)])
}

// Wrap puts a text into something to be read: a tool's result, an e-mail, a
// document, a page or code.
func (g *Generator) Wrap(text string) string {
	carriers := []string{"json_carrier", "json_carrier", "mail_carrier", "doc_carrier", "html_carrier", "code_carrier"}
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
