package identity

import (
	"crypto/x509"
	"encoding/pem"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	configv1 "github.com/sluicegate/sluice/proto/gen/sluice/config/v1"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
)

func fromFiles(dir, name string) *configv1.Identity {
	return &configv1.Identity{Source: &configv1.Identity_Files{Files: &configv1.IdentityFiles{
		Certificate: filepath.Join(dir, name+".pem"),
		Key:         filepath.Join(dir, name+"-key.pem"),
		Bundle:      filepath.Join(dir, "bundle.pem"),
	}}}
}

func development(c *configv1.DevelopmentAuthority) *configv1.Identity {
	return &configv1.Identity{Source: &configv1.Identity_Development{Development: c}}
}

func issue(t testing.TB, a *Authority, path string) *x509svid.SVID {
	t.Helper()
	svid, err := a.Issue(path, 0)
	if err != nil {
		t.Fatal(err)
	}
	return svid
}

func write(t testing.TB, a *Authority, dir, name string, svid *x509svid.SVID) {
	t.Helper()
	if err := a.WriteFiles(dir, name, svid); err != nil {
		t.Fatal(err)
	}
}

// reports is what a source says of its renewals.
type reports struct {
	mu  sync.Mutex
	all []error
}

func (r *reports) add(err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.all = append(r.all, err)
}

func (r *reports) list() []error {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.all)
}

// svidOf is the current SVID of a source that must have one.
func svidOf(t testing.TB, s *Source) *x509svid.SVID {
	t.Helper()
	svid, err := s.GetX509SVID()
	if err != nil {
		t.Fatal(err)
	}
	return svid
}

// What is issued is an X.509-SVID by the letter of the standard.
func TestIssue(t *testing.T) {
	a := newAuthority(t, testDomain)
	svid, err := a.Issue("/ns/team/sa/x", time.Hour, "localhost", "127.0.0.1")
	if err != nil {
		t.Fatal(err)
	}
	leaf := svid.Certificates[0]
	if len(leaf.URIs) != 1 || leaf.URIs[0].String() != "spiffe://sluice.test/ns/team/sa/x" || svid.ID.String() != leaf.URIs[0].String() {
		t.Errorf("URIs %v, ID %s", leaf.URIs, svid.ID)
	}
	if leaf.IsCA || leaf.KeyUsage != x509.KeyUsageDigitalSignature || len(leaf.ExtKeyUsage) != 2 {
		t.Errorf("CA %v, key usage %v, %v", leaf.IsCA, leaf.KeyUsage, leaf.ExtKeyUsage)
	}
	for _, host := range []string{"localhost", "127.0.0.1"} {
		if err := leaf.VerifyHostname(host); err != nil {
			t.Error(err)
		}
	}
	if _, _, err := x509svid.Verify(svid.Certificates, a.Bundle()); err != nil {
		t.Error(err)
	}
	certificate, key, err := svid.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := x509svid.Parse(certificate, key); err != nil {
		t.Errorf("go-spiffe does not read it: %v", err)
	}
	ca := a.certificate
	if !ca.IsCA || ca.KeyUsage&x509.KeyUsageCertSign == 0 || len(ca.URIs) != 1 || ca.URIs[0].String() != "spiffe://sluice.test" {
		t.Errorf("authority: CA %v, key usage %v, URIs %v", ca.IsCA, ca.KeyUsage, ca.URIs)
	}
	if life := time.Until(issue(t, a, "/x").Certificates[0].NotAfter); life < 23*time.Hour || life > 24*time.Hour {
		t.Errorf("an SVID lives %v", life)
	}
	long, err := a.Issue("/x", 365*24*time.Hour)
	if err != nil || !long.Certificates[0].NotAfter.Equal(ca.NotAfter) {
		t.Errorf("%v: an SVID outlives its authority", err)
	}
	for _, path := range []string{"", "x", "/", "/x/", "/../x", "/x?y", "/*"} {
		if _, err := a.Issue(path, 0); err == nil {
			t.Errorf("issued %q", path)
		}
	}
	if _, err := NewAuthority(spiffeid.TrustDomain{}); err == nil {
		t.Error("an authority for no trust domain")
	}
}

func TestWriteFiles(t *testing.T) {
	a := newAuthority(t, testDomain)
	dir := filepath.Join(t.TempDir(), "new", "folder")
	write(t, a, dir, "client", issue(t, a, "/client"))
	write(t, a, dir, "client", issue(t, a, "/client")) // again, over the first
	for name, want := range map[string]os.FileMode{"client.pem": 0o644, "client-key.pem": 0o600, "bundle.pem": 0o644} {
		info, err := os.Stat(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		if info.Mode() != want {
			t.Errorf("%s has mode %v", name, info.Mode())
		}
	}
	if entries, _ := os.ReadDir(dir); len(entries) != 3 {
		t.Errorf("left over: %v", entries)
	}
	for _, name := range []string{"", "bundle", "a/b", "../a", ".", "..", ".a"} {
		if err := a.WriteFiles(dir, name, issue(t, a, "/client")); err == nil {
			t.Errorf("wrote %q", name)
		}
	}
}

func TestFiles(t *testing.T) {
	a := newAuthority(t, testDomain)
	dir := t.TempDir()
	written := issue(t, a, "/client")
	write(t, a, dir, "client", written)
	s, err := Open(t.Context(), fromFiles(dir, "client"), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if got := svidOf(t, s); got.ID != written.ID || s.TrustDomain() != testDomain || s.Insecure() || s.Authority() != nil {
		t.Errorf("%+v", got)
	}
	if b, err := s.GetX509BundleForTrustDomain(testDomain); err != nil || !b.Equal(a.Bundle()) {
		t.Errorf("%v, %v", b, err)
	}
	if _, err := s.GetX509BundleForTrustDomain(spiffeid.RequireTrustDomainFromString("other.test")); err == nil {
		t.Error("there is a bundle for a stranger")
	}
}

func TestFileErrors(t *testing.T) {
	a, other := newAuthority(t, testDomain), newAuthority(t, testDomain)
	put := func(t *testing.T, dir, name, text string) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range []struct {
		name  string
		spoil func(t *testing.T, dir string)
		want  []string
	}{
		{"no certificate", func(t *testing.T, dir string) { os.Remove(filepath.Join(dir, "x.pem")) },
			[]string{"identity.files.certificate", "x.pem", "no such file"}},
		{"no key", func(t *testing.T, dir string) { os.Remove(filepath.Join(dir, "x-key.pem")) },
			[]string{"identity.files.key", "x-key.pem", "no such file"}},
		{"no bundle", func(t *testing.T, dir string) { os.Remove(filepath.Join(dir, "bundle.pem")) },
			[]string{"identity.files.bundle", "bundle.pem", "no such file"}},
		{"certificate is no PEM", func(t *testing.T, dir string) { put(t, dir, "x.pem", "hello") },
			[]string{"identity.files.certificate", "x.pem", "no PEM block"}},
		{"empty bundle", func(t *testing.T, dir string) { put(t, dir, "bundle.pem", "") },
			[]string{"identity.files.bundle", "bundle.pem", "no PEM block"}},
		{"key of another kind", func(t *testing.T, dir string) {
			put(t, dir, "x-key.pem", string(pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: []byte("SECRET")})))
		}, []string{"identity.files.key", "x-key.pem", "EC PRIVATE KEY", "openssl pkcs8"}},
		{"key of another certificate", func(t *testing.T, dir string) {
			_, key, _ := issue(t, a, "/x").Marshal()
			put(t, dir, "x-key.pem", string(key))
		}, []string{"x.pem", "x-key.pem", "does not match"}},
		{"bundle of another authority", func(t *testing.T, dir string) {
			b, _ := other.Bundle().Marshal()
			put(t, dir, "bundle.pem", string(b))
		}, []string{"x.pem", "bundle.pem", "unknown authority", "name the bundle"}},
		{"expired", func(t *testing.T, dir string) {
			svid, err := a.Issue("/x", -time.Second)
			if err != nil {
				t.Fatal(err)
			}
			write(t, a, dir, "x", svid)
		}, []string{"x.pem", "expired", "renew"}},
		{"no SPIFFE ID", func(t *testing.T, dir string) {
			c := odd(t, a, func(c *x509.Certificate) { c.URIs = nil; c.DNSNames = []string{"x"} })
			key, _ := x509.MarshalPKCS8PrivateKey(c.PrivateKey)
			put(t, dir, "x.pem", string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Certificate[0]})))
			put(t, dir, "x-key.pem", string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: key})))
		}, []string{"x.pem", "no URI SAN"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := t.TempDir()
			write(t, a, dir, "x", issue(t, a, "/x"))
			c.spoil(t, dir)
			s, err := Open(t.Context(), fromFiles(dir, "x"), nil)
			if err == nil {
				s.Close()
				t.Fatal("no error")
			}
			for _, want := range c.want {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("%q lacks %q", err, want)
				}
			}
			if strings.Contains(err.Error(), "SECRET") {
				t.Errorf("%q quotes the key", err)
			}
		})
	}
}

// Files that are rewritten are used within the interval; what cannot be used is
// reported once and leaves the last good identity in place.
func TestFilesAreReadAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newAuthority(t, testDomain)
		dir := t.TempDir()
		write(t, a, dir, "x", issue(t, a, "/x"))
		var renewed reports
		s, err := Open(t.Context(), fromFiles(dir, "x"), renewed.add)
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		wait := func() {
			time.Sleep(filesInterval + filesSettle)
			synctest.Wait()
		}
		serial := func() string { return svidOf(t, s).Certificates[0].SerialNumber.String() }
		first := serial()

		wait()
		if reports := renewed.list(); len(reports) != 0 || serial() != first {
			t.Fatalf("nothing changed: %v", reports)
		}

		second := issue(t, a, "/x")
		certificate, key, _ := second.Marshal()
		if err := os.WriteFile(filepath.Join(dir, "x.pem"), certificate, 0o600); err != nil {
			t.Fatal(err)
		}
		wait()
		wait() // reported once, however long it lasts
		if reports := renewed.list(); len(reports) != 1 || reports[0] == nil || serial() != first {
			t.Fatalf("half written: %v", reports)
		}

		if err := os.WriteFile(filepath.Join(dir, "x-key.pem"), key, 0o600); err != nil {
			t.Fatal(err)
		}
		wait()
		if reports := renewed.list(); len(reports) != 2 || reports[1] != nil || serial() != second.Certificates[0].SerialNumber.String() {
			t.Fatalf("written: %v", reports)
		}

		for _, name := range []string{"x.pem", "x-key.pem", "bundle.pem"} {
			if err := os.Rename(filepath.Join(dir, name), filepath.Join(dir, name+".away")); err != nil {
				t.Fatal(err)
			}
		}
		wait()
		if reports := renewed.list(); len(reports) != 3 || !errors.Is(reports[2], os.ErrNotExist) || serial() != second.Certificates[0].SerialNumber.String() {
			t.Fatalf("away: %v", reports)
		}
		for _, name := range []string{"x.pem", "x-key.pem", "bundle.pem"} {
			if err := os.Rename(filepath.Join(dir, name+".away"), filepath.Join(dir, name)); err != nil {
				t.Fatal(err)
			}
		}
		wait()
		if reports := renewed.list(); len(reports) != 4 || reports[3] != nil {
			t.Fatalf("back: %v", reports)
		}

		// Another authority takes over, with its bundle.
		b := newAuthority(t, testDomain)
		write(t, b, dir, "x", issue(t, b, "/x"))
		wait()
		if got, _ := s.GetX509BundleForTrustDomain(testDomain); !got.Equal(b.Bundle()) {
			t.Error("the old bundle is still trusted")
		}

		// Nobody renews: what is expired is not shown to anyone.
		time.Sleep(svidLife)
		if svid, err := s.GetX509SVID(); err == nil || !strings.Contains(err.Error(), "expired") {
			t.Errorf("%v, %v", svid, err)
		}
	})
}

func TestDevelopment(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir := t.TempDir()
		var renewed reports
		s, err := Open(t.Context(), development(&configv1.DevelopmentAuthority{Directory: dir, Issue: []string{"/client", "/ns/team/sa/x"}}), renewed.add)
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		first := svidOf(t, s)
		if first.ID.String() != "spiffe://sluice.dev/gateway" {
			t.Errorf("we are %s", first.ID)
		}
		for _, host := range localhost {
			if err := first.Certificates[0].VerifyHostname(host); err != nil {
				t.Error(err)
			}
		}
		read := func(name string) *x509svid.SVID {
			svid, err := x509svid.Load(filepath.Join(dir, name+".pem"), filepath.Join(dir, name+"-key.pem"))
			if err != nil {
				t.Fatal(err)
			}
			if _, _, err := x509svid.Verify(svid.Certificates, s); err != nil {
				t.Error(err)
			}
			return svid
		}
		client := read("client")
		if client.ID.String() != "spiffe://sluice.dev/client" || read("ns-team-sa-x").ID.String() != "spiffe://sluice.dev/ns/team/sa/x" {
			t.Errorf("client is %s", client.ID)
		}
		if err := client.Certificates[0].VerifyHostname("localhost"); err == nil {
			t.Error("a client may call itself localhost")
		}

		time.Sleep(svidLife / 2)
		synctest.Wait()
		if got := renewed.list(); len(got) != 1 || got[0] != nil || svidOf(t, s).Certificates[0].Equal(first.Certificates[0]) || read("client").Certificates[0].Equal(client.Certificates[0]) {
			t.Errorf("renewals in half of a life: %v", got)
		}
		time.Sleep(authorityLife - svidLife/2 - time.Second)
		svidOf(t, s) // to the last
		time.Sleep(2 * time.Second)
		if _, err := s.GetX509SVID(); err == nil {
			t.Error("we outlive our authority")
		}
	})
}

// An identity that cannot be written is reported, and ours is renewed all the same.
func TestDevelopmentFolderLost(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir := filepath.Join(t.TempDir(), "certificates")
		var renewed reports
		s, err := Open(t.Context(), development(&configv1.DevelopmentAuthority{Directory: dir, Issue: []string{"/client"}}), renewed.add)
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		first := svidOf(t, s)
		if err := os.RemoveAll(dir); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(dir, nil, 0o600); err != nil { // a file where the folder was
			t.Fatal(err)
		}
		time.Sleep(svidLife / 2)
		synctest.Wait()
		if reports := renewed.list(); len(reports) != 1 || reports[0] == nil || !strings.Contains(reports[0].Error(), "identity.development.directory") {
			t.Errorf("reports: %v", reports)
		}
		if svidOf(t, s).Certificates[0].Equal(first.Certificates[0]) {
			t.Error("our own identity was not renewed")
		}
	})
}

func TestDevelopmentErrors(t *testing.T) {
	for _, c := range []struct {
		name   string
		config *configv1.DevelopmentAuthority
		want   string
	}{
		{"trust domain", &configv1.DevelopmentAuthority{TrustDomain: "Sluice"}, "identity.development.trust_domain"},
		{"path", &configv1.DevelopmentAuthority{Path: "gateway"}, "identity.development.path"},
		{"root path", &configv1.DevelopmentAuthority{Path: "/"}, "identity.development.path"},
		{"no folder", &configv1.DevelopmentAuthority{Issue: []string{"/client"}}, "identity.development.directory"},
		{"issued path", &configv1.DevelopmentAuthority{Directory: "d", Issue: []string{"/a", "/../b"}}, "identity.development.issue[1]"},
		{"no issued path", &configv1.DevelopmentAuthority{Directory: "d", Issue: []string{""}}, "identity.development.issue[0]"},
		{"one file for two", &configv1.DevelopmentAuthority{Directory: "d", Issue: []string{"/a/b", "/a-b"}}, "/a/b; choose"},
		{"a key for a certificate", &configv1.DevelopmentAuthority{Directory: "d", Issue: []string{"/a", "/a-key"}}, "/a; choose"},
		{"a certificate for a key", &configv1.DevelopmentAuthority{Directory: "d", Issue: []string{"/a-key", "/a"}}, "/a-key; choose"},
		{"the bundle", &configv1.DevelopmentAuthority{Directory: "d", Issue: []string{"/bundle"}}, "the bundle; choose"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Chdir(t.TempDir())
			s, err := Open(t.Context(), development(c.config), nil)
			if err == nil {
				s.Close()
				t.Fatal("no error")
			}
			if !strings.Contains(err.Error(), c.want) {
				t.Errorf("%q lacks %q", err, c.want)
			}
			if _, err := os.Stat("d"); err == nil {
				t.Error("the folder was made")
			}
		})
	}
}

func TestNoSource(t *testing.T) {
	if _, err := Open(t.Context(), &configv1.Identity{}, nil); err == nil || !strings.Contains(err.Error(), "identity: set one") {
		t.Error(err)
	}
	s, err := Open(t.Context(), open(), nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.GetX509SVID(); !s.Insecure() || err == nil || !s.TrustDomain().IsZero() {
		t.Errorf("%v: an insecure source has an identity", err)
	}
	if _, err := s.GetX509BundleForTrustDomain(testDomain); err == nil {
		t.Error("an insecure source has a bundle")
	}
	for range 2 {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	}
}
