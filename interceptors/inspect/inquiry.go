package inspect

import (
	"context"
	"fmt"
	"strings"
	"unicode"
	"unicode/utf8"

	"google.golang.org/grpc"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/sluicegate/sluice/interceptors/dialect"
	"github.com/sluicegate/sluice/interceptors/fields"
	configv1 "github.com/sluicegate/sluice/proto/gen/sluice/config/v1"
)

// modelInfer is the one method by which a guard model is asked.
const modelInfer = "/inference.GRPCInferenceService/ModelInfer"

// The numbers of the fields of inference.ModelInferRequest that a question has, and of
// those of its tensors.
const (
	requestModel, requestInput, requestOutput                            = 1, 5, 6
	tensorName, tensorDatatype, tensorShape, tensorContents, tensorBytes = 1, 2, 3, 5, 8
)

// maxAnswer bounds the message of an answer, in bytes. Chosen: a few words are enough.
const maxAnswer = 64 << 10

// inquiry is how a guard model is asked and its answer is read.
type inquiry struct {
	before, after []byte // of the request, around the input
	input         []byte // the input without its contents
	answer        *fields.Program
	output        string
	unsafe, safe  []string
}

func newInquiry(cfg *configv1.Guard, d *dialect.Dialect) (q inquiry, err error) {
	if d == nil {
		if d, err = dialect.Triton(dialect.Options{}); err != nil {
			return q, err
		}
	}
	m := d.Methods[modelInfer]
	if m == nil {
		return q, fmt.Errorf("backend: its dialect, %s, has no ModelInfer of the Open Inference Protocol; "+
			"name a back end of the dialect triton, mlserver or kserve", d.Name)
	}
	or := func(s, otherwise string) string {
		if s == "" {
			return otherwise
		}
		return s
	}
	q.answer, q.output = m.Response, or(cfg.GetOutput(), guardOutput)
	if q.unsafe, q.safe = cfg.GetUnsafe(), cfg.GetSafe(); len(q.unsafe) == 0 {
		q.unsafe, q.safe = []string{"unsafe"}, []string{"safe"}
	}
	q.before = appendString(nil, requestModel, cfg.GetModel())
	q.after = appendMessage(nil, requestOutput, appendString(nil, tensorName, q.output))
	q.input = appendString(nil, tensorName, or(cfg.GetInput(), guardInput))
	q.input = appendString(q.input, tensorDatatype, "BYTES")
	var shape []byte
	for range max(1, len(cfg.GetShape())) {
		shape = protowire.AppendVarint(shape, 1)
	}
	q.input = appendMessage(q.input, tensorShape, shape)
	return q, nil
}

func appendString(b []byte, n protowire.Number, s string) []byte {
	return protowire.AppendString(protowire.AppendTag(b, n, protowire.BytesType), s)
}

func appendMessage(b []byte, n protowire.Number, m []byte) []byte {
	return protowire.AppendBytes(protowire.AppendTag(b, n, protowire.BytesType), m)
}

// encode makes the request of a text.
func (q *inquiry) encode(text []byte) []byte {
	contents := protowire.SizeTag(tensorBytes) + protowire.SizeBytes(len(text))
	input := len(q.input) + protowire.SizeTag(tensorContents) + protowire.SizeBytes(contents)
	b := make([]byte, 0, len(q.before)+len(q.after)+protowire.SizeTag(requestInput)+protowire.SizeBytes(input))
	b = append(b, q.before...)
	b = protowire.AppendVarint(protowire.AppendTag(b, requestInput, protowire.BytesType), uint64(input))
	b = append(b, q.input...)
	b = protowire.AppendVarint(protowire.AppendTag(b, tensorContents, protowire.BytesType), uint64(contents))
	b = appendMessage(b, tensorBytes, text)
	return append(b, q.after...)
}

// decode reads an answer. All elements of the output are judged.
func (q *inquiry) decode(answer []byte) (unsafe bool, err error) {
	var m fields.Message
	if err := q.answer.Scan(&m, mem.BufferSlice{mem.SliceBuffer(answer)}); err != nil {
		return false, &failure{why: "answer malformed"}
	}
	defer m.Release()
	texts := 0
	for n := range m.Fields {
		f := &m.Fields[n]
		if f.Shadowed || !m.IsElement(f) || !m.IsString(f) || m.Key(f) != q.output {
			continue
		}
		texts++
		switch text := string(m.Bytes(f)); {
		case begins(text, q.unsafe):
			unsafe = true
		case !begins(text, q.safe):
			err = &failure{why: "answer unknown"}
		}
	}
	switch {
	case unsafe:
		return true, nil
	case texts == 0:
		return false, &failure{why: "answer missing"}
	}
	return false, err
}

// begins reports whether a text begins with one of the words, in capitals or not.
func begins(text string, words []string) bool {
	text = strings.TrimLeftFunc(text, unicode.IsSpace)
	for _, w := range words {
		if len(text) < len(w) || !strings.EqualFold(text[:len(w)], w) {
			continue
		}
		if r, _ := utf8.DecodeRuneInString(text[len(w):]); len(text) == len(w) || !unicode.IsLetter(r) && !unicode.IsDigit(r) && r != '_' {
			return true
		}
	}
	return false
}

// askingKey marks the context of a question, about which nobody is asked.
type askingKey struct{}

// ask asks the guard model. Messages are encoded here: they are the unknown fields of
// an empty one, so that any connection takes them.
func (g *guard) ask(ctx context.Context, text []byte) (unsafe bool, err error) {
	to := g.conn.Load()
	if to == nil {
		return false, &failure{why: "not connected"}
	}
	ctx = context.WithValue(metadata.NewOutgoingContext(ctx, metadata.MD{}), askingKey{}, true)
	in, out := new(emptypb.Empty), new(emptypb.Empty)
	in.ProtoReflect().SetUnknown(g.inquiry.encode(text))
	if err := to.Invoke(ctx, modelInfer, in, out, grpc.MaxCallRecvMsgSize(maxAnswer)); err != nil {
		return false, &failure{why: status.Code(err).String()}
	}
	return g.inquiry.decode(out.ProtoReflect().GetUnknown())
}
