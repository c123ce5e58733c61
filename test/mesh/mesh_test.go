//go:build linux

// Package mesh runs the gateway, its clients and a model server with identities of a real SPIRE, which
// setup.sh builds. Each test has an agent of its own; the test program is the client and the model
// server, and the gateway is the program itself.
package mesh

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"go.uber.org/goleak"
)

// scratch is where everything runs and logs.
var scratch string

func TestMain(m *testing.M) { os.Exit(testMain(m)) }

func testMain(m *testing.M) (code int) {
	parent := os.TempDir()
	if len(parent) > 60 {
		parent = "/tmp" // sockets have short names
	}
	var err error
	if scratch, err = os.MkdirTemp(parent, "mesh"); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer func() { _ = os.RemoveAll(scratch) }()
	defer func() {
		if err := goleak.Find(); err != nil && code == 0 {
			fmt.Fprintln(os.Stderr, err)
			code = 1
		}
	}()
	return m.Run()
}

// TestSPIRE checks the machinery itself: SPIRE gives each program the identity of its entry, and no other.
func TestSPIRE(t *testing.T) {
	t.Parallel()
	a := newAuthority(t, "mesh.test")
	g := newAgent(t, a, time.Second)
	cli := program(t, "spire-agent")
	g.entry(t, "/self", self(t), 20*time.Second)
	g.entry(t, "/cli", cli, 20*time.Second)
	svid, err := g.source(t, "/self").GetX509SVID()
	if err != nil {
		t.Fatal(err)
	}
	leaf := svid.Certificates[0]
	if life, want := leaf.NotAfter.Sub(leaf.NotBefore), 20*time.Second+backdate; life < want-time.Second || life > want+time.Second {
		t.Errorf("the SVID lives for %v, want %v", life, want)
	}
	waitFor(t, "SPIRE's own client to get its identity", func() error {
		out, err := exec.Command(cli, "api", "fetch", "x509", "-socketPath", filepath.Join(g.folder, "api.sock")).CombinedOutput()
		if err == nil && (!bytes.Contains(out, []byte("spiffe://mesh.test/cli\n")) || bytes.Contains(out, []byte("/self"))) {
			err = errors.New("it got another")
		}
		if err != nil {
			return fmt.Errorf("%w: %s", err, out)
		}
		return nil
	})
}
