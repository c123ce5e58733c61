package dialect

import (
	"errors"
	"testing"

	"github.com/sluicegate/sluice/interceptors/fields"
	"github.com/sluicegate/sluice/proto/gen/inference"
	"go.uber.org/goleak"
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/proto"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const (
	unary     = "/inference.GRPCInferenceService/ModelInfer"
	streaming = "/inference.GRPCInferenceService/ModelStreamInfer"
)

// servers are the dialects that speak the Open Inference Protocol.
var servers = map[string]func(Options) (*Dialect, error){
	"triton": Triton, "mlserver": MLServer, "kserve": KServe, "tgis": TGIS, "vllm": VLLM, "sglang": SGLang,
}

// openInferenceServers are those of them that speak the Open Inference Protocol.
var openInferenceServers = map[string]func(Options) (*Dialect, error){
	"triton": Triton, "mlserver": MLServer, "kserve": KServe,
}

func method(t testing.TB, dialect, name string, o Options) *Method {
	t.Helper()
	d, err := servers[dialect](o)
	if err != nil {
		t.Fatal(err)
	}
	m := d.Methods[name]
	if m == nil {
		t.Fatalf("%s has no method %s", dialect, name)
	}
	return m
}

// scan reads an encoded message in place.
func scan(t testing.TB, p *fields.Program, b []byte) (*fields.Message, error) {
	t.Helper()
	msg := new(fields.Message)
	return msg, p.Scan(msg, mem.BufferSlice{mem.SliceBuffer(b)})
}

func marshal(t testing.TB, m proto.Message) []byte {
	t.Helper()
	b, err := proto.MarshalOptions{Deterministic: true}.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// bothWays runs a check on a message that was scanned and on the same message
// walked: what a dialect reads must not depend on the door.
func bothWays(t *testing.T, p *fields.Program, m proto.Message, check func(*testing.T, *fields.Message)) {
	t.Helper()
	t.Run("scanned", func(t *testing.T) {
		msg, err := scan(t, p, marshal(t, m))
		if err != nil {
			t.Fatal(err)
		}
		check(t, msg)
	})
	t.Run("walked", func(t *testing.T) {
		msg := new(fields.Message)
		if err := p.Walk(msg, m); err != nil {
			t.Fatal(err)
		}
		check(t, msg)
	})
}

// edited is the message with its edits, whichever way it was read.
func edited(t testing.TB, msg *fields.Message, into proto.Message) {
	t.Helper()
	if out := msg.Typed(); out != nil {
		proto.Merge(into, out)
		return
	}
	b := msg.Encode()
	defer b.Free()
	if err := proto.Unmarshal(b.Materialize(), into); err != nil {
		t.Fatal(err)
	}
}

func kindOf(err error) fields.Kind {
	var fe *fields.Error
	if errors.As(err, &fe) {
		return fe.Kind
	}
	return 255
}

func boolParam(v bool) *inference.InferParameter {
	return &inference.InferParameter{ParameterChoice: &inference.InferParameter_BoolParam{BoolParam: v}}
}

func intParam(v int64) *inference.InferParameter {
	return &inference.InferParameter{ParameterChoice: &inference.InferParameter_Int64Param{Int64Param: v}}
}

func uintParam(v uint64) *inference.InferParameter {
	return &inference.InferParameter{ParameterChoice: &inference.InferParameter_Uint64Param{Uint64Param: v}}
}

func doubleParam(v float64) *inference.InferParameter {
	return &inference.InferParameter{ParameterChoice: &inference.InferParameter_DoubleParam{DoubleParam: v}}
}

func stringParam(v string) *inference.InferParameter {
	return &inference.InferParameter{ParameterChoice: &inference.InferParameter_StringParam{StringParam: v}}
}

type params = map[string]*inference.InferParameter

// tensor is an input with typed contents.
func tensor(name, datatype string, c *inference.InferTensorContents, shape ...int64) *inference.ModelInferRequest_InferInputTensor {
	return &inference.ModelInferRequest_InferInputTensor{Name: name, Datatype: datatype, Shape: shape, Contents: c}
}

func texts(s ...string) *inference.InferTensorContents {
	c := &inference.InferTensorContents{}
	for _, v := range s {
		c.BytesContents = append(c.BytesContents, []byte(v))
	}
	return c
}

func ints(v ...int32) *inference.InferTensorContents {
	return &inference.InferTensorContents{IntContents: v}
}
