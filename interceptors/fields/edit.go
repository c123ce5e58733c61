package fields

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"fmt"
	"math"
	"slices"
	"strconv"
	"unicode/utf8"

	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
)

// Set replaces a field's value. For a string or bytes field v is the value
// (in a string, what is not UTF-8 becomes U+FFFD), for a number its decimal
// form, for a bool "true" or "false". It panics if v is not a value of the
// field's type, and for a field that is [Message.Fixed]. A text that is [Message.Sized]
// keeps its length: spaces fill it up, and what is longer is cut off. Set copies v.
func (m *Message) Set(f *Field, v []byte) {
	if f.set < 0 {
		panic("fields: Set of a text that token ids stand for")
	}
	var value []byte
	if m.IsString(f) {
		if f.f.utf8 && !utf8.Valid(v) {
			value = bytes.ToValidUTF8(v, []byte("\uFFFD"))
		} else {
			value = append(make([]byte, 0, len(v)), v...)
		}
		if f.sized {
			value = fitted(value, len(m.Bytes(f)))
		}
	} else {
		x, err := parseNumber(f.f.kind, string(v))
		if err != nil {
			panic(fmt.Sprintf("fields: Set %s: not a value of a %s field", f.f.desc.FullName(), f.f.kind))
		}
		f.num = x
	}
	if f.set == 0 {
		m.values = append(m.values, nil)
		f.set = int32(len(m.values))
	}
	m.values[f.set-1] = value
	m.edited, m.clone = true, nil
}

func parseNumber(k protoreflect.Kind, s string) (uint64, error) {
	size := 64
	switch k {
	case protoreflect.BoolKind:
		v, err := strconv.ParseBool(s)
		return protowire.EncodeBool(v), err
	case protoreflect.FloatKind:
		v, err := strconv.ParseFloat(s, 32)
		return uint64(math.Float32bits(float32(v))), err
	case protoreflect.DoubleKind:
		v, err := strconv.ParseFloat(s, 64)
		return math.Float64bits(v), err
	case protoreflect.Uint64Kind, protoreflect.Fixed64Kind:
		return strconv.ParseUint(s, 10, 64)
	case protoreflect.Uint32Kind, protoreflect.Fixed32Kind:
		return strconv.ParseUint(s, 10, 32)
	case protoreflect.Int32Kind, protoreflect.Sint32Kind, protoreflect.Sfixed32Kind, protoreflect.EnumKind:
		size = 32
	}
	v, err := strconv.ParseInt(s, 10, size)
	return uint64(v), err
}

// Delete takes a field out, tag and all, and marks it as shadowed. The key or
// value of a map takes its whole entry out, unless the value is a message in
// which it is one field among others. The shape of a tensor whose element is
// taken out is not corrected.
func (m *Message) Delete(f *Field) {
	if f.set < 0 {
		panic("fields: Delete of a text that token ids stand for")
	}
	f.Shadowed, f.gone = true, true
	if e := m.entryOf(f); e >= 0 && (e == f.node || f.f.oneof) {
		m.nodes[e].dead, m.killed = true, true
		m.bury()
	}
	m.edited, m.clone = true, nil
}

// Prune takes out the elements of lists of models that keep does not want: those
// of repeated messages with a [ListedModel]. It is given the names of the model
// and the version, "" for one that the element lacks. What is in an element that
// is taken out is shadowed.
func (m *Message) Prune(keep func(model, version string) bool) {
	type entry struct{ model, version string }
	entries := make(map[int32]entry)
	for i := range m.Fields {
		f := &m.Fields[i]
		e := entries[f.node]
		switch {
		case f.Shadowed:
			continue
		case f.Role == ListedModel:
			e.model = string(m.Bytes(f))
		case f.Role == ListedVersion:
			e.version = string(m.Bytes(f))
		default:
			continue
		}
		entries[f.node] = e
	}
	pruned := false
	for i := range m.nodes {
		n := &m.nodes[i]
		if n.f == nil || n.f.sub == nil || !n.f.sub.lists || n.dead {
			continue
		}
		if e := entries[int32(i)]; !keep(e.model, e.version) {
			n.dead, pruned = true, true
		}
	}
	if pruned {
		m.killed, m.edited, m.clone = true, true, nil
		m.bury()
	}
}

// Append adds fields, encoded, at the end of the message. They are not among
// Fields. Append copies encoded.
func (m *Message) Append(encoded []byte) {
	m.appended = append(m.appended, encoded...)
	m.clone = nil
}

// Edited reports whether anything is to be changed.
func (m *Message) Edited() bool { return m.edited || len(m.appended) > 0 }

// splice replaces the bytes from start to end, which are in the node at, or
// are its length.
type splice struct {
	start, end int
	at         int32
	with       []byte
}

// Encode is the message with its edits applied; nil for a walked message.
// Without edits it is what was scanned; else the untouched parts are shared
// with what was scanned, and occurrences of last-wins that lost are left out,
// so that none comes to life when the one after it is deleted. The caller owns one
// reference to the result.
func (m *Message) Encode() mem.BufferSlice {
	if m.typed != nil {
		return nil
	}
	if !m.Edited() {
		m.raw.Ref()
		return m.raw
	}
	m.plan()
	out := joiner{c: cursor{bufs: m.raw}, bufs: m.raw}
	out.out = make(mem.BufferSlice, 0, len(m.raw)+2*len(m.splices)+1)
	for _, s := range m.splices {
		out.share(s.start)
		out.write(s.with)
		out.drop(s.end)
	}
	out.share(m.size)
	out.write(m.appended)
	out.flush()
	return out.out
}

// plan makes the splices, in order.
func (m *Message) plan() {
	m.splices = m.splices[:0]
	if !m.edited {
		return
	}
	for i := range m.nodes {
		n := &m.nodes[i]
		n.delta = 0
		if n.dead && !m.nodes[n.parent].dead {
			m.splices = append(m.splices, splice{start: int(n.pos), end: int(n.end), at: n.parent})
		}
	}
	for i := range m.Fields {
		f := &m.Fields[i]
		switch {
		case m.nodes[f.node].dead:
		case f.f.use == useBytes:
			m.spliceRuns(f)
		case f.gone, f.Shadowed && f.f.use != useRaw:
			m.splices = append(m.splices, splice{start: int(f.pos), end: f.value.end(), at: f.node})
		case f.set > 0:
			m.splices = append(m.splices, splice{start: int(f.pos), end: f.value.end(), at: f.node, with: m.encode(f)})
		}
	}
	for _, s := range m.splices {
		m.nodes[s.at].delta += int32(len(s.with) - (s.end - s.start))
	}
	// A node comes after the one around it, so from the last to the first
	// every length is known when it is needed.
	for i := len(m.nodes) - 1; i > 0; i-- {
		n := &m.nodes[i]
		if n.delta == 0 || n.dead {
			continue
		}
		size := protowire.AppendVarint(nil, uint64(n.end-n.off+n.delta))
		m.splices = append(m.splices, splice{start: int(n.size), end: int(n.off), at: int32(i), with: size})
		m.nodes[n.parent].delta += n.delta + int32(len(size)) - (n.off - n.size)
	}
	slices.SortFunc(m.splices, func(a, b splice) int {
		return cmp.Or(cmp.Compare(a.start, b.start), cmp.Compare(a.end, b.end))
	})
}

// encode is the field on the wire.
func (m *Message) encode(f *Field) []byte {
	v := m.Bytes(f)
	if f.f.use == useRaw {
		if f.bare {
			return v
		}
		return append(binary.LittleEndian.AppendUint32(make([]byte, 0, 4+len(v)), uint32(len(v))), v...)
	}
	b := protowire.AppendTag(make([]byte, 0, 20+len(v)), f.f.num, f.f.wire)
	switch x := denormal(f.f.kind, f.num); f.f.wire {
	case protowire.VarintType:
		return protowire.AppendVarint(b, x)
	case protowire.Fixed32Type:
		return protowire.AppendFixed32(b, uint32(x))
	case protowire.Fixed64Type:
		return protowire.AppendFixed64(b, x)
	}
	return protowire.AppendBytes(b, v)
}

// joiner puts a message together. Large parts of the old one are shared, small
// parts are copied: a reference costs more than a short copy.
type joiner struct {
	c    cursor
	bufs mem.BufferSlice // from the buffer that the cursor stands in on
	out  mem.BufferSlice
	glue []byte
}

const shareAbove = 1024 // bytes

// share moves to the offset end, and takes along what is between.
func (j *joiner) share(end int) {
	for j.c.pos < end && j.c.more() {
		// The buffer that the cursor stands in is the one before c.bufs.
		buf := j.bufs[len(j.bufs)-len(j.c.bufs)-1]
		n := min(end-j.c.pos, len(j.c.b))
		if n > shareAbove {
			j.flush()
			if n < buf.Len() {
				i := buf.Len() - len(j.c.b)
				buf = buf.Slice(i, i+n)
			} else {
				buf.Ref()
			}
			j.out = append(j.out, buf)
		} else {
			j.write(j.c.b[:n])
		}
		j.c.advance(n)
	}
}

func (j *joiner) write(b []byte) { j.glue = append(j.glue, b...) }

// drop moves to the offset end.
func (j *joiner) drop(end int) { j.c.skip(end - j.c.pos) }

func (j *joiner) flush() {
	if len(j.glue) > 0 {
		j.out = append(j.out, mem.SliceBuffer(j.glue))
		j.glue = nil
	}
}

// Typed is the Go message with its edits applied; nil for a scanned message.
// The message that was walked is left as it was: an edit works on a copy. It
// panics if what was appended cannot be decoded.
func (m *Message) Typed() proto.Message {
	if m.typed == nil || !m.Edited() {
		return m.typed
	}
	if m.clone != nil {
		return m.clone
	}
	m.clone = proto.Clone(m.typed)
	root := m.clone.ProtoReflect()
	for i := range m.nodes {
		n := &m.nodes[i]
		n.done = false
		if n.dead && n.f.isMap && !m.nodes[n.parent].dead {
			in := m.locate(root, n.parent)
			in.Mutable(own(in, n.f)).Map().Clear(m.mapKey(n))
		}
	}
	// From the last to the first, because taking an element out of a list moves
	// those after it.
	for i := len(m.Fields) - 1; i >= 0; i-- {
		if f := &m.Fields[i]; (f.set > 0 || f.gone) && !m.nodes[f.node].dead {
			m.apply(root, f)
		}
	}
	for i := len(m.nodes) - 1; i > 0; i-- {
		if n := &m.nodes[i]; n.dead && n.f.list && !m.nodes[n.parent].dead {
			in := m.locate(root, n.parent)
			removeAt(in.Mutable(own(in, n.f)).List(), int(n.off))
		}
	}
	if len(m.appended) > 0 {
		if err := (proto.UnmarshalOptions{Merge: true}).Unmarshal(m.appended, m.clone); err != nil {
			panic("fields: what was appended cannot be decoded")
		}
	}
	return m.clone
}

// locate finds the message of a node in a copy of what was walked.
func (m *Message) locate(root protoreflect.Message, at int32) protoreflect.Message {
	n := &m.nodes[at]
	if n.f == nil {
		return root
	}
	p := &m.nodes[n.parent]
	if p.f != nil && p.f.isMap {
		in := m.locate(root, p.parent)
		return in.Mutable(own(in, p.f)).Map().Mutable(m.mapKey(p)).Message()
	}
	in := m.locate(root, n.parent)
	if n.f.list {
		return in.Mutable(own(in, n.f)).List().Get(int(n.off)).Message()
	}
	return in.Mutable(own(in, n.f)).Message()
}

func (m *Message) mapKey(n *node) protoreflect.MapKey {
	k := n.f.sub.low[1].kind
	if k == protoreflect.StringKind {
		return protoreflect.ValueOfString(string(m.bytes(&n.label))).MapKey()
	}
	return valueOf(k, n.key).MapKey()
}

// apply makes one edit in the copy.
func (m *Message) apply(root protoreflect.Message, f *Field) {
	n := &m.nodes[f.node]
	switch {
	case f.f.use == useRaw:
		if n.done {
			return
		}
		n.done = true
		in := m.locate(root, n.parent)
		in.Mutable(own(in, f.f)).List().Set(int(n.off), protoreflect.ValueOfBytes(m.rawEntry(f.node)))
	case n.f != nil && n.f.isMap:
		in := m.locate(root, n.parent)
		entries, key := in.Mutable(own(in, n.f)).Map(), m.mapKey(n)
		if f.f.use == useKey {
			v := entries.Get(key)
			entries.Clear(key)
			entries.Set(m.protoValue(f).MapKey(), v)
			return
		}
		entries.Set(key, m.protoValue(f))
	case f.f.use == useBytes:
		in := m.locate(root, f.node)
		l := in.Mutable(own(in, f.f)).List()
		l.Truncate(0)
		for _, v := range m.numbersOf(f) {
			l.Append(valueOf(f.f.desc.Kind(), uint64(v)))
		}
	case f.f.list:
		in := m.locate(root, f.node)
		l := in.Mutable(own(in, f.f)).List()
		if !f.gone {
			l.Set(int(f.value.off), m.protoValue(f))
			return
		}
		removeAt(l, int(f.value.off))
	default:
		in := m.locate(root, f.node)
		if fd := own(in, f.f); f.gone {
			in.Clear(fd)
		} else {
			in.Set(fd, m.protoValue(f))
		}
	}
}

// removeAt takes the i-th element out of a list.
func removeAt(l protoreflect.List, i int) {
	for i++; i < l.Len(); i++ {
		l.Set(i-1, l.Get(i))
	}
	l.Truncate(l.Len() - 1)
}

// rawEntry is a raw entry with its elements as they are to be.
func (m *Message) rawEntry(n int32) []byte {
	b := []byte{}
	for i := range m.Fields {
		if f := &m.Fields[i]; f.node == n && !f.gone {
			b = append(b, m.encode(f)...)
		}
	}
	return b
}

func (m *Message) protoValue(f *Field) protoreflect.Value {
	switch f.f.kind {
	case protoreflect.StringKind:
		return protoreflect.ValueOfString(string(m.Bytes(f)))
	case protoreflect.BytesKind:
		return protoreflect.ValueOfBytes(m.Bytes(f))
	}
	return valueOf(f.f.kind, f.num)
}

func valueOf(k protoreflect.Kind, x uint64) protoreflect.Value {
	switch k {
	case protoreflect.BoolKind:
		return protoreflect.ValueOfBool(x != 0)
	case protoreflect.EnumKind:
		return protoreflect.ValueOfEnum(protoreflect.EnumNumber(int32(x)))
	case protoreflect.Int32Kind, protoreflect.Sint32Kind, protoreflect.Sfixed32Kind:
		return protoreflect.ValueOfInt32(int32(x))
	case protoreflect.Uint32Kind, protoreflect.Fixed32Kind:
		return protoreflect.ValueOfUint32(uint32(x))
	case protoreflect.Uint64Kind, protoreflect.Fixed64Kind:
		return protoreflect.ValueOfUint64(x)
	case protoreflect.FloatKind:
		return protoreflect.ValueOfFloat32(math.Float32frombits(uint32(x)))
	case protoreflect.DoubleKind:
		return protoreflect.ValueOfFloat64(math.Float64frombits(x))
	}
	return protoreflect.ValueOfInt64(int64(x))
}
