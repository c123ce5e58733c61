package interceptors

import (
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"runtime/debug"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/sluicegate/sluice/interceptors/fields"
	"github.com/sluicegate/sluice/proto/gen/inference"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
)

// echo answers with the text of the request.
func echo(_ context.Context, r *inference.ModelInferRequest) (*inference.ModelInferResponse, error) {
	if len(r.Inputs) == 0 {
		return answer(r.Id), nil
	}
	return answer(r.Id, string(r.Inputs[0].Contents.BytesContents[0])), nil
}

func TestUnaryPassesUnchanged(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for name, connect := range map[string]func(*testing.T, *Chain, *model) *grpc.ClientConn{"server": guarded, "client": guarding} {
			var got *inference.ModelInferRequest
			j := new(journal)
			conn := connect(t, New([]*Backend{triton(t)}, &scripted{name: "p", journal: j}), &model{unary: func(ctx context.Context, r *inference.ModelInferRequest) (*inference.ModelInferResponse, error) {
				got = proto.CloneOf(r)
				return echo(ctx, r)
			}})
			req, resp := ask("m", "a", "hello"), new(inference.ModelInferResponse)
			if err := conn.Invoke(t.Context(), modelInfer, req, resp); err != nil {
				t.Fatal(name, err)
			}
			if !proto.Equal(got, req) || !proto.Equal(resp, answer("a", "hello")) {
				t.Errorf("%s: got %v and %v", name, got, resp)
			}
			checkUnwound(t, j.all())
		}
	})
}

func TestAMessageThatNobodyEditsIsTheSameMessage(t *testing.T) {
	intercept := UnaryServer(New([]*Backend{triton(t)}, &scripted{name: "p", journal: new(journal)}))
	req, resp := ask("m", "a", "hello"), answer("a", "world")
	got, err := intercept(t.Context(), req, &grpc.UnaryServerInfo{FullMethod: modelInfer}, func(_ context.Context, r any) (any, error) {
		if r != any(req) {
			t.Error("the handler got a copy")
		}
		return resp, nil
	})
	if err != nil || got != any(resp) {
		t.Errorf("got %v, %v", got, err)
	}
}

func TestEditsAreMadeOnACopy(t *testing.T) {
	edit := func(role fields.Role) func(*Inference, *fields.Message) error {
		return func(_ *Inference, m *fields.Message) error {
			for k := range m.Fields {
				if f := &m.Fields[k]; f.Role == role {
					m.Set(f, []byte("edited"))
				}
			}
			return nil
		}
	}
	intercept := UnaryServer(New([]*Backend{triton(t)}, &scripted{name: "p", journal: new(journal), request: edit(fields.Prompt), response: edit(fields.Output)}))
	req, resp := ask("m", "a", "hello"), answer("a", "world")
	got, err := intercept(t.Context(), req, &grpc.UnaryServerInfo{FullMethod: modelInfer}, func(_ context.Context, r any) (any, error) {
		if !proto.Equal(r.(proto.Message), ask("m", "a", "edited")) {
			t.Errorf("the handler got %v", r)
		}
		return resp, nil
	})
	if err != nil || !proto.Equal(got.(proto.Message), answer("a", "edited")) {
		t.Errorf("got %v, %v", got, err)
	}
	if !proto.Equal(req, ask("m", "a", "hello")) || !proto.Equal(resp, answer("a", "world")) {
		t.Error("somebody else's message was changed")
	}
}

func TestTheHandlersErrorIsTheCallersUnchanged(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for name, err := range map[string]error{
			"a status":      status.Error(codes.DataLoss, "lost"),
			"a plain error": errors.New("plain"),
			"a context's":   context.DeadlineExceeded,
		} {
			m := &model{
				unary: func(context.Context, *inference.ModelInferRequest) (*inference.ModelInferResponse, error) {
					return nil, err
				},
				stream: func(ss grpc.ServerStream) error { take(t, ss); return err },
			}
			with, without := guarded(t, New([]*Backend{triton(t)}), m), connect(t, m, nil)
			var got [2][2]string
			for k, conn := range []*grpc.ClientConn{with, without} {
				got[k][0] = conn.Invoke(t.Context(), modelInfer, ask("m", "a"), new(inference.ModelInferResponse)).Error()
				s := open(t, conn, modelStreamInfer, bidi)
				s.send(ask("m", "a"))
				_, err := s.receive()
				got[k][1] = err.Error()
			}
			if got[0] != got[1] {
				t.Errorf("%s: got %q, without the chain %q", name, got[0], got[1])
			}
		}
	})
}

func TestAnAbortedCallIsAnsweredWithTheReason(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := &scripted{name: "p", journal: new(journal), begin: func(c *Call) error {
			d := Deny("p", Draining, "over")
			d.RetryAfter = time.Second
			c.AbortAfter(time.Minute, func() error { return d })
			return nil
		}}
		wait := func(ctx context.Context) error { <-ctx.Done(); return ctx.Err() }
		conn := guarded(t, New([]*Backend{triton(t)}, p), &model{
			unary: func(ctx context.Context, _ *inference.ModelInferRequest) (*inference.ModelInferResponse, error) {
				return nil, wait(ctx)
			},
			stream: func(ss grpc.ServerStream) error { take(t, ss); return wait(ss.Context()) },
		})
		var trailer metadata.MD
		err := conn.Invoke(t.Context(), modelInfer, ask("m", "a"), new(inference.ModelInferResponse), grpc.Trailer(&trailer))
		codeIs(t, err, codes.Unavailable, Draining)
		if got := trailer.Get("grpc-retry-pushback-ms"); !slices.Equal(got, []string{"1000"}) {
			t.Errorf("pushback %v", got)
		}
		s := open(t, conn, modelStreamInfer, bidi)
		s.send(ask("m", "a"))
		_, err = s.receive()
		codeIs(t, err, codes.Unavailable, Draining)
		if got := s.Trailer().Get("grpc-retry-pushback-ms"); !slices.Equal(got, []string{"1000"}) {
			t.Errorf("pushback %v", got)
		}
		checkBalanced(t, p.journal)
	})
}

func TestACallMayBeAbortedWithAStatus(t *testing.T) {
	var call *Call
	p := &scripted{name: "p", journal: new(journal), begin: func(c *Call) error { call = c; return nil }}
	intercept := UnaryServer(New([]*Backend{triton(t)}, p))
	_, err := intercept(t.Context(), ask("m", "a"), &grpc.UnaryServerInfo{FullMethod: modelInfer}, func(context.Context, any) (any, error) {
		call.Abort(status.Error(codes.Aborted, "rolled back"))
		return answer("a"), nil
	})
	codeIs(t, err, codes.Aborted, "")
}

func TestWhatAHandlerSaysToACallerThatIsGoneStands(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	intercept := UnaryServer(New([]*Backend{triton(t)}))
	_, err := intercept(ctx, ask("m", "a"), &grpc.UnaryServerInfo{FullMethod: modelInfer}, func(context.Context, any) (any, error) {
		cancel()
		return nil, status.Error(codes.Aborted, "rolled back")
	})
	codeIs(t, err, codes.Aborted, "")
}

func TestTheTapRefusesWithDetailsBeforeABodyIsRead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		j := new(journal)
		gate := &scripted{name: "gate", journal: j, allow: func(c *Call) error { return Deny("gate", MethodDenied, "no") }}
		conn := guarded(t, New([]*Backend{triton(t)}, gate), &model{})
		err := conn.Invoke(t.Context(), modelInfer, ask("m", "a"), new(inference.ModelInferResponse))
		codeIs(t, err, codes.PermissionDenied, MethodDenied)
		if d := status.Convert(err).Details(); len(d) != 1 || d[0].(*errdetails.ErrorInfo).Reason != string(MethodDenied) {
			t.Errorf("details %v", d)
		}
		if got := j.those("gate start", "gate begin"); len(got) > 0 {
			t.Errorf("the call began: %v", got)
		}
	})
}

func TestADeadlineEndsAWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPools(new(journal), "m")
		p.fill("m")
		conn := guarded(t, New([]*Backend{triton(t)}, p), &model{unary: echo, stream: words})
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		err := conn.Invoke(ctx, modelInfer, ask("m", "a", "x"), new(inference.ModelInferResponse))
		codeIs(t, err, codes.DeadlineExceeded, "")
		ctx, cancel = context.WithTimeout(t.Context(), time.Second)
		s := openWith(t, ctx, cancel, conn, modelStreamInfer, bidi)
		s.send(ask("m", "a", "x"))
		_, err = s.receive()
		codeIs(t, err, codes.DeadlineExceeded, "")
		synctest.Wait()
		checkBalanced(t, p.journal)
	})
}

func TestAPanicOfTheHandlerEndsTheCallAndGoesOn(t *testing.T) {
	j := new(journal)
	intercept := UnaryServer(New([]*Backend{triton(t)}, &scripted{name: "p", journal: j}))
	func() {
		defer func() {
			if v := recover(); v != secret {
				t.Errorf("recovered %v", v)
			}
		}()
		_, _ = intercept(t.Context(), ask("m", "a"), &grpc.UnaryServerInfo{FullMethod: modelInfer}, func(context.Context, any) (any, error) { panic(secret) })
	}()
	if got := j.those("p end", "p call-end"); !slices.Equal(got, []string{"p end a INTERNAL", "p call-end INTERNAL"}) {
		t.Errorf("got %v", got)
	}
}

func TestTheClientDoor(t *testing.T) {
	refuse := func(*Inference, *fields.Message) error { return Deny("p", OutputRejected, "no") }
	for _, c := range []struct {
		name   string
		policy *scripted
		reason Reason
	}{
		{"passes", &scripted{}, ""},
		{"refused at begin", &scripted{begin: func(*Call) error { return Deny("p", OutputRejected, "no") }}, OutputRejected},
		{"refused at the request", &scripted{request: refuse}, OutputRejected},
		{"refused at the response", &scripted{response: refuse}, OutputRejected},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				c.policy.name, c.policy.journal = "p", new(journal)
				conn := guarding(t, New([]*Backend{triton(t)}, c.policy), &model{unary: echo, stream: words})
				resp := new(inference.ModelInferResponse)
				err := conn.Invoke(t.Context(), modelInfer, ask("m", "a", "hello"), resp)
				if reasonOf(err) != c.reason {
					t.Errorf("unary: got %v", err)
				}
				if c.reason != "" && !proto.Equal(resp, &inference.ModelInferResponse{}) {
					t.Errorf("unary: what was refused is in the caller's hands: %v", resp)
				}
				var got []string
				cs, err := conn.NewStream(t.Context(), bidi, modelStreamInfer)
				if err == nil {
					err = cs.SendMsg(ask("m", "", "hello world"))
				}
				if err == nil {
					err = cs.CloseSend()
				}
				for err == nil {
					m := new(inference.ModelStreamInferResponse)
					if err = cs.RecvMsg(m); err == nil {
						got = append(got, m.InferResponse.Id+string(m.InferResponse.Outputs[0].Contents.BytesContents[0]))
					} else if c.reason != "" && !proto.Equal(m, &inference.ModelStreamInferResponse{}) {
						t.Errorf("stream: what was refused is in the caller's hands: %v", m)
					}
				}
				if errors.Is(err, io.EOF) {
					err = nil
				}
				if reasonOf(err) != c.reason || c.reason == "" && !slices.Equal(got, []string{"hello", "world"}) {
					t.Errorf("stream: got %v, %v", got, err)
				}
				synctest.Wait()
				checkBalanced2(t, c.policy.journal)
			})
		})
	}
}

// checkBalanced2 is checkBalanced, also where no call began.
func checkBalanced2(t *testing.T, j *journal) {
	t.Helper()
	if len(j.those("p begun")) > 0 {
		checkBalanced(t, j)
	}
}

func TestAClientThatGoesAwayEndsItsCall(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		j := new(journal)
		conn := guarding(t, New([]*Backend{triton(t)}, &scripted{name: "p", journal: j}), &model{stream: func(ss grpc.ServerStream) error {
			<-ss.Context().Done()
			return nil
		}})
		s := open(t, conn, modelStreamInfer, bidi)
		s.send(ask("m", "a", "x"))
		s.cancel() // and nobody receives
		synctest.Wait()
		if got := j.those("p end", "p call-end"); !slices.Equal(got, []string{"p end a error", "p call-end error"}) {
			t.Errorf("got %v", got)
		}
	})
}

func TestWhatPoliciesSendOnReplacesWhatTheProgramSends(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := &scripted{name: "p", journal: new(journal), begin: func(c *Call) error {
			c.Outgoing = metadata.Pairs("traceparent", "ours")
			return nil
		}}
		var got metadata.MD
		conn := guarding(t, New([]*Backend{triton(t)}, p), &model{unary: func(ctx context.Context, r *inference.ModelInferRequest) (*inference.ModelInferResponse, error) {
			got, _ = metadata.FromIncomingContext(ctx)
			return echo(ctx, r)
		}})
		ctx := metadata.AppendToOutgoingContext(t.Context(), "traceparent", "theirs", "mine", "kept")
		if err := conn.Invoke(ctx, modelInfer, ask("m", "a", "x"), new(inference.ModelInferResponse)); err != nil {
			t.Fatal(err)
		}
		if !slices.Equal(got.Get("traceparent"), []string{"ours"}) || !slices.Equal(got.Get("mine"), []string{"kept"}) {
			t.Errorf("got %v", got)
		}
	})
}

// One verdict for one content, whichever way it came: alone or in a stream, as
// a Go message or as bytes.
func TestTheVerdictDoesNotDependOnTheDoor(t *testing.T) {
	words := []string{"hello", "forbidden", "rude", "limit", "long"}
	judge := func(role fields.Role, word string, reason Reason) func(*Inference, *fields.Message) error {
		return func(_ *Inference, m *fields.Message) error {
			for k := range m.Fields {
				if f := &m.Fields[k]; f.Role == role && strings.Contains(string(m.Bytes(f)), word) {
					return Deny("p", reason, "no")
				}
			}
			return nil
		}
	}
	p := &scripted{name: "p", request: judge(fields.Prompt, "forbidden", PromptRejected), response: judge(fields.Output, "rude", OutputRejected)}
	b := triton(t, "m")
	r := rand.New(rand.NewPCG(5, 6))
	kinds := make(map[Reason]int)
	for range 300 {
		var texts []string
		for range 1 + r.IntN(3) {
			texts = append(texts, words[r.IntN(len(words))])
		}
		req := ask([]string{"m", "m", "m", "other"}[r.IntN(4)], []string{"", "a"}[r.IntN(2)], texts...)
		if r.IntN(4) == 0 {
			req.Parameters = map[string]*inference.InferParameter{"max_tokens": {
				ParameterChoice: &inference.InferParameter_Int64Param{Int64Param: int64(r.IntN(3)) - 1}}}
		}
		reply := words[r.IntN(len(words))]
		verdict := func(method string, raw bool) Reason {
			p.journal = new(journal)
			call, err := New([]*Backend{b}, p).Begin(context.Background(), CallInfo{FullMethod: method})
			if err != nil {
				t.Fatal(err)
			}
			envelope := func(m proto.Message) *Envelope {
				if raw {
					return rawEnvelope(t, m)
				}
				return TypedEnvelope(m)
			}
			i, err := call.Request(envelope(req))
			if err == nil {
				var resp proto.Message = answer(req.Id, reply)
				if method == modelStreamInfer {
					resp = chunk(i.key, true, reply)
				}
				_, _, err = call.Response(envelope(resp))
			}
			call.End(err)
			checkUnwound(t, p.all())
			return reasonOf(err)
		}
		want := verdict(modelInfer, false)
		kinds[want]++
		for _, method := range []string{modelInfer, modelStreamInfer} {
			for _, raw := range []bool{false, true} {
				if got := verdict(method, raw); got != want {
					t.Fatalf("%v answered %q: %q by %s (raw %t), %q by a unary Go message", req, reply, got, method, raw, want)
				}
			}
		}
	}
	if len(kinds) < 5 { // passes, model, limit, prompt, output
		t.Errorf("the cases are too few: %v", kinds)
	}
}

func TestUnaryServerAllocations(t *testing.T) {
	for _, c := range []struct {
		name     string
		policies int
		most     float64
	}{{"no policies", 0, 4}, {"five that do nothing", 5, 4}} { // call, inference, and a context's two
		t.Run(c.name, func(t *testing.T) {
			if raceEnabled() {
				t.Skip("the race detector makes pools forget")
			}
			run := unaryDoor(t, c.policies, ask("m", "a"), answer("a"))
			if got := testing.AllocsPerRun(1000, run); got > c.most {
				t.Errorf("%v allocations, want at most %v", got, c.most)
			}
		})
	}
}

// nothing is a policy that does nothing, and keeps nothing.
type nothing struct{}

func (nothing) Name() string                                  { return "nothing" }
func (n nothing) Begin(*Call) (CallPolicy, error)             { return nothingCall{}, nil }
func (nothingCall) Start(*Inference) (InferencePolicy, error) { return nothingInference{}, nil }
func (nothingCall) End(Outcome)                               {}
func (nothingInference) Request(*fields.Message) error        { return nil }
func (nothingInference) Response(*fields.Message) error       { return nil }
func (nothingInference) End(Outcome)                          {}

type (
	nothingCall      struct{}
	nothingInference struct{}
)

// unaryDoor is one call through the unary server door, without a network.
func unaryDoor(t testing.TB, policies int, req, resp any) func() {
	var ps []Policy
	for range policies {
		ps = append(ps, nothing{})
	}
	intercept := UnaryServer(New([]*Backend{triton(t)}, ps...))
	info := &grpc.UnaryServerInfo{FullMethod: modelInfer}
	handler := func(context.Context, any) (any, error) { return resp, nil }
	ctx := context.Background()
	return func() {
		if _, err := intercept(ctx, req, info, handler); err != nil {
			t.Fatal(err)
		}
	}
}

// raceEnabled reports whether the race detector is on: it has sync.Pool drop
// things at random.
func raceEnabled() bool {
	info, _ := debug.ReadBuildInfo()
	return info != nil && slices.ContainsFunc(info.Settings, func(s debug.BuildSetting) bool { return s.Key == "-race" && s.Value == "true" })
}

func BenchmarkUnaryServer(b *testing.B) {
	for name, n := range map[string]int{"policies=0": 0, "policies=5": 5} {
		b.Run(name, func(b *testing.B) {
			run := unaryDoor(b, n, ask("m", "a", "hello"), answer("a", "world"))
			b.ReportAllocs()
			for b.Loop() {
				run()
			}
		})
	}
}
