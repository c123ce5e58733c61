package gateway

import (
	"context"
	"errors"
	"io"
	goruntime "runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/sluicegate/sluice/proto/gen/inference"
)

// narrow is a pool with one permit.
const narrow = base + `
pools: [{name: gpu, capacity: 1, queue_length: 10, queue_timeout: 60s, models: [{model: "*"}]}]
budgets: [{name: day, tokens: 1000000}]
`

// A caller that goes away is seen at once, whatever its call waits for, and the
// model server is told.
func TestCancelReachesTheModelServer(t *testing.T) {
	for kind, call := range kinds {
		t.Run(kind+"/before the first byte", func(t *testing.T) {
			began, gone := make(chan struct{}), make(chan error, 1)
			g := open(t, narrow, script(t, func(_ string, ss grpc.ServerStream) error {
				close(began)
				<-ss.Context().Done()
				gone <- ss.Context().Err()
				return nil
			}))
			g.pool.abandoned = true
			c, cancel := context.WithCancel(ctx(t))
			go func() {
				<-began
				cancel()
			}()
			_, _, err := call(c, g.client())
			expect(t, "the call", err, "Canceled")
			if err := <-gone; !errors.Is(err, context.Canceled) {
				t.Errorf("the model server saw %v", err)
			}
			g.idle()
		})
		t.Run(kind+"/queued", func(t *testing.T) {
			began, end := make(chan struct{}), make(chan struct{})
			var calls atomic.Int64
			g := open(t, narrow, script(t, func(method string, ss grpc.ServerStream) error {
				if calls.Add(1) == 1 {
					close(began)
					<-end
				}
				return answerOne(method, ss)
			}))
			client := g.client()
			first := make(chan error, 1)
			go func() {
				_, _, err := call(ctx(t), client)
				first <- err
			}()
			<-began
			c, cancel := context.WithCancel(ctx(t))
			go func() {
				g.eventually("the call waits", func() bool { return g.Guard().Pools().Snapshot()[0].Waiting == 1 })
				cancel()
			}()
			_, _, err := call(c, client)
			expect(t, "the call that waits", err, "Canceled")
			g.eventually("nobody waits", func() bool { return g.Guard().Pools().Snapshot()[0].Waiting == 0 })
			close(end)
			if err := <-first; err != nil {
				t.Errorf("the other call: %v", err)
			}
			if n := calls.Load(); n != 1 {
				t.Errorf("%d calls reached the model server, want 1", n)
			}
			g.idle()
		})
	}
	t.Run("stream/in mid-stream", func(t *testing.T) {
		m, behind := modelServer(t)
		g := open(t, narrow, behind)
		g.pool.abandoned = true
		c, cancel := context.WithCancel(ctx(t))
		s, err := g.client().ModelStreamInfer(c)
		if err != nil {
			t.Fatal(err)
		}
		if err := s.Send(ask("words", "a", words(10_000), number("delay_ms", 1))); err != nil {
			t.Fatal(err)
		}
		if _, err := s.Recv(); err != nil {
			t.Fatal(err)
		}
		cancel()
		_, err = drainStream(s)
		expect(t, "the stream", err, "Canceled")
		g.eventually("the model stopped", func() bool { return m.Stats("words").Active == 0 })
		if n := m.Stats("words").Canceled; n != 1 {
			t.Errorf("%d inferences were cancelled, want 1", n)
		}
		g.idle()
	})
	t.Run("stream/while the request comes in", func(t *testing.T) {
		m, behind := modelServer(t)
		g := open(t, narrow, behind)
		g.pool.abandoned = true
		p := g.raw()
		id, err := p.begin(modelStreamInfer, false)
		if err != nil {
			t.Fatal(err)
		}
		if err := p.WriteData(id, false, message(0, encode(t, ask("words", "a", "hello")))[:9]); err != nil {
			t.Fatal(err)
		}
		g.eventually("the call has begun", func() bool { return g.Guard().Live().Len() == 1 })
		if err := p.WriteRSTStream(id, 8); err != nil {
			t.Fatal(err)
		}
		g.idle()
		if m.Seen() != 0 {
			t.Error("it reached the model server")
		}
	})
}

// idle waits until no call is at work and no permit is held.
func (g *gate) idle() {
	g.t.Helper()
	g.eventually("no call is at work", func() bool { return g.Guard().Live().Len() == 0 })
	g.nothingHeld()
}

// Some hundred callers go away at whatever moment it is for them.
func TestCancelStorm(t *testing.T) {
	m, behind := modelServer(t)
	g := open(t, base+`
pools: [{name: gpu, capacity: 8, queue_length: 1000, queue_timeout: 60s, models: [{model: "*"}]}]
budgets: [{name: day, tokens: 100000000}]
`, behind)
	g.pool.abandoned = true
	var clients []inference.GRPCInferenceServiceClient
	for range 4 {
		c := g.client()
		if _, err := c.ModelInfer(ctx(t), ask("echo", "a", "hello")); err != nil {
			t.Fatal(err)
		}
		clients = append(clients, c)
	}
	before := goruntime.NumGoroutine()
	var wg sync.WaitGroup
	for n := range 400 {
		wg.Go(func() {
			c, cancel := context.WithTimeout(ctx(t), time.Duration(n%80)*time.Millisecond)
			defer cancel()
			client := clients[n%len(clients)]
			var err error
			if n%3 == 0 {
				_, err = client.ModelInfer(c, ask("echo", "a", "hello", number("delay_ms", 20)))
			} else if s, fail := client.ModelStreamInfer(c); fail != nil {
				err = fail
			} else {
				_ = s.Send(ask("words", "a", words(100), number("delay_ms", 1)))
				_ = s.CloseSend()
				_, err = drainStream(s)
			}
			switch status.Code(err) {
			case codes.OK, codes.DeadlineExceeded, codes.Canceled:
			default:
				t.Errorf("call %d: %v", n, err)
			}
		})
	}
	wg.Wait()
	g.idle()
	g.eventually("the model server is idle", func() bool {
		return m.Stats("echo").Active == 0 && m.Stats("words").Active == 0
	})
	g.eventually("the goroutines have ended", func() bool { return goruntime.NumGoroutine() <= before+2 })
}

// Whoever does not read is not given more than a window, the model server is
// held back, and nobody else notices.
func TestCallerThatDoesNotRead(t *testing.T) {
	const size, most = 8 << 10, 64 << 20
	var sent atomic.Int64
	g := open(t, limited, script(t, func(method string, ss grpc.ServerStream) error {
		var req inference.ModelInferRequest
		if err := ss.RecvMsg(&req); err != nil {
			return err
		}
		if req.GetModelName() != "flood" {
			if method == modelInfer {
				return ss.SendMsg(reply(req.GetModelName(), req.GetId(), "hello"))
			}
			return ss.SendMsg(chunk(req.GetModelName(), req.GetId(), "hello"))
		}
		answer := encode(t, chunk("flood", "a", strings.Repeat("x", size)))
		for sent.Load() < most {
			if err := ss.SendMsg(answer); err != nil {
				return err
			}
			sent.Add(size)
		}
		return nil
	}))
	g.pool.abandoned = true
	client := g.client()
	c, cancel := context.WithCancel(ctx(t))
	s, err := client.ModelStreamInfer(c)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Send(ask("flood", "a", "go")); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Header(); err != nil {
		t.Fatal(err)
	}
	// It stands still when no more comes in the time of a hundred other calls.
	for last := int64(-1); last != sent.Load(); {
		last = sent.Load()
		for range 100 {
			if _, err := client.ModelInfer(ctx(t), ask("echo", "a", "hello")); err != nil {
				t.Fatal(err)
			}
		}
	}
	t.Logf("the model server got rid of %d KiB", sent.Load()>>10)
	if n := sent.Load(); n > 3<<20 { // 2 MiB in the gateway, and the windows of both ends
		t.Errorf("the model server got rid of %d KiB, want at most 3072", n>>10)
	}
	cancel()
	for {
		if _, err := s.Recv(); err != nil {
			break
		}
	}
	g.idle()
}

// Nobody may hold a permit by not reading.
func TestCallerThatNeverReads(t *testing.T) {
	g := open(t, narrow, script(t, func(_ string, ss grpc.ServerStream) error {
		var b []byte
		if err := ss.RecvMsg(&b); err != nil {
			return err
		}
		answer := encode(t, chunk("flood", "a", strings.Repeat("x", 8<<10)))
		for {
			if err := ss.SendMsg(answer); err != nil {
				return err
			}
		}
	}))
	g.pool.abandoned = true
	g.stall = 50 * time.Millisecond
	s, err := g.client().ModelStreamInfer(ctx(t))
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Send(ask("flood", "a", "go")); err != nil {
		t.Fatal(err)
	}
	g.eventually("the call began", func() bool { return g.Guard().Pools().Snapshot()[0].InUse == 1 })
	g.eventually("the call ended", func() bool { return g.Guard().Pools().Snapshot()[0].InUse == 0 })
	_, err = drainStream(s)
	expect(t, "the stream", err, "DeadlineExceeded MESSAGE_TIMEOUT")
}

// A model server that does not read holds its callers back.
func TestModelServerThatDoesNotRead(t *testing.T) {
	const size, most = 8 << 10, 64 << 20
	read := make(chan struct{})
	g := open(t, strings.Replace(base, "DIALECT_TRITON", "DIALECT_MLSERVER", 1), script(t, func(_ string, ss grpc.ServerStream) error {
		<-read
		for {
			var b []byte
			if err := ss.RecvMsg(&b); errors.Is(err, io.EOF) {
				return nil
			} else if err != nil {
				return err
			}
		}
	}))
	var sent atomic.Int64
	s, err := g.client().ModelStreamInfer(ctx(t))
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() {
		r := ask("echo", "a", strings.Repeat("x", size))
		for sent.Load() < most/8 {
			if err := s.Send(r); err != nil {
				done <- err
				return
			}
			sent.Add(size)
		}
		done <- s.CloseSend()
	}()
	// It stands still when nothing changes in a hundred looks.
	for last, same := int64(-1), 0; same < 100; {
		n := sent.Load()
		if n == last && n > 0 {
			same++
		} else {
			same = 0
		}
		last = n
		pause()
	}
	t.Logf("the caller got rid of %d KiB", sent.Load()>>10)
	if n := sent.Load(); n > 3<<20 {
		t.Errorf("the caller got rid of %d KiB, want at most 3072", n>>10)
	}
	close(read)
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if _, err := drainStream(s); err != nil {
		t.Error(err)
	}
}

func pause() {
	timer := time.NewTimer(time.Millisecond)
	<-timer.C
}
