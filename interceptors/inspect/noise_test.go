package inspect

import (
	"encoding/base64"
	"encoding/hex"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// TestNoise sends what has no meaning, a megabyte of each kind, as programs do that
// measure a gateway: nothing is read into it.
func TestNoise(t *testing.T) {
	const size = 1 << 20
	from := func(alphabet string) func(*rand.Rand) string {
		return func(r *rand.Rand) string {
			b := make([]byte, size)
			for i := range b {
				b[i] = alphabet[r.IntN(len(alphabet))]
			}
			return string(b)
		}
	}
	bytes := func(r *rand.Rand) []byte {
		b := make([]byte, size*3/4)
		for i := range b {
			b[i] = byte(r.Uint32())
		}
		return b
	}
	const letters = "abcdefghijklmnopqrstuvwxyz"
	p := newPolicy(t, nil)
	for _, c := range []struct {
		name string
		make func(*rand.Rand) string
	}{
		{"frequent letters", from(" etaoinshrdlu")},
		{"letters", from(" " + letters)},
		{"letters without a space", from(letters)},
		{"letters and digits", from(" " + letters + "0123456789")},
		{"digits", from(" 0123456789")},
		{"base64", func(r *rand.Rand) string { return base64.StdEncoding.EncodeToString(bytes(r)) }},
		{"hex", func(r *rand.Rand) string { return hex.EncodeToString(bytes(r)) }},
		{"one letter", from("a")},
		{"bytes", func(r *rand.Rand) string { return string(bytes(r)) }},
	} {
		t.Run(c.name, func(t *testing.T) {
			for seed := range uint64(3) {
				text := c.make(rand.New(rand.NewPCG(seed, 1))) // the same texts each time
				if v, err := p.Text([]byte(text)); err != nil || v.Verdict != "allow" {
					t.Errorf("seed %d: %+v, %v", seed, v, err)
				}
			}
		})
	}
}

// TestSourceCode reads the sources of the Go that runs the test, which nobody wrote to
// attack a model: whole files, as people paste them, and what stands around them.
func TestSourceCode(t *testing.T) {
	out, err := exec.Command("go", "env", "GOROOT").Output()
	if err != nil {
		t.Skip("no Go here to read the sources of: ", err)
	}
	var files []string
	err = filepath.WalkDir(filepath.Join(strings.TrimSpace(string(out)), "src"), func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() && slices.Contains([]string{".go", ".md", ".txt", ".s", ".sh"}, filepath.Ext(path)) {
			files = append(files, path)
		}
		return err
	})
	if err != nil {
		t.Skip("the sources of Go are not here: ", err)
	}
	p := newPolicy(t, nil)
	read, refused := 0, 0
	for i := 0; i < len(files); i += 20 {
		text, err := os.ReadFile(files[i])
		if err != nil || len(text) > 1<<18 {
			continue
		}
		read++
		v, err := p.Text(text)
		if err != nil {
			t.Fatal(err)
		}
		if v.Verdict != "allow" {
			refused++
			t.Logf("%s: %+v", files[i], v)
		}
	}
	if refused*100 > read {
		t.Errorf("%d of %d files are refused, more than one in a hundred", refused, read)
	}
}
