package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"sync"
	"time"

	"google.golang.org/grpc"

	"github.com/sluicegate/sluice/interceptors/identity"
	"github.com/sluicegate/sluice/proto/gen/inference"
)

type client = inference.GRPCInferenceServiceClient

// scenario is a load: callers that call one after the other, without a pause.
type scenario struct {
	name    string
	callers int
	request *inference.ModelInferRequest
	call    func(context.Context, client, *inference.ModelInferRequest) error
}

var scenarios = []scenario{
	{"unary 200 B text", 16, text("words"), unary},
	{"unary 1 MB FP32", 4, tensor(1 << 20), unary},
	{"unary 4 MB FP32", 2, tensor(4 << 20), unary},
	{"stream of 200 chunks", 8, text("words"), stream},
}

// text is a request with a prompt of 200 bytes.
func text(model string) *inference.ModelInferRequest {
	const prompt = "Please summarise the attached meeting notes in three short sentences and list the open questions " +
		"with the name of the person who is to answer each of them, in the order in which they came up, thanks."
	return &inference.ModelInferRequest{
		ModelName: model,
		Id:        "1",
		Inputs: []*inference.ModelInferRequest_InferInputTensor{{
			Name: "text_input", Datatype: "BYTES", Shape: []int64{1},
		}},
		RawInputContents: [][]byte{append([]byte{byte(len(prompt)), 0, 0, 0}, prompt...)},
	}
}

// tensor is a request with so many bytes of FP32 data.
func tensor(bytes int) *inference.ModelInferRequest {
	return &inference.ModelInferRequest{
		ModelName: "tensor",
		Id:        "1",
		Inputs: []*inference.ModelInferRequest_InferInputTensor{{
			Name: "INPUT", Datatype: "FP32", Shape: []int64{int64(bytes / 4)},
		}},
		RawInputContents: [][]byte{make([]byte, bytes)},
	}
}

func unary(ctx context.Context, c client, r *inference.ModelInferRequest) error {
	resp, err := c.ModelInfer(ctx, r)
	if err == nil && len(resp.GetRawOutputContents()) != 1 {
		return errors.New("the answer has no data")
	}
	return err
}

func stream(ctx context.Context, c client, r *inference.ModelInferRequest) error {
	s, err := c.ModelStreamInfer(ctx)
	if err != nil {
		return err
	}
	if err := s.Send(r); err != nil {
		return err
	}
	for range chunks {
		if m, err := s.Recv(); err != nil {
			return err
		} else if m.GetErrorMessage() != "" {
			return errors.New("the answer is an error")
		}
	}
	if err := s.CloseSend(); err != nil {
		return err
	}
	if _, err := s.Recv(); !errors.Is(err, io.EOF) {
		return fmt.Errorf("the stream did not end: %w", err)
	}
	return nil
}

func dial(address string, source *identity.Source) (*grpc.ClientConn, error) {
	return grpc.NewClient(address,
		grpc.WithTransportCredentials(clientCredentials(source)),
		grpc.WithStaticStreamWindowSize(streamWindow), grpc.WithStaticConnWindowSize(connWindow),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxMessage), grpc.MaxCallSendMsgSize(maxMessage)))
}

// figures are of one scenario through one proxy in one round.
type figures struct {
	cpu      float64 // seconds of the proxy for 1,000 calls
	rate     float64 // calls in a second
	p50, p99 float64 // seconds
}

// load runs a scenario through a proxy for as long as phase says, after a while
// that does not count.
func load(ctx context.Context, p *proxy, s scenario, phase time.Duration) (figures, error) {
	if _, _, err := call(ctx, p.clients, s, phase/4); err != nil {
		return figures{}, err
	}
	before, err := p.cpu()
	if err != nil {
		return figures{}, err
	}
	took, wall, err := call(ctx, p.clients, s, phase)
	if err != nil {
		return figures{}, err
	}
	after, err := p.cpu()
	if err != nil {
		return figures{}, err
	}
	slices.Sort(took)
	n := len(took)
	return figures{
		cpu:  (after - before).Seconds() / float64(n) * 1000,
		rate: float64(n) / wall.Seconds(),
		p50:  took[n/2].Seconds(),
		p99:  took[n*99/100].Seconds(),
	}, nil
}

// call has all callers call until the time is up, and returns how long each
// call took, and all together.
func call(ctx context.Context, clients []client, s scenario, phase time.Duration) ([]time.Duration, time.Duration, error) {
	ctx, cancel := context.WithTimeout(ctx, phase+30*time.Second)
	defer cancel()
	var (
		mu    sync.Mutex
		wg    sync.WaitGroup
		all   []time.Duration
		fails []error
	)
	began := time.Now()
	for n := range s.callers {
		wg.Go(func() {
			var took []time.Duration
			var err error
			for at := time.Now(); err == nil && (len(took) == 0 || at.Sub(began) < phase); {
				err = s.call(ctx, clients[n%len(clients)], s.request)
				now := time.Now()
				took, at = append(took, now.Sub(at)), now
			}
			mu.Lock()
			defer mu.Unlock()
			all, fails = append(all, took...), append(fails, err)
		})
	}
	wg.Wait()
	return all, time.Since(began), errors.Join(fails...)
}

// proxy is one that runs, with connections to it.
type proxy struct {
	*child
	conns   []*grpc.ClientConn
	clients []client
}

func (p *proxy) connect(n int, source *identity.Source) error {
	for range n {
		conn, err := dial(p.address, source)
		if err != nil {
			return err
		}
		p.conns = append(p.conns, conn)
		p.clients = append(p.clients, inference.NewGRPCInferenceServiceClient(conn))
	}
	return nil
}

func (p *proxy) stop() {
	for _, c := range p.conns {
		_ = c.Close()
	}
	p.child.stop()
}

// start runs a peer and connects to it.
func start(p peer, o options, conns int, mtls *identity.Source) (*proxy, error) {
	profile := ""
	if o.profiles != "" {
		profile = fmt.Sprintf("%s/%s.prof", o.profiles, p.name)
	}
	c, err := p.start(profile)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", p.name, err)
	}
	if !p.mtls {
		mtls = nil
	}
	x := &proxy{child: c}
	if err := x.connect(conns, mtls); err != nil {
		x.stop()
		return nil, fmt.Errorf("%s: %w", p.name, err)
	}
	return x, nil
}

// rounds measures every scenario through every peer, in turn: what else the
// machine does meanwhile hits all of them.
func rounds(ctx context.Context, o options, r *report, peers []peer, mtls *identity.Source) error {
	running := make([]*proxy, len(peers))
	for n, p := range peers {
		x, err := start(p, o, 2, mtls)
		if err != nil {
			return err
		}
		defer x.stop()
		running[n] = x
	}
	for round := range o.rounds {
		for _, s := range scenarios {
			if !chosen(o.scenarios, s.name) {
				continue
			}
			for n := range peers {
				n = (n + round) % len(peers) // another one begins each round
				f, err := load(ctx, running[n], s, o.phase)
				if err != nil {
					return fmt.Errorf("%s through %s: %w", s.name, peers[n].name, err)
				}
				r.add(s.name, peers[n].name, f)
			}
			fmt.Fprintf(os.Stderr, "bench: round %d of %d, %s\n", round+1, o.rounds, s.name)
		}
	}
	return nil
}

const (
	idleStreams = "idle streams"
	idleCount   = 500
	idleConns   = 10
)

// idle measures what an open stream costs in memory: the resident memory of a
// fresh process with 500 of them, less that after 100 calls, both without garbage
// where the process is one of ours.
func idle(ctx context.Context, o options, r *report, peers []peer, mtls *identity.Source) error {
	n := min(o.rounds, 3)
	if o.quick {
		n = 1
	}
	for round := range n {
		for _, p := range peers {
			kib, err := idleOf(ctx, o, p, mtls)
			if err != nil {
				return fmt.Errorf("%s through %s: %w", idleStreams, p.name, err)
			}
			r.addIdle(p.name, kib)
		}
		fmt.Fprintf(os.Stderr, "bench: round %d, %s\n", round+1, idleStreams)
	}
	return nil
}

func idleOf(ctx context.Context, o options, p peer, mtls *identity.Source) (kib float64, err error) {
	o.profiles = ""
	x, err := start(p, o, idleConns, mtls)
	if err != nil {
		return 0, err
	}
	defer x.stop()
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	warm := scenarios[0]
	for n := range 100 {
		if err := warm.call(ctx, x.clients[n%idleConns], warm.request); err != nil {
			return 0, err
		}
	}
	before, err := x.rss()
	if err != nil {
		return 0, err
	}
	open := text(openModel)
	for n := range idleCount {
		s, err := x.clients[n%idleConns].ModelStreamInfer(ctx)
		if err != nil {
			return 0, err
		}
		if err := s.Send(open); err != nil {
			return 0, err
		}
		if _, err := s.Recv(); err != nil {
			return 0, err
		}
	}
	after, err := x.rss()
	return float64(after-before) / 1024 / idleCount, err
}
