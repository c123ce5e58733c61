//go:build linux

package mesh

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	"github.com/sluicegate/sluice/interceptors/config"
	"github.com/sluicegate/sluice/proto/gen/inference"
	"github.com/sluicegate/sluice/test/model"
)

// build makes the program, once.
var build = sync.OnceValues(func() (string, error) {
	sluice := filepath.Join(scratch, "sluice")
	out, err := exec.Command("go", "build", "-tags=no_fs_access", "-o", sluice, "../../gateway/cmd/sluice").CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("go build: %w\n%s", err, out)
	}
	return sluice, nil
})

// sluice returns the path of the program.
func sluice(t *testing.T) string {
	t.Helper()
	file, err := build()
	if err != nil {
		t.Fatal(err)
	}
	return file
}

// self is the path of the test program, which is the client and the model server.
func self(t *testing.T) string {
	t.Helper()
	file, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	return file
}

// gateway is the program, serving.
type gateway struct {
	*process
	address, admin string
}

// configuration of a gateway. {socket}, {model} and {admin} are filled in, and what the test says of
// the identity.
const configuration = `
listener: {address: "127.0.0.1:0", max_connections: 100}
admin: {address: "{admin}"}
identity:
  workload_api: {socket: "{socket}", timeout: 20s}
  {identity}
backends:
- {name: model, address: "{model}", dialect: DIALECT_TRITON, spiffe_id: "spiffe://mesh.test/model"}
`

// newGateway runs a gateway until the test ends. identity are further lines of that part of its
// configuration, edits are pairs of what to replace in all of it.
func newGateway(t *testing.T, g *agent, model, identity string, edits ...string) *gateway {
	t.Helper()
	file, admin := writeConfiguration(t, g, model, identity, edits...)
	p := start(t, filepath.Join(filepath.Dir(file), "log"), sluice(t), "serve", "--config", file)
	t.Cleanup(func() {
		showLog(t, "the gateway", p)
		p.stop()
		if p.err != nil {
			t.Errorf("the gateway ended with %v", p.err)
		}
	})
	const serving = "sluice: serving on "
	p.says(t, serving)
	_, text, _ := bytes.Cut(p.text(), []byte(serving))
	address, _, _ := strings.Cut(string(text), "\n")
	return &gateway{process: p, address: address, admin: admin}
}

// writeConfiguration returns the configuration's file, and the address of the admin listener.
func writeConfiguration(t *testing.T, g *agent, model, identity string, edits ...string) (file, admin string) {
	t.Helper()
	admin = fmt.Sprint("127.0.0.1:", freePort(t))
	file = filepath.Join(shortFolder(t), "sluice.yaml")
	identity = strings.ReplaceAll(strings.TrimSpace(identity), "\n", "\n  ")
	write(t, file, strings.NewReplacer(append(edits, "{socket}", g.socket(), "{model}", model, "{admin}", admin,
		"{identity}", identity)...).Replace(configuration))
	return file, admin
}

// isReady is nil if the gateway says that it is ready.
func (g *gateway) isReady() error {
	resp, err := http.Get("http://" + g.admin + "/readyz")
	if err != nil {
		return err
	}
	_ = resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return errors.New(resp.Status)
	}
	return nil
}

// logged returns the lines of the gateway's log with a message.
func (g *gateway) logged(message string) (lines []map[string]any) {
	for line := range bytes.Lines(g.text()) {
		var entry map[string]any
		if json.Unmarshal(line, &entry) == nil && entry["msg"] == message {
			lines = append(lines, entry)
		}
	}
	return lines
}

// newModel runs a model server until the test ends, with the chain linked in: its identity is /model,
// and only /gateway may call. It returns the address.
func newModel(t *testing.T, g *agent) string {
	t.Helper()
	guard := guard(t, fmt.Sprintf(`
identity:
  workload_api: {socket: "%s", spiffe_id: "%s"}
  rules:
  - {principals: ["%s"], methods: [inference, metadata, health], models: ["*"]}
backends:
- {name: model, dialect: DIALECT_TRITON}
`, g.socket(), g.id("/model"), g.id("/gateway")))
	server := grpc.NewServer(append(guard.ServerOptions(), grpc.WaitForHandlers(true))...)
	inference.RegisterGRPCInferenceServiceServer(server, model.New(model.Options{}))
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = server.Serve(l)
	}()
	t.Cleanup(func() {
		server.Stop()
		<-done
	})
	return l.Addr().String()
}

// guard builds the chain of a configuration.
func guard(t *testing.T, text string) *config.Guard {
	t.Helper()
	cfg, err := config.Parse("mesh.yaml", []byte(text))
	if err != nil {
		t.Fatalf("%v\n%s", err, text)
	}
	g, err := config.Build(cfg, nil, config.Options{Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(g.Close)
	return g
}

// dial connects as go-spiffe alone does it, and expects a gateway.
func dial(t *testing.T, address string, s *workloadapi.X509Source, gateway spiffeid.ID) *grpc.ClientConn {
	t.Helper()
	return dialTLS(t, address, tlsconfig.MTLSClientConfig(s, s, tlsconfig.AuthorizeID(gateway)))
}

func dialTLS(t *testing.T, address string, c *tls.Config) *grpc.ClientConn {
	t.Helper()
	return connect(t, address, grpc.WithTransportCredentials(credentials.NewTLS(c)))
}

// dialLinked connects with the chain linked in.
func dialLinked(t *testing.T, address string, g *agent, path string) *grpc.ClientConn {
	t.Helper()
	options, err := guard(t, fmt.Sprintf(`
identity:
  workload_api: {socket: "%s", spiffe_id: "%s"}
backends:
- {name: gateway, dialect: DIALECT_TRITON, spiffe_id: "%s"}
`, g.socket(), g.id(path), g.id("/gateway"))).DialOptions()
	if err != nil {
		t.Fatal(err)
	}
	return connect(t, address, options...)
}

func connect(t *testing.T, address string, options ...grpc.DialOption) *grpc.ClientConn {
	t.Helper()
	conn, err := grpc.NewClient(address, append(options, grpc.WithDisableRetry())...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return conn
}

// shake makes a TLS handshake and returns the certificate of the other side. It waits for what the other
// side makes of ours: the first bytes of HTTP/2.
func shake(address string, c *tls.Config) (*x509.Certificate, error) {
	c.NextProtos = []string{"h2"}
	conn, err := tls.DialWithDialer(&net.Dialer{Timeout: patience}, "tcp", address, c)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	_ = conn.SetReadDeadline(time.Now().Add(patience))
	if _, err := conn.Write([]byte("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00")); err != nil {
		return nil, err
	}
	if _, err := conn.Read(make([]byte, 1)); err != nil {
		return nil, fmt.Errorf("after the handshake: %w", err)
	}
	peers := conn.ConnectionState().PeerCertificates
	if len(peers) == 0 {
		return nil, errors.New("the other side showed no certificate")
	}
	return peers[0], nil
}
