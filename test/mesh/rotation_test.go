//go:build linux

package mesh

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"google.golang.org/grpc"
)

// backdate is how long before an SVID is issued its life begins: SPIRE's own constant.
const backdate = 10 * time.Second

const rules = `
rules:
- {principals: ["spiffe://mesh.test/client", "spiffe://mesh.test/linked"], methods: [inference], models: [echo, words]}
`

// rotation is a test of rotations: two clients keep a gateway busy while everyone's SVIDs are renewed.
// One client is go-spiffe alone, the other has the chain linked in.
type rotation struct {
	life, sync, length time.Duration // of an SVID, between the agent's questions to the server, of the test
	rps, streams       int           // of each client
	stream             time.Duration // the length of each stream

	load    load
	serials map[string]bool // that the gateway showed on new connections
	slowest time.Duration   // from an SVID's issue to a new connection that shows it
}

// latest is how long after its issue a new SVID may be seen at last. The time of issue is known to the
// full second, the agent passes an SVID on within half a second, and we look four times a second.
const latest = 5 * time.Second

func (r *rotation) run(t *testing.T) {
	t.Helper()
	a := newAuthority(t, "mesh.test")
	g := newAgent(t, a, r.sync)
	g.entry(t, "/gateway", sluice(t), r.life)
	for _, path := range []string{"/model", "/client", "/linked"} {
		g.entry(t, path, self(t), r.life)
	}
	source := g.source(t, "/client")
	gw := newGateway(t, g, newModel(t, g), rules)

	ctx, cancel := context.WithTimeout(t.Context(), r.length)
	defer cancel()
	for _, conn := range []*grpc.ClientConn{
		dial(t, gw.address, source, a.id("/gateway")),
		dialLinked(t, gw.address, g, "/linked"),
	} {
		r.load.unary(ctx, conn, r.rps)
		for range r.streams {
			r.load.stream(ctx, conn, r.stream, min(r.stream/100, time.Second))
		}
	}

	r.serials = make(map[string]bool)
	tick := time.NewTicker(time.Second / 4)
	defer tick.Stop()
	for ctx.Err() == nil {
		leaf, err := shake(gw.address, tlsconfig.MTLSClientConfig(source, source, tlsconfig.AuthorizeID(a.id("/gateway"))))
		if err != nil {
			t.Errorf("a new connection was refused: %v", err)
			break
		}
		if serial := leaf.SerialNumber.String(); !r.serials[serial] {
			r.serials[serial] = true
			if len(r.serials) > 1 { // the first was there before
				r.slowest = max(r.slowest, time.Since(leaf.NotBefore.Add(backdate)))
			}
		}
		if err := gw.isReady(); err != nil {
			t.Errorf("the gateway is not ready: %v", err)
			break
		}
		select {
		case <-ctx.Done():
		case <-tick.C:
		}
	}
	r.load.check(t)
	if r.slowest > latest {
		t.Errorf("a new SVID was seen %v after its issue, want %v at most", r.slowest, latest)
	}
	t.Log(r)
}

func (r *rotation) String() string {
	return fmt.Sprintf("SVIDs of %v for %v: %d of the gateway; %d calls, %d streams of %v with %d messages, %d failed; "+
		"a new SVID was on new connections %v after its issue at most",
		r.life, r.length, len(r.serials), r.load.calls.Load(), r.load.streams.Load(), r.stream, r.load.messages.Load(),
		len(r.load.failures), r.slowest.Round(10*time.Millisecond))
}

// TestRotation: no call fails and no stream breaks while SVIDs are renewed and connections outlive them.
// An SVID of 20 s is renewed after 5 s, for its life began 10 s before it was issued.
func TestRotation(t *testing.T) {
	t.Parallel()
	r := &rotation{life: 20 * time.Second, sync: time.Second, length: 25 * time.Second, rps: 50, streams: 10,
		stream: 25 * time.Second}
	r.run(t)
	if len(r.serials) < 3 {
		t.Errorf("the gateway showed %d SVIDs, want 3 at least", len(r.serials))
	}
}

// TestSoak is TestRotation for longer, with more load and SPIRE's own intervals: make soak.
func TestSoak(t *testing.T) {
	length, err := time.ParseDuration(os.Getenv("SLUICE_SOAK"))
	if err != nil {
		t.Skip("make soak runs this, for as long as SLUICE_SOAK says")
	}
	// A stream must end within identity.expiry_grace of its client's SVID.
	r := &rotation{life: time.Minute, sync: 5 * time.Second, length: length, rps: 250, streams: 50,
		stream: min(length, 2*time.Minute)}
	defer func() { r.report(t, os.Getenv("SLUICE_SOAK_OUT")) }()
	r.run(t)
	if want := int(length / (50 * time.Second)); len(r.serials) < want {
		t.Errorf("the gateway showed %d SVIDs, want %d at least", len(r.serials), want)
	}
}

// report writes the result to a file.
func (r *rotation) report(t *testing.T, file string) {
	if file == "" {
		return
	}
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		t.Fatal(err)
	}
	result := "passed"
	if t.Failed() {
		result = "FAILED"
	}
	write(t, file, fmt.Sprintf("# Rotation of identities under load\n\n%s: %s. The load: 2 clients, each %d calls/s and %d streams.\n",
		result, r, r.rps, r.streams))
}
