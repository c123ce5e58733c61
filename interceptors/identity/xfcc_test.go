package identity

import (
	"reflect"
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// printForwarded writes elements as Envoy does.
func printForwarded(elements []element) string {
	var out []string
	for _, e := range elements {
		var pairs []string
		for _, a := range e {
			value := a.value
			if strings.ContainsAny(value, `,;="`) {
				value = `"` + strings.ReplaceAll(value, `"`, `\"`) + `"`
			}
			pairs = append(pairs, a.key+"="+value)
		}
		out = append(out, strings.Join(pairs, ";"))
	}
	return strings.Join(out, ",")
}

func TestParseForwarded(t *testing.T) {
	for _, c := range []struct {
		name, text string
		want       []element // nil: refused
	}{
		{"one", "By=spiffe://a.test/p;Hash=0a;URI=spiffe://a.test/c",
			[]element{{{"By", "spiffe://a.test/p"}, {"Hash", "0a"}, {"URI", "spiffe://a.test/c"}}}},
		{"two proxies", `By=x;Subject="/C=US/CN=a";URI=y,By=z;URI=w`,
			[]element{{{"By", "x"}, {"Subject", "/C=US/CN=a"}, {"URI", "y"}}, {{"By", "z"}, {"URI", "w"}}}},
		{"several of a kind", "By=a;By=b;URI=c;URI=d;DNS=e;DNS=f",
			[]element{{{"By", "a"}, {"By", "b"}, {"URI", "c"}, {"URI", "d"}, {"DNS", "e"}, {"DNS", "f"}}}},
		{"separators in quotes", `Subject="a,b;c=d\"e"`, []element{{{"Subject", `a,b;c=d"e`}}}},
		{"a backslash of RFC 2253", `Subject="CN=a\,b"`, []element{{{"Subject", `CN=a\,b`}}}},
		{"a quoted quote after backslashes", `Subject="a\\\"b"`, []element{{{"Subject", `a\\"b`}}}},
		{"empty values", `By=;Subject=""`, []element{{{"By", ""}, {"Subject", ""}}}},
		{"keys in any case", "bY=a;uRI=b", []element{{{"bY", "a"}, {"uRI", "b"}}}},
		{"a key of tomorrow", "Serial=7;URI=b", []element{{{"Serial", "7"}, {"URI", "b"}}}},
		{"a certificate", `Cert="-----BEGIN%20CERTIFICATE-----%0Aabc%3D"`, []element{{{"Cert", "-----BEGIN%20CERTIFICATE-----%0Aabc%3D"}}}},
		{"a last backslash without quotes", `Subject=a\`, []element{{{"Subject", `a\`}}}},

		{"empty", "", nil},
		{"a comma", ",", nil},
		{"empty element", "URI=a,,URI=b", nil},
		{"empty last element", "URI=a,", nil},
		{"empty pair", "URI=a;;By=b", nil},
		{"empty last pair", "URI=a;", nil},
		{"no value", "URI", nil},
		{"no key", "=a", nil},
		{"a space", "By=a, URI=b", nil},
		{"a space in a key", "By =a", nil},
		{"= without quotes", "URI=a=b", nil},
		{"a quote inside", `URI=a"b"`, nil},
		{"open quotes", `Subject="a`, nil},
		{"open quotes, escaped end", `Subject="a\"`, nil},
		{"text after quotes", `Subject="a"b`, nil},
		{"an end that may be none", `Subject="a\\";URI=b`, nil},
		{"two hashes", "Hash=a;hash=b", nil},
		{"two subjects", `Subject="";SUBJECT=""`, nil},
		{"two certificates", "Cert=a;Cert=a", nil},
		{"two chains", "Chain=a;Chain=a", nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			got, err := parseForwarded(c.text)
			if (err != nil) != (c.want == nil) || !reflect.DeepEqual(got, c.want) {
				t.Fatalf("%q is %q, %v; want %q", c.text, got, err, c.want)
			}
			if err == nil && !reflect.DeepEqual(must(t, printForwarded(got)), got) {
				t.Errorf("%q was printed as %q", got, printForwarded(got))
			}
		})
	}
}

func must(t *testing.T, text string) []element {
	t.Helper()
	e, err := parseForwarded(text)
	if err != nil {
		t.Fatalf("%q: %v", text, err)
	}
	return e
}

func TestForwardedID(t *testing.T) {
	proxy := spiffeid.RequireFromString("spiffe://sluice.test/proxy")
	for _, c := range []struct{ name, text, want string }{
		{"the client", "By=spiffe://sluice.test/proxy;URI=spiffe://sluice.test/c", "spiffe://sluice.test/c"},
		{"of another trust domain", "URI=spiffe://other.test/c", "spiffe://other.test/c"},
		{"quoted", `URI="spiffe://sluice.test/c"`, "spiffe://sluice.test/c"},
		{"one By of several", "By=x;By=spiffe://sluice.test/proxy;By=y;URI=spiffe://sluice.test/c", "spiffe://sluice.test/c"},
		{"the last word counts", "URI=spiffe://sluice.test/root,uri=spiffe://sluice.test/c", "spiffe://sluice.test/c"},

		{"others' words do not", "URI=spiffe://sluice.test/root,Hash=a", ""},
		{"by somebody else", "By=spiffe://sluice.test/other;URI=spiffe://sluice.test/c", ""},
		{"by nobody", "By=;URI=spiffe://sluice.test/c", ""},
		{"no URI", "DNS=spiffe://sluice.test/c", ""},
		{"two URIs", "URI=spiffe://sluice.test/c;URI=spiffe://sluice.test/d", ""},
		{"twice the same", "URI=spiffe://sluice.test/c;uri=spiffe://sluice.test/c", ""},
		{"a trust domain", "URI=spiffe://sluice.test", ""},
		{"upper case", "URI=spiffe://Sluice.test/c", ""},
		{"dots", "URI=spiffe://sluice.test/a/../c", ""},
		{"a query", "URI=spiffe://sluice.test/c?d", ""},
		{"no SPIFFE ID", "URI=https://sluice.test/c", ""},
		{"malformed before", "URI,URI=spiffe://sluice.test/c", ""},
		{"a quote opened before", `Subject=",URI=spiffe://sluice.test/c`, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			id, err := forwardedID(c.text, proxy)
			if id.String() != c.want || (err == nil) != (c.want != "") {
				t.Errorf("%q is %q, %v; want %q", c.text, id, err, c.want)
			}
		})
	}
}

// What a client sends of its own, and a proxy appends its word to, never changes
// what the proxy says: the call is refused, or is the client's.
func FuzzForwarded(f *testing.F) {
	for _, seed := range []string{
		"", "URI=spiffe://sluice.test/root", `By=a;Subject="b`, `a="\"`, `x="\\`, `Subject="a,b;c=\"d"`, "a=b,c=d;e=f", `a=\`,
	} {
		f.Add(seed)
	}
	proxy := spiffeid.RequireFromString("spiffe://sluice.test/proxy")
	const word = `,By=spiffe://sluice.test/proxy;Hash=00;Subject="CN=\"c\"";URI=spiffe://sluice.test/client`
	f.Fuzz(func(t *testing.T, text string) {
		if elements, err := parseForwarded(text); err == nil {
			again, err := parseForwarded(printForwarded(elements))
			if err != nil || !reflect.DeepEqual(again, elements) {
				t.Fatalf("%q, printed %q: %v", elements, printForwarded(elements), err)
			}
		}
		if id, err := forwardedID(text+word, proxy); err == nil && id.String() != "spiffe://sluice.test/client" {
			t.Fatalf("%q makes the client %s", text, id)
		}
	})
}
