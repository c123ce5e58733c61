package identity

import (
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var testDomain = spiffeid.RequireTrustDomainFromString("sluice.test")

func newAuthority(t testing.TB, td spiffeid.TrustDomain) *Authority {
	t.Helper()
	a, err := NewAuthority(td)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func newAuthoritySource(t testing.TB, a *Authority, path string, hosts ...string) *Source {
	t.Helper()
	s, err := a.Source(path, hosts...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}
