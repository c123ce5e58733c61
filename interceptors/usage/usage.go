// Package usage writes down every inference, for showback: a line of JSON each, in
// a file that is only appended to, or an OpenTelemetry log record. It says who called,
// the model, tokens, what was charged to which budget, and how it ended; never a prompt
// or an output.
//
// To write never holds an inference up, and never fails one: records wait in a
// queue, and those for which there is no room, or which the disk does not take,
// are lost, counted (sluice.usage.lost) and logged. So it is with the records that
// OpenTelemetry takes: its SDK counts and logs what it loses.
//
// The file may be moved away at any time (as logrotate does): within a second a new
// one is begun in its place. Or it is moved when it has reached a size. It is not
// written through to the disk: what the process had written survives its end, that of
// the machine may cost the last seconds.
package usage

import (
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"strings"
	"time"

	"go.opentelemetry.io/otel"
	otellog "go.opentelemetry.io/otel/log"
	"go.opentelemetry.io/otel/metric"
	"go.opentelemetry.io/otel/trace"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/sluicegate/sluice/interceptors"
	"github.com/sluicegate/sluice/interceptors/dialect"
	"github.com/sluicegate/sluice/interceptors/fields"
	configv1 "github.com/sluicegate/sluice/proto/gen/sluice/config/v1"
)

// Policy is the policy that writes records. It refuses nothing. It must come before
// the policies whose charges it is to see. It is safe for concurrent use.
type Policy struct {
	file   *file          // nil: there is none
	logger otellog.Logger // nil: there is none
}

// Option is something that a policy needs to know beside its configuration.
type Option func(*options)

type options struct {
	loggers otellog.LoggerProvider
	meters  metric.MeterProvider
}

// WithLoggerProvider sets where OpenTelemetry records go. Default: otel.GetLoggerProvider.
func WithLoggerProvider(p otellog.LoggerProvider) Option { return func(o *options) { o.loggers = p } }

// WithMeterProvider sets where metrics go. Default: otel.GetMeterProvider.
func WithMeterProvider(p metric.MeterProvider) Option { return func(o *options) { o.meters = p } }

// scope names what OpenTelemetry gets from here.
const scope = "github.com/sluicegate/sluice/interceptors/usage"

// Open makes a policy that appends to a file, which is made if it is not there, for us
// alone to read, or emits OpenTelemetry records, or both. Close it.
func Open(c *configv1.Usage, log *slog.Logger, opts ...Option) (*Policy, error) {
	var o options
	for _, opt := range opts {
		opt(&o)
	}
	if o.loggers == nil {
		o.loggers = otel.GetLoggerProvider()
	}
	if o.meters == nil {
		o.meters = otel.GetMeterProvider()
	}
	p := new(Policy)
	if c.GetOtlp() {
		p.logger = o.loggers.Logger(scope)
	}
	if c.GetFile() == "" {
		return p, nil
	}
	lost, err := o.meters.Meter(scope).Int64Counter("sluice.usage.lost", metric.WithUnit("{record}"),
		metric.WithDescription("Usage records that the file did not take."))
	if err != nil {
		return nil, err
	}
	p.file, err = openFile(c, log, func(n int64) { lost.Add(context.Background(), n) })
	return p, err
}

// Close writes what is queued; it waits for the disk for 5 seconds at most. All
// inferences must have ended.
func (p *Policy) Close() {
	if p.file != nil {
		p.file.close()
	}
}

// Lost is how many records the file lost so far.
func (p *Policy) Lost() int64 {
	if p.file == nil {
		return 0
	}
	return p.file.lost.Load()
}

// Name is "usage".
func (p *Policy) Name() string { return "usage" }

// Begin has no interest in calls that are no inference.
func (p *Policy) Begin(c *interceptors.Call) (interceptors.CallPolicy, error) {
	if c.Method == nil || c.Method.Kind != dialect.Inference {
		return nil, nil
	}
	return (*call)(p), nil
}

// call is the policy as its part in a call, of which it keeps nothing.
type call Policy

func (c *call) Start(i *interceptors.Inference) (interceptors.InferencePolicy, error) {
	return &inference{to: (*Policy)(c), i: i, began: time.Now()}, nil
}

// Refused writes down what the chain refused before any policy saw it.
func (c *call) Refused(i *interceptors.Inference, d *interceptors.Denial) {
	(&inference{to: (*Policy)(c), i: i, began: time.Now()}).End(interceptors.Outcome{Err: d})
}

func (c *call) End(interceptors.Outcome) {}

// inference is the policy's part in one inference.
type inference struct {
	to      *Policy
	i       *interceptors.Inference
	began   time.Time
	charges []charge
}

// Request has nothing to see: what counts is in the Inference.
func (n *inference) Request(*fields.Message) error { return nil }

// Response has nothing to see either.
func (n *inference) Response(*fields.Message) error { return nil }

// Deaf says so.
func (n *inference) Deaf() bool { return true }

// Observe takes down what a budget charged.
func (n *inference) Observe(e interceptors.Event) {
	if e.Name != "charged" {
		return
	}
	var c charge
	for k := 1; k < len(e.Attributes); k += 2 {
		switch v := e.Attributes[k]; e.Attributes[k-1] {
		case "budget":
			c.Budget = v
		case "unit":
			c.Unit = v
		case "amount":
			c.Amount = json.Number(v)
		case "excess":
			c.Excess = json.Number(v)
		}
	}
	n.charges = append(n.charges, c)
}

// record is a line of the file.
type record struct {
	// Time is when it ended, Seconds how long it took.
	Time      time.Time `json:"time"`
	Seconds   float64   `json:"seconds"`
	TraceID   string    `json:"trace_id,omitempty"`
	Principal string    `json:"principal"`
	Tenant    string    `json:"tenant"`
	Method    string    `json:"method"`
	Model     string    `json:"model"`
	Version   string    `json:"version,omitempty"`
	Backend   string    `json:"backend,omitempty"`
	// Handed says that the model server got it.
	Handed bool `json:"handed"`
	// InputTokens and OutputTokens are our count; the others the model server's, where
	// it reports.
	InputTokens    int64    `json:"input_tokens"`
	OutputTokens   int64    `json:"output_tokens"`
	ReportedInput  int64    `json:"reported_input_tokens,omitempty"`
	ReportedOutput int64    `json:"reported_output_tokens,omitempty"`
	Charges        []charge `json:"charges,omitempty"`
	// Outcome is served, refused, cut, cancelled or failed; Policy and Reason say who
	// refused or cut it, and why.
	Outcome string              `json:"outcome"`
	Policy  string              `json:"policy,omitempty"`
	Reason  interceptors.Reason `json:"reason,omitempty"`
}

// charge is what one budget was charged: tokens, requests, money in the currency of
// the prices, or gpu_time in seconds of one permit. Excess was used beyond the grant
// and not charged.
type charge struct {
	Budget string      `json:"budget"`
	Unit   string      `json:"unit"`
	Amount json.Number `json:"amount"`
	Excess json.Number `json:"excess,omitempty"`
}

// End writes the record.
func (n *inference) End(o interceptors.Outcome) {
	i, now := n.i, time.Now()
	c := i.Call
	r := record{
		Time: now.UTC(), Seconds: now.Sub(n.began).Seconds(),
		Principal: bounded(c.Principal), Tenant: bounded(c.Tenant), Method: bounded(c.FullMethod),
		Model: bounded(i.Model), Version: bounded(i.Version),
		Handed: i.Handed, InputTokens: i.InputTokens, OutputTokens: i.OutputTokens,
		ReportedInput: i.ReportedInput, ReportedOutput: i.ReportedOutput,
		Charges: n.charges, Outcome: outcome(o, i.Handed),
	}
	if i.Backend != nil {
		r.Backend = i.Backend.Name
	}
	if ctx := c.Context(); ctx != nil {
		if s := trace.SpanContextFromContext(ctx); s.HasTraceID() {
			r.TraceID = s.TraceID().String()
		}
	}
	if d := o.Denial(); d != nil {
		r.Policy, r.Reason = d.Policy, d.Reason
	}
	if n.to.file != nil {
		n.to.file.put(r)
	}
	if n.to.logger != nil {
		ctx := c.Context()
		if ctx == nil {
			ctx = context.Background()
		}
		n.to.logger.Emit(ctx, r.otel())
	}
}

// outcome sums up how an inference ended, as telemetry does.
func outcome(o interceptors.Outcome, handed bool) string {
	switch d := o.Denial(); {
	case o.Err == nil:
		return "served"
	case d != nil && handed:
		return "cut"
	case d != nil:
		return "refused"
	case errors.Is(o.Err, context.Canceled), status.Code(o.Err) == codes.Canceled:
		return "cancelled"
	}
	return "failed"
}

// maxName bounds a name in a record, in bytes, for names may be the caller's choice.
// Chosen: that of the names of budget accounts.
const maxName = 256

// bounded is a copy of a name, cut: it may be part of a large message, which must
// not stay for it.
func bounded(name string) string {
	if len(name) > maxName {
		return strings.ToValidUTF8(name[:maxName-3], "") + "..."
	}
	return strings.Clone(name)
}
