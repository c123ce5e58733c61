package main

import (
	"context"
	"flag"
	"fmt"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/sluicegate/sluice/interceptors/config"
	"github.com/sluicegate/sluice/interceptors/identity"
	configv1 "github.com/sluicegate/sluice/proto/gen/sluice/config/v1"
)

// adminFlags are the flags of commands that speak with the admin API of a running
// gateway: where it is, and who we are.
type adminFlags struct {
	address, server                      string
	config, certificate, key, bundle, wl string
	timeout                              time.Duration
	json                                 bool
}

// adminSynopsis is what of them is needed.
const adminSynopsis = "--address HOST:PORT (--config FILE | --certificate F --key F --bundle F | --workload-api ADDR) [flags]"

func (a *adminFlags) add(f *flag.FlagSet) {
	f.StringVar(&a.address, "address", "", "the gateway (default: the configuration's listener.address)")
	f.StringVar(&a.server, "server-id", "", "SPIFFE ID that the gateway must prove, or a pattern (default: any of our trust domain)")
	f.StringVar(&a.config, "config", "", "a configuration, whose identity is ours")
	f.StringVar(&a.certificate, "certificate", "", "our X.509-SVID, in PEM")
	f.StringVar(&a.key, "key", "", "its private key")
	f.StringVar(&a.bundle, "bundle", "", "the authorities of our trust domain")
	f.StringVar(&a.wl, "workload-api", "", "a SPIFFE Workload API, such as unix:///run/spire/sockets/agent.sock")
	f.DurationVar(&a.timeout, "timeout", 10*time.Second, "for all of it")
	f.BoolVar(&a.json, "json", false, "print a JSON line for each")
}

// wrong says what is wrong with the flags; "" if nothing is.
func (a *adminFlags) wrong() string {
	sources := 0
	for _, s := range []string{a.config, a.certificate + a.key + a.bundle, a.wl} {
		if s != "" {
			sources++
		}
	}
	switch {
	case sources != 1:
		return "say who we are: --config, or --certificate, --key and --bundle, or --workload-api"
	case a.config == "" && a.wl == "" && (a.certificate == "" || a.key == "" || a.bundle == ""):
		return "--certificate, --key and --bundle go together"
	case a.address == "" && a.config == "":
		return "--address is missing"
	}
	return ""
}

// with has f speak with the gateway.
func (a *adminFlags) with(f func(context.Context, grpc.ClientConnInterface) error) error {
	ctx, cancel := context.WithTimeout(context.Background(), a.timeout)
	defer cancel()
	creds, done, err := a.credentials(ctx)
	if err != nil {
		return err
	}
	defer done()
	conn, err := grpc.NewClient(a.address, grpc.WithTransportCredentials(creds), grpc.WithUserAgent("sluice"), grpc.WithDisableServiceConfig())
	if err != nil {
		return fmt.Errorf("--address: %w", err)
	}
	defer conn.Close()
	return f(ctx, conn)
}

// credentials are what we prove to the gateway and ask of it.
func (a *adminFlags) credentials(ctx context.Context) (credentials.TransportCredentials, func(), error) {
	id := &configv1.Identity{}
	switch {
	case a.config != "":
		cfg, err := config.Read(a.config)
		if err != nil {
			return nil, nil, err
		}
		if a.address == "" {
			a.address = cfg.GetListener().GetAddress()
		}
		id = cfg.GetIdentity()
		if id.GetDevelopment() != nil {
			return nil, nil, fmt.Errorf("%s: identity.development is an authority inside the gateway's process; "+
				"use --certificate, --key and --bundle with files that it wrote", a.config)
		}
		if id.GetInsecure() != nil || id.GetPlaintextListener() {
			return insecure.NewCredentials(), func() {}, nil
		}
	case a.wl != "":
		id.Source = &configv1.Identity_WorkloadApi{WorkloadApi: &configv1.WorkloadAPI{Socket: a.wl}}
	default:
		id.Source = &configv1.Identity_Files{Files: &configv1.IdentityFiles{Certificate: a.certificate, Key: a.key, Bundle: a.bundle}}
	}
	source, err := identity.Open(ctx, id, func(error) {})
	if err != nil {
		return nil, nil, err
	}
	expected := spiffeid.MatchMemberOf(source.TrustDomain())
	if a.server != "" {
		if expected, err = identity.Matcher(a.server); err != nil {
			_ = source.Close()
			return nil, nil, fmt.Errorf("--server-id: %w", err)
		}
	}
	return identity.ClientCredentials(source, expected, nil), func() { _ = source.Close() }, nil
}
