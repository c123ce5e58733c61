package corpus

import (
	"regexp"
	"strings"
)

// typed is a text as some people type it: with errors, without punctuation, in
// one line, in the short forms of messages. Most texts stay as they are.
func (g *Generator) typed(text string) string {
	switch g.r.IntN(40) {
	case 0, 1, 2, 3:
		return g.misspell(text)
	case 4, 5:
		return unpunctuated.Replace(text)
	case 6:
		return g.short(text)
	case 7:
		return g.misspell(g.short(unpunctuated.Replace(text)))
	case 8:
		return strings.Join(strings.Fields(text), " ")
	case 9:
		return strings.NewReplacer(". ", ".\n", "? ", "?\n", "; ", ";\n").Replace(text)
	default:
		return text
	}
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

var unpunctuated = strings.NewReplacer(".", "", ",", "", "?", "", "!", "", ";", "", ":", "", "'", "", `"`, "")

// short writes about half of the words that have a short form in it.
func (g *Generator) short(text string) string {
	return shortened.ReplaceAllStringFunc(text, func(word string) string {
		if forms := shortForms[word]; len(forms) > 0 && g.r.IntN(2) == 0 {
			return forms[g.r.IntN(len(forms))]
		}
		return word
	})
}

var shortened = regexp.MustCompile(`\b[a-z]+\b`)

var shortForms = map[string][]string{
	"you": {"u", "ya", "yu"}, "your": {"ur", "yr"}, "are": {"r"}, "please": {"pls", "plz"}, "to": {"2"},
	"for": {"4"}, "and": {"n", "&"}, "be": {"b"}, "people": {"ppl"}, "because": {"cuz", "bc"}, "with": {"w", "wit"},
	"the": {"da", "th"}, "that": {"dat", "tht"}, "this": {"dis"}, "what": {"wat", "wut"}, "want": {"wanna"},
	"going": {"goin"}, "give": {"giv"}, "know": {"kno"}, "tell": {"tel"}, "me": {"meh"}, "love": {"luv"},
	"about": {"abt"}, "before": {"b4"}, "thanks": {"thx", "tnx"}, "message": {"msg"}, "text": {"txt"},
	"password": {"pw", "pass"}, "instructions": {"instr", "instrucs"}, "everything": {"everythin", "evrything"},
	"something": {"smth", "sth"}, "tomorrow": {"tmrw"}, "now": {"rn"}, "right": {"rite"}, "see": {"c"}, "okay": {"k"},
	"why": {"y"}, "question": {"q"}, "information": {"info"}, "without": {"w/o"}, "really": {"rly"},
}
