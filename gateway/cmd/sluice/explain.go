package main

import (
	"cmp"
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"unicode/utf8"

	"google.golang.org/grpc/mem"

	"github.com/sluicegate/sluice/interceptors/config"
	"github.com/sluicegate/sluice/interceptors/fields"
	"github.com/sluicegate/sluice/interceptors/inspect"
	configv1 "github.com/sluicegate/sluice/proto/gen/sluice/config/v1"
)

// explained is one text and how it was judged.
type explained struct {
	Role string `json:"role,omitempty"` // of a field
	Path string `json:"path,omitempty"`
	inspect.Explanation
}

// explainTextCommand shows how a verdict came about.
func explainTextCommand(args []string, stdin io.Reader, stdout, stderr io.Writer) int {
	flags := newFlags("explain", "[--config FILE] [--method /package.Service/Method --dialect NAME] [--json] FILE", stderr,
		"Shows how the inspection judges a text (- is standard input) as a prompt, or with --method each text of a recorded\n"+
			"request by itself: what it reads like once it is normalised and decoded, which detectors and rules fire, and which words\n"+
			"made the classifier's score. It shows the text itself: mind where the output goes.")
	file := flags.String("config", "", "take the inspect section of this configuration (default: the starter rules)")
	method := flags.String("method", "", "the file is a request of this RPC, such as /inference.GRPCInferenceService/ModelInfer")
	name := flags.String("dialect", "triton", "of the request: "+dialectNames)
	descriptors := flags.String("descriptors", "", "descriptor set, for --dialect fields")
	asJSON := flags.Bool("json", false, "print a JSON line for each text")
	if code, ok := parse(flags, args, 1); !ok {
		return code
	}
	cfg, err := inspectSection(*file)
	if err != nil {
		return fail(stderr, "explain", err)
	}
	policy, err := inspect.New(cfg, "")
	if err != nil {
		return fail(stderr, "explain", err)
	}
	data, err := readFile(flags.Arg(0), stdin)
	if err != nil {
		return fail(stderr, "explain", err)
	}
	texts := []fieldText{{fields.Prompt, "", data}}
	if *method != "" {
		if texts, err = requestTexts(*method, *name, *descriptors, data); err != nil {
			return fail(stderr, "explain", err)
		}
	}
	for _, t := range texts {
		e, err := policy.Explain(t.role, cmp.Or(t.path, "text"), t.value)
		if err != nil {
			return fail(stderr, "explain", err)
		}
		x := explained{Explanation: e}
		if t.path != "" {
			x.Role, x.Path = roleName(t.role), t.path
		}
		if *asJSON {
			enc := json.NewEncoder(stdout)
			enc.SetEscapeHTML(false)
			err = enc.Encode(x)
		} else {
			_, err = io.WriteString(stdout, x.String())
		}
		if err != nil {
			return fail(stderr, "explain", err)
		}
	}
	return 0
}

// inspectSection is that of a configuration; of none the starter rules.
func inspectSection(file string) (*configv1.Inspect, error) {
	if file == "" {
		return new(configv1.Inspect), nil
	}
	whole, err := config.Read(file)
	if err != nil {
		return nil, err
	}
	if whole.GetInspect() == nil {
		return nil, misuse(file + " has no inspect section")
	}
	return whole.GetInspect(), nil
}

// fieldText is a text of a request.
type fieldText struct {
	role  fields.Role
	path  string
	value []byte
}

// requestTexts are the texts of a request.
func requestTexts(method, dialect, descriptors string, data []byte) (texts []fieldText, err error) {
	m, err := openMethod(method, dialect, descriptors, false)
	if err != nil {
		return nil, err
	}
	var msg fields.Message
	if err := m.Request.Scan(&msg, mem.BufferSlice{mem.SliceBuffer(data)}); err != nil {
		return nil, err
	}
	_, _ = m.ReadRequest(&msg) // what it asks for that cannot be granted does not matter here
	for n := range msg.Fields {
		if f := &msg.Fields[n]; fields.IsText(f.Role) && msg.IsString(f) {
			texts = append(texts, fieldText{f.Role, msg.Path(f), msg.Bytes(f)})
		}
	}
	return texts, nil
}

// String is an explanation for people.
func (x explained) String() string {
	var b strings.Builder
	if x.Path != "" {
		fmt.Fprintf(&b, "%s (%s)\n", x.Path, x.Role)
	}
	fmt.Fprintf(&b, "verdict    %s, score %.2f\n", x.Verdict.Verdict, x.Score)
	for _, m := range x.Matched {
		shadow := ""
		if m.Shadow {
			shadow = ", in shadow"
		}
		fmt.Fprintf(&b, "rule       %d %s%s\n", m.ID, m.Class, shadow)
	}
	for _, t := range x.Thresholds {
		over := "below"
		if t.Score > t.From {
			over = "over"
		}
		fmt.Fprintf(&b, "threshold  %d @sluiceScore %s: score %.2f is %s %.3f\n", t.Rule, t.Of, t.Score, over, t.From)
	}
	if len(x.Detectors) > 0 {
		fmt.Fprintf(&b, "detectors  %s\n", strings.Join(x.Detectors, ", "))
	}
	for _, v := range x.Views {
		fmt.Fprintf(&b, "reads      %s\n", shortened(v.Text))
		fmt.Fprintf(&b, "           score %.2f", v.Score)
		if len(v.Phrases) > 0 {
			fmt.Fprintf(&b, ", phrases of %s", strings.Join(v.Phrases, ", "))
		}
		b.WriteByte('\n')
		for _, p := range v.Pieces {
			fmt.Fprintf(&b, "%10.2f %s\n", p.Weight, shortened(p.Text))
		}
	}
	b.WriteByte('\n')
	return b.String()
}

// shortened is a text in one line that fits a terminal: control characters, which
// could tell the terminal what to do, are left out.
func shortened(s string) string {
	const most = 160
	s = strings.Map(func(r rune) rune {
		switch {
		case r < ' ' || r >= 0x7f && r < 0xa0:
			return ' '
		case r == utf8.RuneError:
			return '?'
		}
		return r
	}, s)
	if utf8.RuneCountInString(s) > most {
		s = string([]rune(s)[:most]) + "…"
	}
	return s
}
