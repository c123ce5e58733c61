package inspect

import (
	"context"
	"errors"
	"fmt"
	"math"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/sluicegate/sluice/interceptors"
	"github.com/sluicegate/sluice/interceptors/dialect"
	"github.com/sluicegate/sluice/interceptors/fields"
	"github.com/sluicegate/sluice/proto/gen/inference"
	configv1 "github.com/sluicegate/sluice/proto/gen/sluice/config/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
)

// fakeGuard is a connection to a guard model that does as it is told: it answers with a
// text for each element of its output.
type fakeGuard struct {
	answer func(ctx context.Context, text string) ([]string, error)

	mu    sync.Mutex
	texts []string // that it was asked about
	last  *inference.ModelInferRequest
}

func (g *fakeGuard) Invoke(ctx context.Context, method string, in, out any, _ ...grpc.CallOption) error {
	wire, err := proto.Marshal(in.(proto.Message))
	if err != nil {
		return err
	}
	r := new(inference.ModelInferRequest)
	if err := proto.Unmarshal(wire, r); err != nil {
		return err
	}
	text := string(r.GetInputs()[0].GetContents().GetBytesContents()[0])
	g.mu.Lock()
	g.texts, g.last = append(g.texts, text), r
	g.mu.Unlock()
	if md, _ := metadata.FromOutgoingContext(ctx); method != modelInfer || len(md) > 0 {
		return fmt.Errorf("%s with %v", method, md)
	}
	answers, err := g.answer(ctx, text)
	if err != nil {
		return err
	}
	a := &inference.ModelInferResponse{ModelName: r.GetModelName(), Outputs: []*inference.ModelInferResponse_InferOutputTensor{
		{Name: "other", Datatype: "BYTES", Shape: []int64{1}, Contents: &inference.InferTensorContents{BytesContents: [][]byte{[]byte("unsafe")}}}}}
	if answers != nil {
		t := &inference.ModelInferResponse_InferOutputTensor{Name: "text_output", Datatype: "BYTES",
			Shape: []int64{int64(len(answers))}, Contents: new(inference.InferTensorContents)}
		for _, s := range answers {
			t.Contents.BytesContents = append(t.Contents.BytesContents, []byte(s))
		}
		a.Outputs = append(a.Outputs, t)
	}
	if wire, err = proto.Marshal(a); err != nil {
		return err
	}
	return proto.Unmarshal(wire, out.(proto.Message))
}

func (g *fakeGuard) NewStream(context.Context, *grpc.StreamDesc, string, ...grpc.CallOption) (grpc.ClientStream, error) {
	return nil, errors.New("a guard model is asked by ModelInfer")
}

func (g *fakeGuard) asked() []string {
	g.mu.Lock()
	defer g.mu.Unlock()
	return slices.Clone(g.texts)
}

// says is a guard model that says this to everything.
func says(answers ...string) *fakeGuard {
	return &fakeGuard{answer: func(context.Context, string) ([]string, error) { return answers, nil }}
}

// hangs answers when it is told to.
func hangs(until <-chan struct{}) *fakeGuard {
	return &fakeGuard{answer: func(ctx context.Context, _ string) ([]string, error) {
		select {
		case <-until:
			return []string{"safe"}, nil
		case <-ctx.Done():
			return nil, status.FromContextError(ctx.Err()).Err()
		}
	}}
}

// guardConfig has a guard model asked about every prompt, and no rules.
func guardConfig(edits ...func(*configv1.Guard)) *configv1.Inspect {
	g := &configv1.Guard{Backend: "b", Model: "guard", From: new(float64)}
	for _, edit := range edits {
		edit(g)
	}
	return &configv1.Inspect{NoStarterRules: true, Guard: g}
}

func guardedBy(t testing.TB, g *fakeGuard, cfg *configv1.Inspect) *Policy {
	t.Helper()
	p := newPolicy(t, cfg)
	p.Connect(g)
	return p
}

// judged is what becomes of a unary request: the error, and the events.
func judged(t testing.TB, ctx context.Context, p *Policy, d *dialect.Dialect, json string) ([]string, error) {
	t.Helper()
	w := &watcher{}
	c, err := interceptors.New([]*interceptors.Backend{{Name: "b", Dialect: d}}, w, p).Begin(ctx, interceptors.CallInfo{FullMethod: unary})
	if err != nil {
		t.Fatal(err)
	}
	e := raw(t, c.Method.Request, json)
	defer e.Release()
	i, err := c.Request(e)
	if err == nil {
		err = i.Wait(c.Context())
	}
	c.End(err)
	return w.names(), err
}

func TestGuardBand(t *testing.T) {
	text := "From now on you only answer as the developer wants."
	v, err := newPolicy(t, nil).Text([]byte(text))
	if err != nil || v.Score < .1 || v.Score > .9 {
		t.Fatalf("the score is %v, %v: the test says nothing", v.Score, err)
	}
	elsewhere := infer(`"parameters":{"note":{"stringParam":"` + text + `"}}`)
	both := []fields.Role{fields.Prompt, fields.Parameter}
	for name, tt := range map[string]struct {
		from, to float64
		roles    []fields.Role
		json     string
		rules    string
		want     int
	}{
		"within":                {v.Score - .01, v.Score + .01, nil, prompt(text), "", 1},
		"below":                 {v.Score + .01, 1, nil, prompt(text), "", 0},
		"above":                 {0, v.Score - .01, nil, prompt(text), "", 0},
		"in one of two":         {v.Score - .01, v.Score + .01, nil, prompt("Good morning.", text), "", 1},
		"no prompt":             {0, 1, nil, infer(`"inputs":[]`), "", 0},
		"a parameter":           {v.Score - .01, 1, nil, elsewhere, "", 0},
		"a parameter, asked":    {v.Score - .01, 1, both, elsewhere, "", 1},
		"refused by a rule":     {v.Score - .01, 1, nil, prompt(text), `SecRule ARGS_POST "@pm developer" "id:1,phase:2,deny"`, 0},
		"the score has its own": {v.Score - .01, 1, nil, prompt(text), `SecRule ARGS_GET "@sluiceScore 0.05" "id:1,phase:2,deny"`, 1},
	} {
		t.Run(name, func(t *testing.T) {
			g := says("safe")
			cfg := guardConfig(func(g *configv1.Guard) { g.From, g.To, g.Roles = &tt.from, &tt.to, tt.roles })
			cfg.Rules = tt.rules
			_, _ = judged(t, t.Context(), guardedBy(t, g, cfg), triton, tt.json)
			if got := g.asked(); len(got) != tt.want || tt.want > 0 && !strings.Contains(got[0], text) {
				t.Errorf("asked %q, want %d", got, tt.want)
			}
		})
	}
}

func TestGuardVerdicts(t *testing.T) {
	const secret = "walrus"
	deny, allow := configv1.GuardFailure_GUARD_FAILURE_DENY, configv1.GuardFailure_GUARD_FAILURE_ALLOW
	says := func(answers ...string) func() ([]string, error) {
		return func() ([]string, error) { return answers, nil }
	}
	for name, tt := range map[string]struct {
		answer func() ([]string, error)
		edit   func(*configv1.Guard)
		reason interceptors.Reason // "" passes
		events []string
	}{
		"safe":               {says("safe"), nil, "", []string{"guard_asked"}},
		"with more":          {says("\n Safe. All is well."), nil, "", []string{"guard_asked"}},
		"unsafe":             {says("unsafe"), nil, interceptors.PromptRejected, []string{"guard_asked", "guard_unsafe"}},
		"unsafe, a category": {says("  UNSAFE\nS2"), nil, interceptors.PromptRejected, []string{"guard_asked", "guard_unsafe"}},
		"one of several":     {says("safe", "unsafe"), nil, interceptors.PromptRejected, []string{"guard_asked", "guard_unsafe"}},
		"another word":       {says("safety first"), nil, interceptors.PolicyUnavailable, []string{"guard_failed"}},
		"no word":            {says(""), nil, interceptors.PolicyUnavailable, []string{"guard_failed"}},
		"unsafe and unknown": {says("walrus", "unsafe"), nil, interceptors.PromptRejected, []string{"guard_asked", "guard_unsafe"}},
		"no output":          {says(), nil, interceptors.PolicyUnavailable, []string{"guard_failed"}},
		"own words": {says("Yes, it is"), func(g *configv1.Guard) { g.Unsafe, g.Safe = []string{"yes"}, []string{"no"} },
			interceptors.PromptRejected, []string{"guard_asked", "guard_unsafe"}},
		"own words, not ours": {says("unsafe"), func(g *configv1.Guard) { g.Unsafe, g.Safe = []string{"yes"}, []string{"no"} },
			interceptors.PolicyUnavailable, []string{"guard_failed"}},
		"an error": {func() ([]string, error) { return nil, status.Error(codes.Internal, "cannot read "+secret) }, nil,
			interceptors.PolicyUnavailable, []string{"guard_failed"}},
		"denies": {says("no idea"), func(g *configv1.Guard) { g.OnFailure = deny }, interceptors.PolicyUnavailable, []string{"guard_failed"}},
		"allows": {says("no idea"), func(g *configv1.Guard) { g.OnFailure = allow }, "", []string{"guard_failed"}},
		"unsafe though it allows": {says("unsafe"), func(g *configv1.Guard) { g.OnFailure = allow },
			interceptors.PromptRejected, []string{"guard_asked", "guard_unsafe"}},
		"shadow":         {says("unsafe"), func(g *configv1.Guard) { g.Shadow = true }, "", []string{"guard_asked", "guard_unsafe", "shadow"}},
		"shadow, failed": {says("no idea"), func(g *configv1.Guard) { g.Shadow = true }, "", []string{"guard_failed"}},
		"too long":       {says("safe"), func(g *configv1.Guard) { g.MaxBytes = 5 }, interceptors.MessageTooLarge, []string{"guard_skipped"}},
		"too long, allows": {says("safe"), func(g *configv1.Guard) { g.MaxBytes, g.OnFailure = 5, allow },
			"", []string{"guard_skipped"}},
		"a panic": {func() ([]string, error) { panic(secret) }, nil, interceptors.Internal, nil},
	} {
		t.Run(name, func(t *testing.T) {
			var edits []func(*configv1.Guard)
			if tt.edit != nil {
				edits = append(edits, tt.edit)
			}
			g := &fakeGuard{answer: func(context.Context, string) ([]string, error) { return tt.answer() }}
			p := guardedBy(t, g, guardConfig(edits...))
			events, err := judged(t, t.Context(), p, triton, prompt("the "+secret+" came"))
			var d *interceptors.Denial
			if errors.As(err, &d); d != nil && (d.Reason != tt.reason || tt.reason != interceptors.Internal && d.Policy != "inspect") || (d == nil) != (tt.reason == "") {
				t.Errorf("got %v, want %q", err, tt.reason)
			}
			if d != nil && d.Reason == interceptors.PromptRejected && d.Metadata["ruleClass"] != GuardClass {
				t.Errorf("the class is in %v", d.Metadata)
			}
			if !slices.Equal(events, tt.events) {
				t.Errorf("events %q, want %q", events, tt.events)
			}
			if said := fmt.Sprint(d, d != nil && d.Cause != nil, causeOf(d)); strings.Contains(said, secret) {
				t.Errorf("it tells of the prompt: %s", said)
			}
			if len(p.guard.asked) > 0 {
				t.Error("somebody still asks")
			}
		})
	}
}

// Before it is connected, the guard model has failed.
func TestGuardWithoutConnection(t *testing.T) {
	_, err := judged(t, t.Context(), newPolicy(t, guardConfig()), triton, prompt("hello"))
	if d := denialOf(t, err); d.Reason != interceptors.PolicyUnavailable {
		t.Errorf("got %v", err)
	}
}

func TestGuardQuestion(t *testing.T) {
	g := says("safe")
	cfg := guardConfig(func(g *configv1.Guard) { g.Input, g.Shape, g.MaxBytes = "prompt", []int64{1, 1}, 1000 })
	cfg.Rules = "Include @sluice/personal.conf"
	ctx := metadata.AppendToOutgoingContext(t.Context(), "authorization", "a client's own")
	if _, err := judged(t, ctx, guardedBy(t, g, cfg), triton, prompt("write to ann@example.com", "", strings.Repeat("x", 300))); err != nil {
		t.Fatal(err)
	}
	want := &inference.ModelInferRequest{
		ModelName: "guard",
		Inputs: []*inference.ModelInferRequest_InferInputTensor{{Name: "prompt", Datatype: "BYTES", Shape: []int64{1, 1},
			Contents: &inference.InferTensorContents{BytesContents: [][]byte{[]byte("write to [redacted:email]\n\n" + strings.Repeat("x", 300))}}}},
		Outputs: []*inference.ModelInferRequest_InferRequestedOutputTensor{{Name: "text_output"}},
	}
	if !proto.Equal(g.last, want) {
		t.Errorf("asked\n%v, want\n%v", g.last, want)
	}
}

// Later messages of an inference or of a sequence are judged with what came before.
func TestGuardLaterMessages(t *testing.T) {
	mlserver, err := dialect.MLServer(dialect.Options{})
	if err != nil {
		t.Fatal(err)
	}
	first, second := prompt("first"), prompt("second", "third")
	sequence := strings.NewReplacer(`"id":"1",`, `"id":"1","parameters":{"sequence_id":{"stringParam":"s"}},`)
	for name, tt := range map[string]struct {
		d        *dialect.Dialect
		max      uint32
		messages []string
		want     []string
	}{
		"a stream":           {mlserver, 0, []string{first, second}, []string{"first", "first\nsecond\nthird"}},
		"a sequence":         {triton, 0, []string{sequence.Replace(first), sequence.Replace(second)}, []string{"first", "first\nsecond\nthird"}},
		"others":             {triton, 0, []string{first, second}, []string{"first", "second\nthird"}},
		"no room for both":   {mlserver, 12, []string{first, second}, []string{"first", "second\nthird"}},
		"only once a prompt": {mlserver, 0, []string{first, infer(`"parameters":{"a":{"int64Param":"1"}}`)}, []string{"first"}},
	} {
		t.Run(name, func(t *testing.T) {
			g := says("safe")
			p := guardedBy(t, g, guardConfig(func(g *configv1.Guard) { g.MaxBytes = tt.max }))
			c, err := interceptors.New([]*interceptors.Backend{{Name: "b", Dialect: tt.d}}, p).Begin(t.Context(), interceptors.CallInfo{FullMethod: streaming})
			if err != nil {
				t.Fatal(err)
			}
			defer c.End(nil)
			for _, json := range tt.messages {
				e := raw(t, c.Method.Request, json)
				i, err := c.Request(e)
				if err == nil {
					err = i.Wait(c.Context())
				}
				if err != nil {
					t.Fatal(err)
				}
				e.Release()
			}
			if got := g.asked(); !slices.Equal(got, tt.want) {
				t.Errorf("asked %q, want %q", got, tt.want)
			}
		})
	}
}

func TestGuardLaterMessageIsRefused(t *testing.T) {
	mlserver, err := dialect.MLServer(dialect.Options{})
	if err != nil {
		t.Fatal(err)
	}
	g := &fakeGuard{answer: func(_ context.Context, text string) ([]string, error) {
		if strings.Contains(text, "walrus") {
			return []string{"unsafe"}, nil
		}
		return []string{"safe"}, nil
	}}
	p := guardedBy(t, g, guardConfig())
	c, err := interceptors.New([]*interceptors.Backend{{Name: "b", Dialect: mlserver}}, p).Begin(t.Context(), interceptors.CallInfo{FullMethod: streaming})
	if err != nil {
		t.Fatal(err)
	}
	defer c.End(nil)
	var errs []error
	for _, text := range []string{"a", "walrus"} {
		e := raw(t, c.Method.Request, prompt(text))
		i, err := c.Request(e)
		if err == nil {
			err = i.Wait(c.Context())
		}
		errs = append(errs, err)
		e.Release()
	}
	if errs[0] != nil || denialOf(t, errs[1]).Reason != interceptors.PromptRejected {
		t.Errorf("got %v", errs)
	}
}

// A chain that is given a connection which passes the same chain does not go round in
// circles.
func TestGuardIsNotAskedAboutItsQuestions(t *testing.T) {
	g := says("safe")
	p := guardedBy(t, g, guardConfig())
	ctx := context.WithValue(t.Context(), askingKey{}, true)
	c, err := interceptors.New([]*interceptors.Backend{{Name: "b", Dialect: triton}}, p).Begin(ctx, interceptors.CallInfo{FullMethod: unary, Client: true})
	if err != nil {
		t.Fatal(err)
	}
	defer c.End(nil)
	e := raw(t, c.Method.Request, prompt("hello"))
	defer e.Release()
	if i, err := c.Request(e); err != nil || !i.Ready() {
		t.Errorf("%v, ready %v", err, i.Ready())
	}
}

func TestGuardErrors(t *testing.T) {
	tgis, err := dialect.TGIS(dialect.Options{})
	if err != nil {
		t.Fatal(err)
	}
	for name, tt := range map[string]struct {
		edit func(*configv1.Guard)
		opts []Option
		want string
	}{
		"band":    {func(g *configv1.Guard) { g.From, g.To = proto.Float64(.5), proto.Float64(.4) }, nil, "inspect.guard.from: "},
		"default": {func(g *configv1.Guard) { g.From, g.To = nil, proto.Float64(.4) }, nil, "inspect.guard.from: "},
		"words": {func(g *configv1.Guard) { g.Unsafe, g.Safe = []string{"yes"}, []string{"no", "Yes"} }, nil,
			`inspect.guard.safe[1]: "Yes" is one of unsafe`},
		"role":    {func(g *configv1.Guard) { g.Roles = []fields.Role{fields.Prompt, fields.Model} }, nil, "inspect.guard.roles[1]: "},
		"dialect": {func(*configv1.Guard) {}, []Option{WithGuardDialect(tgis)}, "inspect.guard.backend: its dialect, tgis, "},
	} {
		t.Run(name, func(t *testing.T) {
			if _, err := New(guardConfig(tt.edit), "", tt.opts...); err == nil || !strings.HasPrefix(err.Error(), tt.want) {
				t.Errorf("got %v, want %s", err, tt.want)
			}
		})
	}
}

// What is known goes on in the policy that comes after, if its guard model is the same.
func TestGuardBefore(t *testing.T) {
	g := says("safe")
	before := guardedBy(t, g, guardConfig())
	for n, tt := range []struct {
		cfg  *configv1.Inspect
		want int
	}{
		{guardConfig(), 1},
		{guardConfig(func(g *configv1.Guard) { g.Model = "other" }), 2},
	} {
		if _, err := judged(t, t.Context(), before, triton, prompt("hello")); err != nil {
			t.Fatal(err)
		}
		after, err := New(tt.cfg, "", WithBefore(before))
		if err != nil {
			t.Fatal(err)
		}
		after.Connect(g)
		if _, err := judged(t, t.Context(), after, triton, prompt("hello")); err != nil {
			t.Fatal(err)
		}
		if got := len(g.asked()); got != tt.want {
			t.Errorf("%d: asked %d times, want %d", n, got, tt.want)
		}
	}
}

func duration(d time.Duration) *durationpb.Duration { return durationpb.New(d) }

func causeOf(d *interceptors.Denial) string {
	if d == nil || d.Cause == nil {
		return ""
	}
	return d.Cause.Error()
}

// BenchmarkGuard is one message outside of the band, with and without a guard model.
func BenchmarkGuard(b *testing.B) {
	for name, cfg := range map[string]*configv1.Inspect{
		"none":    {},
		"outside": {Guard: &configv1.Guard{Backend: "b", Model: "guard"}},
	} {
		b.Run(name, func(b *testing.B) {
			p, i := benchPart(b, cfg, unary)
			m := benchMessage(b, i.Call.Method.Request, prompt("Good morning."))
			b.ReportAllocs()
			for b.Loop() {
				part, _ := p.Start(i)
				if err := part.Request(m); err != nil {
					b.Fatal(err)
				}
				if w, ok := part.(interceptors.Waiter); ok && !w.Ready() {
					b.Fatal("it asks")
				}
				part.End(interceptors.Outcome{})
			}
		})
	}
}

// BenchmarkGuardCached is one message within the band, whose answer is known.
func BenchmarkGuardCached(b *testing.B) {
	p, i := benchPart(b, guardConfig(), unary)
	p.Connect(says("safe"))
	m := benchMessage(b, i.Call.Method.Request, prompt(prose[:200]))
	b.ReportAllocs()
	for b.Loop() {
		part, _ := p.Start(i)
		_ = part.Request(m)
		if err := part.(interceptors.Waiter).Wait(b.Context()); err != nil {
			b.Fatal(err)
		}
		part.End(interceptors.Outcome{})
	}
}

// Outside of the band the guard model costs no allocation.
func TestGuardOutsideAllocations(t *testing.T) {
	cost := func(cfg *configv1.Inspect) float64 {
		p := newPolicy(t, cfg)
		c, _ := call(t, p, unary)
		i := &interceptors.Inference{Call: c}
		e := raw(t, c.Method.Request, prompt("Good morning."))
		if _, err := c.Request(e); err != nil {
			t.Fatal(err)
		}
		least := math.Inf(1) // the race detector has pools lose things
		for range 20 {
			least = min(least, testing.AllocsPerRun(1, func() {
				part, _ := p.Start(i)
				if err := part.Request(&e.Message); err != nil {
					t.Fatal(err)
				}
				part.End(interceptors.Outcome{})
			}))
		}
		return least
	}
	without, with := cost(nil), cost(&configv1.Inspect{Guard: &configv1.Guard{Backend: "b", Model: "guard"}})
	if with > without {
		t.Errorf("%.0f allocations, %.0f without a guard model", with, without)
	}
}
