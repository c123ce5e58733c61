package endpoints

import (
	"context"
	"errors"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/balancer"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/types/known/emptypb"
)

const (
	serverReady = "/inference.GRPCInferenceService/ServerReady"
	// readyInterval is how often a server is asked, and readyTimeout how long it may
	// take. Chosen: as a kubelet does by default, within a few seconds.
	readyInterval = 5 * time.Second
	readyTimeout  = 2 * time.Second
)

// readiness asks one server whether it is ready, on its connection.
type readiness struct{ *endpoint }

// Build implements balancer.ProducerBuilder.
func (r *readiness) Build(conn any) (balancer.Producer, func()) {
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		tick := time.NewTicker(readyInterval)
		defer tick.Stop()
		for {
			state, why := ask(ctx, conn.(grpc.ClientConnInterface))
			if ctx.Err() != nil {
				return
			}
			r.set.turned(r.endpoint, state, why)
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
			}
		}
	}()
	return r, func() { cancel(); <-ended }
}

var errSaysNotReady = errors.New("the server says that it is not ready")

// ask asks once. A server that does not know the question is ready.
func ask(ctx context.Context, conn grpc.ClientConnInterface) (connectivity.State, error) {
	ctx, cancel := context.WithTimeout(ctx, readyTimeout)
	defer cancel()
	var answer emptypb.Empty // ready is field 1; it stays among the unknown fields
	err := conn.Invoke(ctx, serverReady, new(emptypb.Empty), &answer)
	switch {
	case status.Code(err) == codes.Unimplemented:
		return connectivity.Ready, nil
	case err != nil:
		return connectivity.TransientFailure, err
	}
	ready := false
	for b := answer.ProtoReflect().GetUnknown(); len(b) > 0; {
		number, kind, n := protowire.ConsumeTag(b)
		if n < 0 {
			break
		}
		b = b[n:]
		if number == 1 && kind == protowire.VarintType {
			v, _ := protowire.ConsumeVarint(b)
			ready = v != 0
		}
		if n = protowire.ConsumeFieldValue(number, kind, b); n < 0 {
			break
		}
		b = b[n:]
	}
	if !ready {
		return connectivity.TransientFailure, errSaysNotReady
	}
	return connectivity.Ready, nil
}
