package admit

import (
	"context"
	"slices"
	"testing"

	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/encoding/protowire"

	"github.com/sluicegate/sluice/interceptors"
	"github.com/sluicegate/sluice/interceptors/dialect"
	"github.com/sluicegate/sluice/interceptors/fields"
)

// watcher is a policy that sees events.
type watcher struct {
	seen  []interceptors.Event
	panic bool
}

func (w *watcher) Name() string { return "watcher" }
func (w *watcher) Begin(*interceptors.Call) (interceptors.CallPolicy, error) {
	return (*watcherCall)(w), nil
}

type watcherCall watcher

func (w *watcherCall) Start(*interceptors.Inference) (interceptors.InferencePolicy, error) {
	return (*watcherInference)(w), nil
}
func (w *watcherCall) End(interceptors.Outcome) {}

type watcherInference watcher

func (w *watcherInference) Request(*fields.Message) error  { return nil }
func (w *watcherInference) Response(*fields.Message) error { return nil }
func (w *watcherInference) End(interceptors.Outcome)       {}
func (w *watcherInference) Observe(e interceptors.Event) {
	w.seen = append(w.seen, e)
	if w.panic {
		panic("in an observer")
	}
}

// In a chain: who queues is announced, and what goes wrong then leaves no one
// in the queue.
func TestQueuedIsToldToObservers(t *testing.T) {
	d, err := dialect.KServe(dialect.Options{})
	if err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		name    string
		panic   bool
		waiting int
	}{{"told", false, 1}, {"told to one that panics", true, 0}} {
		t.Run(test.name, func(t *testing.T) {
			w := &watcher{panic: test.panic}
			p := policy(t, of(1, 1))
			chain := interceptors.New([]*interceptors.Backend{{Name: "b", Dialect: d}}, w, p)
			infer := func() (*interceptors.Call, *interceptors.Inference, error) {
				call, err := chain.Begin(context.Background(), interceptors.CallInfo{FullMethod: "/inference.GRPCInferenceService/ModelInfer"})
				if err != nil {
					t.Fatal(err)
				}
				e := interceptors.RawEnvelope(mem.BufferSlice{mem.SliceBuffer(protowire.AppendString(protowire.AppendTag(nil, 1, protowire.BytesType), "1"))})
				defer e.Release()
				i, err := call.Request(e)
				return call, i, err
			}
			first, i, err := infer()
			if err != nil || !i.Ready() || len(w.seen) != 0 {
				t.Fatalf("%v, ready %t, events %v", err, i.Ready(), w.seen)
			}
			second, i, err := infer()
			if (err != nil) != test.panic {
				t.Errorf("%v, want an error %t", err, test.panic)
			}
			if len(w.seen) != 1 || w.seen[0].Name != "queued" || w.seen[0].Policy != "admit" || !slices.Equal(w.seen[0].Attributes, []string{"pool", "gpu"}) {
				t.Errorf("events %v", w.seen)
			}
			expect(t, p, 1, test.waiting)
			first.End(nil)
			if !test.panic {
				if err := i.Wait(context.Background()); err != nil {
					t.Error(err)
				}
			}
			second.End(nil)
			atRest(t, p)
		})
	}
}
