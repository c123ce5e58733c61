package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"google.golang.org/grpc"

	"github.com/sluicegate/sluice/interceptors/config"
	"github.com/sluicegate/sluice/proto/gen/inference"
	configv1 "github.com/sluicegate/sluice/proto/gen/sluice/config/v1"
	"github.com/sluicegate/sluice/test/model"
)

// modelCommand runs the small model server until SIGINT or SIGTERM.
func modelCommand(args []string, stdout, stderr io.Writer) int {
	flags := newFlags("model", "[--listen ADDR] [--cert FILE --key FILE --bundle FILE | --workload-api ADDR] [--allow SPIFFE_ID]", stderr,
		"Runs a small model server that speaks the Open Inference Protocol as Triton does. Its models: words (streams\n"+
			"the prompt, a word at a time), echo and sum. With an identity, from the three files or from a SPIFFE Workload\n"+
			"API, it speaks mutual TLS, and only the callers of --allow may call; without one plaintext, and anyone may.")
	listen := flags.String("listen", "127.0.0.1:8001", "host:port; port 0 takes a free one")
	cert := flags.String("cert", "", "X.509-SVID, a PEM file")
	key := flags.String("key", "", "its private key, a PEM file")
	bundle := flags.String("bundle", "", "the authorities of the trust domain, a PEM file")
	api := flags.String("workload-api", "", "SPIFFE Workload API, such as unix:///run/spire/agent.sock")
	allow := flags.String("allow", "", "SPIFFE IDs that may call, separated by commas; a last segment ** stands for any")
	delay := flags.Duration("delay", 20*time.Millisecond, "how long a word takes, for requests without delay_ms")
	if code, ok := parse(flags, args, 0); !ok {
		return code
	}
	cfg, err := modelConfig(*cert, *key, *bundle, *api, *allow)
	if err != nil {
		return usageError(stderr, "model", "%v", err)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := serveModel(ctx, cfg, *listen, *delay, stdout); err != nil {
		return fail(stderr, "model", err)
	}
	return 0
}

// modelConfig is the configuration of the chain that is linked into the model
// server: identity and telemetry.
func modelConfig(cert, key, bundle, api, allow string) (*configv1.Config, error) {
	rule := &configv1.Rule{Methods: []string{"inference", "metadata", "health"}, Models: []string{"*"}}
	cfg := &configv1.Config{
		Identity: &configv1.Identity{Rules: []*configv1.Rule{rule}},
		Backends: []*configv1.Backend{{Name: "model", Dialect: configv1.Dialect_DIALECT_TRITON}},
	}
	switch files := cert != "" && key != "" && bundle != ""; {
	case !files && cert+key+bundle != "":
		return nil, errors.New("--cert, --key and --bundle go together")
	case files && api != "":
		return nil, errors.New("--workload-api is there instead of --cert, --key and --bundle: leave one out")
	case (files || api != "") != (allow != ""):
		return nil, errors.New("an identity and --allow go together: say who we are, and who may call, such as spiffe://example.org/gateway")
	case files:
		cfg.Identity.Source = &configv1.Identity_Files{Files: &configv1.IdentityFiles{Certificate: cert, Key: key, Bundle: bundle}}
	case api != "":
		cfg.Identity.Source = &configv1.Identity_WorkloadApi{WorkloadApi: &configv1.WorkloadAPI{Socket: api}}
	default:
		cfg.Identity.Source = &configv1.Identity_Insecure{Insecure: &configv1.Insecure{}}
		allow = "anonymous"
	}
	rule.Principals = strings.Split(allow, ",")
	return cfg, nil
}

// serveModel serves until the context ends.
func serveModel(ctx context.Context, cfg *configv1.Config, listen string, delay time.Duration, stdout io.Writer) error {
	guard, err := config.Build(cfg, nil, config.Options{Context: ctx})
	if err != nil {
		return err
	}
	defer guard.Close()
	l, err := net.Listen("tcp", listen)
	if err != nil {
		return err
	}
	server := grpc.NewServer(guard.ServerOptions()...)
	inference.RegisterGRPCInferenceServiceServer(server, model.New(model.Options{Delay: delay}))
	defer context.AfterFunc(ctx, server.Stop)()
	fmt.Fprintf(stdout, "sluice: model server on %s\n", l.Addr())
	if err := server.Serve(l); !errors.Is(err, grpc.ErrServerStopped) {
		return err
	}
	return nil
}
