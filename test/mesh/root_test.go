//go:build linux

package mesh

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
)

// local asks SPIRE's server to do something with the keys that it signs SVIDs with, and returns the id
// of the one that it means.
func (a *authority) local(t *testing.T, command string, flags ...string) string {
	t.Helper()
	out := a.must(t, "localauthority x509 "+command, append(flags, "-output", "json")...)
	var answer map[string]json.RawMessage
	var key struct {
		ID string `json:"authority_id"`
	}
	err := json.Unmarshal([]byte(out), &answer)
	for _, name := range []string{"active", "prepared_authority"} {
		if err == nil && answer[name] != nil {
			err = json.Unmarshal(answer[name], &key)
		}
	}
	if err != nil {
		t.Fatalf("%v in %s", err, out)
	}
	return key.ID
}

// TestRootReplaced: another root is prepared, takes over, and the old one leaves the bundle. No call
// fails of those who follow; what the old root vouched for is over, on new connections and on live ones.
func TestRootReplaced(t *testing.T) {
	t.Parallel()
	a := newAuthority(t, "mesh.test")
	g := newAgent(t, a, time.Second)
	const life = 12 * time.Second
	g.entry(t, "/gateway", sluice(t), life)
	g.entry(t, "/model", self(t), life)
	g.entry(t, "/client", self(t), life)
	g.entry(t, "/linked", self(t), time.Minute)
	source, linked := g.source(t, "/client"), g.source(t, "/linked")
	gw := newGateway(t, g, newModel(t, g), rules+"recheck: 0.2s\n")
	expected := tlsconfig.AuthorizeID(a.id("/gateway"))

	// Who stays with an SVID of the old root.
	stale, err := linked.GetX509SVID()
	if err != nil {
		t.Fatal(err)
	}
	look := tlsconfig.MTLSClientConfig(stale, linked, expected)
	s, err := speak(t.Context(), dialTLS(t, gw.address, look), 500, 100*time.Millisecond)
	if err != nil {
		t.Fatal(err)
	}
	stream := ended(s.Recv)
	// And who does not.
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	l := new(load)
	l.unary(ctx, dial(t, gw.address, source, a.id("/gateway")), 80)

	before, next := a.local(t, "show"), a.local(t, "prepare")
	waitFor(t, "the new root to be in the bundle", func() error {
		b, err := source.GetX509BundleForTrustDomain(a.domain)
		if err == nil && len(b.X509Authorities()) < 2 {
			err = errors.New("there is one root")
		}
		return err
	})
	// The agent tells everyone of it at once; a second is for a busy machine.
	waitUntil(t, time.Now().Add(time.Second))
	a.local(t, "activate", "-authorityID", next)
	a.local(t, "taint", "-authorityID", before)
	old := stale.Certificates[0].AuthorityKeyId
	waitFor(t, "SVIDs of the new root", func() error {
		leaf, err := shake(gw.address, tlsconfig.MTLSClientConfig(source, source, expected))
		if err != nil {
			return err
		}
		own, err := source.GetX509SVID()
		if err != nil {
			return err
		}
		if bytes.Equal(leaf.AuthorityKeyId, old) || bytes.Equal(own.Certificates[0].AuthorityKeyId, old) {
			return errors.New("the old root signed one")
		}
		return nil
	})
	waitUntil(t, time.Now().Add(life)) // the last connection with an SVID of the old root has been left by now
	if _, err := shake(gw.address, look.Clone()); err != nil {
		t.Errorf("an SVID of the old root was refused while that was in the bundle: %v", err)
	}

	revoked := time.Now()
	a.local(t, "revoke", "-authorityID", before)
	over := <-stream
	if got, want := outcome(over.why), "Unauthenticated IDENTITY_UNTRUSTED"; got != want {
		t.Errorf("the stream ended with %v, want %s", over.why, want)
	}
	took := over.when.Sub(revoked).Round(time.Millisecond)
	if took < 0 || took > 10*time.Second {
		t.Errorf("the stream ended %v after its root", took)
	}
	if _, err := shake(gw.address, look.Clone()); err == nil {
		t.Error("an SVID of the old root was taken after that had left the bundle")
	}
	waitUntil(t, time.Now().Add(time.Second))
	cancel()
	l.check(t)
	t.Logf("%d calls, %d failed; the stream ended %v after its root", l.calls.Load(), len(l.failures), took)
}
