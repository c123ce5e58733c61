package budget

import (
	"bytes"
	"encoding/json"
	"strconv"

	"github.com/sluicegate/sluice/interceptors/fields"
)

// maxTokens is what inference APIs call the limit on output tokens, among the
// parameters of a request and in the JSON of sampling parameters.
const maxTokens = "max_tokens"

// clamp lowers the limit on output tokens that a request declares, where it
// stands in a field, in the parameter max_tokens or in the JSON of the tensor
// sampling_parameters. What was declared is the limit times the number of
// choices, so each choice gets its share. A limit that stands elsewhere, as in a
// tensor of numbers, is left: the inference is then cut where it would go beyond.
func clamp(m *fields.Message, declared, left int64) {
	share := func(limit int64) []byte {
		if limit <= 0 || limit > declared {
			return nil
		}
		return strconv.AppendInt(nil, max(1, left/(declared/limit)), 10)
	}
	for n := range m.Fields {
		f := &m.Fields[n]
		if f.Shadowed {
			continue
		}
		switch {
		case f.Role == fields.MaxTokens:
			if limit, ok := m.Int(f); ok {
				set(m, f, share(limit))
			}
		case f.Role != fields.Parameter:
		case f.Tensor < 0 && string(m.KeyBytes(f)) == maxTokens && m.Path(f) == "parameters."+maxTokens:
			limit, err := strconv.ParseInt(string(m.AppendText(nil, f)), 10, 64)
			if err == nil {
				set(m, f, share(limit))
			}
		case f.Tensor >= 0 && string(m.Name(&m.Tensors[f.Tensor])) == "sampling_parameters":
			set(m, f, splice(m.Bytes(f), share))
		}
	}
}

func set(m *fields.Message, f *fields.Field, v []byte) {
	if v != nil {
		m.Set(f, v)
	}
}

// splice replaces the number max_tokens in a JSON object; nil if there is none.
func splice(text []byte, share func(int64) []byte) []byte {
	dec := json.NewDecoder(bytes.NewReader(text))
	dec.UseNumber()
	if t, err := dec.Token(); err != nil || t != json.Delim('{') {
		return nil
	}
	for dec.More() {
		key, err := dec.Token()
		if err != nil {
			return nil
		}
		var value json.RawMessage
		if err := dec.Decode(&value); err != nil {
			return nil
		}
		if key != maxTokens {
			continue
		}
		limit, err := strconv.ParseInt(string(value), 10, 64)
		if err != nil {
			return nil
		}
		v := share(limit)
		if v == nil {
			return nil
		}
		end := int(dec.InputOffset())
		out := make([]byte, 0, len(text))
		out = append(out, text[:end-len(value)]...)
		out = append(out, v...)
		return append(out, text[end:]...)
	}
	return nil
}
