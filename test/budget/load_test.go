//go:build unix

package budget

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/sluicegate/sluice/proto/gen/inference"
)

// amount is what each team may spend.
const amount = 20_000

// load is callers that use up the budget of one team after the other.
type load struct {
	t         *testing.T
	addresses []string

	team      atomic.Int64
	refusals  atomic.Int64 // on end
	mu        sync.Mutex
	delivered map[string]int64 // tokens that callers have in hand, by team
	counts    map[string]int   // of what became of inferences
}

// start makes so many callers work until the context ends.
func (l *load) start(ctx context.Context, callers int) (wait func()) {
	l.delivered, l.counts = map[string]int64{}, map[string]int{}
	var all sync.WaitGroup
	for n := range callers {
		all.Go(func() {
			r := rand.New(rand.NewPCG(uint64(n), 1))
			for ctx.Err() == nil {
				l.caller(ctx, r)
			}
		})
	}
	return all.Wait
}

// caller is one connection, and some streams over it; it may end in a crash.
func (l *load) caller(ctx context.Context, r *rand.Rand) {
	var sockets []net.Conn
	dial := func(ctx context.Context, address string) (net.Conn, error) {
		c, err := new(net.Dialer).DialContext(ctx, "tcp", address)
		if err == nil {
			sockets = append(sockets, c)
		}
		return c, err
	}
	conn, err := grpc.NewClient("passthrough:///"+l.addresses[r.IntN(len(l.addresses))],
		grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithContextDialer(dial), grpc.WithDisableRetry())
	if err != nil {
		l.t.Error(err)
		return
	}
	defer conn.Close()
	for range 20 {
		if ctx.Err() != nil {
			return
		}
		team := fmt.Sprint("team-", l.team.Load())
		words := 5 + r.IntN(40)
		stop, crash := 0, false
		switch r.IntN(10) {
		case 0, 1:
			stop = 1 + r.IntN(words) // the caller goes away
		case 2:
			stop, crash = 1+r.IntN(words), true // its machine does
		}
		heard, outcome := stream(ctx, conn, team, words, stop, int64(r.IntN(2)*words), int64(r.IntN(2)), func() {
			if crash {
				for _, c := range sockets {
					if tcp, ok := c.(*net.TCPConn); ok {
						_ = tcp.SetLinger(0) // RST, as of a process that is no more
					}
					_ = c.Close()
				}
			}
		})
		l.count(team, words, heard, outcome)
		if crash {
			return
		}
		if outcome == "UNAVAILABLE" || outcome == "POLICY_UNAVAILABLE" {
			pause(ctx, 10*time.Millisecond)
		}
	}
}

func pause(ctx context.Context, d time.Duration) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
	case <-timer.C:
	}
}

// count notes what came of an inference. Its input counts as delivered if any answer
// came. A team whose budget is used up is followed by the next.
func (l *load) count(team string, words, heard int, outcome string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.counts[outcome]++
	if heard > 0 {
		l.delivered[team] += int64(words + heard)
	}
	switch outcome {
	case "BUDGET_EXHAUSTED":
		if l.refusals.Add(1) > 40 {
			l.refusals.Store(0)
			l.team.Add(1)
		}
	case "served", "cancelled", "crashed":
		l.refusals.Store(0)
	}
}

// stream is one inference: as many words as the prompt has are said to it, each one
// token. It says how many were heard, and what became of it. After stop words, if that
// is not 0, gone is called and the caller goes away.
func stream(ctx context.Context, conn *grpc.ClientConn, team string, words, stop int, limit, delay int64, gone func()) (heard int, outcome string) {
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	s, err := inference.NewGRPCInferenceServiceClient(conn).ModelStreamInfer(metadata.AppendToOutgoingContext(ctx, "x-team", team))
	if err != nil {
		return 0, reasonOf(err)
	}
	number := func(n int64) *inference.InferParameter {
		return &inference.InferParameter{ParameterChoice: &inference.InferParameter_Int64Param{Int64Param: n}}
	}
	m := request("words", strings.Repeat("tok ", words))
	m.Parameters = map[string]*inference.InferParameter{"delay_ms": number(delay)}
	if limit > 0 {
		m.Parameters["max_tokens"] = number(limit)
	}
	if err := s.Send(m); err == nil {
		_ = s.CloseSend()
	}
	for {
		r, err := s.Recv()
		if err != nil {
			return heard, reasonOf(err)
		}
		if text := r.GetErrorMessage(); text != "" {
			reason, _, _ := strings.Cut(text, ":")
			return heard, reason
		}
		if heard++; heard == stop {
			gone()
			cancel()
			return heard, "cancelled"
		}
	}
}

// reasonOf is why a stream ended: "served", one of our reasons, or a code.
func reasonOf(err error) string {
	if err.Error() == "EOF" {
		return "served"
	}
	st := status.Convert(err)
	if reason, _, ok := strings.Cut(st.Message(), ":"); ok && strings.ToUpper(reason) == reason {
		return reason
	}
	if st.Code() == codes.Unavailable {
		return "UNAVAILABLE"
	}
	return st.Code().String()
}

func request(model, text string) *inference.ModelInferRequest {
	return &inference.ModelInferRequest{ModelName: model, Id: "1", Inputs: []*inference.ModelInferRequest_InferInputTensor{{
		Name: "text_input", Datatype: "BYTES", Shape: []int64{1},
		Contents: &inference.InferTensorContents{BytesContents: [][]byte{[]byte(text)}},
	}}}
}

// spent is what became of the budgets: teams that used theirs up, all that callers got,
// and by how much the worst was exceeded and all together.
func (l *load) spent() (teams int, all, worst, over int64) {
	for _, n := range l.delivered {
		all += n
		worst = max(worst, n-amount)
		over += max(0, n-amount)
	}
	return int(l.team.Load()), all, worst, over
}
