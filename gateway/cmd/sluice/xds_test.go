//go:build !noxds

package main

import (
	"context"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/sluicegate/sluice/proto/gen/inference"
	"github.com/sluicegate/sluice/test/controlplane"
)

// The program as it is shipped serves model servers that a control plane names, by the
// file that GRPC_XDS_BOOTSTRAP names, and says so if there is none.
func TestServeXDS(t *testing.T) {
	dir := t.TempDir()
	p := controlplane.Start(t, "models")
	p.Servers(words(t))
	text := strings.Replace(plain, `"127.0.0.1:1"`, `"xds:///models"`, 1)
	text = strings.Replace(text, "models: [words]", "models: [echo]", 1) + "admin: {address: \"127.0.0.1:0\"}\n"
	file := write(t, filepath.Join(dir, "sluice.yaml"), text)

	rc, _, errs := said("", "serve", "--config", file)
	if want := file + ":9:26 backends[0].address: "; rc != 1 || !strings.Contains(errs, want) || !strings.Contains(errs, "GRPC_XDS_BOOTSTRAP") {
		t.Errorf("without a bootstrap file: %d %q, want %q", rc, errs, want)
	}

	t.Setenv("GRPC_XDS_BOOTSTRAP", write(t, filepath.Join(dir, "xds.json"), string(p.Bootstrap())))
	s := asProcess(t, file) // the environment is read when it starts
	conn, err := grpc.NewClient(s.address, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	if _, err := inference.NewGRPCInferenceServiceClient(conn).ModelInfer(ctx, prompt("echo", "hello"), grpc.WaitForReady(true)); err != nil {
		t.Error(err)
	}
	s.signal(syscall.SIGTERM)
	if rc := s.ended(t); rc != 0 {
		t.Errorf("exit status %d", rc)
	}
}

// The build tag leaves it out.
func TestNoXDS(t *testing.T) {
	for tags, want := range map[string]bool{"no_fs_access": true, "no_fs_access,noxds": false} {
		out, err := exec.Command("go", "list", "-deps", "-tags", tags, ".").Output()
		if err != nil {
			t.Fatal(err)
		}
		if got := strings.Contains(string(out), "google.golang.org/grpc/xds\n"); got != want {
			t.Errorf("with the tags %s: xDS is there: %v, want %v", tags, got, want)
		}
	}
}
