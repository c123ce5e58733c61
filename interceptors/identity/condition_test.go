package identity

import (
	"context"
	"fmt"
	"net"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/sluicegate/sluice/interceptors"
	"github.com/sluicegate/sluice/interceptors/dialect"
	"github.com/sluicegate/sluice/interceptors/fields"
	"github.com/sluicegate/sluice/interceptors/internal/expression"
	"github.com/sluicegate/sluice/proto/gen/inference"
	configv1 "github.com/sluicegate/sluice/proto/gen/sluice/config/v1"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/proto"
)

// decideOf is what a condition says in the environment of one call.
func decideOf(t testing.TB, text string, e environment) (answer, error) {
	t.Helper()
	c := secure(when(allow("spiffe://a.example/**", "inference", "m"), text))
	c.Tenant = "{1}"
	p := newPolicy(t, c)
	g := p.rules.grant(e.Call.Peer.ID, infer)
	return g.holds(g.permits[0].when, &e)
}

// surroundings are what conditions are tried in.
func surroundings() environment {
	call := callOf("spiffe://a.example/team-a/search/7", infer)
	call.Peer.Addr = &net.TCPAddr{IP: net.IPv4(10, 1, 2, 3), Port: 4567}
	call.Metadata = metadata.MD{
		"x-team": {"blue", "green"}, "authorization": {"Bearer secret"}, "x-forwarded-for": {"1.2.3.4"}, "X_Tenant": {"other"},
		"trace-bin": {"\x00\xff"}, "x-long": {strings.Repeat("x", expression.MaxText+1)},
	}
	return environment{
		Call: call, Via: viaMTLS, Peer: spiffeid.RequireFromString("spiffe://a.example/proxy"),
		Inference:  &interceptors.Inference{Call: call, Model: "m", Version: "3"},
		Parameters: parameters{"max_tokens": int64(100), "temperature": 0.5, "stream": true, "user": "u1", "n": int64(2)},
		Now:        time.Date(2026, 1, 31, 18, 30, 0, 0, time.UTC),
	}
}

func TestEnvironment(t *testing.T) {
	const yes, no, never = matches, conditionFalse, undecided
	for text, want := range map[string]answer{
		`principal.id == "spiffe://a.example/team-a/search/7"`:        yes,
		`principal.trust_domain == "a.example"`:                       yes,
		`principal.path == "/team-a/search/7"`:                        yes,
		`principal.segments == ["team-a", "search", "7"]`:             yes,
		`principal.segments[0] == "team-b"`:                           no,
		`principal.segments[3] == ""`:                                 never,
		`size(principal.segments) > 3 && principal.segments[3] == ""`: no,
		`tenant == "team-a"`:                                          yes,
		`method == "/inference.GRPCInferenceService/ModelInfer"`:      yes,
		`method.endsWith("/ModelInfer") && model == "m"`:              yes,
		`version == "3"`:                                                yes,
		`version in ["1", "2"]`:                                         no,
		`parameters["max_tokens"] <= 256`:                               yes,
		`parameters["max_tokens"] * parameters["n"] == 200`:             yes,
		`parameters.max_tokens > 100`:                                   no,
		`parameters["temperature"] < 1 && parameters["stream"] == true`: yes,
		`parameters["user"].startsWith("u")`:                            yes,
		`"seed" in parameters`:                                          no,
		`!("seed" in parameters) || parameters["seed"] == 1`:            yes,
		`parameters["seed"] == 1`:                                       never,
		`parameters["user"] < 7`:                                        never,
		`parameters.all(k, k in ["max_tokens", "user"])`:                no,
		`metadata["x-team"] == ["blue", "green"]`:                       yes,
		`"green" in metadata["x-team"]`:                                 yes,
		`metadata["x-team"].exists(v, v == "red")`:                      no,
		`metadata["x-teams"][0] == "red"`:                               never,
		`"authorization" in metadata`:                                   no,
		`"x-forwarded-for" in metadata || "x-tenant" in metadata`:       no,
		`"x_tenant" in metadata || "X_Tenant" in metadata`:              no,
		`"trace-bin" in metadata`:                                       no,
		`"x-long" in metadata`:                                          yes,
		`metadata["x-long"][0] == "x"`:                                  never,
		`peer.id == "spiffe://a.example/proxy"`:                         yes,
		`peer.address == "10.1.2.3:4567"`:                               yes,
		`peer.via == "mtls"`:                                            yes,
		`time == timestamp("2026-01-31T18:30:00Z")`:                     yes,
		`time.getHours() < 18 || time.getDayOfWeek() in [0, 6]`:         yes,
		`time.getHours("-01:00") == 17`:                                 yes,
		`1 / (size(tenant) - 6) == 1`:                                   never,
		`tenant == "team-a" || parameters["seed"] == 1`:                 yes,
	} {
		t.Run(text, func(t *testing.T) {
			got, err := decideOf(t, text, surroundings())
			if got != want || (err != nil) != (want == never) {
				t.Errorf("got %d, %v; want %d", got, err, want)
			}
		})
	}
}

func TestTimeIsNow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := surroundings()
		e.Now = time.Time{}
		text := fmt.Sprintf(`time <= timestamp(%q)`, time.Now().Add(time.Minute).Format(time.RFC3339Nano))
		if got, err := decideOf(t, text, e); got != matches {
			t.Errorf("before: %d, %v", got, err)
		}
		time.Sleep(time.Minute + 1)
		if got, err := decideOf(t, text, e); got != conditionFalse {
			t.Errorf("after: %d, %v", got, err)
		}
	})
}

func TestAnonymousInConditions(t *testing.T) {
	p := newPolicy(t, open(when(allow("anonymous", "inference", "m"),
		`principal.id == "anonymous" && principal.trust_domain == "" && principal.path == "" && principal.segments == []
		&& tenant == "anonymous" && peer.id == "" && peer.address == "" && peer.via == "anonymous"`)))
	if got := ask(t, p, callOf("", infer), "m"); got != "" {
		t.Error(got)
	}
}

func TestConditionErrors(t *testing.T) {
	for text, want := range map[string]string{
		`model = "m"`:                   "line 1, column 7: Syntax error",
		`modell == "m"`:                 `there is no "modell"; there are principal.id, `,
		`principal.name == "x"`:         `there is no "principal.name"; there are principal.id, `,
		`principal == "x"`:              `there is no "principal"; `,
		`model == 3`:                    "found no matching overload",
		`model`:                         "it is a string; a condition must be true or false",
		`parameters["x"]`:               "it is a dyn; a condition must be true or false",
		`tenant == "a" && env("HOME")`:  `there is no "env"`,
		"tenant == 'a' &&\n  modell":    `line 2, column 3: there is no "modell"`,
		`tenant.matches("(")`:           "invalid matches argument",
		`time < timestamp("yesterday")`: "invalid timestamp argument",
		`metadata.all(a, metadata.all(b, metadata.all(c, a == b && b == c)))`: "the limit is 20000",
		`model == "` + strings.Repeat("x", 4096) + `"`:                        "expression code point size exceeds limit",
		`tenant.matches("(a{500}){500}")`:                                     "column",
	} {
		_, err := New(secure(allow("spiffe://a/x", "health", ""), when(allow("spiffe://a/x", "inference", "m"), text)))
		if err == nil || !strings.HasPrefix(err.Error(), "identity.rules[1].when: ") || !strings.Contains(err.Error(), want) {
			t.Errorf("%.60s: got %v, want %q", text, err, want)
		}
	}
}

// What cannot be decided neither allows nor fails to deny; what would cost too
// much is such a thing. The condition is always true.
func TestCostAtRunTime(t *testing.T) {
	const dear = `metadata.all(k, metadata[k].all(v, v.matches("^(x|y)*z$") || true))`
	many := metadata.MD{}
	for n := range 100 {
		many.Append(fmt.Sprint("k", n), strings.Repeat("x", expression.MaxText))
	}
	for _, c := range []struct {
		name string
		md   metadata.MD
		want bool
	}{{"little", metadata.MD{"k": {"xyz"}}, true}, {"much", many, false}} {
		call := callOf("spiffe://a/x", infer)
		call.Metadata = c.md
		e := environment{Call: call, Inference: &interceptors.Inference{Call: call, Model: "m"}, Parameters: parameters{}}
		p := newPolicy(t, secure(when(allow("spiffe://a/x", "inference", "m"), dear)))
		if got := p.rules.grant(call.Peer.ID, infer).allows("m", "", &e); got != c.want {
			t.Errorf("%s: allowed is %t", c.name, got)
		}
		p = newPolicy(t, secure(allow("spiffe://a/x", "inference", "m"), when(deny("spiffe://a/x", "inference", "m"), "!("+dear+")")))
		if got := p.rules.grant(call.Peer.ID, infer).allows("m", "", &e); got != c.want {
			t.Errorf("%s, denied: allowed is %t", c.name, got)
		}
	}
}

// When a call begins only its metadata is known: what asks for more may yet hold.
func TestConditionsWhenACallBegins(t *testing.T) {
	const id = "spiffe://a/x"
	all := allow(id, "inference", "*")
	for _, c := range []struct {
		name  string
		rules []*configv1.Rule
		want  interceptors.Reason // of the call, not of an inference
	}{
		{"true", []*configv1.Rule{when(allow(id, "inference", "m"), `tenant == "a"`)}, ""},
		{"false", []*configv1.Rule{when(allow(id, "inference", "m"), `tenant == "b"`)}, interceptors.MethodDenied},
		{"cannot be decided", []*configv1.Rule{when(allow(id, "inference", "m"), `metadata["k"][0] == ""`)}, interceptors.MethodDenied},
		{"of the model", []*configv1.Rule{when(allow(id, "inference", "*"), `model.startsWith("m")`)}, ""},
		{"of parameters", []*configv1.Rule{when(allow(id, "inference", "*"), `parameters["max_tokens"] < 5`)}, ""},
		{"denied", []*configv1.Rule{all, when(deny(id, "inference", ""), `tenant == "a"`)}, interceptors.MethodDenied},
		{"denied, false", []*configv1.Rule{all, when(deny(id, "inference", ""), `tenant == "b"`)}, ""},
		{"denied, cannot be decided", []*configv1.Rule{all, when(deny(id, "inference", ""), `metadata["k"][0] == ""`)}, interceptors.MethodDenied},
		{"denied, of the model", []*configv1.Rule{all, when(deny(id, "inference", ""), `model == "m"`)}, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			p := newPolicy(t, secure(c.rules...))
			if got := reason(t, p.Allow(callOf(id, infer))); got != c.want {
				t.Errorf("got %q, want %q", got, c.want)
			}
		})
	}
}

func param(v any) *inference.InferParameter {
	switch v := v.(type) {
	case bool:
		return &inference.InferParameter{ParameterChoice: &inference.InferParameter_BoolParam{BoolParam: v}}
	case int:
		return &inference.InferParameter{ParameterChoice: &inference.InferParameter_Int64Param{Int64Param: int64(v)}}
	case uint64:
		return &inference.InferParameter{ParameterChoice: &inference.InferParameter_Uint64Param{Uint64Param: v}}
	case float64:
		return &inference.InferParameter{ParameterChoice: &inference.InferParameter_DoubleParam{DoubleParam: v}}
	}
	return &inference.InferParameter{ParameterChoice: &inference.InferParameter_StringParam{StringParam: v.(string)}}
}

// envelopes are a message as both doors have it.
func envelopes(t testing.TB, m proto.Message) map[string]*interceptors.Envelope {
	t.Helper()
	b, err := proto.MarshalOptions{Deterministic: true}.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	return map[string]*interceptors.Envelope{
		"raw": interceptors.RawEnvelope(mem.BufferSlice{mem.SliceBuffer(b)}), "typed": interceptors.TypedEnvelope(proto.Clone(m)),
	}
}

func tritonDialect(t testing.TB) *dialect.Dialect {
	t.Helper()
	d, err := dialect.Triton(dialect.Options{})
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// The parameters are those of the message, whatever door it came through.
func TestParametersOfMessages(t *testing.T) {
	request := &inference.ModelInferRequest{
		ModelName: "m",
		Parameters: map[string]*inference.InferParameter{
			"seed": param(7), "big": param(uint64(1) << 63), "t": param(0.25), "on": param(true), "off": param(false), "who": param("me"),
			"long": param(strings.Repeat("x", expression.MaxText+1)), "none": {},
		},
		Inputs: []*inference.ModelInferRequest_InferInputTensor{
			{Name: "max_tokens", Datatype: "INT32", Shape: []int64{1}, Contents: &inference.InferTensorContents{IntContents: []int32{64}}},
			{Name: "text_input", Datatype: "BYTES", Shape: []int64{1}, Contents: &inference.InferTensorContents{BytesContents: [][]byte{[]byte("hi")}},
				Parameters: map[string]*inference.InferParameter{"content_type": param("str")}},
		},
	}
	for text, want := range map[string]bool{
		`parameters["seed"] == 7 && parameters["t"] == 0.25 && parameters["on"] && !parameters["off"] && parameters["who"] == "me"`: true,
		`parameters["big"] == 9223372036854775807`:                          true,
		`parameters["max_tokens"] == 64`:                                    true,
		`"long" in parameters`:                                              true,
		`parameters["none"] == null`:                                        true,
		`parameters["long"] != ""`:                                          false,
		`parameters.exists(k, k.contains("text") || k.contains("content"))`: false,
		`parameters.all(k, k in ["seed", "big", "t", "on", "off", "who", "long", "none", "max_tokens"]) && "none" in parameters`: true,
	} {
		p := newPolicy(t, secure(when(allow("spiffe://a/x", "inference", "m"), text)))
		chain := interceptors.New([]*interceptors.Backend{{Name: "b", Dialect: tritonDialect(t)}}, p)
		for door, e := range envelopes(t, request) {
			call, err := chain.Begin(context.Background(), callOf("spiffe://a/x", infer).CallInfo)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := call.Request(e); (err == nil) != want {
				t.Errorf("%s, %s: %v", text, door, err)
			}
			call.End(nil)
			e.Release()
		}
	}
}

// A repeated field of a user's own message is no single value.
func TestParameterThatStandsTwice(t *testing.T) {
	m := new(fields.Message)
	d := tritonDialect(t).Methods[service+"LogSettings"]
	request := &inference.LogSettingsRequest{Settings: map[string]*inference.LogSettingsRequest_SettingValue{
		"log_file": {ParameterChoice: &inference.LogSettingsRequest_SettingValue_StringParam{StringParam: "/etc/passwd"}}}}
	if err := d.Request.Walk(m, request); err != nil {
		t.Fatal(err)
	}
	if got := expression.ReadParameters(nil, m); len(got) != 1 || got["settings.log_file"] != "/etc/passwd" {
		t.Errorf("%v", got)
	}
	m.Fields = append(m.Fields, m.Fields[len(m.Fields)-1])
	if got, err := expression.ReadParameters(nil, m)["settings.log_file"].(error); !err {
		t.Errorf("%v", got)
	}
}

// An inference that is judged again is judged by the parameters that were kept,
// and cannot be judged without them.
func TestParametersJudgedAgain(t *testing.T) {
	p := newPolicy(t, secure(when(allow("spiffe://a/x", "inference", "m"), `parameters["seed"] == 7`),
		when(deny("spiffe://a/x", "inference", "m"), `"evil" in parameters`)))
	call := callOf("spiffe://a/x", infer)
	g := p.rules.grant(call.Peer.ID, infer)
	if !g.asksParameters {
		t.Error("nobody would keep them")
	}
	for _, c := range []struct {
		kept parameters
		want bool
	}{{parameters{"seed": int64(7)}, true}, {parameters{"seed": int64(8)}, false}, {nil, false}} {
		e := environment{Call: call, Inference: &interceptors.Inference{Call: call, Model: "m"}, Parameters: c.kept}
		if got := g.allows("m", "", &e); got != c.want {
			t.Errorf("%v: %t", c.kept, got)
		}
	}
	if plain := newPolicy(t, secure(when(allow("spiffe://a/x", "inference", "m"), `model == "m"`))); plain.rules.grant(call.Peer.ID, infer).asksParameters {
		t.Error("somebody keeps what no condition asks for")
	}
}

// A typical condition.
func BenchmarkCondition(b *testing.B) {
	b.ReportAllocs()
	p := newPolicy(b, secure(when(allow("spiffe://a/**", "inference", "m"),
		`principal.segments[0] == "team-a" && (!("max_tokens" in parameters) || parameters["max_tokens"] <= 256)`)))
	call := callOf("spiffe://a/team-a/x", infer)
	i := &interceptors.Inference{Call: call, Model: "m", MaxOutputTokens: 100}
	m := new(fields.Message)
	request := &inference.ModelInferRequest{ModelName: "m", Parameters: map[string]*inference.InferParameter{"max_tokens": param(100), "seed": param(1)}}
	if err := tritonDialect(b).Methods[infer.Name].Request.Walk(m, request); err != nil {
		b.Fatal(err)
	}
	g := p.rules.grant(call.Peer.ID, infer)
	for b.Loop() {
		begin := environment{Call: call, Via: viaMTLS, Peer: call.Peer.ID}
		e := begin
		e.Inference, e.Message = i, m
		if !g.call(&begin) || !g.allows("m", "", &e) {
			b.Fatal("denied")
		}
	}
}

// The dearest kind of condition that is taken, with as much to look at as there
// may be.
func BenchmarkDearCondition(b *testing.B) {
	p := newPolicy(b, secure(when(allow("spiffe://a/**", "inference", "m"),
		`metadata.exists(k, metadata[k].exists(v, v.matches("^(x|y)*z$")))`)))
	call := callOf("spiffe://a/team-a/x", infer)
	call.Metadata = metadata.MD{}
	for n := range 64 {
		call.Metadata.Append(fmt.Sprint("k", n), strings.Repeat("xy", 128), strings.Repeat("xy", 128))
	}
	g := p.rules.grant(call.Peer.ID, infer)
	for b.Loop() {
		e := environment{Call: call, Inference: &interceptors.Inference{Call: call, Model: "m"}, Parameters: parameters{}}
		if g.allows("m", "", &e) {
			b.Fatal("allowed")
		}
	}
}
