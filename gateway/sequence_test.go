package gateway

import (
	"context"
	"fmt"
	"sync"
	"testing"

	"google.golang.org/grpc"

	"github.com/sluicegate/sluice/proto/gen/inference"
)

// What belongs to a sequence goes to one server, by whatever kind of call.
func TestSequencesStay(t *testing.T) {
	const servers, sequences = 3, 12
	var mu sync.Mutex
	at := make(map[string]map[int]bool) // sequence, servers
	var addresses []string
	var running []*grpc.Server
	for n := range servers {
		s := grpc.NewServer()
		inference.RegisterGRPCInferenceServiceServer(s, &sequenced{seen: func(id string) {
			mu.Lock()
			defer mu.Unlock()
			if at[id] == nil {
				at[id] = make(map[int]bool)
			}
			at[id][n] = true
		}})
		running = append(running, s)
		addresses = append(addresses, serve(t, s))
	}
	g := open(t, several("", addresses...))
	g.pool.abandoned = true
	c := g.client()
	for round := range 4 {
		for id := range sequences {
			r := ask("m", "", "hello", number("sequence_id", int64(id+1)))
			if round%2 == 0 {
				if _, err := c.ModelInfer(ctx(t), r); err != nil {
					t.Fatal(err)
				}
				continue
			}
			s, err := c.ModelStreamInfer(ctx(t))
			if err == nil {
				err = s.Send(r)
			}
			if err == nil {
				err = s.CloseSend()
			}
			if err == nil {
				_, err = drainStream(s)
			}
			if err != nil {
				t.Fatal(err)
			}
		}
	}
	used := make(map[int]bool)
	of := make(map[int]int64) // a sequence of each server
	for id := range int64(sequences) {
		places := at[fmt.Sprint(id+1)]
		if len(places) != 1 {
			t.Errorf("sequence %d was at %v", id+1, places)
		}
		for n := range places {
			used[n], of[n] = true, id+1
		}
	}
	if len(used) < 2 {
		t.Fatalf("only %v were used", used)
	}

	// A stream stays on its server, so that another server's sequence has no place on it.
	var homes []int
	for n := range of {
		homes = append(homes, n)
	}
	s, err := c.ModelStreamInfer(ctx(t))
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range homes[:2] {
		if err := s.Send(ask("m", "", "hello", number("sequence_id", of[n]))); err != nil {
			t.Fatal(err)
		}
	}
	_, err = drainStream(s)
	expect(t, "a sequence of another server", err, "InvalidArgument ROUTE_CONFLICT")

	// A server's end is the end of its sequences; what begins then begins elsewhere.
	running[homes[0]].Stop()
	g.ready(servers - 1)
	lost := ask("m", "", "hello", number("sequence_id", of[homes[0]]))
	g.eventually("the server is given up", func() bool {
		_, err := c.ModelInfer(ctx(t), lost)
		return reasonOf(err) == "Unavailable SEQUENCE_LOST"
	})
	if _, err := c.ModelInfer(ctx(t), lost); err != nil {
		t.Errorf("begun anew: %v", err)
	}
	g.unloaded()
}

// sequenced answers, and tells of the sequences that it sees.
type sequenced struct {
	inference.UnimplementedGRPCInferenceServiceServer
	seen func(id string)
}

func (s *sequenced) ModelInfer(_ context.Context, r *inference.ModelInferRequest) (*inference.ModelInferResponse, error) {
	s.seen(fmt.Sprint(r.GetParameters()["sequence_id"].GetInt64Param()))
	return reply(r.GetModelName(), r.GetId(), "hello"), nil
}

func (s *sequenced) ModelStreamInfer(ss inference.GRPCInferenceService_ModelStreamInferServer) error {
	for {
		r, err := ss.Recv()
		if err != nil {
			return nil
		}
		m, _ := s.ModelInfer(ss.Context(), r)
		if err := ss.Send(&inference.ModelStreamInferResponse{InferResponse: m}); err != nil {
			return err
		}
	}
}
