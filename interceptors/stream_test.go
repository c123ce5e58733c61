package interceptors

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/sluicegate/sluice/interceptors/dialect"
	"github.com/sluicegate/sluice/interceptors/fields"
	"github.com/sluicegate/sluice/proto/gen/inference"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
)

func TestIdsOnAStreamAreTheCallersAgainOnTheWayBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var ids []string
		conn := guarded(t, New([]*Backend{triton(t)}), &model{stream: func(ss grpc.ServerStream) error {
			for range 5 {
				ids = append(ids, take(t, ss).Id)
			}
			for _, id := range slices.Backward(ids) {
				if err := ss.SendMsg(chunk(id, true, "to "+id)); err != nil {
					return err
				}
			}
			return nil
		}})
		s := open(t, conn, modelStreamInfer, bidi)
		for _, id := range []string{"", "dup", "", "dup", "sluice-1"} {
			s.send(ask("m", id, "x"))
		}
		// In reverse, each with the caller's own id.
		s.expect("!sluice-1 to sluice-4", "!dup to sluice-3", "! to sluice-2", "!dup to dup", "! to sluice-1", "EOF")
		seen := make(map[string]bool)
		for _, id := range ids {
			if id == "" || seen[id] {
				t.Errorf("the model server saw %q twice, or empty: %v", id, ids)
			}
			seen[id] = true
		}
	})
}

func TestAnAbsentIdStaysAbsent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		conn := guarded(t, New([]*Backend{triton(t)}), &model{stream: func(ss grpc.ServerStream) error {
			return ss.SendMsg(chunk(take(t, ss).Id, true, "x"))
		}})
		s := open(t, conn, modelStreamInfer, bidi)
		s.send(ask("m", "", "x"))
		got := new(inference.ModelStreamInferResponse)
		if err := s.RecvMsg(got); err != nil || !proto.Equal(got, chunk("", true, "x")) {
			t.Errorf("got %v, %v", got, err)
		}
	})
}

func TestAnIdIsFreeAgainAfterTheEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		conn := guarded(t, New([]*Backend{triton(t)}), &model{stream: func(ss grpc.ServerStream) error {
			for range 2 {
				id := take(t, ss).Id
				for _, last := range []bool{false, true} {
					if err := ss.SendMsg(chunk(id, last, "x")); err != nil {
						return err
					}
				}
			}
			return nil
		}})
		s := open(t, conn, modelStreamInfer, bidi)
		for range 2 {
			s.send(ask("m", "a", "x"))
			s.expect("a x", "!a x")
		}
		s.expect("EOF")
	})
}

// The gateway sends the bytes on: they must not even hold an empty id.
func TestAnIdThatWasAbsentIsNotOnTheWire(t *testing.T) {
	call, err := New([]*Backend{triton(t)}).Begin(context.Background(), CallInfo{FullMethod: modelStreamInfer})
	if err != nil {
		t.Fatal(err)
	}
	defer call.End(nil)
	i, err := call.Request(rawEnvelope(t, ask("m", "", "x")))
	if err != nil {
		t.Fatal(err)
	}
	e := rawEnvelope(t, chunk(i.key, true, "x"))
	if _, v, err := call.Response(e); err != nil || v != Deliver {
		t.Fatal(v, err)
	}
	want, err := proto.MarshalOptions{Deterministic: true}.Marshal(chunk("", true, "x"))
	if err != nil {
		t.Fatal(err)
	}
	if got := e.Encode().Materialize(); !bytes.Equal(got, want) {
		t.Errorf("got %x, want %x", got, want)
	}
}

func TestErrorsInBandKeepTheirInferenceAndTheStreamGoesOn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		j := new(journal)
		fail := func(id string, p map[string]*inference.InferParameter) proto.Message {
			return &inference.ModelStreamInferResponse{ErrorMessage: "broken", InferResponse: &inference.ModelInferResponse{Id: id, Parameters: p}}
		}
		conn := guarded(t, New([]*Backend{triton(t)}, &scripted{name: "p", journal: j}), &model{stream: func(ss grpc.ServerStream) error {
			a, b, c := take(t, ss).Id, take(t, ss).Id, take(t, ss).Id
			for _, m := range []proto.Message{
				fail(c, nil), // no model answered: no flag
				chunk(b, false, "word"),
				fail(b, map[string]*inference.InferParameter{"triton_final_response": boolean(false)}), chunk(b, true),
				chunk(a, true, "fine"),
			} {
				if err := ss.SendMsg(m); err != nil {
					return err
				}
			}
			return nil
		}})
		s := open(t, conn, modelStreamInfer, bidi)
		s.send(ask("m", "a", "x"))
		s.send(ask("m", "b", "x"))
		s.send(ask("m", "", "x"))
		s.expect(" ERROR broken", "b word", "b ERROR broken", "!a fine", "EOF")
		if got, want := j.those("p end"), []string{"p end  error", "p end b error", "p end a ok"}; !slices.Equal(got, want) {
			t.Errorf("got %v, want %v", got, want)
		}
	})
}

func TestOneInferenceIsRefusedInBandWhileOthersGoOn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		j := new(journal)
		refuse := &scripted{name: "r", journal: j, request: func(i *Inference, _ *fields.Message) error {
			if i.ID == "bad" {
				d := Deny("r", QueueFull, "not now")
				d.RetryAfter = 1500 * time.Millisecond
				return d
			}
			return nil
		}}
		conn := guarded(t, New([]*Backend{triton(t, "m")}, refuse), &model{stream: words})
		s := open(t, conn, modelStreamInfer, bidi)
		s.send(ask("m", "a", "one"))
		s.expect("a one")
		s.send(ask("m", "bad", "two"))
		got := new(inference.ModelStreamInferResponse)
		if err := s.RecvMsg(got); err != nil {
			t.Fatal(err)
		}
		text := func(s string) *inference.InferParameter {
			return &inference.InferParameter{ParameterChoice: &inference.InferParameter_StringParam{StringParam: s}}
		}
		want := &inference.ModelStreamInferResponse{ErrorMessage: "QUEUE_FULL: not now", InferResponse: &inference.ModelInferResponse{
			ModelName: "m", Id: "bad", Parameters: map[string]*inference.InferParameter{
				"triton_final_response": boolean(true), "sluice_code": text("RESOURCE_EXHAUSTED"), "sluice_reason": text("QUEUE_FULL"),
				"sluice_retry_after_ms": {ParameterChoice: &inference.InferParameter_Int64Param{Int64Param: 1500}}}}}
		if !proto.Equal(got, want) {
			t.Errorf("got %v, want %v", got, want)
		}
		s.send(ask("other", "lost", "two"))
		s.expect("!lost ERROR MODEL_DENIED: ...")
		s.send(ask("m", "b", "three"))
		s.halfClose()
		s.expect("b three", "EOF")
		checkUnwound(t, j.all())
	})
}

func TestATritonStreamEndsWithTheStatusIfTheCallerAsksForThat(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		conn := guarded(t, New([]*Backend{triton(t, "m")}), &model{stream: words})
		ctx, cancel := context.WithCancel(metadata.AppendToOutgoingContext(t.Context(), "triton_grpc_error", "true"))
		s := openWith(t, ctx, cancel, conn, modelStreamInfer, bidi)
		s.send(ask("m", "a", "one"))
		s.expect("a one")
		s.send(ask("other", "b", "two"))
		_, err := s.receive()
		codeIs(t, err, codes.PermissionDenied, ModelDenied)
		if len(status.Convert(err).Details()) == 0 {
			t.Error("the status has no details")
		}
	})
}

// Clients take two pushbacks for none.
func TestTheStatusOfARefusedStreamHasOnePushback(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := &scripted{name: "p", journal: new(journal), start: func(*Inference) error {
			d := Deny("p", QueueFull, "x")
			d.RetryAfter = time.Second
			return d
		}}
		conn := guarded(t, New([]*Backend{backend(t, "ml", dialect.MLServer)}, p), &model{stream: words})
		s := open(t, conn, modelStreamInfer, bidi)
		s.send(ask("m", "a", "one"))
		_, err := s.receive()
		codeIs(t, err, codes.ResourceExhausted, QueueFull)
		if got := s.Trailer().Get("grpc-retry-pushback-ms"); !slices.Equal(got, []string{"1000"}) {
			t.Errorf("pushback %v", got)
		}
	})
}

func TestNothingIsDeliveredAfterAnAbort(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := &scripted{name: "p", journal: new(journal), begin: func(c *Call) error {
			c.AbortAfter(time.Minute, func() error { return Deny("p", Draining, "over") })
			return nil
		}}
		conn := guarded(t, New([]*Backend{triton(t)}, p), &model{stream: func(ss grpc.ServerStream) error {
			id := take(t, ss).Id
			for n := range 20 { // whatever becomes of it
				_ = ss.SendMsg(chunk(id, false, "w"))
				if n == 1 {
					time.Sleep(2 * time.Minute)
				}
			}
			return nil
		}})
		s := open(t, conn, modelStreamInfer, bidi)
		s.send(ask("m", "a", "one"))
		s.expect("a w", "a w")
		_, err := s.receive()
		codeIs(t, err, codes.Unavailable, Draining)
	})
}

func TestTheEndThatTritonHidesIsSeenByUsAndByWhoAskedForIt(t *testing.T) {
	for _, asked := range []bool{false, true} {
		t.Run(fmt.Sprint("asked ", asked), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				j := new(journal)
				conn := guarded(t, New([]*Backend{triton(t)}, &scripted{name: "p", journal: j}), &model{stream: words})
				s := open(t, conn, modelStreamInfer, bidi)
				r := ask("m", "a", "one")
				if asked {
					r.Parameters = map[string]*inference.InferParameter{"triton_enable_empty_final_response": boolean(true)}
				}
				s.send(r)
				s.expect("a one")
				if asked {
					s.expect("!a end")
				}
				synctest.Wait()
				if got := j.those("p end"); !slices.Equal(got, []string{"p end a ok"}) {
					t.Errorf("before the stream ended: %v", got)
				}
				s.halfClose()
				s.expect("EOF")
			})
		})
	}
}

// pools is a policy whose inferences wait until their model's pool has room.
type pools struct {
	*scripted
	room map[string]chan struct{}
}

// newPools makes pools of one permit a model.
func newPools(j *journal, models ...string) *pools {
	p := &pools{&scripted{name: "pool", journal: j}, make(map[string]chan struct{})}
	for _, m := range models {
		p.room[m] = make(chan struct{}, 1)
	}
	p.wait = func(ctx context.Context, i *Inference) error {
		select {
		case p.room[i.Model] <- struct{}{}:
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return p
}

func (p *pools) fill(model string)  { p.room[model] <- struct{}{} }
func (p *pools) drain(model string) { <-p.room[model] }

// releases gives permits back as inferences that waited for them end.
func (p *pools) releases() *pools {
	held := make(map[*Inference]bool)
	wait := p.wait
	p.wait = func(ctx context.Context, i *Inference) error {
		err := wait(ctx, i)
		if err == nil {
			p.mu.Lock()
			held[i] = true
			p.mu.Unlock()
		}
		return err
	}
	p.end = func(i *Inference) {
		p.mu.Lock()
		h := held[i]
		delete(held, i)
		p.mu.Unlock()
		if h {
			<-p.room[i.Model]
		}
	}
	return p
}

func TestAnInferenceForABusyPoolWaitsWhileAnotherCompletes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPools(new(journal), "a", "b")
		p.fill("a")
		conn := guarded(t, New([]*Backend{triton(t)}, p), &model{stream: words})
		s := open(t, conn, modelStreamInfer, bidi)
		s.send(ask("a", "1", "waits"))
		s.send(ask("b", "2", "goes on"))
		s.expect("2 goes", "2 on")
		p.drain("a")
		s.halfClose()
		s.expect("1 waits", "EOF")
	})
}

func TestTwoStreamsWithCrossedPoolsFinish(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		j := new(journal)
		p := newPools(j, "a", "b").releases()
		conn := guarded(t, New([]*Backend{triton(t)}, p), &model{stream: words})
		x, y := open(t, conn, modelStreamInfer, bidi), open(t, conn, modelStreamInfer, bidi)
		const n = 2 * maxParked
		for k := range n {
			x.send(ask([]string{"a", "b"}[k/(n/2)], fmt.Sprint("x", k), "w"))
			y.send(ask([]string{"b", "a"}[k/(n/2)], fmt.Sprint("y", k), "w"))
		}
		x.halfClose()
		y.halfClose()
		for _, s := range []*talk{x, y} {
			got := 0
			for ; ; got++ {
				if _, err := s.receive(); errors.Is(err, io.EOF) {
					break
				} else if err != nil {
					t.Fatal(err)
				}
			}
			if got != n {
				t.Errorf("%d answers, want %d", got, n)
			}
		}
		checkBalanced(t, j)
	})
}

// stack is pools that give permits to who came last, whether it waits already
// or not: an inference may hold one before it asks, and before others of its
// stream that came earlier.
type stack struct {
	*scripted
	free  map[string]int
	queue map[string][]*place
}

type place struct {
	scriptedInference
	p       *stack
	granted chan struct{}
	held    bool
}

func (p *stack) Begin(*Call) (CallPolicy, error) { return &stackCall{p}, nil }

type stackCall struct{ *stack }

func (p *stackCall) End(Outcome) {}

func (p *stackCall) Start(i *Inference) (InferencePolicy, error) {
	x := &place{scriptedInference{scripted: p.scripted, i: i}, p.stack, make(chan struct{}), false}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.queue[i.Model] = append(p.queue[i.Model], x)
	p.pass(i.Model)
	return x, nil
}

func (p *stack) pass(model string) {
	for p.free[model] > 0 && len(p.queue[model]) > 0 {
		last := len(p.queue[model]) - 1
		x := p.queue[model][last]
		p.queue[model] = p.queue[model][:last]
		p.free[model]--
		x.held = true
		close(x.granted)
	}
}

func (x *place) Ready() bool {
	select {
	case <-x.granted:
		return true
	default:
		return false
	}
}

func (x *place) Wait(ctx context.Context) error {
	select {
	case <-x.granted:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (x *place) End(Outcome) {
	x.p.mu.Lock()
	defer x.p.mu.Unlock()
	m := x.i.Model
	if x.held {
		x.p.free[m]++
	} else if n := slices.Index(x.p.queue[m], x); n >= 0 {
		x.p.queue[m] = slices.Delete(x.p.queue[m], n, n+1)
	}
	x.p.pass(m)
}

// Each stream has parked all it may for one pool, and next comes an inference
// for the other. Were that one given a permit and held back, each stream would
// wait for the other for ever.
func TestAStreamThatParkedAllItMayHoldsNoPermitBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := &stack{&scripted{name: "stack", journal: new(journal)}, map[string]int{}, map[string][]*place{}}
		conn := guarded(t, New([]*Backend{triton(t)}, p), &model{stream: words})
		x, y := open(t, conn, modelStreamInfer, bidi), open(t, conn, modelStreamInfer, bidi)
		for k := range maxParked {
			x.send(ask("a", fmt.Sprint("x", k), "w"))
			y.send(ask("b", fmt.Sprint("y", k), "w"))
		}
		synctest.Wait()
		x.send(ask("b", "x-last", "w"))
		y.send(ask("a", "y-last", "w"))
		synctest.Wait()
		p.mu.Lock()
		p.free["a"], p.free["b"] = 1, 1
		p.pass("a")
		p.pass("b")
		p.mu.Unlock()
		x.halfClose()
		y.halfClose()
		for _, s := range []*talk{x, y} {
			for range maxParked + 1 {
				if _, err := s.receive(); err != nil {
					t.Fatal(err)
				}
			}
			s.expect("EOF")
		}
	})
}

func TestOrderIsKeptWithinASequence(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		sequence := func(name, id string) *inference.ModelInferRequest {
			r := ask("m", id, id)
			r.Parameters = map[string]*inference.InferParameter{"sequence_id": {ParameterChoice: &inference.InferParameter_StringParam{StringParam: name}}}
			return r
		}
		gates := map[string]chan struct{}{"s1": make(chan struct{}), "s2": make(chan struct{}), "s3": make(chan struct{})}
		p := &scripted{name: "p", journal: new(journal), wait: func(_ context.Context, i *Inference) error { <-gates[i.ID]; return nil }}
		conn := guarded(t, New([]*Backend{triton(t)}, p), &model{stream: words})
		s := open(t, conn, modelStreamInfer, bidi)
		s.send(sequence("one", "s1"))
		s.send(sequence("one", "s2"))
		s.send(sequence("two", "s3"))
		synctest.Wait()
		close(gates["s2"]) // could go on, but for its turn
		synctest.Wait()
		close(gates["s3"])
		s.expect("s3 s3")
		close(gates["s1"])
		s.halfClose()
		s.expect("s1 s1", "s2 s2", "EOF")
	})
}

func TestARefusedOneLetsTheNextOfItsSequencePass(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		gate := make(chan struct{})
		p := &scripted{name: "p", journal: new(journal), wait: func(_ context.Context, i *Inference) error {
			if i.ID == "s1" {
				<-gate
				return Deny("p", QueueTimeout, "late")
			}
			return nil
		}}
		conn := guarded(t, New([]*Backend{triton(t)}, p), &model{stream: words})
		s := open(t, conn, modelStreamInfer, bidi)
		for _, id := range []string{"s1", "s2"} {
			r := ask("m", id, id)
			r.Parameters = map[string]*inference.InferParameter{"sequence_id": {ParameterChoice: &inference.InferParameter_Int64Param{Int64Param: 7}}}
			s.send(r)
		}
		synctest.Wait()
		close(gate)
		s.halfClose()
		s.expect("!s1 ERROR QUEUE_TIMEOUT: late", "s2 s2", "EOF")
	})
}

func TestWhatAStreamParksIsBounded(t *testing.T) {
	big := strings.Repeat("x", maxParkedBytes/4)
	for _, c := range []struct {
		name   string
		text   string
		parked int
	}{
		{"in number", "w", maxParked},
		{"in bytes", big, 4},
		{"in bytes, for one that is larger than all", strings.Repeat("x", 2*maxParkedBytes), 1},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				j := new(journal)
				p := newPools(j, "a").releases()
				p.fill("a")
				conn := guarded(t, New([]*Backend{triton(t)}, p), &model{stream: words})
				s := open(t, conn, modelStreamInfer, bidi)
				const n = 2 * maxParked
				go func() {
					for k := range n {
						if s.SendMsg(ask("a", fmt.Sprint(k), c.text)) != nil {
							return
						}
					}
					_ = s.CloseSend()
				}()
				synctest.Wait()
				if got := len(j.those("pool started")); got != c.parked {
					t.Errorf("%d inferences are parked, want %d", got, c.parked)
				}
				p.drain("a")
				for range n {
					if _, err := s.receive(); err != nil {
						t.Fatal(err)
					}
				}
				s.expect("EOF")
				checkUnwound(t, j.all())
			})
		})
	}
}

func TestACancelIsSeenWhileWaiting(t *testing.T) {
	for _, n := range []int{1, maxParked, 2 * maxParked} { // one parked, as many as may be, and more behind
		t.Run(fmt.Sprint(n), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				j := new(journal)
				p := newPools(j, "a")
				p.fill("a")
				returned := false
				conn := guarded(t, New([]*Backend{triton(t)}, p), &model{stream: func(ss grpc.ServerStream) error {
					defer func() { returned = true }()
					return words(ss)
				}})
				s := open(t, conn, modelStreamInfer, bidi)
				for k := range n {
					s.send(ask("a", fmt.Sprint(k), "w"))
				}
				synctest.Wait()
				s.cancel()
				synctest.Wait()
				if !returned {
					t.Error("the handler still waits")
				}
				checkUnwound(t, j.all())
			})
		})
	}
}

func TestAHalfCloseIsSeenWhileWaiting(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPools(new(journal), "a")
		p.fill("a")
		var closed atomic.Bool
		conn := guarded(t, New([]*Backend{triton(t)}, p), &model{stream: func(ss grpc.ServerStream) error {
			defer closed.Store(true)
			return words(ss)
		}})
		s := open(t, conn, modelStreamInfer, bidi)
		s.send(ask("a", "1", "w"))
		s.halfClose()
		synctest.Wait()
		if closed.Load() {
			t.Error("the handler was told of the end before what waits was forwarded")
		}
		p.drain("a")
		s.expect("1 w", "EOF")
	})
}

// cutAfter refuses the n-th response of the inference "cut".
func cutAfter(n int, j *journal) *scripted {
	seen := 0
	return &scripted{name: "c", journal: j, response: func(i *Inference, _ *fields.Message) error {
		if i.ID == "cut" {
			if seen++; seen == n {
				return Deny("c", BudgetCut, "gone")
			}
		}
		return nil
	}}
}

func TestAfterACutNothingOfTheInferenceIsDelivered(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		j := new(journal)
		conn := guarded(t, New([]*Backend{triton(t)}, cutAfter(2, j)), &model{stream: words})
		s := open(t, conn, modelStreamInfer, bidi)
		s.send(ask("m", "cut", "one two three four"))
		s.expect("cut one", "!cut ERROR BUDGET_CUT: gone")
		synctest.Wait()
		if got := j.those("c end"); !slices.Equal(got, []string{"c end cut BUDGET_CUT"}) {
			t.Errorf("at the final response: %v", got)
		}
		s.send(ask("m", "b", "still alive"))
		s.send(ask("m", "cut", "")) // its id is free again
		s.halfClose()
		s.expect("b still", "b alive", "EOF")
		if got := j.those("c response cut"); len(got) != 3 { // one, two, and the end of the second
			t.Errorf("the policies saw %v", got)
		}
	})
}

func TestAStreamWhoseLastInferenceWasCutEndsWellAndFreesTheModel(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		j := new(journal)
		var cause error
		conn := guarded(t, New([]*Backend{triton(t)}, cutAfter(2, j)), &model{stream: func(ss grpc.ServerStream) error {
			take(t, ss)
			for {
				if err := ss.SendMsg(chunk("cut", false, "w")); err != nil {
					cause = err
					return err
				}
				select {
				case <-time.After(time.Second):
				case <-ss.Context().Done():
					cause = ss.Context().Err()
					return cause
				}
			}
		}})
		s := open(t, conn, modelStreamInfer, bidi)
		s.send(ask("m", "cut", "x"))
		s.halfClose()
		s.expect("cut w", "!cut ERROR BUDGET_CUT: gone", "EOF")
		synctest.Wait()
		if !errors.Is(cause, context.Canceled) {
			t.Errorf("the handler ended with %v", cause)
		}
		if got := j.those("c end", "c call-end"); !slices.Equal(got, []string{"c end cut BUDGET_CUT", "c call-end ok"}) {
			t.Errorf("got %v", got)
		}
	})
}

func TestAnAnswerThatNobodyAskedForEndsTheStream(t *testing.T) {
	for _, first := range []bool{false, true} { // before any request, and after one
		synctest.Test(t, func(t *testing.T) {
			conn := guarded(t, New([]*Backend{triton(t)}), &model{stream: func(ss grpc.ServerStream) error {
				if !first {
					take(t, ss)
				}
				return ss.SendMsg(chunk("nobody", false, "x"))
			}})
			s := open(t, conn, modelStreamInfer, bidi)
			if !first {
				s.send(ask("m", "a", "x"))
			}
			_, err := s.receive()
			codeIs(t, err, codes.Internal, UpstreamInvalid)
		})
	}
}

func TestTheMLServerStreamIsOneInference(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		j := new(journal)
		conn := guarded(t, New([]*Backend{backend(t, "ml", dialect.MLServer)}, &scripted{name: "p", journal: j}), &model{stream: func(ss grpc.ServerStream) error {
			for {
				m := new(inference.ModelInferRequest)
				if err := ss.RecvMsg(m); errors.Is(err, io.EOF) {
					return nil
				} else if err != nil {
					return err
				}
				if err := ss.SendMsg(answer(m.Id, "w")); err != nil {
					return err
				}
			}
		}})
		s := open(t, conn, modelStreamInfer, bidi)
		for _, id := range []string{"a", "b"} {
			s.send(ask("m", id, "x"))
			got := new(inference.ModelInferResponse)
			if err := s.RecvMsg(got); err != nil || !proto.Equal(got, answer(id, "w")) {
				t.Fatalf("got %v, %v", got, err)
			}
		}
		if got := j.those("p start ", "p request"); !slices.Equal(got, []string{"p start a", "p request a", "p request a"}) {
			t.Errorf("got %v", got)
		}
		s.send(ask("other", "c", "x"))
		err := s.RecvMsg(new(inference.ModelInferResponse))
		codeIs(t, err, codes.InvalidArgument, MessageAmbiguous)
		synctest.Wait()
		checkUnwound(t, j.all())
	})
}

func TestServerStreaming(t *testing.T) {
	one := &grpc.StreamDesc{ServerStreams: true}
	tell := &model{stream: func(ss grpc.ServerStream) error {
		m := new(inference.ModelInferRequest)
		if err := ss.RecvMsg(m); err != nil {
			return nil // what a handler makes of a refusal does not count
		}
		for _, w := range strings.Fields(string(m.Inputs[0].Contents.BytesContents[0])) {
			if err := ss.SendMsg(answer(m.Id, w)); err != nil {
				return err
			}
		}
		return nil
	}}
	for _, c := range []struct {
		name   string
		policy *scripted
		words  int
		code   codes.Code
		reason Reason
	}{
		{"passes", &scripted{}, 3, codes.OK, ""},
		{"refused at the request", &scripted{request: func(*Inference, *fields.Message) error { return Deny("p", PromptRejected, "no") }}, 0, codes.PermissionDenied, PromptRejected},
		{"cut", func() *scripted {
			n := 0
			return &scripted{response: func(*Inference, *fields.Message) error {
				if n++; n == 3 {
					return Deny("p", BudgetCut, "gone")
				}
				return nil
			}}
		}(), 2, codes.ResourceExhausted, BudgetCut},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				c.policy.name, c.policy.journal = "p", new(journal)
				conn := guarded(t, New([]*Backend{oracle(t)}, c.policy), tell)
				s := open(t, conn, serverStream1, one)
				s.send(ask("m", "a", "one two three"))
				s.halfClose()
				n := 0
				for ; ; n++ {
					err := s.RecvMsg(new(inference.ModelInferResponse))
					if err == nil {
						continue
					}
					if errors.Is(err, io.EOF) {
						err = nil
					}
					codeIs(t, err, c.code, c.reason)
					break
				}
				if n != c.words {
					t.Errorf("%d words, want %d", n, c.words)
				}
				synctest.Wait()
				checkUnwound(t, c.policy.all())
			})
		})
	}
}

func TestClientStreaming(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		j := new(journal)
		conn := guarded(t, New([]*Backend{oracle(t)}, &scripted{name: "p", journal: j}), &model{stream: func(ss grpc.ServerStream) error {
			for n := 0; ; n++ {
				if err := ss.RecvMsg(new(inference.ModelInferRequest)); errors.Is(err, io.EOF) {
					return ss.SendMsg(answer("")) // nothing in it, and yet the answer
				} else if err != nil {
					return err
				}
			}
		}})
		s := open(t, conn, clientStream1, &grpc.StreamDesc{ClientStreams: true})
		s.send(ask("m", "a", "x"))
		s.send(ask("m", "a", "y"))
		s.halfClose()
		if err := s.RecvMsg(new(inference.ModelInferResponse)); err != nil {
			t.Errorf("got %v", err)
		}
		synctest.Wait()
		if got := j.those("p request", "p end"); !slices.Equal(got, []string{"p request a", "p request a", "p end a ok"}) {
			t.Errorf("got %v", got)
		}
	})
}

func TestAHandlerThatReturnsEarlyLeavesNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		j := new(journal)
		p := newPools(j, "busy", "m")
		p.fill("busy")
		conn := guarded(t, New([]*Backend{triton(t)}, p), &model{stream: func(ss grpc.ServerStream) error {
			take(t, ss)
			return status.Error(codes.DataLoss, "enough")
		}})
		s := open(t, conn, modelStreamInfer, bidi)
		s.send(ask("busy", "1", "x"))
		s.send(ask("m", "2", "x"))
		s.send(ask("m", "3", "x")) // nobody takes it
		_, err := s.receive()
		codeIs(t, err, codes.DataLoss, "")
		synctest.Wait()
		checkUnwound(t, j.all())
	})
}

func TestACallerThatDoesNotReadHoldsNothingButItself(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		j := new(journal)
		conn := guarded(t, New([]*Backend{triton(t, "m")}, &scripted{name: "p", journal: j}), &model{stream: words})
		s := open(t, conn, modelStreamInfer, bidi)
		s.send(ask("m", "a", strings.Repeat("word ", 1<<14)))
		go func() { // until flow control stops it: refusals that nobody reads
			for s.SendMsg(ask("nobody's", strings.Repeat("x", 4096), "x")) == nil {
			}
		}()
		synctest.Wait()
		s.cancel()
		synctest.Wait()
		checkUnwound(t, j.all())
	})
}

func TestAPanicInTheChainItselfEndsTheCallOnly(t *testing.T) {
	// What is appended cannot be decoded: the edit fails when the message goes on.
	spoil := func(_ *Inference, m *fields.Message) error {
		m.Append([]byte{0xff})
		return nil
	}
	t.Run("request", func(t *testing.T) { panicsInTheChain(t, &scripted{request: spoil}) })
	t.Run("response", func(t *testing.T) { panicsInTheChain(t, &scripted{response: spoil}) })
}

func panicsInTheChain(t *testing.T, p *scripted) {
	synctest.Test(t, func(t *testing.T) {
		p.name, p.journal = "p", new(journal)
		conn := guarded(t, New([]*Backend{triton(t)}, p), &model{stream: words, unary: func(context.Context, *inference.ModelInferRequest) (*inference.ModelInferResponse, error) {
			return answer("a"), nil
		}})
		s := open(t, conn, modelStreamInfer, bidi)
		s.send(ask("m", "a", "x"))
		_, err := s.receive()
		codeIs(t, err, codes.Internal, Internal)
		err = conn.Invoke(t.Context(), modelInfer, ask("m", "a", "x"), new(inference.ModelInferResponse))
		codeIs(t, err, codes.Internal, Internal)
		synctest.Wait()
		checkBalanced(t, p.journal)
	})
}

func TestEditsDoNotReachWhatTheHandlerUsesAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := &scripted{name: "p", journal: new(journal), response: func(_ *Inference, m *fields.Message) error {
			for k := range m.Fields {
				if f := &m.Fields[k]; f.Role == fields.Output {
					m.Set(f, []byte("[redacted]"))
				}
			}
			return nil
		}}
		mine := chunk("", false, "card number")
		conn := guarded(t, New([]*Backend{triton(t)}, p), &model{stream: func(ss grpc.ServerStream) error {
			mine.InferResponse.Id = take(t, ss).Id
			want := proto.CloneOf(mine)
			for range 3 {
				if err := ss.SendMsg(mine); err != nil {
					return err
				}
			}
			if !proto.Equal(mine, want) {
				t.Error("the handler's message was changed")
			}
			return nil
		}})
		s := open(t, conn, modelStreamInfer, bidi)
		s.send(ask("m", "", "x"))
		s.expect(" [redacted]", " [redacted]", " [redacted]", "EOF")
	})
}
