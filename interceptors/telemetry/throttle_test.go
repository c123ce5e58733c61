package telemetry

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/sluicegate/sluice/interceptors"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// warnings are the records of the log, each as its reason (or its code) and,
// after a "+", how many were suppressed before it.
func (s *seen) warnings(t *testing.T) (out []string) {
	t.Helper()
	for line := range strings.Lines(s.log.String()) {
		var r struct {
			Level, Reason, Code string
			Suppressed          int64
		}
		if err := json.Unmarshal([]byte(line), &r); err != nil {
			t.Fatal(err)
		}
		if r.Level != "WARN" {
			continue
		}
		what := r.Reason
		if what == "" {
			what = r.Code
		}
		if r.Suppressed > 0 {
			what += fmt.Sprintf("+%d", r.Suppressed)
		}
		out = append(out, what)
	}
	s.log.Reset()
	return out
}

// A flood of refusals is a trickle of log records, and exact in metrics and traces.
func TestFloodIsNotLogged(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := watch()
		other := &stub{}
		chain := interceptors.New([]*interceptors.Backend{backend(t)}, s.policy, other)
		end := func(refuse, fail error) {
			t.Helper()
			other.start = refuse
			call, err := chain.Begin(t.Context(), info(infer, nil))
			if err != nil {
				t.Fatal(err)
			}
			_, err = ask(call, request("llama", "1", "a prompt"))
			if (err != nil) != (refuse != nil) {
				t.Fatal(err)
			}
			call.End(fail)
		}
		full := interceptors.Deny("admit", interceptors.QueueFull, "full")
		late := interceptors.Deny("admit", interceptors.QueueTimeout, "late")
		lost := status.Error(codes.Unavailable, "gone")
		check := func(when, want string) {
			t.Helper()
			if got := strings.Join(s.warnings(t), " "); got != want {
				t.Errorf("%s: %q, want %q", when, got, want)
			}
		}
		times := func(n int, f func()) {
			for range n {
				f()
			}
		}

		times(100, func() { end(full, full) })
		check("a flood", strings.TrimSpace(strings.Repeat("QUEUE_FULL ", warningsPerSecond)))
		end(late, late)
		end(nil, lost)
		check("others in the flood", "QUEUE_TIMEOUT UNAVAILABLE")
		times(50, func() { end(full, full) })
		check("still the same second", "")

		<-time.After(time.Second)
		end(full, full)
		end(full, full)
		check("the next second", "QUEUE_FULL+140 QUEUE_FULL")
		<-time.After(time.Minute)
		times(warningsPerSecond+1, func() { end(nil, lost) })
		check("a flood of failures", strings.TrimSpace(strings.Repeat("UNAVAILABLE ", warningsPerSecond)))
		<-time.After(time.Second - time.Nanosecond)
		end(nil, lost)
		check("a moment too early", "")
		<-time.After(time.Nanosecond)
		end(nil, lost)
		check("on time", "UNAVAILABLE+2")

		for labels, n := range points(t, s.metrics(t)["sluice.denials"]) {
			want := int64(152)
			if strings.Contains(labels, "QUEUE_TIMEOUT") {
				want = 1
			}
			if n != want {
				t.Errorf("%d denials of %s, want %d", n, labels, want)
			}
		}
		verdicts := 0
		for _, sp := range s.spans.Ended() {
			if event(sp, verdictEvent) != nil {
				verdicts++
			}
		}
		if verdicts != 153 {
			t.Errorf("%d verdicts on spans, want 153", verdicts)
		}
	})
}
