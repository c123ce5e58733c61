package gateway

import (
	"path/filepath"
	"strings"
	"testing"

	"google.golang.org/grpc"

	"github.com/sluicegate/sluice/interceptors/tokens"
	"github.com/sluicegate/sluice/proto/gen/inference"
)

// Of two inferences on a stream, the one over its budget gets the tokens that fit and
// then the refusal, in band; the other goes on.
func TestTheCutIsAtTheToken(t *testing.T) {
	file, err := filepath.Abs("../interceptors/tokens/testdata/llama.json")
	if err != nil {
		t.Fatal(err)
	}
	tok, err := tokens.ReadFile(file, "")
	if err != nil {
		t.Fatal(err)
	}
	const text = " A budget is an amount of tokens in a window of time."
	first, err := tok.Decode(tok.Encode([]byte(text), nil)[:9], nil)
	if err != nil {
		t.Fatal(err)
	}
	g := open(t, base+`
tokenizers: [{models: ["small-*"], file: `+file+`}]
budgets: [{name: b, tokens: 10, models: [small-1], default_output_tokens: 1, cut: CUT_SPLICE}]
`, script(t, func(_ string, ss grpc.ServerStream) error {
		var ids [2]string
		for n := range ids {
			m := new(inference.ModelInferRequest)
			if err := ss.RecvMsg(m); err != nil {
				return err
			}
			ids[n] = m.Id
		}
		for _, m := range []*inference.ModelStreamInferResponse{
			chunk("small-1", ids[0], text), chunk("large-1", ids[1], text), chunk("small-1", ids[0], text), chunk("large-1", ids[1], " end")} {
			if err := ss.SendMsg(m); err != nil {
				return err
			}
		}
		return nil
	}))
	s, err := g.client().ModelStreamInfer(ctx(t))
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range []*inference.ModelInferRequest{ask("small-1", "a", "x"), ask("large-1", "b", "x")} {
		if err := s.Send(m); err != nil {
			t.Fatal(err)
		}
	}
	var got []string
	for len(got) < 4 {
		m, err := s.Recv()
		if err != nil {
			t.Fatal(got, err)
		}
		line := m.GetInferResponse().GetId() + m.ErrorMessage
		if line, _, _ = strings.Cut(line, ":"); m.ErrorMessage == "" {
			line += string(m.GetInferResponse().GetRawOutputContents()[0][4:]) // after the length
		}
		got = append(got, line)
	}
	if want := []string{"a" + string(first), "aBUDGET_CUT", "b" + text, "b end"}; strings.Join(got, "|") != strings.Join(want, "|") {
		t.Errorf("got %q, want %q", got, want)
	}
	_ = s.CloseSend()
	for err == nil {
		_, err = s.Recv()
	}
	g.idle()
	if a := g.Guard().Budgets().Snapshot()[0]; a.Spent != 10 || a.Remaining != 0 {
		t.Errorf("%+v", a)
	}
}
