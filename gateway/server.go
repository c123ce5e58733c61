// Package gateway is the gRPC edge proxy: it forwards calls to model servers as
// raw frames through the chain of package interceptors.
//
// proxy.go is the life of a call; server.go the listener, reload and drain.
package gateway

import (
	"errors"
	"fmt"
	"log/slog"
	"math"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/net/netutil"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/encoding"
	"google.golang.org/grpc/experimental"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/reflection"

	"github.com/sluicegate/sluice/interceptors"
	"github.com/sluicegate/sluice/interceptors/config"
	adminv1 "github.com/sluicegate/sluice/proto/gen/sluice/admin/v1"
	configv1 "github.com/sluicegate/sluice/proto/gen/sluice/config/v1"
)

// Gateway is a running gateway.
type Gateway struct {
	options      config.Options
	listener     *configv1.Listener
	codec        encoding.CodecV2
	server       *grpc.Server
	health       *health.Server
	edge         *edge
	firstMessage time.Duration
	stall        time.Duration
	pool         mem.BufferPool
	phase        atomic.Pointer[string] // why it takes no calls; nil when it does
	log          *slog.Logger

	mu       sync.Mutex // of reload
	closed   bool
	runtime  atomic.Pointer[runtime]
	shutdown sync.Once
}

// streamWorkers are goroutines that serve one call after the other. A call
// through the chain needs a deep stack, and a new goroutine grows one for every
// call: workers spare a tenth of the processor time of short calls (test/bench).
// A call that finds none free gets a goroutine of its own.
const streamWorkers = 64

// runtime is one configuration at work. A call sees one from start to end.
type runtime struct {
	guard     *config.Guard
	upstreams map[*interceptors.Backend]*upstream
	refs      atomic.Int64 // calls, and one for being the gateway's own
}

// acquire takes the runtime of the day for one call. The gateway holds one
// itself until the last call has ended, so that there always is one to take.
func (g *Gateway) acquire() *runtime {
	for {
		rt := g.runtime.Load()
		if n := rt.refs.Load(); n > 0 && rt.refs.CompareAndSwap(n, n+1) {
			return rt
		}
	}
}

// release gives it back; the last one closes it.
func (rt *runtime) release() {
	if rt.refs.Add(-1) > 0 {
		return
	}
	for _, u := range rt.upstreams {
		u.release()
	}
	rt.guard.Close()
}

// stallTimeout is how long a caller may leave a message of a stream unread, of
// which about 64 KiB are on their way already. Chosen: no one who reads waits so
// long, and who does not read may be holding a GPU.
const stallTimeout = time.Minute

// New makes a gateway of a configuration. It listens when Serve is called. An
// error names the field that is at fault. Shutdown gives back what it opened.
func New(cfg *configv1.Config, o config.Options) (*Gateway, error) {
	return newGateway(cfg, o, mem.DefaultBufferPool())
}

func newGateway(cfg *configv1.Config, o config.Options, pool mem.BufferPool) (*Gateway, error) {
	if cfg.GetListener() == nil {
		return nil, errors.New("listener: the gateway needs an address to listen on")
	}
	own, err := Own(cfg.GetListener())
	if err != nil {
		return nil, err
	}
	o.Own = append(o.Own, own)
	g := &Gateway{
		options:      o,
		listener:     cfg.GetListener(),
		codec:        newCodec(),
		health:       health.NewServer(),
		firstMessage: or(cfg.GetListener().GetFirstMessageTimeout(), 10*time.Second),
		stall:        stallTimeout,
		pool:         pool,
		log:          o.Logger,
	}
	if g.log == nil {
		g.log = slog.Default()
	}
	g.phase.Store(&starting)
	g.health.SetServingStatus("", healthpb.HealthCheckResponse_NOT_SERVING) // until Serve
	rt, err := g.build(cfg, nil)
	if err != nil {
		return nil, err
	}
	g.runtime.Store(rt)
	g.edge = &edge{
		TransportCredentials: rt.guard.ServerCredentials(),
		acquire: func() (credentials.TransportCredentials, func()) {
			rt := g.acquire()
			return rt.guard.ServerCredentials(), rt.release
		},
		maxResets: int(orUint(g.listener.GetMaxResets(), defaultMaxResets)),
		closed:    func(reason string) { g.log.Warn("closed a connection that floods", "with", reason) },
	}
	g.server = grpc.NewServer(g.serverOptions(rt.guard)...)
	healthpb.RegisterHealthServer(g.server, g.health)
	if cfg.GetListener().GetAdminApi() {
		adminv1.RegisterBudgetsServiceServer(g.server, admin{Gateway: g})
		adminv1.RegisterPoolsServiceServer(g.server, adminPools{Gateway: g})
		adminv1.RegisterEndpointsServiceServer(g.server, adminEndpoints{Gateway: g})
	}
	if cfg.GetListener().GetReflection() {
		reflection.Register(g.server)
	}
	return g, nil
}

// build makes a runtime; what is unchanged is taken over from the one before,
// so that accounts, permits and connections survive.
func (g *Gateway) build(cfg *configv1.Config, before *runtime) (*runtime, error) {
	var old *config.Guard
	if before != nil {
		old = before.guard
	}
	guard, err := config.Build(cfg, old, g.options)
	if err != nil {
		return nil, err
	}
	rt := &runtime{guard: guard, upstreams: make(map[*interceptors.Backend]*upstream)}
	rt.refs.Store(1)
	for n, b := range guard.Backends() {
		u, err := g.dial(cfg.GetBackends()[n], b, guard, before)
		if err != nil {
			rt.release()
			return nil, fmt.Errorf("backends[%d].%w", n, err)
		}
		rt.upstreams[b] = u
	}
	if n := guard.GuardModel(); n >= 0 {
		guard.ConnectGuardModel(rt.upstreams[guard.Backends()[n]].servers)
	}
	return rt, nil
}

// HeapFloor is how many bytes of garbage a program that is a gateway and nothing
// else should let come together before they are collected (internal/heapfloor).
// Chosen: some thousand calls; more gains nothing that can be measured.
const HeapFloor = 64 << 20

const (
	// streamWindow is how many bytes of one call grpc-go takes from a peer before
	// we read them: what is buffered for a caller that does not read. A message
	// that is larger widens it while it is being read. Chosen: 100 MB/s at 10 ms.
	// Static, because grpc-go's own estimate grows to 16 MiB and sends a PING with
	// nearly every message of a token stream.
	streamWindow = 1 << 20
	// connWindow is the same for all calls of a connection; grpc-go opens it again
	// as bytes arrive, read or not, so that it bounds nothing.
	connWindow = 16 << 20
	// added is what the chain may add to a message of the full size: an id, the
	// question for a visible end, and what redaction puts in. Chosen.
	added = 1 << 20
	// maxUpstreamHeader bounds what a model server says in headers and trailers,
	// in bytes; grpc-go's default is 16 MiB. Chosen: four times ours.
	maxUpstreamHeader = 64 << 10
	// A model server that was down is tried again at least this often, and a
	// connection to it may take so long. grpc-go's 120 s and 20 s would leave a
	// server that came back unused. Chosen.
	maxBackoff     = time.Second
	connectTimeout = 5 * time.Second
)

func (g *Gateway) serverOptions(guard *config.Guard) []grpc.ServerOption {
	l := g.listener
	return []grpc.ServerOption{
		grpc.Creds(g.edge),
		grpc.ForceServerCodecV2(g.codec),
		grpc.UnknownServiceHandler(g.handle),
		grpc.MaxRecvMsgSize(guard.MaxMessageBytes()),
		grpc.MaxSendMsgSize(math.MaxInt32), // what a model server sends was measured when it came
		experimental.BufferPool(g.pool),
		grpc.MaxConcurrentStreams(orUint(l.GetMaxConcurrentStreams(), 100)),
		grpc.MaxHeaderListSize(orUint(l.GetMaxHeaderListBytes(), 16<<10)),
		grpc.ConnectionTimeout(or(l.GetHandshakeTimeout(), 10*time.Second)),
		grpc.KeepaliveParams(keepalive.ServerParameters{
			MaxConnectionIdle:     or(l.GetMaxConnectionIdle(), 5*time.Minute),
			MaxConnectionAge:      or(l.GetMaxConnectionAge(), 30*time.Minute),
			MaxConnectionAgeGrace: or(l.GetDrainTimeout(), 30*time.Second),
			Time:                  time.Minute,
			Timeout:               20 * time.Second,
		}),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 30 * time.Second}),
		grpc.StaticStreamWindowSize(streamWindow),
		grpc.StaticConnWindowSize(connWindow),
		grpc.WaitForHandlers(true),
		grpc.NumStreamWorkers(streamWorkers),
		grpc.InTapHandle(keepHeader),
		// What the gateway itself serves (health, reflection) passes the chain too.
		grpc.UnaryInterceptor(g.ownUnary),
		grpc.StreamInterceptor(g.ownStream),
	}
}

// Serve serves until Shutdown, and closes the listener. It blocks. The error is
// nil after a Shutdown, also one that came first.
func (g *Gateway) Serve(l net.Listener) error {
	g.phase.CompareAndSwap(&starting, nil)
	defer g.followReadiness()()
	defer every(g.firstMessage/silentLooks, g.endSilent)()
	err := g.server.Serve(netutil.LimitListener(l, int(orUint(g.listener.GetMaxConnections(), 10_000))))
	if errors.Is(err, grpc.ErrServerStopped) {
		return nil
	}
	return err
}

var (
	starting = "the gateway does not serve yet"
	draining = "the gateway is shutting down"
)

// Ready is nil if the gateway takes calls, and will be able to for a while yet;
// else it says why not. It is cheap.
func (g *Gateway) Ready() error {
	if why := g.phase.Load(); why != nil {
		return errors.New(*why)
	}
	return g.Guard().Ready()
}

// readinessInterval is how often gRPC's health service looks whether the gateway
// is ready. Chosen: the last SVID's last ten seconds are announced in time.
const readinessInterval = time.Second

// followReadiness has gRPC's health service say what Ready does, until it is
// told to stop.
func (g *Gateway) followReadiness() (stop func()) {
	last := error(nil)
	say := func() {
		now := g.Ready()
		status := healthpb.HealthCheckResponse_SERVING
		if now != nil {
			status = healthpb.HealthCheckResponse_NOT_SERVING
		}
		g.health.SetServingStatus("", status)
		switch {
		case now != nil && last == nil:
			g.log.Error("not ready", "error", now)
		case now == nil && last != nil:
			g.log.Info("ready again")
		}
		last = now
	}
	say()
	return every(readinessInterval, func() {
		if g.phase.Load() == nil {
			say()
		}
	})
}

// silentLooks is how often in the time that a call has for its first message it is
// looked whether that is over; so a silent call may last an eighth longer. Chosen.
const silentLooks = 8

// endSilent ends the calls whose first message has not come in time: an open, silent
// call costs memory and must cost the caller something too.
func (g *Gateway) endSilent() {
	now := time.Now()
	g.Guard().Live().Each(func(c *interceptors.Call) {
		if c.Expects() && now.Sub(c.Began) >= g.firstMessage {
			c.Abort(interceptors.Deny("gateway", interceptors.MessageTimeout,
				"the first message did not arrive within %v", g.firstMessage))
		}
	})
}

// every calls f again and again until it is told to stop.
func every(interval time.Duration, f func()) (stop func()) {
	end, ended := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		tick := time.NewTicker(max(1, interval))
		defer tick.Stop()
		for {
			select {
			case <-end:
				return
			case <-tick.C:
				f()
			}
		}
	}()
	return func() { close(end); <-ended }
}

// Guard is the configuration in force: for looking at its accounts and pools,
// not for closing it.
func (g *Gateway) Guard() *config.Guard { return g.runtime.Load().guard }

// Reload puts another configuration in force for calls that begin from now on;
// calls in flight go on under the one that they began with, but who calls and
// what the caller may use is judged by the new one. On an error the one in force
// stays. The listener's own settings need a restart; who we are and
// whom we trust do not. Safe for concurrent use.
func (g *Gateway) Reload(cfg *configv1.Config) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.closed {
		return errors.New("the gateway is shut down")
	}
	old := g.runtime.Load()
	rt, err := g.build(cfg, old)
	if err != nil {
		return err
	}
	g.runtime.Store(rt)
	rt.guard.Enforce()
	old.release()
	return nil
}

// Shutdown drains: callers are told to go elsewhere, calls in flight may go on
// until the drain timeout, then they end with UNAVAILABLE. What has not ended a
// second later is cut off. It blocks until all is closed; so does a second call.
func (g *Gateway) Shutdown() {
	g.shutdown.Do(func() {
		g.phase.Store(&draining)
		g.health.Shutdown()
		g.edge.drop()
		grace := or(g.listener.GetDrainTimeout(), 30*time.Second)
		abort := time.AfterFunc(grace, func() {
			g.Guard().Live().Abort(interceptors.Deny("gateway", interceptors.Draining, "the gateway is shutting down"))
		})
		defer abort.Stop()
		stop := time.AfterFunc(grace+time.Second, g.server.Stop)
		defer stop.Stop()
		g.server.GracefulStop()
		g.mu.Lock()
		defer g.mu.Unlock()
		g.closed = true
		g.runtime.Load().release()
	})
}
