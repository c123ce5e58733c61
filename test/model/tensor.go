package model

import (
	"encoding/binary"
	"encoding/json"
	"math"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/sluicegate/sluice/proto/gen/inference"
)

// request is an inference request whose tensors were found.
type request struct {
	*inference.ModelInferRequest
	inputs map[string]input
}

// input is one tensor. Raw is nil if it is typed.
type input struct {
	*inference.ModelInferRequest_InferInputTensor
	raw []byte
}

func invalid(format string, args ...any) error {
	return status.Errorf(codes.InvalidArgument, format, args...)
}

// parse pairs the tensors with their raw contents. As with Triton, they are all
// raw or all typed.
func parse(req *inference.ModelInferRequest) (*request, error) {
	r := &request{req, make(map[string]input, len(req.GetInputs()))}
	raws := req.GetRawInputContents()
	if len(raws) > 0 && len(raws) != len(req.GetInputs()) {
		return nil, invalid("there are %d inputs and %d raw contents", len(req.GetInputs()), len(raws))
	}
	for n, t := range req.GetInputs() {
		in := input{t, nil}
		if t.GetParameters()["shared_memory_region"] != nil {
			return nil, invalid("input %d is in shared memory, which this server does not have", n)
		}
		if len(raws) > 0 {
			if t.GetContents() != nil {
				return nil, invalid("input %d is both raw and typed", n)
			}
			in.raw = raws[n]
			if in.raw == nil {
				in.raw = []byte{}
			}
		}
		if _, twice := r.inputs[t.GetName()]; twice {
			return nil, invalid("input %d has the name of another", n)
		}
		r.inputs[t.GetName()] = in
	}
	return r, nil
}

// texts are the elements of a BYTES tensor; nil if it is not there.
func (r *request) texts(name string) ([][]byte, error) {
	in, ok := r.inputs[name]
	if !ok {
		return nil, nil
	}
	if in.GetDatatype() != "BYTES" {
		return nil, invalid("%s must be BYTES", name)
	}
	out := in.GetContents().GetBytesContents()
	if in.raw != nil {
		out = [][]byte{}
		for b := in.raw; len(b) > 0; {
			if len(b) < 4 || uint64(len(b)-4) < uint64(binary.LittleEndian.Uint32(b)) {
				return nil, invalid("an element of %s goes past its end", name)
			}
			n := binary.LittleEndian.Uint32(b)
			out, b = append(out, b[4:4+n]), b[4+n:]
		}
	}
	return out, in.fits(len(out))
}

// ints are the elements of an INT32 tensor; nil if it is not there.
func (r *request) ints(name string) ([]int32, error) {
	in, ok := r.inputs[name]
	if !ok {
		return nil, nil
	}
	if in.GetDatatype() != "INT32" {
		return nil, invalid("%s must be INT32", name)
	}
	out := in.GetContents().GetIntContents()
	if in.raw != nil {
		if len(in.raw)%4 != 0 {
			return nil, invalid("%s is not made of elements of 4 bytes", name)
		}
		out = make([]int32, 0, len(in.raw)/4)
		for b := in.raw; len(b) > 0; b = b[4:] {
			out = append(out, int32(binary.LittleEndian.Uint32(b)))
		}
	}
	return out, in.fits(len(out))
}

// flag is whether a BOOL[1] tensor is there and true.
func (r *request) flag(name string) bool {
	in := r.inputs[name]
	if in.raw != nil {
		return len(in.raw) == 1 && in.raw[0] != 0
	}
	v := in.GetContents().GetBoolContents()
	return len(v) == 1 && v[0]
}

// fits compares the number of elements with the shape.
func (in input) fits(elements int) error {
	want := int64(1)
	for _, d := range in.GetShape() {
		if d < 0 || d > math.MaxInt32 || want > math.MaxInt32 {
			return invalid("the shape of %s is not one", in.GetName())
		}
		want *= d
	}
	if want != int64(elements) {
		return invalid("%s has %d elements where its shape says %d", in.GetName(), elements, want)
	}
	return nil
}

// limit is how many words the caller wants at most; MaxInt32 if it does not say.
func (r *request) limit() (int, error) {
	limit := int64(math.MaxInt32)
	if v, err := r.ints("max_tokens"); err != nil {
		return 0, err
	} else if len(v) > 0 {
		limit = min(limit, int64(v[0]))
	}
	if p := r.GetParameters()["max_tokens"]; p != nil {
		limit = min(limit, p.GetInt64Param())
	}
	sampling, err := r.texts("sampling_parameters")
	if err != nil {
		return 0, err
	}
	if len(sampling) > 0 {
		var p struct {
			MaxTokens *int64 `json:"max_tokens"`
		}
		if json.Unmarshal(sampling[0], &p) != nil {
			return 0, invalid("sampling_parameters is not a JSON object")
		}
		if p.MaxTokens != nil {
			limit = min(limit, *p.MaxTokens)
		}
	}
	if limit < 1 {
		return 0, invalid("max_tokens must be above 0")
	}
	return int(limit), nil
}

// maxDelay bounds delay_ms: nothing here is worth waiting longer for.
const maxDelay = time.Minute

func (r *request) delay(def time.Duration) time.Duration {
	p := r.GetParameters()["delay_ms"]
	if p == nil {
		return def
	}
	ms := min(max(p.GetInt64Param(), 0), maxDelay.Milliseconds())
	return time.Duration(ms) * time.Millisecond
}

// respond begins an answer.
func respond(req *inference.ModelInferRequest) *inference.ModelInferResponse {
	return &inference.ModelInferResponse{ModelName: req.GetModelName(), ModelVersion: "1", Id: req.GetId()}
}

// add adds an output, raw, as Triton does.
func add(r *inference.ModelInferResponse, name, datatype string, elements int, raw []byte) {
	r.Outputs = append(r.Outputs, &inference.ModelInferResponse_InferOutputTensor{
		Name: name, Datatype: datatype, Shape: []int64{int64(elements)},
	})
	r.RawOutputContents = append(r.RawOutputContents, raw)
}

func addTexts(r *inference.ModelInferResponse, name string, texts ...[]byte) {
	var raw []byte
	for _, t := range texts {
		raw = append(binary.LittleEndian.AppendUint32(raw, uint32(len(t))), t...)
	}
	add(r, name, "BYTES", len(texts), raw)
}
