package main

import (
	"context"
	"slices"
	"sync"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/sluicegate/sluice/proto/gen/inference"
)

// stage is a load for a time: what begins in it counts to it.
type stage struct {
	name     string
	length   time.Duration
	skip     time.Duration      // at its beginning, not counted
	rates    map[string]float64 // calls a second, by tenant
	deadline time.Duration
}

// result is what came of a stage.
type result struct {
	stage
	capacity float64 // of the GPU, inferences a second
	calls    []call  // by their ends
	refused  map[codes.Code]int
	wasted   int64 // inferences of the GPU for callers that had gone, also of those not counted
}

type call struct {
	tenant   string
	at, took time.Duration // since the stage began
	code     codes.Code
	late     bool // the caller gave up
}

// load calls as the stages say, one after the other without a pause, whatever comes of
// the calls.
func (p *place) load(ctx context.Context, stages ...stage) (out []*result) {
	var all sync.WaitGroup
	var mu sync.Mutex
	began := time.Now()
	for _, s := range stages {
		r := &result{stage: s, capacity: perSecond(p.gpu.slots.Load()), refused: make(map[codes.Code]int)}
		out = append(out, r)
		wasted := p.gpu.wasted.Load()
		from := began
		to := from.Add(s.length)
		one := func(tenant string) {
			ctx, cancel := context.WithTimeout(ctx, s.deadline)
			defer cancel()
			at := time.Now()
			_, err := p.clients[tenant].ModelInfer(ctx, &inference.ModelInferRequest{ModelName: "m"})
			c := call{tenant: tenant, at: at.Sub(from), took: time.Since(at), code: status.Code(err)}
			c.late = err != nil && (ctx.Err() != nil || c.took >= s.deadline)
			mu.Lock()
			defer mu.Unlock()
			r.calls = append(r.calls, c)
			if c.at >= s.skip && err != nil && !c.late {
				r.refused[c.code]++
			}
		}
		var senders sync.WaitGroup
		for tenant, rate := range s.rates {
			senders.Go(func() {
				t := time.NewTicker(5 * time.Millisecond)
				defer t.Stop()
				sent := 0.0
				for now := range t.C {
					if now.After(to) {
						return
					}
					for due := rate * now.Sub(from).Seconds(); sent < due; sent++ {
						all.Go(func() { one(tenant) })
					}
				}
			})
		}
		senders.Wait()
		r.wasted = p.gpu.wasted.Load() - wasted
		began = to
	}
	all.Wait()
	for _, r := range out {
		slices.SortFunc(r.calls, func(a, b call) int { return int(a.at + a.took - b.at - b.took) })
	}
	return out
}

// took are how long the calls took that f holds of, sorted.
func (r *result) took(f func(call) bool) (out []time.Duration) {
	for _, c := range r.calls {
		if c.at >= r.skip && f(c) {
			out = append(out, c.took)
		}
	}
	slices.Sort(out)
	return out
}

func served(c call) bool  { return c.code == codes.OK }
func refused(c call) bool { return c.code != codes.OK && !c.late }
func late(c call) bool    { return c.late }

// goodput is what was served, of the GPU's capacity: what ended while it was measured.
func (r *result) goodput() float64 {
	n := 0
	for _, c := range r.calls {
		if end := c.at + c.took; served(c) && end >= r.skip && end <= r.length {
			n++
		}
	}
	return float64(n) / (r.length - r.skip).Seconds() / r.capacity
}

// share is the part of a tenant in what was served.
func (r *result) share(tenant string) float64 {
	n, all := 0, 0
	for _, c := range r.calls {
		if end := c.at + c.took; served(c) && end >= r.skip && end <= r.length {
			all++
			if c.tenant == tenant {
				n++
			}
		}
	}
	return float64(n) / float64(max(1, all))
}

// settled is when the last call began that was refused, late, or slower than a bound.
func (r *result) settled(bound time.Duration) (last time.Duration) {
	for _, c := range r.calls {
		if !served(c) || c.took > bound {
			last = max(last, c.at)
		}
	}
	return last
}

func percentile(sorted []time.Duration, p float64) time.Duration {
	if len(sorted) == 0 {
		return 0
	}
	return sorted[min(len(sorted)-1, int(p*float64(len(sorted))))]
}
