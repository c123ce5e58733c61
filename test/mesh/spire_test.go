//go:build linux

package mesh

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
)

// outOfReach is setup.sh's exit status where there is nothing to test with.
const outOfReach = 77

// programs returns the folder of spire-server and spire-agent, which setup.sh makes where it is not
// there yet.
var programs = sync.OnceValues(func() (string, error) {
	cmd := exec.Command("bash", "setup.sh")
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	return strings.TrimSpace(string(out)), err
})

// program returns the path of one of SPIRE's programs. It skips the test where there is none.
func program(t *testing.T, name string) string {
	t.Helper()
	if testing.Short() {
		t.Skip("a real SPIRE is not run with -short")
	}
	folder, err := programs()
	if exit, ok := errors.AsType[*exec.ExitError](err); ok && exit.ExitCode() == outOfReach {
		t.Skip("SKIPPED: SPIRE cannot be built here, setup.sh says why")
	}
	if err != nil {
		t.Fatalf("setup.sh: %v", err)
	}
	return filepath.Join(folder, name)
}

// authority is a SPIRE server.
type authority struct {
	domain spiffeid.TrustDomain
	folder string
	port   int
	run    *process
}

const serverConfig = `
server {
  bind_address = "127.0.0.1"
  bind_port = "%[1]d"
  socket_path = "%[2]s/api.sock"
  trust_domain = "%[3]s"
  data_dir = "%[2]s"
  log_level = "INFO"
  experimental { cache_reload_interval = "1s" }
}
plugins {
  DataStore "sql" { plugin_data { database_type = "sqlite3" connection_string = "%[2]s/entries.sqlite3" } }
  NodeAttestor "join_token" { plugin_data {} }
  KeyManager "memory" { plugin_data {} }
}
`

// newAuthority runs a SPIRE server until the test ends.
func newAuthority(t *testing.T, domain string) *authority {
	t.Helper()
	server := program(t, "spire-server")
	a := &authority{
		domain: spiffeid.RequireTrustDomainFromString(domain),
		folder: shortFolder(t),
		port:   freePort(t),
	}
	config := filepath.Join(a.folder, "server.conf")
	write(t, config, fmt.Sprintf(serverConfig, a.port, a.folder, domain))
	a.run = start(t, filepath.Join(a.folder, "log"), server, "run", "-config", config)
	t.Cleanup(a.run.stop)
	t.Cleanup(func() { showLog(t, "SPIRE's server of "+domain, a.run) })
	waitFor(t, "SPIRE's server", func() error {
		_, err := a.ask("healthcheck")
		return err
	})
	return a
}

// ask runs a command of spire-server, such as "bundle show".
func (a *authority) ask(command string, flags ...string) (string, error) {
	folder, err := programs()
	if err != nil {
		return "", err
	}
	args := append(strings.Fields(command), "-socketPath", filepath.Join(a.folder, "api.sock"))
	out, err := exec.Command(filepath.Join(folder, "spire-server"), append(args, flags...)...).CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("spire-server %s: %w\n%s", command, err, out)
	}
	return string(out), nil
}

// must is ask for what has to succeed.
func (a *authority) must(t *testing.T, command string, flags ...string) string {
	t.Helper()
	out, err := a.ask(command, flags...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// id is a SPIFFE ID of the authority's trust domain.
func (a *authority) id(path string) spiffeid.ID {
	return spiffeid.RequireFromPath(a.domain, path)
}

// federate makes the authority know another one, from its bundle.
func (a *authority) federate(t *testing.T, with *authority) {
	t.Helper()
	bundle := filepath.Join(a.folder, with.domain.Name()+".bundle")
	write(t, bundle, with.must(t, "bundle show", "-format", "spiffe"))
	a.must(t, "bundle set", "-format", "spiffe", "-id", with.domain.IDString(), "-path", bundle)
}

// agent is a SPIRE agent: a node, whose workloads are told apart by their programs.
type agent struct {
	*authority
	folder string
	node   spiffeid.ID
	run    *process
}

// The agent asks the server for news every sync_interval; SPIRE's own default is 5 s. It renews an
// SVID when half of its life is over, where life begins 10 s before the SVID is issued.
const agentConfig = `
agent {
  server_address = "127.0.0.1"
  server_port = "%[1]d"
  socket_path = "%[2]s/api.sock"
  trust_domain = "%[3]s"
  data_dir = "%[2]s"
  trust_bundle_path = "%[2]s/bundle.pem"
  log_level = "INFO"
  experimental { sync_interval = "%[4]s" }
}
plugins {
  NodeAttestor "join_token" { plugin_data {} }
  KeyManager "disk" { plugin_data { directory = "%[2]s" } }
  WorkloadAttestor "unix" { plugin_data { discover_workload_path = true workload_size_limit = -1 } }
}
`

// newAgent runs a SPIRE agent until the test ends.
func newAgent(t *testing.T, a *authority, sync time.Duration) *agent {
	t.Helper()
	g := &agent{authority: a, folder: shortFolder(t)}
	g.node = a.id("/node" + filepath.Base(g.folder))
	write(t, filepath.Join(g.folder, "bundle.pem"), a.must(t, "bundle show"))
	write(t, filepath.Join(g.folder, "agent.conf"), fmt.Sprintf(agentConfig, a.port, g.folder, a.domain, sync))
	var token struct{ Value string }
	out := a.must(t, "token generate", "-spiffeID", g.node.String(), "-output", "json")
	if err := json.Unmarshal([]byte(out), &token); err != nil {
		t.Fatalf("%v in %s", err, out)
	}
	t.Cleanup(func() { showLog(t, "SPIRE's agent", g.run) })
	g.start(t, "-joinToken", token.Value)
	return g
}

// start runs the agent, at first with a join token, later with what it has on disk.
func (g *agent) start(t *testing.T, flags ...string) {
	t.Helper()
	args := append([]string{"run", "-config", filepath.Join(g.folder, "agent.conf")}, flags...)
	g.run = start(t, filepath.Join(g.folder, "log"), program(t, "spire-agent"), args...)
	t.Cleanup(g.run.stop)
}

// healthy is nil if the agent works.
func (g *agent) healthy() error {
	folder, err := programs()
	if err != nil {
		return err
	}
	return exec.Command(filepath.Join(folder, "spire-agent"), "healthcheck", "-socketPath", filepath.Join(g.folder, "api.sock")).Run()
}

// socket is where the agent's Workload API is.
func (g *agent) socket() string { return "unix://" + filepath.Join(g.folder, "api.sock") }

// entry gives an identity to a program that runs on the agent's node, with SVIDs that live so long,
// and returns the entry's id. The identity is known to the agent a moment later.
func (g *agent) entry(t *testing.T, path, program string, life time.Duration, flags ...string) string {
	t.Helper()
	out := g.must(t, "entry create", append([]string{
		"-parentID", g.node.String(), "-spiffeID", g.id(path).String(), "-selector", "unix:path:" + program,
		"-x509SVIDTTL", fmt.Sprint(life.Seconds()), "-output", "json",
	}, flags...)...)
	var created struct {
		Results []struct {
			Status struct{ Code int }
			Entry  struct{ ID string }
		}
	}
	if err := json.Unmarshal([]byte(out), &created); err != nil || len(created.Results) != 1 || created.Results[0].Status.Code != 0 {
		t.Fatalf("no entry was created for %s: %v\n%s", path, err, out)
	}
	return created.Results[0].Entry.ID
}

// source is what go-spiffe makes of an identity of the test program itself, which may have several.
// It waits until the identity is there.
func (g *agent) source(t *testing.T, path string) *workloadapi.X509Source {
	t.Helper()
	id := g.id(path)
	pick := func(svids []*x509svid.SVID) *x509svid.SVID {
		if n := slices.IndexFunc(svids, func(s *x509svid.SVID) bool { return s.ID == id }); n >= 0 {
			return svids[n]
		}
		return nil
	}
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	s, err := workloadapi.NewX509Source(ctx, workloadapi.WithClientOptions(workloadapi.WithAddr(g.socket())),
		workloadapi.WithDefaultX509SVIDPicker(pick))
	if err != nil {
		t.Fatalf("%s: %v", id, err)
	}
	t.Cleanup(func() { _ = s.Close() })
	waitFor(t, "an SVID for "+id.String(), func() error {
		_, err := s.GetX509SVID()
		return err
	})
	return s
}

// shortFolder is a folder with a name so short that a socket's fits into the 108 bytes that Linux has
// for it.
func shortFolder(t *testing.T) string {
	t.Helper()
	folder, err := os.MkdirTemp(scratch, "") //nolint:usetesting // t.TempDir has the test's name in it
	if err != nil {
		t.Fatal(err)
	}
	return folder
}

func write(t *testing.T, file, text string) {
	t.Helper()
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

// showLog shows the end of a program's log if the test failed.
func showLog(t *testing.T, name string, p *process) {
	if !t.Failed() {
		return
	}
	text := p.text()
	t.Logf("the log of %s ends:\n%s", name, text[max(0, len(text)-4000):])
}
