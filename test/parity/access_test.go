package parity_test

import (
	"context"
	"crypto/tls"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"

	"github.com/sluicegate/sluice/interceptors/identity"
	"github.com/sluicegate/sluice/proto/gen/inference"
	configv1 "github.com/sluicegate/sluice/proto/gen/sluice/config/v1"
)

// lives are calls at work when their caller loses something.
type lives struct {
	w      *world
	unary  chan outcome
	stream inference.GRPCInferenceService_ModelStreamInferClient
}

const slow = 120_000 // ms

// begin has a client make a long unary call, and a stream with an inference of
// two models each, of which "words" has answered.
func (w *world) begin(ctx context.Context, c inference.GRPCInferenceServiceClient) *lives {
	w.t.Helper()
	l := &lives{w: w, unary: make(chan outcome, 1)}
	go func() { l.unary <- infer(ctx, w.t, c, request("echo", "", prompt("hello"), param("delay_ms", slow))) }()
	var err error
	if l.stream, err = c.ModelStreamInfer(ctx); err != nil {
		w.t.Fatal(err)
	}
	send(w.t, l.stream, request("words", "w", prompt(words(100_000)), param("delay_ms", 5)),
		request("echo", "e", prompt("hello"), param("delay_ms", slow)))
	if _, err := l.stream.Recv(); err != nil {
		w.t.Fatal(err)
	}
	deadline := time.Now().Add(10 * time.Second)
	for w.model.Stats("echo").Active != 2 {
		if time.Now().After(deadline) {
			w.t.Fatal("the calls are not at work")
		}
		pause()
	}
	return l
}

// ended waits until both have ended for the reason, and nothing of them is left.
func (l *lives) ended(code codes.Code, reason string) {
	t := l.w.t
	t.Helper()
	if o := <-l.unary; o.Code != code || o.Reason != reason {
		t.Errorf("the unary call: %+v, want %s", o, reason)
	}
	for {
		_, err := l.stream.Recv()
		if err == nil {
			continue
		}
		if err == io.EOF {
			t.Errorf("the stream ended well, want %s", reason)
		} else if o := ofStatus(t, err, l.stream.Trailer()); o.Code != code || o.Reason != reason {
			t.Errorf("the stream: %+v, want %s", o, reason)
		}
		break
	}
	l.w.still()
}

// still waits until the model server works on nothing, and nothing is held.
func (w *world) still() {
	w.t.Helper()
	deadline := time.Now().Add(10 * time.Second)
	for w.model.Stats("echo").Active+w.model.Stats("words").Active > 0 {
		if time.Now().After(deadline) {
			w.t.Fatal("the model server is still at work")
		}
		pause()
	}
	w.quiet()
}

func TestAReloadTakesAccessAway(t *testing.T) {
	for name, tc := range map[string]struct {
		from, to, config string
		code             codes.Code
		reason           string
	}{
		"method": {from: "methods: [inference]\n    models: [words", to: "methods: [health]\n    models: [words", code: codes.PermissionDenied, reason: "METHOD_DENIED"},
		"rule":   {from: "spiffe://parity.test/alice", to: "spiffe://parity.test/bob", code: codes.PermissionDenied, reason: "METHOD_DENIED"},
		"deny":   {from: "  rules:", to: "  rules:\n  - {principals: [\"spiffe://parity.test/**\"], methods: [inference], deny: true}", code: codes.PermissionDenied, reason: "METHOD_DENIED"},
	} {
		for door, put := range behind {
			t.Run(name+"/"+door, func(t *testing.T) {
				t.Parallel()
				w := newWorld(t)
				put(w, identities(""))
				ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
				defer cancel()
				l := w.begin(ctx, w.client("/alice"))
				w.reload(strings.Replace(identities(""), tc.from, tc.to, 1))
				l.ended(tc.code, tc.reason)
			})
		}
	}
}

// Where one of two models is lost its inference is refused and the other goes on.
func TestAReloadTakesAModelAway(t *testing.T) {
	for door, put := range behind {
		t.Run(door, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			put(w, identities(""))
			ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
			defer cancel()
			c := w.client("/alice")
			s, err := c.ModelStreamInfer(ctx)
			if err != nil {
				t.Fatal(err)
			}
			send(t, s, request("echo", "quiet", prompt("hello"), param("delay_ms", slow)),
				request("words", "lively", prompt(words(200)), param("delay_ms", 5), param("triton_enable_empty_final_response", true)))
			if _, err := s.Recv(); err != nil {
				t.Fatal(err)
			}
			without := func(model string) string {
				return strings.Replace(identities(""), "models: [words, echo]", "models: ["+model+"]", 1)
			}
			w.reload(without("words")) // the one from which nothing comes
			got := map[string]int{}
			for {
				resp, err := s.Recv()
				if err != nil {
					t.Fatal(err)
				}
				r := resp.GetInferResponse()
				if got[r.GetId()]++; r.GetParameters()["triton_final_response"].GetBoolParam() {
					if r.GetId() == "quiet" && r.GetParameters()["sluice_reason"].GetStringParam() != "MODEL_DENIED" {
						t.Errorf("%v", resp)
					}
				}
				if got["quiet"] == 1 && got["lively"] >= 198 {
					break
				}
			}
			send(t, s, request("words", "more", prompt(words(100_000)), param("delay_ms", 5)))
			for more := 0; more < 3; {
				resp, err := s.Recv()
				if err != nil {
					t.Fatal(err)
				}
				if resp.GetInferResponse().GetId() == "more" {
					more++
				}
			}
			_ = s.CloseSend()
			w.reload(without("echo")) // the one that talks
			for refused := false; ; {
				resp, err := s.Recv()
				if err == io.EOF {
					if !refused {
						t.Error("the stream ended without a word")
					}
					break
				}
				if err != nil {
					t.Fatal(err)
				}
				if r := resp.GetInferResponse(); r.GetId() == "more" {
					if refused {
						t.Fatalf("after the refusal: %v", resp)
					}
					refused = resp.GetErrorMessage() != ""
				}
			}
			w.still()
		})
	}
}

// trusting gives the world an identity of files, with a federated trust domain
// whose bundle the test rewrites.
func (w *world) trusting(federated *identity.Authority) (dir string, lines string) {
	w.t.Helper()
	dir = w.t.TempDir()
	own, err := w.authority.Issue("/gateway", time.Minute, "localhost", "127.0.0.1")
	if err == nil {
		err = w.authority.WriteFiles(dir, "own", own)
	}
	if err != nil {
		w.t.Fatal(err)
	}
	w.rewrite(dir, federated.Bundle())
	keys, err := federated.JWTBundle().Marshal()
	if err == nil {
		err = os.WriteFile(filepath.Join(dir, "keys.json"), keys, 0o600)
	}
	if err != nil {
		w.t.Fatal(err)
	}
	c := &configv1.Identity{
		Jwt: &configv1.JWTIdentity{Audiences: []string{"sluice"}},
		Source: &configv1.Identity_Files{Files: &configv1.IdentityFiles{
			Certificate: filepath.Join(dir, "own.pem"), Key: filepath.Join(dir, "own-key.pem"), Bundle: filepath.Join(dir, "bundle.pem"),
			Federated: []*configv1.FederatedBundle{{TrustDomain: federated.TrustDomain().Name(),
				Bundle: filepath.Join(dir, "other.pem"), JwtBundle: filepath.Join(dir, "keys.json")}},
		}}}
	if w.own, err = identity.Open(w.t.Context(), c, nil); err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { _ = w.own.Close() })
	return dir, "  client_certificate: CLIENT_CERTIFICATE_OPTIONAL\n  jwt: {audiences: [sluice]}"
}

// rewrite puts another bundle in the place of the federated one.
func (w *world) rewrite(dir string, b *x509bundle.Bundle) {
	w.t.Helper()
	pem, err := b.Marshal()
	if err == nil {
		err = os.WriteFile(filepath.Join(dir, "new.pem"), pem, 0o600)
	}
	if err == nil {
		err = os.Rename(filepath.Join(dir, "new.pem"), filepath.Join(dir, "other.pem"))
	}
	if err != nil {
		w.t.Fatal(err)
	}
}

func TestRevocationEndsCalls(t *testing.T) {
	other := spiffeid.RequireTrustDomainFromString("other.test")
	for _, by := range []string{"certificate", "token"} {
		for door, put := range behind {
			t.Run(by+"/"+door, func(t *testing.T) {
				t.Parallel()
				w := newWorld(t)
				federated, err := identity.NewAuthority(other)
				if err != nil {
					t.Fatal(err)
				}
				dir, lines := w.trusting(federated)
				put(w, strings.Replace(identities(lines), "spiffe://parity.test/alice", "spiffe://other.test/alice", 1))
				ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
				defer cancel()
				var c inference.GRPCInferenceServiceClient
				if by == "token" {
					token, err := federated.IssueJWT("/alice", []string{"sluice"}, time.Hour)
					if err != nil {
						t.Fatal(err)
					}
					c, ctx = w.connect(bare), metadata.AppendToOutgoingContext(ctx, "authorization", "Bearer "+token)
				} else {
					c = w.stranger(federated)
				}
				l := w.begin(ctx, c)
				again, err := identity.NewAuthority(other)
				if err != nil {
					t.Fatal(err)
				}
				w.rewrite(dir, again.Bundle())
				keys, err := again.JWTBundle().Marshal()
				if err == nil {
					err = os.WriteFile(filepath.Join(dir, "keys.json"), keys, 0o600)
				}
				if err != nil {
					t.Fatal(err)
				}
				l.ended(codes.Unauthenticated, "IDENTITY_UNTRUSTED")
			})
		}
	}
}

// stranger connects as alice of another trust domain. It takes any server.
func (w *world) stranger(a *identity.Authority) inference.GRPCInferenceServiceClient {
	w.t.Helper()
	svid, err := a.Issue("/alice", time.Hour)
	if err != nil {
		w.t.Fatal(err)
	}
	return w.showing(&tls.Certificate{Certificate: [][]byte{svid.Certificates[0].Raw}, PrivateKey: svid.PrivateKey})
}

func (w *world) showing(c *tls.Certificate) inference.GRPCInferenceServiceClient {
	w.t.Helper()
	conn, err := grpc.NewClient(w.address, grpc.WithDisableRetry(), grpc.WithTransportCredentials(credentials.NewTLS(&tls.Config{
		InsecureSkipVerify: true, MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{*c}})))
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { _ = conn.Close() })
	return inference.NewGRPCInferenceServiceClient(conn)
}

// When the caller's certificate has expired its calls have the grace, and no more.
func TestExpiryEndsCalls(t *testing.T) {
	for _, grace := range []string{"0s", "1s"} {
		for door, put := range behind {
			t.Run(grace+"/"+door, func(t *testing.T) {
				t.Parallel()
				w := newWorld(t)
				put(w, identities("  expiry_grace: "+grace))
				ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
				defer cancel()
				svid, err := w.authority.Issue("/alice", 8*time.Second) // time to begin, on a slow machine
				if err != nil {
					t.Fatal(err)
				}
				l := w.begin(ctx, w.showing(&tls.Certificate{Certificate: [][]byte{svid.Certificates[0].Raw}, PrivateKey: svid.PrivateKey}))
				l.ended(codes.Unauthenticated, "IDENTITY_EXPIRED")
				g, _ := time.ParseDuration(grace)
				if end := svid.Certificates[0].NotAfter.Add(g); time.Now().Before(end) {
					t.Errorf("they ended %v too early", time.Until(end))
				}
			})
		}
	}
}
