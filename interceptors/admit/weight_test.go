package admit

import (
	"context"
	"strings"
	"testing"
	"testing/synctest"

	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/encoding/protowire"

	"github.com/sluicegate/sluice/interceptors"
	"github.com/sluicegate/sluice/interceptors/dialect"
	configv1 "github.com/sluicegate/sluice/proto/gen/sluice/config/v1"
)

func TestWeightByTokens(t *testing.T) {
	c := of(10, 10)
	c.Models = []*configv1.PoolModel{{Model: "1", TokensPerPermit: 100, DefaultOutputTokens: 150}}
	for _, test := range []struct {
		name string
		i    *interceptors.Inference
		want int64
	}{
		{"nothing known", &interceptors.Inference{}, 2},
		{"input and output", &interceptors.Inference{InputTokens: 100, MaxOutputTokens: 100}, 2},
		{"rounded up", &interceptors.Inference{InputTokens: 100, MaxOutputTokens: 101}, 3},
		{"at least one", &interceptors.Inference{MaxOutputTokens: 1}, 1},
		{"at most all", &interceptors.Inference{InputTokens: 1 << 62, MaxOutputTokens: 1 << 62}, 10},
		{"the server's own count of the input", &interceptors.Inference{InputTokens: 900, ReportedInput: 50, MaxOutputTokens: 50}, 1},
		{"it writes more than it may", &interceptors.Inference{MaxOutputTokens: 50, OutputTokens: 350}, 4},
	} {
		i := test.i
		i.Model = "1"
		p := policy(t, c)
		v, d := begin(t, p, context.Background(), i, "", "")
		if d != nil || v.permit().weight != test.want {
			t.Errorf("%s: %v, weight %d; want %d", test.name, d, v.permit().weight, test.want)
		}
		v.End(well)
		atRest(t, p)
	}
	bubble("corrected while it runs", t, func(t *testing.T) {
		p := policy(t, c)
		i := &interceptors.Inference{Model: "1", InputTokens: 100, MaxOutputTokens: 200}
		v, _ := begin(t, p, context.Background(), i, "a", "")
		rest := &interceptors.Inference{Model: "1", InputTokens: 400, MaxOutputTokens: 300}
		other, _ := begin(t, p, context.Background(), rest, "a", "")
		next, _ := begin(t, p, context.Background(), &interceptors.Inference{Model: "1", MaxOutputTokens: 100}, "b", "")
		last, _ := begin(t, p, context.Background(), &interceptors.Inference{Model: "1", MaxOutputTokens: 100}, "b", "")
		expect(t, p, 10, 2) // 3 + 7
		respond := func(v *part) {
			t.Helper()
			if err := v.Response(nil); err != nil {
				t.Error(err)
			}
			check(t, p.pools[0])
		}
		i.OutputTokens = 390 // two permits more than it was given
		respond(v)
		expect(t, p, 12, 2)
		rest.ReportedInput = 100 // four less, with what it may write: two of them are owed
		rest.MaxOutputTokens = 200
		respond(other)
		expect(t, p, 10, 0)
		if !last.Ready() {
			t.Error("there is room, and it waits")
		}
		for _, v := range []*part{v, other, next, last} {
			v.End(well)
		}
		atRest(t, p)
	})
}

func TestQueueBytes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d, err := dialect.KServe(dialect.Options{})
		if err != nil {
			t.Fatal(err)
		}
		c := of(1, 10)
		c.QueueBytes = 1000
		p := policy(t, c)
		chain := interceptors.New([]*interceptors.Backend{{Name: "b", Dialect: d}}, p)
		infer := func(id int) (*interceptors.Call, error) {
			call, err := chain.Begin(context.Background(), interceptors.CallInfo{FullMethod: "/inference.GRPCInferenceService/ModelInfer"})
			if err != nil {
				t.Fatal(err)
			}
			raw := protowire.AppendString(protowire.AppendTag(nil, 1, protowire.BytesType), "1")
			raw = protowire.AppendString(protowire.AppendTag(raw, 3, protowire.BytesType), strings.Repeat("x", id))
			e := interceptors.RawEnvelope(mem.BufferSlice{mem.SliceBuffer(raw)})
			defer e.Release()
			_, err = call.Request(e)
			return call, err
		}
		running, err := infer(2000)
		if err != nil {
			t.Fatal(err)
		}
		first, err := infer(600)
		if err != nil {
			t.Error(err)
		}
		if s := p.Snapshot()[0]; s.WaitingBytes != 606 {
			t.Errorf("%d bytes wait", s.WaitingBytes)
		}
		for _, size := range []int{600, 2000} {
			if _, err := infer(size); denial(t, err).Reason != interceptors.QueueFull {
				t.Errorf("%v, want QUEUE_FULL", err)
			}
			expect(t, p, 1, 1)
		}
		small, err := infer(100)
		if err != nil {
			t.Error(err)
		}
		for _, c := range []*interceptors.Call{running, first, small} {
			c.End(nil)
		}
		atRest(t, p)
	})
}
