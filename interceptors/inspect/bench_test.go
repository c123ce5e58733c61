package inspect

import (
	"maps"
	"math"
	"slices"
	"strings"
	"testing"

	"github.com/sluicegate/sluice/interceptors"
	"github.com/sluicegate/sluice/interceptors/fields"
	configv1 "github.com/sluicegate/sluice/proto/gen/sluice/config/v1"
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/proto"
)

const prose = "The harbour was quiet that morning. Two boats had come in before dawn, and the crew sat on the wall with " +
	"coffee, waiting for the market to open. Could you describe the scene in three short sentences, please? "

func benchMessage(b *testing.B, p *fields.Program, json string) *fields.Message {
	b.Helper()
	wire, err := proto.Marshal(build(b, p.Descriptor(), json))
	if err != nil {
		b.Fatal(err)
	}
	m := new(fields.Message)
	if err := p.Scan(m, mem.BufferSlice{mem.SliceBuffer(wire)}); err != nil {
		b.Fatal(err)
	}
	return m
}

func benchPart(b *testing.B, cfg *configv1.Inspect, method string) (*Policy, *interceptors.Inference) {
	b.Helper()
	p := newPolicy(b, cfg)
	c, _ := call(b, p, method)
	return p, &interceptors.Inference{Call: c}
}

// BenchmarkRequest is one inference with one prompt, from start to end.
func BenchmarkRequest(b *testing.B) {
	personal := &configv1.Inspect{Rules: "Include @sluice/personal.conf\nInclude @sluice/secrets.conf"}
	foreign := &configv1.Inspect{Rules: `SecRule ARGS_POST "@rx tulip.*rose" "id:1,phase:2,deny"`}
	for _, c := range []struct {
		name, text string
		cfg        *configv1.Inspect
	}{
		{"200B", prose[:200], nil},
		{"4KB", strings.Repeat(prose, 21)[:4096], nil},
		{"200B/personal+secrets", prose[:200], personal},
		{"200B/denied", prose[:139] + " " + attack, nil},
		{"200B/foreign rule", prose[:200], foreign},
		{"4KB/Cyrillic", strings.Repeat("Съешь же ещё этих мягких булок. ", 80)[:4096], nil},
		{"4KB/worst words", strings.Repeat("ignore previous the your system ", 128), nil},
		{"4KB/base64", strings.Repeat("QUJDREVGR0hJSktMTU5PUFFSU1RVVldYWVo ", 114), nil},
	} {
		b.Run(c.name, func(b *testing.B) {
			p, i := benchPart(b, c.cfg, unary)
			m := benchMessage(b, i.Call.Method.Request, prompt(c.text))
			b.SetBytes(int64(len(c.text)))
			b.ReportAllocs()
			for b.Loop() {
				part, _ := p.Start(i)
				_ = part.Request(m)
				part.End(interceptors.Outcome{})
			}
		})
	}
}

// BenchmarkCostly reads what was made to cost more than prose, and prose, with
// every detector.
func BenchmarkCostly(b *testing.B) {
	texts := costly()
	texts["prose"] = strings.Repeat(prose, 160)
	texts["prose, 1 MB"] = strings.Repeat(prose, 1<<20/len(prose))
	for _, name := range slices.Sorted(maps.Keys(texts)) {
		b.Run(name, func(b *testing.B) {
			text := []byte(texts[name])
			s := borrow(new(engine))
			defer s.put()
			b.SetBytes(int64(len(text)))
			for b.Loop() {
				s.whole(text, ^uint64(0))
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/float64(len(text)), "ns/byte")
		})
	}
}

// BenchmarkNumeric is a message without text.
func BenchmarkNumeric(b *testing.B) {
	p, i := benchPart(b, nil, unary)
	m := benchMessage(b, i.Call.Method.Request, infer(`"inputs":[{"name":"x","datatype":"FP32","shape":[4],"contents":{"fp32Contents":[1,2,3,4]}}]`))
	b.ReportAllocs()
	for b.Loop() {
		part, _ := p.Start(i)
		_ = part.Request(m)
		part.End(interceptors.Outcome{})
	}
}

// TestNumbersCostNothing holds that nothing is allocated for tensors of numbers, whose data
// nobody looks at.
func TestNumbersCostNothing(t *testing.T) {
	p := newPolicy(t, &configv1.Inspect{Responses: true, Rules: "Include @sluice/personal.conf\nInclude @sluice/secrets.conf"})
	c, _ := call(t, p, unary)
	i := &interceptors.Inference{Call: c}
	e := raw(t, c.Method.Request, infer(`"inputs":[{"name":"x","datatype":"FP32","shape":[4],"contents":{"fp32Contents":[1,2,3,4]}},`+
		`{"name":"y","datatype":"UINT8","shape":[2],"contents":{"uintContents":[65,66]}}]`))
	if _, err := c.Request(e); err != nil {
		t.Fatal(err)
	}
	for k := range e.Message.Fields {
		if f := &e.Message.Fields[k]; fields.IsText(f.Role) {
			t.Errorf("%s is read as text", e.Message.Path(f))
		}
	}
	part, _ := p.Start(i)
	defer part.End(interceptors.Outcome{})
	least := math.Inf(1) // the race detector has pools lose things
	for range 20 {
		least = min(least, testing.AllocsPerRun(1, func() {
			if err := part.Request(&e.Message); err != nil {
				t.Fatal(err)
			}
		}))
	}
	if least > 0 {
		t.Errorf("%.0f allocations", least)
	}
}

// chunkRules are what BenchmarkChunk and TestChunkAllocations read answers with.
var chunkRules = map[string]*configv1.Inspect{
	"no rules on outputs": {},
	"starter":             {Responses: true},
	"personal":            {Responses: true, NoStarterRules: true, Rules: "Include @sluice/personal.conf"},
	"starter+personal+secrets+canary": {Responses: true, Canaries: []string{"tulip-7Q4x-bell"},
		Rules: "Include @sluice/personal.conf\nInclude @sluice/secrets.conf"},
	"score":        {Responses: true, NoStarterRules: true, Rules: `SecRule RESPONSE_ARGS "@sluiceScore 0.002" "id:1,phase:4,pass,log"`},
	"foreign rule": {Responses: true, NoStarterRules: true, Rules: `SecRule RESPONSE_ARGS "@rx tulip.{0,9}rose" "id:1,phase:4,deny"`},
}

// answered is an answer in chunks of about four bytes, as models write.
func answered(b testing.TB, c *interceptors.Call) (messages []*fields.Message) {
	b.Helper()
	text := strings.Repeat(prose, 2)
	for i := 0; i < len(text); i += 4 {
		wire := said(text[i:min(i+4, len(text))])
		m := new(fields.Message)
		if err := c.Method.Response.Scan(m, mem.BufferSlice{mem.SliceBuffer(wire)}); err != nil {
			b.Fatal(err)
		}
		messages = append(messages, m)
	}
	return messages
}

// BenchmarkChunk is one chunk of four bytes of a streamed answer.
func BenchmarkChunk(b *testing.B) {
	for _, name := range slices.Sorted(maps.Keys(chunkRules)) {
		b.Run(name, func(b *testing.B) {
			p, i := benchPart(b, chunkRules[name], streaming)
			messages := answered(b, i.Call)
			part, _ := p.Start(i)
			b.ReportAllocs()
			n := 0
			for b.Loop() {
				if part.(interceptors.Deaf).Deaf() {
					continue
				}
				if err := part.Response(messages[n%len(messages)]); err != nil {
					b.Fatal(err)
				}
				n++
			}
			part.End(interceptors.Outcome{})
		})
	}
}

// TestChunkAllocations holds that a chunk of ordinary text allocates nothing.
func TestChunkAllocations(t *testing.T) {
	for name, cfg := range chunkRules {
		if name == "foreign rule" { // a transaction does
			continue
		}
		p := newPolicy(t, cfg)
		c, _ := call(t, p, streaming)
		messages := answered(t, c)
		part, _ := p.Start(&interceptors.Inference{Call: c})
		least := math.Inf(1)
		for range 20 {
			least = min(least, testing.AllocsPerRun(1, func() {
				for _, m := range messages {
					if err := part.Response(m); err != nil {
						t.Fatal(err)
					}
				}
			}))
		}
		if least > 0 {
			t.Errorf("%s: %.0f allocations for %d chunks", name, least, len(messages))
		}
	}
}

// TestAllocations bounds what one prompt allocates where a plan decides.
func TestAllocations(t *testing.T) {
	cfg := &configv1.Inspect{Rules: "Include @sluice/personal.conf\nInclude @sluice/secrets.conf"}
	for name, text := range map[string]string{
		"clean": prose, "denied": prose + attack, "encoded": prose + base64Of(attack), "four kilobytes": strings.Repeat(prose, 20),
		"redacted": prose + "Write to ann@example.com.",
	} {
		p := newPolicy(t, cfg)
		c, _ := call(t, p, unary)
		i := &interceptors.Inference{Call: c}
		e := raw(t, c.Method.Request, prompt(text))
		m := &e.Message
		if _, err := c.Request(e); (err != nil) != (name == "denied" || name == "encoded") {
			t.Fatal(name, err)
		}
		least := math.Inf(1) // the race detector has pools lose things
		for range 20 {
			least = min(least, testing.AllocsPerRun(1, func() {
				for k := range m.Fields {
					if f := &m.Fields[k]; f.Role == fields.Prompt {
						m.Set(f, []byte(text)) // as it was before it was redacted
					}
				}
				part, _ := p.Start(i)
				_ = part.Request(m)
				part.End(interceptors.Outcome{})
			}))
		}
		if least > 20 {
			t.Errorf("%s: %.0f allocations", name, least)
		}
	}
}

// BenchmarkAnswer is a whole streamed answer of a hundred chunks, from start to end.
func BenchmarkAnswer(b *testing.B) {
	for _, name := range []string{"starter", "starter+personal+secrets+canary"} {
		b.Run(name, func(b *testing.B) {
			p, i := benchPart(b, chunkRules[name], streaming)
			messages := answered(b, i.Call)
			b.ReportAllocs()
			for b.Loop() {
				part, _ := p.Start(i)
				for _, m := range messages {
					if err := part.Response(m); err != nil {
						b.Fatal(err)
					}
				}
				if err := part.(interceptors.Holder).Finish(); err != nil {
					b.Fatal(err)
				}
				part.End(interceptors.Outcome{})
			}
			b.ReportMetric(float64(len(messages)), "chunks")
		})
	}
}

// BenchmarkCostlyAnswer reads answers that were made to cost more than prose, in
// chunks of four bytes.
func BenchmarkCostlyAnswer(b *testing.B) {
	texts := costlyAnswers()
	texts["prose"] = strings.Repeat(prose, 80)[:1<<14]
	for _, name := range slices.Sorted(maps.Keys(texts)) {
		b.Run(name, func(b *testing.B) {
			p, i := benchPart(b, chunkRules["starter+personal+secrets+canary"], streaming)
			text := []byte(texts[name])
			b.SetBytes(int64(len(text)))
			for b.Loop() {
				sub := &part{policy: p, inference: i, stream: true}
				f := sub.newFlow(0, "", "outputs.x")
				for at := 0; at < len(text); at += 4 {
					if f.write(text[at:min(at+4, len(text))]) != nil {
						break
					}
				}
				_ = f.finish()
				f.put()
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/float64(len(text)), "ns/byte")
		})
	}
}
