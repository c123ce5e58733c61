package identity

import (
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

func TestTenant(t *testing.T) {
	for _, c := range []struct{ name, template, id, want string }{
		{"default", "", "spiffe://a.b/c", "a.b"},
		{"trust domain", "{trust_domain}", "spiffe://a.b/c", "a.b"},
		{"segment", "{2}", "spiffe://a.b/ns/team/sa/x", "team"},
		{"both and text", "{trust_domain}:{2}-x", "spiffe://a.b/ns/team", "a.b:team-x"},
		{"a missing segment is a tenant of its own", "{3}", "spiffe://a.b/ns/team", "spiffe://a.b/ns/team"},
		{"last segment", "{2}", "spiffe://a.b/ns/team", "team"},
		{"segment ten", "{10}", "spiffe://a.b/1/2/3/4/5/6/7/8/9/ten", "ten"},
	} {
		t.Run(c.name, func(t *testing.T) {
			tpl, err := parseTemplate(c.template)
			if err != nil {
				t.Fatal(err)
			}
			if got := tpl.tenant(spiffeid.RequireFromString(c.id)); got != c.want {
				t.Errorf("got %q, want %q", got, c.want)
			}
		})
	}
	for _, bad := range []string{"all", "{0}", "{-1}", "{01}", "{+1}", "{}", "{1", "1}", "{{1}}", "{x}", "{trust-domain}", "{99999999999999999999}"} {
		t.Run("bad "+bad, func(t *testing.T) {
			if _, err := parseTemplate(bad); err == nil {
				t.Error("no error")
			}
		})
	}
}

func FuzzTenant(f *testing.F) {
	f.Add("{trust_domain}/{1}", "spiffe://a.b/c/d")
	f.Add("x{2}{1}", "spiffe://a.b/c")
	f.Fuzz(func(t *testing.T, template, text string) {
		tpl, err := parseTemplate(template)
		if err != nil {
			return
		}
		id, err := spiffeid.FromString(text)
		if err != nil || id.Path() == "" {
			return
		}
		if tpl.tenant(id) == "" {
			t.Errorf("%q makes an empty tenant of %s", template, id)
		}
	})
}
