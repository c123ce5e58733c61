package telemetry

import (
	"context"
	"strings"
	"time"

	otelcodes "go.opentelemetry.io/otel/codes"
	semconv "go.opentelemetry.io/otel/semconv/v1.41.0"
	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
)

// Client is a connection for calls that a policy makes itself, such as to a guard
// model: each unary one is a span of the trace in its context, which goes on to the
// server, and is measured as an RPC that was made. They pass no chain. Methods are
// metric labels: only such as the program names itself may be called.
func (p *Policy) Client(cc grpc.ClientConnInterface) grpc.ClientConnInterface {
	return &client{cc, p}
}

type client struct {
	grpc.ClientConnInterface
	*Policy
}

func (c *client) Invoke(ctx context.Context, method string, in, out any, opts ...grpc.CallOption) error {
	began, name := time.Now(), strings.TrimPrefix(method, "/")
	ctx, span := c.tracer.Start(ctx, name, clientKind...)
	md, _ := metadata.FromOutgoingContext(ctx)
	md = md.Copy()
	c.propagator.Inject(ctx, carrier{&md})
	err := c.ClientConnInterface.Invoke(metadata.NewOutgoingContext(ctx, md), method, in, out, opts...)
	code := codeOf(err)
	c.metrics.call(ctx, callKey{name, code, true}, time.Since(began).Seconds())
	if span.IsRecording() {
		span.SetAttributes(rpcSystem, semconv.RPCMethod(name), semconv.RPCResponseStatusCodeKey.String(codeName(code)))
		if isError(code, true) {
			span.SetAttributes(semconv.ErrorTypeKey.String(codeName(code)))
			span.SetStatus(otelcodes.Error, "")
		}
	}
	span.End()
	return err
}
