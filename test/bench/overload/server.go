package main

import (
	"context"
	"sync"
	"sync/atomic"
	"time"

	"github.com/sluicegate/sluice/proto/gen/inference"
)

const (
	// slots is what the simulated GPU works on at once at full speed, service how
	// long one inference then takes.
	slots   = 8
	service = 100 * time.Millisecond
	// thrash is what each inference beyond the slots costs all of them: a GPU that
	// is out of memory for its KV cache throws work away and does it again.
	thrash = .05
	tick   = 2 * time.Millisecond
)

// capacity is what the GPU can do in a second.
const capacity = float64(slots) / (float64(service) / float64(time.Second))

// gpu is a model server whose inferences share a simulated GPU.
type gpu struct {
	inference.UnimplementedGRPCInferenceServiceServer

	mu     sync.Mutex
	jobs   map[*job]bool
	wasted atomic.Int64 // inferences whose caller went away
}

type job struct {
	left float64 // of the work, from 1
	done chan struct{}
}

func (g *gpu) run(ctx context.Context) {
	t := time.NewTicker(tick)
	defer t.Stop()
	last := time.Now()
	for {
		select {
		case <-ctx.Done():
			return
		case now := <-t.C:
			g.work(now.Sub(last))
			last = now
		}
	}
}

func (g *gpu) work(d time.Duration) {
	g.mu.Lock()
	defer g.mu.Unlock()
	n := float64(len(g.jobs))
	step := float64(d) / float64(service)
	if n > slots {
		step *= slots / n / (1 + thrash*(n-slots))
	}
	for j := range g.jobs {
		if j.left -= step; j.left <= 0 {
			close(j.done)
			delete(g.jobs, j)
		}
	}
}

// ModelInfer takes its part of the GPU.
func (g *gpu) ModelInfer(ctx context.Context, r *inference.ModelInferRequest) (*inference.ModelInferResponse, error) {
	j := &job{left: 1, done: make(chan struct{})}
	g.mu.Lock()
	g.jobs[j] = true
	g.mu.Unlock()
	select {
	case <-j.done:
		return &inference.ModelInferResponse{ModelName: r.GetModelName(), Id: r.GetId()}, nil
	case <-ctx.Done():
		g.wasted.Add(1)
		g.mu.Lock()
		delete(g.jobs, j)
		g.mu.Unlock()
		return nil, ctx.Err()
	}
}
