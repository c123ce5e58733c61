package fields

import (
	"encoding/binary"
	"math"
	"slices"
	"strconv"
	"strings"
	"unsafe"

	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
)

// Message is one scanned message: where its fields lie, what they mean, and
// what is to be changed in it. The zero value is ready for [Program.Scan] or
// [Program.Walk], and a Message may be used again for the next one: its slices
// keep their capacity. It is not safe for concurrent use.
//
// A Message that was scanned refers to the buffers it was given and does not
// own them: they must outlive it, or its next scan, or [Message.Release].
type Message struct {
	// Fields are the fields with a role, in wire order; the elements of a raw
	// tensor stand where their raw entry stands. A walked message has no wire:
	// its fields are in order of field number, its maps in order of key.
	Fields []Field
	// Tensors are the tensors, in order.
	Tensors []Tensor
	// Choice is which of the answers that a caller asked for a response is of.
	Choice int64
	// Unknown counts fields that the descriptor does not have, or has with
	// another wire type, and that were let pass.
	Unknown int

	prog   *Program
	raw    mem.BufferSlice
	size   int
	starts []int // offsets of the buffers, once asked for
	typed  proto.Message
	msgs   []protoreflect.Message // of the nodes, if walked

	nodes   []node
	slots   []slot
	raws    []rawEntry
	runs    []run
	entries []int32 // nodes that are map entries
	table   []int32 // hash table of entries
	keys    []protoreflect.MapKey
	left    int  // what MaxFields leaves
	killed  bool // some node is dead
	names   map[string]string
	shape   *shape // of the message before, if one comes after the other

	edited   bool
	values   [][]byte // that were set
	meant    [][]byte // texts that ids stand for
	appended []byte
	clone    proto.Message
	splices  []splice
}

// Field is one occurrence of a field with a role.
type Field struct {
	// Role is what the field means. A dialect may sharpen it: a BYTES tensor of
	// a request is Prompt until its name says otherwise.
	Role Role
	// Shadowed says that decoders drop this occurrence, because another one of
	// the same singular field, oneof or map key follows, or because it is a raw
	// entry beyond the last tensor, or what follows in one after a length that
	// lies; or that it was deleted.
	Shadowed bool
	// Tensor is the index in Message.Tensors of the tensor that the field
	// belongs to, or -1.
	Tensor int32

	gone  bool // deleted
	bare  bool // raw data without a length prefix
	sized bool // the text is a whole tensor, whose shape says how long it is
	node  int32
	f     *field
	pos   int32  // where its tag or length prefix starts; its rank if walked
	set   int32  // index of what was set in values, + 1; 0 if nothing was; below 0 a text in meant
	value span   // of text, as it came
	num   uint64 // of a number: an integer sign-extended, a float's bits; of useBytes: its first run, and how many << 32
}

// span is a piece of the message. In a walked message off is the index in the
// list, or for an element of a raw entry its offset there. Spans and what holds
// them are small because they are what a scan writes, and clears again.
type span struct {
	first  *byte // nil if it is empty, or lies in several buffers and nobody has asked yet
	off, n int32
}

// maxSize is the most bytes of a message; gRPC's own limit is twice that.
const maxSize = math.MaxInt32

func spanOf(view []byte, off int) span {
	return span{unsafe.SliceData(view), int32(off), int32(len(view))}
}

// view is the span's bytes; false if they lie in several buffers.
func (s *span) view() ([]byte, bool) {
	if s.first == nil {
		return nil, s.n == 0
	}
	return unsafe.Slice(s.first, s.n), true
}

func (s *span) end() int { return int(s.off) + int(s.n) }

// Tensor is one tensor of an Open Inference Protocol message.
type Tensor struct {
	// Elements is the number of elements that the shape promises, 1 for a
	// scalar, -1 if the shape has a negative dimension or overflows.
	Elements int64
	// SharedMemory says that the data lies in shared memory and cannot be seen.
	SharedMemory bool
	// Shadowed says that decoders drop the message that the tensor is in.
	Shadowed bool

	text     bool // has typed elements that are text
	node     int32
	group    int32 // the message that the tensor and its raw entry are in
	raw      int32 // index of the raw entry, or -1
	datatype span
	count    int64 // typed elements
}

// node is one occurrence of a message, map entry or raw tensor.
type node struct {
	f      *field // nil for the message itself
	parent int32
	inst   int32 // the first occurrence of the same singular message, or itself
	tensor int32
	first  int32 // of an instance: the next tensor to take a raw entry
	raws   int32 // of an instance: its raw entries
	slots  int32 // of an instance: its first slot

	pos      int32 // where the tag starts
	size     int32 // where the length starts
	off, end int32 // the value; off is the index in the list if walked

	delta int32  // scratch of edits
	dead  bool   // dropped by decoders, or deleted
	done  bool   // scratch of edits
	label span   // the map key, or the name of the tensor or output
	key   uint64 // the map key, if it is a number
}

// slot is the last occurrence of a singular field or oneof.
type slot struct {
	num int32 // field number, 0 if there was none
	ref int32 // index of the Field + 1, or -(index of the node + 1), or 0
}

// rawEntry is one element of a ROLE_TENSOR_RAW field.
type rawEntry struct {
	f      *field
	node   int32
	tensor int32 // -1 if it belongs to none
	pos    int32
	size   int32
	value  span
}

// run is some typed numbers of a tensor: packed, single, or a list if walked.
type run struct {
	f      *field
	node   int32
	tensor int32
	pos    int32 // where its tag starts; its rank if walked
	packed bool
	value  span
}

func (m *Message) reset(p *Program) {
	if m.prog != nil || m.Edited() {
		m.Release()
	}
	if s := m.shape; s != nil {
		s.again, s.roles = false, false
		if s.held {
			s.held = false
			m.clear()
		}
	}
	m.prog, m.left = p, p.opts.MaxFields
}

// Release drops what the message refers to: buffers, which it does not free,
// or the Go message. What was read from it is not to be used any more.
func (m *Message) Release() {
	if m.shape == nil || !m.shape.release(m) {
		m.clear()
	}
}

func (m *Message) clear() {
	clear(m.Fields)
	clear(m.Tensors)
	clear(m.nodes)
	clear(m.msgs)
	clear(m.raws)
	clear(m.runs)
	clear(m.keys)
	clear(m.splices)
	clear(m.values)
	m.Fields, m.Tensors, m.Unknown, m.Choice = m.Fields[:0], m.Tensors[:0], 0, 0
	m.nodes, m.slots, m.raws, m.runs = m.nodes[:0], m.slots[:0], m.raws[:0], m.runs[:0]
	m.entries, m.keys, m.splices = m.entries[:0], m.keys[:0], m.splices[:0]
	m.starts, m.msgs = m.starts[:0], m.msgs[:0]
	m.values, m.meant = m.values[:0], nil
	m.prog, m.raw, m.typed, m.size = nil, nil, nil, 0
	m.killed, m.edited, m.appended, m.clone = false, false, nil, nil
}

// Size is the encoded size of the message in bytes, before edits.
func (m *Message) Size() int {
	if m.typed != nil {
		return proto.Size(m.typed)
	}
	return m.size
}

// Bytes is the value of a string or bytes field, nil for any other. It is a
// view: valid as long as the message's buffers, and not to be changed. It
// allocates only for a value that lies in several buffers. After Set it is the
// new value.
func (m *Message) Bytes(f *Field) []byte {
	if !m.IsString(f) {
		return nil
	}
	switch {
	case f.set > 0:
		return m.values[f.set-1]
	case f.set < 0:
		return m.meant[-f.set-1]
	}
	return m.bytes(&f.value)
}

// bytes is the span's value.
func (m *Message) bytes(s *span) []byte {
	if s.n == 0 {
		return []byte{}
	}
	if s.first == nil {
		s.first = unsafe.SliceData(m.copyOut(make([]byte, s.n), int(s.off)))
	}
	return unsafe.Slice(s.first, s.n)
}

// at is a cursor at the beginning of the span.
func (m *Message) at(s *span) cursor {
	b, ok := s.view()
	switch {
	case !ok:
		return m.seek(int(s.off))
	case m.typed != nil:
		return cursor{b: b}
	}
	return cursor{b: b, pos: int(s.off)}
}

// copyOut fills dst with the message's bytes from off on.
func (m *Message) copyOut(dst []byte, off int) []byte {
	c := m.seek(off)
	for n := 0; n < len(dst) && c.more(); {
		k := copy(dst[n:], c.b)
		c.advance(k)
		n += k
	}
	return dst
}

// seek is a cursor at the offset off. A sender decides how many buffers there
// are, so they are not counted again for each value.
func (m *Message) seek(off int) cursor {
	if len(m.starts) == 0 {
		pos := 0
		for _, b := range m.raw {
			m.starts = append(m.starts, pos)
			pos += b.Len()
		}
	}
	i, _ := slices.BinarySearch(m.starts, off+1)
	if i == 0 {
		return cursor{}
	}
	c := cursor{bufs: m.raw[i-1:], pos: m.starts[i-1]}
	c.skip(off - c.pos)
	return c
}

// IsString reports whether the field is a string or bytes field, rather than a
// number or bool.
func (m *Message) IsString(f *Field) bool {
	return f.f.kind == protoreflect.StringKind || f.f.kind == protoreflect.BytesKind
}

// IsElement reports whether the field is an element of its tensor.
func (m *Message) IsElement(f *Field) bool {
	return f.Tensor >= 0 && (f.f.use == useElement || f.f.use == useRaw || f.f.use == useBytes)
}

// Sized reports whether the field is all of a tensor of bytes. Its length is that
// of the shape, and stays: see [Message.Set].
func (m *Message) Sized(f *Field) bool { return f.sized }

// Int is the value of an integer, enum or bool field, and whether it has one.
// A number above the largest int64 is the largest int64.
func (m *Message) Int(f *Field) (int64, bool) {
	switch f.f.kind {
	case protoreflect.StringKind, protoreflect.BytesKind, protoreflect.FloatKind, protoreflect.DoubleKind:
		return 0, false
	case protoreflect.Uint64Kind, protoreflect.Fixed64Kind:
		return int64(min(f.num, math.MaxInt64)), true
	}
	return int64(f.num), true
}

// AppendText appends the value as text to dst: text as it is, a number in
// decimal, a bool as true or false. [Message.Set] takes the same form.
func (m *Message) AppendText(dst []byte, f *Field) []byte {
	switch f.f.kind {
	case protoreflect.StringKind, protoreflect.BytesKind:
		return append(dst, m.Bytes(f)...)
	case protoreflect.BoolKind:
		return strconv.AppendBool(dst, f.num != 0)
	case protoreflect.Uint64Kind, protoreflect.Fixed64Kind:
		return strconv.AppendUint(dst, f.num, 10)
	case protoreflect.FloatKind:
		return strconv.AppendFloat(dst, float64(math.Float32frombits(uint32(f.num))), 'g', -1, 32)
	case protoreflect.DoubleKind:
		return strconv.AppendFloat(dst, math.Float64frombits(f.num), 'g', -1, 64)
	}
	return strconv.AppendInt(dst, int64(f.num), 10)
}

// Key is the map key of a field that is a map's value (the parameter's name),
// the tensor's name for a tensor's element, and "" for any other field. Map
// keys that are text are fields of their own too, with the role Identifier,
// so that a parameter without a value is not overlooked.
func (m *Message) Key(f *Field) string {
	if m.IsElement(f) {
		return m.intern(m.Name(&m.Tensors[f.Tensor]))
	}
	if n := m.entryOf(f); n >= 0 && f.f.use != useKey {
		return m.label(n)
	}
	return ""
}

// KeyBytes is [Message.Key] as a view: valid as long as the message's buffers,
// and not to be changed. It is nil for map keys that are not text.
func (m *Message) KeyBytes(f *Field) []byte {
	if m.IsElement(f) {
		return m.Name(&m.Tensors[f.Tensor])
	}
	n := m.entryOf(f)
	if n < 0 || f.f.use == useKey || m.nodes[n].f.sub.low[1].kind != protoreflect.StringKind {
		return nil
	}
	return m.bytes(&m.nodes[n].label)
}

// entryOf is the map entry whose value the field is, or is in, or whose key;
// -1 if there is none.
func (m *Message) entryOf(f *Field) int32 {
	n := &m.nodes[f.node]
	if n.f != nil && n.f.isMap {
		return f.node
	}
	if n.f != nil && n.parent >= 0 && f.f.use != useRaw {
		if p := &m.nodes[n.parent]; p.f != nil && p.f.isMap {
			return n.parent
		}
	}
	return -1
}

// label is the map key of an entry, or the name of a tensor.
func (m *Message) label(n int32) string {
	node := &m.nodes[n]
	if node.f.isMap {
		switch k := node.f.sub.low[1].kind; k {
		case protoreflect.StringKind:
		case protoreflect.BoolKind:
			return strconv.FormatBool(node.key != 0)
		case protoreflect.Uint32Kind, protoreflect.Uint64Kind, protoreflect.Fixed32Kind, protoreflect.Fixed64Kind:
			return strconv.FormatUint(node.key, 10)
		default:
			return strconv.FormatInt(int64(node.key), 10)
		}
	}
	return m.intern(m.bytes(&node.label))
}

// intern makes a string of b. Names repeat from message to message, so the last
// few are kept; a view of the buffers would not be safe to keep as a map key.
func (m *Message) intern(b []byte) string {
	if s, ok := m.names[string(b)]; ok {
		return s
	}
	if len(b) > 64 {
		return string(b)
	}
	if m.names == nil || len(m.names) >= 64 {
		m.names = make(map[string]string)
	}
	s := string(b)
	m.names[s] = s
	return s
}

// Path names the field for people and rules: "model_name",
// "parameters.NOTE", "inputs.TEXT" for the elements of the tensor TEXT,
// "inputs.TEXT.parameters.content_type", "infer_response.outputs.OUT".
func (m *Message) Path(f *Field) string {
	var b strings.Builder
	if m.IsElement(f) {
		m.path(&b, m.Tensors[f.Tensor].node)
		return b.String()
	}
	n := f.node
	if f.f.use == useRaw {
		n = m.nodes[n].parent
	}
	m.path(&b, n)
	if e := m.entryOf(f); e < 0 || e != f.node && !f.f.oneof {
		if b.Len() > 0 {
			b.WriteByte('.')
		}
		b.WriteString(f.f.name)
	}
	return b.String()
}

func (m *Message) path(b *strings.Builder, n int32) {
	node := &m.nodes[n]
	if node.f == nil {
		return
	}
	m.path(b, node.parent)
	if p := m.nodes[node.parent].f; p != nil && p.isMap {
		return // the value in an entry
	}
	if b.Len() > 0 {
		b.WriteByte('.')
	}
	b.WriteString(node.f.name)
	if node.f.isMap || node.f.sub != nil && (node.f.sub.place == tensor || node.f.sub.place == requested) {
		b.WriteByte('.')
		b.WriteString(m.label(n))
	}
}

// Name and Datatype are what a tensor says of itself.
func (m *Message) Name(t *Tensor) []byte { return m.bytes(&m.nodes[t.node].label) }

// Datatype is the tensor's element type, such as "BYTES".
func (m *Message) Datatype(t *Tensor) []byte { return m.bytes(&t.datatype) }

// Ints appends up to max elements of an integer or BOOL tensor, in whichever
// form they are, to dst. Numbers above the largest int64 are the largest
// int64. Other tensors, and what the data has no room for, append nothing.
func (m *Message) Ints(dst []int64, t *Tensor, max int) []int64 {
	dt := datatype(m.Datatype(t))
	if !dt.integer() {
		return dst
	}
	if t.raw >= 0 {
		r := &m.raws[t.raw]
		n := min(max, int(r.value.n)/dt.size)
		b, ok := r.value.view()
		if !ok {
			b = m.copyOut(make([]byte, n*dt.size), int(r.value.off))
		}
		for i := range n {
			dst = append(dst, dt.int(b[i*dt.size:]))
		}
		return dst
	}
	self := int32(slices.IndexFunc(m.Tensors, func(x Tensor) bool { return x.node == t.node }))
	for i := range m.runs {
		r := &m.runs[i]
		if r.tensor != self || r.f.kind != dt.kind {
			continue
		}
		if m.typed != nil {
			msg := m.msgs[r.node]
			for l, i := msg.Get(own(msg, r.f)).List(), 0; i < l.Len() && max > 0; i, max = i+1, max-1 {
				dst = append(dst, saturate(r.f.kind, numberOf(r.f.kind, l.Get(i))))
			}
			continue
		}
		for c := m.seek(int(r.value.off)); c.pos < r.value.end() && max > 0; max-- {
			v, _, _ := c.number(r.f)
			v, _ = normal(r.f.kind, v)
			dst = append(dst, saturate(r.f.kind, v))
		}
	}
	return dst
}

// Mean adds to Fields the text that the token ids of the i-th field stand for, with
// the role r. It is at the path of the ids, can be read as any other and cannot be
// changed. Mean keeps text, and moves Fields.
func (m *Message) Mean(i int, r Role, text []byte) {
	m.meant = append(m.meant, text)
	f := m.Fields[i]
	f.Role, f.f, f.set = r, f.f.text, -int32(len(m.meant))
	m.Fields = append(m.Fields, f)
}

// Fixed reports whether the field is a text that token ids stand for, which
// cannot be changed.
func (m *Message) Fixed(f *Field) bool { return f.set < 0 }

// Sibling is the text in the same message as the i-th field; -1 if there is none.
func (m *Message) Sibling(i int) int {
	return slices.IndexFunc(m.Fields, func(f Field) bool {
		return f.node == m.Fields[i].node && f.set >= 0 && !f.Shadowed && IsText(f.Role) && m.IsString(&f)
	})
}

// IDs appends the token ids of a field with [PromptIDs], [OutputIDs] or
// [OutputIDsTotal] to dst. A field that serialisers write unpacked has one id for
// each occurrence; [Message.Int] says how many there are.
func (m *Message) IDs(dst []int64, f *Field) []int64 {
	if f.f.use != useIDs {
		return dst
	}
	if m.typed != nil {
		msg := m.msgs[f.node]
		for l, i := msg.Get(own(msg, f.f)).List(), 0; i < l.Len(); i++ {
			dst = append(dst, saturate(f.f.kind, numberOf(f.f.kind, l.Get(i))))
		}
		return dst
	}
	c := m.seek(int(f.value.off))
	for range f.num {
		v, _, _ := c.number(f.f)
		v, _ = normal(f.f.kind, v)
		dst = append(dst, saturate(f.f.kind, v))
	}
	return dst
}

func saturate(k protoreflect.Kind, v uint64) int64 {
	if k == protoreflect.Uint64Kind || k == protoreflect.Fixed64Kind {
		return int64(min(v, math.MaxInt64))
	}
	return int64(v)
}

// dtype is a tensor element type of the Open Inference Protocol: the bytes of
// an element (0 for BYTES, -1 if there is no such type) and the kind of the
// typed field that holds it (0 if none does).
type dtype struct {
	size   int
	kind   protoreflect.Kind
	signed bool
}

func (d dtype) integer() bool {
	switch d.kind {
	case protoreflect.FloatKind, protoreflect.DoubleKind, protoreflect.BytesKind, 0:
		return false
	}
	return true
}

func (d dtype) int(b []byte) int64 {
	switch {
	case d.kind == protoreflect.BoolKind && b[0] != 0:
		return 1
	case d.size == 1 && d.signed:
		return int64(int8(b[0]))
	case d.size == 1:
		return int64(b[0])
	case d.size == 2 && d.signed:
		return int64(int16(binary.LittleEndian.Uint16(b)))
	case d.size == 2:
		return int64(binary.LittleEndian.Uint16(b))
	case d.size == 4 && d.signed:
		return int64(int32(binary.LittleEndian.Uint32(b)))
	case d.size == 4:
		return int64(binary.LittleEndian.Uint32(b))
	case d.signed:
		return int64(binary.LittleEndian.Uint64(b))
	}
	return int64(min(binary.LittleEndian.Uint64(b), math.MaxInt64))
}

func datatype(name []byte) dtype {
	switch string(name) {
	case "BYTES":
		return dtype{0, protoreflect.BytesKind, false}
	case "BOOL":
		return dtype{1, protoreflect.BoolKind, false}
	case "UINT8":
		return dtype{1, protoreflect.Uint32Kind, false}
	case "UINT16":
		return dtype{2, protoreflect.Uint32Kind, false}
	case "UINT32":
		return dtype{4, protoreflect.Uint32Kind, false}
	case "UINT64":
		return dtype{8, protoreflect.Uint64Kind, false}
	case "INT8":
		return dtype{1, protoreflect.Int32Kind, true}
	case "INT16":
		return dtype{2, protoreflect.Int32Kind, true}
	case "INT32":
		return dtype{4, protoreflect.Int32Kind, true}
	case "INT64":
		return dtype{8, protoreflect.Int64Kind, true}
	case "FP16", "BF16":
		return dtype{size: 2}
	case "FP32":
		return dtype{4, protoreflect.FloatKind, false}
	case "FP64":
		return dtype{8, protoreflect.DoubleKind, false}
	}
	return dtype{size: -1}
}
