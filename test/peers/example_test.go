//go:build linux

package peers

import (
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"google.golang.org/grpc"

	"github.com/sluicegate/sluice/proto/gen/inference"
	"github.com/sluicegate/sluice/test/model"
)

// example is the folder of the example for Python.
const example = "../../examples/python"

// TestExample runs examples/python as its README says, and checks what that promises.
func TestExample(t *testing.T) {
	interpreter := python(t, "triton") // that environment has tritonclient
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	models := grpc.NewServer()
	inference.RegisterGRPCInferenceServiceServer(models, model.New(model.Options{}))
	go func() { _ = models.Serve(l) }()
	t.Cleanup(models.Stop)

	configuration, err := os.ReadFile(filepath.Join(example, "sluice.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	folder := t.TempDir()
	address := startGateway(t, strings.NewReplacer(
		"127.0.0.1:8443", "127.0.0.1:0",
		"127.0.0.1:8001", l.Addr().String(),
		"directory: identities", "directory: "+folder,
	).Replace(string(configuration)))

	cmd := exec.CommandContext(t.Context(), interpreter, filepath.Join(example, "client.py"),
		"--address", strings.Replace(address, "127.0.0.1", "localhost", 1), "--identities", folder)
	cmd.Env = pythonEnv()
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}

	readme, err := os.ReadFile(filepath.Join(example, "README.md"))
	if err != nil {
		t.Fatal(err)
	}
	_, promised, _ := strings.Cut(string(readme), "    echo says")
	promised, _, _ = strings.Cut("    echo says"+promised, "\n\n")
	want := strings.Split(strings.ReplaceAll(promised, "\n    ", "\n")[len("    "):], "\n")
	got := strings.Split(strings.TrimSpace(string(out)), "\n")
	if !slices.EqualFunc(want, got, func(want, got string) bool {
		start, open := strings.CutSuffix(want, "...")
		return got == want || open && strings.HasPrefix(got, start)
	}) {
		t.Errorf("client.py printed\n%s\nand the README promises\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

// TestExampleRequirements checks that the example asks for what TestExample runs it with.
func TestExampleRequirements(t *testing.T) {
	asked, err := os.ReadFile(filepath.Join(example, "requirements.txt"))
	if err != nil {
		t.Fatal(err)
	}
	installed, err := os.ReadFile("requirements/triton.txt")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(asked)) {
		if !strings.Contains("\n"+string(installed), "\n"+line) {
			t.Errorf("requirements/triton.txt has no line %q", line)
		}
	}
}
