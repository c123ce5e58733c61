package identity

import (
	"errors"
	"fmt"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// forwardedHeader is where Envoy, and what follows it, says which client
// certificates a call has come with.
const forwardedHeader = "x-forwarded-client-cert"

// element is what one proxy says of the client that it saw: pairs, in order.
// Keys are as they were written.
type element []attribute

type attribute struct{ key, value string }

// parseForwarded reads the header x-forwarded-client-cert as Envoy documents it.
// Elements are separated by commas, the last proxy's is the last; pairs by
// semicolons; keys are case-insensitive. A value that holds any of , ; = is
// quoted, and a quote in it is written \". Nothing else escapes anything, so a
// backslash before \" or before the end of a quoted value can be read in two
// ways, and is refused. Space does not separate anything.
//
// By, URI and DNS may occur several times in one element, the other keys that
// Envoy documents once; unknown keys mean nothing here.
func parseForwarded(text string) ([]element, error) {
	var elements []element
	for {
		var e element
		for {
			var a attribute
			var err error
			if a, text, err = parseAttribute(text); err != nil {
				return nil, fmt.Errorf("element %d, pair %d: %w", len(elements)+1, len(e)+1, err)
			}
			if e.repeats(a.key) {
				return nil, fmt.Errorf("element %d has two %s", len(elements)+1, a.key)
			}
			e = append(e, a)
			if !strings.HasPrefix(text, ";") {
				break
			}
			text = text[1:]
		}
		elements = append(elements, e)
		if text == "" {
			return elements, nil
		}
		text = text[1:] // a comma
	}
}

// repeats reports whether a key that may occur once is there already.
func (e element) repeats(key string) bool {
	switch strings.ToLower(key) {
	case "hash", "cert", "chain", "subject":
		return len(e.values(key)) > 0
	}
	return false
}

// parseAttribute reads one pair. The rest is empty, or begins with a separator.
func parseAttribute(text string) (a attribute, rest string, err error) {
	end := 0
	for end < len(text) && isKey(text[end]) {
		end++
	}
	switch {
	case end == 0:
		return a, "", errors.New("a key is missing")
	case end == len(text) || text[end] != '=':
		return a, "", errors.New("a key has no value")
	}
	a.key, text = text[:end], text[end+1:]
	if strings.HasPrefix(text, `"`) {
		a.value, rest, err = parseQuoted(text[1:])
	} else if end := strings.IndexAny(text, ",;"); end < 0 {
		a.value = text
	} else {
		a.value, rest = text[:end], text[end:]
	}
	switch {
	case err != nil:
	case !strings.HasPrefix(text, `"`) && strings.ContainsAny(a.value, `="`):
		err = errors.New("a value that holds = or a quote is not quoted")
	case rest != "" && rest[0] != ',' && rest[0] != ';':
		err = errors.New("something follows a quoted value")
	}
	return a, rest, err
}

// isKey reports whether a key may hold the character. Envoy's keys are letters.
func isKey(c byte) bool {
	return 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9' || c == '-' || c == '_'
}

// parseQuoted reads a value after its first quote, up to its last.
func parseQuoted(text string) (value, rest string, err error) {
	for n := 0; n < len(text); n++ {
		if text[n] != '"' {
			continue
		}
		backslashes := 0
		for backslashes < n && text[n-1-backslashes] == '\\' {
			backslashes++
		}
		switch {
		case backslashes == 0:
			return strings.ReplaceAll(text[:n], `\"`, `"`), text[n+1:], nil
		case backslashes%2 == 0:
			return "", "", errors.New("a backslash before a quote can be read in two ways")
		}
	}
	return "", "", errors.New("a quoted value has no end")
}

// values are those of a key.
func (e element) values(key string) (values []string) {
	for _, a := range e {
		if strings.EqualFold(a.key, key) {
			values = append(values, a.value)
		}
	}
	return values
}

// forwardedID is the client that the proxy speaks for: the only URI of the last
// element, which is the proxy's own word. What comes before it, others have said.
func forwardedID(header string, proxy spiffeid.ID) (spiffeid.ID, error) {
	elements, err := parseForwarded(header)
	if err != nil {
		return spiffeid.ID{}, err
	}
	last := elements[len(elements)-1]
	if by := last.values("By"); len(by) > 0 {
		own := false
		for _, name := range by {
			own = own || name == proxy.String()
		}
		if !own {
			return spiffeid.ID{}, errors.New("its last element is not by the proxy that sent it")
		}
	}
	uris := last.values("URI")
	if len(uris) != 1 {
		return spiffeid.ID{}, fmt.Errorf("its last element has %d URIs where a client with an X.509-SVID has one", len(uris))
	}
	id, err := spiffeid.FromString(uris[0])
	switch {
	case err != nil:
		return spiffeid.ID{}, fmt.Errorf("the URI of its last element is no SPIFFE ID: %w", err)
	case id.Path() == "":
		return spiffeid.ID{}, errors.New("the SPIFFE ID in its last element has no path")
	}
	return id, nil
}
