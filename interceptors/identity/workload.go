package identity

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"
	"syscall"
	"time"

	configv1 "github.com/sluicegate/sluice/proto/gen/sluice/config/v1"
	"github.com/spiffe/go-spiffe/v2/bundle/jwtbundle"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

const (
	// workloadTimeout is how long start-up waits for an identity. Chosen: an agent
	// of SPIRE learns of a new entry within five seconds, and of being attested
	// within some more.
	workloadTimeout = 30 * time.Second
	// A Workload API that went away is looked for again at least this often: a
	// recovery takes twice that, for the connection and the question. go-spiffe's
	// 30 s and grpc-go's 120 s are too long for an SVID of a minute. Chosen.
	workloadRetry = 500 * time.Millisecond
)

// workload is what the Workload API said last.
type workload struct {
	source  *Source
	socket  string
	id      spiffeid.ID // which identity to use; zero for the first
	wantJWT bool
	renewed func(error)
	ready   chan struct{} // closed with the first identity

	mu     sync.Mutex
	svid   *x509svid.SVID
	unfit  error // why the SVIDs that it said last are of no use
	x509   *x509bundle.Set
	jwt    *jwtbundle.Set
	failed string // what was reported last, empty after a success
	last   error
	closed bool
}

// checkWorkload refuses what could not work whatever the API says.
func checkWorkload(c *configv1.WorkloadAPI) error {
	if id := c.GetSpiffeId(); id != "" {
		if _, err := spiffeid.FromString(id); err != nil {
			return fmt.Errorf("identity.workload_api.spiffe_id: %q is no SPIFFE ID: %w", id, err)
		}
	}
	if socket := c.GetSocket(); socket != "" { // or else the environment says, where it is opened
		if err := workloadapi.ValidateAddress(socket); err != nil {
			return fmt.Errorf("identity.workload_api.socket: %q is no address of a Workload API; "+
				"write unix:///path/to/agent.sock or tcp://127.0.0.1:8000: %w", socket, err)
		}
	}
	return nil
}

// openWorkload waits for the first identity.
func openWorkload(ctx context.Context, c *configv1.WorkloadAPI, jwt bool, renewed func(error)) (*Source, error) {
	socket := c.GetSocket()
	if socket == "" {
		if socket = os.Getenv(workloadapi.SocketEnv); socket == "" {
			return nil, fmt.Errorf("identity.workload_api.socket: say where the Workload API is, here or in the environment variable %s", workloadapi.SocketEnv)
		}
		if err := workloadapi.ValidateAddress(socket); err != nil {
			return nil, fmt.Errorf("identity.workload_api.socket: the environment variable %s is %q: %w", workloadapi.SocketEnv, socket, err)
		}
	}
	client, err := workloadapi.New(ctx,
		workloadapi.WithAddr(socket),
		workloadapi.WithBackoffStrategy(retries{}),
		workloadapi.WithDialOptions(grpc.WithNoProxy(), grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: 100 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: workloadRetry},
			MinConnectTimeout: time.Second,
		})))
	if err != nil {
		return nil, fmt.Errorf("identity.workload_api.socket: %q: %w", socket, err)
	}
	s, watching := newSource()
	id, _ := spiffeid.FromString(c.GetSpiffeId())
	w := &workload{source: s, socket: socket, id: id, wantJWT: jwt, renewed: renewed, ready: make(chan struct{})}
	watch := func(f func() error) {
		s.stopped.Go(func() {
			for watching.Err() == nil {
				_ = f() // ends also when the API is told to: that is no reason to look no more
				select {
				case <-watching.Done():
				case <-time.After(workloadRetry):
				}
			}
		})
	}
	watch(func() error { return client.WatchX509Context(watching, w) })
	if jwt {
		watch(func() error { return client.WatchJWTBundles(watching, w) })
	}
	stop := s.stop
	s.stop = func() {
		w.mu.Lock()
		w.closed = true
		w.mu.Unlock()
		stop()
		_ = client.Close()
	}

	timeout := workloadTimeout
	if c.GetTimeout() != nil {
		timeout = c.GetTimeout().AsDuration()
	}
	timer := time.NewTimer(timeout)
	defer timer.Stop()
	select {
	case <-w.ready:
		return s, nil
	case <-timer.C:
		err = fmt.Errorf("identity.workload_api: no identity within %v from %s: %w", timeout, socket, w.why())
	case <-ctx.Done():
		err = fmt.Errorf("identity.workload_api: %w while waiting for an identity from %s: %w", context.Cause(ctx), socket, w.why())
	}
	_ = s.Close()
	return nil, err
}

// why is what the API said last.
func (w *workload) why() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.last == nil {
		return errors.New("it has not answered")
	}
	return w.last
}

// OnX509ContextUpdate implements workloadapi.X509ContextWatcher.
func (w *workload) OnX509ContextUpdate(c *workloadapi.X509Context) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.x509 = c.Bundles // in force even if there is nothing else to use: a bundle that is gone must be
	svid, err := w.pick(c.SVIDs)
	if err == nil {
		err = unexpired(svid)
	}
	if w.unfit = err; err == nil {
		w.svid = svid
	}
	w.use()
}

// OnX509ContextWatchError implements workloadapi.X509ContextWatcher.
func (w *workload) OnX509ContextWatchError(err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.report(w.explain(err))
}

// OnJWTBundlesUpdate implements workloadapi.JWTBundleWatcher.
func (w *workload) OnJWTBundlesUpdate(set *jwtbundle.Set) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.jwt = set
	w.use()
}

// OnJWTBundlesWatchError implements workloadapi.JWTBundleWatcher.
func (w *workload) OnJWTBundlesWatchError(err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.report(w.explain(err))
}

// pick finds the identity to use.
func (w *workload) pick(svids []*x509svid.SVID) (*x509svid.SVID, error) {
	if w.id.IsZero() {
		return svids[0], nil // there is one, or go-spiffe would have refused
	}
	var others []string
	for _, svid := range svids {
		if svid.ID == w.id {
			return svid, nil
		}
		others = append(others, svid.ID.String())
	}
	return nil, fmt.Errorf("the API has no SVID of %s for this process, only of %s; create an entry for it, or set identity.workload_api.spiffe_id to one of those",
		w.id, strings.Join(others, ", "))
}

// use puts in force what the API said.
func (w *workload) use() {
	if w.closed {
		return
	}
	if w.svid != nil && w.x509 != nil && (w.jwt != nil || !w.wantJWT) {
		m := &material{svid: w.svid, x509: make(map[spiffeid.TrustDomain]*x509bundle.Bundle), jwt: make(map[spiffeid.TrustDomain]*jwtbundle.Bundle)}
		for _, b := range w.x509.Bundles() {
			m.x509[b.TrustDomain()] = b
		}
		if w.jwt != nil {
			for _, b := range w.jwt.Bundles() {
				m.jwt[b.TrustDomain()] = b
			}
		}
		changed := w.source.use(m)
		select {
		case <-w.ready:
			if w.unfit == nil && (changed || w.failed != "") {
				w.failed = ""
				w.source.fail(nil)
				w.renewed(nil)
			}
		default:
			w.failed = ""
			close(w.ready)
		}
	}
	if w.unfit != nil {
		w.report(w.unfit)
	}
}

// report tells of an error, once for as long as it lasts.
func (w *workload) report(err error) {
	if w.closed {
		return
	}
	w.last = err
	select {
	case <-w.ready:
	default:
		return // openWorkload will tell
	}
	w.source.fail(err)
	if text := err.Error(); text != w.failed {
		w.failed = text
		w.renewed(fmt.Errorf("identity.workload_api: %s: %w", w.socket, err))
	}
}

// explain says how to mend what the API, or the way to it, answered.
func (w *workload) explain(err error) error {
	text := status.Convert(err).Message()
	if _, rest, ok := strings.Cut(text, "Error while dialing: "); ok {
		text = strings.TrimSuffix(rest, `"`) // what grpc-go wraps around it says nothing
	}
	is := func(e syscall.Errno) bool { return strings.Contains(text, e.Error()) }
	mend := ""
	switch code := status.Code(err); {
	case code == codes.PermissionDenied:
		mend = fmt.Sprintf("it knows no identity for this process (user %d, process %d); create a registration entry whose selectors match it, "+
			"and wait for the agent to learn of it", os.Getuid(), os.Getpid())
	case code == codes.Unimplemented:
		mend = "it lacks a part that the configuration needs; name the socket of another agent, or leave out identity.jwt"
	case code != codes.Unavailable:
	case is(syscall.ENOENT):
		mend = "there is no such socket; start the agent, or mount the folder of its socket here"
	case is(syscall.EACCES):
		mend = fmt.Sprintf("this process (user %d) may not use the socket; give it the right to write to it and to enter its folder", os.Getuid())
	case is(syscall.ECONNREFUSED):
		mend = "nobody listens there; start the agent"
	}
	if mend == "" {
		return fmt.Errorf("the Workload API says %q", text)
	}
	return fmt.Errorf("the Workload API says %q: %s", text, mend)
}

// retries is a workloadapi.BackoffStrategy: from a tenth of workloadRetry up to
// all of it.
type retries struct{}

func (retries) NewBackoff() workloadapi.Backoff { return new(retry) }

type retry struct{ last time.Duration }

func (r *retry) Next() time.Duration {
	r.last = min(max(2*r.last, workloadRetry/10), workloadRetry)
	return r.last
}

func (r *retry) Reset() { r.last = 0 }
