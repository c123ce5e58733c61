package expression

import (
	"errors"
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/metadata"

	"github.com/sluicegate/sluice/interceptors"
)

// scope is a call with an inference. What conditions say in one is tested in
// package identity.
func scope() *Scope {
	call := &interceptors.Call{
		CallInfo:  interceptors.CallInfo{FullMethod: "/s/M", Metadata: metadata.MD{"x-team": {"blue"}, "x-long": {strings.Repeat("x", MaxText+1)}}},
		Principal: "spiffe://a.example/team/search", ID: spiffeid.RequireFromString("spiffe://a.example/team/search"), Tenant: "team",
	}
	return &Scope{Call: call, Via: "mtls", Inference: &interceptors.Inference{Call: call, Model: "m"}}
}

func TestKey(t *testing.T) {
	for text, want := range map[string]string{
		`principal.segments[0]`:                      "team",
		`principal.segments[1] + "@" + tenant`:       "search@team",
		`metadata["x-team"][0]`:                      "blue",
		`"x-team" in metadata ? "known" : "unknown"`: "known",
		`model`:                      "m",
		`version`:                    "",
		`method + " " + peer.via`:    "/s/M mtls",
		`string(size(principal.id))`: "30",
	} {
		k, err := NewKey(text)
		if err != nil {
			t.Errorf("%s: %v", text, err)
			continue
		}
		if got, err := k.Text(nil, scope()); got != want || err != nil {
			t.Errorf("%s: %q, %v; want %q", text, got, err, want)
		}
	}
}

// What cannot be told is an error, and no text.
func TestKeyThatCannotBeTold(t *testing.T) {
	for _, text := range []string{`principal.segments[2]`, `metadata["x-user"][0]`, `metadata["x-long"][0]`, `string(1 / (size(tenant) - 4))`} {
		k, err := NewKey(text)
		if err != nil {
			t.Fatalf("%s: %v", text, err)
		}
		if got, err := k.Text(nil, scope()); err == nil || got != "" || errors.Is(err, ErrUnknown) {
			t.Errorf("%s: %q, %v", text, got, err)
		}
	}
	k, err := NewKey(`string(parameters["user"])`)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := k.Text(nil, scope()); !errors.Is(err, ErrUnknown) {
		t.Errorf("parameters that nobody knows: %v", err)
	}
	s := scope()
	s.Parameters = Parameters{"user": "u1"}
	if got, err := k.Text(nil, s); got != "u1" || err != nil {
		t.Errorf("%q, %v", got, err)
	}
}

func TestTypes(t *testing.T) {
	for text, want := range map[string]string{
		`tenant == "a"`:      "it is a bool; a key must be a string",
		`parameters["user"]`: "it is a dyn; a key must be a string: string(...) makes it one",
		`principal.segments`: "a key must be a string",
		`tenants`:            `there is no "tenants"; there are principal.id, `,
	} {
		if _, err := NewKey(text); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", text, err)
		}
	}
	if _, err := NewCondition(`tenant`); err == nil || !strings.Contains(err.Error(), "a condition must be true or false") {
		t.Error(err)
	}
}

// BenchmarkKey is a usual key.
func BenchmarkKey(b *testing.B) {
	k, err := NewKey(`principal.segments[0]`)
	if err != nil {
		b.Fatal(err)
	}
	s := scope()
	b.ReportAllocs()
	for b.Loop() {
		if _, err := k.Text(nil, s); err != nil {
			b.Fatal(err)
		}
	}
}
