package inspect

import (
	"context"
	"slices"
	"strings"
	"testing"

	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/encoding/protowire"

	"github.com/sluicegate/sluice/interceptors"
	"github.com/sluicegate/sluice/interceptors/dialect"
	"github.com/sluicegate/sluice/interceptors/fields"
	"github.com/sluicegate/sluice/interceptors/tokens"
	configv1 "github.com/sluicegate/sluice/proto/gen/sluice/config/v1"
)

func lengthed[T string | []byte](n protowire.Number, v T) []byte {
	return protowire.AppendBytes(protowire.AppendTag(nil, n, protowire.BytesType), []byte(v))
}

// languageCall begins a call of a language server's API under a policy that redacts.
func languageCall(t *testing.T, open func(dialect.Options) (*dialect.Dialect, error), tok *tokens.Tokenizer, method string) *interceptors.Call {
	t.Helper()
	p, err := New(&configv1.Inspect{NoStarterRules: true, Responses: true, Rules: `
SecRule ARGS_POST "@sluicePersonal card" "id:1,phase:2,redact,pass"
SecRule RESPONSE_ARGS "@sluicePersonal card" "id:2,phase:4,redact,pass"
`}, "")
	if err != nil {
		t.Fatal(err)
	}
	d, err := open(dialect.Options{Model: "words"})
	if err != nil {
		t.Fatal(err)
	}
	b := &interceptors.Backend{Name: "words", Dialect: d, Tokenizer: func(string) *tokens.Tokenizer { return tok }}
	c, err := interceptors.New([]*interceptors.Backend{b}, p).Begin(context.Background(), interceptors.CallInfo{FullMethod: method})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.End(nil) })
	return c
}

func wire(b []byte) *interceptors.Envelope {
	return interceptors.RawEnvelope(mem.BufferSlice{mem.SliceBuffer(b)})
}

// What TGIS writes token by token beside the text is a text of its own, which does not
// say what was taken out there.
func TestWhatIsWrittenTwiceIsRedactedTwice(t *testing.T) {
	c := languageCall(t, dialect.TGIS, nil, "/fmaas.GenerationService/Generate")
	if _, err := c.Request(wire(lengthed(3, lengthed(2, "pay")))); err != nil {
		t.Fatal(err)
	}
	answer := lengthed(4, "pay 4111 1111 1111 1111 now")
	for _, token := range []string{"pay", " 4111", " 11", "11 1111", " 1111", " now"} {
		answer = append(answer, lengthed(8, lengthed(2, token))...)
	}
	e := wire(lengthed(1, answer))
	if _, verdict, err := c.Response(e); verdict != interceptors.Deliver || err != nil {
		t.Fatalf("%v, %v", verdict, err)
	}
	var text, joined string
	for n := range e.Message.Fields {
		switch f := &e.Message.Fields[n]; f.Role {
		case fields.Output:
			text += string(e.Message.Bytes(f))
		case fields.OutputCopy:
			joined += string(e.Message.Bytes(f))
		}
	}
	if want := "pay [redacted:card] now"; text != want || joined != want {
		t.Errorf("%q and %q, want %q", text, joined, want)
	}
}

// Token ids cannot be changed, so that what would be taken out of them is refused.
func TestWhatCannotBeTakenOutIsRefused(t *testing.T) {
	tok, err := tokens.ReadFile("../tokens/testdata/gpt2.json", "")
	if err != nil {
		t.Fatal(err)
	}
	ids := func(text string) (packed []byte) {
		for _, id := range tok.Encode([]byte(text), nil) {
			packed = protowire.AppendVarint(packed, uint64(id))
		}
		return packed
	}
	const card = "pay 4111 1111 1111 1111 now, and let me know. " +
		"The rest of this is here for the sake of what is held back until it cannot become part of a match. "
	method := "/vllm.grpc.engine.VllmEngine/Generate"

	c := languageCall(t, dialect.VLLM, tok, method)
	_, err = c.Request(wire(lengthed(2, slices.Concat(lengthed(1, card), lengthed(2, ids(card))))))
	d := interceptors.Outcome{Err: err}.Denial()
	if d == nil || d.Reason != interceptors.PromptRejected || strings.Contains(d.Error(), "4111") {
		t.Errorf("the prompt: %v", err)
	}

	for _, chunked := range []bool{false, true} {
		c = languageCall(t, dialect.VLLM, tok, method)
		if _, err := c.Request(wire(lengthed(3, "pay"))); err != nil {
			t.Fatal(err)
		}
		var verdict interceptors.Verdict
		if chunked {
			all := ids(card)
			for len(all) > 0 && verdict != interceptors.Refuse {
				_, n := protowire.ConsumeVarint(all)
				if _, verdict, err = c.Response(wire(lengthed(1, lengthed(1, all[:n])))); verdict == interceptors.Deliver && err != nil {
					t.Fatal(err)
				}
				all = all[n:]
			}
		} else {
			_, verdict, err = c.Response(wire(lengthed(2, lengthed(1, ids(card)))))
		}
		d = interceptors.Outcome{Err: err}.Denial()
		if verdict != interceptors.Refuse || d == nil || d.Reason != interceptors.OutputRejected {
			t.Errorf("the answer, in chunks %t: %v, %v", chunked, verdict, err)
		}
	}
}
