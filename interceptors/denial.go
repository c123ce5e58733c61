package interceptors

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/protoadapt"
	"google.golang.org/protobuf/types/known/durationpb"
)

// Domain is the domain of every ErrorInfo that Sluice sends.
const Domain = "sluicegate.github.io"

// Reason says why something was refused. Reasons are stable: clients may
// switch on them.
type Reason string

// The reasons, and the gRPC code that each is sent with.
const (
	IdentityMissing     Reason = "IDENTITY_MISSING"     // UNAUTHENTICATED
	IdentityUntrusted   Reason = "IDENTITY_UNTRUSTED"   // UNAUTHENTICATED
	IdentityExpired     Reason = "IDENTITY_EXPIRED"     // UNAUTHENTICATED
	MethodDenied        Reason = "METHOD_DENIED"        // PERMISSION_DENIED
	ModelDenied         Reason = "MODEL_DENIED"         // PERMISSION_DENIED
	MethodUnknown       Reason = "METHOD_UNKNOWN"       // UNIMPLEMENTED
	MessageMalformed    Reason = "MESSAGE_MALFORMED"    // INVALID_ARGUMENT
	MessageAmbiguous    Reason = "MESSAGE_AMBIGUOUS"    // INVALID_ARGUMENT
	MessageTooLarge     Reason = "MESSAGE_TOO_LARGE"    // RESOURCE_EXHAUSTED
	MessageTimeout      Reason = "MESSAGE_TIMEOUT"      // DEADLINE_EXCEEDED
	Uninspectable       Reason = "UNINSPECTABLE"        // INVALID_ARGUMENT
	EncodingUnsupported Reason = "ENCODING_UNSUPPORTED" // UNIMPLEMENTED
	PromptRejected      Reason = "PROMPT_REJECTED"      // PERMISSION_DENIED
	OutputRejected      Reason = "OUTPUT_REJECTED"      // PERMISSION_DENIED
	RateExceeded        Reason = "RATE_EXCEEDED"        // RESOURCE_EXHAUSTED
	BudgetExhausted     Reason = "BUDGET_EXHAUSTED"     // RESOURCE_EXHAUSTED
	BudgetCut           Reason = "BUDGET_CUT"           // RESOURCE_EXHAUSTED
	ConcurrencyLimit    Reason = "CONCURRENCY_LIMIT"    // RESOURCE_EXHAUSTED
	QueueFull           Reason = "QUEUE_FULL"           // RESOURCE_EXHAUSTED
	QueueTimeout        Reason = "QUEUE_TIMEOUT"        // RESOURCE_EXHAUSTED
	DeadlineUnreachable Reason = "DEADLINE_UNREACHABLE" // DEADLINE_EXCEEDED
	PolicyUnavailable   Reason = "POLICY_UNAVAILABLE"   // UNAVAILABLE
	Draining            Reason = "DRAINING"             // UNAVAILABLE
	UpstreamLost        Reason = "UPSTREAM_LOST"        // UNAVAILABLE
	SequenceLost        Reason = "SEQUENCE_LOST"        // UNAVAILABLE
	RouteConflict       Reason = "ROUTE_CONFLICT"       // INVALID_ARGUMENT
	UpstreamInvalid     Reason = "UPSTREAM_INVALID"     // INTERNAL
	Internal            Reason = "INTERNAL"             // INTERNAL
)

var reasonCodes = map[Reason]codes.Code{
	IdentityMissing:     codes.Unauthenticated,
	IdentityUntrusted:   codes.Unauthenticated,
	IdentityExpired:     codes.Unauthenticated,
	MethodDenied:        codes.PermissionDenied,
	ModelDenied:         codes.PermissionDenied,
	MethodUnknown:       codes.Unimplemented,
	MessageMalformed:    codes.InvalidArgument,
	MessageAmbiguous:    codes.InvalidArgument,
	MessageTooLarge:     codes.ResourceExhausted,
	MessageTimeout:      codes.DeadlineExceeded,
	Uninspectable:       codes.InvalidArgument,
	EncodingUnsupported: codes.Unimplemented,
	PromptRejected:      codes.PermissionDenied,
	OutputRejected:      codes.PermissionDenied,
	RateExceeded:        codes.ResourceExhausted,
	BudgetExhausted:     codes.ResourceExhausted,
	BudgetCut:           codes.ResourceExhausted,
	ConcurrencyLimit:    codes.ResourceExhausted,
	QueueFull:           codes.ResourceExhausted,
	QueueTimeout:        codes.ResourceExhausted,
	DeadlineUnreachable: codes.DeadlineExceeded,
	PolicyUnavailable:   codes.Unavailable,
	Draining:            codes.Unavailable,
	UpstreamLost:        codes.Unavailable,
	SequenceLost:        codes.Unavailable,
	RouteConflict:       codes.InvalidArgument,
	UpstreamInvalid:     codes.Internal,
	Internal:            codes.Internal,
}

// Code is the gRPC code that the reason is sent with.
func (r Reason) Code() codes.Code {
	if c, ok := reasonCodes[r]; ok {
		return c
	}
	return codes.Internal
}

// NoRetry as Denial.RetryAfter tells clients that a retry cannot help.
const NoRetry time.Duration = -1

// Denial is a refusal on its way to the caller. It is an error, and grpc-go
// sends it with the status that it holds; so it is never wrapped.
//
// What the caller learns is in Reason, Message and Details. Neither may hold a
// prompt, an output, a rule's pattern or an upstream's address.
type Denial struct {
	// Policy is the name of the policy that refused; "chain" for the chain itself.
	Policy string
	Reason Reason
	// Message says in one sentence what is wrong and how to mend it.
	Message string
	// Metadata goes into ErrorInfo: lowerCamelCase keys, such as "model" or "limit".
	Metadata map[string]string
	// RetryAfter above zero says when a retry can help: it becomes RetryInfo and
	// the pushback trailer. Zero says nothing. NoRetry forbids automatic retries.
	RetryAfter time.Duration
	// Quota is set where a limit on use was reached.
	Quota *Quota
	// Field is the path of the field that is at fault, where one is.
	Field string
	// Cause is for the log, never for the caller.
	Cause error
}

// Quota names the limit that was reached.
type Quota struct {
	// Subject is whose limit it is, such as "tenant:acme".
	Subject string
	// Metric is what is limited, such as "tokens".
	Metric string
	// ID is the configured name of the limit.
	ID string
	// Limit is its value.
	Limit int64
}

// Deny makes a denial.
func Deny(policy string, reason Reason, format string, args ...any) *Denial {
	return &Denial{Policy: policy, Reason: reason, Message: fmt.Sprintf(format, args...)}
}

// NoModel is the denial for a model that no back end serves, and for one that
// the caller may not use: the same, so that models cannot be found by asking.
func NoModel(policy, model string) *Denial {
	return Deny(policy, ModelDenied, "the model does not exist or is not yours to use").With("model", model)
}

// With adds a pair of ErrorInfo metadata and returns the denial.
func (d *Denial) With(key, value string) *Denial {
	if d.Metadata == nil {
		d.Metadata = make(map[string]string, 2)
	}
	d.Metadata[key] = value
	return d
}

// Error says what the caller is told.
func (d *Denial) Error() string { return string(d.Reason) + ": " + bounded(d.Message, maxMessage) }

// Unwrap is the cause.
func (d *Denial) Unwrap() error { return d.Cause }

// Code is the gRPC code.
func (d *Denial) Code() codes.Code { return d.Reason.Code() }

// maxMetadata and maxMessage bound, in bytes, what a status says, so that it
// stays under the 8 KiB of headers that peers commonly accept: names in it may
// be the caller's, and as long as it likes.
const (
	maxMetadata = 256
	maxMessage  = 512
)

// bounded is s, cut to a length, as the UTF-8 that protobuf wants.
func bounded(s string, n int) string {
	if len(s) > n {
		for n > 0 && !utf8.RuneStart(s[n]) {
			n--
		}
		s = s[:n]
	}
	return strings.ToValidUTF8(s, "\uFFFD")
}

// GRPCStatus is the status with its details: ErrorInfo always; RetryInfo,
// QuotaFailure and BadRequest where they apply.
func (d *Denial) GRPCStatus() *status.Status {
	info := &errdetails.ErrorInfo{Reason: string(d.Reason), Domain: Domain}
	if len(d.Metadata) > 0 {
		info.Metadata = make(map[string]string, len(d.Metadata))
		for k, v := range d.Metadata {
			info.Metadata[k] = bounded(v, maxMetadata)
		}
	}
	message := bounded(d.Message, maxMessage)
	details := []protoadapt.MessageV1{info}
	if d.Field != "" {
		details = append(details, &errdetails.BadRequest{FieldViolations: []*errdetails.BadRequest_FieldViolation{
			{Field: bounded(d.Field, maxMetadata), Description: message, Reason: string(d.Reason)},
		}})
	}
	if q := d.Quota; q != nil {
		details = append(details, &errdetails.QuotaFailure{Violations: []*errdetails.QuotaFailure_Violation{{
			Subject: bounded(q.Subject, maxMetadata), Description: message, ApiService: Domain,
			QuotaMetric: q.Metric, QuotaId: bounded(q.ID, maxMetadata), QuotaValue: q.Limit,
		}}})
	}
	if d.RetryAfter > 0 {
		details = append(details, &errdetails.RetryInfo{RetryDelay: durationpb.New(d.RetryAfter)})
	}
	st := status.New(d.Code(), d.Error())
	if with, err := st.WithDetails(details...); err == nil {
		return with
	}
	return st
}

// Trailer is the metadata that goes with the status: the pushback that
// automatic retries obey. It is nil where there is none.
func (d *Denial) Trailer() metadata.MD {
	switch {
	case d.RetryAfter > 0:
		ms := (d.RetryAfter + time.Millisecond - 1) / time.Millisecond
		return metadata.Pairs("grpc-retry-pushback-ms", strconv.FormatInt(int64(ms), 10))
	case d.RetryAfter < 0:
		return metadata.Pairs("grpc-retry-pushback-ms", "-1")
	}
	return nil
}

// asDenial makes a policy's error a denial: an error that is none is our own bug.
func asDenial(policy string, err error) *Denial {
	var d *Denial
	if errors.As(err, &d) {
		if d.Policy == "" {
			named := *d // it may be one that the policy keeps
			named.Policy = policy
			return &named
		}
		return d
	}
	return &Denial{Policy: policy, Reason: Internal, Message: "the " + policy + " policy failed", Cause: err}
}

// StatusOf makes any error that ends a call the error to hand to grpc-go: a
// denial and a status stay what they are, a context error gets its code.
func StatusOf(err error) error {
	var d *Denial
	switch {
	case err == nil, errors.Is(err, ErrServed):
		return nil
	case errors.As(err, &d):
		return d
	case errors.Is(err, context.DeadlineExceeded):
		return status.Error(codes.DeadlineExceeded, "the deadline passed")
	case errors.Is(err, context.Canceled):
		return status.Error(codes.Canceled, "the caller cancelled")
	}
	if s, ok := status.FromError(err); ok {
		return s.Err()
	}
	return Deny("chain", Internal, "the call failed inside the gateway")
}
