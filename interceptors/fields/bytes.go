package fields

import (
	"bytes"
	"slices"

	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/reflect/protoreflect"
)

// A tensor of UINT8 or INT8 may be a text, one element a byte. Raw, it is one bare
// element; typed, it is a field with useBytes, made of the runs of its numbers.

// isText reports whether the tensor is one of bytes of a text.
func (m *Message) isText(t *Tensor) bool {
	if len(m.prog.opts.Bytes) == 0 {
		return false
	}
	dt := datatype(m.Datatype(t))
	return dt.size == 1 && dt.kind != protoreflect.BoolKind && m.prog.opts.Bytes[string(m.Name(t))]
}

// typedBytes reports the typed tensors that are texts.
func (m *Message) typedBytes() error {
	for i := 0; i < len(m.runs); {
		r := &m.runs[i]
		n := 1
		for i+n < len(m.runs) && m.runs[i+n].f == r.f && m.runs[i+n].tensor == r.tensor {
			n++
		}
		if t := &m.Tensors[r.tensor]; r.f.text != nil && m.isText(t) {
			text, err := m.join(m.runs[i:i+n], datatype(m.Datatype(t)))
			if err != nil {
				return err
			}
			x, err := m.add(r.f.text, r.node)
			if err != nil {
				return err
			}
			x.pos, x.sized, x.value = r.pos, true, spanOf(text, int(r.value.off))
			x.num = uint64(i) | uint64(n)<<32
		}
		i += n
	}
	return nil
}

// join is the text whose bytes the numbers of the runs are. ASCII that is packed in one
// run is a view of it: each number is one byte there.
func (m *Message) join(runs []run, dt dtype) ([]byte, error) {
	var out []byte
	for i := range runs {
		r := &runs[i]
		if m.typed != nil {
			msg := m.msgs[r.node]
			l := msg.Get(own(msg, r.f)).List()
			out = slices.Grow(out, l.Len())
			for k := range l.Len() {
				b, err := m.byteOf(r, dt, numberOf(r.f.kind, l.Get(k)))
				if err != nil {
					return nil, err
				}
				out = append(out, b)
			}
			continue
		}
		c := m.seek(int(r.value.off))
		if n := int(r.value.n); len(runs) == 1 && r.packed && len(c.b) >= n &&
			bytes.IndexFunc(c.b[:n], func(x rune) bool { return x >= 0x80 }) < 0 {
			return c.b[:n:n], nil
		}
		out = slices.Grow(out, int(r.value.n))
		for c.pos < r.value.end() {
			v, _, _ := c.number(r.f)
			v, _ = normal(r.f.kind, v)
			b, err := m.byteOf(r, dt, v)
			if err != nil {
				return nil, err
			}
			out = append(out, b)
		}
	}
	return out, nil
}

// byteOf is the byte that a number is. Servers cut off what does not fit the datatype, or
// refuse it.
func (m *Message) byteOf(r *run, dt dtype, v uint64) (byte, error) {
	if m.prog.opts.Strict && (dt.signed && int64(int8(v)) != int64(v) || !dt.signed && v > 0xFF) {
		return 0, m.fail(Malformed, r.node, r.f, "an element is larger than the datatype")
	}
	return byte(v), nil
}

// numbersOf are the elements of a typed text as it is to be.
func (m *Message) numbersOf(f *Field) []int64 {
	if f.gone {
		return nil
	}
	signed := datatype(m.Datatype(&m.Tensors[f.Tensor])).signed
	text := m.Bytes(f)
	out := make([]int64, len(text))
	for i, b := range text {
		if out[i] = int64(b); signed {
			out[i] = int64(int8(b))
		}
	}
	return out
}

// spliceRuns puts a typed text that was edited in place of its runs.
func (m *Message) spliceRuns(f *Field) {
	if !f.gone && f.set == 0 {
		return
	}
	first := int(uint32(f.num))
	for i := range int(f.num >> 32) {
		r := &m.runs[first+i]
		s := splice{start: int(r.pos), end: r.value.end(), at: r.node}
		if i == 0 {
			s.with = encodeNumbers(f.f.num, m.numbersOf(f), r.packed)
		}
		m.splices = append(m.splices, s)
	}
}

func encodeNumbers(num protowire.Number, values []int64, packed bool) (b []byte) {
	if len(values) == 0 {
		return nil
	}
	if !packed {
		for _, v := range values {
			b = protowire.AppendVarint(protowire.AppendTag(b, num, protowire.VarintType), uint64(v))
		}
		return b
	}
	size := 0
	for _, v := range values {
		size += protowire.SizeVarint(uint64(v))
	}
	b = make([]byte, 0, size+20)
	b = protowire.AppendVarint(protowire.AppendTag(b, num, protowire.BytesType), uint64(size))
	for _, v := range values {
		b = protowire.AppendVarint(b, uint64(v))
	}
	return b
}

// fitted is v with n bytes: spaces fill it up, and what is longer is cut off.
func fitted(v []byte, n int) []byte {
	if len(v) < n {
		return append(v, bytes.Repeat([]byte{' '}, n-len(v))...)
	}
	return v[:n]
}
