package config

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path"
	"slices"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/grpc-ecosystem/go-grpc-middleware/v2/interceptors/recovery"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/descriptorpb"

	"github.com/sluicegate/sluice/interceptors"
	"github.com/sluicegate/sluice/interceptors/admit"
	"github.com/sluicegate/sluice/interceptors/budget"
	"github.com/sluicegate/sluice/interceptors/dialect"
	"github.com/sluicegate/sluice/interceptors/fields"
	"github.com/sluicegate/sluice/interceptors/identity"
	"github.com/sluicegate/sluice/interceptors/inspect"
	"github.com/sluicegate/sluice/interceptors/telemetry"
	"github.com/sluicegate/sluice/interceptors/usage"
	configv1 "github.com/sluicegate/sluice/proto/gen/sluice/config/v1"
)

// DefaultMaxMessageBytes is the largest message that is taken, after
// decompression: four times grpc-go's own default, so that an 8 MB tensor of
// images passes. Chosen.
const DefaultMaxMessageBytes = 16 << 20

// Options are what a configuration file cannot hold.
type Options struct {
	// Context ends the wait for an identity, at the start and in a reload; nil means
	// that only the configuration's timeout does.
	Context context.Context
	// Logger gets the log; nil means slog.Default.
	Logger *slog.Logger
	// Telemetry are the options of the telemetry policy: tracer, meter and so on.
	Telemetry []telemetry.Option
	// Usage are the options of the usage policy: meter and logger provider.
	Usage []usage.Option
	// Source is our identity, if the program has one already; nil means that
	// the configuration says where it comes from. Build does not close it.
	Source *identity.Source
	// Own are what the program itself serves beside its model server, such as
	// health. The chain asks them last.
	Own []*interceptors.Backend
	// GuardModel is the connection to the guard model of inspect.guard, for a linked
	// chain; a gateway has its own. It must not pass this chain. Build does not close it.
	GuardModel grpc.ClientConnInterface
}

// Guard is a configuration at work: the chain, and the credentials that belong
// to it.
type Guard struct {
	// Chain is what the doors run.
	Chain *interceptors.Chain

	config     *configv1.Config
	log        *slog.Logger
	source     *identity.Source
	holders    *atomic.Int32 // guards that share source; nil if it is not ours to close
	replaces   *identity.Source
	flight     *flight
	backends   []*interceptors.Backend
	tokenizers []*tokenizer
	identity   *identity.Policy
	inspect    *inspect.Policy
	watcher    *telemetry.Policy
	ledger     *budget.Ledger
	pools      *admit.Policy
	unwatch    func() // ends the metrics of the pools; nil if there are none
	usage      *records
}

// records are the records of inferences of all guards that follow one another with
// the same file.
type records struct {
	*usage.Policy
	holders atomic.Int32
}

// flight are the calls in flight of all guards that follow one another.
type flight struct {
	live    interceptors.Live
	watch   *identity.Watch
	holders atomic.Int32 // guards
}

// Load reads a file and builds what it says. An error names the file, the line
// and the field.
func Load(file string, o Options) (*Guard, error) {
	cfg, err := Read(file)
	if err != nil {
		return nil, err
	}
	g, err := Build(cfg, nil, o)
	if err != nil {
		return nil, Locate(file, err)
	}
	return g, nil
}

// Build makes a chain of a configuration. Parts that the configuration before
// has just the same are taken over from its guard, so that a reload loses no
// account, no permit and no identity; a part that changed begins anew. before
// may be nil. The guard before stays valid until it is closed, and calls in
// flight are judged by its rules until the new one is told to Enforce its own;
// without a guard before they are in force at once. An error begins with the
// field that is at fault.
func Build(cfg *configv1.Config, before *Guard, o Options) (*Guard, error) {
	if before == nil {
		before = &Guard{config: new(configv1.Config)}
	}
	g, err := compile(cfg, before, o)
	if err != nil {
		return nil, err
	}
	if g.GuardModel() >= 0 && o.GuardModel == nil && cfg.GetListener() == nil {
		return nil, errNoGuardModel
	}
	if err := g.openLedger(); err != nil {
		return nil, err
	}
	if err := g.openUsage(before, o); err != nil {
		g.closeLedger()
		return nil, err
	}
	if err := g.openPools(); err != nil {
		g.closeUsage()
		g.closeLedger()
		return nil, err
	}
	switch {
	case o.Source != nil:
		g.source = o.Source
	case before.source != nil && sameSource(cfg.GetIdentity(), before.config.GetIdentity()):
		g.source, g.holders = before.source, before.holders
	default:
		ctx := o.Context
		if ctx == nil {
			ctx = context.Background()
		}
		g.source, err = identity.Open(ctx, cfg.GetIdentity(), func(err error) {
			if err != nil {
				g.log.Error("the identity was not renewed; the last good one stays", "error", err)
			} else {
				g.log.Info("the identity was renewed")
			}
		})
		if err != nil {
			g.closePools()
			g.closeUsage()
			g.closeLedger()
			return nil, err
		}
		g.holders = new(atomic.Int32)
	}
	if g.holders != nil {
		g.holders.Add(1)
	}
	g.replaces, g.flight = before.source, before.flight
	if g.flight == nil {
		g.flight = new(flight)
		g.flight.watch = identity.NewWatch(&g.flight.live)
	}
	g.flight.holders.Add(1)
	g.identity.Use(g.source, g.flight.watch)
	g.Chain = g.flight.live.Chain(slices.Concat(g.backends, o.Own), g.policies(o)...)
	if g.GuardModel() >= 0 && o.GuardModel != nil {
		g.ConnectGuardModel(o.GuardModel)
	}
	if before.unwatch != nil {
		before.unwatch()
	}
	if before.flight == nil {
		g.Enforce()
	}
	if before.ledger != nil {
		before.ledger.Retire(g.ledger)
	}
	return g, nil
}

// Enforce has calls and connections that began under a guard before judged by
// the rules, the identity and the trust bundles of this one: at once, and again
// every identity.recheck. It does not wait.
func (g *Guard) Enforce() {
	if g.replaces != nil {
		g.source.Replace(g.replaces)
	}
	g.flight.watch.Enforce(g.identity)
}

// Live are the calls in flight, also those that began under a guard before.
func (g *Guard) Live() *interceptors.Live { return &g.flight.live }

// Check compiles every part of a configuration without opening anything: no
// identity is read, nothing is dialed. An error begins with the field that is
// at fault.
func Check(cfg *configv1.Config) error {
	if _, err := compile(cfg, &Guard{config: new(configv1.Config)}, Options{}); err != nil {
		return err
	}
	// What else a gateway asks, when it dials.
	for n, b := range cfg.GetBackends() {
		if cfg.GetListener() != nil && b.GetAddress() == "" && len(b.GetAddresses()) == 0 {
			return fmt.Errorf("backends[%d].address: the gateway needs the model server's address", n)
		}
		if (b.GetAddress() != "" || len(b.GetAddresses()) > 0) && cfg.GetIdentity().GetInsecure() != nil && !b.GetPlaintext() {
			return fmt.Errorf("backends[%d].%w", n, errPlaintext)
		}
	}
	return nil
}

var errPlaintext = errors.New("plaintext: without an identity we can only speak plaintext to a model server; set plaintext: true")

// compile is Build without what has to be opened.
func compile(cfg *configv1.Config, before *Guard, o Options) (g *Guard, err error) {
	g = &Guard{config: cfg, log: o.Logger}
	if g.log == nil {
		g.log = slog.Default()
	}
	if g.backends, err = backends(cfg); err != nil {
		return nil, err
	}
	if g.tokenizers, err = tokenizers(cfg.GetTokenizers(), before.tokenizers); err != nil {
		return nil, err
	}
	for n, b := range g.backends {
		b.Tokenizer = g.tokenizer
		if c := cfg.GetBackends()[n]; c.GetDialect() == configv1.Dialect_DIALECT_SGLANG && !c.GetAllowTokenIds() && g.tokenizer(c.GetModels()[0]) == nil {
			return nil, fmt.Errorf("backends[%d].models[0]: prompts for %q are token ids, which could not be read: name its tokenizer in tokenizers, or set allow_token_ids", n, c.GetModels()[0])
		}
		if model := cfg.GetBackends()[n].GetModels(); cfg.GetInspect().GetResponses() && engine(cfg.GetBackends()[n].GetDialect()) && g.tokenizer(model[0]) == nil {
			return nil, fmt.Errorf("backends[%d].models[0]: %q is answered in token ids, which inspect.responses could not read: name its tokenizer in tokenizers", n, model[0])
		}
	}
	if g.identity, err = identity.New(cfg.GetIdentity()); err != nil {
		return nil, err
	}
	if err = g.denied(o.Own); err != nil {
		return nil, err
	}
	if cfg.GetInspect() != nil { // always anew: its rule files may have changed
		if g.inspect, err = g.newInspect(before); err != nil {
			return nil, err
		}
	}
	if err = g.makePools(before); err != nil {
		return nil, err
	}
	if err = stores(cfg); err != nil {
		return nil, err
	}
	if len(cfg.GetBudgets()) > 0 {
		books := before.ledger
		if !proto.Equal(cfg.GetBudgetStore(), before.config.GetBudgetStore()) || !proto.Equal(budgetRedis(cfg), budgetRedis(before.config)) {
			books = nil // they are kept elsewhere
		}
		opts := []budget.Option{budget.WithPrices(cfg.GetPrices()), budget.WithBefore(books)}
		if g.pools != nil {
			opts = append(opts, budget.WithPermits(g.pools.Permits))
		}
		if cfg.GetUsage() != nil {
			opts = append(opts, budget.WithCharges())
		}
		g.ledger, err = budget.New(cfg.GetBudgets(), opts...)
		if err == nil && cfg.GetBudgetStore().GetRedis() != nil {
			err = g.ledger.CanShare()
		}
		if err != nil {
			return nil, err
		}
	}
	return g, nil
}

// served are the methods that a gateway serves itself: rules may name them
// though no back end has them.
var served = []string{
	"/grpc.health.v1.Health/Check",
	"/grpc.health.v1.Health/List",
	"/grpc.health.v1.Health/Watch",
	"/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
	"/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
	"/sluice.admin.v1.BudgetsService/GetAccount",
	"/sluice.admin.v1.BudgetsService/Grant",
	"/sluice.admin.v1.BudgetsService/ListAccounts",
	"/sluice.admin.v1.BudgetsService/Reset",
	"/sluice.admin.v1.EndpointsService/ListEndpoints",
	"/sluice.admin.v1.PoolsService/DrainPool",
	"/sluice.admin.v1.PoolsService/GetPool",
	"/sluice.admin.v1.PoolsService/ListPools",
	"/sluice.admin.v1.PoolsService/ResizePool",
	"/sluice.admin.v1.PoolsService/ResumePool",
}

// denied refuses a rule that denies a method which nobody has: if that is a
// slip of the pen, what it was meant for would go on being allowed. (A rule that
// allows such a method allows nothing.)
func (g *Guard) denied(own []*interceptors.Backend) error {
	for n, r := range g.config.GetIdentity().GetRules() {
		if !r.GetDeny() {
			continue
		}
		for k, m := range r.GetMethods() {
			has := func(b *interceptors.Backend) bool { return b.Dialect.Methods[m] != nil }
			if m[0] == '/' && !slices.Contains(served, m) && !slices.ContainsFunc(slices.Concat(g.backends, own), has) {
				return fmt.Errorf("identity.rules[%d].methods[%d]: no back end has the method %q, so that denying it does nothing; "+
					"write it as the API does, or leave it out", n, k, m)
			}
		}
	}
	return nil
}

// policies is the order of the chain: cheap refusals first, the GPU last, and
// telemetry around them all.
func (g *Guard) policies(o Options) []interceptors.Policy {
	known := make(map[string]bool)
	for _, b := range g.config.GetBackends() {
		for _, m := range b.GetModels() {
			known[m] = true
		}
	}
	for _, p := range g.config.GetPools() {
		for _, m := range p.GetModels() {
			known[m.GetModel()] = true
		}
	}
	for _, r := range g.config.GetIdentity().GetRules() {
		for _, m := range r.GetModels() {
			known[m] = true
		}
	}
	watch := []telemetry.Option{telemetry.WithModels(func(model string) bool { return known[model] })}
	if o.Logger != nil {
		watch = append(watch, telemetry.WithLogger(o.Logger))
	}
	g.watcher = telemetry.New(append(watch, o.Telemetry...)...)
	list := []interceptors.Policy{g.watcher, g.identity}
	if g.usage != nil {
		list = slices.Insert(list, 1, interceptors.Policy(g.usage.Policy)) // it sees what all but telemetry do
	}
	if g.ledger != nil {
		list = append(list, g.ledger.Rates())
	}
	if g.inspect != nil {
		list = append(list, g.inspect)
	}
	if g.ledger != nil {
		list = append(list, g.ledger.Tokens())
	}
	if g.pools != nil {
		list = append(list, g.pools)
		g.unwatch = sync.OnceFunc(g.watcher.WatchPools(g.samples))
	}
	return list
}

// Close gives back what the guard opened. Calls on its chain must have ended.
func (g *Guard) Close() {
	g.closePools()
	g.closeLedger()
	g.closeUsage()
	if g.flight.holders.Add(-1) == 0 {
		g.flight.watch.Close()
	}
	if g.holders != nil && g.holders.Add(-1) == 0 {
		_ = g.source.Close()
	}
}

// openLedger opens the store of the budgets, if they have one.
func (g *Guard) openLedger() error {
	switch store := g.config.GetBudgetStore().GetStore().(type) {
	case nil:
		return nil
	case *configv1.BudgetStore_File:
		if g.ledger != nil {
			return g.ledger.Open(store.File)
		}
	case *configv1.BudgetStore_Redis:
		if g.ledger != nil {
			return g.ledger.Share(budgetRedis(g.config))
		}
	}
	return nil
}

func (g *Guard) closeLedger() {
	if g.ledger == nil {
		return
	}
	if err := g.ledger.Close(); err != nil {
		g.log.Error("the budgets could not be written to their file; the blocks in use will count as spent", "error", err)
	}
}

// openUsage begins to keep records, or goes on with that of the guard before.
func (g *Guard) openUsage(before *Guard, o Options) error {
	c := g.config.GetUsage()
	switch {
	case c == nil:
		return nil
	case before.usage != nil && proto.Equal(c, before.config.GetUsage()):
		g.usage = before.usage
	default:
		p, err := usage.Open(c, g.log, o.Usage...)
		if err != nil {
			return fmt.Errorf("usage.file: %w", err)
		}
		g.usage = &records{Policy: p}
	}
	g.usage.holders.Add(1)
	return nil
}

func (g *Guard) closeUsage() {
	if g.usage != nil && g.usage.holders.Add(-1) == 0 {
		g.usage.Close()
	}
}

// Backends are the back ends, in the order of the configuration.
func (g *Guard) Backends() []*interceptors.Backend { return g.backends }

// Source is who we are.
func (g *Guard) Source() *identity.Source { return g.source }

// Inspect is the inspection policy; nil if nothing is inspected.
func (g *Guard) Inspect() *inspect.Policy { return g.inspect }

// Budgets is the ledger of the budgets; nil if there are none.
func (g *Guard) Budgets() *budget.Ledger { return g.ledger }

// Pools is the admission policy; nil if there are no pools.
func (g *Guard) Pools() *admit.Policy { return g.pools }

// MaxMessageBytes is the largest message that is taken.
func (g *Guard) MaxMessageBytes() int {
	if n := g.config.GetMessages().GetMaxBytes(); n > 0 {
		return int(n)
	}
	return DefaultMaxMessageBytes
}

// Ready is nil if calls can be taken; else it says why not. It is cheap.
func (g *Guard) Ready() error { return g.source.Ready() }

// ServerCredentials are what our listener proves and asks for.
func (g *Guard) ServerCredentials() credentials.TransportCredentials {
	switch c := g.config.GetIdentity(); {
	case g.source.Insecure() || c.GetPlaintextListener():
		return insecure.NewCredentials()
	case c.GetClientCertificate() == configv1.ClientCertificate_CLIENT_CERTIFICATE_OPTIONAL:
		return identity.OptionalServerCredentials(g.source, g.refusedHandshake)
	}
	return identity.ServerCredentials(g.source, g.refusedHandshake)
}

// refusedHandshake tells of a peer that never came as far as a call. The error
// names what is wrong with its certificate.
func (g *Guard) refusedHandshake(reason interceptors.Reason, err error) {
	g.log.Warn("refused a TLS handshake", "reason", string(reason), "error", err)
}

// BackendCredentials are what we prove to a model server and ask of it.
func (g *Guard) BackendCredentials(b *configv1.Backend) (credentials.TransportCredentials, error) {
	switch {
	case b.GetPlaintext():
		return insecure.NewCredentials(), nil
	case g.source.Insecure():
		return nil, errPlaintext
	case b.GetSpiffeId() == "":
		return identity.ClientCredentials(g.source, spiffeid.MatchMemberOf(g.source.TrustDomain()), g.refusedHandshake), nil
	}
	expected, err := identity.Matcher(b.GetSpiffeId())
	if err != nil {
		return nil, fmt.Errorf("spiffe_id: %w", err)
	}
	return identity.ClientCredentials(g.source, expected, g.refusedHandshake), nil
}

// ServerOptions guard a grpc-go server: credentials, the limit on messages, the
// tap that decides identity and method before a body is read, the interceptors,
// and a recovery that makes a panic an INTERNAL status. It stands on both sides
// of the chain: on the inner one, so that the id that the caller is told of a
// handler's panic is the one that the chain logs; on the outer one for what is
// wrong with the chain itself.
func (g *Guard) ServerOptions() []grpc.ServerOption {
	recovered := recovery.WithRecoveryHandler(func(v any) error { return interceptors.Recovered("handler", v) })
	unary, stream := recovery.UnaryServerInterceptor(recovered), recovery.StreamServerInterceptor(recovered)
	return []grpc.ServerOption{
		grpc.Creds(g.ServerCredentials()),
		grpc.MaxRecvMsgSize(g.MaxMessageBytes()),
		grpc.InTapHandle(interceptors.Tap(g.Chain)),
		grpc.ChainUnaryInterceptor(unary, interceptors.UnaryServer(g.Chain), unary),
		grpc.ChainStreamInterceptor(stream, interceptors.StreamServer(g.Chain), stream),
	}
}

// DialOptions guard a grpc-go client: the server must prove the identity that
// the first back end of the configuration names.
func (g *Guard) DialOptions() ([]grpc.DialOption, error) {
	creds, err := g.BackendCredentials(g.config.GetBackends()[0])
	if err != nil {
		return nil, fmt.Errorf("backends[0].%w", err)
	}
	return []grpc.DialOption{
		grpc.WithTransportCredentials(creds),
		grpc.WithChainUnaryInterceptor(interceptors.UnaryClient(g.Chain)),
		grpc.WithChainStreamInterceptor(interceptors.StreamClient(g.Chain)),
	}, nil
}

// backends makes the back ends of their configuration.
func backends(cfg *configv1.Config) ([]*interceptors.Backend, error) {
	names := make(map[string]bool)
	var out []*interceptors.Backend
	engines := make(map[configv1.Dialect]bool)
	for n, b := range cfg.GetBackends() {
		if names[b.GetName()] {
			return nil, fmt.Errorf("backends[%d].name: there are two back ends named %q; rename one", n, b.GetName())
		}
		names[b.GetName()] = true
		d, err := Dialect(b, cfg.GetMessages())
		if err != nil {
			return nil, fmt.Errorf("backends[%d].%w", n, err)
		}
		if kind := b.GetDialect(); engine(kind) {
			if engines[kind] {
				return nil, fmt.Errorf("backends[%d].dialect: an engine of this kind is there already, and requests do not say which they are for; give each engine a gateway", n)
			}
			engines[kind] = true
		}
		if id := b.GetSpiffeId(); id != "" {
			if _, err := identity.Matcher(id); err != nil {
				return nil, fmt.Errorf("backends[%d].spiffe_id: %w", n, err)
			}
		}
		if err := servers(b); err != nil {
			return nil, fmt.Errorf("backends[%d].%w", n, err)
		}
		out = append(out, &interceptors.Backend{
			Name:              b.GetName(),
			Models:            set(b.GetModels()),
			Dialect:           d,
			AllowSharedMemory: b.GetAllowSharedMemory(),
			AllowTokenIDs:     b.GetAllowTokenIds(),
			MaskErrors:        b.GetMaskErrors(),
			Usage:             interceptors.Usage{Input: b.GetReportedUsage().GetInputTokens(), Output: b.GetReportedUsage().GetOutputTokens()},
			Datatypes:         set(b.GetDatatypes()),
		})
	}
	return out, nil
}

// engine reports whether the requests of a dialect go to an engine that runs one model,
// which they do not name.
func engine(d configv1.Dialect) bool {
	return d == configv1.Dialect_DIALECT_VLLM || d == configv1.Dialect_DIALECT_SGLANG
}

// tensorRoles are the roles that a tensor can have.
var tensorRoles = []fields.Role{
	fields.Prompt, fields.Output, fields.Parameter, fields.Identifier,
	fields.MaxTokens, fields.InputTokens, fields.OutputTokens,
}

// Dialect makes the dialect of a back end. An error begins with the field's name.
func Dialect(b *configv1.Backend, limits *configv1.MessageLimits) (*dialect.Dialect, error) {
	o := dialect.Options{
		Tensors:   make(map[string]fields.Role),
		Fields:    make(map[protoreflect.FullName]fields.Role),
		Lenient:   limits.GetLenient(),
		MaxFields: int(limits.GetMaxFields()),
	}
	for n, t := range b.GetTensors() {
		if _, twice := o.Tensors[t.GetTensor()]; twice {
			return nil, fmt.Errorf("tensors[%d].tensor: %q has a role already", n, t.GetTensor())
		}
		if !slices.Contains(tensorRoles, t.GetRole()) {
			return nil, fmt.Errorf("tensors[%d].role: %s is no role of a tensor; those are %v", n, t.GetRole(), tensorRoles)
		}
		o.Tensors[t.GetTensor()] = t.GetRole()
	}
	for n, f := range b.GetFields() {
		name := protoreflect.FullName(f.GetField())
		if _, twice := o.Fields[name]; twice {
			return nil, fmt.Errorf("fields[%d].field: %s has a role already", n, name)
		}
		o.Fields[name] = f.GetRole()
	}
	for _, f := range b.GetAllowFields() {
		o.Allow = append(o.Allow, protoreflect.FullName(f))
	}
	if engine(b.GetDialect()) {
		if len(b.GetModels()) != 1 {
			return nil, errors.New("models: name the model that the engine runs: requests to it name none")
		}
		o.Model = b.GetModels()[0]
	}
	var d *dialect.Dialect
	var err error
	switch b.GetDialect() {
	case configv1.Dialect_DIALECT_TRITON:
		d, err = dialect.Triton(o)
	case configv1.Dialect_DIALECT_MLSERVER:
		d, err = dialect.MLServer(o)
	case configv1.Dialect_DIALECT_KSERVE:
		d, err = dialect.KServe(o)
	case configv1.Dialect_DIALECT_TGIS:
		d, err = dialect.TGIS(o)
	case configv1.Dialect_DIALECT_VLLM:
		d, err = dialect.VLLM(o)
	case configv1.Dialect_DIALECT_SGLANG:
		d, err = dialect.SGLang(o)
	case configv1.Dialect_DIALECT_FIELDS:
		var set *descriptorpb.FileDescriptorSet
		if set, err = descriptors(b.GetDescriptorSet()); err == nil {
			d, err = dialect.Fields(set, o)
		}
	default:
		return nil, errors.New("dialect: say which: DIALECT_TRITON, DIALECT_MLSERVER, DIALECT_KSERVE, DIALECT_TGIS, DIALECT_VLLM, DIALECT_SGLANG or DIALECT_FIELDS")
	}
	if err == nil {
		return d, nil
	}
	// A role that does not fit was given here, or else by an option in the descriptors.
	for n, f := range b.GetFields() {
		if strings.Contains(err.Error(), f.GetField()+":") {
			return nil, fmt.Errorf("fields[%d]: %w", n, err)
		}
	}
	for n, f := range b.GetAllowFields() {
		if strings.Contains(err.Error(), f+":") {
			return nil, fmt.Errorf("allow_fields[%d]: %w", n, err)
		}
	}
	return nil, fmt.Errorf("descriptor_set: %w", err)
}

// descriptors reads a descriptor set.
func descriptors(file string) (*descriptorpb.FileDescriptorSet, error) {
	if file == "" {
		return nil, errors.New("the dialect needs the API's descriptors: buf build -o, or protoc --include_imports --descriptor_set_out")
	}
	text, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	set := new(descriptorpb.FileDescriptorSet)
	if err := proto.Unmarshal(text, set); err != nil || len(set.GetFile()) == 0 {
		return nil, fmt.Errorf("%s holds no descriptor set", path.Base(file))
	}
	return set, nil
}

func set(list []string) map[string]bool {
	if len(list) == 0 {
		return nil
	}
	out := make(map[string]bool, len(list))
	for _, s := range list {
		out[s] = true
	}
	return out
}

func sameList[M proto.Message](a, b []M) bool {
	if len(a) != len(b) {
		return false
	}
	for n := range a {
		if !proto.Equal(a[n], b[n]) {
			return false
		}
	}
	return true
}

// sameSource compares where an identity comes from, not what is done with it.
func sameSource(a, b *configv1.Identity) bool {
	only := func(c *configv1.Identity) *configv1.Identity {
		out := &configv1.Identity{Source: c.GetSource()}
		if c.GetWorkloadApi() != nil && c.GetJwt() != nil {
			out.Jwt = new(configv1.JWTIdentity) // the API is asked for keys only then
		}
		return out
	}
	return proto.Equal(only(a), only(b))
}
