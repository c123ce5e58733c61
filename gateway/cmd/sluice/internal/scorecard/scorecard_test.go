package scorecard

import (
	"bytes"
	"encoding/json"
	"errors"
	"math"
	"strings"
	"testing"
	"testing/fstest"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// data are 400 harmless texts that score 0 to .399, of which one in a hundred is
// taken for personal data, and attacks.
func data() fstest.MapFS {
	var b bytes.Buffer
	row := func(label, category, text string) {
		_ = json.NewEncoder(&b).Encode(map[string]string{"label": label, "category": category, "text": text})
	}
	for range 400 {
		row("benign", "chat", "b")
	}
	for _, t := range []string{"0.9", "0.8", "0.3965", "0.1"} {
		row("attack", "override", t)
	}
	row("attack", "obfuscated_hex", "0.99")
	row("attack", "harmful_request", "0")
	row("pii", "pii_card", "p")
	row("pii", "pii_soft", "x")
	row("secret", "secret_aws", "s")
	row("benign", lookalike, "s")
	return fstest.MapFS{"a.jsonl": {Data: b.Bytes()}}
}

func judge() Judge {
	n := -1 // the first text is judged once more
	return func(text []byte, took func()) (j Judgement, err error) {
		took()
		switch string(text) {
		case "b":
			j.Score = float64(max(n, 0)) / 1000
			j.Personal = n%100 == 7
			n++
		case "p":
			j.Personal = true
		case "s":
			j.Secret = true
		default:
			err = json.Unmarshal(text, &j.Score)
			if string(text) == "x" {
				err = nil
			}
			j.Denied = j.Score > .85
		}
		return j, err
	}
}

func TestMeasure(t *testing.T) {
	c, err := Measure(data(), judge())
	if err != nil {
		t.Fatal(err)
	}
	near := func(what string, got, want float64) {
		t.Helper()
		if math.Abs(got-want) > 1e-9 {
			t.Errorf("%s is %v, want %v", what, got, want)
		}
	}
	near("threshold at 1 %", c.Thresholds[0], .395)
	near("threshold at .5 %", c.Thresholds[1], .397)
	near("recall at 1 %", c.Recall[0], .75)
	near("recall at .5 %", c.Recall[1], .5)
	near("AUC", c.AUC, (400+400+397+100.5)/1600)
	if len(c.Attacks) != 3 || len(c.Harmless) != 1 {
		t.Fatalf("%d categories of attacks and %d of harmless texts", len(c.Attacks), len(c.Harmless))
	}
	near("refused", c.Attacks[2].Denied, .25)
	near("harmless over 1 %", c.Harmless[0].Over[0], .01)
	got := map[string]float64{}
	for _, f := range append(c.Personal, c.Secrets...) {
		got[f.Category] += f.Share
	}
	near("cards", got["pii_card"], 1)
	near("names", got["pii_soft"], 0)
	near("personal data and secrets in harmless texts", got["harmless texts"], .01)
	near("lookalikes", got[lookalike], 1)
	near("all", got["all but soft"], 2)
	near("precision for personal data", c.PersonalPrecision, .2)
	near("precision for secrets", c.SecretPrecision, .5)
	if len(c.Curves) != 2 {
		t.Fatalf("%d curves", len(c.Curves))
	}
	last := 0.0
	for _, p := range c.Curves[0].Points {
		if p[1] < last {
			t.Errorf("recall falls to %v at %v", p[1], p[0])
		}
		last = p[1]
	}
}

func TestMeasureFails(t *testing.T) {
	row := func(s string) fstest.MapFS { return fstest.MapFS{"a.jsonl": {Data: []byte(s)}} }
	broken := errors.New("it is broken")
	for _, c := range []struct {
		name  string
		dir   fstest.MapFS
		judge Judge
		want  string
	}{
		{"nothing", fstest.MapFS{}, judge(), "no file"},
		{"not JSON", row("x"), judge(), "a.jsonl:1: want a JSON object"},
		{"no attack", row(`{"label":"benign","text":"b"}`), judge(), "some with the label attack"},
		{"the judge", row(`{"label":"benign","text":"b"}`), func([]byte, func()) (Judgement, error) { return Judgement{}, broken }, "a.jsonl:1: it is broken"},
	} {
		t.Run(c.name, func(t *testing.T) {
			if _, err := Measure(c.dir, c.judge); err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("error %v, want %q", err, c.want)
			}
		})
	}
}

// TestUpper holds the interval to values of tables.
func TestUpper(t *testing.T) {
	for _, c := range []struct {
		k, n int
		want float64
	}{{0, 10, .3085}, {1, 10, .4450}, {5, 100, .1128}, {0, 1000, .003682}, {10, 10, 1}} {
		if got := Upper(c.k, c.n); math.Abs(got-c.want) > 5e-4 {
			t.Errorf("%d of %d: %v, want %v", c.k, c.n, got, c.want)
		}
	}
}

func TestWrite(t *testing.T) {
	c, err := Measure(data(), judge())
	if err != nil {
		t.Fatal(err)
	}
	var text, page, figures bytes.Buffer
	for _, err := range []error{c.Text(&text), c.HTML(&page), c.JSON(&figures)} {
		if err != nil {
			t.Error(err)
		}
	}
	for _, want := range []string{"override", "obfuscated_hex", "pii_card", "secret_aws", "median", "recision"} {
		if !strings.Contains(text.String(), want) || !strings.Contains(page.String(), want) {
			t.Errorf("%q is not in both the tables and the page", want)
		}
	}
	if n := strings.Count(page.String(), "<polyline"); n != 2 {
		t.Errorf("%d curves on the page, want 2", n)
	}
	var back Card
	if err := json.Unmarshal(figures.Bytes(), &back); err != nil || back.AUC != c.AUC {
		t.Errorf("read back an AUC of %v (%v), want %v", back.AUC, err, c.AUC)
	}
}
