package interceptors

import (
	"context"
	"slices"
	"strings"
	"testing"
	"testing/synctest"

	"github.com/sluicegate/sluice/proto/gen/inference"
)

// What comes after a policy that has to wait starts when it has waited, and not at all
// where it then refuses.
func TestPoliciesAfterOneThatWaitsStartLater(t *testing.T) {
	for name, tt := range map[string]struct {
		err  error
		want string
	}{
		"it may go on": {nil, "a start 1,a request 1,b start 1,b request 1,b wait 1,c start 1,c request 1,c end 1 ok,b end 1 ok,a end 1 ok"},
		"it is refused": {Deny("b", PromptRejected, "no"),
			"a start 1,a request 1,b start 1,b request 1,b wait 1,b end 1 PROMPT_REJECTED,a end 1 PROMPT_REJECTED"},
	} {
		t.Run(name, func(t *testing.T) {
			j := new(journal)
			wait := func(context.Context, *Inference) error { return tt.err }
			c := New([]*Backend{triton(t)}, &scripted{name: "a", journal: j}, &scripted{name: "b", journal: j, wait: wait},
				&scripted{name: "c", journal: j})
			call, err := c.Begin(t.Context(), CallInfo{FullMethod: modelInfer})
			if err != nil {
				t.Fatal(err)
			}
			e := TypedEnvelope(ask("m", "1", "x"))
			i, err := call.Request(e)
			if err != nil || i.Ready() || i.Part("c") != nil {
				t.Fatalf("%v, ready %v: c has started", err, i.Ready())
			}
			if err = i.Wait(call.Context()); (err == nil) != (tt.err == nil) {
				t.Fatal(err)
			}
			if err == nil && !i.Ready() {
				t.Error("it is not ready after its wait")
			}
			e.Release()
			call.End(err)
			got := strings.Join(slices.DeleteFunc(j.those("a ", "b ", "c "), func(l string) bool {
				return strings.Contains(l, "begin") || strings.Contains(l, "begun") || strings.Contains(l, "started") || strings.Contains(l, "call-end")
			}), ",")
			if got != tt.want {
				t.Errorf("got\n%s, want\n%s", got, tt.want)
			}
		})
	}
}

// An inference that was ended while it waited starts nothing more.
func TestNothingStartsAfterTheEnd(t *testing.T) {
	j := new(journal)
	wait := func(_ context.Context, i *Inference) error {
		i.Cut(Deny("x", Draining, "over"))
		return nil
	}
	c := New([]*Backend{triton(t)}, &scripted{name: "a", journal: j, wait: wait}, &scripted{name: "b", journal: j})
	call, err := c.Begin(t.Context(), CallInfo{FullMethod: modelStreamInfer})
	if err != nil {
		t.Fatal(err)
	}
	e := TypedEnvelope(ask("m", "1", "x"))
	i, err := call.Request(e)
	if err != nil {
		t.Fatal(err)
	}
	if err := i.Wait(context.Background()); reasonOf(err) != Draining {
		t.Errorf("got %v", err)
	}
	e.Release()
	call.End(nil)
	if got := j.those("b start", "b end"); len(got) > 0 {
		t.Errorf("got %q", got)
	}
}

// Of one sequence nothing takes a permit before what comes before it: with one permit
// the two would wait for each other.
func TestASequenceTakesItsPermitsInOrder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		j := new(journal)
		permit, judged := make(chan struct{}, 1), make(chan struct{})
		permit <- struct{}{}
		judge := &firstWaits{scripted{name: "judge", journal: j, wait: func(ctx context.Context, _ *Inference) error {
			select {
			case <-judged:
				return nil
			case <-ctx.Done():
				return ctx.Err()
			}
		}}}
		pool := &scripted{name: "pool", journal: j, wait: func(ctx context.Context, i *Inference) error {
			select {
			case <-permit:
				return nil
			case <-ctx.Done():
				return ctx.Err()
			}
		}}
		conn := guarded(t, New([]*Backend{triton(t)}, judge, pool), &model{stream: words})
		s := open(t, conn, modelStreamInfer, bidi)
		for _, id := range []string{"1", "2", "3"} {
			r := ask("m", id, id)
			r.Parameters = map[string]*inference.InferParameter{"sequence_id": {ParameterChoice: &inference.InferParameter_StringParam{StringParam: "s"}}}
			s.send(r)
		}
		synctest.Wait()
		if got := j.those("pool start "); len(got) > 0 {
			t.Errorf("%q before the first of the sequence was judged", got)
		}
		close(judged)
		for _, id := range []string{"1", "2", "3"} {
			s.expect(id + " " + id)
			permit <- struct{}{} // its inference is served
		}
		s.halfClose()
		s.expect("EOF")
		if got := j.those("pool wait"); !slices.Equal(got, []string{"pool wait 1", "pool wait 2", "pool wait 3"}) {
			t.Errorf("got %q", got)
		}
	})
}

// firstWaits has nobody wait but the inference with the id 1.
type firstWaits struct{ scripted }

func (p *firstWaits) Begin(*Call) (CallPolicy, error) { return p, nil }

func (p *firstWaits) Start(i *Inference) (InferencePolicy, error) {
	if i.ID == "1" {
		return &scriptedWaiter{scriptedInference{scripted: &p.scripted, i: i}, false}, nil
	}
	return &scriptedInference{scripted: &p.scripted, i: i}, nil
}

func (p *firstWaits) End(Outcome) {}
