package scorecard

import (
	_ "embed"
	"encoding/json"
	"fmt"
	"html/template"
	"io"
	"math"
	"strings"
	"text/tabwriter"
)

//go:embed card.html
var page string

// JSON writes all figures.
func (c *Card) JSON(w io.Writer) error {
	enc := json.NewEncoder(w)
	enc.SetIndent("", "  ")
	return enc.Encode(c)
}

// Text writes tables.
func (c *Card) Text(out io.Writer) error {
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	group := func(title string, groups []Group) {
		fmt.Fprintf(w, "%s\ttexts\tat 1 %%\tat .5 %%\trefused\tupper\n", title)
		for _, g := range groups {
			fmt.Fprintf(w, "  %s\t%d\t%.3f\t%.3f\t%.3f\t%.3f\n", g.Category, g.Texts, g.Over[0], g.Over[1], g.Denied, g.Upper)
		}
	}
	group("attacks", c.Attacks)
	fmt.Fprintf(w, "  mean of categories\t\t%.3f\t%.3f\n  AUC\t\t%.4f\n", c.Recall[0], c.Recall[1], c.AUC)
	group("harmless", c.Harmless)
	for _, part := range []struct {
		title     string
		list      []Found
		precision float64
	}{{"personal data", c.Personal, c.PersonalPrecision}, {"secrets", c.Secrets, c.SecretPrecision}} {
		fmt.Fprintf(w, "%s\ttexts\tfound\t\t\tupper\n", part.title)
		for _, f := range part.list {
			fmt.Fprintf(w, "  %s\t%d\t%.3f\t\t\t%.3f\n", f.Category, f.Texts, f.Share, f.Upper)
		}
		fmt.Fprintf(w, "  precision\t\t%.3f\n", part.precision)
	}
	fmt.Fprintf(w, "time\ttexts\tmedian µs\tp99 µs\tµs per KB\n")
	for _, t := range c.Times {
		fmt.Fprintf(w, "  %s\t%d\t%.1f\t%.1f\t%.1f\n", t.Size, t.Texts, t.Median, t.P99, t.PerKB)
	}
	return w.Flush()
}

// HTML writes a page with curves. It loads nothing.
func (c *Card) HTML(w io.Writer) error {
	t, err := template.New("card").Funcs(template.FuncMap{
		"share":  func(f float64) string { return fmt.Sprintf("%.1f %%", 100*f) },
		"number": func(f float64) string { return fmt.Sprintf("%.4g", f) },
		"points": points,
		"hue":    func(i int) int { return i * 47 % 360 },
		"row":    func(i int) int { return 24 + 18*i },
	}).Parse(page)
	if err != nil {
		return err
	}
	return t.Execute(w, c)
}

// points lays a curve out over 600 by 300: one in a thousand is on the left.
func points(c Curve) string {
	var b strings.Builder
	for _, p := range c.Points {
		fmt.Fprintf(&b, "%.1f,%.1f ", 200*(math.Log10(p[0])+3), 300-300*p[1])
	}
	return b.String()
}
