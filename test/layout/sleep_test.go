package layout

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestSleepIsInBubbles holds that a test sleeps only in the fake time of
// testing/synctest; elsewhere it waits for the event itself. Real servers and
// clusters know no fake time.
func TestSleepIsInBubbles(t *testing.T) {
	root := repositoryRoot(t)
	for _, name := range repositoryFiles(t, root) {
		if !strings.HasSuffix(name, "_test.go") || strings.HasPrefix(name, "test/peers/") {
			continue
		}
		text, err := os.ReadFile(filepath.Join(root, name))
		if err != nil {
			continue // deleted
		}
		if sleepsForReal(text) {
			t.Errorf("%s sleeps, and not in a bubble of testing/synctest", name)
		}
	}
}

// sleepsForReal knows a bubble by synctest.Test, or by the helper bubble, which begins
// a subtest in one.
func sleepsForReal(text []byte) bool {
	return bytes.Contains(text, []byte("time."+"Sleep(")) &&
		!bytes.Contains(text, []byte("synctest.Test(")) && !bytes.Contains(text, []byte("\tbubble("))
}

func TestSleepsForReal(t *testing.T) {
	sleep := "time." + "Sleep(1)"
	for text, want := range map[string]bool{sleep: true, "synctest.Test(t, f)\n" + sleep: false, "\tbubble(\"a\", t, f)\n" + sleep: false, "time.Now()": false} {
		if got := sleepsForReal([]byte(text)); got != want {
			t.Errorf("%q: %v, want %v", text, got, want)
		}
	}
}
