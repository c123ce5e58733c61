// Overload measures what admission is for: a simulated GPU behind the chain gets
// ten times what it can do, from two tenants with the weights 1 and 3, open loop,
// over gRPC on loopback; then one of them floods; then all of it again without
// admission. It writes a report with a line for each target.
//
//	go run ./test/bench/overload -for 60s -out report.md
//
// server.go is the simulated GPU; report.go the order of events and the report.
package main

import (
	"context"
	"flag"
	"fmt"
	"io"
	"net"
	"os"
	"slices"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/sluicegate/sluice/interceptors"
	"github.com/sluicegate/sluice/interceptors/admit"
	"github.com/sluicegate/sluice/interceptors/dialect"
	"github.com/sluicegate/sluice/proto/gen/inference"
	configv1 "github.com/sluicegate/sluice/proto/gen/sluice/config/v1"
)

const (
	queueLength  = 32
	queueTimeout = time.Second
	deadline     = 2 * time.Second
	warmUp       = time.Second // of each phase, not counted
)

func main() {
	length := flag.Duration("for", 4*time.Second, "how long each phase is measured")
	out := flag.String("out", "", "the file that gets the report; empty: standard output")
	flag.Parse()
	w := io.Writer(os.Stdout)
	if *out != "" {
		f, err := os.Create(*out)
		if err != nil {
			fmt.Fprintln(os.Stderr, "overload:", err)
			os.Exit(1)
		}
		defer f.Close()
		w = f
	}
	if err := run(context.Background(), w, *length); err != nil {
		fmt.Fprintln(os.Stderr, "overload:", err)
		os.Exit(1)
	}
}

// tenants tells who calls: a policy in the place of the identity.
type tenants struct{}

func (tenants) Name() string { return "tenants" }

func (tenants) Begin(c *interceptors.Call) (interceptors.CallPolicy, error) {
	if v := c.Metadata.Get("tenant"); len(v) == 1 {
		c.Tenant = v[0]
	}
	return nil, nil
}

// place is a server with or without admission, and a client of it.
type place struct {
	gpu    *gpu
	pools  *admit.Policy // nil without admission
	client inference.GRPCInferenceServiceClient
	close  func()
}

func open(ctx context.Context, admitted bool) (*place, error) {
	d, err := dialect.Triton(dialect.Options{})
	if err != nil {
		return nil, err
	}
	p := &place{gpu: &gpu{jobs: make(map[*job]bool)}}
	policies := []interceptors.Policy{tenants{}}
	if admitted {
		p.pools, err = admit.New([]*configv1.Pool{{
			Name: "gpu", Capacity: slots, QueueLength: queueLength, QueueTimeout: durationpb.New(queueTimeout),
			Models:  []*configv1.PoolModel{{Model: "*"}},
			Tenants: []*configv1.PoolTenant{{Tenant: "one", Weight: 1}, {Tenant: "three", Weight: 3}},
		}})
		if err != nil {
			return nil, err
		}
		policies = append(policies, p.pools)
	}
	chain := interceptors.New([]*interceptors.Backend{{Name: "gpu", Dialect: d}}, policies...)
	s := grpc.NewServer(grpc.UnaryInterceptor(interceptors.UnaryServer(chain)))
	inference.RegisterGRPCInferenceServiceServer(s, p.gpu)
	at, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	go func() { _ = s.Serve(at) }()
	conn, err := grpc.NewClient(at.Addr().String(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		s.Stop()
		return nil, err
	}
	ctx, cancel := context.WithCancel(ctx)
	go p.gpu.run(ctx)
	p.client = inference.NewGRPCInferenceServiceClient(conn)
	p.close = func() { _ = conn.Close(); s.Stop(); cancel() }
	return p, nil
}

// phase is what came of a load.
type phase struct {
	name             string
	served           map[string]int
	accepted, refuse []time.Duration // how long the answers took, sorted
	late             int
	wasted           int64
	seconds          float64
}

func (f *phase) goodput() float64 {
	n := 0
	for _, k := range f.served {
		n += k
	}
	return float64(n) / f.seconds / capacity
}

func percentile(sorted []time.Duration, p float64) time.Duration {
	if len(sorted) == 0 {
		return 0
	}
	return sorted[min(len(sorted)-1, int(p*float64(len(sorted))))]
}

// load calls at rates, by tenant and second, whatever comes of the calls.
func (p *place) load(ctx context.Context, name string, length time.Duration, rates map[string]float64) *phase {
	f := &phase{name: name, served: make(map[string]int), seconds: length.Seconds()}
	var mu sync.Mutex
	var all sync.WaitGroup
	began := time.Now()
	from, to := began.Add(warmUp), began.Add(warmUp+length)
	wasted := p.gpu.wasted.Load()
	call := func(tenant string) {
		ctx, cancel := context.WithTimeout(metadata.AppendToOutgoingContext(ctx, "tenant", tenant), deadline)
		defer cancel()
		at := time.Now()
		_, err := p.client.ModelInfer(ctx, &inference.ModelInferRequest{ModelName: "m"})
		end := time.Now()
		mu.Lock()
		defer mu.Unlock()
		switch {
		case end.Before(from) || end.After(to):
		case err == nil:
			f.served[tenant]++
			f.accepted = append(f.accepted, end.Sub(at))
		case ctx.Err() != nil, end.Sub(at) >= deadline:
			f.late++
		default:
			f.refuse = append(f.refuse, end.Sub(at))
		}
	}
	for tenant, rate := range rates {
		all.Go(func() {
			t := time.NewTicker(5 * time.Millisecond)
			defer t.Stop()
			sent := 0.0
			for now := range t.C {
				if now.After(to) {
					return
				}
				for due := rate * now.Sub(began).Seconds(); sent < due; sent++ {
					all.Go(func() { call(tenant) })
				}
			}
		})
	}
	all.Wait()
	f.wasted = p.gpu.wasted.Load() - wasted
	slices.Sort(f.accepted)
	slices.Sort(f.refuse)
	return f
}
