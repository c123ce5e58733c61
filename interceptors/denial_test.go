package interceptors

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
)

// table is the refusal table of the design: what clients may switch on.
var table = map[codes.Code][]Reason{
	codes.Unauthenticated:   {IdentityMissing, IdentityUntrusted, IdentityExpired},
	codes.PermissionDenied:  {MethodDenied, ModelDenied, PromptRejected, OutputRejected},
	codes.Unimplemented:     {MethodUnknown, EncodingUnsupported},
	codes.InvalidArgument:   {MessageMalformed, MessageAmbiguous, Uninspectable, RouteConflict},
	codes.ResourceExhausted: {MessageTooLarge, RateExceeded, BudgetExhausted, BudgetCut, ConcurrencyLimit, QueueFull, QueueTimeout},
	codes.DeadlineExceeded:  {DeadlineUnreachable, MessageTimeout},
	codes.Unavailable:       {PolicyUnavailable, Draining, UpstreamLost, SequenceLost},
	codes.Internal:          {Internal, UpstreamInvalid, "NO_SUCH_REASON"},
}

func TestEveryReasonHasItsCodeAndDetails(t *testing.T) {
	listed := 0
	for code, reasons := range table {
		for _, reason := range reasons {
			t.Run(string(reason), func(t *testing.T) {
				d := Deny("p", reason, "what is wrong").With("model", "m")
				d.RetryAfter = 1500 * time.Microsecond
				d.Field = "inputs.TEXT"
				d.Quota = &Quota{Subject: "tenant:acme", Metric: "tokens", ID: "daily", Limit: 100}
				d.Cause = errors.New(secret)
				s, ok := status.FromError(fmt.Errorf("wrapped: %w", d))
				if !ok || s.Code() != code || d.Code() != code {
					t.Fatalf("got %v, want %v", s.Code(), code)
				}
				var got []string
				for _, x := range s.Details() {
					switch x := x.(type) {
					case *errdetails.ErrorInfo:
						if x.Reason != string(reason) || x.Domain != "sluicegate.github.io" || x.Metadata["model"] != "m" {
							t.Errorf("got %v", x)
						}
						got = append(got, "info")
					case *errdetails.BadRequest:
						if v := x.FieldViolations[0]; v.Field != "inputs.TEXT" || v.Description != "what is wrong" || v.Reason != string(reason) {
							t.Errorf("got %v", v)
						}
						got = append(got, "request")
					case *errdetails.QuotaFailure:
						if v := x.Violations[0]; v.Subject != "tenant:acme" || v.QuotaMetric != "tokens" || v.QuotaId != "daily" || v.QuotaValue != 100 {
							t.Errorf("got %v", v)
						}
						got = append(got, "quota")
					case *errdetails.RetryInfo:
						if x.RetryDelay.AsDuration() != d.RetryAfter {
							t.Errorf("got %v", x)
						}
						got = append(got, "retry")
					}
				}
				if !slices.Equal(got, []string{"info", "request", "quota", "retry"}) {
					t.Errorf("details %v", got)
				}
				if v := d.Trailer().Get("grpc-retry-pushback-ms"); !slices.Equal(v, []string{"2"}) {
					t.Errorf("pushback %v, want it rounded up", v)
				}
				if strings.Contains(s.Proto().String(), secret) {
					t.Error("the caller learns the cause")
				}
			})
			if reason != "NO_SUCH_REASON" {
				listed++
			}
		}
	}
	if listed != len(reasonCodes) {
		t.Errorf("the table lists %d reasons, there are %d", listed, len(reasonCodes))
	}
}

func TestDetailsAreOnlyThereWhereTheyApply(t *testing.T) {
	d := Deny("p", ModelDenied, "no")
	if s := d.GRPCStatus(); len(s.Details()) != 1 || d.Trailer() != nil {
		t.Errorf("got %v and trailer %v", s.Details(), d.Trailer())
	}
	d.RetryAfter = NoRetry
	if s := d.GRPCStatus(); len(s.Details()) != 1 || !slices.Equal(d.Trailer().Get("grpc-retry-pushback-ms"), []string{"-1"}) {
		t.Errorf("got %v and trailer %v", s.Details(), d.Trailer())
	}
}

// Names in a denial may be the caller's: of any length and, in metadata, any bytes.
func TestAStatusIsSmallAndValidWhateverItNames(t *testing.T) {
	for name, s := range map[string]string{
		"long":          strings.Repeat("x", 1<<20),
		"long, of many": strings.Repeat("日", 1<<20),
		"not UTF-8":     "a\xff\xfeb",
		"all of it not": strings.Repeat("\x80", 1<<20),
	} {
		t.Run(name, func(t *testing.T) {
			d := Deny("p", ModelDenied, "%s", s).With("model", s)
			d.Field, d.Quota = s, &Quota{Subject: s, ID: s}
			st := d.GRPCStatus()
			if len(st.Details()) != 3 {
				t.Errorf("the details are lost: %d", len(st.Details()))
			}
			if n := proto.Size(st.Proto()); n > 4<<10 {
				t.Errorf("the status has %d bytes", n)
			}
			if len(d.Error()) > 1024 {
				t.Errorf("the text has %d bytes", len(d.Error()))
			}
		})
	}
}

func TestAnErrorOfAPolicyThatIsNoDenialSaysNothing(t *testing.T) {
	d := asDenial("budget", errors.New(secret))
	if d.Reason != Internal || d.Policy != "budget" || strings.Contains(d.Error(), secret) || d.Cause == nil {
		t.Errorf("got %#v", d)
	}
	kept := Deny("", QueueFull, "x")
	if named := asDenial("admit", fmt.Errorf("wrapped: %w", kept)); named.Policy != "admit" || named.Reason != QueueFull {
		t.Errorf("got %#v", named)
	}
	if kept.Policy != "" {
		t.Error("the policy's own denial was changed: it may be shared")
	}
}

func TestStatusOf(t *testing.T) {
	for _, c := range []struct {
		name string
		err  error
		code codes.Code
	}{
		{"nothing", nil, codes.OK},
		{"a denial", Deny("p", QueueFull, "x"), codes.ResourceExhausted},
		{"a denial that a context caused", &Denial{Reason: PolicyUnavailable, Cause: context.Canceled}, codes.Unavailable},
		{"a deadline", context.DeadlineExceeded, codes.DeadlineExceeded},
		{"a cancel", fmt.Errorf("read: %w", context.Canceled), codes.Canceled},
		{"a status", status.Error(codes.DataLoss, "x"), codes.DataLoss},
		{"anything else", errors.New(secret), codes.Internal},
	} {
		t.Run(c.name, func(t *testing.T) {
			err := StatusOf(c.err)
			if status.Code(err) != c.code || err != nil && strings.Contains(err.Error(), secret) {
				t.Errorf("got %v, want %v", err, c.code)
			}
		})
	}
}
