package main

import (
	"bytes"
	"context"
	"io"
	"path/filepath"
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/sluicegate/sluice/interceptors/identity"
	"github.com/sluicegate/sluice/proto/gen/inference"
	configv1 "github.com/sluicegate/sluice/proto/gen/sluice/config/v1"
)

func TestModelCommandUsage(t *testing.T) {
	for _, args := range [][]string{
		{"--cert", "a.pem"},
		{"--allow", "spiffe://sluice.dev/gateway"},
		{"--cert", "a.pem", "--key", "b.pem", "--bundle", "c.pem"},
		{"--key", "b.pem", "--bundle", "c.pem", "--allow", "spiffe://sluice.dev/gateway"},
		{"--workload-api", "unix:///none.sock"},
		{"--workload-api", "unix:///none.sock", "--cert", "a.pem", "--key", "b.pem", "--bundle", "c.pem", "--allow", "spiffe://sluice.dev/gateway"},
		{"one more"},
		{"--no-such-flag"},
	} {
		var errs bytes.Buffer
		if rc := modelCommand(args, io.Discard, &errs); rc != 2 || errs.Len() == 0 {
			t.Errorf("%q: exit status %d, %q", args, rc, &errs)
		}
	}
	var errs bytes.Buffer
	missing := []string{"--cert", "a.pem", "--key", "b.pem", "--bundle", "c.pem", "--allow", "spiffe://sluice.dev/gateway"}
	if rc := modelCommand(missing, io.Discard, &errs); rc != 1 || !strings.Contains(errs.String(), "a.pem") {
		t.Errorf("files that are not there: exit status %d, %q", rc, &errs)
	}
}

func TestModelServesWhomItAllows(t *testing.T) {
	folder := t.TempDir()
	authority, err := identity.NewAuthority(spiffeid.RequireTrustDomainFromString("sluice.dev"))
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"gateway", "model", "alice"} {
		svid, err := authority.Issue("/"+name, 0)
		if err != nil {
			t.Fatal(err)
		}
		if err := authority.WriteFiles(folder, name, svid); err != nil {
			t.Fatal(err)
		}
	}
	files := func(name string) *configv1.IdentityFiles {
		return &configv1.IdentityFiles{
			Certificate: filepath.Join(folder, name+".pem"), Key: filepath.Join(folder, name+"-key.pem"),
			Bundle: filepath.Join(folder, "bundle.pem"),
		}
	}
	f := files("model")
	cfg, err := modelConfig(f.GetCertificate(), f.GetKey(), f.GetBundle(), "", "spiffe://sluice.dev/gateway")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	said, says := io.Pipe()
	served := make(chan error, 1)
	go func() { served <- serveModel(ctx, cfg, "127.0.0.1:0", 0, says) }()
	line := make([]byte, 100)
	n, err := said.Read(line)
	if err != nil {
		t.Fatal(err)
	}
	address := strings.TrimSpace(strings.TrimPrefix(string(line[:n]), "sluice: model server on "))
	for name, want := range map[string]codes.Code{"gateway": codes.OK, "alice": codes.PermissionDenied} {
		source, err := identity.Open(t.Context(), &configv1.Identity{Source: &configv1.Identity_Files{Files: files(name)}}, nil)
		if err != nil {
			t.Fatal(err)
		}
		matcher := spiffeid.MatchID(spiffeid.RequireFromString("spiffe://sluice.dev/model"))
		conn, err := grpc.NewClient(address, grpc.WithTransportCredentials(identity.ClientCredentials(source, matcher, nil)))
		if err != nil {
			t.Fatal(err)
		}
		_, err = inference.NewGRPCInferenceServiceClient(conn).ModelInfer(t.Context(), prompt("echo", "hi"))
		if status.Code(err) != want {
			t.Errorf("%s: %v, want %v", name, err, want)
		}
		_ = conn.Close()
		_ = source.Close()
	}
	cancel()
	if err := <-served; err != nil {
		t.Errorf("served: %v", err)
	}
}
