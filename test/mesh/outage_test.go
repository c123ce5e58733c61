//go:build linux

package mesh

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"

	"github.com/sluicegate/sluice/proto/gen/inference"
)

// TestAgentAway: the gateway's agent is away for longer than an SVID lives. Nothing is noticed as long as
// the SVID is valid, but for readiness, which ends before; then nobody is taken on; and when the agent is
// back so is the gateway, by itself. The client and the model server have another agent.
func TestAgentAway(t *testing.T) {
	t.Parallel()
	const life = 20 * time.Second
	a := newAuthority(t, "mesh.test")
	far, near := newAgent(t, a, time.Second), newAgent(t, a, time.Second)
	far.entry(t, "/gateway", sluice(t), life)
	for _, path := range []string{"/model", "/client"} {
		near.entry(t, path, self(t), life)
	}
	source := near.source(t, "/client")
	gw := newGateway(t, far, newModel(t, near), rules)
	look := tlsconfig.MTLSClientConfig(source, source, tlsconfig.AuthorizeID(a.id("/gateway")))
	conn := dial(t, gw.address, source, a.id("/gateway"))

	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	l := new(load)
	l.unary(ctx, conn, 80)
	far.run.stop()
	leaf, err := shake(gw.address, look)
	if err != nil {
		t.Fatal(err)
	}
	waitFor(t, "the gateway to be unready", func() error {
		if gw.isReady() == nil {
			return errors.New("it is ready")
		}
		return nil
	})
	before := time.Until(leaf.NotAfter)
	if before < time.Second {
		t.Errorf("unready %v before the SVID ended, want 1s at least", before)
	}
	if before > life/2 {
		t.Errorf("unready %v before the SVID ended already", before)
	}

	waitUntil(t, leaf.NotAfter.Add(-time.Second))
	cancel()
	l.check(t)
	if _, err := shake(gw.address, look); err != nil {
		t.Errorf("a new connection was refused while the SVID was valid: %v", err)
	}
	waitUntil(t, leaf.NotAfter.Add(time.Second))
	if _, err := shake(gw.address, look); err == nil {
		t.Error("the gateway takes connections with an SVID that has expired")
	}

	far.start(t)
	waitFor(t, "the agent to be back", far.healthy)
	back := waitFor(t, "the gateway to be ready", gw.isReady)
	if _, err := shake(gw.address, look); err != nil {
		t.Errorf("a new connection was refused once the gateway was ready: %v", err)
	}
	served := back + waitFor(t, "a call to be served", func() error {
		return echo(t.Context(), inference.NewGRPCInferenceServiceClient(conn))
	})
	// The wait for a new try is a second; the rest is slack for a busy machine.
	if served > 15*time.Second {
		t.Errorf("calls were served %v after the agent was back", served)
	}
	t.Logf("%d calls, %d failed; unready %v before the SVID ended; ready %v after the agent was back, a call served after %v",
		l.calls.Load(), len(l.failures), before.Round(time.Millisecond), back.Round(time.Millisecond), served.Round(time.Millisecond))
}
