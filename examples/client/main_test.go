package main

import (
	"bytes"
	"log/slog"
	"net"
	"path/filepath"
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"go.uber.org/goleak"
	"google.golang.org/grpc"

	"github.com/sluicegate/sluice/gateway"
	"github.com/sluicegate/sluice/interceptors/config"
	"github.com/sluicegate/sluice/interceptors/identity"
	"github.com/sluicegate/sluice/proto/gen/inference"
	configv1 "github.com/sluicegate/sluice/proto/gen/sluice/config/v1"
	"github.com/sluicegate/sluice/test/model"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// start starts the model server and the gateway with kind's configuration, and
// gives the gateway's address and the folder with identities.
func start(t *testing.T) (address, folder string) {
	t.Helper()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	listen := func() net.Listener {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		must(err)
		return l
	}
	serve := func(serve func() error, stop func()) {
		done := make(chan struct{})
		go func() {
			defer close(done)
			_ = serve()
		}()
		t.Cleanup(func() {
			stop()
			<-done
		})
	}
	folder = t.TempDir()
	authority, err := identity.NewAuthority(spiffeid.RequireTrustDomainFromString("sluice.dev"))
	must(err)
	for name, path := range map[string]string{"gateway": "/gateway", "alice": "/acme/alice", "mallory": "/mallory"} {
		svid, err := authority.Issue(path, 0)
		must(err)
		must(authority.WriteFiles(folder, name, svid))
	}

	source, err := authority.Source("/model")
	must(err)
	t.Cleanup(func() { _ = source.Close() })
	server := grpc.NewServer(grpc.Creds(identity.ServerCredentials(source, nil)), grpc.WaitForHandlers(true))
	inference.RegisterGRPCInferenceServiceServer(server, model.New(model.Options{}))
	behind := listen()
	serve(func() error { return server.Serve(behind) }, server.Stop)

	cfg, err := config.Read(filepath.Join("..", "..", "kind", "manifests", "sluice.yaml"))
	must(err)
	cfg.Identity.Source = &configv1.Identity_Files{Files: &configv1.IdentityFiles{
		Certificate: filepath.Join(folder, "gateway.pem"),
		Key:         filepath.Join(folder, "gateway-key.pem"),
		Bundle:      filepath.Join(folder, "bundle.pem"),
	}}
	cfg.Backends[0].Address = behind.Addr().String()
	g, err := gateway.New(cfg, config.Options{Logger: slog.New(slog.DiscardHandler)})
	must(err)
	l := listen()
	serve(func() error { return g.Serve(l) }, g.Shutdown)
	return l.Addr().String(), folder
}

const server = "spiffe://sluice.dev/gateway"

func TestClient(t *testing.T) {
	address, folder := start(t)
	alice, mallory := filepath.Join(folder, "alice"), filepath.Join(folder, "mallory")
	var out bytes.Buffer
	if err := run(t.Context(), &out, address, server, alice, mallory); err != nil {
		t.Error(err)
	}
	// kind/test.sh and kind/README.md have these lines too.
	want := strings.TrimLeft(`
allowed           echo   OK, 1 messages
streamed          words  OK, 9 messages
refused identity  echo   PermissionDenied METHOD_DENIED, 0 messages
refused prompt    echo   PermissionDenied PROMPT_REJECTED, 0 messages
`, "\n")
	if out.String() != want {
		t.Errorf("got\n%swant\n%s", out.String(), want)
	}
	if err := run(t.Context(), &out, address, server, alice, alice); err == nil {
		t.Error("a stranger who is served is no error")
	}
	if err := run(t.Context(), &out, address, server, mallory, mallory); err == nil {
		t.Error("a caller who is not served is no error")
	}
	if err := run(t.Context(), &out, address, "spiffe://sluice.dev/another", alice, mallory); err == nil {
		t.Error("a gateway with another SPIFFE ID is no error")
	}
}
