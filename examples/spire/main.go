// Command spire calls an inference server that is behind Sluice, with an
// identity from SPIRE: generated code, gRPC and go-spiffe, nothing of Sluice's.
// README.md says what else has to run.
package main

import (
	"context"
	"flag"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	"github.com/sluicegate/sluice/proto/gen/inference"
)

func main() {
	gateway := flag.String("gateway", "127.0.0.1:18443", "host:port of the gateway")
	server := flag.String("server", "spiffe://example.org/gateway", "the SPIFFE ID that the gateway must prove")
	flag.Parse()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	if err := run(ctx, os.Stdout, *gateway, *server); err != nil {
		fmt.Fprintln(os.Stderr, "client:", err)
		os.Exit(1)
	}
}

// run makes one call. The Workload API is where the environment variable
// SPIFFE_ENDPOINT_SOCKET says; without an identity there it waits for one.
func run(ctx context.Context, out io.Writer, gateway, server string) error {
	expected, err := spiffeid.FromString(server)
	if err != nil {
		return err
	}
	source, err := workloadapi.NewX509Source(ctx)
	if err != nil {
		return err
	}
	defer source.Close()
	conn, err := grpc.NewClient(gateway, grpc.WithTransportCredentials(
		credentials.NewTLS(tlsconfig.MTLSClientConfig(source, source, tlsconfig.AuthorizeID(expected)))))
	if err != nil {
		return err
	}
	defer conn.Close()
	answer, err := inference.NewGRPCInferenceServiceClient(conn).ModelInfer(ctx, &inference.ModelInferRequest{
		ModelName: "echo",
		Inputs: []*inference.ModelInferRequest_InferInputTensor{{
			Name: "text_input", Datatype: "BYTES", Shape: []int64{1},
			Contents: &inference.InferTensorContents{BytesContents: [][]byte{[]byte("Hello from the mesh.")}},
		}},
	})
	if err != nil {
		return err
	}
	svid, err := source.GetX509SVID()
	if err != nil {
		return err
	}
	fmt.Fprintf(out, "%s was answered by %s\n", svid.ID, answer.GetModelName())
	return nil
}
