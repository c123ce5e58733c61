package dialect

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/sluicegate/sluice/proto/gen/inference"
	"google.golang.org/protobuf/proto"
)

func seeds(f *testing.F, kind string) {
	files, err := filepath.Glob("testdata/*." + kind + ".*.bin")
	if err != nil || len(files) == 0 {
		f.Fatal("no recorded messages", err)
	}
	for _, name := range files {
		b, err := os.ReadFile(name)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
}

// Whatever a caller sends, a request that is taken can be given an id and asked
// for its end, and the server then reads both.
func FuzzARequestCanBeRenamedAndAskedForItsEnd(f *testing.F) {
	seeds(f, "req")
	for _, p := range []*inference.InferParameter{nil, {}, boolParam(true), boolParam(false), intParam(0), stringParam("true"), doubleParam(1)} {
		b, err := proto.Marshal(&inference.ModelInferRequest{ModelName: "m", Parameters: params{emptyFinal: p}})
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	strict, lenient := method(f, "triton", streaming, Options{}), method(f, "triton", streaming, Options{Lenient: true})
	f.Fuzz(func(t *testing.T, b []byte) {
		for _, m := range []*Method{strict, lenient} {
			msg, err := scan(t, m.Request, b)
			if err != nil {
				continue
			}
			r, err := m.ReadRequest(msg)
			want := new(inference.ModelInferRequest)
			if fail := proto.Unmarshal(b, want); fail != nil {
				t.Fatalf("the scanner took what the decoder refuses: %v", fail)
			}
			if r.Model != want.ModelName || r.ID != want.Id {
				t.Fatalf("read %q %q, the server reads %q %q", r.Model, r.ID, want.ModelName, want.Id)
			}
			if err != nil {
				continue
			}
			m.SetID(msg, &r, "ours")
			m.AskFinal(msg, &r)
			got := new(inference.ModelInferRequest)
			edited(t, msg, got)
			if want.Parameters == nil {
				want.Parameters = make(params)
			}
			want.Id, want.Parameters[emptyFinal] = "ours", boolParam(true)
			if !proto.Equal(got, want) {
				t.Fatalf("got %v, want %v", got, want)
			}
		}
	})
}

func FuzzAResponseIsReadAsTheCallerReadsIt(f *testing.F) {
	seeds(f, "res")
	m := method(f, "triton", streaming, Options{})
	f.Add(m.Refusal("m", "a", "t", "c", "r", 1))
	f.Fuzz(func(t *testing.T, b []byte) {
		msg, err := scan(t, m.Response, b)
		if err != nil {
			return
		}
		r := m.ReadResponse(msg)
		want := new(inference.ModelStreamInferResponse)
		if err := proto.Unmarshal(b, want); err != nil {
			t.Fatalf("the scanner took what the decoder refuses: %v", err)
		}
		flag := want.GetInferResponse().GetParameters()[finalResponse].GetBoolParam()
		if string(r.ID) != want.GetInferResponse().GetId() || r.Failed != (want.ErrorMessage != "") || flag && !r.Final {
			t.Fatalf("got %+v, want %v", r, want)
		}
		if r.InputTokens < 0 || r.OutputTokens < 0 || r.OutputTotal < 0 {
			t.Fatalf("got %+v", r)
		}
	})
}
