package identity

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"github.com/sluicegate/sluice/interceptors"
	"github.com/sluicegate/sluice/interceptors/dialect"
	"github.com/sluicegate/sluice/proto/gen/inference"
	configv1 "github.com/sluicegate/sluice/proto/gen/sluice/config/v1"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
)

// watched are calls under a watch.
type watched struct {
	t        testing.TB
	live     interceptors.Live
	watch    *Watch
	keys     *keys
	backends []*interceptors.Backend
}

func newWatched(t testing.TB) *watched {
	t.Helper()
	d, err := dialect.Triton(dialect.Options{})
	if err != nil {
		t.Fatal(err)
	}
	w := &watched{t: t, backends: []*interceptors.Backend{{Name: "triton", Dialect: d}}, keys: keysOf()}
	w.watch = NewWatch(&w.live)
	t.Cleanup(w.watch.Close)
	return w
}

// enforce puts a configuration in force.
func (w *watched) enforce(c *configv1.Identity) *interceptors.Chain {
	w.t.Helper()
	p := newPolicy(w.t, c)
	p.Use(nil, w.watch)
	if c.Jwt != nil {
		p.callers.tokens = newTokens(c.Jwt.Audiences, w.keys, w.keys.number.Load)
	}
	w.watch.Enforce(p)
	return w.live.Chain(w.backends, p)
}

// begin begins a call; the first edits what is known of it.
func (w *watched) begin(c *interceptors.Chain, method *dialect.Method, id string, edit func(*interceptors.CallInfo)) *interceptors.Call {
	w.t.Helper()
	info := callOf(id, method).CallInfo
	if edit != nil {
		edit(&info)
	}
	call, err := c.Begin(context.Background(), info)
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { call.End(nil) })
	return call
}

// ask begins an inference of a model.
func (w *watched) ask(c *interceptors.Call, model, id, note string) *interceptors.Inference {
	w.t.Helper()
	r := &inference.ModelInferRequest{ModelName: model, Id: id}
	if note != "" {
		r.Parameters = map[string]*inference.InferParameter{
			"note": {ParameterChoice: &inference.InferParameter_StringParam{StringParam: note}}}
	}
	b, err := proto.Marshal(r)
	if err != nil {
		w.t.Fatal(err)
	}
	i, err := c.Request(interceptors.RawEnvelope(mem.BufferSlice{mem.SliceBuffer(b)}))
	if err != nil {
		w.t.Fatal(err)
	}
	return i
}

// ended is why a call was aborted, or "".
func ended(t testing.TB, c *interceptors.Call) interceptors.Reason {
	t.Helper()
	var d *interceptors.Denial
	switch err := context.Cause(c.Context()); {
	case err == nil:
		return ""
	case errors.As(err, &d):
		return d.Reason
	default:
		t.Errorf("the call ended with %v", err)
		return ""
	}
}

const alice, bob = "spiffe://sluice.test/alice", "spiffe://sluice.test/bob"

func TestWatchExpiry(t *testing.T) {
	for _, c := range []struct {
		name  string
		grace *durationpb.Duration
		want  time.Duration
	}{
		{"default", nil, defaultGrace},
		{"none", durationpb.New(0), 0},
		{"a minute", durationpb.New(time.Minute), time.Minute},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWatched(t)
				a := newAuthority(t, testDomain)
				w.keys.Add(a.JWTBundle())
				config := of(withJWT(), optional)
				config.ExpiryGrace = c.grace
				chain := w.enforce(config)
				token := jwtOf(t, a, "/alice", time.Hour-leeway)
				calls := map[string]*interceptors.Call{
					"certificate": w.begin(chain, infer, alice, nil), // an hour
					"token": w.begin(chain, infer, "", func(i *interceptors.CallInfo) {
						i.Metadata = metadata.Pairs("authorization", "Bearer "+token)
					}),
				}
				staying := w.begin(chain, infer, bob, func(i *interceptors.CallInfo) { i.Peer.Expires = time.Now().Add(24 * time.Hour) })
				time.Sleep(time.Hour + c.want - time.Second)
				synctest.Wait()
				for kind, call := range calls {
					if got := ended(t, call); got != "" {
						t.Errorf("%s: ended with %s within the grace", kind, got)
					}
				}
				time.Sleep(time.Second + defaultRecheck)
				synctest.Wait()
				for kind, call := range calls {
					if got := ended(t, call); got != interceptors.IdentityExpired {
						t.Errorf("%s: %q when the grace was over", kind, got)
					}
				}
				if got := ended(t, staying); got != "" {
					t.Errorf("a caller with time left: %s", got)
				}
			})
		})
	}
}

// What takes access away ends the calls that it is about, at once or with the
// next tick, and no others.
func TestWatchLosses(t *testing.T) {
	const proxy = "spiffe://sluice.test/proxy"
	both := allow(alice+" "+bob+" "+proxy, "inference", "*")
	for _, c := range []struct {
		name  string
		first *configv1.Identity
		edit  func(*interceptors.CallInfo)
		peer  string
		then  *configv1.Identity // put in force
		lose  func(*watched, *interceptors.Call)
		want  interceptors.Reason
	}{
		{name: "the rule", first: secure(both), peer: alice, then: secure(allow(bob, "inference", "*")), want: interceptors.MethodDenied},
		{name: "a deny rule", first: secure(both), peer: alice, then: secure(both, deny(alice, "inference", "")), want: interceptors.MethodDenied},
		{name: "the method", first: secure(both), peer: alice, then: secure(both, deny(alice, infer.Name, "*")), want: interceptors.MethodDenied},
		{name: "nothing", first: secure(both), peer: alice, then: secure(both, allow(alice, "health", "")), want: ""},
		{name: "the certificate's authority", first: secure(both), peer: alice,
			lose: func(_ *watched, c *interceptors.Call) { c.Peer.Proof.(*shown).revoked.Store(true) }, want: interceptors.IdentityUntrusted},
		{name: "the token's key", first: of(withJWT(), optional), edit: token, lose: func(w *watched, _ *interceptors.Call) {
			w.keys.Remove(testDomain)
			w.keys.number.Add(1)
		}, want: interceptors.IdentityUntrusted},
		{name: "the token's audience", first: of(withJWT(), optional), edit: token, then: of(withJWT(), optional, func(c *configv1.Identity) {
			c.Jwt.Audiences = []string{"other"}
		}), want: interceptors.IdentityUntrusted},
		{name: "tokens count no more", first: of(withJWT(), optional), edit: token, then: of(), want: interceptors.IdentityMissing},
		{name: "the proxy's word", first: of(withForwarded(proxy)), peer: proxy, edit: forwarded, then: of(), want: interceptors.IdentityUntrusted},
		{name: "the proxy's word, another's", first: of(withForwarded(proxy)), peer: proxy, edit: forwarded,
			then: of(withForwarded(proxy, bob)), want: ""},
		{name: "the proxy's word in place of its own", first: of(), peer: proxy, edit: forwarded, then: of(withForwarded(proxy)), want: interceptors.IdentityUntrusted},
		{name: "being anonymous", first: open(allow("anonymous", "inference", "*")), then: of(), want: interceptors.IdentityMissing},
		{name: "the policy's wits", first: secure(both), peer: alice,
			lose: func(_ *watched, c *interceptors.Call) { c.Peer.Proof.(*shown).broken.Store(true) }, want: interceptors.Internal},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWatched(t)
				a := newAuthority(t, testDomain)
				w.keys.Add(a.JWTBundle())
				chain := w.enforce(c.first)
				edit := func(i *interceptors.CallInfo) {
					if i.Peer.Proof = new(shown); c.peer == "" {
						i.Peer.Proof = nil
					}
					if c.edit != nil {
						c.edit(i)
					}
					if v := i.Metadata["authorization"]; v != nil {
						v[0] = "Bearer " + jwtOf(t, a, "/alice", 0)
					}
				}
				call := w.begin(chain, infer, c.peer, edit)
				var staying *interceptors.Call
				if c.first.GetInsecure() == nil {
					staying = w.begin(chain, infer, bob, nil)
				}
				time.Sleep(10*time.Second + defaultRecheck/2)
				synctest.Wait()
				if got := ended(t, call); got != "" {
					t.Fatalf("ended with %s before anything was lost", got)
				}
				if c.then != nil {
					w.enforce(c.then)
				}
				if c.lose != nil {
					c.lose(w, call)
				}
				synctest.Wait()
				if got := ended(t, call); c.then != nil && got != c.want || c.then == nil && got != "" {
					t.Errorf("%q at once", got)
				}
				time.Sleep(defaultRecheck)
				synctest.Wait()
				if got := ended(t, call); got != c.want {
					t.Errorf("%q a second later, want %q", got, c.want)
				}
				if staying != nil && ended(t, staying) != "" {
					t.Errorf("another call ended with %s", ended(t, staying))
				}
			})
		})
	}
}

func token(i *interceptors.CallInfo) { i.Metadata = metadata.Pairs("authorization", "") }

func forwarded(i *interceptors.CallInfo) {
	i.Metadata = metadata.Pairs(forwardedHeader, "URI=spiffe://sluice.test/alice")
}

// A call that is one inference ends with it; of many inferences on a stream the
// one that lost its model ends.
func TestWatchModels(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWatched(t)
		chain := w.enforce(secure(allow(alice, "inference", "a b")))
		one := w.begin(chain, infer, alice, nil)
		w.ask(one, "a", "1", "")
		other := w.begin(chain, infer, alice, nil)
		w.ask(other, "b", "1", "")
		many := w.begin(chain, stream, alice, nil)
		interceptors.NewStream(many, silent{})
		w.ask(many, "a", "1", "")
		w.ask(many, "b", "2", "")
		w.enforce(secure(allow(alice, "inference", "b")))
		synctest.Wait()
		if got := ended(t, one); got != interceptors.ModelDenied {
			t.Errorf("the only inference: %q", got)
		}
		if got := ended(t, other); got != "" {
			t.Errorf("one of another model: %q", got)
		}
		if got := ended(t, many); got != "" {
			t.Errorf("a stream with another model: %q", got)
		}
		if _, open := many.Open(); len(open) != 1 || open[0].Model != "b" {
			t.Errorf("%d inferences go on", len(open))
		}
	})
}

// silent is a door behind which nobody listens.
type silent struct{}

func (silent) Receive() (*interceptors.Envelope, error) { select {} }

func (silent) Forward(e *interceptors.Envelope, _ *interceptors.Inference) error {
	e.Release()
	return nil
}

func (silent) CloseForward() error { return nil }

func (silent) Deliver(e *interceptors.Envelope) error {
	e.Release()
	return nil
}

func (silent) Encoded(b []byte) (*interceptors.Envelope, error) {
	return interceptors.RawEnvelope(mem.BufferSlice{mem.SliceBuffer(b)}), nil
}

// Conditions hold as long as an inference runs: by the time of the day, and by
// the parameters that it came with.
func TestWatchConditions(t *testing.T) {
	conditional := func(when string) *configv1.Identity {
		r := allow(alice, "inference", "*")
		r.When = when
		return secure(r)
	}
	synctest.Test(t, func(t *testing.T) {
		w := newWatched(t)
		chain := w.enforce(conditional(`parameters.note == "a" && time < timestamp("2000-01-01T00:10:00Z")`))
		call := w.begin(chain, infer, alice, nil)
		w.ask(call, "m", "1", "a")
		time.Sleep(10*time.Minute - time.Second)
		synctest.Wait()
		if got := ended(t, call); got != "" {
			t.Fatalf("%s while the condition held", got)
		}
		time.Sleep(time.Second + defaultRecheck)
		synctest.Wait()
		if got := ended(t, call); got != interceptors.ModelDenied {
			t.Errorf("%q when it held no more", got)
		}

		chain = w.enforce(conditional(`parameters.note == "a"`))
		kept := w.begin(chain, infer, alice, nil)
		w.ask(kept, "m", "1", "a")
		w.enforce(conditional(`parameters.note in ["a", "b"]`))
		synctest.Wait()
		if got := ended(t, kept); got != "" {
			t.Errorf("%s though the new condition holds", got)
		}
		w.enforce(conditional(`parameters.note == "b"`))
		synctest.Wait()
		if got := ended(t, kept); got != interceptors.ModelDenied {
			t.Errorf("%q though the new condition does not hold", got)
		}
	})
}

// New inferences of a call are judged by the rules of the day too.
func TestAuthorizeByTheRulesOfTheDay(t *testing.T) {
	w := newWatched(t)
	chain := w.enforce(secure(allow(alice, "inference", "a")))
	call := w.begin(chain, stream, alice, nil)
	w.enforce(secure(allow(alice, "inference", "b")))
	w.ask(call, "b", "1", "")
	w.watch.Close()
	w.watch.Close() // again
}

func TestWatchInterval(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWatched(t)
		c := secure(allow(alice, "inference", "*"))
		c.Recheck = durationpb.New(time.Minute)
		call := w.begin(w.enforce(c), infer, alice, func(i *interceptors.CallInfo) { i.Peer.Proof = new(shown) })
		synctest.Wait()
		call.Peer.Proof.(*shown).revoked.Store(true)
		time.Sleep(time.Minute - time.Nanosecond)
		synctest.Wait()
		if got := ended(t, call); got != "" {
			t.Errorf("%s too early", got)
		}
		time.Sleep(time.Nanosecond)
		synctest.Wait()
		if got := ended(t, call); got != interceptors.IdentityUntrusted {
			t.Errorf("%q after a minute", got)
		}
	})
}

// The policy's share of a call: nothing is allocated.
func BenchmarkCall(b *testing.B) {
	w := newWatched(b)
	w.enforce(secure(allow(alice, "inference", "a b"), allow(bob, "inference", "*"), deny("spiffe://sluice.test/x/**", "inference", "")))
	p := w.watch.policy.Load()
	call := callOf(alice, infer)
	call.Peer.Proof = new(shown)
	i := &interceptors.Inference{Call: call, Model: "a"}
	b.ReportAllocs()
	for b.Loop() {
		part, err := p.Begin(call)
		if err == nil {
			err = part.(interceptors.Authorizer).Authorize(i, nil)
		}
		if err != nil {
			b.Fatal(err)
		}
		part.End(interceptors.Outcome{})
	}
}

// What a tick costs, for each call in flight.
func BenchmarkJudge(b *testing.B) {
	w := newWatched(b)
	chain := w.enforce(secure(allow(alice, "inference", "a b")))
	call := w.begin(chain, stream, alice, nil)
	w.ask(call, "a", "1", "")
	w.ask(call, "b", "2", "")
	p := w.watch.policy.Load()
	b.ReportAllocs()
	for b.Loop() {
		p.judge(call)
	}
}
