package layout

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"testing"
)

// machinePath finds paths that exist on somebody's machine only. It is put
// together so that it does not find itself.
var machinePath = regexp.MustCompile(`(^|[^\w.~-])/(` + `work|root|tmp/bash_jobs|home/\w+|Users/\w+` + `)(/|\.\w)`)

// machinePaths gives the lines of a file that name one.
func machinePaths(content []byte) (lines []int) {
	for i, line := range bytes.Split(content, []byte("\n")) {
		if machinePath.Match(line) {
			lines = append(lines, i+1)
		}
	}
	return lines
}

func TestNoFileNamesAMachine(t *testing.T) {
	root := repositoryRoot(t)
	files := repositoryFiles(t, root)
	if len(files) < 10 {
		t.Fatalf("only %d files found: the test looks at the wrong place", len(files))
	}
	for _, name := range files {
		content, err := os.ReadFile(filepath.Join(root, name))
		if errors.Is(err, fs.ErrNotExist) {
			continue // deleted, not yet committed
		}
		if info, statErr := os.Lstat(filepath.Join(root, name)); statErr == nil && !info.Mode().IsRegular() {
			continue
		}
		if err != nil {
			t.Error(err)
			continue
		}
		for _, line := range machinePaths(content) {
			t.Errorf("%s:%d names a path of one machine", name, line)
		}
	}
}

func TestMachinePaths(t *testing.T) {
	tests := []struct {
		name, line string
		found      bool
	}{
		{"absolute path", "see /" + "work/main/x", true},
		{"in quotes", `"/` + `root/.cache"`, true},
		{"first on the line", "/" + "tmp/bash_jobs.0/x", true},
		{"home folder", "/" + "home/ann/src", true},
		{"part of a URL path", "https://example.org/work/x", false},
		{"relative", "frame" + "work/" + "root/x", false},
		{"after a dot", "./" + "work/x", false},
		{"after a tilde", "~/" + "work/x", false},
		{"plain /tmp", "/tmp/x", false},
		{"a word", "the /" + "working set", false},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if got := len(machinePaths([]byte("a\n"+tt.line+"\nb"))) > 0; got != tt.found {
				t.Errorf("%q: found = %v, want %v", tt.line, got, tt.found)
			}
		})
	}
}

// repositoryFiles gives the files that git tracks or would track; in a folder
// that is not a git checkout (an archive), all of them.
func repositoryFiles(t *testing.T, root string) []string {
	t.Helper()
	cmd := exec.Command("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard")
	cmd.Dir = root
	if out, err := cmd.Output(); err == nil {
		var files []string
		for name := range bytes.SplitSeq(out, []byte{0}) {
			if len(name) > 0 {
				files = append(files, string(name))
			}
		}
		return files
	}
	var files []string
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		rel, err := filepath.Rel(root, path)
		files = append(files, rel)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return files
}
