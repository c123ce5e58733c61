package interceptors

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"

	"github.com/sluicegate/sluice/interceptors/dialect"
	"github.com/sluicegate/sluice/interceptors/fields"
	"github.com/sluicegate/sluice/proto/gen/inference"
)

func asError[E error](err error) (e E) {
	errors.As(err, &e)
	return e
}

// oneCall runs a unary call through a chain, as a door does.
func oneCall(c *Chain) (err error) {
	call, err := c.Begin(context.Background(), CallInfo{FullMethod: modelInfer})
	if err != nil {
		return err
	}
	defer func() { call.End(err) }()
	i, err := call.Request(TypedEnvelope(ask("m", "a", "hello")))
	if err == nil {
		err = i.Wait(call.Context())
	}
	if err != nil {
		return err
	}
	i.Hand()
	_, _, err = call.Response(TypedEnvelope(answer("a", "world")))
	return err
}

func TestRequestsPassInOrderAndResponsesAndEndsInReverse(t *testing.T) {
	j := new(journal)
	ok := func(context.Context, *Inference) error { return nil }
	c := New([]*Backend{triton(t)}, &scripted{name: "1", journal: j}, &scripted{name: "2", journal: j}, &scripted{name: "3", journal: j, wait: ok})
	if err := oneCall(c); err != nil {
		t.Fatal(err)
	}
	want := []string{
		"1 begin", "1 begun", "2 begin", "2 begun", "3 begin", "3 begun",
		"1 start a", "1 started a", "1 request a", "2 start a", "2 started a", "2 request a", "3 start a", "3 started a", "3 request a",
		"3 wait a",
		"3 response a", "2 response a", "1 response a",
		"3 end a ok", "2 end a ok", "1 end a ok",
		"3 call-end ok", "2 call-end ok", "1 call-end ok",
	}
	if got := j.all(); !slices.Equal(got, want) {
		t.Errorf("got:\n%s\nwant:\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

// checkUnwound finds what was opened and not ended exactly once, or in the
// wrong order.
func checkUnwound(t *testing.T, lines []string) {
	t.Helper()
	const call = "the call"
	type part struct{ policy, inference string }
	var open []part
	ended := make(map[part]bool)
	for _, l := range lines {
		f := strings.Split(l, " ")
		switch f[1] {
		case "begun":
			open = append(open, part{f[0], call})
		case "started":
			open = append(open, part{f[0], f[2]})
		case "end", "call-end":
			p := part{f[0], call}
			if f[1] == "end" {
				p.inference = f[2]
			}
			if ended[p] {
				t.Errorf("%v ended twice", p)
			}
			ended[p] = true
			n := slices.Index(open, p)
			if n < 0 {
				t.Errorf("%v ended but was not open", p)
				continue
			}
			for _, later := range open[n+1:] {
				if later.inference == p.inference || p.inference == call {
					t.Errorf("%v ended before %v", p, later)
				}
			}
			open = slices.Delete(open, n, n+1)
		}
	}
	if len(open) > 0 {
		t.Errorf("left open: %v", open)
	}
}

// checkBalanced finds, for several calls at once, what was opened and not ended.
func checkBalanced(t *testing.T, j *journal) {
	t.Helper()
	count := make(map[string]int)
	for _, l := range j.all() {
		count[strings.Split(l, " ")[1]]++
	}
	if count["begun"] != count["call-end"] || count["started"] != count["end"] || count["begun"] == 0 {
		t.Errorf("of %d calls %d ended, of %d inferences %d", count["begun"], count["call-end"], count["started"], count["end"])
	}
}

// fault makes policy k of n fail at a point, in some way.
type fault struct {
	k     int
	point string
	how   string
}

const secret = "TOP-SECRET-PROMPT"

func (f fault) err() error {
	switch f.how {
	case "panic":
		panic(secret)
	case "error":
		return errors.New(secret)
	}
	return Deny("", PromptRejected, "no")
}

// policies makes n scripted policies, of which one has the fault. All wait.
func (f fault) policies(n int, j *journal, id string) []Policy {
	out := make([]Policy, n)
	for k := range out {
		p := &scripted{name: fmt.Sprint("p", k), journal: j, wait: func(context.Context, *Inference) error { return nil }}
		out[k] = p
		if k != f.k {
			continue
		}
		on := func(i *Inference) error {
			if i.ID == id {
				return f.err()
			}
			return nil
		}
		switch f.point {
		case "begin":
			p.begin = func(*Call) error { return f.err() }
		case "start":
			p.start = on
		case "request":
			p.request = func(i *Inference, _ *fields.Message) error { return on(i) }
		case "wait":
			p.wait = func(_ context.Context, i *Inference) error { return on(i) }
		case "response":
			p.response = func(i *Inference, _ *fields.Message) error { return on(i) }
		case "end":
			p.end = func(i *Inference) { _ = on(i) }
		case "call-end":
			p.callEnd = func() { _ = f.err() }
		}
	}
	return out
}

func faults(n int) (out []fault) {
	for k := range n {
		for _, point := range []string{"begin", "start", "request", "wait", "response", "end", "call-end"} {
			for _, how := range []string{"refuse", "error", "panic"} {
				out = append(out, fault{k, point, how})
			}
		}
	}
	return out
}

// want is the reason that a call with the fault ends with; "" if it ends well.
func (f fault) want() Reason {
	switch {
	case f.point == "end" || f.point == "call-end":
		return ""
	case f.how == "refuse":
		return PromptRejected
	}
	return Internal
}

func TestWhateverFailsWhatWasOpenedIsEndedOnce(t *testing.T) {
	const n = 4
	for _, f := range faults(n) {
		t.Run(fmt.Sprintf("policy %d %ss at %s", f.k, f.how, f.point), func(t *testing.T) {
			j := new(journal)
			err := oneCall(New([]*Backend{triton(t)}, f.policies(n, j, "a")...))
			if got := reasonOf(err); got != f.want() {
				t.Errorf("ended with %v, want %q", err, f.want())
			}
			if d := asError[*Denial](err); d != nil {
				if d.Policy != fmt.Sprint("p", f.k) {
					t.Errorf("%s is blamed", d.Policy)
				}
				if strings.Contains(fmt.Sprintf("%s %v", d.Error(), d.GRPCStatus().Proto()), secret) {
					t.Errorf("the caller would learn the text of the failure: %v", d)
				}
				if p := asError[*Panic](err); p != nil && strings.Contains(p.Error(), secret) {
					t.Errorf("the log would learn the panic's value: %v", p)
				}
			}
			checkUnwound(t, j.all())
			if f.point == "start" || f.point == "request" {
				for k := f.k + 1; k < n; k++ {
					if seen := j.those(fmt.Sprintf("p%d start", k)); len(seen) > 0 {
						t.Errorf("a policy behind the refusal saw %v", seen)
					}
				}
			}
			if f.point == "response" {
				for k := range f.k {
					if seen := j.those(fmt.Sprintf("p%d response", k)); len(seen) > 0 {
						t.Errorf("a policy behind the refusal saw %v", seen)
					}
				}
			}
		})
	}
}

func TestOfManyInferencesOnlyTheOneThatFailsIsRefused(t *testing.T) {
	const n = 3
	for _, f := range faults(n) {
		if f.point == "begin" {
			continue
		}
		t.Run(fmt.Sprintf("policy %d %ss at %s", f.k, f.how, f.point), func(t *testing.T) {
			j := new(journal)
			call, err := New([]*Backend{triton(t)}, f.policies(n, j, "bad")...).Begin(context.Background(), CallInfo{FullMethod: modelStreamInfer})
			if err != nil {
				t.Fatal(err)
			}
			ids := []string{"x", "bad", "y"}
			refused := make(map[string]Reason)
			for _, id := range ids {
				i, err := call.Request(TypedEnvelope(ask("m", id, "hello")))
				if i == nil {
					t.Fatalf("the whole call was refused: %v", err)
				}
				if err == nil {
					err = i.Wait(call.Context())
				}
				if err != nil {
					refused[id] = reasonOf(err)
					continue
				}
				i.Hand()
			}
			for _, id := range slices.Backward(ids) { // out of order
				if refused[id] != "" {
					continue
				}
				for _, last := range []bool{false, true} {
					i, v, err := call.Response(TypedEnvelope(chunk(id, last, "w")))
					switch {
					case v == Refuse:
						refused[id] = reasonOf(err)
					case err != nil:
						t.Fatal(err)
					case i.ID != id:
						t.Errorf("the answer to %s went to %s", id, i.ID)
					case v != Deliver && refused[id] == "":
						t.Errorf("an answer to %s is not delivered", id)
					case v == Deliver && refused[id] != "":
						t.Errorf("an answer to %s is delivered after its refusal", id)
					}
				}
			}
			call.End(nil)
			checkUnwound(t, j.all())
			if refused["bad"] != f.want() || refused["x"] != "" || refused["y"] != "" {
				t.Errorf("refused %v, want only bad, with %q", refused, f.want())
			}
		})
	}
}

func TestEndEndsOnceAndTheFirstEndCounts(t *testing.T) {
	j := new(journal)
	call, err := New([]*Backend{triton(t)}, &scripted{name: "p", journal: j}).Begin(context.Background(), CallInfo{FullMethod: modelStreamInfer})
	if err != nil {
		t.Fatal(err)
	}
	i, err := call.Request(TypedEnvelope(ask("m", "a")))
	if err != nil {
		t.Fatal(err)
	}
	call.End(Deny("p", Draining, "x"))
	call.End(nil)
	i.End(nil)
	if got := j.those("p end", "p call-end"); !slices.Equal(got, []string{"p end a DRAINING", "p call-end DRAINING"}) {
		t.Errorf("got %v", got)
	}
	if call.Context().Err() == nil {
		t.Error("the context of a call that ended goes on")
	}
	if i.Hand() {
		t.Error("an inference that ended may still be handed on")
	}
	if _, err := call.Request(TypedEnvelope(ask("m", "b"))); reasonOf(err) != Draining {
		t.Errorf("a request after the end: %v", err)
	}
	checkUnwound(t, j.all())
}

func TestAbortSaysWhyTheContextEnded(t *testing.T) {
	for _, own := range []bool{true, false} {
		name := map[bool]string{true: "the chain's context", false: "the door's context"}[own]
		begin := func(t *testing.T) (call *Call, gone func(), cancelled func() int) {
			ctx, cancel := context.WithCancel(t.Context())
			var calls atomic.Int32
			info := CallInfo{FullMethod: modelInfer}
			if !own {
				info.Cancel = func(error) { calls.Add(1); cancel() }
			}
			call, err := New([]*Backend{triton(t)}).Begin(ctx, info)
			if err != nil {
				t.Fatal(err)
			}
			return call, cancel, func() int { return int(calls.Load()) }
		}
		d := Deny("p", IdentityExpired, "expired")

		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				call, _, cancelled := begin(t)
				if err := call.Cause(); err != nil {
					t.Errorf("a call that goes on has the cause %v", err)
				}
				call.Abort(d)
				call.Abort(errors.New("later"))
				<-call.Context().Done()
				if !errors.Is(call.Cause(), d) {
					t.Errorf("the cause is %v, not the first abort", call.Cause())
				}
				call.End(d)
				call.Abort(errors.New("after the end"))
				synctest.Wait()
				if n := cancelled(); !own && n != 1 {
					t.Errorf("the door was told %d times", n)
				}
			})
		})
		t.Run(name+", the caller having gone", func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				call, gone, cancelled := begin(t)
				gone()
				call.Abort(d)
				synctest.Wait()
				if !errors.Is(call.Cause(), context.Canceled) || cancelled() != 0 {
					t.Errorf("the cause is %v, and the door was told %d times", call.Cause(), cancelled())
				}
				call.End(nil)
			})
		})
		t.Run(name+", after the end", func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				call, gone, cancelled := begin(t)
				defer gone()
				call.End(nil)
				call.Abort(d)
				synctest.Wait()
				if errors.As(call.Cause(), new(*Denial)) || cancelled() != 0 {
					t.Errorf("the cause is %v, and the door was told %d times", call.Cause(), cancelled())
				}
			})
		})
	}
}

func TestTheEndWaitsForAStart(t *testing.T) {
	j := new(journal)
	inStart, goOn, ended := make(chan struct{}), make(chan struct{}), make(chan struct{})
	p := &scripted{name: "p", journal: j, start: func(*Inference) error { close(inStart); <-goOn; return nil }}
	call, err := New([]*Backend{triton(t)}, p).Begin(context.Background(), CallInfo{FullMethod: modelStreamInfer})
	if err != nil {
		t.Fatal(err)
	}
	requested := make(chan struct{})
	go func() {
		defer close(requested)
		_, _ = call.Request(TypedEnvelope(ask("m", "a")))
	}()
	<-inStart
	go func() { defer close(ended); call.End(nil) }()
	close(goOn)
	<-requested
	<-ended
	checkUnwound(t, j.all())
	if got := j.those("p end", "p call-end"); !slices.Equal(got, []string{"p end a ok", "p call-end ok"}) {
		t.Errorf("got %v", got)
	}
}

func TestTwoPoliciesMayWaitInTurn(t *testing.T) {
	j := new(journal)
	ok := func(context.Context, *Inference) error { return nil }
	c := New([]*Backend{triton(t)}, &scripted{name: "1", journal: j, wait: ok}, &scripted{name: "2", journal: j, wait: ok})
	if err := oneCall(c); err != nil {
		t.Fatal(err)
	}
	if got := j.those("1 wait", "2 wait"); !slices.Equal(got, []string{"1 wait a", "2 wait a"}) {
		t.Errorf("got %v", got)
	}
}

func TestUnknownMethodsAreRefusedAndSeen(t *testing.T) {
	j := new(journal)
	c := New([]*Backend{triton(t)}, &scripted{name: "p", journal: j})
	_, err := c.Begin(context.Background(), CallInfo{FullMethod: "/no/such"})
	if reasonOf(err) != MethodUnknown {
		t.Errorf("got %v", err)
	}
	if got := j.those("p call-end"); !slices.Equal(got, []string{"p call-end METHOD_UNKNOWN"}) {
		t.Errorf("got %v", got)
	}
}

func TestAGateRefusesBeforeTheCallAndWhoCameBeforeItSees(t *testing.T) {
	for _, how := range []string{"refuse", "error", "panic"} {
		j := new(journal)
		gate := &scripted{name: "gate", journal: j, allow: func(*Call) error { return fault{how: how}.err() }}
		c := New([]*Backend{triton(t)}, &scripted{name: "first", journal: j}, gate, &scripted{name: "last", journal: j})
		err := c.Allow(context.Background(), CallInfo{FullMethod: modelInfer})
		d := asError[*Denial](err)
		if d == nil || d.Policy != "gate" || strings.Contains(d.Error(), secret) {
			t.Fatalf("%s: got %v", how, err)
		}
		if want := []string{"first begin", "first begun", "first call-end " + string(d.Reason)}; !slices.Equal(j.all(), want) {
			t.Errorf("%s: got %v, want %v", how, j.all(), want)
		}
	}
	if err := New([]*Backend{triton(t)}, &scripted{journal: new(journal)}).Allow(context.Background(), CallInfo{FullMethod: modelInfer}); err != nil {
		t.Errorf("without a refusal: %v", err)
	}
}

func TestWhatCannotBeSeenIsRefused(t *testing.T) {
	region := ask("m", "a", "x")
	region.Inputs[0].Contents = nil
	region.Inputs[0].Parameters = map[string]*inference.InferParameter{
		"shared_memory_region": {ParameterChoice: &inference.InferParameter_StringParam{StringParam: "r"}}}
	for _, c := range []struct {
		name   string
		req    *inference.ModelInferRequest
		change func(*Backend)
		want   Reason
	}{
		{"shared memory", region, nil, Uninspectable},
		{"shared memory, allowed", region, func(b *Backend) { b.AllowSharedMemory = true }, ""},
		{"a datatype that is not listed", ask("m", "a", "x"), func(b *Backend) { b.Datatypes = map[string]bool{"FP32": true} }, Uninspectable},
		{"a datatype that is listed", ask("m", "a", "x"), func(b *Backend) { b.Datatypes = map[string]bool{"BYTES": true} }, ""},
		{"a model that nobody serves", ask("other", "a", "x"), func(b *Backend) { b.Models = map[string]bool{"m": true} }, ModelDenied},
		{"a limit that makes no sense", func() *inference.ModelInferRequest {
			r := ask("m", "a", "x")
			r.Parameters = map[string]*inference.InferParameter{"max_tokens": {ParameterChoice: &inference.InferParameter_Int64Param{Int64Param: -1}}}
			return r
		}(), nil, MessageMalformed},
	} {
		for _, method := range []string{modelInfer, modelStreamInfer} {
			t.Run(c.name+method, func(t *testing.T) {
				j, b := new(journal), triton(t)
				if c.change != nil {
					c.change(b)
				}
				call, err := New([]*Backend{b}, &scripted{name: "p", journal: j}).Begin(context.Background(), CallInfo{FullMethod: method})
				if err != nil {
					t.Fatal(err)
				}
				i, err := call.Request(TypedEnvelope(c.req))
				if reasonOf(err) != c.want || i == nil {
					t.Errorf("got %v of %v, want %q of one inference", err, i, c.want)
				}
				call.End(err)
				if got := j.those("p witness"); (len(got) == 1) != (c.want != "") {
					t.Errorf("witnessed: %v", got)
				}
				checkUnwound(t, j.all())
			})
		}
	}
}

// Two back ends under one path, with different dialects.
func TestACallTakesTheDialectOfTheBackEndThatServesItsModel(t *testing.T) {
	double := ask("t", "a", "x")
	double.Parameters = map[string]*inference.InferParameter{"priority": {ParameterChoice: &inference.InferParameter_Uint64Param{Uint64Param: 1}}}
	ml, tr := backend(t, "ml", dialect.MLServer, "m"), triton(t, "t")
	for _, c := range []struct {
		name     string
		backends []*Backend
		req      *inference.ModelInferRequest
		raw      bool
		want     *Backend
		reason   Reason
	}{
		{"first", []*Backend{ml, tr}, ask("m", "a"), false, ml, ""},
		{"second", []*Backend{ml, tr}, ask("t", "a"), false, tr, ""},
		{"second, whose message the first cannot read", []*Backend{ml, tr}, double, true, tr, ""},
		{"none", []*Backend{ml, tr}, ask("x", "a"), false, nil, ModelDenied},
		{"none, and the first cannot read it", []*Backend{ml}, double, true, nil, MessageAmbiguous},
		{"the first serves the model and cannot read it", []*Backend{backend(t, "ml", dialect.MLServer), triton(t)}, double, true, nil, MessageAmbiguous},
	} {
		t.Run(c.name, func(t *testing.T) {
			call, err := New(c.backends).Begin(context.Background(), CallInfo{FullMethod: modelStreamInfer})
			if err != nil {
				t.Fatal(err)
			}
			defer call.End(nil)
			e := TypedEnvelope(c.req)
			if c.raw {
				e = rawEnvelope(t, c.req)
			}
			i, err := call.Request(e)
			if reasonOf(err) != c.reason {
				t.Fatalf("got %v, want %q", err, c.reason)
			}
			if c.want != nil && (i.Backend != c.want || call.Method != c.want.Dialect.Methods[modelStreamInfer]) {
				t.Errorf("went to %s", i.Backend.Name)
			}
		})
	}
}

// Rules judge a call by the kind of its method: it must not become another.
func TestACallIsNotRoutedToAMethodOfAnotherKind(t *testing.T) {
	ml, ks := backend(t, "ml", dialect.MLServer, "m"), backend(t, "ks", dialect.KServe, "k")
	call, err := New([]*Backend{ml, ks}).Begin(context.Background(), CallInfo{FullMethod: modelStreamInfer})
	if err != nil {
		t.Fatal(err)
	}
	defer call.End(nil)
	if _, err := call.Request(TypedEnvelope(ask("k", "a"))); reasonOf(err) != ModelDenied {
		t.Errorf("got %v", err)
	}
}

func TestAStreamStaysWithTheBackEndOfItsFirstMessage(t *testing.T) {
	a, b := triton(t, "a"), triton(t, "b")
	call, err := New([]*Backend{a, b}).Begin(context.Background(), CallInfo{FullMethod: modelStreamInfer})
	if err != nil {
		t.Fatal(err)
	}
	defer call.End(nil)
	for _, c := range []struct {
		model  string
		reason Reason
	}{{"a", ""}, {"b", RouteConflict}, {"c", ModelDenied}, {"a", ""}} {
		if _, err := call.Request(TypedEnvelope(ask(c.model, ""))); reasonOf(err) != c.reason {
			t.Errorf("%s: got %v, want %q", c.model, err, c.reason)
		}
	}
}

func TestTokensAreCountedAndReportsTakenIn(t *testing.T) {
	var got Inference
	p := &scripted{name: "p", journal: new(journal), end: func(i *Inference) {
		got.InputTokens, got.OutputTokens = i.InputTokens, i.OutputTokens
		got.ReportedInput, got.ReportedOutput, got.Handed = i.ReportedInput, i.ReportedOutput, i.Handed
	}}
	call, err := New([]*Backend{triton(t)}, p).Begin(context.Background(), CallInfo{FullMethod: modelStreamInfer})
	if err != nil {
		t.Fatal(err)
	}
	i, err := call.Request(TypedEnvelope(ask("m", "a", "one two", "three")))
	if err != nil {
		t.Fatal(err)
	}
	i.Hand()
	for n, text := range []string{"wo", "rd and", " more"} { // three words
		r := chunk("a", n == 2, text)
		for name, v := range map[string]int64{"num_input_tokens": 5, "num_output_tokens": 2} {
			r.InferResponse.Parameters[name] = &inference.InferParameter{ParameterChoice: &inference.InferParameter_Int64Param{Int64Param: v}}
		}
		if _, v, err := call.Response(TypedEnvelope(r)); err != nil || v != Deliver {
			t.Fatal(v, err)
		}
	}
	call.End(nil)
	if got.InputTokens != 3 || got.OutputTokens != 3 || got.ReportedInput != 5 || got.ReportedOutput != 6 || !got.Handed {
		t.Errorf("got %d in, %d out, %d and %d reported, handed %t", got.InputTokens, got.OutputTokens, got.ReportedInput, got.ReportedOutput, got.Handed)
	}
}

// Choices that are written at once are texts of their own.
func TestChoicesAreCountedEach(t *testing.T) {
	var out int64
	p := &scripted{name: "p", journal: new(journal), end: func(i *Inference) { out = i.OutputTokens }}
	call, err := New([]*Backend{triton(t)}, p).Begin(context.Background(), CallInfo{FullMethod: modelStreamInfer})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := call.Request(TypedEnvelope(ask("m", "a", "x"))); err != nil {
		t.Fatal(err)
	}
	for range 5 {
		if _, _, err := call.Response(TypedEnvelope(chunk("a", false, "foo", "bar"))); err != nil {
			t.Fatal(err)
		}
	}
	call.End(nil)
	if out != 10 {
		t.Errorf("counted %d, want 10", out)
	}
}

// Responses are kept from the deaf alone, whose denials and panics the others'
// are not taken for.
func TestTheDeafSeeNoResponses(t *testing.T) {
	for _, refusing := range []string{"", "a", "c"} {
		j := new(journal)
		policies := make([]Policy, 0, 4)
		for _, name := range []string{"a", "b", "c", "d"} {
			p := &scripted{name: name, journal: j, deaf: name == "b" || name == "d"}
			p.response = func(*Inference, *fields.Message) error {
				if p.name == refusing {
					return Deny("", OutputRejected, "no")
				}
				return nil
			}
			policies = append(policies, p)
		}
		call, err := New([]*Backend{triton(t)}, policies...).Begin(t.Context(), CallInfo{FullMethod: modelInfer})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := call.Request(rawEnvelope(t, ask("m", "1", "a prompt"))); err != nil {
			t.Fatal(err)
		}
		_, _, err = call.Response(rawEnvelope(t, answer("1", "a word")))
		call.End(err)
		want := []string{"c response 1", "a response 1"}
		var d *Denial
		switch {
		case refusing == "c":
			want = want[:1]
			fallthrough
		case refusing != "":
			if !errors.As(err, &d) || d.Policy != refusing {
				t.Errorf("%s refuses: got %v", refusing, err)
			}
		case err != nil:
			t.Error(err)
		}
		if got := j.those("a response", "b response", "c response", "d response"); !slices.Equal(got, want) {
			t.Errorf("%q refuses: got %v, want %v", refusing, got, want)
		}
		checkUnwound(t, j.all())
	}
}
