package gateway

import (
	"context"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
)

// Calls that a server was at work on when it was killed are made again elsewhere, if
// the configuration says so.
func TestWhatAKilledServerHadIsMadeAgain(t *testing.T) {
	const calls = 20
	for _, config := range []string{"", ", retries: 1"} {
		var atWork atomic.Int64
		stuck := grpc.NewServer(grpc.ForceServerCodecV2(rawCodec{}), grpc.UnknownServiceHandler(func(_ any, ss grpc.ServerStream) error {
			var m []byte
			_ = ss.RecvMsg(&m)
			atWork.Add(1)
			<-ss.Context().Done()
			return ss.Context().Err()
		}))
		address := serve(t, stuck)
		var seen atomic.Int64
		good := script(t, func(method string, ss grpc.ServerStream) error {
			seen.Add(1)
			return answerOne(method, ss)
		})
		g := open(t, several(config, address, good))
		g.pool.abandoned = true
		client := g.client()
		for n := int64(0); n < calls && atWork.Load() == 0; n++ { // until both are connected
			once, cancel := context.WithTimeout(ctx(t), 100*time.Millisecond)
			_, _ = client.ModelInfer(once, ask("echo", "a", "hello"))
			cancel()
		}
		g.ready(2)
		g.unloaded()
		atWork.Store(0)
		seen.Store(0)
		before := g.charged()
		var wg sync.WaitGroup
		var failed atomic.Int64
		for n := range calls {
			wg.Go(func() {
				if _, _, err := kinds[[]string{"unary", "stream"}[n%2]](ctx(t), client); err != nil {
					failed.Add(1)
					expect(t, "a call", err, "Unavailable UPSTREAM_LOST")
				}
			})
		}
		g.eventually("all are there", func() bool { return atWork.Load()+seen.Load() == calls })
		had := atWork.Load()
		stuck.Stop()
		wg.Wait()
		switch again := seen.Load() - (calls - had); {
		case had == 0:
			t.Error("the server had nothing")
		case config == "" && (failed.Load() != had || again != 0), config != "" && (failed.Load() != 0 || again != had):
			t.Errorf("%q: of %d calls that it had, %d failed and %d were made again", config, had, failed.Load(), again)
		}
		if n := g.charged() - before; n != calls {
			t.Errorf("%q: %d of %d were charged", config, n, calls)
		}
		g.unloaded()
	}
}

// failing is a server that does as the function says, and one that answers; how
// often each was asked.
func failing(t *testing.T, f func(ss grpc.ServerStream) error) (bad, good string, asked [2]*atomic.Int64) {
	asked = [2]*atomic.Int64{new(atomic.Int64), new(atomic.Int64)}
	bad = script(t, func(_ string, ss grpc.ServerStream) error {
		asked[0].Add(1)
		ss.SetTrailer(metadata.Pairs("x-of", "bad"))
		return f(ss)
	})
	good = script(t, func(method string, ss grpc.ServerStream) error {
		asked[1].Add(1)
		return answerOne(method, ss)
	})
	return bad, good, asked
}

func TestRetries(t *testing.T) {
	unavailable := status.Error(codes.Unavailable, "the queue is closed")
	for name, c := range map[string]struct {
		config  string
		do      func(ss grpc.ServerStream) error
		retried bool
	}{
		"unavailable":           {", retries: 1", func(grpc.ServerStream) error { return unavailable }, true},
		"not unless configured": {"", func(grpc.ServerStream) error { return unavailable }, false},
		"another failure":       {", retries: 1", func(grpc.ServerStream) error { return status.Error(codes.Internal, "no") }, false},
		"after an answer began": {", retries: 1", func(ss grpc.ServerStream) error { _ = ss.SendHeader(nil); return unavailable }, false},
		"the server says never to": {", retries: 1", func(ss grpc.ServerStream) error {
			ss.SetTrailer(metadata.Pairs("grpc-retry-pushback-ms", "-1"))
			return unavailable
		}, false},
		"after the message was read": {", retries: 1", func(ss grpc.ServerStream) error {
			var m []byte
			_ = ss.RecvMsg(&m)
			return unavailable
		}, true},
	} {
		for kind, call := range kinds {
			t.Run(name+", "+kind, func(t *testing.T) {
				bad, good, asked := failing(t, c.do)
				g := open(t, several(c.config+", outliers: {max_percent: 0}", bad, good))
				g.pool.abandoned = true
				client := g.client()
				const calls = 9 // of which fewer fail than the budget of retries has tokens
				failed := int64(0)
				for range calls {
					_, trailer, err := call(ctx(t), client)
					switch {
					case err != nil:
						failed++
					case len(trailer.Get("x-of")) > 0:
						t.Errorf("the trailer of what failed came too: %v", trailer)
					}
				}
				first := asked[0].Load()
				if c.retried && (failed != 0 || asked[1].Load() != calls) {
					t.Errorf("%d of %d failed; %d and %d were asked", failed, calls, first, asked[1].Load())
				}
				if !c.retried && (failed != first || first+asked[1].Load() != calls) {
					t.Errorf("%d of %d failed; %d and %d were asked", failed, calls, first, asked[1].Load())
				}
				g.eventually("all is charged", func() bool { return g.charged() == calls })
				g.unloaded()
			})
		}
	}
}

// A large request can be made again where the configuration asks for retries.
func TestALargeRequestIsMadeAgain(t *testing.T) {
	for _, c := range []struct {
		config string
		ok     bool
	}{{", retries: 1", true}, {"", false}} {
		bad, good, asked := failing(t, func(ss grpc.ServerStream) error {
			var m []byte
			_ = ss.RecvMsg(&m)
			return status.Error(codes.Unavailable, "")
		})
		g := open(t, several(c.config+", outliers: {max_percent: 0}", bad, good))
		g.pool.abandoned = true
		client := g.client(grpc.WithDefaultCallOptions(grpc.MaxCallSendMsgSize(16 << 20)))
		for n := 0; n < 8 && asked[0].Load() == 0; n++ {
			_, err := client.ModelInfer(ctx(t), ask("echo", "a", strings.Repeat("hello ", 1<<20)))
			if first := asked[0].Load() > 0; first && (err == nil) != c.ok {
				t.Errorf("%q: got %v", c.config, err)
			}
		}
	}
}

// When everything fails, few calls are made again.
func TestRetriesHaveABudget(t *testing.T) {
	asked := new(atomic.Int64)
	down := func() string {
		return script(t, func(_ string, ss grpc.ServerStream) error {
			if asked.Add(1)%2 == 0 { // it is the server that ends the call, or grpc-go that sees its end first
				var m []byte
				_ = ss.RecvMsg(&m)
			}
			return status.Error(codes.Unavailable, "the queue is closed")
		})
	}
	g := open(t, several(", retries: 1", down(), down()))
	c := g.client()
	const calls = 400
	for range calls {
		_, err := c.ModelInfer(ctx(t), ask("echo", "a", "hello"))
		expect(t, "the call", err, "Unavailable")
		if got := status.Convert(err).Message(); got != "the queue is closed" {
			t.Errorf("it says %q", got)
		}
	}
	if n := asked.Load(); n > calls+100 || n < calls+40 {
		t.Errorf("%d calls were made for %d", n, calls)
	}
}
