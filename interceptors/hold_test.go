package interceptors

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"testing"
	"testing/synctest"

	"github.com/sluicegate/sluice/interceptors/dialect"
	"github.com/sluicegate/sluice/interceptors/fields"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
)

// keeper is a policy that holds as many responses as it is told to.
type keeper struct {
	*scripted
	keep   func(i *Inference, seen int) int
	finish func(*Inference) error
}

type keeping struct{ keeper }

func (k keeper) Begin(c *Call) (CallPolicy, error) {
	_, err := k.scripted.Begin(c)
	return keeping{k}, err
}

func (k keeping) End(Outcome) {}

func (k keeping) Start(i *Inference) (InferencePolicy, error) {
	if k.start != nil {
		if err := k.start(i); err != nil {
			return nil, err
		}
	}
	return &kept{scriptedInference{k.scripted, i}, k.keeper, 0}, nil
}

type kept struct {
	scriptedInference
	keeper keeper
	seen   int
}

func (k *kept) Response(m *fields.Message) error {
	k.seen++
	return k.scriptedInference.Response(m)
}

func (k *kept) Held() int { return k.keeper.keep(k.i, k.seen) }

func (k *kept) Finish() error {
	k.add("finish %s", k.i.ID)
	if k.keeper.finish != nil {
		return k.keeper.finish(k.i)
	}
	return nil
}

func keepsLast(n int) keeper {
	return keeper{scripted: &scripted{name: "keeper", journal: new(journal)}, keep: func(_ *Inference, seen int) int { return min(seen, n) }}
}

func TestWhatIsHeldComesInOrder(t *testing.T) {
	for door, connect := range map[string]func(*testing.T, *Chain, *model) *grpc.ClientConn{"server": guarded, "client": guarding} {
		t.Run(door, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				k := keepsLast(2)
				next := make(chan bool)
				conn := connect(t, New([]*Backend{triton(t)}, k), &model{stream: func(ss grpc.ServerStream) error {
					id := take(t, ss).Id
					for n, w := range strings.Fields("one two three four") {
						if err := ss.SendMsg(chunk(id, n == 3, w)); err != nil {
							return err
						}
						if n > 1 {
							<-next
						}
					}
					return nil
				}})
				s := open(t, conn, modelStreamInfer, bidi)
				s.send(ask("m", "a", "x"))
				s.expect("a one")
				if door == "server" {
					synctest.Wait()
					if got := k.those("finish"); got != nil {
						t.Errorf("%v", got)
					}
				}
				next <- true
				s.expect("a two", "a three", "!a four")
				next <- true
				s.halfClose()
				s.expect("EOF")
				if got := k.those("finish"); len(got) != 1 {
					t.Errorf("%v", got)
				}
			})
		})
	}
}

// What one inference holds keeps no other of the stream back.
func TestOthersGoOnWhileOneIsHeld(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := keepsLast(9)
		k.keep = func(i *Inference, seen int) int {
			if i.ID == "held" {
				return seen
			}
			return 0
		}
		conn := guarded(t, New([]*Backend{triton(t)}, k), &model{stream: func(ss grpc.ServerStream) error {
			a, b := take(t, ss).Id, take(t, ss).Id
			for _, m := range []proto.Message{chunk(a, false, "1"), chunk(b, false, "2"), chunk(a, false, "3"), chunk(b, true, "4"), chunk(a, true, "5")} {
				if err := ss.SendMsg(m); err != nil {
					return err
				}
			}
			return nil
		}})
		s := open(t, conn, modelStreamInfer, bidi)
		s.send(ask("m", "held", "x"))
		s.send(ask("m", "", "x"))
		s.expect(" 2", "! 4", "held 1", "held 3", "!held 5", "EOF")
	})
}

// An inference that has no last response ends with its stream.
func TestWhatIsHeldAtTheEndOfTheStream(t *testing.T) {
	refusal := Deny("keeper", OutputRejected, "no")
	broken := errors.New("broken")
	for _, c := range []struct {
		name   string
		finish error
		end    error
		want   []string
		code   codes.Code
	}{
		{"well", nil, nil, []string{"one", "two"}, codes.OK},
		{"refused", refusal, nil, nil, codes.PermissionDenied},
		{"the model server fails", nil, broken, []string{"one", "two"}, codes.Unknown},
		{"it fails, and the rest is refused", refusal, broken, nil, codes.PermissionDenied},
	} {
		for door, connect := range map[string]func(*testing.T, *Chain, *model) *grpc.ClientConn{"server": guarded, "client": guarding} {
			t.Run(c.name+"/"+door, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					k := keepsLast(5)
					k.finish = func(*Inference) error { return c.finish }
					conn := connect(t, New([]*Backend{backend(t, "ml", dialect.MLServer)}, k), &model{stream: func(ss grpc.ServerStream) error {
						take(t, ss)
						for _, w := range []string{"one", "two"} {
							if err := ss.SendMsg(answer("", w)); err != nil {
								return err
							}
						}
						return c.end
					}})
					s := open(t, conn, modelStreamInfer, bidi)
					s.send(ask("m", "", "x"))
					s.halfClose()
					var got []string
					var err error
					for m := answer(""); err == nil; {
						if err = s.RecvMsg(m); err == nil {
							got = append(got, string(m.Outputs[0].Contents.BytesContents[0]))
						}
					}
					if errors.Is(err, io.EOF) {
						err = nil
					}
					if !slices.Equal(got, c.want) || status.Code(err) != c.code && reasonOf(err) != OutputRejected {
						t.Errorf("%q, %v", got, err)
					}
				})
			})
		}
	}
}

// What comes before a refusal by somebody else was good, and is delivered before it.
func TestARefusalComesAfterWhatWasHeld(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := keepsLast(5)
		cut := &scripted{name: "cut", journal: new(journal)}
		n := 0
		cut.response = func(*Inference, *fields.Message) error {
			if n++; n == 3 {
				return Deny("cut", BudgetCut, "over")
			}
			return nil
		}
		conn := guarded(t, New([]*Backend{triton(t)}, k, cut), &model{stream: words})
		s := open(t, conn, modelStreamInfer, bidi)
		s.send(ask("m", "a", "one two three four"))
		s.expect("a one", "a two", "!a ERROR BUDGET_CUT: ...")
		// Its own refusal takes what it holds with it.
		k2 := keepsLast(5)
		m := 0
		k2.response = func(*Inference, *fields.Message) error {
			if m++; m == 3 {
				return Deny("keeper", OutputRejected, "over")
			}
			return nil
		}
		conn = guarded(t, New([]*Backend{triton(t)}, k2), &model{stream: words})
		s = open(t, conn, modelStreamInfer, bidi)
		s.send(ask("m", "a", "one two three four"))
		s.expect("!a ERROR OUTPUT_REJECTED: ...")
		if got := k2.those("finish"); got != nil {
			t.Errorf("%v", got)
		}
	})
}

// tally counts buffers that were taken and not given back.
type tally struct {
	mem.BufferPool
	out int
}

func (p *tally) Get(n int) *[]byte { p.out++; return p.BufferPool.Get(n) }
func (p *tally) Put(b *[]byte)     { p.out--; p.BufferPool.Put(b) }

// rawDoor is a door as the gateway's: messages in buffers that must be given back.
type rawDoor struct {
	t       testing.TB
	pool    *tally
	asked   int
	deliver func(n int) error // may panic
	got     int
}

// message is one in a buffer of its own; grpc-go pools none of small messages.
func (d *rawDoor) message(m proto.Message) mem.BufferSlice {
	b, err := proto.Marshal(m)
	if err != nil {
		d.t.Fatal(err)
	}
	buf := d.pool.Get(len(b))
	copy(*buf, b)
	*buf = (*buf)[:len(b)]
	return mem.BufferSlice{mem.NewBuffer(buf, d.pool)}
}

func (d *rawDoor) Receive() (*Envelope, error) {
	if d.asked == 2 {
		return nil, io.EOF
	}
	d.asked++
	return RawEnvelope(d.message(ask("m", fmt.Sprint(d.asked), strings.Repeat("x", 2048)))), nil
}

func (d *rawDoor) Forward(e *Envelope, _ *Inference) error {
	e.Encode().Free()
	return nil
}
func (d *rawDoor) CloseForward() error { return nil }

func (d *rawDoor) Deliver(e *Envelope) error {
	b := e.Encode()
	defer b.Free()
	d.got++
	return d.deliver(d.got)
}

func (d *rawDoor) Encoded(b []byte) (*Envelope, error) {
	return RawEnvelope(mem.BufferSlice{mem.SliceBuffer(b)}), nil
}

// TestEveryBufferIsGivenBackOnce ends a stream of two inferences at every message,
// in every way, while responses are held.
func TestEveryBufferIsGivenBackOnce(t *testing.T) {
	type world struct {
		call   *Call
		stream *Stream
		cancel context.CancelFunc
		i      *Inference
	}
	refuse := func() error { return Deny("keeper", OutputRejected, "no") }
	for name, c := range map[string]struct {
		response func(at, n int) error
		held     func(at, n int)
		finish   func() error
		deliver  func(at, n int) error
		before   func(w *world, at, n int)
	}{
		"well": {},
		"refused": {response: func(at, n int) error {
			if n == at {
				return refuse()
			}
			return nil
		}},
		"refused at the end": {finish: refuse},
		"a panic in a response": {response: func(at, n int) error {
			if n == at {
				panic("response")
			}
			return nil
		}},
		"a panic when it is asked what it holds": {held: func(at, n int) {
			if n == at {
				panic("held")
			}
		}},
		"a panic at the end": {finish: func() error { panic("finish") }},
		"the caller cannot be written to": {deliver: func(at, n int) error {
			if n >= at {
				return errors.New("gone")
			}
			return nil
		}},
		"a panic of the door": {deliver: func(at, n int) error {
			if n == at {
				panic("door")
			}
			return nil
		}},
		"the caller is gone": {before: func(w *world, at, n int) {
			if n == at {
				w.cancel()
			}
		}},
		"drained": {before: func(w *world, at, n int) {
			if n == at {
				w.call.Abort(Deny("chain", Draining, "over"))
			}
		}},
		"cut from outside": {before: func(w *world, at, n int) {
			if n == at {
				w.i.Cut(Deny("x", Draining, "over"))
			}
		}},
		"ended beside": {before: func(w *world, at, n int) {
			if n == at {
				w.call.End(errors.New("over"))
			}
		}},
	} {
		t.Run(name, func(t *testing.T) {
			for at := 1; at <= 9; at++ {
				w := &world{}
				pool := &tally{BufferPool: mem.DefaultBufferPool()}
				n := 0
				k := keepsLast(2)
				k.response = func(*Inference, *fields.Message) error {
					if c.response != nil {
						return c.response(at, n)
					}
					return nil
				}
				k.keep = func(_ *Inference, seen int) int {
					if c.held != nil {
						c.held(at, n)
					}
					return min(seen, 2)
				}
				k.finish = func(*Inference) error {
					if c.finish != nil {
						return c.finish()
					}
					return nil
				}
				k.start = func(i *Inference) error {
					w.i = i
					return nil
				}
				ctx, cancel := context.WithCancel(context.Background())
				w.cancel = cancel
				call, err := New([]*Backend{triton(t)}, k).Begin(ctx, CallInfo{FullMethod: modelStreamInfer})
				if err != nil {
					t.Fatal(err)
				}
				w.call = call
				d := &rawDoor{t: t, pool: pool, deliver: func(n int) error {
					if c.deliver != nil {
						return c.deliver(at, n)
					}
					return nil
				}}
				s := NewStream(call, d)
				w.stream = s
				for range 2 {
					if err := s.Begin(); err != nil {
						t.Fatal(err)
					}
				}
				long := strings.Repeat("y", 2048)
				for n = 1; n <= 8 && err == nil; n++ {
					if c.before != nil {
						c.before(w, at, n)
					}
					id := fmt.Sprint(1 + n%2)
					err = s.Response(s.Answer(d.message(chunk(id, n > 6, long))))
				}
				if err == nil {
					err = s.Finish()
				}
				call.End(err)
				s.End()
				cancel()
				if pool.out != 0 || call.HeldBytes() != 0 {
					t.Errorf("at %d: %d buffers, %d bytes held (%v)", at, pool.out, call.HeldBytes(), err)
				}
				if name == "well" && d.got != 8 {
					t.Errorf("%d were delivered", d.got)
				}
			}
		})
	}
}

// BenchmarkHeldChunk is a response that is held until the next one comes, and one
// that is not, on their way through a door.
func BenchmarkHeldChunk(b *testing.B) {
	for _, held := range []int{0, 1, 4} {
		b.Run(fmt.Sprint(held), func(b *testing.B) {
			call, err := New([]*Backend{triton(b)}, quiet{held}).Begin(context.Background(), CallInfo{FullMethod: modelStreamInfer})
			if err != nil {
				b.Fatal(err)
			}
			d := &rawDoor{t: b, pool: &tally{BufferPool: mem.DefaultBufferPool()}, asked: 1, deliver: func(int) error { return nil }}
			s := NewStream(call, d)
			if err := s.Begin(); err != nil {
				b.Fatal(err)
			}
			wire, err := proto.Marshal(chunk("2", false, "word"))
			if err != nil {
				b.Fatal(err)
			}
			bufs := mem.BufferSlice{mem.SliceBuffer(wire)}
			b.ReportAllocs()
			for b.Loop() {
				if err := s.Response(s.Answer(bufs)); err != nil {
					b.Fatal(err)
				}
			}
			call.End(nil)
			s.End()
		})
	}
}

// quiet holds as many responses, and keeps no journal.
type quiet struct{ held int }

func (q quiet) Name() string                              { return "quiet" }
func (q quiet) Begin(*Call) (CallPolicy, error)           { return q, nil }
func (q quiet) Start(*Inference) (InferencePolicy, error) { return &quietly{held: q.held}, nil }
func (q quiet) End(Outcome)                               {}

type quietly struct{ held, seen int }

func (q *quietly) Request(*fields.Message) error  { return nil }
func (q *quietly) Response(*fields.Message) error { q.seen++; return nil }
func (q *quietly) Held() int                      { return min(q.seen, q.held) }
func (q *quietly) Finish() error                  { return nil }
func (q *quietly) End(Outcome)                    {}
