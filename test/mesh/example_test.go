//go:build linux

package mesh

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"
)

// TestExample does what examples/spire/README.md says, on other ports.
func TestExample(t *testing.T) {
	t.Parallel()
	const example = "../../examples/spire"
	spire := filepath.Dir(program(t, "spire-server"))
	root := shortFolder(t)
	folder := filepath.Join(root, "examples", "spire")
	for _, f := range []string{folder, filepath.Join(root, "bin"), filepath.Join(root, "tmp")} {
		if err := os.MkdirAll(f, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Link(sluice(t), filepath.Join(root, "bin", "sluice")); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command("go", "build", "-o", filepath.Join(root, "bin", "client"), example).CombinedOutput()
	if err != nil {
		t.Fatalf("go build: %v\n%s", err, out)
	}

	var ports []string
	for _, port := range []string{"18081", "18001", "18443", "19090"} {
		ports = append(ports, port, fmt.Sprint(freePort(t)))
	}
	read := func(name string) string {
		text, err := os.ReadFile(filepath.Join(example, name))
		if err != nil {
			t.Fatal(err)
		}
		return strings.NewReplacer(ports...).Replace(string(text))
	}
	for _, name := range []string{"server.conf", "agent.conf", "sluice.yaml"} {
		write(t, filepath.Join(folder, name), read(name))
	}
	// The client's own default is the port of the README.
	script := strings.ReplaceAll(read("README.md"), "\n./client\n", "\n./client --gateway 127.0.0.1:"+ports[5]+"\n")
	script = strings.ReplaceAll(script, "\n./stranger ", "\n./stranger --gateway 127.0.0.1:"+ports[5]+" ")
	var commands []string
	for _, block := range regexp.MustCompile("(?ms)^```sh\n(.*?)^```$").FindAllStringSubmatch(script, -1) {
		commands = append(commands, block[1])
	}

	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "bash", "-euo", "pipefail", "-c", strings.Join(commands, "\n"))
	cmd.Dir = folder
	cmd.Env = append(os.Environ(), "PATH="+spire+":"+os.Getenv("PATH"), "TMPDIR="+filepath.Join(root, "tmp"))
	// What the script leaves behind ends with it: a process group of its own.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = patience
	out, err = cmd.CombinedOutput()
	_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
	if err != nil {
		t.Errorf("the README's commands: %v", err)
	}
	for _, want := range []string{
		"spiffe://example.org/client was answered by echo\n",
		"client: rpc error: code = PermissionDenied desc = METHOD_DENIED: ",
		"refused\n",
	} {
		if !strings.Contains(string(out), want) {
			t.Errorf("%q is missing", want)
		}
	}
	if t.Failed() {
		t.Logf("they said:\n%s", out)
	}
}
