package interceptors

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"
	"testing/synctest"

	"github.com/sluicegate/sluice/interceptors/fields"
	"github.com/sluicegate/sluice/proto/gen/inference"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
)

// inFlight is the inference in flight that the caller calls by this id.
func inFlight(t *testing.T, c *Chain, id string) *Inference {
	t.Helper()
	var found *Inference
	c.live.Each(func(call *Call) {
		_, open := call.Open()
		for _, i := range open {
			if i.ID == id {
				found = i
			}
		}
	})
	if found == nil {
		t.Fatalf("no inference %q is in flight", id)
	}
	return found
}

func lost(id string) *Denial { return NoModel("test", "m").With("id", id) }

func TestACutIsToldAtOnceAndTheOthersGoOn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		j := new(journal)
		on := make(chan struct{})
		c := New([]*Backend{triton(t)}, &scripted{name: "p", journal: j})
		conn := guarded(t, c, &model{stream: func(ss grpc.ServerStream) error {
			a, b := take(t, ss).Id, take(t, ss).Id
			<-on
			for _, r := range []*inference.ModelStreamInferResponse{
				chunk(a, false, "1"), chunk(b, false, "2"), chunk(a, true, "3"), chunk(b, true, "4")} {
				if err := ss.SendMsg(r); err != nil {
					return err
				}
			}
			return nil
		}})
		s := open(t, conn, modelStreamInfer, bidi)
		s.send(ask("m", "a", "x"))
		s.send(ask("m", "b", "x"))
		synctest.Wait()
		cut := inFlight(t, c, "a")
		cut.Cut(lost("a"))
		cut.Cut(lost("again"))
		s.expect("!a ERROR MODEL_DENIED: ...") // the model server says nothing
		if ends := j.those("p end"); len(ends) != 0 {
			t.Errorf("%v while the model server is at work", ends)
		}
		close(on)
		s.expect("b 2", "!b 4", "EOF")
		cut.Cut(lost("late"))
		synctest.Wait()
		if ends := j.those("p end"); len(ends) != 2 || !strings.Contains(strings.Join(ends, ","), "MODEL_DENIED") {
			t.Errorf("%v, want two ends, one of them MODEL_DENIED", ends)
		}
	})
}

func TestACutOfTheLastEndsTheStreamWell(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := New([]*Backend{triton(t)})
		var cause error
		conn := guarded(t, c, &model{stream: func(ss grpc.ServerStream) error {
			take(t, ss)
			<-ss.Context().Done()
			cause = ss.Context().Err()
			return cause
		}})
		s := open(t, conn, modelStreamInfer, bidi)
		s.send(ask("m", "a", "x"))
		s.halfClose()
		synctest.Wait()
		inFlight(t, c, "a").Cut(lost("a"))
		s.expect("!a ERROR MODEL_DENIED: ...", "EOF")
		if cause == nil {
			t.Error("the model server was not told")
		}
	})
}

// Who waits for a permit, or for its turn, gives its place up.
func TestACutOfOneThatWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		j := new(journal)
		ended := make(chan struct{})
		c := New([]*Backend{triton(t)}, &scripted{name: "p", journal: j,
			wait: func(ctx context.Context, i *Inference) error {
				if i.ID != "a" {
					return nil
				}
				select {
				case <-ended:
					return Deny("p", Draining, "the inference ended while it waited")
				case <-ctx.Done():
					return ctx.Err()
				}
			},
			end: func(i *Inference) {
				if i.ID == "a" {
					close(ended)
				}
			}})
		conn := guarded(t, c, &model{stream: words})
		s := open(t, conn, modelStreamInfer, bidi)
		s.send(ask("m", "a", "x"))
		s.send(ask("m", "b", "y"))
		s.expect("b y")
		synctest.Wait()
		inFlight(t, c, "a").Cut(lost("a"))
		s.expect("!a ERROR MODEL_DENIED: ...")
		s.send(ask("m", "c", "z"))
		s.expect("c z")
		s.halfClose()
		s.expect("EOF") // and a was told once, and not forwarded
	})
}

func TestACutWhereNothingCanBeSaidInBand(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := New([]*Backend{triton(t)})
		waits := func(ctx context.Context) error {
			<-ctx.Done()
			return ctx.Err()
		}
		conn := guarded(t, c, &model{
			stream: func(ss grpc.ServerStream) error {
				take(t, ss)
				return waits(ss.Context())
			},
			unary: func(ctx context.Context, _ *inference.ModelInferRequest) (*inference.ModelInferResponse, error) {
				return nil, waits(ctx)
			}})
		denied := func(what string, err error) {
			t.Helper()
			if status.Code(err) != codes.PermissionDenied || !strings.Contains(err.Error(), "MODEL_DENIED") {
				t.Errorf("%s ended with %v", what, err)
			}
		}

		ctx, cancel := context.WithCancel(metadata.AppendToOutgoingContext(t.Context(), "triton_grpc_error", "true"))
		defer cancel()
		s := openWith(t, ctx, cancel, conn, modelStreamInfer, bidi)
		s.send(ask("m", "a", "x"))
		synctest.Wait()
		inFlight(t, c, "a").Cut(lost("a"))
		_, err := s.receive()
		denied("a stream that wants statuses", err)

		unary := make(chan error, 1)
		go func() {
			unary <- conn.Invoke(t.Context(), modelInfer, ask("m", "a", "x"), new(inference.ModelInferResponse))
		}()
		synctest.Wait()
		inFlight(t, c, "a").Cut(lost("a"))
		denied("a unary call", <-unary)
	})
}

func TestACutOfAServerStream(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := &scripted{name: "p", journal: new(journal)}
		c := New([]*Backend{oracle(t)}, p)
		conn := guarded(t, c, &model{stream: func(ss grpc.ServerStream) error {
			m := take(t, ss)
			if err := ss.SendMsg(answer(m.Id, "one")); err != nil {
				return err
			}
			<-ss.Context().Done()
			return ss.Context().Err()
		}})
		s := open(t, conn, serverStream1, &grpc.StreamDesc{ServerStreams: true})
		s.send(ask("m", "a", "x"))
		s.halfClose()
		if err := s.RecvMsg(new(inference.ModelInferResponse)); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		inFlight(t, c, "a").Cut(lost("a"))
		codeIs(t, s.RecvMsg(new(inference.ModelInferResponse)), codes.PermissionDenied, ModelDenied)
		synctest.Wait()
		checkUnwound(t, p.all())
	})
}

// Cuts come at any moment. Each inference is told once, and nothing of it
// follows.
func TestCutsAtAnyMoment(t *testing.T) {
	const inferences = 200
	c := New([]*Backend{triton(t)}, &scripted{name: "p", journal: new(journal), response: func(*Inference, *fields.Message) error { return nil }})
	conn := guarded(t, c, &model{stream: words})
	s := open(t, conn, modelStreamInfer, bidi)
	stop, stopped := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(stopped)
		for n := 0; ; n++ {
			select {
			case <-stop:
				return
			default:
			}
			c.live.Each(func(call *Call) {
				if _, open := call.Open(); len(open) > 0 {
					open[n%len(open)].Cut(lost(open[n%len(open)].ID))
				}
			})
		}
	}()
	go func() {
		for n := range inferences {
			r := ask("m", fmt.Sprint(n), strings.Repeat("x ", 20))
			r.Parameters = map[string]*inference.InferParameter{"triton_enable_empty_final_response": boolean(true)}
			if s.SendMsg(r) != nil {
				return
			}
		}
		_ = s.CloseSend()
	}()
	over := make(map[string]bool)
	for {
		got, err := s.receive()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		final := strings.HasPrefix(got, "!")
		id, _, _ := strings.Cut(strings.TrimPrefix(got, "!"), " ")
		if over[id] {
			t.Fatalf("%q after the end of %s", got, id)
		}
		if final {
			over[id] = true
		}
	}
	close(stop)
	<-stopped
	if len(over) != inferences {
		t.Errorf("%d of %d inferences ended", len(over), inferences)
	}
}
