package identity

import (
	"bytes"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"sync"
	"sync/atomic"
	"time"

	configv1 "github.com/sluicegate/sluice/proto/gen/sluice/config/v1"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
)

// filesInterval is how often certificate files are read again. Chosen: short
// beside the 30 s that are left when an SVID of one minute is renewed at half
// of its life, and three small files cost nothing.
const filesInterval = 5 * time.Second

// localhost is what a development identity of our own may be called by clients
// that verify host names, such as gRPC in Python.
var localhost = []string{"localhost", "127.0.0.1", "::1"}

// Source is who we are and whom we trust, now. It is an x509svid.Source and an
// x509bundle.Source, and safe for concurrent use. Close it when done.
type Source struct {
	insecure  bool
	authority *Authority
	current   atomic.Pointer[material]
	stop      chan struct{}
	stopOnce  sync.Once
	stopped   sync.WaitGroup
}

// material is one consistent state of a source. It is immutable.
type material struct {
	svid   *x509svid.SVID
	bundle *x509bundle.Bundle
}

var (
	_ x509svid.Source   = (*Source)(nil)
	_ x509bundle.Source = (*Source)(nil)
)

// Open makes the source that the configuration names. It is ready when Open
// returns.
//
// Files are read again every five seconds. What cannot be used, because it is
// half written or wrong, leaves the last good identity in place. A development
// identity is renewed at half of its life, and its files with it.
//
// Renewed, if not nil, is called after each change: with nil if the new
// identity is in use, else with what is wrong with it. It is called from one
// goroutine at a time, never after Close has returned, and must not call Close.
//
// With Insecure the source has no identity: see ServerCredentials.
func Open(c *configv1.Identity, renewed func(error)) (*Source, error) {
	switch c.GetSource().(type) {
	case *configv1.Identity_Development:
		return openDevelopment(c.GetDevelopment(), renewed)
	case *configv1.Identity_Files:
		f := &files{config: c.GetFiles()}
		return newSource(filesInterval, f.load, renewed)
	case *configv1.Identity_Insecure:
		return &Source{insecure: true, stop: make(chan struct{})}, nil
	}
	return nil, errors.New("identity: set one of development, files and insecure")
}

// Source makes a source for an identity that the authority issues, valid for 24 h
// and renewed at half of that. Path and hosts are as in Issue.
func (a *Authority) Source(path string, hosts ...string) (*Source, error) {
	return a.source(func() (*x509svid.SVID, error) { return a.Issue(path, svidLife, hosts...) }, nil)
}

func (a *Authority) source(issue func() (*x509svid.SVID, error), renewed func(error)) (*Source, error) {
	s, err := newSource(svidLife/2, func() (*material, error) {
		svid, err := issue()
		if svid == nil {
			return nil, err
		}
		return &material{svid, a.Bundle()}, err
	}, renewed)
	if err != nil {
		return nil, err
	}
	s.authority = a
	return s, nil
}

// checkDevelopment fills in what is not set of a development authority, and refuses
// what it could not do.
func checkDevelopment(c *configv1.DevelopmentAuthority) (trustDomain spiffeid.TrustDomain, path string, err error) {
	name, path := c.GetTrustDomain(), c.GetPath()
	if name == "" {
		name = "sluice.dev"
	}
	if path == "" {
		path = "/gateway"
	}
	if trustDomain, err = spiffeid.TrustDomainFromString(name); err != nil {
		return trustDomain, path, fmt.Errorf("identity.development.trust_domain: %q is no trust domain: %w", name, err)
	}
	if err := spiffeid.ValidatePath(path); err != nil {
		return trustDomain, path, fmt.Errorf("identity.development.path: %q is no path of a SPIFFE ID: %w", path, err)
	}
	if len(c.GetIssue()) > 0 && c.GetDirectory() == "" {
		return trustDomain, path, errors.New("identity.development.directory: name the folder to write the identities of identity.development.issue to")
	}
	taken := map[string]string{"bundle.pem": "the bundle"}
	for n, path := range c.GetIssue() {
		field := fmt.Sprintf("identity.development.issue[%d]", n)
		if err := spiffeid.ValidatePath(path); err != nil {
			return trustDomain, path, fmt.Errorf("%s: %q is no path of a SPIFFE ID: %w", field, path, err)
		}
		if path == "" {
			return trustDomain, path, fmt.Errorf("%s: an identity needs a path, such as /client", field)
		}
		for _, file := range []string{fileName(path) + ".pem", fileName(path) + "-key.pem"} {
			if other, ok := taken[file]; ok {
				return trustDomain, path, fmt.Errorf("%s: %s would be written to %s, and so would %s; choose another path", field, path, file, other)
			}
			taken[file] = path
		}
	}
	return trustDomain, path, nil
}

func openDevelopment(c *configv1.DevelopmentAuthority, renewed func(error)) (*Source, error) {
	trustDomain, path, err := checkDevelopment(c)
	if err != nil {
		return nil, err
	}
	a, err := NewAuthority(trustDomain)
	if err != nil {
		return nil, err
	}
	return a.source(func() (*x509svid.SVID, error) {
		own, err := a.Issue(path, svidLife, localhost...)
		if err != nil {
			return nil, err
		}
		for _, path := range c.GetIssue() {
			svid, err := a.Issue(path, svidLife)
			if err != nil {
				return own, err
			}
			if err := a.WriteFiles(c.GetDirectory(), fileName(path), svid); err != nil {
				return own, fmt.Errorf("identity.development.directory: %w", err)
			}
		}
		return own, nil
	}, renewed)
}

// newSource loads the identity, and again every interval. A load that returns
// no material found nothing to use; what it returns beside an error is used all
// the same, except at the start.
func newSource(interval time.Duration, load func() (*material, error), renewed func(error)) (*Source, error) {
	first, err := load()
	if err != nil {
		return nil, err
	}
	s := &Source{stop: make(chan struct{})}
	s.current.Store(first)
	s.stopped.Go(func() {
		tick := time.NewTicker(interval)
		defer tick.Stop()
		for {
			select {
			case <-s.stop:
				return
			case <-tick.C:
			}
			m, err := load()
			if m != nil {
				s.current.Store(m)
			}
			if renewed != nil && (m != nil || err != nil) {
				renewed(err)
			}
		}
	})
	return s, nil
}

// Close ends the renewal and waits until it has ended. What was loaded last
// stays in use. Close may be called more than once.
func (s *Source) Close() error {
	s.stopOnce.Do(func() { close(s.stop) })
	s.stopped.Wait()
	return nil
}

// Insecure reports that the configuration turned identity off.
func (s *Source) Insecure() bool { return s.insecure }

// Authority is the development authority behind the source, or nil.
func (s *Source) Authority() *Authority { return s.authority }

var errInsecure = errors.New("identity: there is no identity, because identity.insecure is configured")

// GetX509SVID is our identity. It is an error if there is none, or if it has
// expired.
func (s *Source) GetX509SVID() (*x509svid.SVID, error) {
	m := s.current.Load()
	if m == nil {
		return nil, errInsecure
	}
	if end := m.svid.Certificates[0].NotAfter; time.Now().After(end) {
		return nil, fmt.Errorf("identity: our own certificate expired at %s; renew it", end.UTC().Format(time.RFC3339))
	}
	return m.svid, nil
}

// GetX509BundleForTrustDomain is the bundle of our own trust domain; any other
// is an error.
func (s *Source) GetX509BundleForTrustDomain(td spiffeid.TrustDomain) (*x509bundle.Bundle, error) {
	m := s.current.Load()
	if m == nil {
		return nil, errInsecure
	}
	return m.bundle.GetX509BundleForTrustDomain(td)
}

// TrustDomain is our own trust domain; zero if identity is off.
func (s *Source) TrustDomain() spiffeid.TrustDomain {
	if m := s.current.Load(); m != nil {
		return m.svid.ID.TrustDomain()
	}
	return spiffeid.TrustDomain{}
}

// files are PEM files and what was in them last. Their contents are compared,
// not their times: a file that was rewritten within one tick of the file
// system's clock looks unchanged.
type files struct {
	config *configv1.IdentityFiles
	seen   [3][]byte
	failed string
}

// load reads the files. It returns nil if they are as they were, or wrong in
// the same way as before.
func (f *files) load() (*material, error) {
	now, err := f.read()
	if err == nil {
		same := f.failed == ""
		for n := range now {
			same = same && f.seen[n] != nil && bytes.Equal(now[n], f.seen[n])
		}
		if same {
			return nil, nil
		}
		var m *material
		if m, err = f.parse(now); err == nil {
			f.seen, f.failed = now, ""
			return m, nil
		}
	}
	if err.Error() == f.failed {
		return nil, nil
	}
	f.failed = err.Error()
	return nil, err
}

func (f *files) read() (data [3][]byte, err error) {
	for n, file := range []struct{ field, path string }{
		{"certificate", f.config.GetCertificate()},
		{"key", f.config.GetKey()},
		{"bundle", f.config.GetBundle()},
	} {
		if data[n], err = os.ReadFile(file.path); err != nil {
			return data, fmt.Errorf("identity.files.%s: %w", file.field, err)
		}
	}
	return data, nil
}

func (f *files) parse(data [3][]byte) (*material, error) {
	certificate, key, bundle := f.config.GetCertificate(), f.config.GetKey(), f.config.GetBundle()
	if err := firstBlock(data[0], "CERTIFICATE"); err != nil {
		return nil, fmt.Errorf("identity.files.certificate: %s: %w", certificate, err)
	}
	if err := firstBlock(data[1], "PRIVATE KEY"); err != nil {
		return nil, fmt.Errorf("identity.files.key: %s: %w; convert a key of another kind with openssl pkcs8 -topk8 -nocrypt", key, err)
	}
	if err := firstBlock(data[2], "CERTIFICATE"); err != nil {
		return nil, fmt.Errorf("identity.files.bundle: %s: %w", bundle, err)
	}
	svid, err := x509svid.Parse(data[0], data[1])
	if err != nil {
		return nil, fmt.Errorf("identity.files: %s and %s are no X.509-SVID and its key: %w", certificate, key, err)
	}
	trusted, err := x509bundle.Parse(svid.ID.TrustDomain(), data[2])
	if err != nil {
		return nil, fmt.Errorf("identity.files.bundle: %s: %w", bundle, err)
	}
	if _, _, err := x509svid.Verify(svid.Certificates, trusted); err != nil {
		return nil, fmt.Errorf("identity.files: %s is not valid by the authorities in %s: %w; "+
			"renew the certificate, or name the bundle of its trust domain", certificate, bundle, err)
	}
	return &material{svid, trusted}, nil
}

// firstBlock checks the kind of the first PEM block. The block itself may be a
// secret and is not quoted.
func firstBlock(data []byte, kind string) error {
	switch block, _ := pem.Decode(data); {
	case block == nil:
		return errors.New("holds no PEM block")
	case block.Type != kind:
		return fmt.Errorf("holds a PEM block of type %q where %q is needed", block.Type, kind)
	}
	return nil
}
