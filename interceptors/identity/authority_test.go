package identity

import (
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
)

// What is issued is a JWT-SVID by the letter of the standard: go-spiffe reads it.
func TestIssueJWT(t *testing.T) {
	a, same := newAuthority(t, testDomain), newAuthority(t, testDomain)
	s := newAuthoritySource(t, a, "/gateway")
	token, err := a.IssueJWT("/client", []string{"sluice", "other"}, 0)
	if err != nil {
		t.Fatal(err)
	}
	svid, err := jwtsvid.ParseAndValidate(token, s, []string{"sluice"})
	if err != nil {
		t.Fatal(err)
	}
	if left := time.Until(svid.Expiry); svid.ID.String() != "spiffe://sluice.test/client" || left > jwtLife || left < jwtLife-time.Minute {
		t.Errorf("%s, for %v", svid.ID, left)
	}
	if _, err := jwtsvid.ParseAndValidate(token, s, []string{"else"}); err == nil {
		t.Error("it is for everybody")
	}
	if _, err := jwtsvid.ParseAndValidate(token, newAuthoritySource(t, same, "/gateway"), []string{"sluice"}); err == nil {
		t.Error("another authority's keys are as good")
	}
	old, err := a.IssueJWT("/client", []string{"sluice"}, -time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := jwtsvid.ParseAndValidate(old, s, []string{"sluice"}); err == nil || !strings.Contains(err.Error(), "expired") {
		t.Errorf("expired: %v", err)
	}
	for _, c := range []struct {
		path     string
		audience []string
	}{{"", []string{"a"}}, {"client", []string{"a"}}, {"/client", nil}} {
		if _, err := a.IssueJWT(c.path, c.audience, 0); err == nil {
			t.Errorf("issued %v", c)
		}
	}
}
