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
	sgGenerate   = "/sglang.grpc.scheduler.SglangScheduler/Generate"
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
		"sglang": {
			sgGenerate: Inference, "/sglang.grpc.scheduler.SglangScheduler/Embed": Inference,
			"/sglang.grpc.scheduler.SglangScheduler/HealthCheck": Health, "/sglang.grpc.scheduler.SglangScheduler/GetModelInfo": Metadata,
			"/sglang.grpc.scheduler.SglangScheduler/Abort": Management,
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
		{"one answer of SGLang's", "sglang", sgGenerate, sampling(number(8, 7)), 7, ""},
		{"four answers of SGLang's", "sglang", sgGenerate, sampling(number(8, 7), number(17, 4)), 28, ""},
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
	vllm := protoreflect.FullName("vllm.grpc.engine.GenerateRequest")
	sglang, embed := protoreflect.FullName("sglang.grpc.scheduler.GenerateRequest"), protoreflect.FullName("sglang.grpc.scheduler.EmbedRequest")
	for _, c := range []struct {
		dialect, method string
		in              protoreflect.FullName
		path            string
		message         []byte
	}{
		{"vllm", vllmGenerate, vllm, "kv_transfer_params", bytesField(6, bytesField(1, "10.0.0.1"))},
		{"vllm", vllmGenerate, vllm, "kv_transfer_params_json", bytesField(8, `{"remote_host":"10.0.0.1"}`)},
		{"vllm", vllmGenerate, vllm, "media_refs", bytesField(10, bytesField(1, bytesField(2, "http://169.254.169.254/")))},
		{"vllm", vllmGenerate, vllm, "mm_inputs", bytesField(7, "")},
		{"vllm", vllmGenerate, vllm, "extra_mm_inputs", bytesField(11, bytesField(6, "hash"))},
		{"sglang", sgGenerate, sglang, "mm_inputs", bytesField(3, "")},
		{"sglang", sgGenerate, sglang, "disaggregated_params", bytesField(10, bytesField(1, "10.0.0.1"))},
		{"sglang", sgGenerate, sglang, "custom_logit_processor", bytesField(11, "80049528")},
		{"sglang", sgGenerate, sglang, "input_embeds", bytesField(14, "\x00\x00\x80\x3f")},
		{"sglang", sgGenerate, sglang, "input_embeds", protowire.AppendFixed32(protowire.AppendTag(nil, 14, protowire.Fixed32Type), 1)},
		{"sglang", sgGenerate, "sglang.grpc.scheduler.SamplingParams", "sampling_params.custom_params", bytesField(4, bytesField(23, ""))},
		{"sglang", "/sglang.grpc.scheduler.SglangScheduler/Embed", embed, "mm_inputs", bytesField(4, "")},
	} {
		t.Run(c.dialect+"/"+c.path, func(t *testing.T) {
			name := c.path
			full := c.in.Append(protoreflect.Name(c.path[strings.LastIndexByte(c.path, '.')+1:]))
			for _, allow := range [][]protoreflect.FullName{nil, {full}} {
				m := method(t, c.dialect, c.method, Options{Model: "words", Allow: allow, Lenient: true})
				msg, err := scan(t, m.Request, c.message)
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

func TestURLsStayForbiddenInWhatIsAllowed(t *testing.T) {
	m := method(t, "sglang", sgGenerate, Options{Model: "words", Allow: []protoreflect.FullName{"sglang.grpc.scheduler.GenerateRequest.mm_inputs"}})
	for path, field := range map[string][]byte{"": bytesField(5, "pixels"), "mm_inputs.image_urls": bytesField(1, "file:///etc/passwd"),
		"mm_inputs.video_urls": bytesField(2, "http://169.254.169.254/"), "mm_inputs.audio_urls": bytesField(3, "http://10.0.0.1/")} {
		msg, err := scan(t, m.Request, bytesField(3, field))
		if err != nil {
			t.Fatal(err)
		}
		_, err = m.ReadRequest(msg)
		var fe *fields.Error
		if errors.As(err, &fe); (fe == nil) != (path == "") || fe != nil && fe.Path != path {
			t.Errorf("got %v, want a refusal of %q", err, path)
		}
	}
}

func TestTokenIDsAreRead(t *testing.T) {
	for dialect, name := range map[string]string{"vllm": vllmGenerate, "sglang": sgGenerate} {
		t.Run(dialect, func(t *testing.T) { tokenIDsAreRead(t, dialect, name) })
	}
}

func tokenIDsAreRead(t *testing.T, dialect, name string) {
	m := method(t, dialect, name, Options{Model: "words"})
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
	for _, c := range []struct {
		dialect, method string
		chunk           []byte
	}{
		{"vllm", vllmGenerate, bytesField(1, slices.Concat(packed(1, 4, 5), number(2, 9), number(3, 6), number(7, 3)))},
		{"sglang", sgGenerate, slices.Concat(bytesField(1, "r"), bytesField(2, slices.Concat(packed(1, 4, 5), number(2, 9), number(3, 6), number(8, 3))))},
		{"sglang", sgGenerate, bytesField(3, slices.Concat(packed(1, 4, 5), number(3, 9), number(4, 6), number(11, 3)))},
	} {
		m := method(t, c.dialect, c.method, Options{Model: "words"})
		msg, err := scan(t, m.Response, c.chunk)
		if err != nil {
			t.Fatal(err)
		}
		if got := m.ReadResponse(msg); got.Choice != 3 || got.IDs+got.IDsTotal != 2 || got.OutputTotal != 6 || got.InputTokens != 9 {
			t.Errorf("%s: got %+v", c.dialect, got)
		}
	}
}
