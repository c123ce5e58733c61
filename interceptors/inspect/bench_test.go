package inspect

import (
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

// BenchmarkChunk is one chunk of 20 bytes of a streamed answer.
func BenchmarkChunk(b *testing.B) {
	p, i := benchPart(b, &configv1.Inspect{Responses: true}, streaming)
	m := benchMessage(b, i.Call.Method.Response, answer(prose[:20], false))
	part, _ := p.Start(i)
	b.ReportAllocs()
	for b.Loop() {
		_ = part.Response(m)
	}
	part.End(interceptors.Outcome{})
}
