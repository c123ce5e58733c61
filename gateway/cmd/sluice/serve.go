package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/sluicegate/sluice/gateway"
	"github.com/sluicegate/sluice/interceptors/config"
	"github.com/sluicegate/sluice/internal/heapfloor"
	configv1 "github.com/sluicegate/sluice/proto/gen/sluice/config/v1"
)

// checkCommand says whether a configuration is good.
func checkCommand(args []string, stdout, stderr io.Writer) int {
	flags := newFlags("check", "--config FILE", stderr,
		"Reads and compiles a configuration without using it. An error names the file, the line and the field.")
	file := flags.String("config", "", "the configuration")
	if code, ok := parse(flags, args, 0); !ok {
		return code
	}
	if *file == "" {
		return usageError(stderr, "check", "--config is missing")
	}
	cfg, err := config.Read(*file)
	if err != nil {
		return fail(stderr, "check", err)
	}
	if err := config.Check(cfg); err != nil {
		return fail(stderr, "check", config.Locate(*file, err))
	}
	fmt.Fprintf(stdout, "%s: good: %d back end(s), %d rule(s), %d budget(s), %d pool(s)\n", *file,
		len(cfg.GetBackends()), len(cfg.GetIdentity().GetRules()), len(cfg.GetBudgets()), len(cfg.GetPools()))
	return 0
}

// serveCommand runs the gateway until SIGINT or SIGTERM. SIGHUP, or a change of
// the file, reloads the configuration.
func serveCommand(args []string, stdout, stderr io.Writer) int {
	flags := newFlags("serve", "--config FILE", stderr,
		"Runs the gateway. SIGHUP, or a change of the file, reloads the configuration; a bad one is logged and the old one\n"+
			"stays. SIGTERM drains: calls in flight may end within listener.drain_timeout. A second signal ends it at once.")
	file := flags.String("config", "", "the configuration")
	if code, ok := parse(flags, args, 0); !ok {
		return code
	}
	if *file == "" {
		return usageError(stderr, "serve", "--config is missing")
	}
	seen := stamp(*file)
	cfg, err := config.Read(*file)
	if err != nil {
		return fail(stderr, "serve", err)
	}
	log := slog.New(slog.NewJSONHandler(stderr, nil))
	if err := serve(cfg, *file, seen, log, stdout); err != nil {
		return fail(stderr, "serve", err)
	}
	return 0
}

func serve(cfg *configv1.Config, file, seen string, log *slog.Logger, stdout io.Writer) error {
	signals := make(chan os.Signal, 2)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM)
	defer signal.Stop(signals)
	hangup := make(chan os.Signal, 1)
	signal.Notify(hangup, syscall.SIGHUP)
	defer signal.Stop(hangup)

	defer heapfloor.Set(gateway.HeapFloor)()
	watch, err := startTelemetry(cfg.GetTelemetry())
	if err != nil {
		return config.Locate(file, err)
	}
	defer watch.stop(log)
	// The wait for an identity ends with the first signal.
	asked, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	g, err := gateway.New(cfg, config.Options{Context: asked, Logger: log, Telemetry: watch.options, Usage: watch.usage})
	if err != nil {
		return config.Locate(file, err)
	}
	defer watch.servers(g)()
	l, err := net.Listen("tcp", cfg.GetListener().GetAddress())
	if err != nil {
		g.Shutdown()
		return config.Locate(file, fmt.Errorf("listener.address: %w", err))
	}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	if a := cfg.GetAdmin(); a != nil {
		admin, err := startAdmin(a.GetAddress(), g, watch.metrics, log)
		if err != nil {
			_ = l.Close()
			g.Shutdown()
			return config.Locate(file, fmt.Errorf("admin.address: %w", err))
		}
		defer admin()
	}
	go reload(ctx, hangup, g, file, seen, log)

	served := make(chan error, 1)
	go func() { served <- g.Serve(l) }()
	log.Info("serving", "address", l.Addr().String())
	_, _ = fmt.Fprintf(stdout, "sluice: serving on %s\n", l.Addr())
	select {
	case err := <-served:
		g.Shutdown()
		return err
	case s := <-signals:
		log.Info("draining", "signal", s.String())
	}
	go func() {
		select {
		case <-signals:
			os.Exit(1)
		case <-ctx.Done():
		}
	}()
	g.Shutdown()
	err = <-served
	log.Info("stopped")
	return err
}

// reload puts a changed configuration in force: on SIGHUP, and when the file's
// time or size changes, looked at every second. What a Kubernetes ConfigMap
// does to a mounted file (a symbolic link is turned) is such a change. seen is
// what the file was like before it was read for the configuration in force.
func reload(ctx context.Context, hangup <-chan os.Signal, g *gateway.Gateway, file, seen string, log *slog.Logger) {
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-hangup:
		case <-tick.C:
			if stamp(file) == seen {
				continue
			}
		}
		seen = stamp(file)
		cfg, err := config.Read(file)
		if err == nil {
			err = config.Locate(file, g.Reload(cfg))
		}
		if err != nil {
			log.Error("the configuration is bad; the old one stays in force", "error", err)
			continue
		}
		log.Info("reloaded", "file", file)
	}
}

func stamp(file string) string {
	info, err := os.Stat(file)
	if err != nil {
		return ""
	}
	return fmt.Sprint(info.ModTime().UnixNano(), info.Size())
}

// startAdmin serves liveness, readiness and metrics over plain HTTP.
func startAdmin(address string, g *gateway.Gateway, metrics http.Handler, log *slog.Logger) (stop func(), err error) {
	l, err := net.Listen("tcp", address)
	if err != nil {
		return nil, err
	}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /livez", func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "ok\n") })
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, _ *http.Request) {
		if err := g.Ready(); err != nil {
			http.Error(w, "not ready: "+err.Error(), http.StatusServiceUnavailable)
			return
		}
		_, _ = io.WriteString(w, "ok\n")
	})
	if metrics != nil {
		mux.Handle("GET /metrics", metrics)
	}
	server := &http.Server{Handler: mux, ReadHeaderTimeout: 5 * time.Second, MaxHeaderBytes: 16 << 10}
	go func() {
		if err := server.Serve(l); !errors.Is(err, http.ErrServerClosed) {
			log.Error("the admin listener ended", "error", err)
		}
	}()
	log.Info("admin", "address", l.Addr().String())
	return func() { _ = server.Close() }, nil
}
