package identity

import (
	"bytes"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"slices"
	"time"

	configv1 "github.com/sluicegate/sluice/proto/gen/sluice/config/v1"
	"github.com/spiffe/go-spiffe/v2/bundle/jwtbundle"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
)

const (
	// filesInterval is how often certificate files are read again, unless that is
	// more than a sixtieth of the SVID's life. Chosen: a few small files cost
	// nothing, and of an SVID of a minute half is left when it is renewed.
	filesInterval = 5 * time.Second
	// filesSettle is how long files must stay as they are before they are used: who
	// writes them may write one after the other, or one in pieces. Chosen.
	filesSettle = 100 * time.Millisecond
)

// file is one that an identity is made of.
type file struct {
	kind  fileKind
	field string
	path  string
	of    spiffeid.TrustDomain // of a bundle; zero for our own
}

type fileKind int

const (
	certificateFile fileKind = iota
	keyFile
	x509BundleFile
	jwtBundleFile
)

// filesOf lists the files of a configuration: first certificate, key and our
// own bundle.
func filesOf(c *configv1.IdentityFiles) []file {
	list := []file{
		{kind: certificateFile, field: "certificate", path: c.GetCertificate()},
		{kind: keyFile, field: "key", path: c.GetKey()},
		{kind: x509BundleFile, field: "bundle", path: c.GetBundle()},
	}
	if c.GetJwtBundle() != "" {
		list = append(list, file{kind: jwtBundleFile, field: "jwt_bundle", path: c.GetJwtBundle()})
	}
	for n, f := range c.GetFederated() {
		td, _ := spiffeid.TrustDomainFromString(f.GetTrustDomain())
		field := fmt.Sprintf("federated[%d].", n)
		list = append(list, file{x509BundleFile, field + "bundle", f.GetBundle(), td})
		if f.GetJwtBundle() != "" {
			list = append(list, file{jwtBundleFile, field + "jwt_bundle", f.GetJwtBundle(), td})
		}
	}
	return list
}

// checkFiles refuses what could not work whatever is in the files.
func checkFiles(c *configv1.IdentityFiles, jwt bool) error {
	known := make(map[spiffeid.TrustDomain]bool)
	for n, f := range c.GetFederated() {
		td, err := spiffeid.TrustDomainFromString(f.GetTrustDomain())
		if err != nil {
			return fmt.Errorf("identity.files.federated[%d].trust_domain: %q is no trust domain: %w", n, f.GetTrustDomain(), err)
		}
		if known[td] {
			return fmt.Errorf("identity.files.federated[%d].trust_domain: %q is there already", n, td)
		}
		known[td] = true
	}
	if !jwt {
		return nil
	}
	hasKeys := func(f file) bool { return f.kind == jwtBundleFile }
	if !slices.ContainsFunc(filesOf(c), hasKeys) {
		return errors.New("identity.files.jwt_bundle: identity.jwt needs the keys of JWT-SVIDs; name a file that holds them as a JWK set")
	}
	return nil
}

// files are what an identity is made of, and what was in them last. Their
// contents are compared, not their times: a file that was rewritten within one
// tick of the file system's clock looks unchanged.
type files struct {
	list []file
	last [][]byte      // what was read last
	done [][]byte      // what was used last, or found unfit
	life time.Duration // of the SVID in use
}

// load reads the files. It returns nil if they are as they were, or wrong in
// the same way as before, or may still be being written.
func (f *files) load() (*material, time.Duration, error) {
	now, err := f.read()
	if err != nil {
		now = [][]byte{[]byte(err.Error())}
	}
	first := f.done == nil
	settled := first || equal(now, f.last)
	f.last = now
	switch {
	case !settled:
		return nil, filesSettle, nil
	case !first && equal(now, f.done):
		return nil, f.interval(), nil
	}
	f.done = now
	var m *material
	if err == nil {
		m, err = f.parse(now)
	}
	if err != nil {
		return nil, f.interval(), err
	}
	leaf := m.svid.Certificates[0]
	f.life = leaf.NotAfter.Sub(leaf.NotBefore)
	return m, f.interval(), nil
}

func (f *files) interval() time.Duration {
	return min(filesInterval, max(f.life/60, filesSettle))
}

func equal(a, b [][]byte) bool { return slices.EqualFunc(a, b, bytes.Equal) }

func (f *files) read() ([][]byte, error) {
	var data [][]byte
	for _, file := range f.list {
		text, err := os.ReadFile(file.path)
		if err != nil {
			return nil, file.wrong(err)
		}
		data = append(data, text)
	}
	return data, nil
}

func (f *file) wrong(err error) error {
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, os.ErrPermission) { // which name the file
		return fmt.Errorf("identity.files.%s: %w", f.field, err)
	}
	return fmt.Errorf("identity.files.%s: %s: %w", f.field, f.path, err)
}

func (f *files) parse(data [][]byte) (*material, error) {
	for n, file := range f.list {
		var err error
		switch file.kind {
		case certificateFile, x509BundleFile:
			err = wholePEM(data[n], "CERTIFICATE")
		case keyFile:
			if err = wholePEM(data[n], "PRIVATE KEY"); err != nil {
				err = fmt.Errorf("%w; convert a key of another kind with openssl pkcs8 -topk8 -nocrypt", err)
			}
		}
		if err != nil {
			return nil, file.wrong(err)
		}
	}
	certificate, key, bundle := f.list[0].path, f.list[1].path, f.list[2].path
	svid, err := x509svid.Parse(data[0], data[1])
	if err != nil {
		return nil, fmt.Errorf("identity.files: %s and %s are no X.509-SVID and its key: %w", certificate, key, err)
	}
	own := svid.ID.TrustDomain()
	m := &material{
		svid: svid,
		x509: make(map[spiffeid.TrustDomain]*x509bundle.Bundle),
		jwt:  make(map[spiffeid.TrustDomain]*jwtbundle.Bundle),
	}
	for n, file := range f.list {
		td := file.of
		switch {
		case td.IsZero():
			td = own
		case td == own:
			return nil, file.wrong(fmt.Errorf("%q is our own trust domain, whose bundle is identity.files.bundle", td))
		}
		switch file.kind {
		case x509BundleFile:
			m.x509[td], err = x509bundle.Parse(td, data[n])
		case jwtBundleFile:
			m.jwt[td], err = jwtbundle.Parse(td, data[n])
		}
		if err != nil {
			return nil, file.wrong(err)
		}
	}
	if _, _, err := x509svid.Verify(svid.Certificates, m); err != nil {
		return nil, fmt.Errorf("identity.files: %s is not valid by the authorities in %s: %w; "+
			"renew the certificate, or name the bundle of its trust domain", certificate, bundle, err)
	}
	return m, nil
}

// wholePEM checks the kind of the first PEM block, and that the last one is not
// cut short. A block may be a secret and is not quoted.
func wholePEM(data []byte, kind string) error {
	block, rest := pem.Decode(data)
	switch {
	case block == nil:
		return errors.New("holds no PEM block")
	case block.Type != kind:
		return fmt.Errorf("holds a PEM block of type %q where %q is needed", block.Type, kind)
	}
	for block != nil {
		data = rest
		block, rest = pem.Decode(data)
	}
	if bytes.Contains(data, []byte("-----BEGIN")) {
		return errors.New("ends within a PEM block; it may be being written")
	}
	return nil
}
