package identity

import (
	"errors"
	"fmt"
	"time"

	configv1 "github.com/sluicegate/sluice/proto/gen/sluice/config/v1"
	"github.com/spiffe/go-spiffe/v2/bundle/jwtbundle"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
)

// localhost is what a development identity of our own may be called by clients
// that verify host names, such as gRPC in Python.
var localhost = []string{"localhost", "127.0.0.1", "::1"}

// Source makes a source for an identity that the authority issues, valid for 24 h
// and renewed at half of that. Path and hosts are as in Issue.
func (a *Authority) Source(path string, hosts ...string) (*Source, error) {
	return a.SourceFor(svidLife, path, hosts...)
}

// SourceFor is Source with an identity that is valid for ttl and renewed at half
// of that, for trying out what happens then.
func (a *Authority) SourceFor(ttl time.Duration, path string, hosts ...string) (*Source, error) {
	return a.source(ttl, func() (*x509svid.SVID, error) { return a.Issue(path, ttl, hosts...) }, nil)
}

func (a *Authority) source(ttl time.Duration, issue func() (*x509svid.SVID, error), renewed func(error)) (*Source, error) {
	if renewed == nil {
		renewed = func(error) {}
	}
	s, err := poll(func() (*material, time.Duration, error) {
		svid, err := issue()
		if svid == nil {
			return nil, ttl / 2, err
		}
		return &material{
			svid: svid,
			x509: map[spiffeid.TrustDomain]*x509bundle.Bundle{a.trustDomain: a.Bundle()},
			jwt:  map[spiffeid.TrustDomain]*jwtbundle.Bundle{a.trustDomain: a.JWTBundle()},
		}, ttl / 2, err
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
	return a.source(svidLife, func() (*x509svid.SVID, error) {
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
