package fields

import (
	"fmt"
	"math"
	"strings"
	"unicode/utf8"

	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/reflect/protoreflect"
)

// Kind says what is wrong with a message.
type Kind uint8

const (
	// Malformed messages cannot be read.
	Malformed Kind = iota + 1
	// Ambiguous messages can be read, but decoders differ on how.
	Ambiguous
	// TooLarge messages exceed [Options] MaxFields or MaxDepth.
	TooLarge
	// Uninspectable messages can be read, but not what the model server would make
	// of them.
	Uninspectable
)

func (k Kind) String() string {
	switch k {
	case Malformed:
		return "malformed"
	case Ambiguous:
		return "ambiguous"
	case TooLarge:
		return "too large"
	case Uninspectable:
		return "uninspectable"
	}
	return fmt.Sprintf("Kind(%d)", uint8(k))
}

// Error says why a message was refused. It holds names from the descriptor and
// numbers, never content of the message.
type Error struct {
	Kind Kind
	// Path names the field by the names in the descriptor, such as
	// "inputs.contents.bytes_contents". Empty is the message itself.
	Path string
	// What is wrong.
	What string
}

func (e *Error) Error() string {
	if e.Path == "" {
		return fmt.Sprintf("%s message: %s", e.Kind, e.What)
	}
	return fmt.Sprintf("%s message: %s: %s", e.Kind, e.Path, e.What)
}

// fail makes an Error at the field f (or nil) of the node n.
func (m *Message) fail(k Kind, n int32, f *field, what string) error {
	var path []string
	if f != nil {
		path = append(path, f.name)
	}
	for ; n > 0; n = m.nodes[n].parent {
		path = append(path, m.nodes[n].f.name)
	}
	for i, j := 0, len(path)-1; i < j; i, j = i+1, j-1 {
		path[i], path[j] = path[j], path[i]
	}
	return &Error{Kind: k, Path: strings.Join(path, "."), What: what}
}

// Scan reads the wire bytes of one message into m. It accepts what
// google.golang.org/protobuf accepts and reads the same from it, except that
// required fields of proto2 are not asked for, extensions are unknown fields,
// and the limits of [Options] hold. A strict program refuses more. The error is
// an [*Error]; m then holds nothing to rely on.
//
// Scan keeps data in m, and does not take a reference to its buffers.
func (p *Program) Scan(m *Message, data mem.BufferSlice) error {
	m.reset(p)
	m.raw = data
	s := scanner{m: m, strict: p.opts.Strict, depth: p.opts.MaxDepth}
	s.c.bufs = data
	root, err := s.node(nil, -1, p.root.slots, -1)
	if err != nil {
		return err
	}
	root.tensor = -1
	// The end is not known before it is reached: to add up 512 buffers would take
	// longer than to scan the tensor that lies in them.
	err = s.message(p.root, 0, maxSize)
	if (err != nil || s.c.more()) && data.Len() > maxSize {
		return m.fail(TooLarge, 0, nil, tooLong)
	}
	if err != nil {
		return err
	}
	m.size = s.c.pos
	m.nodes[0].end = int32(m.size)
	return m.finish()
}

type scanner struct {
	m      *Message
	c      cursor
	strict bool
	depth  int // levels left
	at     int32
	f      *field
}

func (s *scanner) fail(k Kind, what string) error { return s.m.fail(k, s.at, s.f, what) }

const (
	truncated  = "it ends in the middle of a field"
	badVarint  = "a varint is cut off or longer than 64 bits"
	longVarint = "a varint is longer than it needs to be"
	notUTF8    = "a string is not valid UTF-8"
	tooLong    = "it is longer than 2 GiB"
)

// varint reads a tag or a length.
func (s *scanner) varint() (uint64, error) {
	if b := s.c.b; len(b) > 0 && b[0] < 0x80 {
		s.c.advance(1)
		return uint64(b[0]), nil
	}
	return s.longVarint()
}

func (s *scanner) longVarint() (uint64, error) {
	v, n, ok := s.c.varint()
	if !ok {
		return 0, s.fail(Malformed, badVarint)
	}
	if s.strict && n > 1 && n != protowire.SizeVarint(v) {
		return 0, s.fail(Ambiguous, longVarint)
	}
	return v, nil
}

// number reads a number.
func (s *scanner) number(f *field) (uint64, error) {
	v, minimal, ok := s.c.number(f)
	if !ok {
		return 0, s.fail(Malformed, badVarint)
	}
	v, exact := normal(f.kind, v)
	if s.strict && !minimal {
		return 0, s.fail(Ambiguous, longVarint)
	}
	if s.strict && !exact {
		return 0, s.fail(Ambiguous, "a number is larger than the field's type")
	}
	return v, nil
}

// length reads a length that fits before end.
func (s *scanner) length(end int) (int, error) {
	if b := s.c.b; len(b) > 0 && b[0] < 0x80 && int(b[0]) < end-s.c.pos {
		s.c.advance(1)
		return int(b[0]), nil
	}
	n, err := s.varint()
	if err != nil {
		return 0, err
	}
	if s.c.pos > end || n > uint64(end-s.c.pos) {
		return 0, s.fail(Malformed, "a length goes past the end")
	}
	return int(n), nil
}

// spend takes one from what MaxFields allows.
func (m *Message) spend(at int32, f *field) error {
	if m.left == 0 {
		return m.tooMany(at, f)
	}
	m.left--
	return nil
}

func (m *Message) tooMany(at int32, f *field) error {
	return m.fail(TooLarge, max(at, 0), f, fmt.Sprintf("the message has more than %d fields and tensors", m.prog.opts.MaxFields))
}

// grown is s with one more element, and a pointer to that. It is zero:
// [Message.Release] clears all that was used.
func grown[T any](s []T) ([]T, *T) {
	if n := len(s); n < cap(s) {
		s = s[:n+1]
		return s, &s[n]
	}
	var zero T
	s = append(s, zero)
	return s, &s[len(s)-1]
}

// add remembers one field of the node at. The caller fills in the rest; what
// it gets moves with the next field.
func (m *Message) add(f *field, at int32) (x *Field, err error) {
	if err := m.spend(at, f); err != nil {
		return nil, err
	}
	m.Fields, x = grown(m.Fields)
	x.Role, x.Tensor, x.f, x.node = f.role, m.nodes[at].tensor, f, at
	return x, nil
}

// node remembers one occurrence of a message and, unless it goes on with the
// node same, makes room for its slots. The caller fills in the rest; what it
// gets moves with the next node.
func (s *scanner) node(f *field, at int32, slots int, same int32) (n *node, err error) {
	m := s.m
	if err := m.spend(at, f); err != nil {
		return nil, err
	}
	m.nodes, n = grown(m.nodes)
	n.f, n.parent = f, at
	if same >= 0 {
		n.inst, n.slots = m.nodes[same].inst, m.nodes[same].slots
		return n, nil
	}
	n.inst, n.slots = int32(len(m.nodes)-1), int32(len(m.slots))
	for range slots { // few: quicker than to grow and clear
		m.slots = append(m.slots, slot{})
	}
	return n, nil
}

// part reads the length of a sub-message, and remembers it as a node.
func (s *scanner) part(f *field, at int32, pos, end int, same int32) (i int32, stop int, err error) {
	size := s.c.pos
	length, err := s.length(end)
	if err != nil {
		return 0, 0, err
	}
	n, err := s.node(f, at, f.sub.slots, same)
	if err != nil {
		return 0, 0, err
	}
	n.tensor = s.m.nodes[at].tensor
	stop = s.c.pos + length
	n.pos, n.size, n.off, n.end = int32(pos), int32(size), int32(s.c.pos), int32(stop)
	return int32(len(s.m.nodes) - 1), stop, nil
}

// message reads the fields of the node at up to end.
func (s *scanner) message(t *table, at int32, end int) error {
	if s.depth == 0 {
		s.at, s.f = at, nil
		return s.fail(TooLarge, fmt.Sprintf("messages nest deeper than %d", s.m.prog.opts.MaxDepth))
	}
	s.depth--
	for s.c.pos < end {
		s.at, s.f = at, nil
		if len(s.c.b) == 0 && !s.c.more() {
			if at == 0 {
				break // the end of the message itself
			}
			return s.fail(Malformed, truncated)
		}
		pos := s.c.pos
		tag, err := uint64(s.c.b[0]), error(nil)
		if tag < 0x80 {
			s.c.advance(1)
		} else if tag, err = s.varint(); err != nil {
			return err
		}
		num, typ := tag>>3, protowire.Type(tag&7)
		if s.c.pos > end || num < uint64(protowire.MinValidNumber) || num > uint64(protowire.MaxValidNumber) {
			return s.fail(Malformed, "a tag is cut off or has an invalid field number")
		}
		f := t.field(protowire.Number(num))
		if f == nil || typ != f.wire && !(f.form == formNumbers && typ == protowire.BytesType) {
			if err := s.unknown(f, num, typ, end); err != nil {
				return err
			}
			continue
		}
		s.f = f
		if s.strict && f.form == formNumbers && f.packed != (typ == protowire.BytesType) {
			return s.fail(Ambiguous, "a repeated number is packed where serialisers do not pack it, or the other way round")
		}
		switch f.form {
		case formText:
			err = s.text(f, at, pos, end)
		case formMap:
			err = s.mapEntry(f, at, pos, end)
		case formMessage:
			err = s.child(f, at, pos, end)
		case formNumbers:
			err = s.numbers(f, at, pos, end, typ == protowire.BytesType)
		default:
			err = s.single(f, at, pos)
		}
		if err != nil {
			return err
		}
		if s.c.pos > end {
			return s.fail(Malformed, truncated)
		}
	}
	s.depth++
	return nil
}

// unknown passes a field that the descriptor does not have, or has with another
// wire type.
func (s *scanner) unknown(f *field, num uint64, typ protowire.Type, end int) error {
	if typ == protowire.EndGroupType || typ > protowire.Fixed32Type {
		return s.fail(Malformed, fmt.Sprintf("field %d has an invalid wire type", num))
	}
	if s.strict {
		if f != nil {
			return s.fail(Ambiguous, fmt.Sprintf("field %d has the wrong wire type", num))
		}
		return s.fail(Ambiguous, fmt.Sprintf("field %d is unknown", num))
	}
	s.m.Unknown++
	return s.skip(num, typ, end)
}

// skip passes the value of an unknown field.
func (s *scanner) skip(num uint64, typ protowire.Type, end int) error {
	var ok bool
	switch typ {
	case protowire.VarintType:
		_, _, ok = s.c.varint()
	case protowire.Fixed32Type:
		ok = s.c.skip(4)
	case protowire.Fixed64Type:
		ok = s.c.skip(8)
	case protowire.BytesType:
		n, err := s.length(end)
		if err != nil {
			return err
		}
		ok = s.c.skip(n)
	case protowire.StartGroupType:
		return s.group(num, end)
	default:
		ok = false
	}
	if !ok || s.c.pos > end {
		return s.fail(Malformed, truncated)
	}
	return nil
}

// group passes the fields of a group up to its end.
func (s *scanner) group(num uint64, end int) error {
	if s.depth == 0 {
		return s.fail(TooLarge, fmt.Sprintf("groups nest deeper than %d", s.m.prog.opts.MaxDepth))
	}
	s.depth--
	for {
		tag, err := s.varint()
		if err != nil {
			return err
		}
		n, typ := tag>>3, protowire.Type(tag&7)
		// As in protobuf-go, numbers within an unknown group may be larger.
		if s.c.pos > end || n < uint64(protowire.MinValidNumber) || n > math.MaxInt32 {
			return s.fail(Malformed, "a tag is cut off or has an invalid field number")
		}
		if typ == protowire.EndGroupType {
			if n != num {
				return s.fail(Malformed, "a group does not end with its own number")
			}
			s.depth++
			return nil
		}
		if err := s.skip(n, typ, end); err != nil {
			return err
		}
	}
}

// claim is called before an occurrence of a singular field is remembered. It
// finds the field's slot, -1 if it has none, and whether it is taken: then
// again is to be called.
func (m *Message) claim(f *field, at int32) (i int, taken bool) {
	if f.slot < 0 {
		return -1, false
	}
	i = int(m.nodes[at].slots) + f.slot
	return i, m.slots[i].num != 0
}

// again drops the occurrence in slot i that one of the field f replaces. same is
// the node of the same message that this one goes on with, or -1.
func (s *scanner) again(f *field, i int) (same int32, err error) {
	m := s.m
	old := m.slots[i]
	if s.strict {
		if old.num != int32(f.num) {
			return 0, s.fail(Ambiguous, "more than one member of a oneof is set")
		}
		return 0, s.fail(Ambiguous, "a field that can stand once stands twice")
	}
	if f.sub != nil && old.num == int32(f.num) {
		return -old.ref - 1, nil
	}
	switch {
	case old.ref > 0:
		m.Fields[old.ref-1].Shadowed = true
	case old.ref < 0:
		m.nodes[-old.ref-1].dead, m.killed = true, true
	}
	return -1, nil
}

// child reads a sub-message.
func (s *scanner) child(f *field, at int32, pos, end int) error {
	m := s.m
	i, taken := m.claim(f, at)
	same := int32(-1)
	if taken {
		var err error
		if same, err = s.again(f, i); err != nil {
			return err
		}
	}
	mark := len(m.slots)
	ni, stop, err := s.part(f, at, pos, end, same)
	if err != nil {
		return err
	}
	if i >= 0 && same < 0 {
		m.slots[i] = slot{int32(f.num), -ni - 1}
	}
	if f.role != None {
		x, err := m.add(f, at)
		if err != nil {
			return err
		}
		x.pos = int32(pos)
	}
	if err := m.enter(f, ni); err != nil {
		return err
	}
	if err := s.message(f.sub, ni, stop); err != nil {
		return err
	}
	if f.list {
		m.slots = m.slots[:mark] // its slots are not needed again
	}
	return nil
}

// enter begins the tensor that the node is, if it is one.
func (m *Message) enter(f *field, n int32) error {
	if f.sub.place != tensor {
		return nil
	}
	if err := m.spend(n, nil); err != nil {
		return err
	}
	group := m.nodes[m.nodes[n].parent].inst
	if m.nodes[group].first == 0 {
		m.nodes[group].first = int32(len(m.Tensors)) + 1
	}
	m.nodes[n].tensor = int32(len(m.Tensors))
	var t *Tensor
	m.Tensors, t = grown(m.Tensors)
	t.Elements, t.node, t.group, t.raw = 1, n, group, -1
	return nil
}

// mapEntry reads an entry of a map.
func (s *scanner) mapEntry(f *field, at int32, pos, end int) error {
	m := s.m
	mark := len(m.slots)
	ni, stop, err := s.part(f, at, pos, end, -1)
	if err != nil {
		return err
	}
	m.entries = append(m.entries, ni)
	if err := s.message(f.sub, ni, stop); err != nil {
		return err
	}
	// A value that is left out is the default value.
	if v := f.sub.low[2]; v.sub == nil && v.use != useNone && m.slots[mark+v.slot].num == 0 {
		x, err := m.add(v, ni)
		if err != nil {
			return err
		}
		x.pos, x.value.off = int32(stop), int32(stop)
	}
	m.slots = m.slots[:mark]
	m.named(ni)
	return nil
}

// named takes note of a map entry whose key is known.
func (m *Message) named(n int32) {
	node := &m.nodes[n]
	p := &m.nodes[node.parent]
	if p.f != nil && p.f.sub != nil && p.f.sub.place == tensor &&
		node.f.sub.low[1].kind == protoreflect.StringKind && string(m.bytes(&node.label)) == "shared_memory_region" {
		m.Tensors[p.tensor].SharedMemory = true
	}
}

// single reads a singular number.
func (s *scanner) single(f *field, at int32, pos int) error {
	m := s.m
	i, taken := m.claim(f, at)
	if taken {
		if _, err := s.again(f, i); err != nil {
			return err
		}
	}
	v, err := s.number(f)
	if err != nil {
		return err
	}
	ref := int32(0)
	switch f.use {
	case useKey:
		m.nodes[at].key = v
	case useValue:
		x, err := m.add(f, at)
		if err != nil {
			return err
		}
		x.pos, x.num, x.value.off = int32(pos), v, int32(s.c.pos)
		ref = int32(len(m.Fields))
	}
	m.slots[i] = slot{int32(f.num), ref}
	return nil
}

// numbers reads one or a packed run of repeated numbers.
func (s *scanner) numbers(f *field, at int32, pos, end int, packed bool) error {
	m := s.m
	start := s.c.pos
	stop := -1
	if packed {
		n, err := s.length(end)
		if err != nil {
			return err
		}
		start, stop = s.c.pos, s.c.pos+n
	}
	count := int64(0)
	size := 0
	switch f.wire {
	case protowire.Fixed32Type:
		size = 4
	case protowire.Fixed64Type:
		size = 8
	}
	if packed && size > 0 && f.use != useShape {
		if (stop-start)%size != 0 {
			return s.fail(Malformed, truncated)
		}
		if !s.c.skip(stop - start) {
			return s.fail(Malformed, truncated)
		}
		count = int64((stop - start) / size)
	} else {
		for !packed || s.c.pos < stop {
			v, err := s.number(f)
			if err != nil {
				return err
			}
			count++
			if f.use == useShape {
				m.Tensors[m.nodes[at].tensor].dim(saturate(f.kind, v))
			}
			if !packed {
				break
			}
		}
		if packed && s.c.pos > stop {
			return s.fail(Malformed, truncated)
		}
	}
	switch f.use {
	case useIDs:
		x, err := m.add(f, at)
		if err != nil {
			return err
		}
		x.pos, x.num, x.value = int32(pos), uint64(count), span{off: int32(start), n: int32(s.c.pos - start)}
	case useNumbers:
		t := m.nodes[at].tensor
		m.Tensors[t].count += count
		if err := m.spend(at, f); err != nil {
			return err
		}
		m.runs = append(m.runs, run{f: f, node: at, tensor: t, pos: int32(pos), packed: packed,
			value: span{off: int32(start), n: int32(s.c.pos - start)}})
	}
	return nil
}

// text reads a string or bytes field.
func (s *scanner) text(f *field, at int32, pos, end int) error {
	m := s.m
	if f.use == useRaw {
		return s.raw(f, at, pos, end)
	}
	i, taken := m.claim(f, at)
	if taken {
		if _, err := s.again(f, i); err != nil {
			return err
		}
	}
	var v span
	switch b := s.c.short(end); {
	case b == nil:
		var err error
		if v, err = s.value(f, end); err != nil {
			return err
		}
	case f.utf8 && !utf8.Valid(b):
		return s.fail(Malformed, notUTF8)
	default:
		v = spanOf(b, s.c.pos-len(b))
	}
	ref := int32(0)
	if f.role != None {
		x, err := m.add(f, at)
		if err != nil {
			return err
		}
		x.pos, x.value = int32(pos), v
		ref = int32(len(m.Fields))
	}
	if i >= 0 {
		m.slots[i] = slot{int32(f.num), ref}
	}
	if f.use > useValue {
		m.noted(f, at, v)
	}
	return nil
}

// value reads the length and value of a string or bytes field.
func (s *scanner) value(f *field, end int) (v span, err error) {
	n, err := s.length(end)
	if err != nil {
		return v, err
	}
	begin := s.c
	v, ok := s.c.take(n)
	if !ok {
		return v, s.fail(Malformed, truncated)
	}
	if f.utf8 {
		if b, ok := v.view(); !(ok && utf8.Valid(b) || !ok && begin.validUTF8(n)) {
			return v, s.fail(Malformed, notUTF8)
		}
	}
	return v, nil
}

// raw reads one entry of raw tensor data.
func (s *scanner) raw(f *field, at int32, pos, end int) error {
	m := s.m
	size := s.c.pos
	n, err := s.length(end)
	if err != nil {
		return err
	}
	v, ok := s.c.take(n)
	if !ok {
		return s.fail(Malformed, truncated)
	}
	if err := m.spend(at, f); err != nil {
		return err
	}
	m.addRaw(f, at, int32(pos), int32(size), v)
	return nil
}

// noted takes note of a text that says something of the node around it.
func (m *Message) noted(f *field, at int32, v span) {
	n := &m.nodes[at]
	switch f.use {
	case useName, useKey:
		n.label = v
	case useDatatype:
		m.Tensors[n.tensor].datatype = v
	case useElement:
		t := &m.Tensors[n.tensor]
		t.count, t.text = t.count+1, true
	}
}

func (m *Message) addRaw(f *field, at int32, pos, size int32, v span) {
	var r *rawEntry
	m.raws, r = grown(m.raws)
	r.f, r.node, r.tensor, r.pos, r.size, r.value = f, at, -1, pos, size, v
	m.nodes[m.nodes[at].inst].raws++
}
