package config

import (
	"errors"
	"fmt"
	"slices"

	"github.com/sluicegate/sluice/interceptors/inspect"
	configv1 "github.com/sluicegate/sluice/proto/gen/sluice/config/v1"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"
)

// newInspect makes the inspection policy, with the guard model's back end if it has one.
// What is known of a guard model goes on if nothing of it changes.
func (g *Guard) newInspect(before *Guard) (*inspect.Policy, error) {
	cfg := g.config.GetInspect()
	if cfg.GetGuard() == nil {
		return inspect.New(cfg, "")
	}
	at := guardBackend(g.config)
	if at < 0 {
		return nil, fmt.Errorf("inspect.guard.backend: there is no back end named %q in backends", cfg.GetGuard().GetBackend())
	}
	opts := []inspect.Option{inspect.WithGuardDialect(g.backends[at].Dialect)}
	if was := guardBackend(before.config); was >= 0 && before.inspect != nil &&
		proto.Equal(before.config.GetBackends()[was], g.config.GetBackends()[at]) {
		opts = append(opts, inspect.WithBefore(before.inspect))
	}
	return inspect.New(cfg, "", opts...)
}

// guardBackend is the place of the guard model's back end in a configuration; -1 if
// there is none.
func guardBackend(cfg *configv1.Config) int {
	if cfg.GetInspect().GetGuard() == nil {
		return -1
	}
	return slices.IndexFunc(cfg.GetBackends(), func(b *configv1.Backend) bool {
		return b.GetName() == cfg.GetInspect().GetGuard().GetBackend()
	})
}

// GuardModel is the place of the guard model's back end in Backends; -1 if there is none.
func (g *Guard) GuardModel() int { return guardBackend(g.config) }

// ConnectGuardModel gives the connection by which the guard model is asked. It must prove
// that it leads to the back end that the configuration names, and not pass this chain.
func (g *Guard) ConnectGuardModel(cc grpc.ClientConnInterface) {
	g.inspect.Connect(g.watcher.Client(cc))
}

var errNoGuardModel = errors.New("inspect.guard.backend: a linked chain is given the connection to it; set config.Options.GuardModel")
