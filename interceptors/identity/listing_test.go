package identity

import (
	"bytes"
	"context"
	"slices"
	"strings"
	"testing"

	"github.com/sluicegate/sluice/interceptors"
	"github.com/sluicegate/sluice/interceptors/dialect"
	"github.com/sluicegate/sluice/proto/gen/inference"
	configv1 "github.com/sluicegate/sluice/proto/gen/sluice/config/v1"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/dynamicpb"
)

// listOf is the answer to RepositoryIndex that lists models, each "name/version".
func listOf(entries string) *inference.RepositoryIndexResponse {
	list := new(inference.RepositoryIndexResponse)
	for _, e := range words(entries) {
		name, version, _ := strings.Cut(e, "/")
		list.Models = append(list.Models, &inference.RepositoryIndexResponse_ModelIndex{
			Name: name, Version: version, State: "READY", Reason: strings.Repeat("r", 2000)})
	}
	return list
}

// answered passes a list through a chain, as both doors do.
func answered(t *testing.T, b *interceptors.Backend, c *configv1.Identity, m *dialect.Method, id string, list proto.Message) map[string]proto.Message {
	t.Helper()
	chain := interceptors.New([]*interceptors.Backend{b}, newPolicy(t, c))
	out := make(map[string]proto.Message)
	requests, answers := envelopes(t, requestFor(m, "", "")), envelopes(t, list)
	for door := range requests {
		call, err := chain.Begin(context.Background(), callOf(id, m).CallInfo)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := call.Request(requests[door]); err != nil {
			t.Fatal(err)
		}
		if _, verdict, err := call.Response(answers[door]); err != nil || verdict != interceptors.Deliver {
			t.Fatalf("%v, %v", verdict, err)
		}
		call.End(nil)
		requests[door].Release()
		if door == "typed" {
			out[door] = answers[door].Typed()
			continue
		}
		wire := answers[door].Encode()
		got := list.ProtoReflect().New().Interface()
		if err := proto.Unmarshal(wire.Materialize(), got); err != nil {
			t.Fatal(err)
		}
		again, err := proto.MarshalOptions{Deterministic: true}.Marshal(got)
		if err != nil || !bytes.Equal(again, wire.Materialize()) {
			t.Errorf("%s: other bytes were changed, %v", door, err)
		}
		wire.Free()
		out[door] = got
	}
	return out
}

func TestLists(t *testing.T) {
	const (
		id    = "spiffe://a/x"
		whole = "a/1 a/2 b/1 c/ d/1"
	)
	may := allow(id, service+"RepositoryIndex", "")
	for _, c := range []struct {
		name   string
		rules  []*configv1.Rule
		served string
		want   string
	}{
		{"no model", nil, "", ""},
		{"one", []*configv1.Rule{allow(id, "inference", "a")}, "", "a/1 a/2"},
		{"by metadata", []*configv1.Rule{allow(id, "inference", "a"), allow(id, "metadata", "c")}, "", "a/1 a/2 c/"},
		{"by a management method", []*configv1.Rule{allow(id, service+"RepositoryModelLoad", "d")}, "", "d/1"},
		{"not by a method without models", []*configv1.Rule{allow(id, service+"LogSettings", "*")}, "", ""},
		{"another caller", []*configv1.Rule{allow("spiffe://a/y", "inference", "*")}, "", ""},
		{"a version", []*configv1.Rule{versions(allow(id, "inference", "a b c"), "1")}, "", "a/1 b/1"},
		{"all", []*configv1.Rule{allow(id, "inference", "*")}, "", whole},
		{"all but one", []*configv1.Rule{allow(id, "inference", "*"), deny(id, "inference", "b")}, "", "a/1 a/2 c/ d/1"},
		{"all but a version", []*configv1.Rule{allow(id, "inference", "*"), versions(deny(id, "inference", "a"), "2")}, "", "a/1 b/1 c/ d/1"},
		{"denied one way, not the other", []*configv1.Rule{allow(id, "inference metadata", "*"), deny(id, "inference", "b")}, "", whole},
		{"what the back end is not asked for", []*configv1.Rule{allow(id, "inference", "*")}, "a d", "a/1 a/2 d/1"},
		{"a condition on the model", []*configv1.Rule{when(allow(id, "inference", "*"), `model in ["a", "d"] && version == "1"`)}, "", "a/1 d/1"},
		{"a condition on the method", []*configv1.Rule{when(allow(id, "inference metadata", "*"), `method.endsWith("Metadata") && model == "c"`)}, "", "c/"},
		{"a condition that may hold", []*configv1.Rule{when(allow(id, "inference", "b"), `parameters["max_tokens"] < 9`)}, "", "b/1"},
		{"a denial that may hold", []*configv1.Rule{allow(id, "inference", "b"), when(deny(id, "inference", "b"), `parameters["max_tokens"] < 9`)}, "", "b/1"},
		{"a condition that does not hold", []*configv1.Rule{when(allow(id, "inference", "b"), `tenant == "z"`)}, "", ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			for name, d := range everyDialect(t) {
				m := d.Methods[service+"RepositoryIndex"]
				if m == nil {
					continue
				}
				b := &interceptors.Backend{Name: name, Dialect: d}
				for _, model := range words(c.served) {
					if b.Models == nil {
						b.Models = make(map[string]bool)
					}
					b.Models[model] = true
				}
				for door, got := range answered(t, b, secure(append([]*configv1.Rule{may}, c.rules...)...), m, id, listOf(whole)) {
					if want := listOf(c.want); !proto.Equal(got, want) {
						t.Errorf("%s, %s: got %v, want %v", name, door, got, want)
					}
				}
			}
		})
	}
}

// A list in a user's own API, with fields of its own numbers.
func TestListOfAnOwnAPI(t *testing.T) {
	d := ownDialect(t)
	m := d.Methods["/acme.LLM/ListModels"]
	if !m.ListsModels || m.NamesModel || d.Methods["/acme.LLM/Describe"].ListsModels {
		t.Fatalf("%+v", m)
	}
	entry := func(name, tag string) []byte {
		e := protowire.AppendString(protowire.AppendTag(nil, 3, protowire.BytesType), tag)
		e = protowire.AppendString(protowire.AppendTag(e, 7, protowire.BytesType), name)
		return protowire.AppendBytes(protowire.AppendTag(nil, 4, protowire.BytesType), e)
	}
	title := protowire.AppendString(protowire.AppendTag(nil, 1, protowire.BytesType), "models")
	list, want := dynamicpb.NewMessage(m.Response.Descriptor()), dynamicpb.NewMessage(m.Response.Descriptor())
	for msg, b := range map[proto.Message][]byte{
		list: slices.Concat(title, entry("a", "1"), entry("b", "1"), entry("a", "2")), want: slices.Concat(title, entry("a", "1")),
	} {
		if err := proto.Unmarshal(b, msg); err != nil {
			t.Fatal(err)
		}
	}
	c := secure(allow("spiffe://a/x", m.Name, ""), versions(allow("spiffe://a/x", "/acme.LLM/Ask", "a"), "1"))
	for door, got := range answered(t, &interceptors.Backend{Name: "own", Dialect: d}, c, m, "spiffe://a/x", list) {
		if !proto.Equal(got, want) {
			t.Errorf("%s: got %v, want %v", door, got, want)
		}
	}
}

// Where nothing is to be hidden nobody looks.
func TestListsThatHideNothing(t *testing.T) {
	d := tritonDialect(t)
	m := d.Methods[service+"RepositoryIndex"]
	may := allow("spiffe://a/x", m.Name, "")
	for _, c := range []struct {
		name  string
		rules []*configv1.Rule
		b     *interceptors.Backend
		m     *dialect.Method
		want  bool
	}{
		{"every model", []*configv1.Rule{may, allow("spiffe://a/x", "inference", "*")}, &interceptors.Backend{Dialect: d}, m, false},
		{"no list", []*configv1.Rule{may, allow("spiffe://a/x", "inference", "m")}, &interceptors.Backend{Dialect: d}, d.Methods[infer.Name], false},
		{"one model", []*configv1.Rule{may, allow("spiffe://a/x", "inference", "m")}, &interceptors.Backend{Dialect: d}, m, true},
		{"one denied", []*configv1.Rule{may, allow("spiffe://a/x", "inference", "*"), deny("spiffe://a/x", "inference", "m")}, &interceptors.Backend{Dialect: d}, m, true},
		{"one served", []*configv1.Rule{may, allow("spiffe://a/x", "inference", "*")}, &interceptors.Backend{Dialect: d, Models: map[string]bool{"m": true}}, m, true},
	} {
		p := newPolicy(t, secure(c.rules...))
		call := callOf("spiffe://a/x", c.m)
		i := &interceptors.Inference{Call: call, Backend: c.b, Model: "m"}
		got := p.rules.grant(call.Peer.ID, c.m).start(&environment{Call: call, Inference: i})
		if (got != nil) != c.want {
			t.Errorf("%s: %v", c.name, got)
		}
	}
}
