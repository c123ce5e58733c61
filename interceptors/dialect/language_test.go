package dialect

import (
	"errors"
	"slices"
	"strings"
	"testing"

	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/reflect/protoreflect"

	"github.com/sluicegate/sluice/interceptors/fields"
)

const (
	tgisGenerate = "/fmaas.GenerationService/Generate"
	vllmGenerate = "/vllm.grpc.engine.VllmEngine/Generate"
)

// bytesField, number and packed encode one field.
func bytesField[T string | []byte](n protowire.Number, v T) []byte {
	return protowire.AppendBytes(protowire.AppendTag(nil, n, protowire.BytesType), []byte(v))
}

func number(n protowire.Number, v uint64) []byte {
	return protowire.AppendVarint(protowire.AppendTag(nil, n, protowire.VarintType), v)
}

func packed(n protowire.Number, ids ...uint64) []byte {
	var b []byte
	for _, id := range ids {
		b = protowire.AppendVarint(b, id)
	}
	return bytesField(n, b)
}

func TestWhatMethodsOfLanguageServersAreFor(t *testing.T) {
	for dialect, want := range map[string]map[string]Kind{
		"tgis": {
			tgisGenerate: Inference, "/fmaas.GenerationService/GenerateStream": Inference,
			"/fmaas.GenerationService/Tokenize": Metadata, "/fmaas.GenerationService/ModelInfo": Metadata,
		},
		"vllm": {
			vllmGenerate: Inference, "/vllm.grpc.engine.VllmEngine/Embed": Inference,
			"/vllm.grpc.engine.VllmEngine/HealthCheck": Health, "/vllm.grpc.engine.VllmEngine/GetModelInfo": Metadata,
			"/vllm.grpc.engine.VllmEngine/Abort": Management, // by ids that others chose
		},
	} {
		d, err := servers[dialect](Options{})
		if err != nil {
			t.Fatal(err)
		}
		for name, m := range d.Methods {
			if kind, ok := want[name]; !ok || m.Kind != kind {
				t.Errorf("%s: %s is of kind %d, want %d (%v)", dialect, name, m.Kind, kind, ok)
			}
		}
		if len(d.Methods) != len(want) {
			t.Errorf("%s: %d methods, want %d", dialect, len(d.Methods), len(want))
		}
	}
}

func TestLimitsHoldForEachAnswer(t *testing.T) {
	prompt := func(s string) []byte { return bytesField(3, bytesField(2, s)) }
	limit := func(n uint64) []byte { return bytesField(10, bytesField(3, number(1, n))) }
	sampling := func(v ...[]byte) []byte { return bytesField(4, slices.Concat(v...)) }
	for _, c := range []struct {
		name, dialect, method string
		message               []byte
		want                  int64
		err                   string
	}{
		{"one prompt", "tgis", tgisGenerate, slices.Concat(prompt("a"), limit(7)), 7, ""},
		{"three prompts, one of them empty", "tgis", tgisGenerate, slices.Concat(prompt("a"), bytesField(3, ""), prompt("c"), limit(7)), 21, ""},
		{"no limit", "tgis", tgisGenerate, prompt("a"), 0, ""},
		{"one answer", "vllm", vllmGenerate, sampling(number(8, 7)), 7, ""},
		{"four answers", "vllm", vllmGenerate, sampling(number(8, 7), number(15, 4)), 28, ""},
		{"as many as it takes", "vllm", vllmGenerate, sampling(number(8, 7), number(15, 4097)), 7, "answers must be from 1 to 4096"},
		{"below nothing", "vllm", vllmGenerate, sampling(number(8, 1<<31)), 0, "limit on output tokens"},
	} {
		t.Run(c.name, func(t *testing.T) {
			m := method(t, c.dialect, c.method, Options{Model: "words"})
			msg, err := scan(t, m.Request, c.message)
			if err != nil {
				t.Fatal(err)
			}
			r, err := m.ReadRequest(msg)
			if r.MaxTokens != c.want {
				t.Errorf("the limit is %d, want %d", r.MaxTokens, c.want)
			}
			if (err != nil) != (c.err != "") || err != nil && !strings.Contains(err.Error(), c.err) {
				t.Errorf("the error is %v, want %q", err, c.err)
			}
		})
	}
}

func TestAnEngineIsNotSentElsewhere(t *testing.T) {
	for name, message := range map[string][]byte{
		"kv_transfer_params":      bytesField(6, bytesField(1, "10.0.0.1")),
		"kv_transfer_params_json": bytesField(8, `{"remote_host":"10.0.0.1"}`),
		"media_refs":              bytesField(10, bytesField(1, bytesField(2, "http://169.254.169.254/"))),
		"mm_inputs":               bytesField(7, ""),
		"extra_mm_inputs":         bytesField(11, bytesField(6, "hash")),
	} {
		t.Run(name, func(t *testing.T) {
			full := protoreflect.FullName("vllm.grpc.engine.GenerateRequest." + name)
			for _, allow := range [][]protoreflect.FullName{nil, {full}} {
				m := method(t, "vllm", vllmGenerate, Options{Model: "words", Allow: allow})
				msg, err := scan(t, m.Request, message)
				if err != nil {
					t.Fatal(err)
				}
				_, err = m.ReadRequest(msg)
				var fe *fields.Error
				if refused := errors.As(err, &fe) && fe.Kind == fields.Uninspectable && fe.Path == name; refused == (allow != nil) {
					t.Errorf("allowed %v: got %v", allow, err)
				}
			}
		})
	}
	if _, err := VLLM(Options{Allow: []protoreflect.FullName{"vllm.grpc.engine.GenerateRequest.nothing"}}); err == nil {
		t.Error("a field that there is not was allowed")
	}
}

func TestHandlesStayForbiddenInWhatIsAllowed(t *testing.T) {
	m := method(t, "vllm", vllmGenerate, Options{Model: "words", Allow: []protoreflect.FullName{"vllm.grpc.engine.GenerateRequest.mm_inputs"}})
	pixels := func(data []byte) []byte { return bytesField(7, bytesField(2, data)) }
	for name, c := range map[string]struct {
		message []byte
		path    string
	}{
		"in the message":   {pixels(bytesField(1, "pixels")), ""},
		"in shared memory": {pixels(bytesField(4, bytesField(1, "psm_1"))), "mm_inputs.pixel_values.shm"},
		"on another host":  {pixels(bytesField(5, bytesField(1, "nixl"))), "mm_inputs.pixel_values.remote"},
	} {
		t.Run(name, func(t *testing.T) {
			msg, err := scan(t, m.Request, c.message)
			if err != nil {
				t.Fatal(err)
			}
			_, err = m.ReadRequest(msg)
			var fe *fields.Error
			if errors.As(err, &fe); (fe == nil) != (c.path == "") || fe != nil && fe.Path != c.path {
				t.Errorf("got %v, want a refusal of %q", err, c.path)
			}
		})
	}
}

func TestTokenIDsAreRead(t *testing.T) {
	m := method(t, "vllm", vllmGenerate, Options{Model: "words"})
	msg, err := scan(t, m.Request, bytesField(2, packed(2, 1, 70000, 5)))
	if err != nil {
		t.Fatal(err)
	}
	r, err := m.ReadRequest(msg)
	if err != nil || r.PromptIDs < 0 {
		t.Fatalf("%+v, %v: no ids", r, err)
	}
	f := &msg.Fields[r.PromptIDs]
	if got := msg.IDs(nil, f); !slices.Equal(got, []int64{1, 70000, 5}) {
		t.Errorf("the ids are %v", got)
	}
	if n, _ := msg.Int(f); n != 3 {
		t.Errorf("there are %d ids, want 3", n)
	}
}

func TestAnswersAreToldApart(t *testing.T) {
	m := method(t, "vllm", vllmGenerate, Options{Model: "words"})
	chunk := bytesField(1, slices.Concat(packed(1, 4, 5), number(2, 9), number(3, 6), number(7, 3)))
	msg, err := scan(t, m.Response, chunk)
	if err != nil {
		t.Fatal(err)
	}
	if got := m.ReadResponse(msg); got.Choice != 3 || got.IDs != 2 || got.OutputTotal != 6 || got.InputTokens != 9 {
		t.Errorf("got %+v", got)
	}
}
