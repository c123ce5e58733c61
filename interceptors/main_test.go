package interceptors

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/sluicegate/sluice/interceptors/dialect"
	"github.com/sluicegate/sluice/interceptors/fields"
	"github.com/sluicegate/sluice/proto/gen/inference"
	"go.uber.org/goleak"
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/proto"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const (
	modelInfer       = "/inference.GRPCInferenceService/ModelInfer"
	modelStreamInfer = "/inference.GRPCInferenceService/ModelStreamInfer"
	serverLive       = "/inference.GRPCInferenceService/ServerLive"
)

// journal is what happened, in order. It is safe for concurrent use.
type journal struct {
	mu    sync.Mutex
	lines []string
}

func (j *journal) add(format string, args ...any) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.lines = append(j.lines, fmt.Sprintf(format, args...))
}

func (j *journal) all() []string {
	j.mu.Lock()
	defer j.mu.Unlock()
	return slices.Clone(j.lines)
}

// those are the lines that begin with one of the prefixes.
func (j *journal) those(prefixes ...string) (out []string) {
	for _, l := range j.all() {
		for _, p := range prefixes {
			if strings.HasPrefix(l, p) {
				out = append(out, l)
			}
		}
	}
	return out
}

// scripted is a policy that keeps a journal and does what its script says. A
// nil function does nothing.
type scripted struct {
	name string
	*journal

	begin    func(*Call) error
	allow    func(*Call) error
	start    func(*Inference) error
	request  func(*Inference, *fields.Message) error
	response func(*Inference, *fields.Message) error
	wait     func(context.Context, *Inference) error // nil: nothing to wait for
	deaf     bool
	end      func(*Inference)
	callEnd  func()
}

func (p *scripted) Name() string { return p.name }

func (p *scripted) Begin(c *Call) (CallPolicy, error) {
	p.add("%s begin", p.name)
	if p.begin != nil {
		if err := p.begin(c); err != nil {
			return nil, err
		}
	}
	p.add("%s begun", p.name)
	return &scriptedCall{p}, nil
}

func (p *scripted) Allow(c *Call) error {
	if p.allow == nil {
		return nil
	}
	return p.allow(c)
}

type scriptedCall struct{ *scripted }

func (p *scriptedCall) Start(i *Inference) (InferencePolicy, error) {
	p.add("%s start %s", p.name, i.ID)
	if p.start != nil {
		if err := p.start(i); err != nil {
			return nil, err
		}
	}
	p.add("%s started %s", p.name, i.ID)
	if p.wait != nil {
		return &scriptedWaiter{scriptedInference{scripted: p.scripted, i: i}, false}, nil
	}
	return &scriptedInference{scripted: p.scripted, i: i}, nil
}

func (p *scriptedCall) End(o Outcome) {
	p.add("%s call-end %s", p.name, outcome(o))
	if p.callEnd != nil {
		p.callEnd()
	}
}

func (p *scriptedCall) Refused(i *Inference, d *Denial) {
	p.add("%s witness %s %s", p.name, i.ID, d.Reason)
}

type scriptedInference struct {
	*scripted
	i *Inference
}

func (p *scriptedInference) Request(m *fields.Message) error {
	p.add("%s request %s", p.name, p.i.ID)
	if p.request != nil {
		return p.request(p.i, m)
	}
	return nil
}

func (p *scriptedInference) Deaf() bool { return p.deaf }

func (p *scriptedInference) Response(m *fields.Message) error {
	p.add("%s response %s", p.name, p.i.ID)
	if p.response != nil {
		return p.response(p.i, m)
	}
	return nil
}

func (p *scriptedInference) End(o Outcome) {
	p.add("%s end %s %s", p.name, p.i.ID, outcome(o))
	if p.end != nil {
		p.end(p.i)
	}
}

type scriptedWaiter struct {
	scriptedInference
	waited bool
}

func (p *scriptedWaiter) Ready() bool { return p.waited }

func (p *scriptedWaiter) Wait(ctx context.Context) error {
	p.add("%s wait %s", p.name, p.i.ID)
	err := p.wait(ctx, p.i)
	p.waited = true
	return err
}

func outcome(o Outcome) string {
	switch d := o.Denial(); {
	case d != nil:
		return string(d.Reason)
	case o.Err != nil:
		return "error"
	}
	return "ok"
}

func triton(t testing.TB, models ...string) *Backend {
	t.Helper()
	return backend(t, "triton", dialect.Triton, models...)
}

func backend(t testing.TB, name string, open func(dialect.Options) (*dialect.Dialect, error), models ...string) *Backend {
	t.Helper()
	d, err := open(dialect.Options{})
	if err != nil {
		t.Fatal(err)
	}
	b := &Backend{Name: name, Dialect: d}
	for _, m := range models {
		if b.Models == nil {
			b.Models = make(map[string]bool)
		}
		b.Models[m] = true
	}
	return b
}

// ask is a request for a model.
func ask(model, id string, texts ...string) *inference.ModelInferRequest {
	r := &inference.ModelInferRequest{ModelName: model, Id: id}
	if len(texts) > 0 {
		c := &inference.InferTensorContents{}
		for _, s := range texts {
			c.BytesContents = append(c.BytesContents, []byte(s))
		}
		r.Inputs = []*inference.ModelInferRequest_InferInputTensor{{
			Name: "text_input", Datatype: "BYTES", Shape: []int64{int64(len(texts))}, Contents: c}}
	}
	return r
}

// answer is a response with text, if any.
func answer(id string, texts ...string) *inference.ModelInferResponse {
	r := &inference.ModelInferResponse{Id: id}
	if len(texts) > 0 {
		c := &inference.InferTensorContents{}
		for _, s := range texts {
			c.BytesContents = append(c.BytesContents, []byte(s))
		}
		r.Outputs = []*inference.ModelInferResponse_InferOutputTensor{{
			Name: "text_output", Datatype: "BYTES", Shape: []int64{int64(len(texts))}, Contents: c}}
	}
	return r
}

func boolean(v bool) *inference.InferParameter {
	return &inference.InferParameter{ParameterChoice: &inference.InferParameter_BoolParam{BoolParam: v}}
}

// chunk is a response of a Triton stream; final says whether it is the last.
func chunk(id string, final bool, texts ...string) *inference.ModelStreamInferResponse {
	r := answer(id, texts...)
	r.Parameters = map[string]*inference.InferParameter{"triton_final_response": boolean(final)}
	return &inference.ModelStreamInferResponse{InferResponse: r}
}

func reasonOf(err error) Reason {
	if d := asError[*Denial](err); d != nil {
		return d.Reason
	}
	return ""
}

// rawEnvelope is a message as the gateway has it, in several buffers.
func rawEnvelope(t testing.TB, m proto.Message) *Envelope {
	t.Helper()
	b, err := proto.MarshalOptions{Deterministic: true}.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	var bufs mem.BufferSlice
	for len(b) > 7 {
		bufs = append(bufs, mem.SliceBuffer(b[:7]))
		b = b[7:]
	}
	return RawEnvelope(append(bufs, mem.SliceBuffer(b)))
}
