package main

import (
	"context"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/sluicegate/sluice/proto/gen/inference"
)

const (
	// service is how long the simulated GPU takes for one inference when it has no
	// more of them than slots.
	service = 100 * time.Millisecond
	// thrash is what each inference beyond the slots costs all of them: a GPU that
	// is out of memory for its KV cache throws work away and does it again.
	thrash = .05
	tick   = 2 * time.Millisecond
)

// perSecond is what a GPU with so many slots can do.
func perSecond(slots int64) float64 { return float64(slots) / service.Seconds() }

// gpu is a model server whose inferences share a simulated GPU.
type gpu struct {
	inference.UnimplementedGRPCInferenceServiceServer

	slots  atomic.Int64
	mu     sync.Mutex
	jobs   map[*job]bool
	wasted atomic.Int64 // inferences whose caller went away
	began  time.Time
	took   []taken // guarded by mu
}

// taken is how long an inference took, and when it came.
type taken struct{ at, took time.Duration }

func newGPU(slots int64) *gpu {
	g := &gpu{jobs: make(map[*job]bool), began: time.Now()}
	g.slots.Store(slots)
	return g
}

type job struct {
	left float64 // of the work, from 1
	came time.Time
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
		case <-t.C:
			now := time.Now()
			g.work(now.Sub(last))
			last = now
		}
	}
}

func (g *gpu) work(d time.Duration) {
	g.mu.Lock()
	defer g.mu.Unlock()
	n, slots := float64(len(g.jobs)), float64(g.slots.Load())
	step := float64(d) / float64(service)
	if n > slots {
		step *= slots / n / (1 + thrash*(n-slots))
	}
	for j := range g.jobs {
		if j.left -= step; j.left <= 0 {
			g.took = append(g.took, taken{j.came.Sub(g.began), time.Since(j.came)})
			close(j.done)
			delete(g.jobs, j)
		}
	}
}

// times are how long those took that came in a time since the load began, sorted.
func (g *gpu) times(from, to time.Duration) (out []time.Duration) {
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, t := range g.took {
		if t.at >= from && t.at < to {
			out = append(out, t.took)
		}
	}
	slices.Sort(out)
	return out
}

// ModelInfer takes its part of the GPU.
func (g *gpu) ModelInfer(ctx context.Context, r *inference.ModelInferRequest) (*inference.ModelInferResponse, error) {
	j := &job{left: 1, came: time.Now(), done: make(chan struct{})}
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
