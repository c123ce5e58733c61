// Package model is a small, honest model server: it speaks the Open Inference
// Protocol as Triton does and answers with what it was given. There is nothing
// to download and no GPU, and it keeps count, so that a test or the demo can
// prove what reached it and how much of it at once.
//
// Its models:
//
//	words  decoupled: text_input BYTES[1] -> text_output BYTES[1], a word at a time
//	echo   text_input BYTES[n] -> text_output BYTES[n]
//	sum    values INT32[n] -> sum INT64[1]
//
// The parameter delay_ms (int64) delays each word, and the answer of the other
// models. "words" stops at the smallest of the tensor max_tokens (INT32[1]), the
// parameter of that name and max_tokens in the JSON of the tensor
// sampling_parameters (BYTES[1]); it reports num_input_tokens and
// num_output_tokens (UINT32[1], per message) to who sets return_num_input_tokens
// and return_num_output_tokens (BOOL[1]). Like Triton back ends that end with an
// empty flag it shows the end of an answer only to who sets the parameter
// triton_enable_empty_final_response.
package model

import (
	"context"
	"slices"
	"sync"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/sluicegate/sluice/proto/gen/inference"
)

// Options change what New makes. The zero value is ready.
type Options struct {
	// Delay is for requests without the parameter delay_ms. Default 0.
	Delay time.Duration
	// Answers are what "words" says to a prompt instead of the prompt itself.
	Answers map[string]string
	// Aliases are further names of the models, each with its own Stats.
	Aliases map[string]string
}

// Server is the model server. It is safe for concurrent use.
type Server struct {
	inference.UnimplementedGRPCInferenceServiceServer
	options Options
	models  map[string]*entry
}

// entry is one model under one name.
type entry struct {
	name      string
	decoupled bool
	infer     func(context.Context, *request, func(*inference.ModelInferResponse) error) error
	inputs    []*inference.ModelMetadataResponse_TensorMetadata
	outputs   []*inference.ModelMetadataResponse_TensorMetadata

	mu    sync.Mutex
	stats Stats
}

// Stats is what one model was asked.
type Stats struct {
	// Inferences that began, whatever became of them.
	Inferences int64
	// Active are running now; MaxActive is the most there ever were at once.
	Active, MaxActive int64
	// Canceled ended because the caller went away.
	Canceled int64
	// Words that were sent, by "words".
	Words int64
}

// New makes a model server. Register it with
// inference.RegisterGRPCInferenceServiceServer.
func New(o Options) *Server {
	s := &Server{options: o, models: make(map[string]*entry)}
	text := func(name string) *inference.ModelMetadataResponse_TensorMetadata {
		return &inference.ModelMetadataResponse_TensorMetadata{Name: name, Datatype: "BYTES", Shape: []int64{-1}}
	}
	add := func(name, kind string) {
		e := &entry{name: name}
		switch kind {
		case "words":
			e.decoupled, e.infer = true, s.words(e)
			e.inputs, e.outputs = append(e.inputs, text("text_input")), append(e.outputs, text("text_output"))
		case "echo":
			e.infer = s.echo
			e.inputs, e.outputs = append(e.inputs, text("text_input")), append(e.outputs, text("text_output"))
		case "sum":
			e.infer = s.sum
			e.inputs = append(e.inputs, &inference.ModelMetadataResponse_TensorMetadata{
				Name: "values", Datatype: "INT32", Shape: []int64{-1},
			})
			e.outputs = append(e.outputs, &inference.ModelMetadataResponse_TensorMetadata{
				Name: "sum", Datatype: "INT64", Shape: []int64{1},
			})
		default:
			return // an alias of nothing is not there
		}
		s.models[name] = e
	}
	for _, name := range []string{"words", "echo", "sum"} {
		add(name, name)
	}
	for name, kind := range o.Aliases {
		add(name, kind)
	}
	return s
}

// Models are the names of the models, sorted.
func (s *Server) Models() []string {
	names := make([]string, 0, len(s.models))
	for name := range s.models {
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}

// Seen is how many inferences have reached any model.
func (s *Server) Seen() (n int64) {
	for _, e := range s.models {
		n += e.snapshot().Inferences
	}
	return n
}

// Stats is what one model was asked so far; zero if there is no such model.
func (s *Server) Stats(model string) Stats {
	if e := s.models[model]; e != nil {
		return e.snapshot()
	}
	return Stats{}
}

func (e *entry) snapshot() Stats {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.stats
}

func (e *entry) begin() {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.stats.Inferences++
	e.stats.Active++
	e.stats.MaxActive = max(e.stats.MaxActive, e.stats.Active)
}

func (e *entry) end(canceled bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.stats.Active--
	if canceled {
		e.stats.Canceled++
	}
}

func (e *entry) said() {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.stats.Words++
}

// run does one inference.
func (e *entry) run(ctx context.Context, req *inference.ModelInferRequest, emit func(*inference.ModelInferResponse) error) error {
	e.begin()
	r, err := parse(req)
	if err == nil {
		err = e.infer(ctx, r, emit)
	}
	e.end(ctx.Err() != nil)
	return err
}

func (s *Server) find(name string) (*entry, error) {
	if e := s.models[name]; e != nil {
		return e, nil
	}
	return nil, status.Error(codes.NotFound, "there is no model of this name")
}

// ServerLive says yes.
func (s *Server) ServerLive(context.Context, *inference.ServerLiveRequest) (*inference.ServerLiveResponse, error) {
	return &inference.ServerLiveResponse{Live: true}, nil
}

// ServerReady says yes.
func (s *Server) ServerReady(context.Context, *inference.ServerReadyRequest) (*inference.ServerReadyResponse, error) {
	return &inference.ServerReadyResponse{Ready: true}, nil
}

// ModelReady says whether there is such a model.
func (s *Server) ModelReady(_ context.Context, req *inference.ModelReadyRequest) (*inference.ModelReadyResponse, error) {
	return &inference.ModelReadyResponse{Ready: s.models[req.GetName()] != nil}, nil
}

// ServerMetadata says who this is.
func (s *Server) ServerMetadata(context.Context, *inference.ServerMetadataRequest) (*inference.ServerMetadataResponse, error) {
	return &inference.ServerMetadataResponse{Name: "sluice-model", Version: "1"}, nil
}

// ModelMetadata describes a model's tensors.
func (s *Server) ModelMetadata(_ context.Context, req *inference.ModelMetadataRequest) (*inference.ModelMetadataResponse, error) {
	e, err := s.find(req.GetName())
	if err != nil {
		return nil, err
	}
	return &inference.ModelMetadataResponse{
		Name: e.name, Versions: []string{"1"}, Platform: "sluice", Inputs: e.inputs, Outputs: e.outputs,
	}, nil
}

// ModelInfer is one inference with one answer.
func (s *Server) ModelInfer(ctx context.Context, req *inference.ModelInferRequest) (*inference.ModelInferResponse, error) {
	e, err := s.find(req.GetModelName())
	if err != nil {
		return nil, err
	}
	if e.decoupled {
		return nil, status.Error(codes.Unimplemented, "the model is decoupled; use ModelStreamInfer")
	}
	var answer *inference.ModelInferResponse
	err = e.run(ctx, req, func(r *inference.ModelInferResponse) error { answer = r; return nil })
	return answer, err
}

// maxInFlight bounds the inferences that one stream may have running; past it
// the stream is not read. Chosen: more than any test needs.
const maxInFlight = 256

// ModelStreamInfer is many inferences at once. They run beside each other, and
// their answers interleave.
func (s *Server) ModelStreamInfer(stream inference.GRPCInferenceService_ModelStreamInferServer) error {
	ctx, cancel := context.WithCancelCause(stream.Context())
	defer cancel(nil)
	c := &streamCall{
		server: s, stream: stream, ctx: ctx, fail: cancel,
		running: make(chan struct{}, maxInFlight),
	}
	if md, ok := metadata.FromIncomingContext(ctx); ok {
		v := md.Get("triton_grpc_error")
		c.statusOnError = len(v) == 1 && v[0] == "true"
	}
	// Receiving ends by itself at half-close, and else when this function returns.
	received := make(chan error, 1)
	go func() { received <- c.receive() }()
	select {
	case err := <-received:
		return err
	case <-ctx.Done():
		// Whoever sends now is the last: nothing is sent once a call has returned.
		c.sending.Lock()
		defer c.sending.Unlock()
		return ended(ctx)
	}
}

// streamCall is one call of ModelStreamInfer.
type streamCall struct {
	server        *Server
	stream        inference.GRPCInferenceService_ModelStreamInferServer
	ctx           context.Context
	fail          context.CancelCauseFunc
	statusOnError bool
	running       chan struct{}
	work          sync.WaitGroup
	sending       sync.Mutex
}

// receive starts an inference for every message, and returns when the last of
// them has ended.
func (c *streamCall) receive() error {
	for {
		req, err := c.stream.Recv()
		if err != nil {
			if c.ctx.Err() != nil {
				return ended(c.ctx)
			}
			c.work.Wait()
			if c.ctx.Err() != nil {
				return ended(c.ctx)
			}
			return nil
		}
		select {
		case c.running <- struct{}{}:
		case <-c.ctx.Done():
			return ended(c.ctx)
		}
		c.work.Go(func() {
			defer func() { <-c.running }()
			c.one(req)
		})
	}
}

// one is one inference of the stream.
func (c *streamCall) one(req *inference.ModelInferRequest) {
	e, err := c.server.find(req.GetModelName())
	answered := err == nil
	if answered {
		err = e.run(c.ctx, req, func(r *inference.ModelInferResponse) error {
			setFinal(r, !e.decoupled)
			return c.send(&inference.ModelStreamInferResponse{InferResponse: r})
		})
	}
	switch {
	case c.ctx.Err() != nil:
	case err != nil && c.statusOnError:
		c.fail(err)
	case err != nil:
		r := &inference.ModelInferResponse{Id: req.GetId()}
		if answered { // by a model
			r.ModelName = req.GetModelName()
			setFinal(r, true)
		}
		_ = c.send(&inference.ModelStreamInferResponse{ErrorMessage: status.Convert(err).Message(), InferResponse: r})
	case e.decoupled && req.GetParameters()["triton_enable_empty_final_response"].GetBoolParam():
		r := respond(req)
		setFinal(r, true)
		_ = c.send(&inference.ModelStreamInferResponse{InferResponse: r})
	}
}

func (c *streamCall) send(r *inference.ModelStreamInferResponse) error {
	c.sending.Lock()
	defer c.sending.Unlock()
	if c.ctx.Err() != nil {
		return ended(c.ctx)
	}
	err := c.stream.Send(r)
	if err != nil {
		c.fail(err)
	}
	return err
}

// ended says why a call's context ended.
func ended(ctx context.Context) error {
	cause := context.Cause(ctx)
	if _, ok := status.FromError(cause); ok {
		return cause
	}
	return status.FromContextError(ctx.Err()).Err()
}

func setFinal(r *inference.ModelInferResponse, final bool) {
	if r.Parameters == nil {
		r.Parameters = make(map[string]*inference.InferParameter, 1)
	}
	r.Parameters["triton_final_response"] = &inference.InferParameter{
		ParameterChoice: &inference.InferParameter_BoolParam{BoolParam: final},
	}
}
