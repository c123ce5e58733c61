package usage

import (
	"go.opentelemetry.io/otel/attribute"
	otellog "go.opentelemetry.io/otel/log"
	semconv "go.opentelemetry.io/otel/semconv/v1.41.0"
)

// eventName is the name of the OpenTelemetry event that a record is.
const eventName = "sluice.usage"

// otel is the record as OpenTelemetry has it. Amounts are decimal texts, as in the file
// they are decimal numbers: no float holds them all.
func (r *record) otel() (out otellog.Record) {
	out.SetEventName(eventName)
	out.SetTimestamp(r.Time)
	out.SetSeverity(otellog.SeverityInfo)
	out.AddAttributes(
		attribute.Float64("sluice.seconds", r.Seconds),
		attribute.String("sluice.principal", r.Principal),
		attribute.String("sluice.tenant", r.Tenant),
		semconv.RPCMethod(r.Method),
		semconv.GenAIRequestModel(r.Model),
		semconv.GenAIUsageInputTokens(int(r.InputTokens)),
		semconv.GenAIUsageOutputTokens(int(r.OutputTokens)),
		attribute.Bool("sluice.handed", r.Handed),
		attribute.String("sluice.outcome", r.Outcome),
	)
	for _, a := range []struct{ key, text string }{
		{"sluice.version", r.Version}, {"sluice.backend", r.Backend}, {"sluice.policy", r.Policy}, {"sluice.reason", string(r.Reason)},
	} {
		if a.text != "" {
			out.AddAttributes(attribute.String(a.key, a.text))
		}
	}
	if r.ReportedInput > 0 || r.ReportedOutput > 0 {
		out.AddAttributes(attribute.Int64("sluice.reported.input_tokens", r.ReportedInput),
			attribute.Int64("sluice.reported.output_tokens", r.ReportedOutput))
	}
	if len(r.Charges) > 0 {
		charges := make([]attribute.Value, len(r.Charges))
		for n, c := range r.Charges {
			pairs := []attribute.KeyValue{attribute.String("budget", c.Budget), attribute.String("unit", c.Unit), attribute.String("amount", c.Amount.String())}
			if c.Excess != "" {
				pairs = append(pairs, attribute.String("excess", c.Excess.String()))
			}
			charges[n] = attribute.MapValue(pairs...)
		}
		out.AddAttributes(attribute.Slice("sluice.charges", charges...))
	}
	return out
}
