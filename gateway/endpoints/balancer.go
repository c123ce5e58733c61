package endpoints

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/balancer"
	"google.golang.org/grpc/connectivity"
	_ "google.golang.org/grpc/health" // watched where the configuration says so
	"google.golang.org/grpc/orca"
	"google.golang.org/grpc/resolver"
	"google.golang.org/grpc/resolver/dns"

	configv1 "github.com/sluicegate/sluice/proto/gen/sluice/config/v1"
)

// balancerName is what grpc-go knows our balancer by.
const balancerName = "sluice_endpoints"

func init() {
	balancer.Register(builder{})
	// grpc-go's 30 s would delay what intervalSeconds asks for.
	dns.SetMinResolutionInterval(intervalSeconds * time.Second / 2)
}

// What grpc-go is told of retries (gRFC A6). It makes a call again by itself when
// no server can have seen it; what more there is to it is Backend.retries. No more
// than about one call in ten is made again when many fail: each failure takes one
// of the tokens, each call that ends well gives a tenth back, and at half of them
// it stops. Chosen: a hundred calls may be at work on a server that is lost.
const retryPolicy = `,
"methodConfig": [{"name": [{}], "retryPolicy": {"maxAttempts": %d, "initialBackoff": "0.01s", "maxBackoff": "0.1s",
	"backoffMultiplier": 2, "retryableStatusCodes": ["UNAVAILABLE"]}}],
"retryThrottling": {"maxTokens": 200, "tokenRatio": 0.1}`

// Dial makes the set of a back end's model servers. It connects when the first call
// comes, or at once if the servers are asked for something. The error names a field.
func Dial(c *configv1.Backend, o Options, opts ...grpc.DialOption) (*Set, error) {
	s := &Set{
		config: c, loaded: o.Loaded, log: o.Logger,
		outliers: newOutliers(c.GetOutliers()),
		interval: defaultInterval,
	}
	if s.log == nil {
		s.log = slog.Default()
	}
	if d := c.GetLoad().GetInterval(); d != nil {
		s.interval = d.AsDuration()
	}
	if c.GetLoad().GetMetricsUrl() != "" {
		s.metrics = newMetricsClient()
	}
	if Controlled(c) {
		if err := s.obey(opts); err != nil {
			return nil, err
		}
		return s, nil
	}
	target, field := c.GetAddress(), "address"
	if len(c.GetAddresses()) > 0 {
		target, field = listScheme+":///"+c.GetName(), "addresses"
	}
	conn, err := grpc.NewClient(target, append(opts, s.options()...)...)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", field, err)
	}
	s.ClientConn = conn
	if c.GetLoad() != nil || c.GetReadiness() != configv1.Readiness_READINESS_UNSPECIFIED {
		conn.Connect()
	}
	return s, nil
}

// options have grpc-go leave the choice to us.
func (s *Set) options() []grpc.DialOption {
	settings := fmt.Sprintf(`{"loadBalancingConfig": [{"%s": {}}]`, balancerName)
	if s.config.GetReadiness() == configv1.Readiness_READINESS_GRPC_HEALTH {
		settings += `, "healthCheckConfig": {"serviceName": ""}`
	}
	opts := []grpc.DialOption{
		grpc.WithIdleTimeout(0),
		grpc.WithDisableServiceConfig(),
		grpc.WithResolvers(s.resolvers()...),
		grpc.WithNoProxy(), // it would stand for all of them
	}
	if n := s.config.GetRetries(); n > 0 {
		settings += fmt.Sprintf(retryPolicy, n+1)
	} else {
		opts = append(opts, grpc.WithDisableRetry())
	}
	return append(opts, grpc.WithDefaultServiceConfig(settings+"}"))
}

// builder makes the balancer of a ClientConn. Which Set it belongs to comes with the
// first addresses.
type builder struct{}

func (builder) Name() string { return balancerName }

func (builder) Build(cc balancer.ClientConn, _ balancer.BuildOptions) balancer.Balancer {
	return &shim{cc: cc}
}

// shim is what grpc-go calls, one call at a time.
type shim struct {
	cc  balancer.ClientConn
	set *Set
}

func (b *shim) UpdateClientConnState(state balancer.ClientConnState) error {
	if b.set == nil {
		set, ok := state.ResolverState.Attributes.Value(setKey{}).(*Set)
		if !ok {
			return errors.New("endpoints: the addresses belong to no set") // not of a Dial
		}
		b.set = set
		set.open(b.cc)
	}
	return b.set.update(state.ResolverState.Endpoints)
}

func (b *shim) ResolverError(err error) {
	if b.set == nil {
		b.cc.UpdateState(balancer.State{ConnectivityState: connectivity.TransientFailure, Picker: &picker{err: err}})
		return
	}
	b.set.unresolved(err)
}

func (*shim) UpdateSubConnState(balancer.SubConn, balancer.SubConnState) {}
func (*shim) ExitIdle()                                                  {}

func (b *shim) Close() {
	if b.set != nil {
		b.set.close()
	}
}

func (s *Set) open(cc balancer.ClientConn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.cc, s.done = cc, make(chan struct{})
	go s.tend(s.done)
}

func (s *Set) close() {
	s.mu.Lock()
	endpoints := s.endpoints
	s.cc, s.endpoints = nil, nil
	close(s.done)
	s.mu.Unlock()
	s.leave(endpoints)
	if s.metrics != nil {
		s.metrics.CloseIdleConnections()
	}
}

var errNone = errors.New("the back end's name has no address")

// update takes over the addresses that there are now. If there are none the servers
// that are known stay: that is more often a fault of the name service than true.
func (s *Set) update(now []resolver.Endpoint) error {
	s.mu.Lock()
	if len(now) == 0 {
		s.mu.Unlock()
		s.unresolved(errNone)
		return balancer.ErrBadResolverState
	}
	known := make(map[string]*endpoint, len(s.endpoints))
	for _, e := range s.endpoints {
		known[e.address] = e
	}
	s.endpoints = s.endpoints[:0:0]
	var fresh []*endpoint
	for _, at := range now {
		if len(at.Addresses) == 0 {
			continue
		}
		address := at.Addresses[0].Addr
		e, ok := known[address]
		switch {
		case !ok:
			if e = s.connect(at.Addresses[0]); e == nil {
				continue
			}
			fresh = append(fresh, e)
		case e == nil:
			continue // it is there twice
		}
		known[address] = nil
		s.endpoints = append(s.endpoints, e)
	}
	var left []*endpoint
	for _, e := range known {
		if e != nil {
			left = append(left, e)
		}
	}
	s.publish()
	s.mu.Unlock()
	for _, e := range fresh {
		e.sc.Connect()
	}
	s.leave(left)
	return nil
}

// connect makes the connection of a server. mu is held.
func (s *Set) connect(at resolver.Address) *endpoint {
	e := &endpoint{set: s, address: at.Addr}
	e.cost.Store(unitCost)
	e.state.Store(uint32(connectivity.Connecting))
	var err error
	e.sc, err = s.cc.NewSubConn([]resolver.Address{at}, balancer.NewSubConnOptions{ //nolint:staticcheck // more than one address is what is deprecated
		StateListener:      func(st balancer.SubConnState) { s.follow(e, st) },
		HealthCheckEnabled: s.config.GetReadiness() == configv1.Readiness_READINESS_GRPC_HEALTH,
	})
	if err != nil {
		return nil // the connection is being closed
	}
	return e
}

// leave takes servers away. Calls in flight there go on.
func (s *Set) leave(endpoints []*endpoint) {
	for _, e := range endpoints {
		e.state.Store(uint32(connectivity.Shutdown))
		e.unwatch()
		e.sc.Shutdown() // waits for what watches the server, which may wait for mu
	}
}

// unresolved notes that the name service failed. What is known stays.
func (s *Set) unresolved(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.failure = err; len(s.endpoints) == 0 {
		s.publish()
	}
}

// follow takes in what became of a connection. grpc-go calls it, one call at a time.
func (s *Set) follow(e *endpoint, st balancer.SubConnState) {
	if st.ConnectivityState == connectivity.Shutdown || e.is(connectivity.Shutdown) {
		return
	}
	e.unwatch()
	switch st.ConnectivityState {
	case connectivity.Idle:
		e.sc.Connect()
	case connectivity.TransientFailure:
		s.mu.Lock()
		if s.cc != nil {
			s.cc.ResolveNow(resolveNow)
		}
		s.mu.Unlock()
	}
	connected := st.ConnectivityState == connectivity.Ready
	if connected && s.config.GetReadiness() == configv1.Readiness_READINESS_SERVER_READY {
		st.ConnectivityState = connectivity.Connecting // until it says so
	}
	s.turned(e, st.ConnectivityState, st.ConnectionError)
	if connected {
		e.watch()
	}
}

// turned notes that a server can take calls, or cannot. One that failed has failed
// until it is ready again, whatever is tried meanwhile.
func (s *Set) turned(e *endpoint, to connectivity.State, why error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if to == connectivity.Idle {
		to = connectivity.Connecting
	}
	if e.is(connectivity.Shutdown) || s.cc == nil || e.is(connectivity.TransientFailure) && to == connectivity.Connecting {
		return
	}
	if to == connectivity.TransientFailure {
		e.failure = why
	}
	e.state.Store(uint32(to))
	s.publish()
}

// publish has grpc-go choose among the servers as they are now. mu is held.
func (s *Set) publish() {
	if s.cc == nil {
		return
	}
	p := &picker{set: s, err: balancer.ErrNoSubConnAvailable}
	state := connectivity.TransientFailure
	var ejected []*endpoint
	failure := s.failure
	for _, e := range s.endpoints {
		switch {
		case e.is(connectivity.TransientFailure):
			failure = e.failure
		case !e.is(connectivity.Ready):
			p.homes = append(p.homes, e)
			state = connectivity.Connecting
		case e.ejected.IsZero():
			p.open = append(p.open, e)
		default:
			ejected = append(ejected, e)
		}
	}
	if len(p.open) == 0 {
		p.open = ejected // what fails sometimes is better than nothing
	}
	p.homes = append(p.homes, p.open...)
	switch {
	case len(p.open) > 0:
		state = connectivity.Ready
	case state == connectivity.TransientFailure:
		if p.err = failure; failure == nil {
			p.err = errNotReady
		}
	}
	s.cc.UpdateState(balancer.State{ConnectivityState: state, Picker: p})
}

var errNotReady = errors.New("no server of the back end is ready")

// watch begins to ask a server that is connected for what it is to be asked.
func (e *endpoint) watch() {
	s := e.set
	var watches []func()
	if s.config.GetReadiness() == configv1.Readiness_READINESS_SERVER_READY {
		_, stop := e.sc.GetOrBuildProducer(&readiness{e})
		watches = append(watches, stop)
	}
	if s.config.GetLoad().GetOrca() {
		watches = append(watches, orca.RegisterOOBListener(e.sc, reports{e}, orca.OOBListenerOptions{ReportInterval: s.interval}))
	}
	if s.metrics != nil {
		watches = append(watches, e.readMetrics())
	}
	s.mu.Lock()
	e.watches = watches
	s.mu.Unlock()
}

// unwatch ends that. It waits until nothing asks any more.
func (e *endpoint) unwatch() {
	e.set.mu.Lock()
	watches := e.watches
	e.watches = nil
	e.set.mu.Unlock()
	for _, stop := range watches {
		stop()
	}
}

// host is the server's host, without its port.
func (e *endpoint) host() string {
	host, _, err := net.SplitHostPort(e.address)
	if err != nil {
		return e.address
	}
	return host
}
