package main

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// wire are the recorded messages, with what the official decoder finds in them.
const wire = "../../../interceptors/fields/testdata/wire"

type recorded struct {
	Case, Direction, Type, File string
	Size, Ramp                  int
	Unparsable, Problem         bool
	Texts                       []struct {
		Path, Hex, SHA256 string
		Text              *string
	}
}

func recordings(t *testing.T) (all []recorded) {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(wire, "manifest.json"))
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(text, &all); err != nil {
		t.Fatal(err)
	}
	return all
}

// message is the recorded message. Large tensors are a ramp that is worked out.
func (r recorded) message(t *testing.T) []byte {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(wire, r.File))
	if err != nil {
		t.Fatal(err)
	}
	for i := range r.Ramp {
		b = binary.LittleEndian.AppendUint32(b, math.Float32bits(float32(i%1021)/8))
	}
	if len(b) != r.Size {
		t.Fatalf("%s has %d bytes, want %d", r.File, len(b), r.Size)
	}
	return b
}

// flags are those that tell sluice scan what the message is.
func (r recorded) flags() []string {
	method, dialect := "ModelInfer", "triton"
	switch {
	case strings.HasPrefix(r.Case, "ml_"):
		dialect = "mlserver"
		if strings.HasPrefix(r.Case, "ml_stream") {
			method = "ModelStreamInfer"
		}
	case strings.HasPrefix(r.Case, "ks_"):
		dialect = "kserve"
	case r.Type == "inference.ModelStreamInferResponse":
		method = "ModelStreamInfer"
	}
	flags := []string{"--dialect", dialect, "--method", "/inference.GRPCInferenceService/" + method}
	if r.Direction == "response" {
		flags = append(flags, "--response")
	}
	return flags
}

// scanned runs sluice scan on a message, and reads what it prints.
func scanned(t *testing.T, message []byte, flags ...string) (lines []found, status int, errs string) {
	t.Helper()
	var out, bad bytes.Buffer
	status = run(append(append([]string{"scan"}, flags...), "-"), bytes.NewReader(message), &out, &bad)
	for line := range strings.Lines(out.String()) {
		var f found
		if err := json.Unmarshal([]byte(line), &f); err != nil {
			t.Fatal(err)
		}
		lines = append(lines, f)
	}
	return lines, status, bad.String()
}

func unhex(t *testing.T, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(s)
	if err != nil {
		t.Error(err)
	}
	return b
}

func TestScanFindsWhatTheDecoderFinds(t *testing.T) {
	for _, r := range recordings(t) {
		t.Run(r.Case+"/"+r.File, func(t *testing.T) {
			lines, rc, errs := scanned(t, r.message(t), r.flags()...)
			if r.Unparsable {
				if rc != 1 || len(lines) != 0 || errs == "" {
					t.Fatalf("exit status %d, %d lines, %q; want 1, none, and why", rc, len(lines), errs)
				}
				return
			}
			if rc != 0 {
				t.Fatalf("exit status %d: %s", rc, errs)
			}
			var got, want []string
			for _, l := range lines {
				switch {
				case l.Shadowed:
				case l.Text != nil:
					got = append(got, fmt.Sprintf("%s %x", l.Path, sha256.Sum256([]byte(*l.Text))))
				default:
					got = append(got, fmt.Sprintf("%s %x", l.Path, sha256.Sum256(unhex(t, *l.Hex))))
				}
			}
			for _, x := range r.Texts {
				switch {
				case r.Case == "extra_raw_contents" && x.Path == "raw_input_contents": // no tensor's: shadowed
				case x.Text != nil:
					want = append(want, fmt.Sprintf("%s %x", x.Path, sha256.Sum256([]byte(*x.Text))))
				case x.SHA256 != "":
					want = append(want, x.Path+" "+x.SHA256)
				default:
					want = append(want, fmt.Sprintf("%s %x", x.Path, sha256.Sum256(unhex(t, x.Hex))))
				}
			}
			slices.Sort(got) // the manifest is in the decoder's order, the scan in the wire's
			slices.Sort(want)
			if !slices.Equal(got, want) {
				t.Errorf("texts are\n%q\nwant\n%q", got, want)
			}
		})
	}
}

// What decoders may read differently is refused by --strict, and only that.
func TestScanStrict(t *testing.T) {
	refused := []string{
		"error_raw_and_typed", "error_length_past_the_end", "error_trailing_bytes", "error_fewer_raw_than_inputs", "extra_raw_contents",
		"wire_model_name_twice", "wire_contents_split", "wire_unknown_fields", "wire_shape_unpacked", "wire_overlong_varints",
		"wire_name_twice_in_tensor", "wire_truncated", "wire_unknown_group", "wire_invalid_utf8_id", "wire_duplicate_parameter",
	}
	for _, r := range recordings(t) {
		t.Run(r.Case+"/"+r.File, func(t *testing.T) {
			want := 0
			if r.Direction == "request" && slices.Contains(refused, r.Case) {
				want = 1
			}
			lines, rc, errs := scanned(t, r.message(t), append(r.flags(), "--strict")...)
			if rc != want || (rc == 1) != (errs != "") || rc == 1 && len(lines) > 0 {
				t.Errorf("exit status %d with %d lines, %q; want %d", rc, len(lines), errs, want)
			}
		})
	}
}

// field is a protobuf field of a wire type 2, and one of number and value.
func field(number byte, value string) string {
	return string([]byte{number<<3 | 2, byte(len(value))}) + value
}

func TestScanLines(t *testing.T) {
	unary := []string{"--method", "/inference.GRPCInferenceService/ModelInfer"}
	// model_name twice, id, a BYTES tensor with text and with what is none, and a parameter.
	tensor := field(1, "t") + field(2, "BYTES") + field(3, "\x02") + field(5, field(8, "hello <b>")+field(8, "\xff\x00"))
	parameter := field(4, field(1, "max_tokens")+field(2, "\x10\x07"))
	message := field(1, "a") + field(1, "b") + field(3, "7") + parameter + field(5, tensor)
	tests := []struct {
		name, message string
		flags         []string
		want          string
	}{
		{"texts", message, nil, `{"role":"prompt","path":"inputs.t","text":"hello <b>"}
{"role":"prompt","path":"inputs.t","hex":"ff00"}
`},
		{"all", message, []string{"--all"}, `{"role":"model","path":"model_name","text":"a","shadowed":true}
{"role":"model","path":"model_name","text":"b"}
{"role":"request_id","path":"id","text":"7"}
{"role":"identifier","path":"parameters.max_tokens","text":"max_tokens"}
{"role":"parameter","path":"parameters.max_tokens","value":7}
{"role":"identifier","path":"inputs.t.name","text":"t"}
{"role":"identifier","path":"inputs.t.datatype","text":"BYTES"}
{"role":"prompt","path":"inputs.t","text":"hello <b>"}
{"role":"prompt","path":"inputs.t","hex":"ff00"}
`},
		{"a parameter twice", field(4, field(1, "p")+field(2, field(3, "x"))) + field(4, field(1, "p")+field(2, field(3, "y"))), nil,
			`{"role":"parameter","path":"parameters.p","text":"x","shadowed":true}
{"role":"parameter","path":"parameters.p","text":"y"}
`},
		{"nothing", "", nil, ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			var out, errs bytes.Buffer
			args := append(append([]string{"scan"}, unary...), tt.flags...)
			if rc := run(append(args, "-"), strings.NewReader(tt.message), &out, &errs); rc != 0 {
				t.Fatalf("exit status %d: %s", rc, &errs)
			}
			if out.String() != tt.want {
				t.Errorf("from standard input\n%s\nwant\n%s", &out, tt.want)
			}
			file := filepath.Join(t.TempDir(), "message.bin")
			if err := os.WriteFile(file, []byte(tt.message), 0o600); err != nil {
				t.Fatal(err)
			}
			out.Reset()
			if rc := run(append(args, file), nil, &out, &errs); rc != 0 || out.String() != tt.want {
				t.Errorf("from a file: exit status %d\n%s", rc, &out)
			}
		})
	}
}

func TestScanOfAnOwnProto(t *testing.T) {
	message := field(1, "oracle") + field(2, "When?")
	lines, rc, errs := scanned(t, []byte(message), "--dialect", "fields", "--descriptors", "../../../examples/yourproto/llm.binpb",
		"--method", "/acme.llm.v1.AssistantService/Ask")
	if rc != 0 || len(lines) != 1 || lines[0].Role != "prompt" || lines[0].Path != "question" || *lines[0].Text != "When?" {
		t.Errorf("exit status %d, %+v, %s", rc, lines, errs)
	}
}

func TestScanUsage(t *testing.T) {
	const method = "/inference.GRPCInferenceService/ModelInfer"
	tests := []struct {
		name string
		args []string
		rc   int
		want string
	}{
		{"help", []string{"--help"}, 0, "usage: sluice scan"},
		{"no file", []string{"--method", method}, 2, "want 1 argument(s), have 0"},
		{"two files", []string{"--method", method, "a", "b"}, 2, "want 1 argument(s), have 2"},
		{"no method", []string{"-"}, 2, `no method ""`},
		{"unknown method", []string{"--method", "/a.B/C", "-"}, 2, `no method "/a.B/C"`},
		{"unknown dialect", []string{"--dialect", "riva", "--method", method, "-"}, 2, `no dialect "riva"`},
		{"unspecified dialect", []string{"--dialect", "unspecified", "--method", method, "-"}, 2, "no dialect"},
		{"unknown flag", []string{"--verbose"}, 2, "not defined: -verbose"},
		{"no descriptors", []string{"--dialect", "fields", "--method", "/a.B/C", "-"}, 1, "descriptor_set: "},
		{"no such file", []string{"--method", method, "none.bin"}, 1, "none.bin"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			var out, errs bytes.Buffer
			rc := run(append([]string{"scan"}, tt.args...), strings.NewReader(""), &out, &errs)
			if rc != tt.rc || !strings.Contains(errs.String(), tt.want) || out.Len() > 0 {
				t.Errorf("exit status %d, %q, %q; want %d, %q", rc, &out, &errs, tt.rc, tt.want)
			}
		})
	}
}
