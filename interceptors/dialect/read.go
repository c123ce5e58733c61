package dialect

import (
	"bytes"
	"cmp"
	"encoding/json"
	"math"
	"strconv"
	"time"

	"github.com/sluicegate/sluice/interceptors/fields"
	"google.golang.org/protobuf/encoding/protowire"
)

// Names that Triton reserves among a message's parameters, and those that the
// language back ends use.
const (
	sequenceID    = "sequence_id"
	maxTokens     = "max_tokens"
	choices       = "n"
	emptyFinal    = "triton_enable_empty_final_response"
	finalResponse = "triton_final_response"
	inputTokens   = "num_input_tokens"
	outputTokens  = "num_output_tokens"
)

// ReadRequest reads what a request message says of its inference, and sharpens
// the roles of its fields by the names of their tensors. The error is a
// *fields.Error: the message asks for what cannot be granted. The names in
// Request are filled in all the same.
func (m *Method) ReadRequest(msg *fields.Message) (Request, error) {
	r := Request{ModelField: -1, IDField: -1, PromptIDs: -1, finalField: -1}
	if !m.NamesModel {
		r.Model = m.dialect.model
	}
	err := m.readTensors(msg, &r)
	for n := range msg.Fields {
		f := &msg.Fields[n]
		if f.Shadowed {
			continue
		}
		switch f.Role {
		case fields.Model:
			if r.ModelField >= 0 && err == nil && r.Model != string(msg.Bytes(f)) {
				err = several(msg.Path(f))
			}
			r.Model, r.ModelField = string(msg.Bytes(f)), n
		case fields.ModelVersion:
			if r.Version != "" && err == nil && r.Version != string(msg.Bytes(f)) {
				err = several(msg.Path(f))
			}
			r.Version = string(msg.Bytes(f))
		case fields.RequestID:
			r.ID, r.IDField = string(msg.Bytes(f)), n
		case fields.SequenceID:
			r.Sequence = text(msg, f)
		case fields.MaxTokens:
			if v, ok := msg.Int(f); ok && err == nil {
				err = r.limit(msg.Path(f), v)
			}
		case fields.Parameter:
			if err == nil {
				err = r.parameter(msg, f, n)
			}
		case fields.Choices:
			if v, _ := msg.Int(f); v < 0 || v > maxChoices {
				err = cmp.Or[error](err, &fields.Error{Kind: fields.Malformed, Path: msg.Path(f), What: "the number of answers must be from 1 to 4096"})
			} else {
				r.choices = max(r.choices, v)
			}
		case fields.Batch:
			r.prompts++
		case fields.PromptIDs:
			r.PromptIDs = n
		case fields.Forbidden:
			if err == nil {
				err = &fields.Error{Kind: fields.Uninspectable, Path: msg.Path(f), What: "callers may not set this field: it has the model server reach for what cannot be seen here"}
			}
		}
	}
	for _, times := range []int64{r.choices, r.prompts} {
		if times > 1 {
			r.MaxTokens = min(r.MaxTokens, math.MaxInt32) * min(times, math.MaxInt32)
		}
	}
	return r, err
}

// maxChoices bounds the answers that one prompt may ask for. Chosen: far above
// what people compare.
const maxChoices = 4096

// several refuses a message that names more than one model: only one would be
// judged.
func several(path string) error {
	return &fields.Error{Kind: fields.Ambiguous, Path: path, What: "the message names several models or versions; send one message for each"}
}

// parameter reads a parameter of the message itself; those of tensors and
// requested outputs say nothing of the inference.
func (r *Request) parameter(msg *fields.Message, f *fields.Field, n int) error {
	key := msg.Key(f)
	switch key {
	case sequenceID, maxTokens, choices, emptyFinal:
	default:
		return nil
	}
	path := msg.Path(f)
	if path != "parameters."+key {
		return nil
	}
	switch key {
	case sequenceID:
		r.Sequence = text(msg, f)
		if r.Sequence == "0" && !msg.IsString(f) {
			r.Sequence = "" // Triton: the number 0 is no sequence
		}
	case emptyFinal:
		v, _ := msg.Int(f)
		if msg.IsString(f) || string(msg.AppendText(nil, f)) != strconv.FormatBool(v != 0) {
			return &fields.Error{Kind: fields.Malformed, Path: path, What: emptyFinal + " must be a bool"}
		}
		r.WantsFinal, r.finalField = v != 0, n
	case maxTokens:
		return r.limitText(path, text(msg, f))
	case choices:
		// Other models may have a parameter of this name: what is no number of
		// choices is theirs.
		if v, err := strconv.ParseInt(text(msg, f), 10, 64); err == nil {
			r.choices = max(r.choices, v)
		}
	}
	return nil
}

// limitText takes over a limit that is written as text.
func (r *Request) limitText(path, s string) error {
	v, err := strconv.ParseInt(s, 10, 64)
	if err != nil {
		return badLimit(path)
	}
	return r.limit(path, v)
}

// limit takes over a limit on output tokens. Where a message has several, the
// largest counts: which of them a server obeys is the server's affair.
func (r *Request) limit(path string, v int64) error {
	if v <= 0 || v > math.MaxInt32 {
		return badLimit(path)
	}
	r.MaxTokens = max(r.MaxTokens, v)
	return nil
}

func badLimit(path string) error {
	return &fields.Error{Kind: fields.Malformed, Path: path, What: "the limit on output tokens must be an integer from 1 to 2147483647"}
}

// readTensors reads the tensors that the dialect has names for, and gives the
// elements of BYTES tensors their tensor's role.
func (m *Method) readTensors(msg *fields.Message, r *Request) error {
	if len(msg.Tensors) == 0 || len(m.dialect.tensors) == 0 {
		return nil
	}
	for n := range msg.Fields {
		f := &msg.Fields[n]
		if f.Tensor < 0 || f.Role != fields.Prompt && f.Role != fields.Output {
			continue
		}
		name := msg.Name(&msg.Tensors[f.Tensor])
		role, ok := m.dialect.tensors[string(name)]
		if !ok {
			continue
		}
		f.Role = role
		if role == fields.MaxTokens { // a BYTES tensor
			if err := r.limitText(msg.Path(f), string(msg.Bytes(f))); err != nil {
				return err
			}
		}
		if role == fields.Parameter && string(name) == "sampling_parameters" {
			if err := r.sampling(msg.Path(f), msg.Bytes(f)); err != nil {
				return err
			}
		}
		if !fields.IsText(role) {
			f.Role = fields.Parameter // a number, written as text: still read as text
		}
	}
	for n := range msg.Tensors {
		t := &msg.Tensors[n]
		if m.dialect.texts[string(msg.Name(t))] && !t.SharedMemory {
			switch string(msg.Datatype(t)) {
			case "BYTES", "UINT8", "INT8":
			default:
				return &fields.Error{Kind: fields.Uninspectable, Path: "inputs." + string(msg.Name(t)),
					What: "the tensor is text, which cannot be read from numbers of this type; send BYTES, UINT8 or INT8"}
			}
		}
		if m.dialect.tensors[string(msg.Name(t))] == fields.MaxTokens {
			if err := r.limitTensor(msg, t); err != nil {
				return err
			}
		}
	}
	return nil
}

// maxRows bounds the rows of a batch whose limits or counts are read. Chosen:
// far above the batches that language models are run with.
const maxRows = 4096

// limitTensor takes over the limits of a tensor: one for each row of a batch,
// which the model writes all of.
func (r *Request) limitTensor(msg *fields.Message, t *fields.Tensor) error {
	path := "inputs." + string(msg.Name(t))
	dt := string(msg.Datatype(t))
	if dt == "BYTES" || t.SharedMemory || t.Elements == 0 {
		return nil // read as text, not to be seen, not there
	}
	var (
		buf [16]int64
		sum int64
	)
	rows := msg.Ints(buf[:0], t, maxRows+1)
	if dt == "BOOL" || len(rows) == 0 || len(rows) > maxRows {
		return badLimit(path)
	}
	for _, v := range rows {
		if v <= 0 || v > math.MaxInt32 {
			return badLimit(path)
		}
		sum += v
	}
	r.MaxTokens = max(r.MaxTokens, sum)
	return nil
}

// sampling reads the JSON of the vLLM back end's sampling_parameters. What is no
// object is the model server's to refuse. An object that we cannot read is
// refused here: Python takes some that are not JSON (NaN), and would find the
// limit that we did not.
func (r *Request) sampling(path string, text []byte) error {
	var p map[string]json.RawMessage // exact names, as Python reads them
	if json.Unmarshal(text, &p) != nil {
		if bytes.HasPrefix(bytes.TrimLeft(text, " \t\r\n"), []byte("{")) {
			return &fields.Error{Kind: fields.Malformed, Path: path, What: "sampling_parameters must be JSON"}
		}
		return nil
	}
	if raw, ok := p[maxTokens]; ok && string(raw) != "null" {
		if err := r.limitText(path, string(raw)); err != nil {
			return err
		}
	}
	if raw, ok := p[choices]; ok && string(raw) != "null" {
		v, err := strconv.ParseInt(string(raw), 10, 32)
		if err != nil || v < 1 || v > maxChoices {
			return &fields.Error{Kind: fields.Malformed, Path: path, What: "n must be an integer from 1 to 4096"}
		}
		r.choices = max(r.choices, v)
	}
	return nil
}

// text is a field's value as text: a number in decimal.
func text(msg *fields.Message, f *fields.Field) string {
	var buf [32]byte
	return string(msg.AppendText(buf[:0], f))
}

// SetID gives a request another id.
func (m *Method) SetID(msg *fields.Message, r *Request, id string) {
	if r.IDField >= 0 {
		msg.Set(&msg.Fields[r.IDField], []byte(id))
		return
	}
	msg.Append(protowire.AppendString(protowire.AppendTag(nil, 3, protowire.BytesType), id))
}

// askFinal is parameters { key: "triton_enable_empty_final_response" value { bool_param: true } }.
var askFinal = func() []byte {
	entry := protowire.AppendString(protowire.AppendTag(nil, 1, protowire.BytesType), emptyFinal)
	entry = protowire.AppendBytes(protowire.AppendTag(entry, 2, protowire.BytesType), []byte{1 << 3, 1})
	return protowire.AppendBytes(protowire.AppendTag(nil, 4, protowire.BytesType), entry)
}()

// AskFinal has the server show the end of an inference that it would hide,
// with an empty response.
func (m *Method) AskFinal(msg *fields.Message, r *Request) {
	switch {
	case r.WantsFinal:
	case r.finalField >= 0:
		msg.Set(&msg.Fields[r.finalField], []byte("true"))
	default:
		msg.Append(askFinal)
	}
}

// ReadResponse reads what a response message says of its inference.
func (m *Method) ReadResponse(msg *fields.Message) Response {
	r := Response{IDField: -1, Empty: len(msg.Tensors) == 0}
	if !m.ServerStreams {
		r.Final = true
	}
	flagged := false // the server says whether this is the end
	for n := range msg.Fields {
		f := &msg.Fields[n]
		if f.Shadowed {
			continue
		}
		switch f.Role {
		case fields.RequestID:
			r.ID, r.IDField = msg.Bytes(f), n
		case fields.ErrorText:
			if len(msg.Bytes(f)) > 0 {
				r.Failed, r.Empty = true, false
			}
		case fields.Final:
			if v, ok := msg.Int(f); ok && v != 0 {
				r.Final = true
			}
		case fields.InputTokens:
			r.InputTokens = m.together(r.InputTokens, count(msg, f))
		case fields.OutputTokens:
			r.OutputTokens += count(msg, f)
		case fields.OutputTokensTotal:
			r.OutputTotal = m.together(r.OutputTotal, count(msg, f))
		case fields.OutputIDs:
			r.IDs += count(msg, f)
		case fields.OutputIDsTotal:
			r.IDsTotal += count(msg, f)
		case fields.Choice:
			r.Choice = min(count(msg, f), maxChoices-1)
		case fields.Output:
			r.Empty = false
			if f.Tensor >= 0 {
				if role := m.dialect.tensors[string(msg.Name(&msg.Tensors[f.Tensor]))]; fields.IsText(role) {
					f.Role = role
				}
			}
		case fields.Parameter:
			if f.Tensor >= 0 {
				continue
			}
			switch string(msg.KeyBytes(f)) {
			case finalResponse:
				if v, ok := msg.Int(f); ok && m.triton {
					flagged = true
					r.Final = r.Final || v != 0
				}
			case inputTokens:
				r.InputTokens = count(msg, f)
			case outputTokens:
				r.OutputTokens += count(msg, f)
			}
		}
	}
	for n := range msg.Tensors {
		t := &msg.Tensors[n]
		if string(msg.Datatype(t)) == "BYTES" {
			continue // numbers count
		}
		role, ok := m.dialect.tensors[string(msg.Name(t))]
		if !ok || role != fields.InputTokens && role != fields.OutputTokens {
			continue
		}
		var (
			buf [16]int64
			sum int64
		)
		for _, v := range msg.Ints(buf[:0], t, maxRows) {
			if v >= 0 && v <= math.MaxInt32 {
				sum += v
			}
		}
		if role == fields.InputTokens {
			r.InputTokens = max(r.InputTokens, sum)
		} else {
			r.OutputTokens += sum
		}
	}
	if r.Failed && m.triton && !flagged {
		r.Final = true // no model answered: it is unknown, say
	}
	if m.ServerStreams && !m.Multiplexed {
		r.Final = false // the call is the inference: it ends with the stream
	}
	return r
}

// together is what two counts of a message say: of several answers, or the same
// thing twice.
func (m *Method) together(a, b int64) int64 {
	if m.batched {
		return a + b
	}
	return max(a, b)
}

// ReadNext is ReadResponse for messages that are read with ScanNext, one after the
// other, into the same Message: r holds what the one before said. Prompts and
// outputs say nothing of an inference, so that one that repeats it says the same.
func (m *Method) ReadNext(msg *fields.Message, r *Response) {
	if !msg.Repeats() {
		*r = m.ReadResponse(msg)
		msg.KeepRoles()
	}
}

// count is a reported number of tokens. What cannot be one is not believed.
func count(msg *fields.Message, f *fields.Field) int64 {
	v, ok := msg.Int(f)
	if !ok || v < 0 || v > math.MaxInt32 {
		return 0
	}
	return v
}

// Refusal is what the server would send to say that one inference of a stream
// failed while the others go on; nil if the API has no way to say so. Our own
// parameters beside it say the gRPC code, the reason and when to retry, in
// words that stay the same.
func (m *Method) Refusal(model, id, text, code, reason string, retryAfter time.Duration) []byte {
	if !m.triton || !m.Multiplexed {
		return nil
	}
	var resp []byte
	if model != "" {
		resp = protowire.AppendString(protowire.AppendTag(resp, 1, protowire.BytesType), model)
	}
	if id != "" {
		resp = protowire.AppendString(protowire.AppendTag(resp, 3, protowire.BytesType), id)
	}
	resp = appendParameter(resp, finalResponse, true)
	resp = appendParameter(resp, "sluice_code", code)
	resp = appendParameter(resp, "sluice_reason", reason)
	if retryAfter > 0 {
		resp = appendParameter(resp, "sluice_retry_after_ms", (retryAfter + time.Millisecond - 1).Milliseconds()) // as the trailer, rounded up
	}
	out := protowire.AppendString(protowire.AppendTag(nil, 1, protowire.BytesType), text)
	return protowire.AppendBytes(protowire.AppendTag(out, 2, protowire.BytesType), resp)
}

// appendParameter appends an entry of ModelInferResponse.parameters.
func appendParameter(b []byte, key string, v any) []byte {
	var value []byte
	switch v := v.(type) {
	case bool:
		value = protowire.AppendVarint(protowire.AppendTag(nil, 1, protowire.VarintType), protowire.EncodeBool(v))
	case int64:
		value = protowire.AppendVarint(protowire.AppendTag(nil, 2, protowire.VarintType), uint64(v))
	case string:
		value = protowire.AppendString(protowire.AppendTag(nil, 3, protowire.BytesType), v)
	}
	entry := protowire.AppendString(protowire.AppendTag(nil, 1, protowire.BytesType), key)
	entry = protowire.AppendBytes(protowire.AppendTag(entry, 2, protowire.BytesType), value)
	return protowire.AppendBytes(protowire.AppendTag(b, 4, protowire.BytesType), entry)
}
