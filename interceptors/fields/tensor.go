package fields

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"hash/maphash"
	"math/bits"
	"slices"

	"google.golang.org/protobuf/reflect/protoreflect"
)

// dim multiplies the tensor's elements by one dimension of its shape.
func (t *Tensor) dim(d int64) {
	if d < 0 || t.Elements < 0 {
		t.Elements = -1
		return
	}
	hi, lo := bits.Mul64(uint64(t.Elements), uint64(d))
	if t.Elements = int64(lo); hi != 0 {
		t.Elements = -1
	}
}

// finish is called when a message has been read: only then is it known which
// raw entry belongs to which tensor, and which map keys stand twice.
func (m *Message) finish() error {
	if err := m.duplicates(); err != nil {
		return err
	}
	m.assign()
	if m.prog.opts.Strict {
		for i := range m.Tensors {
			if err := m.check(&m.Tensors[i]); err != nil {
				return err
			}
		}
	}
	ordered := len(m.prog.opts.Bytes) == 0
	if !ordered {
		if err := m.typedBytes(); err != nil {
			return err
		}
	}
	for i := range m.raws {
		if n := len(m.Fields); n > 0 && m.Fields[n-1].pos > m.raws[i].pos {
			ordered = false
		}
		if err := m.elements(&m.raws[i]); err != nil {
			return err
		}
	}
	if m.killed {
		m.bury()
	}
	if !ordered {
		slices.SortStableFunc(m.Fields, func(a, b Field) int { return cmp.Compare(a.pos, b.pos) })
	}
	return nil
}

// assign gives the raw entries, in order, to the tensors that take one: those
// whose data is neither in shared memory nor typed.
func (m *Message) assign() {
	for i := range m.raws {
		r := &m.raws[i]
		g := m.nodes[r.node].inst
		next := m.nodes[g].first // the tensor's index + 1, 0 if there are none
		if next == 0 {
			continue
		}
		for j := next - 1; ; j++ {
			m.nodes[g].first = j + 2
			if int(j) >= len(m.Tensors) {
				m.nodes[g].first = j + 1
				break
			}
			if t := &m.Tensors[j]; t.group == g && !t.SharedMemory && t.count == 0 {
				t.raw, r.tensor = int32(i), j
				break
			}
		}
	}
}

// check refuses a tensor whose data do not fit its shape, or that decoders
// read differently.
func (m *Message) check(t *Tensor) error {
	dt := datatype(m.Datatype(t))
	raws := m.nodes[t.group].raws
	switch {
	case t.Elements < 0:
		return m.fail(Malformed, t.node, nil, "the shape has a negative dimension, or too many elements to count")
	case dt.size < 0:
		return m.fail(Malformed, t.node, nil, "the datatype is none of the Open Inference Protocol's")
	case t.count > 0 && raws > 0:
		return m.fail(Ambiguous, t.node, nil, "the message has raw and typed contents; send one of them")
	case t.count > 0 && t.SharedMemory:
		return m.fail(Ambiguous, t.node, nil, "the data is both in shared memory and in the message")
	case t.SharedMemory:
	case t.raw >= 0:
		r := &m.raws[t.raw]
		if dt.size == 0 {
			return nil // counted when its elements are read
		}
		if hi, lo := bits.Mul64(uint64(t.Elements), uint64(dt.size)); hi != 0 || lo != uint64(r.value.n) {
			return m.fail(Malformed, t.node, nil, "the size of the raw data is not that of the shape")
		}
	case raws > 0:
		return m.fail(Malformed, t.node, nil, "fewer raw entries than tensors")
	case t.count > 0 && !m.fits(t, dt):
		return m.fail(Ambiguous, t.node, nil, "the typed contents are of another type than the datatype")
	case t.count != t.Elements:
		return m.fail(Malformed, t.node, nil, "the number of elements is not that of the shape")
	}
	return nil
}

// fits reports whether all typed contents are of the datatype's kind.
func (m *Message) fits(t *Tensor, dt dtype) bool {
	if t.text && dt.kind != protoreflect.BytesKind {
		return false
	}
	self := m.nodes[t.node].tensor
	for i := range m.runs {
		if r := &m.runs[i]; r.tensor == self && r.f.kind != dt.kind && r.value.n > 0 {
			return false
		}
	}
	return true
}

// elements reports the elements of a raw entry, if they are text. What is not
// known to be numbers is text, so that none can hide.
func (m *Message) elements(r *rawEntry) error {
	strict := m.prog.opts.Strict
	sized := false
	if r.tensor >= 0 {
		if t := &m.Tensors[r.tensor]; datatype(m.Datatype(t)).size > 0 {
			if sized = m.isText(t); !sized {
				return nil
			}
		}
	} else if strict {
		return m.fail(Ambiguous, r.node, r.f, "more raw entries than tensors that take one")
	}
	n := int32(len(m.nodes))
	if err := m.spend(r.node, r.f); err != nil {
		return err
	}
	var x *node
	m.nodes, x = grown(m.nodes)
	x.f, x.parent, x.inst, x.tensor = r.f, r.node, n, r.tensor
	x.pos, x.size, x.off, x.end = r.pos, r.size, r.value.off, int32(r.value.end())
	c := m.at(&r.value)
	end := c.pos + int(r.value.n)
	count := int64(0)
	bare := false
	shadowed := false
	if r.tensor < 0 {
		// Beyond the last tensor no server reads an entry. Beside typed contents it
		// depends on the server which of the two is read.
		bare, shadowed = !wellFormed(c, end), !m.hasTyped(m.nodes[r.node].inst)
	} else {
		bare = sized || datatype(m.Datatype(&m.Tensors[r.tensor])).size < 0
	}
	for !bare && c.pos < end {
		next := c
		size, ok := next.fixed32()
		if !ok || next.pos > end || size > uint64(end-next.pos) {
			break
		}
		rank := m.rank(r, c.pos)
		c = next
		v, _ := c.take(int(size))
		x, err := m.element(r, n, rank, v)
		if err != nil {
			return err
		}
		x.Shadowed = shadowed
		count++
	}
	if strict && !sized && c.pos < end {
		return m.fail(Malformed, r.node, r.f, "the length of an element goes past the end of its raw entry")
	}
	if strict && !sized && count != m.Tensors[r.tensor].Elements {
		return m.fail(Malformed, m.Tensors[r.tensor].node, nil, "the number of elements is not that of the shape")
	}
	if c.pos < end {
		// What is left after a length that lies is no element to any server.
		rank := m.rank(r, c.pos)
		v, _ := c.take(end - c.pos)
		x, err := m.element(r, n, rank, v)
		if err != nil {
			return err
		}
		x.bare, x.sized, x.Shadowed = true, sized, shadowed || !bare
	}
	return nil
}

// element remembers an element of a raw entry, whose node is n.
func (m *Message) element(r *rawEntry, n int32, rank int32, v span) (*Field, error) {
	x, err := m.add(r.f, n)
	if err != nil {
		return nil, err
	}
	x.pos, x.value = rank, v
	return x, nil
}

// hasTyped reports whether a tensor of the message has typed contents.
func (m *Message) hasTyped(group int32) bool {
	for i := range m.Tensors {
		if t := &m.Tensors[i]; t.group == group && t.count > 0 {
			return true
		}
	}
	return false
}

// wellFormed reports whether the bytes up to end are elements of a BYTES tensor.
func wellFormed(c cursor, end int) bool {
	for c.pos < end {
		n, ok := c.fixed32()
		if !ok || c.pos > end || n > uint64(end-c.pos) {
			return false
		}
		c.skip(int(n))
	}
	return true
}

// rank is where an element at pos stands among the fields.
func (m *Message) rank(r *rawEntry, pos int) int32 {
	if m.typed != nil {
		return r.pos
	}
	return int32(pos)
}

// bury marks what is in dead messages.
func (m *Message) bury() {
	for i := range m.nodes {
		n := &m.nodes[i]
		n.dead = n.dead || m.nodes[n.inst].dead || n.parent >= 0 && m.nodes[n.parent].dead
	}
	for i := range m.Fields {
		f := &m.Fields[i]
		f.Shadowed = f.Shadowed || m.nodes[f.node].dead
	}
	for i := range m.Tensors {
		m.Tensors[i].Shadowed = m.nodes[m.Tensors[i].node].dead
	}
}

var seed = maphash.MakeSeed()

// duplicates drops all but the last entry of each map key.
func (m *Message) duplicates() error {
	if len(m.entries) < 2 || m.typed != nil {
		return nil
	}
	size := 1 << bits.Len(uint(2*len(m.entries)))
	m.table = slices.Grow(m.table[:0], size)[:size]
	clear(m.table)
	for _, e := range m.entries {
		n := &m.nodes[e]
		key := m.bytes(&n.label)
		// The map is the field f of the message that the entry is in.
		in := m.nodes[n.parent].inst
		var b [16]byte
		binary.LittleEndian.PutUint64(b[:], n.key)
		binary.LittleEndian.PutUint64(b[8:], uint64(n.f.num)<<32|uint64(uint32(in)))
		h := maphash.Bytes(seed, key) ^ maphash.Bytes(seed, b[:])
		for i := h; ; i++ {
			p := &m.table[i&uint64(size-1)]
			if *p == 0 {
				*p = e
				break
			}
			o := &m.nodes[*p]
			if o.f != n.f || o.key != n.key || m.nodes[o.parent].inst != in || !bytes.Equal(m.bytes(&o.label), key) {
				continue
			}
			if m.prog.opts.Strict {
				return m.fail(Ambiguous, n.parent, n.f, "a map key stands twice")
			}
			o.dead, m.killed = true, true
			*p = e
			break
		}
	}
	return nil
}
