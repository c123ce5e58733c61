package parity_test

import (
	"context"
	"fmt"
	"io"
	"testing"
	"time"

	"google.golang.org/grpc/codes"

	"github.com/sluicegate/sluice/interceptors"
	"github.com/sluicegate/sluice/proto/gen/inference"
)

const twoPools = `
pools:
- {name: a, capacity: 1, queue_length: 8, queue_timeout: 15s, models: [{model: words}]}
- {name: b, capacity: 1, queue_length: 8, queue_timeout: 15s, models: [{model: echo}]}
`

// final receives until an inference has ended, and returns its id and reason.
func final(t *testing.T, s inference.GRPCInferenceService_ModelStreamInferClient) (id, reason string) {
	t.Helper()
	for {
		resp, err := s.Recv()
		if err != nil {
			t.Fatalf("the stream ended: %v", err)
		}
		r := resp.GetInferResponse()
		if resp.GetErrorMessage() != "" {
			return r.GetId(), r.GetParameters()["sluice_reason"].GetStringParam()
		}
		if r.GetModelName() == "echo" || r.GetParameters()["triton_final_response"].GetBoolParam() {
			return r.GetId(), ""
		}
	}
}

func send(t *testing.T, s inference.GRPCInferenceService_ModelStreamInferClient, reqs ...*inference.ModelInferRequest) {
	t.Helper()
	for _, r := range reqs {
		if err := s.Send(r); err != nil {
			t.Fatal(err)
		}
	}
}

func end(t *testing.T, s inference.GRPCInferenceService_ModelStreamInferClient) {
	t.Helper()
	_ = s.CloseSend()
	for {
		if _, err := s.Recv(); err == io.EOF {
			return
		} else if err != nil {
			t.Fatal(err)
		}
	}
}

func TestAFullPoolHoldsUpNoOther(t *testing.T) {
	for door, open := range doors {
		t.Run(door, func(t *testing.T) {
			t.Parallel()
			w := open(t, base+twoPools)
			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
			defer cancel()
			c := w.client("/acme/app")
			release := w.occupied(ctx, t, c)
			s, err := c.ModelStreamInfer(ctx)
			if err != nil {
				t.Fatal(err)
			}
			ask := param("triton_enable_empty_final_response", true)
			send(t, s, request("words", "waits", prompt("one"), ask), request("echo", "goes", prompt("two")),
				request("nonsense", "refused", prompt("three")), request("echo", "too", prompt("four")))
			ended := map[string]string{}
			for range 3 {
				id, reason := final(t, s)
				ended[id] = reason
			}
			if len(ended) != 3 || ended["goes"] != "" || ended["too"] != "" || ended["refused"] != "MODEL_DENIED" {
				t.Errorf("ended %v while the pool of the first was full", ended)
			}
			release()
			if id, reason := final(t, s); id != "waits" || reason != "" {
				t.Errorf("then %s %s, want the one that waited", id, reason)
			}
			end(t, s)
			w.quiet()
		})
	}
}

func TestStreamsWithCrossedPoolsFinish(t *testing.T) {
	for door, open := range doors {
		t.Run(door, func(t *testing.T) {
			t.Parallel()
			w := open(t, base+twoPools)
			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
			defer cancel()
			c := w.client("/acme/app")
			first := []*inference.ModelInferRequest{
				request("words", "1", prompt(words(3)), param("delay_ms", 5)), request("echo", "2", prompt("x"), param("delay_ms", 5))}
			second := []*inference.ModelInferRequest{first[1], first[0]}
			results := make(chan map[string]outcome, 8)
			for n := range cap(results) {
				reqs := first
				if n%2 == 1 {
					reqs = second
				}
				go func() { results <- converse(ctx, t, c, reqs...) }()
			}
			for range cap(results) {
				got := <-results
				if got["1"].Text != words(3) || got["2"].Text != "x" || got["stream"].Code != codes.OK {
					t.Errorf("got %+v", got)
				}
			}
			w.quiet()
		})
	}
}

func TestACallerThatGoesAwayWhileWaitingLeavesNothing(t *testing.T) {
	for door, open := range doors {
		t.Run(door, func(t *testing.T) {
			t.Parallel()
			w := open(t, base+twoPools+"budgets: [{name: all, tokens: 100000}]\n")
			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
			defer cancel()
			c := w.client("/acme/app")
			release := w.occupied(ctx, t, c)
			waiting, leave := context.WithCancel(ctx)
			s, err := c.ModelStreamInfer(waiting)
			if err != nil {
				t.Fatal(err)
			}
			send(t, s, request("words", "1", prompt("one")), request("words", "2", prompt("two")))
			for w.guard().Pools().Snapshot()[0].Waiting < 2 {
				pause()
			}
			seen := w.model.Seen()
			leave()
			for w.guard().Pools().Snapshot()[0].Waiting > 0 {
				pause()
			}
			release()
			w.quiet()
			if n := w.model.Seen(); n != seen {
				t.Errorf("%d inferences of a caller that has gone reached the model", n-seen)
			}
		})
	}
}

func TestErrorsInBandAreMasked(t *testing.T) {
	for _, masked := range []bool{false, true} {
		for door, open := range doors {
			t.Run(fmt.Sprintf("%s, masked %v", door, masked), func(t *testing.T) {
				t.Parallel()
				w := open(t, base+fmt.Sprintf("  mask_errors: %v\n", masked))
				ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
				defer cancel()
				s, err := w.client("/acme/app").ModelStreamInfer(ctx)
				if err != nil {
					t.Fatal(err)
				}
				for _, id := range []string{"", "mine"} { // without its input the model fails
					send(t, s, request("words", id))
					resp, err := s.Recv()
					if err != nil {
						t.Fatal(err)
					}
					text := resp.GetErrorMessage()
					if text == "" || (text == interceptors.MaskedError) != masked {
						t.Errorf("error_message %q", text)
					}
					if got := resp.GetInferResponse().GetId(); got != id {
						t.Errorf("id %q, want %q", got, id)
					}
				}
				end(t, s)
				w.quiet()
			})
		}
	}
}
