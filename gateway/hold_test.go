package gateway

import (
	"errors"
	"io"
	"strings"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/sluicegate/sluice/proto/gen/inference"
)

// Responses that are held back lie in buffers of the transport: whatever becomes of
// them, each is given back, which open checks when the test ends.
func TestHeldResponsesGiveTheirBuffersBack(t *testing.T) {
	const inspects = base + `
inspect:
  responses: true
  no_starter_rules: true
  rules: |
    SecRule RESPONSE_ARGS "@sluicePersonal card" "id:1,phase:4,deny"
    SecRule RESPONSE_ARGS "@sluicePersonal email" "id:2,phase:4,pass,redact"
`
	filler := strings.Repeat("some words of no weight ", 100)
	for _, c := range []struct {
		name   string
		texts  []string
		fails  error
		want   string // the end of what is delivered
		reason string
	}{
		{"delivered", []string{filler + "4111 ", "1111 2222 ", "and so on"}, nil, "4111 1111 2222 and so on", "OK"},
		{"redacted", []string{filler + "write to bob@", filler[:3] + ".example.com, ", filler}, nil, "write to [redacted:email], " + filler, "OK"},
		{"refused", []string{filler + "4111 1111 ", "1111 1111 ", filler}, nil, "", "PermissionDenied OUTPUT_REJECTED"},
		{"the model server fails", []string{filler + "4111 ", "1111 "}, status.Error(codes.DataLoss, "broken"), "4111 1111 ", "DataLoss"},
	} {
		t.Run(c.name, func(t *testing.T) {
			g := open(t, inspects, script(t, func(_ string, ss grpc.ServerStream) error {
				r := new(inference.ModelInferRequest)
				if err := ss.RecvMsg(r); err != nil {
					return err
				}
				for _, text := range c.texts {
					m := &inference.ModelStreamInferResponse{InferResponse: &inference.ModelInferResponse{Id: r.GetId(),
						Outputs: []*inference.ModelInferResponse_InferOutputTensor{{Name: "text_output", Datatype: "BYTES", Shape: []int64{1},
							Contents: &inference.InferTensorContents{BytesContents: [][]byte{[]byte(text)}}}}}}
					if err := ss.SendMsg(proto.Message(m)); err != nil {
						return err
					}
				}
				return c.fails
			}))
			s, err := g.client().ModelStreamInfer(ctx(t))
			if err != nil {
				t.Fatal(err)
			}
			if err := s.Send(ask("m", "a", "hello")); err != nil {
				t.Fatal(err)
			}
			_ = s.CloseSend()
			var text strings.Builder
			reason := "OK"
			for {
				m, err := s.Recv()
				if errors.Is(err, io.EOF) {
					break
				}
				if err != nil {
					reason = reasonOf(err)
					break
				}
				if m.GetErrorMessage() != "" {
					reason = "PermissionDenied " + m.GetInferResponse().GetParameters()["sluice_reason"].GetStringParam()
					continue
				}
				for _, b := range m.GetInferResponse().GetOutputs()[0].GetContents().GetBytesContents() {
					text.Write(b)
				}
			}
			if reason != c.reason || !strings.HasSuffix(text.String(), c.want) || strings.Contains(text.String(), "4111 1111 1111") {
				t.Errorf("%s after %q", reason, text.String()[max(0, text.Len()-60):])
			}
			if g.pool.taken.Load() == 0 {
				t.Error("no buffer was of the pool")
			}
		})
	}
}
