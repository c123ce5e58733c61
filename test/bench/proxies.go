package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"path/filepath"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"go.opentelemetry.io/otel/propagation"
	sdkmetric "go.opentelemetry.io/otel/sdk/metric"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/trace"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/encoding/proto"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/metadata"

	"github.com/sluicegate/sluice/gateway"
	"github.com/sluicegate/sluice/interceptors/config"
	"github.com/sluicegate/sluice/interceptors/identity"
	"github.com/sluicegate/sluice/interceptors/telemetry"
	"github.com/sluicegate/sluice/internal/heapfloor"
	configv1 "github.com/sluicegate/sluice/proto/gen/sluice/config/v1"
)

const trustDomain = "bench.test"

// writeIdentities writes certificates for the proxies, and returns the identity
// of the client.
func writeIdentities(dir string) (*identity.Source, error) {
	a, err := identity.NewAuthority(spiffeid.RequireTrustDomainFromString(trustDomain))
	if err != nil {
		return nil, err
	}
	svid, err := a.Issue("/gateway", 24*time.Hour, "127.0.0.1")
	if err != nil {
		return nil, err
	}
	if err := a.WriteFiles(dir, "gateway", svid); err != nil {
		return nil, err
	}
	return a.Source("/client")
}

// identityOf is the configuration of a proxy's identity; certs is the folder of
// writeIdentities, or empty for plaintext.
func identityOf(certs string) *configv1.Identity {
	who, c := "anonymous", &configv1.Identity{Source: &configv1.Identity_Insecure{Insecure: &configv1.Insecure{}}}
	if certs != "" {
		who = "spiffe://" + trustDomain + "/client"
		c.Source = &configv1.Identity_Files{Files: &configv1.IdentityFiles{
			Certificate: filepath.Join(certs, "gateway.pem"),
			Key:         filepath.Join(certs, "gateway-key.pem"),
			Bundle:      filepath.Join(certs, "bundle.pem"),
		}}
	}
	c.Rules = []*configv1.Rule{{Principals: []string{who}, Methods: []string{"inference"}, Models: []string{"*"}}}
	return c
}

// serveGateway is Sluice with every policy on, as the program sets its telemetry up;
// one trace in a hundred is sampled.
func serveGateway(l net.Listener, backend, certs string, responses bool) (stop func(), err error) {
	cfg, err := everything(backend, certs, responses)
	if err != nil {
		return nil, err
	}
	o := configOptions()
	g, err := gateway.New(cfg, o)
	if err != nil {
		return nil, err
	}
	done, usual := make(chan struct{}), heapfloor.Set(gateway.HeapFloor)
	go func() { defer close(done); _ = g.Serve(l) }()
	return func() { g.Shutdown(); <-done; usual() }, nil
}

const policies = `
listener: {address: "127.0.0.1:0", max_resets: 100000, drain_timeout: 1s}
identity: {insecure: {}, rules: [{principals: [anonymous], methods: [inference], models: ["*"]}]}
backends: [{name: model, address: "%s", dialect: DIALECT_TRITON, plaintext: true}]
inspect: {responses: %v}
budgets: [{name: tenant, per: [BUDGET_KEY_TENANT], tokens: 1000000000000}]
pools: [{name: gpu, capacity: 1000, models: [{model: "*"}]}]
messages: {max_bytes: %d}
`

// everything is a configuration with every policy.
func everything(backend, certs string, responses bool) (*configv1.Config, error) {
	cfg, err := config.Parse("bench.yaml", fmt.Appendf(nil, policies, backend, responses, maxMessage))
	if err != nil {
		return nil, err
	}
	cfg.Identity = identityOf(certs)
	return cfg, nil
}

func configOptions() config.Options {
	root := sdktrace.TraceIDRatioBased(0.01)
	tracer := sdktrace.NewTracerProvider(sdktrace.WithSampler(sdktrace.ParentBased(root)), sdktrace.WithBatcher(noSpans{}))
	sampled := func(parent trace.SpanContext, id trace.TraceID) bool {
		if parent.IsValid() {
			return parent.IsSampled()
		}
		p := sdktrace.SamplingParameters{ParentContext: context.Background(), TraceID: id}
		return root.ShouldSample(p).Decision == sdktrace.RecordAndSample
	}
	meter := sdkmetric.NewMeterProvider(sdkmetric.WithReader(sdkmetric.NewManualReader()))
	return config.Options{
		Logger: slog.New(slog.NewJSONHandler(io.Discard, nil)),
		Telemetry: []telemetry.Option{
			telemetry.WithTracerProvider(tracer), telemetry.WithSampler(sampled),
			telemetry.WithMeterProvider(meter), telemetry.WithPropagator(propagation.TraceContext{}),
		},
	}
}

// noSpans takes spans nowhere.
type noSpans struct{}

func (noSpans) ExportSpans(context.Context, []sdktrace.ReadOnlySpan) error { return nil }
func (noSpans) Shutdown(context.Context) error                             { return nil }

// frame is a message of the pass-through, as it came.
type frame struct{ data mem.BufferSlice }

type frameCodec struct{}

func (frameCodec) Name() string { return proto.Name }

func (frameCodec) Marshal(v any) (mem.BufferSlice, error) { return v.(*frame).data, nil }

func (frameCodec) Unmarshal(d mem.BufferSlice, v any) error {
	d.Ref()
	v.(*frame).data = d
	return nil
}

// The gateway's own: flow-control windows, of everybody, and workers.
const (
	streamWindow  = 1 << 20
	connWindow    = 16 << 20
	streamWorkers = 64
)

// servePassThrough is the least that a grpc-go proxy does: it looks at nothing.
func servePassThrough(l net.Listener, backend, certs string) (stop func(), err error) {
	return passThroughWith(l, backend, certs)
}

// serveTuned is the same, with what makes the gateway faster beside its own code: workers,
// and less work for the garbage collector.
func serveTuned(l net.Listener, backend, certs string) (stop func(), err error) {
	usual := heapfloor.Set(gateway.HeapFloor)
	halt, err := passThroughWith(l, backend, certs, grpc.NumStreamWorkers(streamWorkers))
	if err != nil {
		usual()
		return nil, err
	}
	return func() { halt(); usual() }, nil
}

func passThroughWith(l net.Listener, backend, certs string, options ...grpc.ServerOption) (stop func(), err error) {
	conn, err := grpc.NewClient(backend,
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.ForceCodecV2(frameCodec{}),
			grpc.MaxCallRecvMsgSize(maxMessage), grpc.MaxCallSendMsgSize(maxMessage)),
		grpc.WithStaticStreamWindowSize(streamWindow), grpc.WithStaticConnWindowSize(connWindow))
	if err != nil {
		return nil, err
	}
	creds, done := insecure.NewCredentials(), func() error { return nil }
	if certs != "" {
		var source *identity.Source
		if source, err = identity.Open(context.Background(), identityOf(certs), nil); err != nil {
			return nil, err
		}
		creds, done = identity.ServerCredentials(source, nil), source.Close
	}
	s := grpc.NewServer(append(options, grpc.Creds(creds), grpc.ForceServerCodecV2(frameCodec{}),
		grpc.UnknownServiceHandler(func(_ any, ss grpc.ServerStream) error { return passThrough(conn, ss) }),
		grpc.MaxRecvMsgSize(maxMessage), grpc.MaxSendMsgSize(maxMessage),
		grpc.StaticStreamWindowSize(streamWindow), grpc.StaticConnWindowSize(connWindow))...)
	halt := serve(s, l)
	return func() { halt(); _ = conn.Close(); _ = done() }, nil
}

func passThrough(conn *grpc.ClientConn, ss grpc.ServerStream) error {
	method, _ := grpc.MethodFromServerStream(ss)
	md, _ := metadata.FromIncomingContext(ss.Context())
	ctx, cancel := context.WithCancel(metadata.NewOutgoingContext(ss.Context(), md))
	defer cancel()
	cs, err := conn.NewStream(ctx, &grpc.StreamDesc{ClientStreams: true, ServerStreams: true}, method)
	if err != nil {
		return err
	}
	go func() {
		for {
			var f frame
			if ss.RecvMsg(&f) != nil {
				_ = cs.CloseSend()
				return
			}
			if cs.SendMsg(&f) != nil {
				return
			}
		}
	}()
	for {
		var f frame
		if err := cs.RecvMsg(&f); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return err
		}
		if err := ss.SendMsg(&f); err != nil {
			return err
		}
	}
}

// clientCredentials are plaintext without an identity.
func clientCredentials(source *identity.Source) credentials.TransportCredentials {
	if source == nil {
		return insecure.NewCredentials()
	}
	return identity.ClientCredentials(source, spiffeid.MatchAny(), nil)
}
