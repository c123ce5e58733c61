package main

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/sluicegate/sluice/interceptors/config"
)

func TestDemoKeepsItsPromises(t *testing.T) {
	t.Parallel()
	var out, errs bytes.Buffer
	if rc := demoCommand([]string{"--once"}, &out, &errs); rc != 0 {
		t.Fatalf("exit status %d\n%s\n%s", rc, &errs, &out)
	}
	for line := range strings.Lines(out.String()) {
		if n := utf8.RuneCountInString(strings.TrimSuffix(line, "\n")); n > width {
			t.Errorf("a line of %d columns: %q", n, line)
		}
	}
	if strings.Contains(out.String(), "\x1b") {
		t.Error("colors, though nobody looks")
	}
	_, after, _ := strings.Cut(out.String(), "files    ")
	folder, _, _ := strings.Cut(after, "\n")
	if _, err := os.Stat(folder); folder == "" || !os.IsNotExist(err) {
		t.Errorf("the folder %q was left behind: %v", folder, err)
	}
}

// The demo is worth something only if it can fail.
func TestDemoSeesBrokenPromises(t *testing.T) {
	if testing.Short() {
		t.Skip("some broken promises take seconds to see")
	}
	tests := []struct {
		name     string
		old, new string
		broken   []int // promises
	}{
		{"alice may use bob's model", "models: [ echo, words ]", "models: [ echo, words, sum ]", []int{1}},
		{"only watching for injections", "responses: true", "responses: true\n  shadow: [ 700110, 700130, 700160 ]", []int{3}},
		{"answers are not read", "responses: true", "responses: false", []int{4}},
		{"a larger budget", "tokens: 40", "tokens: 41", []int{5}},
		{"more permits than there is GPU", "capacity: 2", "capacity: 3", []int{6}},
		{"shared memory passes", "dialect: DIALECT_TRITON", "dialect: DIALECT_TRITON\n    allow_shared_memory: true", []int{10}},
		{"what is ambiguous passes", "inspect:", "messages: { lenient: true }\n\ninspect:", []int{11}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			changed := strings.Replace(demoGateway, tt.old, tt.new, 1)
			if changed == demoGateway {
				t.Fatalf("demo.yaml has no %q any more", tt.old)
			}
			var out bytes.Buffer
			d := &demo{view: view{out: &out}}
			kept, err := d.run(t.Context(), changed, "127.0.0.1:0", false)
			if err != nil || kept {
				t.Fatalf("kept: %v, %v\n%s", kept, err, &out)
			}
			for _, n := range tt.broken {
				if !strings.Contains(out.String(), fmt.Sprintf("\n  ✘ %2d  ", n)) {
					t.Errorf("promise %d counts as kept\n%s", n, &out)
				}
			}
		})
	}
}

func TestDemoEndsWhenItIsTold(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	var out bytes.Buffer
	d := &demo{view: view{out: &out}}
	if kept, err := d.run(ctx, demoGateway, "127.0.0.1:0", true); kept || err != nil {
		t.Errorf("kept %v, %v", kept, err)
	}
}

func TestDemoConfigurationIsGood(t *testing.T) {
	text := strings.NewReplacer("{{gateway}}", "127.0.0.1:1", "{{model}}", "127.0.0.1:2").Replace(demoGateway)
	for name, text := range map[string]string{"demo.yaml": text, "demo_model.yaml": demoModel} {
		cfg, err := config.Parse(name, []byte(text))
		if err == nil {
			err = config.Check(cfg)
		}
		if err != nil {
			t.Error(err)
		}
	}
}
