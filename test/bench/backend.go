package main

import (
	"context"
	"errors"
	"io"
	"net"

	"google.golang.org/grpc"

	"github.com/sluicegate/sluice/proto/gen/inference"
)

const (
	chunks     = 200      // of the answer to a streamed request
	maxMessage = 16 << 20 // bytes, through everything
)

// openModel is a model that writes one chunk and then nothing until its caller
// goes away.
const openModel = "open"

// backend answers at once: a unary call with the data it was sent, a stream
// with 200 chunks of text.
type backend struct {
	inference.UnimplementedGRPCInferenceServiceServer
}

func (backend) ModelInfer(_ context.Context, r *inference.ModelInferRequest) (*inference.ModelInferResponse, error) {
	return &inference.ModelInferResponse{
		ModelName: r.GetModelName(), Id: r.GetId(),
		Outputs: []*inference.ModelInferResponse_InferOutputTensor{{
			Name: "text_output", Datatype: r.GetInputs()[0].GetDatatype(), Shape: r.GetInputs()[0].GetShape(),
		}},
		RawOutputContents: r.GetRawInputContents(),
	}, nil
}

func (backend) ModelStreamInfer(s inference.GRPCInferenceService_ModelStreamInferServer) error {
	for {
		r, err := s.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		n := chunks
		if r.GetModelName() == openModel {
			n = 1
		}
		for k := range n {
			if err := s.Send(chunk(r, k == chunks-1)); err != nil {
				return err
			}
		}
	}
}

func chunk(r *inference.ModelInferRequest, last bool) *inference.ModelStreamInferResponse {
	return &inference.ModelStreamInferResponse{InferResponse: &inference.ModelInferResponse{
		ModelName: r.GetModelName(), Id: r.GetId(),
		Parameters: map[string]*inference.InferParameter{"triton_final_response": {
			ParameterChoice: &inference.InferParameter_BoolParam{BoolParam: last},
		}},
		Outputs: []*inference.ModelInferResponse_InferOutputTensor{{
			Name: "text_output", Datatype: "BYTES", Shape: []int64{1},
		}},
		RawOutputContents: [][]byte{[]byte("\x10\x00\x00\x00 and some words ")},
	}}
}

func serveBackend(l net.Listener) (stop func()) {
	s := grpc.NewServer(grpc.MaxRecvMsgSize(maxMessage), grpc.MaxSendMsgSize(maxMessage))
	inference.RegisterGRPCInferenceServiceServer(s, backend{})
	return serve(s, l)
}

func serve(s *grpc.Server, l net.Listener) (stop func()) {
	done := make(chan struct{})
	go func() { defer close(done); _ = s.Serve(l) }()
	return func() { s.Stop(); <-done }
}
