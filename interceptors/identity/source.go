package identity

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"sync"
	"sync/atomic"
	"time"

	configv1 "github.com/sluicegate/sluice/proto/gen/sluice/config/v1"
	"github.com/spiffe/go-spiffe/v2/bundle/jwtbundle"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
)

// readyMargin is how long before the end of our SVID a source is not ready any
// more, unless a tenth of the SVID's life is less. Chosen: longer than the few
// seconds in which load balancers notice.
const readyMargin = 10 * time.Second

// Source is who we are and whom we trust, now: an X.509-SVID, and the bundles
// of our own trust domain and of the federated ones. It is an x509svid.Source,
// an x509bundle.Source and a jwtbundle.Source, and safe for concurrent use.
// Close it when done.
type Source struct {
	insecure  bool
	authority *Authority
	current   atomic.Pointer[material]
	successor atomic.Pointer[Source]

	mu          sync.Mutex // of changes to current and successor, and of
	trouble     error      // why the identity was not renewed, nil if it was
	connections map[*connection]struct{}

	stop     context.CancelFunc
	stopOnce sync.Once
	stopped  sync.WaitGroup
}

// material is one consistent state of a source. It is immutable.
type material struct {
	generation uint64
	svid       *x509svid.SVID
	x509       map[spiffeid.TrustDomain]*x509bundle.Bundle
	jwt        map[spiffeid.TrustDomain]*jwtbundle.Bundle
}

var (
	_ x509svid.Source   = (*Source)(nil)
	_ x509bundle.Source = (*Source)(nil)
	_ jwtbundle.Source  = (*Source)(nil)
)

// Open makes the source that the configuration names. It is ready when Open
// returns.
//
// From the Workload API it waits for an identity, until the context ends or for
// as long as identity.workload_api.timeout says. What the API sends later is in
// force at once. If the API goes away the last identity stays, and it is looked
// for every second.
//
// Files are read again every five seconds, more often if the SVID lives for less
// than five minutes. What cannot be used, because it is half written or wrong,
// leaves the last good identity in place. A development identity is renewed at
// half of its life, and its files with it.
//
// Renewed, if not nil, is called after each change: with nil if the new
// identity is in use, else with what is wrong with it. It is called from one
// goroutine at a time, never after Close has returned, and must not call Close.
//
// With Insecure the source has no identity: see ServerCredentials.
func Open(ctx context.Context, c *configv1.Identity, renewed func(error)) (*Source, error) {
	if err := checkSource(c); err != nil {
		return nil, err
	}
	if renewed == nil {
		renewed = func(error) {}
	}
	switch c.GetSource().(type) {
	case *configv1.Identity_WorkloadApi:
		return openWorkload(ctx, c.GetWorkloadApi(), c.GetJwt() != nil, renewed)
	case *configv1.Identity_Files:
		f := &files{list: filesOf(c.GetFiles())}
		return poll(f.load, renewed)
	case *configv1.Identity_Development:
		return openDevelopment(c.GetDevelopment(), renewed)
	}
	return &Source{insecure: true, stop: func() {}}, nil
}

// checkSource finds what is wrong with a configuration without opening it.
func checkSource(c *configv1.Identity) error {
	switch c.GetSource().(type) {
	case *configv1.Identity_WorkloadApi:
		return checkWorkload(c.GetWorkloadApi())
	case *configv1.Identity_Files:
		return checkFiles(c.GetFiles(), c.GetJwt() != nil)
	case *configv1.Identity_Development:
		_, _, err := checkDevelopment(c.GetDevelopment())
		return err
	case *configv1.Identity_Insecure:
		return nil
	}
	return errors.New("identity: set one of workload_api, files, development and insecure")
}

func newSource() (*Source, context.Context) {
	ctx, stop := context.WithCancel(context.Background()) //nolint:gosec // Close calls stop
	return &Source{stop: stop, connections: make(map[*connection]struct{})}, ctx
}

// poll makes a source of what load returns, now and again after the time that
// load asks for. A load that returns no material found nothing new to use; what
// it returns beside an error is used all the same, except at the start.
func poll(load func() (*material, time.Duration, error), renewed func(error)) (*Source, error) {
	first, wait, err := load()
	if err != nil {
		return nil, err
	}
	s, ctx := newSource()
	s.use(first)
	s.stopped.Go(func() {
		timer := time.NewTimer(wait)
		defer timer.Stop()
		for {
			select {
			case <-ctx.Done():
				return
			case <-timer.C:
			}
			m, wait, err := load()
			timer.Reset(wait)
			if m != nil {
				s.use(m)
			}
			if m != nil || err != nil {
				s.fail(err)
				renewed(err)
			}
		}
	})
	return s, nil
}

// generations numbers the states of all sources.
var generations atomic.Uint64

// use puts a state in force, and has the connections that were made in another
// one see to it. It reports whether anything changed. Calls must not overlap.
func (s *Source) use(m *material) bool {
	s.mu.Lock()
	old := s.current.Load()
	if old != nil && m.same(old) {
		s.mu.Unlock()
		return false
	}
	m.generation = generations.Add(1)
	s.current.Store(m)
	s.mu.Unlock()
	s.tell()
	return true
}

// tell has each connection look whether it can stay.
func (s *Source) tell() {
	s.mu.Lock()
	connections := make([]*connection, 0, len(s.connections))
	for c := range s.connections {
		connections = append(connections, c)
	}
	s.mu.Unlock()
	for _, c := range connections {
		c.plan()
	}
}

// same takes over from another state what is equal, and reports whether all is.
func (m *material) same(old *material) bool {
	for td, b := range m.x509 {
		if o := old.x509[td]; o != nil && o.Equal(b) {
			m.x509[td] = o
		}
	}
	for td, b := range m.jwt {
		if o := old.jwt[td]; o != nil && o.Equal(b) {
			m.jwt[td] = o
		}
	}
	if m.svid.Certificates[0].Equal(old.svid.Certificates[0]) {
		m.svid = old.svid
	}
	return m.svid == old.svid && maps.Equal(m.x509, old.x509) && maps.Equal(m.jwt, old.jwt)
}

// fail notes why the identity was not renewed; nil if it was.
func (s *Source) fail(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.trouble = err
}

// Close ends the renewal and waits until it has ended. What was loaded last
// stays in use. Close may be called more than once.
func (s *Source) Close() error {
	s.stopOnce.Do(s.stop)
	s.stopped.Wait()
	return nil
}

// Replace puts this source in the place of another, as a reload does: what was
// made with the other is judged by this one from now on, connections and calls
// in flight too. Both stay to be closed. It does nothing if they are the same.
func (s *Source) Replace(other *Source) {
	if other == nil || other.latest() == s.latest() {
		return
	}
	other = other.latest()
	other.mu.Lock()
	other.successor.Store(s)
	moved := other.connections
	other.connections = nil
	other.mu.Unlock()
	for c := range moved {
		s.add(c)
	}
}

// latest is the source that stands in our place.
func (s *Source) latest() *Source {
	for {
		next := s.successor.Load()
		if next == nil {
			return s
		}
		s = next
	}
}

// add takes a connection into our care, or that of whoever stands in our place.
func (s *Source) add(c *connection) {
	for {
		s = s.latest()
		s.mu.Lock()
		if s.successor.Load() == nil {
			if s.connections != nil {
				s.connections[c] = struct{}{}
			}
			s.mu.Unlock()
			c.plan()
			return
		}
		s.mu.Unlock()
	}
}

// remove is for a connection that has been closed.
func (s *Source) remove(c *connection) {
	for ; s != nil; s = s.successor.Load() {
		s.mu.Lock()
		delete(s.connections, c)
		s.mu.Unlock()
	}
}

// state is nil if there is no identity.
func (s *Source) state() *material { return s.latest().current.Load() }

// Insecure reports that the configuration turned identity off.
func (s *Source) Insecure() bool { return s.insecure }

// Authority is the development authority behind the source, or nil.
func (s *Source) Authority() *Authority { return s.authority }

// Generation is a number that changes whenever our SVID or a bundle does; 0 if
// identity is off. It is cheap enough to ask for each call.
func (s *Source) Generation() uint64 {
	if m := s.state(); m != nil {
		return m.generation
	}
	return 0
}

// Ready is nil as long as our SVID is valid for a while yet: 10 s, or a tenth of
// its life if that is less. Otherwise it says why. Without identity it is nil.
func (s *Source) Ready() error {
	s = s.latest()
	m := s.current.Load()
	if m == nil {
		return nil
	}
	leaf := m.svid.Certificates[0]
	margin := min(readyMargin, leaf.NotAfter.Sub(leaf.NotBefore)/10)
	if time.Until(leaf.NotAfter) > margin {
		return nil
	}
	s.mu.Lock()
	trouble := s.trouble
	s.mu.Unlock()
	end := leaf.NotAfter.UTC().Format(time.RFC3339)
	if trouble != nil {
		return fmt.Errorf("identity: our own certificate ends at %s and was not renewed: %w", end, trouble)
	}
	return fmt.Errorf("identity: our own certificate ends at %s and nobody has renewed it", end)
}

var errInsecure = errors.New("identity: there is no identity, because identity.insecure is configured")

// errOwnExpired is why nobody connects to us or is connected to.
var errOwnExpired = errors.New("identity: our own certificate expired")

// GetX509SVID is our identity. It is an error if there is none, or if it has
// expired.
func (s *Source) GetX509SVID() (*x509svid.SVID, error) {
	m := s.state()
	if m == nil {
		return nil, errInsecure
	}
	if err := unexpired(m.svid); err != nil {
		return nil, err
	}
	return m.svid, nil
}

func unexpired(svid *x509svid.SVID) error {
	if end := svid.Certificates[0].NotAfter; time.Now().After(end) {
		return fmt.Errorf("%w at %s; renew it", errOwnExpired, end.UTC().Format(time.RFC3339))
	}
	return nil
}

// GetX509BundleForTrustDomain is the bundle of our own trust domain or of a
// federated one; any other is an error.
func (s *Source) GetX509BundleForTrustDomain(td spiffeid.TrustDomain) (*x509bundle.Bundle, error) {
	m := s.state()
	if m == nil {
		return nil, errInsecure
	}
	return m.GetX509BundleForTrustDomain(td)
}

func (m *material) GetX509BundleForTrustDomain(td spiffeid.TrustDomain) (*x509bundle.Bundle, error) {
	if b := m.x509[td]; b != nil {
		return b, nil
	}
	return nil, fmt.Errorf("identity: no trust bundle of %q: it is neither our trust domain nor a federated one", td)
}

// GetJWTBundleForTrustDomain holds the keys of JWT-SVIDs, likewise. From the
// Workload API there are some only if identity.jwt is configured.
func (s *Source) GetJWTBundleForTrustDomain(td spiffeid.TrustDomain) (*jwtbundle.Bundle, error) {
	m := s.state()
	if m == nil {
		return nil, errInsecure
	}
	if b := m.jwt[td]; b != nil {
		return b, nil
	}
	return nil, fmt.Errorf("identity: no JWT keys of %q: it is neither our trust domain nor a federated one, or no keys of it are configured", td)
}

// TrustDomain is our own trust domain; zero if identity is off.
func (s *Source) TrustDomain() spiffeid.TrustDomain {
	if m := s.state(); m != nil {
		return m.svid.ID.TrustDomain()
	}
	return spiffeid.TrustDomain{}
}
