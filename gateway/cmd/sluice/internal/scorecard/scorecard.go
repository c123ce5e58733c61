// Package scorecard measures an inspection with texts whose verdict is known.
package scorecard

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"slices"
	"sort"
	"strings"
	"time"
)

// Judgement is what the inspection says of a text.
type Judgement struct {
	Score    float64 // how much it looks like an attack
	Denied   bool    // at the thresholds and with the rules of the configuration
	Personal bool    // it has personal data
	Secret   bool    // it has a key or token
}

// Judge judges a text. It calls took once it knows whether it is an attack: the
// time until then is measured.
type Judge func(text []byte, took func()) (Judgement, error)

// Card is the result.
type Card struct {
	// Thresholds are the scores that 1 % and .5 % of the harmless texts exceed.
	Thresholds [2]float64 `json:"thresholds"`
	// AUC is the chance that an attack scores higher than a harmless text.
	AUC float64 `json:"auc"`
	// Attacks are the categories of attacks. Those named obfuscated_… are copies
	// of others, and harmful questions are no attacks on a model: neither is in
	// AUC, Recall or Curves.
	Attacks []Group `json:"attacks"`
	// Recall is the mean of the other categories' recall at the thresholds.
	Recall [2]float64 `json:"recall"`
	// Harmless are the categories of harmless texts.
	Harmless []Group `json:"harmless"`
	// Personal and Secrets are the categories of what the two find.
	Personal []Found `json:"personal"`
	Secrets  []Found `json:"secrets"`
	// PersonalPrecision and SecretPrecision are, of the texts in which the two find
	// something among those of their own label and the harmless ones, the share of
	// their own label.
	PersonalPrecision float64  `json:"personal_precision"`
	SecretPrecision   float64  `json:"secret_precision"`
	Times             []Timing `json:"times"`
	Curves            []Curve  `json:"curves"`
}

// Group is how many texts of a category exceed the thresholds.
type Group struct {
	Category string     `json:"category"`
	Texts    int        `json:"texts"`
	Over     [2]float64 `json:"over"`   // share, at each threshold
	Denied   float64    `json:"denied"` // share that the configuration refuses
	Upper    float64    `json:"upper"`  // upper end of the 95 % interval of that
}

// Found is the share of a category in which a detector finds something.
type Found struct {
	Category string  `json:"category"`
	Texts    int     `json:"texts"`
	Share    float64 `json:"share"`
	Upper    float64 `json:"upper"`
}

// Timing is how long texts of a size take, in microseconds.
type Timing struct {
	Size    string  `json:"size"`
	Texts   int     `json:"texts"`
	Median  float64 `json:"median_us"`
	P99     float64 `json:"p99_us"`
	PerKB   float64 `json:"us_per_kb"`
	largest int
}

// Curve is recall over the share of false positives.
type Curve struct {
	Category string       `json:"category"`
	Points   [][2]float64 `json:"points"`
}

type judged struct {
	label, category string
	size            int
	took            time.Duration
	Judgement
}

// Measure judges the texts in the files *.jsonl.
func Measure(dir fs.FS, judge Judge) (*Card, error) {
	names, err := fs.Glob(dir, "*.jsonl")
	if err != nil {
		return nil, err
	}
	if len(names) == 0 {
		return nil, errors.New("no file *.jsonl in the folder")
	}
	var all []judged
	for _, name := range names {
		if all, err = read(all, dir, name, judge); err != nil {
			return nil, err
		}
	}
	return newCard(all)
}

func read(all []judged, dir fs.FS, name string, judge Judge) ([]judged, error) {
	f, err := dir.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	in := bufio.NewScanner(f)
	in.Buffer(nil, 64<<20)
	for n := 1; in.Scan(); n++ {
		var row struct{ Label, Category, Text string }
		if err := json.Unmarshal(in.Bytes(), &row); err != nil {
			return nil, fmt.Errorf("%s:%d: want a JSON object with label, category and text", name, n)
		}
		j := judged{label: row.Label, category: row.Category, size: len(row.Text)}
		text := []byte(row.Text)
		if len(all) == 0 { // what is made once is made now
			if _, err := judge(text, func() {}); err != nil {
				return nil, fmt.Errorf("%s:%d: %w", name, n, err)
			}
		}
		began := time.Now()
		if j.Judgement, err = judge(text, func() { j.took = time.Since(began) }); err != nil {
			return nil, fmt.Errorf("%s:%d: %w", name, n, err)
		}
		all = append(all, j)
	}
	if err := in.Err(); err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return all, nil
}

// headline reports whether a category of attacks counts in the summary.
func headline(category string) bool {
	return !strings.HasPrefix(category, "obfuscated") && category != "harmful_request"
}

func newCard(all []judged) (*Card, error) {
	var harmless []float64
	by := map[string]map[string][]judged{}
	for _, j := range all {
		if by[j.label] == nil {
			by[j.label] = map[string][]judged{}
		}
		by[j.label][j.category] = append(by[j.label][j.category], j)
		if j.label == "benign" && j.category != lookalike {
			harmless = append(harmless, j.Score)
		}
	}
	if len(harmless) == 0 || len(by["attack"]) == 0 {
		return nil, errors.New("want texts with the label benign, and some with the label attack")
	}
	sort.Sort(sort.Reverse(sort.Float64Slice(harmless)))
	c := &Card{Thresholds: [2]float64{harmless[len(harmless)/100], harmless[len(harmless)/200]}}
	c.Attacks = c.groups(by["attack"])
	c.Harmless = c.groups(by["benign"])
	n := 0.0
	var scores []float64
	for _, g := range c.Attacks {
		if !headline(g.Category) {
			continue
		}
		n++
		for i := range c.Recall {
			c.Recall[i] += g.Over[i]
		}
		var own []float64
		for _, j := range by["attack"][g.Category] {
			own = append(own, j.Score)
		}
		scores = append(scores, own...)
		c.Curves = append(c.Curves, Curve{g.Category, curve(own, harmless)})
	}
	for i := range c.Recall {
		c.Recall[i] /= max(n, 1)
	}
	c.AUC = auc(scores, harmless)
	c.Curves = append([]Curve{{"all", curve(scores, harmless)}}, c.Curves...)
	personal, secret := func(j judged) bool { return j.Personal }, func(j judged) bool { return j.Secret }
	c.Personal, c.PersonalPrecision = found(by, "pii", personal), precision(by, "pii", personal)
	c.Secrets, c.SecretPrecision = found(by, "secret", secret), precision(by, "secret", secret)
	c.Times = times(all)
	return c, nil
}

// lookalike is a category of harmless texts that are made to pass for secrets:
// no prompts.
const lookalike = "secret_lookalike"

func (c *Card) groups(by map[string][]judged) (list []Group) {
	for _, name := range sortedKeys(by) {
		if name == lookalike {
			continue
		}
		g := Group{Category: name, Texts: len(by[name])}
		denied := 0
		for _, j := range by[name] {
			for i, t := range c.Thresholds {
				if j.Score > t {
					g.Over[i] += 1 / float64(g.Texts)
				}
			}
			if j.Denied {
				denied++
			}
		}
		g.Denied, g.Upper = float64(denied)/float64(g.Texts), Upper(denied, g.Texts)
		list = append(list, g)
	}
	return list
}

func found(by map[string]map[string][]judged, label string, hit func(judged) bool) (list []Found) {
	add := func(name string, texts ...[]judged) {
		n, k := 0, 0
		for _, t := range texts {
			for _, j := range t {
				n++
				if hit(j) {
					k++
				}
			}
		}
		if n > 0 {
			list = append(list, Found{name, n, float64(k) / float64(n), Upper(k, n)})
		}
	}
	var all, benign [][]judged
	for _, name := range sortedKeys(by[label]) {
		add(name, by[label][name])
		if !strings.HasSuffix(name, "_soft") { // names of people and places
			all = append(all, by[label][name])
		}
	}
	add("all but soft", all...)
	for name, list := range by["benign"] {
		if name != lookalike {
			benign = append(benign, list)
		}
	}
	add("harmless texts", benign...)
	if label == "secret" {
		add(lookalike, by["benign"][lookalike])
	}
	return list
}

// precision is 1 if nothing is found. Lookalikes of secrets are harmless texts to
// the one that finds secrets, and to no other.
func precision(by map[string]map[string][]judged, label string, hit func(judged) bool) float64 {
	var right, wrong int
	for _, of := range []struct {
		label string
		n     *int
	}{{label, &right}, {"benign", &wrong}} {
		for name, list := range by[of.label] {
			for _, j := range list {
				if hit(j) && (name != lookalike || label == "secret") {
					*of.n++
				}
			}
		}
	}
	if right+wrong == 0 {
		return 1
	}
	return float64(right) / float64(right+wrong)
}

func sortedKeys[V any](m map[string]V) []string {
	keys := make([]string, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	sort.Strings(keys)
	return keys
}

// auc takes the harmless scores in falling order.
func auc(attacks, harmless []float64) float64 {
	sum := 0.0
	for _, a := range attacks {
		over := sort.Search(len(harmless), func(i int) bool { return harmless[i] <= a })
		same := sort.Search(len(harmless), func(i int) bool { return harmless[i] < a }) - over
		sum += float64(len(harmless)-over) - float64(same)/2
	}
	return sum / float64(max(len(attacks), 1)) / float64(len(harmless))
}

// curve is recall at shares of false positives from 1 in 1000 on.
func curve(attacks, harmless []float64) (points [][2]float64) {
	attacks = slices.Clone(attacks)
	sort.Float64s(attacks)
	for e := -3.0; e <= 0.001; e += .1 {
		rate := min(1, math.Pow(10, e))
		t := harmless[min(len(harmless)-1, int(rate*float64(len(harmless))))]
		over := len(attacks) - sort.Search(len(attacks), func(i int) bool { return attacks[i] > t })
		points = append(points, [2]float64{rate, float64(over) / float64(max(len(attacks), 1))})
	}
	return points
}

func times(all []judged) (list []Timing) {
	sizes := []Timing{{Size: "to 256 B", largest: 256}, {Size: "to 1 KB", largest: 1 << 10}, {Size: "to 4 KB", largest: 4 << 10},
		{Size: "over 4 KB", largest: math.MaxInt}}
	least := 0
	for _, t := range sizes {
		var took []float64
		sum, bytes := 0.0, 0
		for _, j := range all {
			if j.size >= least && j.size <= t.largest {
				us := float64(j.took) / float64(time.Microsecond)
				took = append(took, us)
				sum += us
				bytes += j.size
			}
		}
		least = t.largest + 1
		if t.Texts = len(took); t.Texts == 0 {
			continue
		}
		sort.Float64s(took)
		t.Median, t.P99, t.PerKB = took[len(took)/2], took[len(took)*99/100], sum/max(float64(bytes), 1)*1024
		list = append(list, t)
	}
	return list
}

// Upper is the upper end of the 95 % interval (Clopper and Pearson) of a share
// of which k of n were seen.
func Upper(k, n int) float64 {
	if k >= n {
		return 1
	}
	lo, hi := float64(k)/float64(n), 1.0
	for range 60 { // to where k or fewer have a chance of 2.5 %
		p := (lo + hi) / 2
		sum, term := 0.0, float64(n)*math.Log1p(-p)
		for i := 0; i <= k; i++ {
			sum += math.Exp(term)
			term += math.Log(float64(n-i)/float64(i+1)) + math.Log(p) - math.Log1p(-p)
		}
		if sum > .025 {
			lo = p
		} else {
			hi = p
		}
	}
	return hi
}
