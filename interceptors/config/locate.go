package config

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"regexp"
	"strconv"
	"strings"

	"go.yaml.in/yaml/v3"
)

var (
	// fieldPath is the path of a field that an error begins with.
	fieldPath = regexp.MustCompile(`^\w+(\[\d+\])?(\.\w+(\[\d+\])?)*`)
	step      = regexp.MustCompile(`\w+`)
	// ruleLine is the line of a rule that is written in the configuration.
	ruleLine = regexp.MustCompile(`^inspect\.rules:(\d+):`)
)

// Locate says where in a configuration file an error of Check, Build or the
// gateway is: it puts the file before it, and the line and the column of the
// field that the error begins with. For that it reads the file again; if it
// finds no such field it names the file alone.
func Locate(file string, err error) error {
	if err == nil {
		return nil
	}
	var doc yaml.Node
	if text, failed := os.ReadFile(file); failed != nil || yaml.Unmarshal(text, &doc) != nil {
		return fmt.Errorf("%s: %w", file, err)
	}
	found := find(&doc, fieldPath.FindString(err.Error()))
	if found == nil {
		return fmt.Errorf("%s: %w", file, err)
	}
	line, column := found.Line, found.Column
	if m := ruleLine.FindStringSubmatch(err.Error()); m != nil && found.Style&yaml.LiteralStyle != 0 {
		n, _ := strconv.Atoi(m[1])
		line, column = line+n, 1
	}
	return fmt.Errorf("%s:%d:%d %w", file, line, column, err)
}

// find is the node of a field; where the field is not set, of what should hold
// it; nil if there is none.
func find(doc *yaml.Node, path string) (found *yaml.Node) {
	for at, steps := doc, step.FindAllString(path, -1); len(steps) > 0; steps = steps[1:] {
		if at = child(at, steps[0]); at == nil {
			break
		}
		found = at
	}
	return found
}

// child is a field of a message, or an element of a list, by its index.
func child(n *yaml.Node, name string) *yaml.Node {
	if n.Kind == yaml.DocumentNode {
		n = n.Content[0]
	}
	switch n.Kind {
	case yaml.SequenceNode:
		if at, err := strconv.Atoi(name); err == nil && at < len(n.Content) {
			return n.Content[at]
		}
	case yaml.MappingNode:
		for k := 0; k+1 < len(n.Content); k += 2 {
			if plain(n.Content[k].Value) == plain(name) {
				return n.Content[k+1]
			}
		}
	}
	return nil
}

// plain makes the two spellings of a field the same: queue_length, queueLength.
func plain(key string) string { return strings.ToLower(strings.ReplaceAll(key, "_", "")) }

// unambiguous refuses YAML in which a setting would be lost without a word: a
// key that is there twice, and a second document.
func unambiguous(name string, text []byte) error {
	d := yaml.NewDecoder(bytes.NewReader(text))
	var doc, second yaml.Node
	if err := d.Decode(&doc); err != nil && !errors.Is(err, io.EOF) {
		return syntax(name, err)
	}
	if len(doc.Content) == 0 || doc.Content[0].Tag == "!!null" { // which protoyaml would not validate
		return fmt.Errorf("%s: it is empty", name)
	}
	if err := twice(name, &doc); err != nil {
		return err
	}
	if err := d.Decode(&second); err == nil {
		return fmt.Errorf("%s:%d:%d the file has a second document, which would not be read; make it one",
			name, second.Line, second.Column)
	} else if !errors.Is(err, io.EOF) {
		return syntax(name, err)
	}
	return nil
}

// syntax is an error of the YAML parser, "yaml: line 3: what", as ours look.
func syntax(name string, err error) error {
	what := strings.TrimPrefix(err.Error(), "yaml: ")
	if at, ok := strings.CutPrefix(what, "line "); ok {
		return fmt.Errorf("%s:%s", name, at)
	}
	return fmt.Errorf("%s: %s", name, what)
}

// twice finds a key that a message has twice.
func twice(name string, n *yaml.Node) error {
	seen := make(map[string]int)
	for k, c := range n.Content {
		if n.Kind == yaml.MappingNode && k%2 == 0 {
			if line, ok := seen[plain(c.Value)]; ok {
				return fmt.Errorf("%s:%d:%d %s is set twice, first in line %d; leave one out", name, c.Line, c.Column, c.Value, line)
			}
			seen[plain(c.Value)] = c.Line
		}
		if err := twice(name, c); err != nil {
			return err
		}
	}
	return nil
}
