package gateway

import (
	"context"
	"fmt"
	"sync"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"

	"github.com/sluicegate/sluice/interceptors/config"
	"github.com/sluicegate/sluice/interceptors/identity"
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

// Two callers' sequences of one name have nothing to do with one another: that one is
// lost is told to each.
func TestSequencesAreTheCallers(t *testing.T) {
	source := identities(t)
	var addresses []string
	var running []*grpc.Server
	var mu sync.Mutex
	last := -1 // the server that was asked last
	for n := range 2 {
		s := grpc.NewServer()
		inference.RegisterGRPCInferenceServiceServer(s, &sequenced{seen: func(string) {
			mu.Lock()
			defer mu.Unlock()
			last = n
		}})
		running = append(running, s)
		addresses = append(addresses, serve(t, s))
	}
	g := openWith(t, fmt.Sprintf(`
identity: {development: {trust_domain: gate.test}, rules: [{principals: ["spiffe://gate.test/*"], methods: [inference], models: ["*"]}]}
backends: [{name: model, dialect: DIALECT_TRITON, plaintext: true, addresses: ["%s", "%s"]}]
`, addresses[0], addresses[1]), config.Options{Source: source("/gateway")})
	as := func(who string) func(id int64) error {
		c := g.client(grpc.WithTransportCredentials(identity.ClientCredentials(source(who), spiffeid.MatchAny(), nil)))
		return func(id int64) error {
			_, err := c.ModelInfer(ctx(t), ask("m", "", "hello", number("sequence_id", id)))
			return err
		}
	}
	alice, bob := as("/alice"), as("/bob")
	if err := alice(1000); err != nil { // now it is connecting
		t.Fatal(err)
	}
	g.ready(2)
	var shared int64 // a name whose sequences are at the same server, by chance
	apart := false
	for id := int64(1); shared == 0 || !apart; id++ {
		if id > 100 {
			t.Fatal("no name is at one server for both, or all are")
		}
		var at [2]int
		for n, call := range []func(int64) error{alice, bob} {
			if err := call(id); err != nil {
				t.Fatal(err)
			}
			mu.Lock()
			at[n] = last
			mu.Unlock()
		}
		switch {
		case at[0] != at[1]:
			apart = true
		case at[0] == 0:
			shared = id
		}
	}
	running[0].Stop()
	g.ready(1)
	for who, call := range map[string]func(int64) error{"alice": alice, "bob": bob} {
		g.eventually(who+" is told", func() bool { return reasonOf(call(shared)) == "Unavailable SEQUENCE_LOST" })
		expect(t, who+", begun anew", call(shared), "OK")
	}
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
