package main

import (
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// What the pages tell readers to type is there: each command, and its flags.
func TestPagesNameCommandsThatExist(t *testing.T) {
	var pages []string
	for _, pattern := range []string{"*.md", "docs/*.md", "examples/*/*.md"} {
		some, err := filepath.Glob("../../../" + pattern)
		if err != nil {
			t.Fatal(err)
		}
		pages = append(pages, some...)
	}
	typed := regexp.MustCompile("(?m)(?:^|`|[ |]|/)sluice ([a-z]+)((?: [^`#|\n]*)?)(?:[`#|\n]|$)")
	code := regexp.MustCompile("(?ms)^```(?:sh|console)?\n.*?^```$|^    [^\n]*$|`[^`\n]+`")
	flag := regexp.MustCompile(`(?:^|[ [])--?([a-z-]+)`)
	found := make(map[string]bool)
	for _, page := range pages {
		text, err := os.ReadFile(page)
		if err != nil {
			t.Fatal(err)
		}
		for _, block := range code.FindAllString(string(text), -1) {
			for _, m := range typed.FindAllStringSubmatch(block, -1) {
				command := m[1]
				found[command] = true
				if command == "version" {
					continue
				}
				rc, _, help := said("", command, "--help")
				if rc != 0 {
					t.Errorf("%s: there is no sluice %s", page, command)
				}
				for _, f := range flag.FindAllStringSubmatch(m[2], -1) {
					if !strings.Contains(help, "\n  -"+f[1]) {
						t.Errorf("%s: sluice %s has no flag --%s", page, command, f[1])
					}
				}
			}
		}
	}
	for _, command := range []string{"serve", "check", "authz", "budget", "pool", "inspect", "scan", "issue", "demo", "model", "version"} {
		if !found[command] {
			t.Errorf("no page names sluice %s", command)
		}
		if !slices.ContainsFunc(strings.Split(manual, "\n"), func(l string) bool { return strings.HasPrefix(l, "  sluice "+command) }) {
			t.Errorf("the usage does not name sluice %s", command)
		}
	}
}
