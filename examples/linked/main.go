// Command linked is a Go model server that guards itself: Sluice's chain is
// linked into it, and there is no gateway.
package main

import (
	"context"
	"flag"
	"log"
	"net"
	"os"
	"os/signal"

	"google.golang.org/grpc"

	"github.com/sluicegate/sluice/interceptors/config"
	"github.com/sluicegate/sluice/proto/gen/inference"
	"github.com/sluicegate/sluice/test/model"
)

func main() {
	file := flag.String("config", "sluice.yaml", "the configuration of the chain")
	listen := flag.String("listen", "127.0.0.1:8443", "host:port")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	l, err := net.Listen("tcp", *listen)
	if err != nil {
		log.Fatal(err)
	}
	log.Printf("serving on %s", l.Addr())
	if err := serve(ctx, l, *file); err != nil {
		log.Fatal(err)
	}
}

// serve serves until the context ends. The first two statements are all that
// Sluice needs.
func serve(ctx context.Context, l net.Listener, file string) error {
	guard, err := config.Load(file, config.Options{})
	if err != nil {
		return err
	}
	defer guard.Close()
	server := grpc.NewServer(guard.ServerOptions()...)

	// Your model in place of this one.
	inference.RegisterGRPCInferenceServiceServer(server, model.New(model.Options{}))
	defer context.AfterFunc(ctx, server.GracefulStop)()
	return server.Serve(l)
}
