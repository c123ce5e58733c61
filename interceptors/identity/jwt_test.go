package identity

import (
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/sluicegate/sluice/interceptors"
	"github.com/spiffe/go-spiffe/v2/bundle/jwtbundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// keys are JWT bundles that a test changes.
type keys struct {
	*jwtbundle.Set
	number atomic.Uint64
}

func keysOf(authorities ...*Authority) *keys {
	k := &keys{Set: jwtbundle.NewSet()}
	for _, a := range authorities {
		k.Add(a.JWTBundle())
	}
	return k
}

func (k *keys) tokens() *tokens {
	return newTokens([]string{"sluice", "gateway"}, k, k.number.Load)
}

// issueToken makes a token as the authority does, of whatever parts.
func issueToken(t testing.TB, a *Authority, header, claims map[string]any) string {
	t.Helper()
	var parts []string
	for _, part := range []map[string]any{header, claims} {
		text, err := json.Marshal(part)
		if err != nil {
			t.Fatal(err)
		}
		parts = append(parts, base64.RawURLEncoding.EncodeToString(text))
	}
	text := strings.Join(parts, ".")
	digest := sha256.Sum256([]byte(text))
	r, s, err := ecdsa.Sign(rand.Reader, a.jwtKey, digest[:])
	if err != nil {
		t.Fatal(err)
	}
	var signature [64]byte
	r.FillBytes(signature[:32])
	s.FillBytes(signature[32:])
	return text + "." + base64.RawURLEncoding.EncodeToString(signature[:])
}

func jwtOf(t testing.TB, a *Authority, path string, ttl time.Duration, audience ...string) string {
	t.Helper()
	if audience == nil {
		audience = []string{"sluice"}
	}
	token, err := a.IssueJWT(path, audience, ttl)
	if err != nil {
		t.Fatal(err)
	}
	return token
}

func TestTokens(t *testing.T) {
	a := newAuthority(t, testDomain)
	stranger := newAuthority(t, testDomain)
	federated := newAuthority(t, spiffeid.RequireTrustDomainFromString("other.test"))
	unknown := newAuthority(t, spiffeid.RequireTrustDomainFromString("unknown.test"))
	good := jwtOf(t, a, "/client", 0)
	header := func(pairs ...any) map[string]any {
		m := map[string]any{"alg": "ES256", "typ": "JWT", "kid": a.jwtKeyID}
		for n := 0; n < len(pairs); n += 2 {
			if m[pairs[n].(string)] = pairs[n+1]; pairs[n+1] == nil {
				delete(m, pairs[n].(string))
			}
		}
		return m
	}
	claims := func(pairs ...any) map[string]any {
		m := map[string]any{"sub": "spiffe://sluice.test/client", "aud": "sluice", "exp": time.Now().Add(time.Hour).Unix()}
		for n := 0; n < len(pairs); n += 2 {
			if m[pairs[n].(string)] = pairs[n+1]; pairs[n+1] == nil {
				delete(m, pairs[n].(string))
			}
		}
		return m
	}
	parts := strings.Split(good, ".")
	other := strings.Split(jwtOf(t, a, "/root", 0), ".")
	for _, c := range []struct {
		name   string
		values []string
		want   string // "": refused
	}{
		{"good", []string{"Bearer " + good}, "spiffe://sluice.test/client"},
		{"scheme in another case", []string{"bearer " + good}, "spiffe://sluice.test/client"},
		{"of a federated domain", []string{"Bearer " + jwtOf(t, federated, "/client", 0)}, "spiffe://other.test/client"},
		{"for several audiences", []string{"Bearer " + jwtOf(t, a, "/client", 0, "x", "gateway")}, "spiffe://sluice.test/client"},
		{"made by hand", []string{"Bearer " + issueToken(t, a, header(), claims())}, "spiffe://sluice.test/client"},

		{"no value", []string{}, ""},
		{"empty", []string{""}, ""},
		{"scheme alone", []string{"Bearer"}, ""},
		{"no token", []string{"Bearer "}, ""},
		{"no scheme", []string{good}, ""},
		{"another scheme", []string{"Basic " + good}, ""},
		{"twice", []string{"Bearer " + good, "Bearer " + good}, ""},
		{"two in one", []string{"Bearer " + good + ", Bearer " + good}, ""},
		{"a space more", []string{"Bearer  " + good}, ""},
		{"for another audience", []string{"Bearer " + jwtOf(t, a, "/client", 0, "elsewhere")}, ""},
		{"for no audience", []string{"Bearer " + issueToken(t, a, header(), claims("aud", nil))}, ""},
		{"by another key", []string{"Bearer " + jwtOf(t, stranger, "/client", 0)}, ""},
		{"by another key of the same name", []string{"Bearer " + issueToken(t, stranger, header(), claims())}, ""},
		{"of an unknown domain", []string{"Bearer " + jwtOf(t, unknown, "/client", 0)}, ""},
		{"a domain's key for another domain", []string{"Bearer " + issueToken(t, federated, header("kid", federated.jwtKeyID), claims())}, ""},
		{"changed", []string{"Bearer " + parts[0] + "." + other[1] + "." + parts[2]}, ""},
		{"without signature", []string{"Bearer " + parts[0] + "." + parts[1] + "."}, ""},
		{"cut off", []string{"Bearer " + good[:len(good)-4]}, ""},
		{"algorithm none", []string{"Bearer " + issueToken(t, a, header("alg", "none"), claims())}, ""},
		{"algorithm of a shared key", []string{"Bearer " + issueToken(t, a, header("alg", "HS256"), claims())}, ""},
		{"no key id", []string{"Bearer " + issueToken(t, a, header("kid", nil), claims())}, ""},
		{"of another type", []string{"Bearer " + issueToken(t, a, header("typ", "at+jwt"), claims())}, ""},
		{"no subject", []string{"Bearer " + issueToken(t, a, header(), claims("sub", nil))}, ""},
		{"a subject that is no SPIFFE ID", []string{"Bearer " + issueToken(t, a, header(), claims("sub", "client"))}, ""},
		{"a subject without a path", []string{"Bearer " + issueToken(t, a, header(), claims("sub", "spiffe://sluice.test"))}, ""},
		{"an expired one without a path", []string{"Bearer " + issueToken(t, a, header(), claims("sub", "spiffe://sluice.test", "exp", 1))}, ""},
		{"no end", []string{"Bearer " + issueToken(t, a, header(), claims("exp", nil))}, ""},
		{"not yet", []string{"Bearer " + issueToken(t, a, header(), claims("nbf", time.Now().Add(time.Hour).Unix()))}, ""},
		{"too long", []string{"Bearer " + issueToken(t, a, header(), claims("x", strings.Repeat("x", maxTokenBytes)))}, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			tokens := keysOf(a, federated).tokens()
			for range 2 { // of the cache, then
				v, err := tokens.verify(c.values)
				if c.want != "" {
					if err != nil || v.id.String() != c.want || time.Until(v.expires) < leeway {
						t.Fatalf("%+v, %v; want %s", v, err, c.want)
					}
					continue
				}
				if got := reason(t, err); got != interceptors.IdentityUntrusted {
					t.Fatalf("%v is %s", c.values, v.id)
				}
				for _, value := range c.values {
					for _, part := range strings.FieldsFunc(value, func(r rune) bool { return r == '.' || r == ' ' }) {
						if len(part) > 10 && strings.Contains(fmt.Sprint(err, err.(*interceptors.Denial).Cause), part) {
							t.Errorf("%v tells the token", err)
						}
					}
				}
			}
			if n := len(tokens.kept); (n > 0) != (c.want != "") {
				t.Errorf("%d tokens are kept", n)
			}
		})
	}
}

// What has expired is known by its time, whether it was kept or not.
func TestExpiredTokens(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newAuthority(t, testDomain)
		k := keysOf(a)
		kept := k.tokens()
		values := []string{"Bearer " + jwtOf(t, a, "/client", time.Minute)}
		want, err := kept.verify(values)
		if err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Hour)
		for name, tokens := range map[string]*tokens{"kept": kept, "not kept": k.tokens()} {
			if got, err := tokens.verify(values); err != nil || got != want {
				t.Errorf("%s: %+v, %v; want %+v", name, got, err, want)
			}
		}
		k.Remove(testDomain)
		k.number.Add(1)
		for name, tokens := range map[string]*tokens{"kept": kept, "not kept": k.tokens()} {
			if _, err := tokens.verify(values); reason(t, err) != interceptors.IdentityUntrusted {
				t.Errorf("%s: an expired token of a key that is gone: %v", name, err)
			}
		}
	})
}

// A token is not good for longer than its key is trusted.
func TestTokensOfKeysThatAreGone(t *testing.T) {
	a := newAuthority(t, testDomain)
	k := keysOf(a)
	tokens := k.tokens()
	values := []string{"Bearer " + jwtOf(t, a, "/client", 0)}
	if _, err := tokens.verify(values); err != nil {
		t.Fatal(err)
	}
	k.Remove(testDomain)
	k.number.Add(1)
	if _, err := tokens.verify(values); reason(t, err) != interceptors.IdentityUntrusted {
		t.Errorf("the key is gone: %v", err)
	}
	k.Add(a.JWTBundle())
	k.number.Add(1)
	if _, err := tokens.verify(values); err != nil {
		t.Errorf("the key is back: %v", err)
	}
}

func TestTokensKeptAreBounded(t *testing.T) {
	a := newAuthority(t, testDomain)
	tokens := keysOf(a).tokens()
	for n := range maxTokens {
		tokens.kept[[32]byte{byte(n), byte(n >> 8), 1}] = verified{}
	}
	if _, err := tokens.verify([]string{"Bearer " + jwtOf(t, a, "/client", 0)}); err != nil {
		t.Fatal(err)
	}
	if n := len(tokens.kept); n != maxTokens {
		t.Errorf("%d tokens are kept, want %d", n, maxTokens)
	}
}

// Whatever comes in the metadata, it is refused or names the one who holds the key.
func FuzzTokens(f *testing.F) {
	a := newAuthority(f, testDomain)
	tokens := keysOf(a).tokens()
	good := jwtOf(f, a, "/client", 24*time.Hour)
	f.Add("Bearer "+good, "")
	f.Add("", "")
	f.Add("Bearer "+strings.Repeat("e30.", 3), "x")
	f.Add("bearer "+good, "Basic x")
	f.Fuzz(func(t *testing.T, one, two string) {
		for _, values := range [][]string{nil, {one}, {one, two}} {
			v, err := tokens.verify(values)
			if err == nil && (v.id.String() != "spiffe://sluice.test/client" || len(values) != 1 || !strings.Contains(one, good[:slices.Index([]byte(good), '.')])) {
				t.Fatalf("%q is %s", values, v.id)
			}
		}
	})
}

func BenchmarkTokenKept(b *testing.B) {
	a := newAuthority(b, testDomain)
	tokens := keysOf(a).tokens()
	values := []string{"Bearer " + jwtOf(b, a, "/client", time.Hour)}
	b.ReportAllocs()
	for b.Loop() {
		if _, err := tokens.verify(values); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkTokenNew(b *testing.B) {
	a := newAuthority(b, testDomain)
	tokens := keysOf(a).tokens()
	values := []string{"Bearer " + jwtOf(b, a, "/client", time.Hour)}
	for b.Loop() {
		clear(tokens.kept)
		if _, err := tokens.verify(values); err != nil {
			b.Fatal(err)
		}
	}
}
