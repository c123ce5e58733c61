package identity

import (
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"strings"
	"sync"
	"time"

	"github.com/sluicegate/sluice/interceptors"
	"github.com/spiffe/go-spiffe/v2/bundle/jwtbundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
)

const (
	// tokenHeader is the metadata that holds a JWT-SVID: "Bearer", a space, the token.
	tokenHeader = "authorization"
	// maxTokens bounds the tokens that are kept. Chosen: some thousand callers, in
	// about 1 MiB. Beyond it a token is verified again, in some 0.1 ms.
	maxTokens = 4096
	// maxTokenBytes bounds a token. Chosen: SPIRE's have some 500 bytes, and RFC
	// 7515 sets no limit.
	maxTokenBytes = 8 << 10
	// leeway is what go-spiffe gives to clocks that differ: a token counts for so
	// long after it has expired.
	leeway = time.Minute
)

// verified is a token whose signature, audience and subject are good. It may
// have expired.
type verified struct {
	id      spiffeid.ID
	expires time.Time // leeway included
	// generation is that of the source whose keys it was verified with.
	generation uint64
}

// tokens verifies JWT-SVIDs, and keeps those that are good. It is safe for
// concurrent use.
type tokens struct {
	bundles    jwtbundle.Source
	generation func() uint64 // of the bundles
	audiences  []string

	mu   sync.RWMutex
	kept map[[sha256.Size]byte]verified
}

func newTokens(audiences []string, bundles jwtbundle.Source, generation func() uint64) *tokens {
	return &tokens{bundles: bundles, generation: generation, audiences: audiences, kept: make(map[[sha256.Size]byte]verified)}
}

// verify reads the values of the metadata "authorization". A denial says
// nothing of the token but what its sender knows.
func (t *tokens) verify(values []string) (verified, error) {
	if len(values) != 1 {
		return verified{}, untrusted("the call has %d values of the metadata authorization; send one JWT-SVID", len(values))
	}
	scheme, token, ok := strings.Cut(values[0], " ")
	if !ok || !strings.EqualFold(scheme, "Bearer") {
		return verified{}, untrusted(`the metadata authorization is no JWT-SVID; write "Bearer", a space and the token`)
	}
	if len(token) > maxTokenBytes {
		return verified{}, untrusted("the token has more than %d bytes; that is no JWT-SVID", maxTokenBytes)
	}
	key := sha256.Sum256([]byte(token))
	generation := t.generation()
	t.mu.RLock()
	v, ok := t.kept[key]
	t.mu.RUnlock()
	if ok && v.generation == generation {
		return v, nil
	}
	v, err := t.parse(token)
	t.mu.Lock()
	defer t.mu.Unlock()
	if err != nil {
		delete(t.kept, key)
		return v, err
	}
	if len(t.kept) >= maxTokens {
		for other := range t.kept { // whichever comes first
			delete(t.kept, other)
			break
		}
	}
	v.generation = generation
	t.kept[key] = v
	return v, nil
}

// parse verifies a token. What has expired is told by its time, not by an error:
// a call in flight may have some grace.
func (t *tokens) parse(token string) (verified, error) {
	svid, err := jwtsvid.ParseAndValidate(token, t.bundles, t.audiences)
	var v verified
	switch {
	case err == nil:
		v = verified{id: svid.ID, expires: svid.Expiry.Add(leeway)}
	case strings.HasSuffix(err.Error(), "token has expired"): // and all else is good: go-spiffe looks at the time last
		if v, err = readExpired(token); err == nil {
			break
		}
		fallthrough
	default:
		d := untrusted("the JWT-SVID is not valid: its signature must be by a key of a trust domain that is known here, "+
			"and it must be for the audience %s; ask for a new one", strings.Join(t.audiences, " or "))
		d.Cause = err
		return v, d
	}
	if v.id.Path() == "" {
		return v, untrusted("the SPIFFE ID of the JWT-SVID has no path")
	}
	return v, nil
}

// readExpired reads a token that was verified.
func readExpired(token string) (verified, error) {
	_, rest, _ := strings.Cut(token, ".")
	payload, _, _ := strings.Cut(rest, ".")
	text, err := base64.RawURLEncoding.DecodeString(payload)
	if err != nil {
		return verified{}, err
	}
	var claims struct {
		Subject string  `json:"sub"`
		Expires float64 `json:"exp"`
	}
	if err := json.Unmarshal(text, &claims); err != nil {
		return verified{}, err
	}
	id, err := spiffeid.FromString(claims.Subject)
	return verified{id: id, expires: time.Unix(int64(claims.Expires), 0).UTC().Add(leeway)}, err
}

func untrusted(format string, args ...any) *interceptors.Denial {
	return interceptors.Deny(policyName, interceptors.IdentityUntrusted, format, args...)
}
