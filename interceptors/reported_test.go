package interceptors

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"math"
	"testing"

	"github.com/sluicegate/sluice/proto/gen/inference"
	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/encoding/protowire"
)

// At every door, what a model server says in a trailer is known when the inference ends: of
// calls with one, not of a stream that carries many.
func TestUsageIsReportedAtEveryDoor(t *testing.T) {
	said := metadata.Pairs("x-in", "20", "x-out", "30")
	m := &model{
		unary: func(ctx context.Context, r *inference.ModelInferRequest) (*inference.ModelInferResponse, error) {
			return echo(ctx, r)
		},
		stream: func(ss grpc.ServerStream) error {
			r := new(inference.ModelInferRequest)
			if err := ss.RecvMsg(r); err != nil {
				return err
			}
			ss.SetTrailer(said)
			return ss.SendMsg(answer(r.Id, "one"))
		},
	}
	unary := m.unary
	m.unary = func(ctx context.Context, r *inference.ModelInferRequest) (*inference.ModelInferResponse, error) {
		_ = grpc.SetTrailer(ctx, said)
		return unary(ctx, r)
	}
	for door, dial := range map[string]func(*testing.T, *Chain, *model) *grpc.ClientConn{"server": guarded, "client": guarding} {
		for _, kind := range []string{"unary", "stream of one", "stream of many", "unary, not asked for"} {
			t.Run(door+"/"+kind, func(t *testing.T) {
				var ended [2]int64
				b := triton(t)
				if kind == "stream of one" {
					b = oracle(t)
				}
				if b.Usage = (Usage{Input: "x-in", Output: "x-out"}); kind == "unary, not asked for" {
					b.Usage = Usage{}
				}
				over := make(chan struct{}, 1)
				p := &scripted{name: "p", journal: new(journal), end: func(i *Inference) {
					ended = [2]int64{i.ReportedInput, i.ReportedOutput}
					over <- struct{}{}
				}}
				conn := dial(t, New([]*Backend{b}, p), m)
				want := [2]int64{20, 30}
				switch kind {
				case "stream of one":
					s := open(t, conn, serverStream1, &grpc.StreamDesc{ServerStreams: true})
					s.send(ask("m", "a", "x"))
					s.halfClose()
					out := new(inference.ModelInferResponse)
					if err := errors.Join(s.RecvMsg(out)); err != nil {
						t.Fatal(err)
					}
					if err := s.RecvMsg(out); !errors.Is(err, io.EOF) {
						t.Fatal(err)
					}
				case "stream of many":
					want = [2]int64{}
					s := open(t, conn, modelStreamInfer, bidi)
					s.send(ask("m", "a", "x"))
					s.halfClose()
					for _, err := s.receive(); err == nil; _, err = s.receive() {
					}
				default:
					if err := conn.Invoke(t.Context(), modelInfer, ask("m", "a", "x"), new(inference.ModelInferResponse)); err != nil {
						t.Fatal(err)
					}
					if kind != "unary" {
						want = [2]int64{}
					}
				}
				<-over
				if ended != want {
					t.Errorf("reported %v when it ended, want %v", ended, want)
				}
			})
		}
	}
}

// orcaEntry is an entry of a map of an ORCA report.
func orcaEntry(field protowire.Number, name string, v float64) []byte {
	e := protowire.AppendString(protowire.AppendTag(nil, 1, protowire.BytesType), name)
	e = binary.LittleEndian.AppendUint64(protowire.AppendTag(e, 2, protowire.Fixed64Type), math.Float64bits(v))
	return protowire.AppendBytes(protowire.AppendTag(nil, field, protowire.BytesType), e)
}

func TestReportsOfUsage(t *testing.T) {
	u := Usage{Input: "in", Output: "out"}
	for name, test := range map[string]struct {
		u             Usage
		md            metadata.MD
		input, output int64
	}{
		"numbers":              {u, metadata.Pairs("in", "3", "out", "4"), 3, 4},
		"capitals":             {Usage{"X-In", "X-Out"}, metadata.Pairs("x-in", "3", "x-out", "4"), 3, 4},
		"one name for both":    {Usage{"n", "n"}, metadata.Pairs("n", "3"), 3, 3},
		"the largest":          {u, metadata.Pairs("out", "3", "out", "7", "out", "5"), 0, 7},
		"too large to be true": {u, metadata.Pairs("out", "9007199254740993"), 0, 0},
		"not a number":         {u, metadata.Pairs("out", "0x10", "in", "1e3"), 0, 0},
		"no names":             {Usage{}, metadata.Pairs("", "3"), 0, 0},
		"cost":                 {u, metadata.Pairs(orcaKey, string(orcaEntry(orcaCosts, "out", 4))), 0, 4},
		"a fraction counts up": {u, metadata.Pairs(orcaKey, string(orcaEntry(orcaNamed, "in", 4.25))), 5, 0},
		"utilization is none":  {u, metadata.Pairs(orcaKey, string(orcaEntry(5, "out", 4))), 0, 0},
		"infinite":             {u, metadata.Pairs(orcaKey, string(orcaEntry(orcaNamed, "out", math.Inf(1)))), 0, 0},
		"not any number":       {u, metadata.Pairs(orcaKey, string(orcaEntry(orcaNamed, "out", math.NaN()))), 0, 0},
		"below zero":           {u, metadata.Pairs(orcaKey, string(orcaEntry(orcaNamed, "out", -1))), 0, 0},
		"broken after it":      {u, metadata.Pairs(orcaKey, string(orcaEntry(orcaNamed, "out", 4))+"\xff"), 0, 4},
	} {
		t.Run(name, func(t *testing.T) {
			if input, output := test.u.read(test.md); input != test.input || output != test.output {
				t.Errorf("%d and %d, want %d and %d", input, output, test.input, test.output)
			}
		})
	}
}

func FuzzReportsOfUsage(f *testing.F) {
	f.Add("3", orcaEntry(orcaNamed, "out", 4))
	f.Add("-3", []byte("\x42\x05\x0a\x03out"))
	f.Fuzz(func(t *testing.T, text string, report []byte) {
		in, out := Usage{Input: "in", Output: "out"}.read(metadata.MD{"in": {text}, orcaKey: {string(report)}})
		if min(in, out) < 0 || max(in, out) > maxReported {
			t.Errorf("%d and %d", in, out)
		}
	})
}
