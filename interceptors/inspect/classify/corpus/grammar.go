package corpus

import (
	"embed"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"strings"
)

//go:embed grammar
var files embed.FS

// grammar is a set of named alternatives. The form of its files:
//
//	# comment
//	@name          the alternatives of $name follow, one a line
//	@!name         the same, but only $names mean anything in them
//	*3 $other {one|two|} text \{ \| \n
//
// A line may be a choice itself, a|b. *3 makes it three times as likely.
type grammar map[string][]node

// node is a piece of a text: literal, a reference, a choice or a sequence.
type node struct {
	text   string // literal, or the name referred to
	refers bool
	choice []node
	list   []node
}

func readGrammar() (grammar, error) {
	g := make(grammar)
	err := fs.WalkDir(files, "grammar", func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		b, err := files.ReadFile(path)
		if err != nil {
			return err
		}
		if err := g.read(string(b)); err != nil {
			return fmt.Errorf("%s:%w", path, err)
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	g["slot"] = []node{{text: slot}}
	for name, alts := range g {
		for _, n := range alts {
			if missing := g.missing(n); missing != "" {
				return nil, fmt.Errorf("@%s: there is no $%s", name, missing)
			}
		}
	}
	return g, nil
}

func (g grammar) read(text string) error {
	name, raw := "", false
	for i, line := range strings.Split(text, "\n") {
		switch {
		case line == "" || strings.HasPrefix(line, "# ") && name == "":
			continue
		case strings.HasPrefix(line, "@!"):
			name, raw = line[2:], true
			continue
		case strings.HasPrefix(line, "@") && !strings.ContainsAny(line, " {|"):
			name, raw = line[1:], false
			continue
		case name == "":
			return fmt.Errorf("%d: text before the first @name", i+1)
		}
		times := 1
		if len(line) > 2 && line[0] == '*' && line[1] >= '2' && line[1] <= '9' && line[2] == ' ' {
			times, line = int(line[1]-'0'), line[3:]
		}
		p := parser{rest: line, raw: raw}
		n := p.choice(0)
		if p.rest != "" {
			return fmt.Errorf("%d: a brace too many before %q", i+1, p.rest)
		}
		if p.open {
			return fmt.Errorf("%d: a brace is not closed", i+1)
		}
		for range times {
			g[name] = append(g[name], n)
		}
	}
	return nil
}

func (g grammar) missing(n node) string {
	if n.refers && g[n.text] == nil {
		return n.text
	}
	for _, list := range [][]node{n.choice, n.list} {
		for _, m := range list {
			if s := g.missing(m); s != "" {
				return s
			}
		}
	}
	return ""
}

type parser struct {
	rest string
	raw  bool
	open bool
}

// choice reads alternatives up to a closing brace.
func (p *parser) choice(depth int) node {
	var alts []node
	for {
		alts = append(alts, p.sequence(depth))
		if !strings.HasPrefix(p.rest, "|") || p.raw {
			break
		}
		p.rest = p.rest[1:]
	}
	if len(alts) == 1 {
		return alts[0]
	}
	return node{choice: alts}
}

func (p *parser) sequence(depth int) node {
	var list []node
	var lit strings.Builder
	flush := func() {
		if lit.Len() > 0 {
			list = append(list, node{text: lit.String()})
			lit.Reset()
		}
	}
	for p.rest != "" {
		c := p.rest[0]
		switch {
		case c == '\\' && len(p.rest) > 1 && p.rest[1] == 'n':
			lit.WriteByte('\n')
			p.rest = p.rest[2:]
			continue
		case c == '\\' && len(p.rest) > 1 && !p.raw:
			lit.WriteByte(p.rest[1])
			p.rest = p.rest[2:]
			continue
		case c == '$' && len(p.rest) > 1 && p.rest[1] >= 'a' && p.rest[1] <= 'z':
			n := 1
			for n < len(p.rest) && (p.rest[n] >= 'a' && p.rest[n] <= 'z' || p.rest[n] == '_' && n+1 < len(p.rest) && p.rest[n+1] >= 'a' && p.rest[n+1] <= 'z') {
				n++
			}
			flush()
			list = append(list, node{text: p.rest[1:n], refers: true})
			p.rest = p.rest[n:]
			continue
		case p.raw:
		case c == '{':
			flush()
			p.rest = p.rest[1:]
			list = append(list, p.choice(depth+1))
			if !strings.HasPrefix(p.rest, "}") {
				p.open = true
				return node{list: list}
			}
			p.rest = p.rest[1:]
			continue
		case c == '|', c == '}':
			flush()
			return node{list: list}
		}
		lit.WriteByte(c)
		p.rest = p.rest[1:]
	}
	flush()
	return node{list: list}
}

// expand writes one text of a name. Nothing refers to itself without end: depth
// bounds it all the same.
func (g grammar) expand(out *strings.Builder, r *rand.Rand, name string, depth int) {
	if alts := g[name]; len(alts) > 0 && depth < 24 {
		g.write(out, r, alts[r.IntN(len(alts))], depth)
	}
}

func (g grammar) write(out *strings.Builder, r *rand.Rand, n node, depth int) {
	switch {
	case n.refers:
		g.expand(out, r, n.text, depth+1)
	case n.choice != nil:
		g.write(out, r, n.choice[r.IntN(len(n.choice))], depth)
	case n.list != nil:
		for _, m := range n.list {
			g.write(out, r, m, depth)
		}
	default:
		out.WriteString(n.text)
	}
}
