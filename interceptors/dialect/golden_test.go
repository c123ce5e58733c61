package dialect

import (
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/sluicegate/sluice/interceptors/fields"
)

// recorded is a message that a real client or server sent, and what it says.
type recorded struct {
	File, Dialect, Method string
	Request               *struct {
		Model, ID, Sequence string
		MaxTokens           int64  `json:"max_tokens"`
		WantsFinal          bool   `json:"wants_final"`
		PromptIDs           string `json:"prompt_ids"`
	}
	Response *struct {
		ID                        string
		Final, Failed, Empty      bool
		Input, Output, Total, IDs int64
		IDsTotal                  int64 `json:"ids_total"`
	}
	Texts []struct{ Path, Text string } // all of them, if the file says so
}

func TestRecordedMessagesAreReadAsTheirServersMeanThem(t *testing.T) {
	b, err := os.ReadFile("testdata/manifest.json")
	if err != nil {
		t.Fatal(err)
	}
	var cases []recorded
	if err := json.Unmarshal(b, &cases); err != nil {
		t.Fatal(err)
	}
	for _, c := range cases {
		t.Run(c.File, func(t *testing.T) {
			name := c.Method
			if name[0] != '/' {
				name = "/inference.GRPCInferenceService/" + name
			}
			m := method(t, c.Dialect, name, Options{Model: "words"})
			b, err := os.ReadFile(filepath.Join("testdata", c.File))
			if err != nil {
				t.Fatal(err)
			}
			if want := c.Request; want != nil {
				msg, err := scan(t, m.Request, b)
				if err != nil {
					t.Fatal(err)
				}
				got, err := m.ReadRequest(msg)
				if err != nil {
					t.Fatal(err)
				}
				if got.Model != want.Model || got.ID != want.ID || got.Sequence != want.Sequence ||
					got.MaxTokens != want.MaxTokens || got.WantsFinal != want.WantsFinal {
					t.Errorf("got %+v, want %+v", got, *want)
				}
				ids := ""
				if got.PromptIDs >= 0 {
					ids = msg.Path(&msg.Fields[got.PromptIDs])
				}
				if ids != want.PromptIDs {
					t.Errorf("the prompt's ids are in %q, want %q", ids, want.PromptIDs)
				}
				sameTexts(t, msg, c)
				return
			}
			msg, err := scan(t, m.Response, b)
			if err != nil {
				t.Fatal(err)
			}
			got, want := m.ReadResponse(msg), c.Response
			if string(got.ID) != want.ID || got.Final != want.Final || got.Failed != want.Failed || got.Empty != want.Empty ||
				got.InputTokens != want.Input || got.OutputTokens != want.Output || got.OutputTotal != want.Total ||
				got.IDs != want.IDs || got.IDsTotal != want.IDsTotal {
				t.Errorf("got %+v, want %+v", got, *want)
			}
			sameTexts(t, msg, c)
		})
	}
}

// sameTexts checks that inspection sees each text of the message, and no other.
func sameTexts(t *testing.T, msg *fields.Message, c recorded) {
	t.Helper()
	if c.Method[0] != '/' {
		return // the tests of package fields have these
	}
	var got []string
	for n := range msg.Fields {
		if f := &msg.Fields[n]; fields.IsText(f.Role) && msg.IsString(f) {
			got = append(got, msg.Path(f)+": "+string(msg.Bytes(f)))
		}
	}
	var want []string
	for _, x := range c.Texts {
		want = append(want, x.Path+": "+x.Text)
	}
	if !slices.Equal(got, want) {
		t.Errorf("texts\n%q, want\n%q", got, want)
	}
}
