package budget

import (
	"context"
	"math/rand/v2"
	"strconv"
	"strings"
	"testing"

	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/proto"

	"github.com/sluicegate/sluice/interceptors"
	"github.com/sluicegate/sluice/interceptors/dialect"
	tokenizers "github.com/sluicegate/sluice/interceptors/tokens"
	pb "github.com/sluicegate/sluice/proto/gen/inference"
	configv1 "github.com/sluicegate/sluice/proto/gen/sluice/config/v1"
)

func tokenizer(t testing.TB) *tokenizers.Tokenizer {
	t.Helper()
	tok, err := tokenizers.ReadFile("../tokens/testdata/llama.json", "")
	if err != nil {
		t.Fatal(err)
	}
	return tok
}

// stream is a Triton stream through a chain with budgets and a tokenizer.
type stream struct {
	t    *testing.T
	call *interceptors.Call
}

func openStream(t *testing.T, l *Ledger, tok *tokenizers.Tokenizer, w *watcher) *stream {
	t.Helper()
	d, err := dialect.Triton(dialect.Options{})
	if err != nil {
		t.Fatal(err)
	}
	b := &interceptors.Backend{Name: "b", Dialect: d, Tokenizer: func(string) *tokenizers.Tokenizer { return tok }}
	chain := interceptors.New([]*interceptors.Backend{b}, w, l.Rates(), l.Tokens())
	call, err := chain.Begin(context.Background(), interceptors.CallInfo{FullMethod: "/inference.GRPCInferenceService/ModelStreamInfer"})
	if err != nil {
		t.Fatal(err)
	}
	return &stream{t, call}
}

func raw(t testing.TB, m proto.Message) *interceptors.Envelope {
	t.Helper()
	b, err := proto.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	return interceptors.RawEnvelope(mem.BufferSlice{mem.SliceBuffer(b)})
}

// ask begins an inference; false if it is refused.
func (s *stream) ask(id, prompt string) bool {
	s.t.Helper()
	e := raw(s.t, &pb.ModelInferRequest{ModelName: "m", Id: id, Inputs: []*pb.ModelInferRequest_InferInputTensor{{
		Name: "text_input", Datatype: "BYTES", Shape: []int64{1}, Contents: &pb.InferTensorContents{BytesContents: [][]byte{[]byte(prompt)}}}}})
	defer e.Release()
	i, err := s.call.Request(e)
	return err == nil && i.Hand()
}

// tell is a response of the model server, and what of its text is delivered.
func (s *stream) tell(id, text string) (delivered string, err error) {
	s.t.Helper()
	e := raw(s.t, &pb.ModelStreamInferResponse{InferResponse: &pb.ModelInferResponse{Id: id,
		Parameters: map[string]*pb.InferParameter{"triton_final_response": {ParameterChoice: &pb.InferParameter_BoolParam{}}},
		Outputs: []*pb.ModelInferResponse_InferOutputTensor{{
			Name: "text_output", Datatype: "BYTES", Shape: []int64{1}, Contents: &pb.InferTensorContents{BytesContents: [][]byte{[]byte(text)}}}}}})
	_, verdict, err := s.call.Response(e)
	if verdict != interceptors.Deliver && verdict != interceptors.Last {
		e.Release()
		return "", err
	}
	bufs := e.Encode()
	defer bufs.Free()
	got := new(pb.ModelStreamInferResponse)
	if err := proto.Unmarshal(bufs.Materialize(), got); err != nil {
		s.t.Fatal(err)
	}
	return string(got.GetInferResponse().GetOutputs()[0].GetContents().GetBytesContents()[0]), err
}

const answer = " A budget is an amount of tokens in a window of time, and an account for each of its keys."

func TestTheCutIsAtTheToken(t *testing.T) {
	tok := tokenizer(t)
	prompt := "Tell me."
	input, output := tok.Count([]byte(prompt)), tok.Count([]byte(answer))
	first := func(n int64) string {
		text, err := tok.Decode(tok.Encode([]byte(answer), nil)[:n], nil)
		if err != nil {
			t.Fatal(err)
		}
		return string(text)
	}
	for _, test := range []struct {
		name      string
		budget    *configv1.Budget
		tokenizer *tokenizers.Tokenizer
		want      string
		left      int64
		metadata  string // tokensDelivered and tokensGranted
	}{
		{"spliced", &configv1.Budget{Tokens: uint64(input + 9), Cut: configv1.Cut_CUT_SPLICE}, tok, first(9), 0, "9 9"},
		{"dropped", &configv1.Budget{Tokens: uint64(input + 9)}, tok, "", 8, "0 1"},
		{"dropped, as it says", &configv1.Budget{Tokens: uint64(input + 9), Cut: configv1.Cut_CUT_DROP}, tok, "", 8, "0 1"},
		{"nothing is left", &configv1.Budget{Tokens: uint64(input + 1), OutputWeight: proto.Uint32(2), Soft: false, Cut: configv1.Cut_CUT_SPLICE}, tok, "", 0, "none"},
		{"weighted", &configv1.Budget{Tokens: uint64(input + 9), OutputWeight: proto.Uint32(2), Cut: configv1.Cut_CUT_SPLICE}, tok, first(4), 1, "4 4"},
		{"the overdraft too", &configv1.Budget{Tokens: uint64(input + 5), Overdraft: 4, Cut: configv1.Cut_CUT_SPLICE}, tok, first(9), -4, "9 9"},
		{"without a tokenizer", &configv1.Budget{Tokens: 10, Cut: configv1.Cut_CUT_SPLICE}, nil, "", 0, "0 8"},
		{"enough", &configv1.Budget{Tokens: uint64(input + output), Cut: configv1.Cut_CUT_SPLICE}, tok, answer, 0, ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			test.budget.Name = "b"
			l := ledger(t, test.budget)
			s := openStream(t, l, test.tokenizer, new(watcher))
			begun := s.ask("a", prompt)
			if begun == (test.metadata == "none") {
				t.Fatalf("begun: %t", begun)
			}
			if begun {
				got, err := s.tell("a", answer)
				if got != test.want {
					t.Errorf("delivered %q, want %q", got, test.want)
				}
				var metadata string
				if d := denial(t, err); d != nil {
					metadata = d.Metadata["tokensDelivered"] + " " + d.Metadata["tokensGranted"]
				}
				if metadata != test.metadata {
					t.Errorf("delivered and granted %q, want %q", metadata, test.metadata)
				}
				if more, _ := s.tell("a", " more"); more != "" && err != nil {
					t.Errorf("%q was delivered after the cut", more)
				}
			}
			s.call.End(nil)
			if got := only(t, l); test.tokenizer != nil && begun && got.Remaining != test.left {
				t.Errorf("%+v, want %d left", got, test.left)
			}
			atRest(t, l)
		})
	}
}

// TestDeliveredIsChargedIsGranted holds that of every inference delivered ≤ charged ≤ grant,
// to the token, and that all that was charged fits in the budget.
func TestDeliveredIsChargedIsGranted(t *testing.T) {
	tok := tokenizer(t)
	words := []string{" budget", " the", "zyxwv", ",", "\n\n", "日本語", " 2026", "!", "a", " window", "😀", "  ", "the"}
	spliced := 0
	for seed := range uint64(150) {
		r := rand.New(rand.NewPCG(seed, 7))
		cut := configv1.Cut(r.IntN(3))
		amount := uint64(20 + r.IntN(200))
		l, err := New([]*configv1.Budget{
			{Name: "b", Tokens: amount, DefaultOutputTokens: uint64(1 + r.IntN(20)), Cut: cut},
			{Name: "m", MoneyMicros: uint64(1 + r.IntN(400)), Cut: cut},
		}, WithCharges(), WithPrices([]*configv1.Price{{Model: "*", InputMicrosPerMillion: 1_000_000, OutputMicrosPerMillion: 2_000_000}}))
		if err != nil {
			t.Fatal(err)
		}
		w := new(watcher)
		s := openStream(t, l, tok, w)
		total := int64(0)
		type one struct {
			id   string
			text strings.Builder
			in   int64
		}
		var open []*one
		for n := range 8 {
			o := &one{id: "i" + strconv.Itoa(n)}
			prompt := strings.Repeat("Tell ", 1+r.IntN(4))
			o.in = tok.Count([]byte(prompt))
			if s.ask(o.id, prompt) {
				open = append(open, o)
			}
		}
		for range 60 {
			if len(open) == 0 {
				break
			}
			o := open[r.IntN(len(open))]
			var chunk strings.Builder
			for range 1 + r.IntN(12) {
				chunk.WriteString(words[r.IntN(len(words))])
			}
			got, err := s.tell(o.id, chunk.String())
			if !strings.HasPrefix(chunk.String(), got) {
				t.Fatalf("seed %d: %q is no beginning of %q", seed, got, chunk.String())
			}
			if err != nil && got != "" {
				spliced++
				if cut != configv1.Cut_CUT_SPLICE {
					t.Fatalf("seed %d: %q was delivered of what is to be dropped", seed, got)
				}
			}
			o.text.WriteString(got)
		}
		s.call.End(nil)
		for _, o := range open {
			total += o.in + tok.Count([]byte(o.text.String()))
		}
		for _, a := range l.Snapshot() {
			if a.Spent > a.Limit || a.Remaining < 0 || a.Spent+a.Remaining != a.Limit {
				t.Errorf("seed %d: %+v", seed, a)
			}
			if a.Budget == "b" && total > a.Spent {
				t.Errorf("seed %d: delivered %d, charged %d", seed, total, a.Spent)
			}
		}
		atRest(t, l)
	}
	if spliced < 30 {
		t.Errorf("only %d messages were spliced", spliced)
	}
}
