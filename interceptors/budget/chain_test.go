package budget

import (
	"context"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/encoding/protowire"

	"github.com/sluicegate/sluice/interceptors"
	"github.com/sluicegate/sluice/interceptors/dialect"
	"github.com/sluicegate/sluice/interceptors/fields"
	configv1 "github.com/sluicegate/sluice/proto/gen/sluice/config/v1"
)

// watcher is a policy that sees events.
type watcher struct{ seen []string }

func (w *watcher) Name() string { return "watcher" }
func (w *watcher) Begin(*interceptors.Call) (interceptors.CallPolicy, error) {
	return (*watcherCall)(w), nil
}

type watcherCall watcher

func (w *watcherCall) Start(*interceptors.Inference) (interceptors.InferencePolicy, error) {
	return (*watcherInference)(w), nil
}
func (w *watcherCall) End(interceptors.Outcome) {}

type watcherInference watcher

func (w *watcherInference) Request(*fields.Message) error  { return nil }
func (w *watcherInference) Response(*fields.Message) error { return nil }
func (w *watcherInference) End(interceptors.Outcome)       {}
func (w *watcherInference) Observe(e interceptors.Event) {
	w.seen = append(w.seen, e.Policy+" "+e.Name+" "+strings.Join(e.Attributes, " "))
}

func field(b []byte, n protowire.Number, value []byte) []byte {
	return protowire.AppendBytes(protowire.AppendTag(b, n, protowire.BytesType), value)
}

// tensor is a BYTES tensor with one text, as an input or output of the Open
// Inference Protocol.
func tensor(text string) []byte {
	b := field(nil, 1, []byte("text"))
	b = field(b, 2, []byte("BYTES"))
	b = field(b, 3, []byte{1})
	return field(b, 5, field(nil, 8, []byte(text)))
}

func envelope(b []byte) *interceptors.Envelope {
	return interceptors.RawEnvelope(mem.BufferSlice{mem.SliceBuffer(b)})
}

// In a chain: a prompt of three words and an answer of five, out of a budget
// of seven.
func TestExcessIsToldToObservers(t *testing.T) {
	d, err := dialect.KServe(dialect.Options{})
	if err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		name   string
		tokens uint64
		handed bool
		spent  int64
		events []string
	}{
		{"enough", 8, true, 8, []string{"budget threshold budget b percent 100"}},
		{"one too few", 7, true, 4, // the input and one token were granted
			[]string{"budget threshold budget b percent 50", "budget excess tokens 4"}},
		{"not handed", 7, false, 0, nil},
	} {
		t.Run(test.name, func(t *testing.T) {
			w := new(watcher)
			l := ledger(t, &configv1.Budget{Name: "b", Tokens: test.tokens})
			chain := interceptors.New([]*interceptors.Backend{{Name: "b", Dialect: d}}, w, l.Rates(), l.Tokens())
			call, err := chain.Begin(context.Background(), interceptors.CallInfo{FullMethod: "/inference.GRPCInferenceService/ModelInfer"})
			if err != nil {
				t.Fatal(err)
			}
			request := envelope(field(field(nil, 1, []byte("m")), 5, tensor("one two three")))
			defer request.Release()
			i, err := call.Request(request)
			if err != nil {
				t.Fatal(err)
			}
			if test.handed {
				i.Hand()
				response := envelope(field(field(nil, 1, []byte("m")), 5, tensor("four five six seven eight")))
				defer response.Release()
				_, verdict, err := call.Response(response)
				d := denial(t, err)
				if cut := verdict == interceptors.Refuse && d != nil && d.Reason == interceptors.BudgetCut; cut != (len(test.events) > 1) {
					t.Errorf("verdict %d, %v", verdict, err)
				}
			}
			call.End(nil)
			if got := only(t, l); got.Spent != test.spent {
				t.Errorf("%+v, want %d spent", got, test.spent)
			}
			if strings.Join(w.seen, ",") != strings.Join(test.events, ",") {
				t.Errorf("events %q, want %q", w.seen, test.events)
			}
			atRest(t, l)
		})
	}
}

// In a chain an inference waits for the shared store before it is handed on, and is
// refused there if the store has too little.
func TestTheChainWaitsForTheStore(t *testing.T) {
	d, err := dialect.KServe(dialect.Options{})
	if err != nil {
		t.Fatal(err)
	}
	s := newServer(t)
	l := s.gateway(t, time.Minute, long, &configv1.Budget{Name: "b", Tokens: 10, Share: 10},
		&configv1.Budget{Name: "rate", Requests: 3, Share: 1})
	chain := interceptors.New([]*interceptors.Backend{{Name: "b", Dialect: d}}, l.Rates(), l.Tokens())
	for n, want := range []interceptors.Reason{"", interceptors.BudgetExhausted, "", interceptors.RateExceeded} {
		call, err := chain.Begin(context.Background(), interceptors.CallInfo{FullMethod: "/inference.GRPCInferenceService/ModelInfer"})
		if err != nil {
			t.Fatal(err)
		}
		text := "one two three"
		if n == 1 {
			text = strings.Repeat("many ", 10)
		}
		request := envelope(field(field(nil, 1, []byte("m")), 5, tensor(text)))
		i, err := call.Request(request)
		if err == nil && !i.Ready() {
			err = i.Wait(call.Context())
		} else if n == 0 {
			t.Error("the first did not wait")
		}
		request.Release()
		refused := denial(t, err)
		switch {
		case want == "" && (refused != nil || !i.Hand()):
			t.Errorf("inference %d: %v", n, refused)
		case want != "" && (refused == nil || refused.Reason != want || i.Hand()):
			t.Errorf("inference %d: %v, want %s", n, refused, want)
		}
		call.End(err)
	}
	for _, a := range l.Snapshot() {
		if a.Budget == "b" && a.Spent != 6 {
			t.Errorf("%+v, want 6 spent", a)
		}
	}
	_ = l.Close() // and with it what is being fetched in the background
	atRest(t, l)
}
