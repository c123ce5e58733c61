package layout

import (
	"cmp"
	"encoding/json"
	"fmt"
	"os/exec"
	"strings"
	"testing"
)

// minimumVersions are the oldest versions without a known hole that reaches us.
var minimumVersions = []struct {
	module, version, why string
	optional             bool
}{
	{module: "google.golang.org/grpc", version: "v1.82.1",
		why: "bounded control queue (CVE-2023-44487, CVE-2025-8671) and malformed :path (CVE-2026-33186)"},
	{module: "golang.org/x/net", version: "v0.53.0",
		why: "HTTP/2 unknown frames and SETTINGS (CVE-2026-27141, CVE-2026-33814)"},
	{module: "google.golang.org/protobuf", version: "v1.33.0",
		why: "endless loop in protojson (CVE-2024-24786)"},
	{module: "github.com/corazawaf/coraza/v3", version: "v3.3.3",
		why: "rules evaded by the URI (CVE-2025-29914)"},
	{module: "go.opentelemetry.io/contrib/instrumentation/google.golang.org/grpc/otelgrpc", version: "v0.46.0",
		why: "unbounded metric labels (CVE-2023-47108)", optional: true},
}

// version is major, minor, patch, and 0 for a pre-release or 1 for a release.
type version [4]int

// parseVersion reads "v1.2.3", with or without "-pre" or "+incompatible" behind it.
func parseVersion(s string) (version, error) {
	s, _, _ = strings.Cut(s, "+")
	number, _, pre := strings.Cut(s, "-")
	v := version{3: 1}
	if pre {
		v[3] = 0
	}
	var rest string
	if n, _ := fmt.Sscanf(number, "v%d.%d.%d%s", &v[0], &v[1], &v[2], &rest); n != 3 {
		return version{}, fmt.Errorf("%q is not a version", s)
	}
	return v, nil
}

func (v version) compare(w version) int {
	for i := range v {
		if c := cmp.Compare(v[i], w[i]); c != 0 {
			return c
		}
	}
	return 0
}

// tooOld says what is wrong with the versions that a go.mod requires, one line each.
func tooOld(required map[string]string) []string {
	var out []string
	for _, m := range minimumVersions {
		have, ok := required[m.module]
		if !ok {
			if !m.optional {
				out = append(out, m.module+" is not required: drop it from this table if it is no longer used")
			}
			continue
		}
		v, err := parseVersion(have)
		if err != nil {
			out = append(out, m.module+": "+err.Error())
			continue
		}
		if least, _ := parseVersion(m.version); v.compare(least) < 0 {
			out = append(out, fmt.Sprintf("%s %s is too old: take %s or later, for %s", m.module, have, m.version, m.why))
		}
	}
	return out
}

func TestNoVersionIsTooOld(t *testing.T) {
	cmd := exec.Command("go", "mod", "edit", "-json")
	cmd.Dir = repositoryRoot(t)
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go mod edit: %v\n%s", err, stderr(err))
	}
	var mod struct {
		Require []struct{ Path, Version string }
		Replace []struct {
			Old, New struct{ Path, Version string }
		}
	}
	if err := json.Unmarshal(out, &mod); err != nil {
		t.Fatal(err)
	}
	required := map[string]string{}
	for _, r := range mod.Require {
		required[r.Path] = r.Version
	}
	for _, line := range tooOld(required) {
		t.Error(line)
	}
	for _, r := range mod.Replace {
		t.Errorf("go.mod replaces %s: go install would not", r.Old.Path)
	}
}

func TestTooOld(t *testing.T) {
	fine := map[string]string{}
	for _, m := range minimumVersions {
		fine[m.module] = m.version
		if _, err := parseVersion(m.version); err != nil {
			t.Fatal(err)
		}
	}
	tests := []struct {
		name, module, version string
		want                  int
	}{
		{"the minimum", "golang.org/x/net", "v0.53.0", 0},
		{"patch above", "golang.org/x/net", "v0.53.1", 0},
		{"minor above, as a number", "golang.org/x/net", "v0.100.0", 0},
		{"major above", "google.golang.org/grpc", "v2.0.0", 0},
		{"patch below", "google.golang.org/grpc", "v1.82.0", 1},
		{"minor below, as a number", "golang.org/x/net", "v0.9.0", 1},
		{"pre-release of the minimum", "golang.org/x/net", "v0.53.0-rc.1", 1},
		{"pre-release above", "golang.org/x/net", "v0.53.1-0.20260101000000-abcdefabcdef", 0},
		{"not a version", "golang.org/x/net", "latest", 1},
		{"optional module missing", minimumVersions[4].module, "", 0},
		{"module missing", "golang.org/x/net", "", 1},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			required := map[string]string{}
			for m, v := range fine {
				required[m] = v
			}
			if required[tt.module] = tt.version; tt.version == "" {
				delete(required, tt.module)
			}
			if got := tooOld(required); len(got) != tt.want {
				t.Errorf("%d lines, want %d: %q", len(got), tt.want, got)
			}
		})
	}
}
