//go:build linux

package mesh

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/sluicegate/sluice/proto/gen/inference"
)

// outcome is the code and the reason of an error.
func outcome(err error) string {
	s := status.Convert(err)
	for _, d := range s.Details() {
		if info, ok := d.(*errdetails.ErrorInfo); ok {
			return s.Code().String() + " " + info.GetReason()
		}
	}
	return s.Code().String()
}

// end is how a call ended.
type end struct {
	when time.Time
	why  error
}

// ended waits for the end of a stream, on the side.
func ended(receive func() (*inference.ModelStreamInferResponse, error)) <-chan end {
	out := make(chan end, 1)
	go func() {
		for {
			if _, err := receive(); err != nil {
				out <- end{time.Now(), err}
				return
			}
		}
	}()
	return out
}

// TestEntryDeleted: an identity that was deleted counts for as long as its last SVID, and calls in flight
// for identity.expiry_grace more.
func TestEntryDeleted(t *testing.T) {
	t.Parallel()
	const grace = 2 * time.Second
	a := newAuthority(t, "mesh.test")
	g := newAgent(t, a, time.Second)
	g.entry(t, "/gateway", sluice(t), time.Minute)
	g.entry(t, "/model", self(t), time.Minute)
	entry := g.entry(t, "/client", self(t), 12*time.Second)
	source := g.source(t, "/client")
	gw := newGateway(t, g, newModel(t, g), rules+"recheck: 0.1s\nexpiry_grace: 2s\n")

	last, err := source.GetX509SVID()
	if err != nil {
		t.Fatal(err)
	}
	expires := last.Certificates[0].NotAfter
	look := tlsconfig.MTLSClientConfig(last, source, tlsconfig.AuthorizeID(a.id("/gateway")))
	conn := dialTLS(t, gw.address, look)
	a.must(t, "entry delete", "-entryID", entry)
	waitFor(t, "the agent to forget the identity", func() error {
		if _, err := source.GetX509SVID(); err == nil {
			return errors.New("it has not")
		}
		return nil
	})

	s, err := speak(t.Context(), conn, 300, 100*time.Millisecond)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Recv(); err != nil {
		t.Fatalf("a call was refused while the SVID was valid: %v", err)
	}
	over := <-ended(s.Recv)
	if got, want := outcome(over.why), "Unauthenticated IDENTITY_EXPIRED"; got != want {
		t.Errorf("the stream ended with %v, want %s", over.why, want)
	}
	after := over.when.Sub(expires.Add(grace)).Round(time.Millisecond)
	if after < 0 || after > 5*time.Second {
		t.Errorf("the stream ended %v after the SVID and the grace did", after)
	}
	if _, err := shake(gw.address, look.Clone()); err == nil {
		t.Error("a connection with the expired SVID was taken")
	}
	if err := echo(t.Context(), inference.NewGRPCInferenceServiceClient(conn)); err == nil {
		t.Error("a call with the expired SVID was served")
	}
	t.Logf("the stream ended %v after the SVID and the grace did", after)
}

// TestModelServerIsVerified: a model server of our own trust domain that is not the one that the
// configuration names gets nothing.
func TestModelServerIsVerified(t *testing.T) {
	t.Parallel()
	a := newAuthority(t, "mesh.test")
	g := newAgent(t, a, time.Second)
	g.entry(t, "/gateway", sluice(t), time.Minute)
	g.entry(t, "/model", self(t), time.Minute)
	g.entry(t, "/client", self(t), time.Minute)
	source := g.source(t, "/client")
	model := newModel(t, g)
	for name, want := range map[string]string{"model": "OK", "impostor": "Unavailable UPSTREAM_LOST"} {
		t.Run(name, func(t *testing.T) {
			expected := a.id("/" + name).String()
			gw := newGateway(t, g, model, rules, "spiffe://mesh.test/model", expected)
			conn := dial(t, gw.address, source, a.id("/gateway"))
			err := echo(t.Context(), inference.NewGRPCInferenceServiceClient(conn))
			if got := outcome(err); got != want {
				t.Fatalf("%v, want %s", err, want)
			}
			if err == nil {
				return
			}
			if strings.Contains(err.Error(), "spiffe://") {
				t.Errorf("the caller is told of the model server's identity: %v", err)
			}
			waitFor(t, "the log to say why", func() error {
				for _, line := range gw.logged("refused a TLS handshake") {
					if text := fmt.Sprint(line["error"]); strings.Contains(text, expected) && strings.Contains(text, a.id("/model").String()) {
						return nil
					}
				}
				return errors.New("it names no two identities")
			})
		})
	}
}

// TestJWT: a JWT-SVID that the agent gives is an identity on a connection without a client certificate.
func TestJWT(t *testing.T) {
	t.Parallel()
	a := newAuthority(t, "mesh.test")
	g := newAgent(t, a, time.Second)
	g.entry(t, "/gateway", sluice(t), time.Minute)
	for _, path := range []string{"/model", "/client", "/stranger"} {
		g.entry(t, path, self(t), time.Minute)
	}
	source := g.source(t, "/client")
	gw := newGateway(t, g, newModel(t, g), rules+`
client_certificate: CLIENT_CERTIFICATE_OPTIONAL
jwt: {audiences: [sluice]}
`)
	api, err := workloadapi.New(t.Context(), workloadapi.WithAddr(g.socket()))
	if err != nil {
		t.Fatal(err)
	}
	defer api.Close()
	bearer := func(path, audience string) func(*testing.T) []string {
		return func(t *testing.T) []string {
			s, err := api.FetchJWTSVID(t.Context(), jwtsvid.Params{Audience: audience, Subject: a.id(path)})
			if err != nil {
				t.Fatal(err)
			}
			return []string{"authorization", "Bearer " + s.Marshal()}
		}
	}
	conn := dialTLS(t, gw.address, tlsconfig.TLSClientConfig(source, tlsconfig.AuthorizeID(a.id("/gateway"))))
	for _, tt := range []struct {
		name     string
		metadata func(*testing.T) []string
		want     string
	}{
		{"of the client", bearer("/client", "sluice"), "OK"},
		{"of somebody whom no rule names", bearer("/stranger", "sluice"), "PermissionDenied METHOD_DENIED"},
		{"for another audience", bearer("/client", "somebody-else"), "Unauthenticated IDENTITY_UNTRUSTED"},
		{"none", func(*testing.T) []string { return nil }, "Unauthenticated IDENTITY_MISSING"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			ctx := metadata.AppendToOutgoingContext(t.Context(), tt.metadata(t)...)
			if err := echo(ctx, inference.NewGRPCInferenceServiceClient(conn)); outcome(err) != tt.want {
				t.Errorf("%v, want %s", err, tt.want)
			}
		})
	}
}

// TestNoIdentity: the gateway does not start without an identity, and says what to do.
func TestNoIdentity(t *testing.T) {
	t.Parallel()
	a := newAuthority(t, "mesh.test")
	g := newAgent(t, a, time.Second)
	g.entry(t, "/self", self(t), time.Minute)
	g.source(t, "/self") // the agent serves
	gone := &agent{authority: a, folder: shortFolder(t)}
	for name, tt := range map[string]struct {
		agent *agent
		want  []string
	}{
		"no agent": {gone, []string{"within 2s", gone.socket(), "start the agent"}},
		"no entry": {g, []string{"within 2s", g.socket(), "create a registration entry"}},
	} {
		t.Run(name, func(t *testing.T) {
			file, _ := writeConfiguration(t, tt.agent, "127.0.0.1:1", rules, "timeout: 20s", "timeout: 2s")
			ctx, cancel := context.WithTimeout(t.Context(), patience)
			defer cancel()
			p := start(t, file+".log", sluice(t), "serve", "--config", file)
			defer p.stop()
			select {
			case <-p.exited:
			case <-ctx.Done():
				t.Fatalf("it still runs after %v", patience)
			}
			if p.err == nil || p.err.Error() != "exit status 1" {
				t.Errorf("it ended with %v, want exit status 1", p.err)
			}
			for _, want := range append(tt.want, "sluice serve: "+file, "identity.workload_api: ") {
				if !strings.Contains(string(p.text()), want) {
					t.Errorf("%q is not said in: %s", want, p.text())
				}
			}
		})
	}
}

// TestFederation: callers of another trust domain are served while it is federated with ours, and no
// longer.
func TestFederation(t *testing.T) {
	t.Parallel()
	const ours, theirs = "mesh.test", "partner.test"
	us, them := newAuthority(t, ours), newAuthority(t, theirs)
	us.federate(t, them)
	them.federate(t, us)
	g, foreign := newAgent(t, us, time.Second), newAgent(t, them, time.Second)
	g.entry(t, "/gateway", sluice(t), time.Minute, "-federatesWith", them.domain.IDString())
	g.entry(t, "/model", self(t), time.Minute)
	foreign.entry(t, "/client", self(t), time.Minute, "-federatesWith", us.domain.IDString())
	foreign.entry(t, "/stranger", self(t), time.Minute, "-federatesWith", us.domain.IDString())
	client, stranger := foreign.source(t, "/client"), foreign.source(t, "/stranger")
	gw := newGateway(t, g, newModel(t, g), `
rules:
- {principals: ["spiffe://partner.test/client"], methods: [inference], models: [echo, words]}
recheck: 0.2s
`)
	conn := dial(t, gw.address, client, us.id("/gateway"))
	if err := echo(t.Context(), inference.NewGRPCInferenceServiceClient(conn)); err != nil {
		t.Fatalf("a caller of a federated trust domain was refused: %v", err)
	}
	other := dial(t, gw.address, stranger, us.id("/gateway"))
	err := echo(t.Context(), inference.NewGRPCInferenceServiceClient(other))
	if got, want := outcome(err), "PermissionDenied METHOD_DENIED"; got != want {
		t.Errorf("somebody of a federated trust domain whom no rule names: %v, want %s", err, want)
	}
	s, err := speak(t.Context(), conn, 300, 100*time.Millisecond)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Recv(); err != nil {
		t.Fatal(err)
	}

	stream, removed := ended(s.Recv), time.Now()
	us.must(t, "bundle delete", "-id", them.domain.IDString(), "-mode", "dissociate")
	over := <-stream
	if got, want := outcome(over.why), "Unauthenticated IDENTITY_UNTRUSTED"; got != want {
		t.Errorf("the stream ended with %v, want %s", over.why, want)
	}
	// The server's cache and the agent ask each second, and the gateway judges five times a second.
	took := over.when.Sub(removed).Round(time.Millisecond)
	if took < 0 || took > 10*time.Second {
		t.Errorf("the stream ended %v after the federation", took)
	}
	if _, err := shake(gw.address, tlsconfig.MTLSClientConfig(client, client, tlsconfig.AuthorizeID(us.id("/gateway")))); err == nil {
		t.Error("a connection from another trust domain was taken after the end of the federation")
	}
	err = echo(t.Context(), inference.NewGRPCInferenceServiceClient(conn))
	if code := status.Code(err); code != codes.Unavailable && code != codes.Unauthenticated {
		t.Errorf("a call after the end of the federation: %v", err)
	}
	t.Logf("the stream ended %v after the federation", took)
}
