package endpoints

import (
	"math"
	"time"

	"google.golang.org/grpc/connectivity"

	configv1 "github.com/sluicegate/sluice/proto/gen/sluice/config/v1"
)

// Servers that fail are left alone as Envoy and gRFC A50 have it: for failures in
// a row, and for a success rate below those of the others. grpc-go's own balancer
// for it can be had only through xDS, and judges by the status alone; here only
// what is the server's fault counts. The numbers are Envoy's defaults, but for the
// share that may be left alone: Envoy's tenth of a handful of servers is none.
const (
	defaultFailures   = 5
	defaultEjection   = 30 * time.Second
	maxEjection       = 5 * time.Minute
	defaultMaxPercent = 50

	leastCalls = 100 // of a server in an interval, to have a success rate
	// deviations is how many standard deviations below the mean such a rate is an
	// outlier. Of n servers none is further below than the root of n-1, so that it
	// takes five.
	deviations = 1.9
)

type outliers struct {
	failures uint32
	ejection time.Duration
	percent  int
}

func newOutliers(c *configv1.Outliers) outliers {
	o := outliers{failures: defaultFailures, ejection: defaultEjection, percent: defaultMaxPercent}
	if n := c.GetFailures(); n > 0 {
		o.failures = n
	}
	if d := c.GetEjection(); d != nil {
		o.ejection = d.AsDuration()
	}
	if c != nil && c.MaxPercent != nil {
		o.percent = int(c.GetMaxPercent())
	}
	return o
}

// learn takes in how a call ended.
func (e *endpoint) learn(o Outcome) {
	switch o {
	case Served:
		e.good.Add(1)
		if e.failures.Load() > 0 {
			e.failures.Store(0)
		}
	case Failed:
		e.bad.Add(1)
		if e.failures.Add(1) < e.set.outliers.failures {
			return
		}
		e.set.mu.Lock()
		defer e.set.mu.Unlock()
		if e.set.eject(e, time.Now()) {
			e.set.publish()
		}
	case Overloaded:
		e.busy.Store(2) // that is one second at least
	}
}

// eject leaves a server alone for a while, if enough others are left. It reports
// whether it does. mu is held.
func (s *Set) eject(e *endpoint, now time.Time) bool {
	if !e.is(connectivity.Ready) || !e.ejected.IsZero() || s.outliers.percent == 0 {
		return false
	}
	ready, out := 0, 0
	for _, o := range s.endpoints {
		switch {
		case !o.is(connectivity.Ready):
		case o.ejected.IsZero():
			ready++
		default:
			out++
		}
	}
	if ready < 2 || out > 0 && (out+1)*100 > s.outliers.percent*(ready+out) {
		return false
	}
	e.ejections++
	d := min(time.Duration(e.ejections)*s.outliers.ejection, max(maxEjection, s.outliers.ejection))
	e.ejected = now.Add(d)
	s.log.Warn("a model server fails and is left alone", "backend", s.config.GetName(), "address", e.address, "for", d)
	return true
}

// restore takes a server back. mu is held.
func (s *Set) restore(e *endpoint) {
	e.ejected = time.Time{}
	e.failures.Store(0)
	s.log.Info("a model server is used again", "backend", s.config.GetName(), "address", e.address)
}

// compare ends an interval: who was not left alone in it is forgiven one time, and
// who did much worse than the others is left alone. It reports whether one is. mu
// is held.
func (s *Set) compare(now time.Time) (changed bool) {
	type rate struct {
		*endpoint
		served float64
	}
	var rates []rate
	var sum float64
	for _, e := range s.endpoints {
		good, bad := e.good.Swap(0), e.bad.Swap(0)
		if e.ejected.IsZero() && e.ejections > 0 {
			e.ejections--
		}
		if good+bad >= leastCalls {
			r := float64(good) / float64(good+bad)
			sum += r
			rates = append(rates, rate{e, r})
		}
	}
	mean := sum / float64(len(rates))
	var squares float64
	for _, r := range rates {
		squares += (r.served - mean) * (r.served - mean)
	}
	least := mean - deviations*math.Sqrt(squares/float64(len(rates)))
	for _, r := range rates {
		if r.served < least {
			changed = s.eject(r.endpoint, now) || changed
		}
	}
	return changed
}
