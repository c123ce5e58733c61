package fields

import (
	"cmp"
	"math"
	"slices"
	"unsafe"

	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
)

// Walk reads a Go message into m: the same fields as [Program.Scan] finds in
// its encoding, without the shadowed ones. The message may be of any Go type
// whose descriptor has the fields of the program's, by number and kind; another
// one is Malformed. What only wire bytes can get wrong is not refused: the
// decoder has read the message already, and counted its unknown fields.
//
// Walk copies no text. It reads msg, and m refers to it until the next use.
func (p *Program) Walk(m *Message, msg proto.Message) error {
	m.reset(p)
	m.typed = msg
	w := walker{m: m, depth: p.opts.MaxDepth}
	m.nodes, m.msgs = append(m.nodes, node{parent: -1, tensor: -1}), append(m.msgs, nil)
	if err := w.message(p.root, 0, msg.ProtoReflect()); err != nil {
		return err
	}
	return m.finish()
}

type walker struct {
	m     *Message
	depth int
	pos   int32 // rank of the next field
}

// own is msg's own descriptor of the field f; nil if it has none.
func own(msg protoreflect.Message, f *field) protoreflect.FieldDescriptor {
	md := msg.Descriptor()
	if md == f.desc.Parent() {
		return f.desc
	}
	return md.Fields().ByNumber(f.num)
}

func (w *walker) message(t *table, at int32, msg protoreflect.Message) error {
	m := w.m
	if w.depth == 0 {
		return m.fail(TooLarge, at, nil, "messages nest too deep")
	}
	w.depth--
	m.msgs[at] = msg
	for b := msg.GetUnknown(); len(b) > 0; m.Unknown++ {
		_, _, n := protowire.ConsumeField(b)
		if n < 0 {
			break
		}
		b = b[n:]
	}
	for _, f := range t.all {
		fd := own(msg, f)
		if fd == nil {
			continue
		}
		if fd.Kind() != f.kind || fd.IsList() != f.list || fd.IsMap() != f.isMap {
			return m.fail(Malformed, at, f, "the field has another type in the Go message than in the descriptor")
		}
		if !msg.Has(fd) {
			continue
		}
		if err := w.field(f, at, msg.Get(fd)); err != nil {
			return err
		}
	}
	w.depth++
	return nil
}

func (w *walker) field(f *field, at int32, v protoreflect.Value) error {
	m := w.m
	switch {
	case f.isMap:
		return w.mapField(f, at, v.Map())
	case f.sub != nil && f.list:
		l := v.List()
		for i := range l.Len() {
			if err := w.child(f, at, l.Get(i).Message(), i); err != nil {
				return err
			}
		}
		return nil
	case f.sub != nil:
		return w.child(f, at, v.Message(), 0)
	case !f.list:
		return w.scalar(f, at, v, 0)
	case f.use == useNone:
		return nil
	case f.use == useIDs:
		w.pos++
		x, err := m.add(f, at)
		if err != nil {
			return err
		}
		x.pos, x.num = w.pos, uint64(v.List().Len())
		return nil
	case f.use == useNumbers:
		t := m.nodes[at].tensor
		m.Tensors[t].count += int64(v.List().Len())
		if err := m.spend(at, f); err != nil {
			return err
		}
		w.pos++
		m.runs = append(m.runs, run{f: f, node: at, tensor: t, pos: w.pos, value: span{n: int32(v.List().Len())}})
		return nil
	case f.use == useShape:
		l, t := v.List(), &m.Tensors[m.nodes[at].tensor]
		for i := range l.Len() {
			t.dim(saturate(f.kind, numberOf(f.kind, l.Get(i))))
		}
		return nil
	}
	l := v.List()
	for i := range l.Len() {
		if err := w.scalar(f, at, l.Get(i), i); err != nil {
			return err
		}
	}
	return nil
}

// child reads the i-th message of a field.
func (w *walker) child(f *field, at int32, msg protoreflect.Message, i int) error {
	m := w.m
	n, err := w.node(f, at, i)
	if err != nil {
		return err
	}
	if f.role != None {
		w.pos++
		x, err := m.add(f, at)
		if err != nil {
			return err
		}
		x.pos = w.pos
	}
	if err := m.enter(f, n); err != nil {
		return err
	}
	return w.message(f.sub, n, msg)
}

func (w *walker) node(f *field, at int32, i int) (int32, error) {
	m := w.m
	if err := m.spend(at, f); err != nil {
		return 0, err
	}
	n := int32(len(m.nodes))
	m.nodes = append(m.nodes, node{f: f, parent: at, inst: n, tensor: m.nodes[at].tensor, off: int32(i)})
	m.msgs = append(m.msgs, nil)
	return n, nil
}

func (w *walker) mapField(f *field, at int32, entries protoreflect.Map) error {
	m := w.m
	mark := len(m.keys)
	m.keys = slices.Grow(m.keys, entries.Len())
	entries.Range(func(k protoreflect.MapKey, _ protoreflect.Value) bool {
		m.keys = append(m.keys, k)
		return true
	})
	key, value := f.sub.low[1], f.sub.low[2]
	slices.SortFunc(m.keys[mark:], func(a, b protoreflect.MapKey) int {
		if key.kind == protoreflect.StringKind {
			return cmp.Compare(a.String(), b.String())
		}
		return cmp.Compare(numberOf(key.kind, a.Value()), numberOf(key.kind, b.Value()))
	})
	for i := mark; i < mark+entries.Len(); i++ {
		k := m.keys[i]
		n, err := w.node(f, at, 0)
		if err != nil {
			return err
		}
		m.msgs[n] = m.msgs[at]
		if err := w.scalar(key, n, k.Value(), 0); err != nil {
			return err
		}
		if value.sub != nil {
			err = w.child(value, n, entries.Get(k).Message(), 0)
		} else {
			err = w.scalar(value, n, entries.Get(k), 0)
		}
		if err != nil {
			return err
		}
		m.named(n)
	}
	clear(m.keys[mark:])
	m.keys = m.keys[:mark]
	return nil
}

// scalar reads the i-th value of a field.
func (w *walker) scalar(f *field, at int32, v protoreflect.Value, i int) error {
	m := w.m
	w.pos++
	if f.wire != protowire.BytesType {
		num := numberOf(f.kind, v)
		switch f.use {
		case useKey:
			m.nodes[at].key = num
		case useValue:
			x, err := m.add(f, at)
			if err != nil {
				return err
			}
			x.pos, x.num, x.value.off = w.pos, num, int32(i)
		}
		return nil
	}
	var view []byte
	if f.kind == protoreflect.StringKind {
		s := v.String()
		view = unsafe.Slice(unsafe.StringData(s), len(s))
	} else {
		view = v.Bytes()
	}
	if len(view) > maxSize {
		return m.fail(TooLarge, at, f, tooLong)
	}
	value := spanOf(view, i)
	if f.use == useRaw {
		if err := m.spend(at, f); err != nil {
			return err
		}
		m.addRaw(f, at, w.pos, 0, value)
		return nil
	}
	m.noted(f, at, value)
	if f.role == None {
		return nil
	}
	x, err := m.add(f, at)
	if err != nil {
		return err
	}
	x.pos, x.value = w.pos, value
	return nil
}

// numberOf is a number in the form of [normal].
func numberOf(k protoreflect.Kind, v protoreflect.Value) uint64 {
	switch k {
	case protoreflect.BoolKind:
		return protowire.EncodeBool(v.Bool())
	case protoreflect.EnumKind:
		return uint64(int64(v.Enum()))
	case protoreflect.FloatKind:
		return uint64(math.Float32bits(float32(v.Float())))
	case protoreflect.DoubleKind:
		return math.Float64bits(v.Float())
	case protoreflect.Uint32Kind, protoreflect.Uint64Kind, protoreflect.Fixed32Kind, protoreflect.Fixed64Kind:
		return v.Uint()
	}
	return uint64(v.Int())
}
