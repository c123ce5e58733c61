package dialect

import (
	"encoding/json"
	"os"
	"path/filepath"
	"testing"
)

// recorded is a message that a real client or server sent, and what it says.
type recorded struct {
	File, Dialect, Method string
	Request               *struct {
		Model, ID, Sequence string
		MaxTokens           int64 `json:"max_tokens"`
		WantsFinal          bool  `json:"wants_final"`
	}
	Response *struct {
		ID                   string
		Final, Failed, Empty bool
		Input, Output        int64
	}
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
			m := method(t, c.Dialect, "/inference.GRPCInferenceService/"+c.Method, Options{})
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
				return
			}
			msg, err := scan(t, m.Response, b)
			if err != nil {
				t.Fatal(err)
			}
			got, want := m.ReadResponse(msg), c.Response
			if string(got.ID) != want.ID || got.Final != want.Final || got.Failed != want.Failed || got.Empty != want.Empty ||
				got.InputTokens != want.Input || got.OutputTokens != want.Output {
				t.Errorf("got %+v, want %+v", got, *want)
			}
		})
	}
}
