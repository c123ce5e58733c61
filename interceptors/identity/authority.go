package identity

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/jwtbundle"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
)

const (
	// authorityLife is how long a development authority can be used. Chosen: a
	// working week and its weekend, so that a forgotten one ends by itself.
	authorityLife = 7 * 24 * time.Hour
	// svidLife is the default life of what it issues. Chosen: a day, so that
	// what was written to disk for today's trials does not work for long.
	svidLife = 24 * time.Hour
	// clockSkew is how far certificates are dated back. Chosen: containers and
	// machines that were just resumed are some seconds behind.
	clockSkew = time.Minute
)

// Authority is a certificate authority for one trust domain, inside the
// process. It is for trying things out: its key is in memory only and is gone
// when the process ends, and it lives for seven days. Safe for concurrent use.
type Authority struct {
	trustDomain spiffeid.TrustDomain
	key         *ecdsa.PrivateKey
	certificate *x509.Certificate
	jwtKey      *ecdsa.PrivateKey
	jwtKeyID    string
}

// NewAuthority makes an authority with a new key (ECDSA P-256, which every TLS
// stack has).
func NewAuthority(trustDomain spiffeid.TrustDomain) (*Authority, error) {
	if trustDomain.IsZero() {
		return nil, errors.New("a development authority needs a trust domain")
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	now := time.Now()
	template := &x509.Certificate{
		Subject:               pkix.Name{Organization: []string{"Sluice development authority"}},
		NotBefore:             now.Add(-clockSkew),
		NotAfter:              now.Add(authorityLife),
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		BasicConstraintsValid: true,
		IsCA:                  true,
		MaxPathLenZero:        true,
		URIs:                  []*url.URL{trustDomain.ID().URL()},
	}
	certificate, err := sign(template, template, key, key)
	if err != nil {
		return nil, err
	}
	jwtKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	return &Authority{trustDomain, key, certificate, jwtKey, rand.Text()}, nil
}

// TrustDomain is the trust domain that it issues for.
func (a *Authority) TrustDomain() spiffeid.TrustDomain { return a.trustDomain }

// Bundle is what those who trust the authority need.
func (a *Authority) Bundle() *x509bundle.Bundle {
	return x509bundle.FromX509Authorities(a.trustDomain, []*x509.Certificate{a.certificate})
}

// Issue makes an X.509-SVID with a new key for the SPIFFE ID with this path,
// such as "/client". It is valid for ttl, or 24 h if that is zero, but not
// longer than the authority. Hosts are DNS names and IP addresses for peers that
// verify a server by its host name, not its SPIFFE ID; give them only to a
// server, because whoever holds them is that host to such peers.
func (a *Authority) Issue(path string, ttl time.Duration, hosts ...string) (*x509svid.SVID, error) {
	id, err := spiffeid.FromPath(a.trustDomain, path)
	if err != nil {
		return nil, fmt.Errorf("%q is no path of a SPIFFE ID: %w", path, err)
	}
	if path == "" {
		return nil, errors.New("an X.509-SVID needs a SPIFFE ID with a path, such as /client")
	}
	if ttl == 0 {
		ttl = svidLife
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	now := time.Now()
	skew := clockSkew
	if ttl > 0 { // or a short one would seem to have lived for most of its life already
		skew = min(skew, ttl/4)
	}
	template := &x509.Certificate{
		Subject:               pkix.Name{Organization: []string{"Sluice development"}},
		NotBefore:             now.Add(-skew),
		NotAfter:              now.Add(ttl),
		KeyUsage:              x509.KeyUsageDigitalSignature,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		BasicConstraintsValid: true,
		URIs:                  []*url.URL{id.URL()},
	}
	if template.NotAfter.After(a.certificate.NotAfter) {
		template.NotAfter = a.certificate.NotAfter
	}
	for _, host := range hosts {
		if ip := net.ParseIP(host); ip != nil {
			template.IPAddresses = append(template.IPAddresses, ip)
		} else {
			template.DNSNames = append(template.DNSNames, host)
		}
	}
	certificate, err := sign(template, a.certificate, key, a.key)
	if err != nil {
		return nil, err
	}
	return &x509svid.SVID{ID: id, Certificates: []*x509.Certificate{certificate}, PrivateKey: key}, nil
}

// JWTBundle is what those who trust the authority's JWT-SVIDs need.
func (a *Authority) JWTBundle() *jwtbundle.Bundle {
	return jwtbundle.FromJWTAuthorities(a.trustDomain, map[string]crypto.PublicKey{a.jwtKeyID: a.jwtKey.Public()})
}

// jwtLife is the default life of a JWT-SVID. Chosen: who sees one can use it, so
// that it should not work for long; SPIRE has the same.
const jwtLife = 5 * time.Minute

// IssueJWT makes a JWT-SVID (ES256) for the SPIFFE ID with this path, for at
// least one audience. It is valid for ttl, or 5 min if that is zero.
func (a *Authority) IssueJWT(path string, audience []string, ttl time.Duration) (string, error) {
	id, err := spiffeid.FromPath(a.trustDomain, path)
	if err != nil {
		return "", fmt.Errorf("%q is no path of a SPIFFE ID: %w", path, err)
	}
	if path == "" || len(audience) == 0 {
		return "", errors.New("a JWT-SVID needs a SPIFFE ID with a path, such as /client, and an audience")
	}
	if ttl == 0 {
		ttl = jwtLife
	}
	now := time.Now()
	header, err := json.Marshal(map[string]string{"alg": "ES256", "typ": "JWT", "kid": a.jwtKeyID})
	if err != nil {
		return "", err
	}
	claims, err := json.Marshal(map[string]any{
		"sub": id.String(), "aud": audience, "iat": now.Unix(), "exp": now.Add(ttl).Unix(),
	})
	if err != nil {
		return "", err
	}
	encode := base64.RawURLEncoding.EncodeToString
	text := encode(header) + "." + encode(claims)
	digest := sha256.Sum256([]byte(text))
	r, s, err := ecdsa.Sign(rand.Reader, a.jwtKey, digest[:])
	if err != nil {
		return "", err
	}
	var signature [64]byte // RFC 7518, section 3.4: r and s, 32 bytes each
	r.FillBytes(signature[:32])
	s.FillBytes(signature[32:])
	return text + "." + encode(signature[:]), nil
}

func sign(template, parent *x509.Certificate, key, parentKey *ecdsa.PrivateKey) (*x509.Certificate, error) {
	der, err := x509.CreateCertificate(rand.Reader, template, parent, &key.PublicKey, parentKey)
	if err != nil {
		return nil, err
	}
	return x509.ParseCertificate(der)
}

// WriteFiles writes an identity as PEM files into a folder, which is made if it
// is not there: NAME.pem, NAME-key.pem (PKCS#8, for its owner only) and
// bundle.pem. Each file is replaced in one step, so that a reader never sees
// half of one.
func (a *Authority) WriteFiles(directory, name string, svid *x509svid.SVID) error {
	if name == "" || name == "bundle" || filepath.Base(name) != name || strings.HasPrefix(name, ".") {
		return fmt.Errorf("%q cannot be the name of an identity's files", name)
	}
	certificate, key, err := svid.Marshal()
	if err != nil {
		return err
	}
	bundle, err := a.Bundle().Marshal()
	if err != nil {
		return err
	}
	if err := os.MkdirAll(directory, 0o750); err != nil {
		return err
	}
	for _, file := range []struct {
		name string
		mode os.FileMode
		data []byte
	}{
		{name + "-key.pem", 0o600, key},
		{name + ".pem", 0o644, certificate},
		{"bundle.pem", 0o644, bundle},
	} {
		if err := replace(filepath.Join(directory, file.name), file.mode, file.data); err != nil {
			return err
		}
	}
	return nil
}

// replace writes a file beside its place and moves it there.
func replace(path string, mode os.FileMode, data []byte) (err error) {
	f, err := os.CreateTemp(filepath.Dir(path), ".new-*") // with mode 0600
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			_ = os.Remove(f.Name())
		}
	}()
	if _, err = f.Write(data); err == nil {
		err = f.Chmod(mode)
	}
	if e := f.Close(); err == nil {
		err = e
	}
	if err != nil {
		return err
	}
	return os.Rename(f.Name(), path)
}

// fileName is the name under which an identity with this path is written.
func fileName(path string) string {
	return strings.ReplaceAll(strings.TrimPrefix(path, "/"), "/", "-")
}
