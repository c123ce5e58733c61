package identity

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	configv1 "github.com/sluicegate/sluice/proto/gen/sluice/config/v1"
)

// put writes a file in place, as spiffe-helper does.
func put(t testing.TB, dir, name string, data []byte) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(dir, name), data, 0o600); err != nil {
		t.Fatal(err)
	}
}

// federate writes what is known of another trust domain, and names it.
func federate(t testing.TB, c *configv1.Identity, dir string, a *Authority) {
	t.Helper()
	x509, err := a.Bundle().Marshal()
	if err != nil {
		t.Fatal(err)
	}
	jwt, err := a.JWTBundle().Marshal()
	if err != nil {
		t.Fatal(err)
	}
	name := a.trustDomain.Name()
	put(t, dir, name+".pem", x509)
	put(t, dir, name+".json", jwt)
	f := c.GetFiles()
	f.Federated = append(f.Federated, &configv1.FederatedBundle{
		TrustDomain: name, Bundle: filepath.Join(dir, name+".pem"), JwtBundle: filepath.Join(dir, name+".json"),
	})
}

func TestFederatedFiles(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ours, other, next := newAuthority(t, testDomain), newAuthority(t, otherDomain), newAuthority(t, otherDomain)
		dir := t.TempDir()
		write(t, ours, dir, "x", issue(t, ours, "/x"))
		c := fromFiles(dir, "x")
		federate(t, c, dir, other)
		keys, _ := ours.JWTBundle().Marshal()
		put(t, dir, "jwt.json", keys)
		c.GetFiles().JwtBundle = filepath.Join(dir, "jwt.json")
		s, err := Open(t.Context(), c, nil)
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		for _, a := range []*Authority{ours, other} {
			if b, err := s.GetX509BundleForTrustDomain(a.trustDomain); err != nil || !b.Equal(a.Bundle()) {
				t.Errorf("bundle of %s: %v", a.trustDomain, err)
			}
			if b, err := s.GetJWTBundleForTrustDomain(a.trustDomain); err != nil || !b.Equal(a.JWTBundle()) {
				t.Errorf("keys of %s: %v", a.trustDomain, err)
			}
		}
		generation := s.Generation()
		text, _ := next.Bundle().Marshal()
		put(t, dir, "other.test.pem", text)
		time.Sleep(filesInterval + filesSettle)
		synctest.Wait()
		if b, _ := s.GetX509BundleForTrustDomain(otherDomain); !b.Equal(next.Bundle()) || s.Generation() == generation {
			t.Error("the federated bundle was not read again")
		}
		if b, _ := s.GetJWTBundleForTrustDomain(otherDomain); !b.Equal(other.JWTBundle()) {
			t.Error("the federated keys changed too")
		}
	})
}

// Half of a file is never used: neither one that ends within a block, nor one
// that ends between two, if the rest comes soon.
func TestHalfWrittenFiles(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ours, second := newAuthority(t, testDomain), newAuthority(t, testDomain)
		dir := t.TempDir()
		write(t, ours, dir, "x", issue(t, ours, "/x"))
		one, _ := ours.Bundle().Marshal()
		two, _ := second.Bundle().Marshal()
		both := append(append([]byte(nil), one...), two...)
		put(t, dir, "bundle.pem", both)
		var renewed reports
		s, err := Open(t.Context(), fromFiles(dir, "x"), renewed.add)
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		generation := s.Generation()

		time.Sleep(filesInterval - time.Millisecond)
		put(t, dir, "bundle.pem", both[:len(one)]) // whole blocks, and the rest a moment later
		time.Sleep(filesSettle / 2)
		put(t, dir, "bundle.pem", both)
		time.Sleep(filesInterval)
		synctest.Wait()
		if s.Generation() != generation || len(renewed.list()) != 0 {
			t.Fatalf("half of the bundle was used: %v", renewed.list())
		}

		put(t, dir, "bundle.pem", both[:len(both)-20]) // and no rest
		time.Sleep(filesInterval + filesSettle)
		synctest.Wait()
		if got := renewed.list(); s.Generation() != generation || len(got) != 1 || got[0] == nil || !strings.Contains(got[0].Error(), "bundle.pem") {
			t.Fatalf("a cut block: %v", got)
		}
		if err := s.Ready(); err != nil {
			t.Errorf("not ready, with a day to go: %v", err)
		}
	})
}

// A Kubernetes volume changes by one symbolic link, between two reads perhaps.
func TestFilesBehindALink(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newAuthority(t, testDomain)
		dir := t.TempDir()
		first, second := issue(t, a, "/x"), issue(t, a, "/x")
		write(t, a, filepath.Join(dir, "1"), "x", first)
		write(t, a, filepath.Join(dir, "2"), "x", second)
		turn := func(to string) {
			t.Helper()
			if err := os.Symlink(to, filepath.Join(dir, "new")); err != nil {
				t.Fatal(err)
			}
			if err := os.Rename(filepath.Join(dir, "new"), filepath.Join(dir, "data")); err != nil {
				t.Fatal(err)
			}
		}
		turn("1")
		var renewed reports
		s, err := Open(t.Context(), fromFiles(filepath.Join(dir, "data"), "x"), renewed.add)
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		turn("2")
		time.Sleep(filesInterval + filesSettle)
		synctest.Wait()
		if got := renewed.list(); len(got) != 1 || got[0] != nil || !svidOf(t, s).Certificates[0].Equal(second.Certificates[0]) {
			t.Errorf("turned: %v", got)
		}
	})
}

// The shorter an SVID lives, the more often its files are read.
func TestFilesInterval(t *testing.T) {
	for _, c := range []struct{ life, want time.Duration }{
		{0, filesSettle}, {3 * time.Second, filesSettle}, {time.Minute, time.Second}, {time.Hour, filesInterval},
	} {
		if got := (&files{life: c.life}).interval(); got != c.want {
			t.Errorf("life %v: every %v, not %v", c.life, got, c.want)
		}
	}
}

func TestFilesConfigurationErrors(t *testing.T) {
	ours, other := newAuthority(t, testDomain), newAuthority(t, otherDomain)
	for _, c := range []struct {
		name  string
		spoil func(dir string, c *configv1.Identity)
		want  string
	}{
		{"no trust domain", func(_ string, c *configv1.Identity) { c.GetFiles().Federated[0].TrustDomain = "Other" },
			`identity.files.federated[0].trust_domain: "Other"`},
		{"twice", func(_ string, c *configv1.Identity) {
			c.GetFiles().Federated = append(c.GetFiles().Federated, c.GetFiles().Federated[0])
		}, "identity.files.federated[1].trust_domain"},
		{"our own", func(_ string, c *configv1.Identity) { c.GetFiles().Federated[0].TrustDomain = "sluice.test" },
			"identity.files.federated[0].bundle"},
		{"no bundle", func(dir string, _ *configv1.Identity) { os.Remove(filepath.Join(dir, "other.test.pem")) },
			"identity.files.federated[0].bundle"},
		{"no JWK set", func(dir string, _ *configv1.Identity) { put(t, dir, "other.test.json", []byte(`{"keys":`)) },
			"identity.files.federated[0].jwt_bundle"},
		{"no keys for JWT-SVIDs", func(_ string, c *configv1.Identity) {
			c.GetFiles().Federated, c.Jwt = nil, &configv1.JWTIdentity{Audiences: []string{"x"}}
		}, "identity.files.jwt_bundle"},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := t.TempDir()
			write(t, ours, dir, "x", issue(t, ours, "/x"))
			cfg := fromFiles(dir, "x")
			federate(t, cfg, dir, other)
			c.spoil(dir, cfg)
			if _, err := Open(t.Context(), cfg, nil); err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("%v lacks %q", err, c.want)
			}
		})
	}
}

// A source is not ready any more before its SVID ends, and says why.
func TestReady(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newAuthority(t, testDomain)
		dir := t.TempDir()
		svid, err := a.Issue("/x", time.Minute)
		if err != nil {
			t.Fatal(err)
		}
		write(t, a, dir, "x", svid)
		s, err := Open(t.Context(), fromFiles(dir, "x"), nil)
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		leaf := svid.Certificates[0]
		margin := leaf.NotAfter.Sub(leaf.NotBefore) / 10
		time.Sleep(time.Until(leaf.NotAfter) - margin - time.Second)
		if err := s.Ready(); err != nil {
			t.Errorf("not ready with more than a tenth to go: %v", err)
		}
		put(t, dir, "x-key.pem", []byte("hello"))
		time.Sleep(3 * time.Second)
		synctest.Wait()
		if err := s.Ready(); err == nil || !strings.Contains(err.Error(), "x-key.pem") {
			t.Errorf("not ready because of %v", err)
		}
		if _, err := s.GetX509SVID(); err != nil {
			t.Errorf("it is good to the last: %v", err)
		}
		time.Sleep(margin)
		if _, err := s.GetX509SVID(); err == nil {
			t.Error("it is good after its end")
		}
		write(t, a, dir, "x", issue(t, a, "/x"))
		time.Sleep(2 * filesInterval)
		synctest.Wait()
		if err := s.Ready(); err != nil {
			t.Errorf("renewed: %v", err)
		}
	})
}
