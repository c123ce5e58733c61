//go:build linux

package mesh

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"

	"github.com/sluicegate/sluice/proto/gen/inference"
)

// callTimeout bounds a unary call: far more than one needs, so that a call that hangs fails.
const callTimeout = 20 * time.Second

// load makes calls, and keeps count.
type load struct {
	calls, streams, messages atomic.Int64

	work     sync.WaitGroup
	mu       sync.Mutex
	failures []error
}

func (l *load) fail(what string, began time.Time, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.failures = append(l.failures, fmt.Errorf("%s at %s, begun %v before: %w",
		what, time.Now().Format("15:04:05.000"), time.Since(began).Round(time.Millisecond), err))
}

// check waits for the calls that are under way and reports those that failed.
func (l *load) check(t *testing.T) {
	t.Helper()
	l.work.Wait()
	for n, err := range l.failures {
		if n == 10 {
			t.Errorf("and %d more", len(l.failures)-n)
			break
		}
		t.Error(err)
	}
	if l.calls.Load() == 0 {
		t.Error("no call was made")
	}
}

// unary makes so many calls a second until the context ends, some beside each other; the last ones too
// are carried through.
func (l *load) unary(ctx context.Context, conn *grpc.ClientConn, rps int) {
	const callers = 4
	client := inference.NewGRPCInferenceServiceClient(conn)
	for range callers {
		l.work.Go(func() {
			tick := time.NewTicker(callers * time.Second / time.Duration(rps))
			defer tick.Stop()
			for ctx.Err() == nil {
				began := time.Now()
				if err := echo(context.WithoutCancel(ctx), client); err != nil {
					l.fail("a call failed", began, err)
				}
				l.calls.Add(1)
				select {
				case <-ctx.Done():
				case <-tick.C:
				}
			}
		})
	}
}

// stream keeps one stream after the other open, each for so long, over which the model says a word each
// interval. No stream begins once the context has ended; the last one is carried through.
func (l *load) stream(ctx context.Context, conn *grpc.ClientConn, length, interval time.Duration) {
	l.work.Go(func() {
		for ctx.Err() == nil {
			began := time.Now()
			words := int(length / interval)
			heard, err := l.listen(context.WithoutCancel(ctx), conn, words, interval)
			if err == nil && heard == words {
				l.streams.Add(1)
				continue
			}
			l.fail(fmt.Sprintf("a stream broke after %d of %d words", heard, words), began, cmp.Or(err, io.ErrUnexpectedEOF))
		}
	})
}

// listen is one stream. It returns how many words came.
func (l *load) listen(ctx context.Context, conn *grpc.ClientConn, words int, interval time.Duration) (heard int, err error) {
	s, err := speak(ctx, conn, words, interval)
	if err != nil {
		return 0, err
	}
	for {
		m, err := s.Recv()
		switch {
		case errors.Is(err, io.EOF):
			return heard, nil
		case err != nil:
			return heard, err
		case m.GetErrorMessage() != "":
			return heard, errors.New(m.GetErrorMessage())
		}
		heard++
		l.messages.Add(1)
	}
}

// echo makes one call.
func echo(ctx context.Context, client inference.GRPCInferenceServiceClient) error {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	answer, err := client.ModelInfer(ctx, request("echo", "hello"))
	if err != nil {
		return err
	}
	if n := len(answer.GetOutputs()); n != 1 {
		return fmt.Errorf("%d outputs, want 1", n)
	}
	return nil
}

// speak begins a stream on which the model says so many words.
func speak(ctx context.Context, conn *grpc.ClientConn, words int, interval time.Duration) (
	grpc.BidiStreamingClient[inference.ModelInferRequest, inference.ModelStreamInferResponse], error) {
	s, err := inference.NewGRPCInferenceServiceClient(conn).ModelStreamInfer(ctx)
	if err != nil {
		return nil, err
	}
	r := request("words", strings.Repeat("word ", words))
	r.Parameters = map[string]*inference.InferParameter{"delay_ms": {
		ParameterChoice: &inference.InferParameter_Int64Param{Int64Param: interval.Milliseconds()},
	}}
	if err := s.Send(r); err != nil {
		_, err = s.Recv() // says why
		return nil, err
	}
	return s, s.CloseSend()
}

func request(model, text string) *inference.ModelInferRequest {
	return &inference.ModelInferRequest{ModelName: model, Id: "1", Inputs: []*inference.ModelInferRequest_InferInputTensor{{
		Name: "text_input", Datatype: "BYTES", Shape: []int64{1},
		Contents: &inference.InferTensorContents{BytesContents: [][]byte{[]byte(text)}},
	}}}
}
