// Package endpoints chooses among the model servers of one back end.
//
// A Set is a grpc.ClientConn with our own balancer: it connects to every address
// that the target resolves to, and sends a call to the less loaded of two servers
// that are drawn at random. (Mitzenmacher, "The Power of Two Choices in Randomized
// Load Balancing", 2001: the longest queue then grows as log log n, nearly as well
// as if all were compared, and gateways that do not know of one another do not all
// run to the same server.) The load of a server is the permits of the inferences
// that it has of us, times what it says of itself. A sequence stays where it began.
//
// balancer.go holds the connections, call.go the choice, outlier.go what is left
// alone, sequence.go where sequences live, load.go and metrics.go what servers
// report, xds.go what is a control plane's to decide.
package endpoints

import (
	"log/slog"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/balancer"
	"google.golang.org/grpc/connectivity"

	configv1 "github.com/sluicegate/sluice/proto/gen/sluice/config/v1"
)

// Options are what the configuration of a back end does not hold.
type Options struct {
	// Loaded is called with what all servers together report, each time that one
	// does; by many goroutines, and it must not block. Nil: nobody is told.
	Loaded func(Load)
	// Logger gets the log; nil means slog.Default. It names addresses.
	Logger *slog.Logger
}

// Set is the model servers of one back end, and the connection to them. It is
// safe for concurrent use. Close ends it.
type Set struct {
	*grpc.ClientConn

	config   *configv1.Backend
	outliers outliers
	interval time.Duration // of load reports
	metrics  *http.Client  // nil: no metrics are read
	loaded   func(Load)
	log      *slog.Logger

	sequences sequences

	mu        sync.Mutex
	cc        balancer.ClientConn // nil before the first address is known, and after the end
	endpoints []*endpoint
	failure   error         // why no address is known
	done      chan struct{} // closed at the end
}

// endpoint is one model server.
type endpoint struct {
	set     *Set
	address string
	sc      balancer.SubConn

	load     atomic.Int64  // permits of what is in flight there
	calls    atomic.Int64  // in flight
	cost     atomic.Uint32 // of one permit, by what the server reports; unitCost is 1
	busy     atomic.Int32  // seconds for which it is to be spared
	failures atomic.Uint32 // in a row
	good     atomic.Uint64 // calls of the interval that it served
	bad      atomic.Uint64 // and that failed
	state    atomic.Uint32 // connectivity.State; Ready means that it can take calls

	// Of set.mu.
	failure   error // of the last connection
	ejected   time.Time
	ejections int // in a row
	reported  Load
	source    Source
	heard     time.Time
	watches   []func() // end what watches the server
}

func (e *endpoint) is(s connectivity.State) bool { return connectivity.State(e.state.Load()) == s }

// State is a model server at one moment.
type State struct {
	// Address is where it is.
	Address string
	// Ready says that it is connected, and ready as far as it is asked.
	Ready bool
	// Failure is why it is not ready; nil if it is, and while it is being connected.
	Failure error
	// Ejected says that it is left alone because it failed, until then.
	Ejected bool
	Until   time.Time
	// Failures are the calls that failed in a row.
	Failures int
	// Load is the permits of the inferences that it has of us; one that is in no
	// pool counts as one.
	Load int64
	// Calls are the RPCs that it has of us.
	Calls int64
	// Reported is what it said of itself, how and when; zero if nothing, or too long
	// ago.
	Reported Load
	Source   Source
	Heard    time.Time
}

// Snapshot is the state of every server, in no order. It is empty before the first
// call.
func (s *Set) Snapshot() []State {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := make([]State, 0, len(s.endpoints))
	for _, e := range s.endpoints {
		state := State{
			Address: e.address, Ready: e.is(connectivity.Ready), Ejected: !e.ejected.IsZero(), Until: e.ejected,
			Failures: int(e.failures.Load()), Load: e.load.Load(), Calls: e.calls.Load(),
			Reported: e.reported, Source: e.source, Heard: e.heard,
		}
		if e.is(connectivity.TransientFailure) {
			if state.Failure = e.failure; state.Failure == nil {
				state.Failure = errNotReady
			}
		}
		out = append(out, state)
	}
	return out
}

// Sequences are how many sequences are remembered to be at each address.
func (s *Set) Sequences() map[string]int { return s.sequences.count() }

// Failure is why no server is known or can be had; nil if there is no reason.
func (s *Set) Failure() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.failure
}

const (
	// second is how often what has passed is looked at: ejections, reports.
	second = time.Second
	// intervalSeconds is how often DNS is asked again and success rates are
	// compared. grpc-go asks DNS only when a connection fails, and would not see
	// that there are more servers than before. 10 s is Envoy's interval for
	// outliers, and twice how long CoreDNS has answers kept.
	intervalSeconds = 10
	// sequenceSeconds is how long a sequence is remembered at least after its last
	// inference. Chosen: Triton forgets one after a second by default.
	sequenceSeconds = 300
)

// tend looks after the servers until the end.
func (s *Set) tend(done <-chan struct{}) {
	tick := time.NewTicker(second)
	defer tick.Stop()
	for n := 1; ; n++ {
		select {
		case <-done:
			return
		case <-tick.C:
		}
		s.refresh(time.Now(), n%intervalSeconds == 0)
		if n%sequenceSeconds == 0 {
			s.sequences.age()
		}
	}
}

// refresh ends what has lasted long enough.
func (s *Set) refresh(now time.Time, interval bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.cc == nil {
		return
	}
	changed := false
	for _, e := range s.endpoints {
		if e.busy.Load() > 0 {
			e.busy.Add(-1)
		}
		if !e.heard.IsZero() && now.Sub(e.heard) > s.stale() {
			e.heard, e.reported, e.source = time.Time{}, Load{}, 0
			e.cost.Store(unitCost)
		}
		if !e.ejected.IsZero() && !now.Before(e.ejected) {
			s.restore(e)
			changed = true
		}
	}
	if interval {
		changed = s.compare(now) || changed
		s.cc.ResolveNow(resolveNow)
	}
	if changed {
		s.publish()
	}
}
