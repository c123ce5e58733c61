package gateway

import (
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"

	"github.com/sluicegate/sluice/interceptors/config"
	"github.com/sluicegate/sluice/interceptors/identity"
)

// Everybody's SVID lives for three seconds, and the client does nothing but show
// the one of the day: no call fails and no stream breaks, on either side of the
// gateway.
func TestRotation(t *testing.T) {
	t.Parallel()
	const life, lives = 3 * time.Second, 3
	authority, err := identity.NewAuthority(spiffeid.RequireTrustDomainFromString("gate.test"))
	if err != nil {
		t.Fatal(err)
	}
	source := func(path string) *identity.Source {
		s, err := authority.SourceFor(life, path)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = s.Close() })
		return s
	}
	m, behind := modelServer(t, grpc.Creds(identity.ServerCredentials(source("/model"), nil)))
	g := openWith(t, `
identity: {development: {trust_domain: gate.test}, rules: [{principals: ["spiffe://gate.test/client"], methods: [inference], models: ["*"]}]}
backends: [{name: model, dialect: DIALECT_TRITON, spiffe_id: "spiffe://gate.test/**"}]
`, config.Options{Source: source("/gateway")}, behind)
	client := source("/client")
	var shown atomic.Int64
	c := g.client(grpc.WithTransportCredentials(credentials.NewTLS(&tls.Config{
		InsecureSkipVerify: true,
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			shown.Add(1)
			svid, err := client.GetX509SVID()
			if err != nil {
				return nil, err
			}
			return &tls.Certificate{Certificate: [][]byte{svid.Certificates[0].Raw}, PrivateKey: svid.PrivateKey}, nil
		},
	})))

	end := time.After(lives * life)
	over := make(chan struct{})
	go func() { <-end; close(over) }()
	failed := make(chan error, 10)
	var asked, answered, calls atomic.Int64
	var work sync.WaitGroup
	for n := range 4 {
		work.Go(func() { // a stream that goes on and on
			s, err := c.ModelStreamInfer(ctx(t))
			if err != nil {
				failed <- err
				return
			}
			work.Go(func() {
				defer func() { _ = s.CloseSend() }()
				tick := time.NewTicker(20 * time.Millisecond)
				defer tick.Stop()
				for {
					select {
					case <-over:
						return
					case <-tick.C:
					}
					if s.Send(ask("words", fmt.Sprint(n), words(3))) != nil {
						return // Recv says why
					}
					asked.Add(1)
				}
			})
			for {
				r, err := s.Recv()
				switch {
				case errors.Is(err, io.EOF):
					return
				case err == nil && r.GetErrorMessage() != "":
					err = errors.New(r.GetErrorMessage())
					fallthrough
				case err != nil:
					failed <- fmt.Errorf("stream: %w", err)
					return
				}
				answered.Add(1)
			}
		})
		work.Go(func() {
			tick := time.NewTicker(2 * time.Millisecond)
			defer tick.Stop()
			for {
				select {
				case <-over:
					return
				case <-tick.C:
				}
				if _, err := c.ModelInfer(ctx(t), ask("echo", "a", "hello")); err != nil {
					failed <- fmt.Errorf("call: %w", err)
					return
				}
				calls.Add(1)
			}
		})
	}
	work.Wait()
	close(failed)
	for err := range failed {
		t.Error(err)
	}
	t.Logf("%d calls, %d inferences and %d answers on streams, %d connections", calls.Load(), asked.Load(), answered.Load(), shown.Load())
	if shown.Load() < lives || answered.Load() < asked.Load() || m.Seen() < calls.Load() {
		t.Errorf("the model saw %d inferences", m.Seen())
	}
}

// The gateway says that it is not ready before its SVID ends, and that it is
// again once there is another.
func TestReadinessFollowsTheIdentity(t *testing.T) {
	t.Parallel()
	authority, err := identity.NewAuthority(spiffeid.RequireTrustDomainFromString("gate.test"))
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	renew := func(life time.Duration) {
		t.Helper()
		svid, err := authority.Issue("/gateway", life)
		if err == nil {
			err = authority.WriteFiles(dir, "gateway", svid)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	_, behind := modelServer(t)
	renew(4 * time.Second)
	g := open(t, `
identity:
  files: {certificate: `+filepath.Join(dir, "gateway.pem")+`, key: `+filepath.Join(dir, "gateway-key.pem")+`, bundle: `+filepath.Join(dir, "bundle.pem")+`}
  rules: [{principals: ["spiffe://gate.test/client"], methods: [inference, health], models: ["*"]}]
backends: [{name: model, dialect: DIALECT_TRITON, plaintext: true}]
`, behind)
	source, err := authority.Source("/client")
	if err != nil {
		t.Fatal(err)
	}
	defer source.Close()
	watch, err := healthpb.NewHealthClient(g.dial(grpc.WithTransportCredentials(
		identity.ClientCredentials(source, spiffeid.MatchAny(), nil)))).Watch(ctx(t), &healthpb.HealthCheckRequest{})
	if err != nil {
		t.Fatal(err)
	}
	becomes := func(want healthpb.HealthCheckResponse_ServingStatus) {
		t.Helper()
		for {
			r, err := watch.Recv()
			if err != nil {
				t.Fatal(err)
			}
			if r.GetStatus() == want {
				return
			}
		}
	}
	becomes(healthpb.HealthCheckResponse_SERVING)
	if err := g.Ready(); err != nil {
		t.Errorf("not ready: %v", err)
	}
	becomes(healthpb.HealthCheckResponse_NOT_SERVING)
	if err := g.Ready(); err == nil || !strings.Contains(err.Error(), "certificate ends at") {
		t.Errorf("not ready because of %v", err)
	}
	renew(time.Hour)
	becomes(healthpb.HealthCheckResponse_SERVING)
	if err := g.Ready(); err != nil {
		t.Errorf("renewed, and not ready: %v", err)
	}
}
