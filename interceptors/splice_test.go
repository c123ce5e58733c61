package interceptors

import (
	"context"
	"errors"
	"io"
	"strings"
	"testing"
	"testing/synctest"

	"github.com/sluicegate/sluice/interceptors/fields"
	"github.com/sluicegate/sluice/interceptors/tokens"
	"github.com/sluicegate/sluice/proto/gen/inference"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"
)

// tokenized has a back end count with a small tokenizer, and returns that.
func tokenized(t testing.TB, b *Backend) *tokens.Tokenizer {
	t.Helper()
	tok, err := tokens.ReadFile("tokens/testdata/llama.json", "")
	if err != nil {
		t.Fatal(err)
	}
	b.Tokenizer = func(string) *tokens.Tokenizer { return tok }
	return tok
}

// firstTokens is the text of the first tokens of a text.
func firstTokens(t testing.TB, tok *tokens.Tokenizer, text string, n int) string {
	t.Helper()
	out, err := tok.Decode(tok.Encode([]byte(text), nil)[:n], nil)
	if err != nil {
		t.Fatal(err)
	}
	return string(out)
}

// cutter cuts each inference after so many tokens of its output.
func cutter(most int64) *scripted {
	delivered := make(map[*Inference]int64)
	return &scripted{name: "p", journal: new(journal), response: func(i *Inference, m *fields.Message) error {
		if i.OutputTokens <= most {
			delivered[i] = i.OutputTokens
			return nil
		}
		if i.FitOutput(m, most-delivered[i]) == 0 {
			return lost(i.ID)
		}
		i.CutAfter(lost(i.ID))
		return nil
	}}
}

const prose = " A budget is an amount of tokens in a window of time."

func TestPartOfAMessageIsDeliveredAndThenTheRefusal(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := triton(t)
		tok := tokenized(t, b)
		conn := guarded(t, New([]*Backend{b}, cutter(7)), &model{stream: func(ss grpc.ServerStream) error {
			a, b := take(t, ss).Id, take(t, ss).Id
			for _, r := range []*inference.ModelStreamInferResponse{
				chunk(a, false, prose), chunk(b, false, " The"), chunk(a, false, " never seen"), chunk(b, true, " end"), chunk(a, true, "")} {
				if err := ss.SendMsg(r); err != nil {
					return err
				}
			}
			return nil
		}})
		s := open(t, conn, modelStreamInfer, bidi)
		s.send(ask("m", "a", "x"))
		s.send(ask("m", "b", "x"))
		s.expect("a "+firstTokens(t, tok, prose, 7), "!a ERROR MODEL_DENIED: ...", "b  The", "!b  end", "EOF")
	})
}

func TestPartOfAMessageThroughTheClientsDoor(t *testing.T) {
	b := triton(t)
	tok := tokenized(t, b)
	conn := guarding(t, New([]*Backend{b}, cutter(7)), &model{stream: func(ss grpc.ServerStream) error {
		_ = ss.SendMsg(chunk(take(t, ss).Id, false, prose))
		<-ss.Context().Done()
		return ss.Context().Err()
	}})
	s := open(t, conn, modelStreamInfer, bidi)
	s.send(ask("m", "a", "x"))
	s.expect("a " + firstTokens(t, tok, prose, 7))
	if _, err := s.receive(); reasonOf(err) != ModelDenied {
		t.Errorf("ended with %v", err)
	}
}

func TestPartOfAMessageEndsAStreamOfOneInference(t *testing.T) {
	b := oracle(t)
	tok := tokenized(t, b)
	conn := guarded(t, New([]*Backend{b}, cutter(7)), &model{stream: func(ss grpc.ServerStream) error {
		id := take(t, ss).Id
		for ss.SendMsg(answer(id, prose)) == nil {
		}
		return errors.New("cut")
	}})
	s := open(t, conn, serverStream1, &grpc.StreamDesc{ServerStreams: true})
	s.send(ask("m", "a", "x"))
	s.halfClose()
	got := new(inference.ModelInferResponse)
	if err := s.RecvMsg(got); err != nil {
		t.Fatal(err)
	}
	if text := string(got.Outputs[0].Contents.BytesContents[0]); text != firstTokens(t, tok, prose, 7) {
		t.Errorf("got %q", text)
	}
	err := s.RecvMsg(got)
	if errors.Is(err, io.EOF) {
		t.Fatal("it ended well")
	}
	codeIs(t, err, codes.PermissionDenied, ModelDenied)
}

// A caller that reads a final response reads no more: it gets the refusal instead.
func TestAFinalResponseIsRefusedWhole(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := triton(t)
		tokenized(t, b)
		conn := guarded(t, New([]*Backend{b}, cutter(7)), &model{stream: func(ss grpc.ServerStream) error {
			return ss.SendMsg(chunk(take(t, ss).Id, true, prose))
		}})
		s := open(t, conn, modelStreamInfer, bidi)
		s.send(ask("m", "a", "x"))
		s.expect("!a ERROR MODEL_DENIED: ...", "EOF")
	})
}

func TestAUnaryAnswerIsRefusedWhole(t *testing.T) {
	b := triton(t)
	tokenized(t, b)
	conn := guarded(t, New([]*Backend{b}, cutter(7)), &model{unary: func(_ context.Context, r *inference.ModelInferRequest) (*inference.ModelInferResponse, error) {
		return answer(r.Id, prose), nil
	}})
	out := new(inference.ModelInferResponse)
	err := conn.Invoke(t.Context(), modelInfer, ask("m", "a", "x"), out)
	codeIs(t, err, codes.PermissionDenied, ModelDenied)
}

// fit has a response cut to so many tokens, in the raw or the typed form, and is the
// texts that are left.
func fit(t *testing.T, typed bool, most int64, before, texts []string) (left int64, out []string) {
	t.Helper()
	b := triton(t)
	tokenized(t, b)
	c := New([]*Backend{b}, &scripted{name: "p", journal: new(journal), response: func(i *Inference, m *fields.Message) error {
		if i.OutputTokens > 100 {
			left = i.FitOutput(m, most)
		}
		return nil
	}})
	call, err := c.Begin(t.Context(), CallInfo{FullMethod: modelStreamInfer})
	if err != nil {
		t.Fatal(err)
	}
	defer call.End(nil)
	wrap := func(m proto.Message) *Envelope {
		if typed {
			return TypedEnvelope(m)
		}
		return rawEnvelope(t, m)
	}
	r := wrap(ask("m", "a", "x"))
	defer r.Release()
	if _, err := call.Request(r); err != nil {
		t.Fatal(err)
	}
	for _, m := range []*inference.ModelStreamInferResponse{chunk("a", false, before...), chunk("a", false, texts...)} {
		e := wrap(m)
		if _, verdict, err := call.Response(e); verdict != Deliver || err != nil {
			t.Fatal(verdict, err)
		}
		got := new(inference.ModelStreamInferResponse)
		if typed {
			got = e.Typed().(*inference.ModelStreamInferResponse)
		} else {
			bufs := e.Encode()
			if err := proto.Unmarshal(bufs.Materialize(), got); err != nil {
				t.Fatal(err)
			}
			bufs.Free()
		}
		out = out[:0]
		for _, text := range got.GetInferResponse().GetOutputs()[0].GetContents().GetBytesContents() {
			out = append(out, string(text))
		}
	}
	return left, out
}

func TestFitOutput(t *testing.T) {
	long := strings.Repeat(" window", 120)
	tok := tokenized(t, triton(t))
	for _, test := range []struct {
		name          string
		most          int64
		before, texts []string
		left          int64
		want          []string
	}{
		{"a part", 3, []string{long}, []string{prose}, 3, []string{firstTokens(t, tok, prose, 3)}},
		{"all", 1000, []string{long}, []string{prose}, tok.Count([]byte(prose)), []string{prose}},
		{"nothing fits", 0, []string{long}, []string{prose}, 0, []string{prose}},
		{"a word that goes on costs nothing", 0, []string{long + " win"}, []string{"dow"}, 0, []string{"dow"}},
		{"several texts", 8, []string{""}, []string{prose[:17], prose, long}, 8, []string{prose[:17], firstTokens(t, tok, prose, 8-int(tok.Count([]byte(prose[:17])))), ""}},
		{"no part of a character", 2, []string{long}, []string{"a日本語"}, 1, []string{"a"}},
	} {
		for _, typed := range []bool{false, true} {
			name := test.name
			if typed {
				name += ", typed"
			}
			t.Run(name, func(t *testing.T) {
				left, got := fit(t, typed, test.most, test.before, test.texts)
				if left != test.left || strings.Join(got, "|") != strings.Join(test.want, "|") {
					t.Errorf("%d tokens %q, want %d %q", left, got, test.left, test.want)
				}
			})
		}
	}
}

func TestCountsWithATokenizer(t *testing.T) {
	b := triton(t)
	tok := tokenized(t, b)
	var in, out int64
	c := New([]*Backend{b}, &scripted{name: "p", journal: new(journal), end: func(i *Inference) { in, out = i.InputTokens, i.OutputTokens }})
	call, err := c.Begin(t.Context(), CallInfo{FullMethod: modelStreamInfer})
	if err != nil {
		t.Fatal(err)
	}
	r := TypedEnvelope(ask("m", "a", prose))
	defer r.Release()
	if _, err := call.Request(r); err != nil {
		t.Fatal(err)
	}
	for at := 0; at < len(prose); at += 3 {
		e := TypedEnvelope(chunk("a", false, prose[at:min(at+3, len(prose))]))
		if _, _, err := call.Response(e); err != nil {
			t.Fatal(err)
		}
		e.Release()
	}
	call.End(nil)
	if want := tok.Count([]byte(prose)); in != want || out != want {
		t.Errorf("counted %d and %d, want %d", in, out, want)
	}
}

func TestWhatIsHeldComesBeforeAPart(t *testing.T) {
	for _, test := range []struct {
		name    string
		refuses bool
		want    []string
	}{
		{"delivered", false, []string{"a  One", "a " + prose[:9], "!a ERROR MODEL_DENIED: ...", "EOF"}},
		{"refused", true, []string{"!a ERROR OUTPUT_REJECTED: ...", "EOF"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				b := triton(t)
				tok := tokenized(t, b)
				most := tok.Count([]byte(" One" + prose[:9]))
				k := keepsLast(1)
				if test.refuses {
					k.finish = func(*Inference) error { return Deny("keeper", OutputRejected, "no") }
				}
				conn := guarded(t, New([]*Backend{b}, k, cutter(most)), &model{stream: func(ss grpc.ServerStream) error {
					id := take(t, ss).Id
					_ = ss.SendMsg(chunk(id, false, " One"))
					return ss.SendMsg(chunk(id, false, prose))
				}})
				s := open(t, conn, modelStreamInfer, bidi)
				s.send(ask("m", "a", "x"))
				s.expect(test.want...)
			})
		})
	}
}
