package fields

import (
	"cmp"
	"encoding/binary"
	"math"
	"slices"
	"unicode/utf8"

	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/encoding/protowire"
)

// shape is how a message of a stream lay on the wire, so that those after it
// that differ in their texts and numbers alone need not be parsed again: the
// chunks of a model's answer are all alike. It keeps no prompts and no outputs.
type shape struct {
	prog   *Program
	wire   []byte  // the message, without its texts
	gaps   []gap   // what may differ, in order
	few    []gap   // what differs if all that the message says of itself stays: names, ids, numbers
	like   Message // what was read from it: values lie in wire, or in gaps
	misses int     // messages in a row that were not like it
	moods  int     // messages in a row that were like it, but not in few alone
	mute   bool    // what lies in few is prompts and outputs

	// held says that the records of the message that the shape belongs to are
	// those of like, but for what lies in the gaps and moves with them.
	held  bool
	now   []gap // those of the message at hand: gaps or few
	calm  bool  // the records are those of like, but for what lies in few and moves with it
	again bool  // and so they were in the message before
	roles bool  // the roles are to stay as long as it goes on so
	still int32 // what lay before has not moved in the message at hand
	moves bool  // some offsets of the message at hand are not those of like
}

// maxShape is the size in bytes of the largest message that is remembered: far
// above a chunk of text. Lengths in it take two bytes at most. Chosen.
const maxShape = 2048

// gap is a piece of the message that may differ: a length and, but for that of a
// message, what is that long; or a number.
type gap struct {
	pos, end int32 // where it lay
	kind     gapKind
	f        *field
	field    int32 // index of its Field, if it has one
	node     int32 // of a message or element: index of its node
	raw      int32 // of raw data: index of its rawEntry
	last     int32 // of a message: the last gap before its end

	stays bool // a name, an id, a number: most messages have the same one, and wire has it

	off, to int32  // where it lies in the message at hand: its value, its end
	num     uint64 // the number, or the length of a message or of raw numbers
}

type gapKind uint8

const (
	gapMessage gapKind = iota // the length of a message in which a text may differ
	gapText                   // a text with a role, and its length
	gapNumber                 // a number with a role, which stays as long
	gapElement                // a raw entry that is one text, and its length
	gapRaw                    // a raw entry of numbers, and its length, which stays
)

// ScanNext is [Program.Scan], and reads the same. It is for messages that come
// one after the other, are likely to be alike, and are read into the same
// Message, which remembers the one before.
func (p *Program) ScanNext(m *Message, data mem.BufferSlice) error {
	if m.prog != nil || m.Edited() {
		m.Release()
	}
	if m.shape == nil {
		m.shape = new(shape)
	}
	s := m.shape
	if s.prog == p && len(data) == 1 {
		if b := data[0].ReadOnlyData(); s.resembles(b) {
			s.misses = 0
			m.prog, m.raw, m.size = p, data, len(b)
			s.fill(m, b)
			return nil
		}
	}
	if err := p.Scan(m, data); err != nil {
		return err
	}
	// To remember a message costs more than to read one: where they keep differing
	// it is tried less and less often.
	if s.misses++; s.misses&(s.misses-1) == 0 {
		s.learn(m)
	}
	return nil
}

// Afresh has ScanNext expect messages that have nothing to do with those before,
// though they may be like them.
func (m *Message) Afresh() {
	if m.shape != nil {
		m.shape.misses, m.shape.moods = 0, 0
	}
}

// Repeats reports that the message, read with [Program.ScanNext], differs from
// the one before in prompts and outputs alone.
func (m *Message) Repeats() bool { return m.prog != nil && m.shape != nil && m.shape.again }

// KeepRoles has the roles of the fields stay as they are left, for as long as
// messages repeat this one. Else they are those of the program.
func (m *Message) KeepRoles() {
	if m.prog != nil && m.shape != nil {
		m.shape.roles = true
	}
}

// resembles reports whether a message is like the one before, and finds its gaps.
func (s *shape) resembles(b []byte) bool {
	if s.moods&(s.moods-1) == 0 { // as above: less and less often
		if s.now = s.few; s.match(b) {
			s.moods = 0
			return true
		}
	}
	if s.now = s.gaps; !s.match(b) {
		return false
	}
	s.moods++
	return true
}

// match reports whether a message is like the one before but for the gaps of now,
// and finds what lies in them.
func (s *shape) match(b []byte) bool {
	at, from := 0, 0
	s.still = math.MaxInt32
	for k := range s.now {
		g := &s.now[k]
		n := int(g.pos) - from
		if n > len(b)-at || string(b[at:at+n]) != string(s.wire[from:g.pos]) {
			return false
		}
		if at = g.read(b, at+n); at < 0 {
			return false
		}
		if from = int(g.end); at != from && s.still == math.MaxInt32 {
			s.still = g.end
		}
	}
	if string(b[at:]) != string(s.wire[from:]) {
		return false
	}
	for k := range s.now {
		if g := &s.now[k]; g.kind == gapMessage {
			last := &s.now[g.last]
			if g.off+int32(g.num) != s.like.nodes[g.node].end-last.end+last.to {
				return false
			}
		}
	}
	return true
}

// shortLength reads a length of one or two bytes, as short as it can be.
func shortLength(b []byte, at int) (length, next int, ok bool) {
	if at >= len(b) {
		return 0, 0, false
	}
	n := int(b[at])
	if n < 0x80 {
		return n, at + 1, true
	}
	if at+1 >= len(b) || b[at+1] >= 0x80 || b[at+1] == 0 {
		return 0, 0, false
	}
	return n&0x7f | int(b[at+1])<<7, at + 2, true
}

// read reads what stands in the gap, and returns where it ends; -1 if it is not
// to be read as what lay there.
func (g *gap) read(b []byte, at int) int {
	if g.kind == gapNumber {
		c := cursor{b: b[at:], pos: at}
		v, minimal, ok := c.number(g.f)
		v, exact := normal(g.f.kind, v)
		if !ok || !minimal || !exact || c.pos-at != int(g.end-g.pos) {
			return -1
		}
		g.num, g.to = v, int32(c.pos)
		return c.pos
	}
	length, off, ok := shortLength(b, at)
	if !ok {
		return -1
	}
	g.off, g.to = int32(off), int32(off)
	if g.kind == gapMessage {
		g.num = uint64(length)
		return off
	}
	if length > len(b)-off || !g.takes(b[off:off+length]) {
		return -1
	}
	g.to += int32(length)
	return off + length
}

// takes reports whether a value may stand in the gap.
func (g *gap) takes(v []byte) bool {
	switch g.kind {
	case gapElement:
		return len(v) >= 4 && uint64(binary.LittleEndian.Uint32(v)) == uint64(len(v)-4)
	case gapRaw:
		return uint64(len(v)) == g.num
	}
	return !g.f.utf8 || utf8.Valid(v)
}

// moved is where the byte that lay at o lies in the message at hand. It lay in no gap.
func (s *shape) moved(o int32) int32 {
	if o < s.still {
		return o
	}
	return s.after(o)
}

func (s *shape) after(o int32) int32 {
	for k := len(s.now) - 1; k >= 0; k-- {
		if g := &s.now[k]; g.end <= o {
			return o - g.end + g.to
		}
	}
	return o
}

// fill makes the records of m what a scan would have made of b, which matched.
func (s *shape) fill(m *Message, b []byte) {
	few := len(s.now) == len(s.few)
	switch {
	case !s.held, few && !s.calm:
		m.Fields = append(m.Fields[:0], s.like.Fields...)
		m.Tensors = append(m.Tensors[:0], s.like.Tensors...)
		m.nodes = append(m.nodes[:0], s.like.nodes...)
		m.raws = append(m.raws[:0], s.like.raws...)
		m.runs = append(m.runs[:0], s.like.runs...)
		m.Unknown, m.left = s.like.Unknown, s.like.left
		s.held, s.moves, s.again, s.roles = true, false, false, false
	case few && s.mute && s.roles:
		s.again = true
	default:
		for i := range m.Fields { // a dialect may have sharpened them
			m.Fields[i].Role = m.Fields[i].f.role
		}
		s.again, s.roles = few && s.mute, false
	}
	s.calm = few
	if s.still < math.MaxInt32 || s.moves {
		s.move(m)
		s.moves = s.still < math.MaxInt32
	}
	for k := range s.now {
		g := &s.now[k]
		switch g.kind {
		case gapText:
			m.Fields[g.field].value = spanOf(b[g.off:g.to], int(g.off))
		case gapNumber:
			m.Fields[g.field].num = g.num
		case gapElement:
			m.raws[g.raw].value = spanOf(b[g.off:g.to], int(g.off))
			m.nodes[g.node].off = g.off
			f := &m.Fields[g.field]
			f.pos, f.value = g.off, spanOf(b[g.off+4:g.to], int(g.off)+4)
		case gapRaw:
			m.raws[g.raw].value = spanOf(b[g.off:g.to], int(g.off))
		}
	}
}

// move makes all offsets those of the message at hand, but for those in gaps.
func (s *shape) move(m *Message) {
	for i := range m.nodes {
		n, like := &m.nodes[i], &s.like.nodes[i]
		n.pos, n.size, n.off, n.end = s.moved(like.pos), s.moved(like.size), s.moved(like.off), s.moved(like.end)
		n.label.off = s.moved(like.label.off)
	}
	for i := range m.Tensors {
		m.Tensors[i].datatype.off = s.moved(s.like.Tensors[i].datatype.off)
	}
	for i := range m.Fields {
		f, like := &m.Fields[i], &s.like.Fields[i]
		f.pos, f.value.off = s.moved(like.pos), s.moved(like.value.off)
	}
	for i := range m.raws {
		r, like := &m.raws[i], &s.like.raws[i]
		r.pos, r.size = s.moved(like.pos), s.moved(like.size)
	}
	for i := range m.runs {
		r, like := &m.runs[i], &s.like.runs[i]
		r.pos, r.value.off = s.moved(like.pos), s.moved(like.value.off)
	}
}

// release drops what a message refers to, and keeps the rest of its records for
// the next one. It reports whether that can be: not if they were edited.
func (s *shape) release(m *Message) bool {
	if !s.held || m.Edited() {
		s.held = false
		return false
	}
	for k := range s.now {
		switch g := &s.now[k]; g.kind {
		case gapText:
			m.Fields[g.field].value = span{}
		case gapElement:
			m.Fields[g.field].value, m.raws[g.raw].value = span{}, span{}
		case gapRaw:
			m.raws[g.raw].value = span{}
		}
	}
	m.starts = m.starts[:0]
	m.prog, m.raw, m.size = nil, nil, 0
	return true
}

// learn remembers a message that was scanned, if others can be like it.
func (s *shape) learn(m *Message) {
	s.prog = nil
	if len(m.raw) != 1 || m.size > maxShape || m.killed {
		return
	}
	for i := range m.Fields {
		if m.Fields[i].sized { // numbers that are text: read each time
			return
		}
	}
	s.gaps = s.gaps[:0]
	b := m.raw[0].ReadOnlyData()
	for i := range m.nodes {
		if !s.learnNode(m, b, int32(i)) {
			return
		}
	}
	for i := range m.Fields {
		if !s.learnField(m, b, int32(i)) {
			return
		}
	}
	for i := range m.raws {
		if !s.learnRaw(m, b, int32(i)) {
			return
		}
	}
	slices.SortFunc(s.gaps, func(a, b gap) int { return cmp.Compare(a.pos, b.pos) })
	for k := 1; k < len(s.gaps); k++ {
		if s.gaps[k].pos < s.gaps[k-1].end {
			return
		}
	}
	s.few, s.mute, s.calm, s.again, s.moods = s.few[:0], true, false, false, 0
	for _, g := range s.gaps {
		if g.stays {
			continue
		}
		s.few = append(s.few, g)
		s.mute = s.mute && (g.kind == gapMessage || g.kind != gapRaw && said(m.Fields[g.field].f.role))
	}
	s.gaps, s.few = nest(m, s.gaps), nest(m, s.few)
	s.prog = m.prog
	s.keep(m, b)
}

// said reports whether a field of the role is a prompt or an output.
func said(r Role) bool { return r == Prompt || r == Output || r == OutputCopy }

// nest finds the last gap in each message. A message in which nothing can
// change its length is no gap.
func nest(m *Message, all []gap) []gap {
	gaps := all[:0]
	for k, g := range all {
		if g.kind == gapMessage && !slices.ContainsFunc(all[k+1:], func(x gap) bool {
			return (x.kind == gapText || x.kind == gapElement) && x.end <= m.nodes[g.node].end
		}) {
			continue
		}
		gaps = append(gaps, g)
	}
	for k := range gaps {
		g := &gaps[k]
		for j := k; g.kind == gapMessage && j < len(gaps) && gaps[j].end <= m.nodes[g.node].end; j++ {
			g.last = int32(j)
		}
	}
	return gaps
}

// learnNode finds the gap that the length of a message is.
func (s *shape) learnNode(m *Message, b []byte, i int32) bool {
	n := &m.nodes[i]
	if n.f == nil || n.f.use == useRaw {
		return true
	}
	length, off, ok := shortLength(b, int(n.size))
	if !ok || off != int(n.off) || length != int(n.end-n.off) {
		return false
	}
	s.gaps = append(s.gaps, gap{pos: n.size, end: n.off, kind: gapMessage, f: n.f, node: i})
	return true
}

// learnField finds the gap that a text or number is. What names something is
// none, and stays as it is; so does the default value of a map entry.
func (s *shape) learnField(m *Message, b []byte, i int32) bool {
	f := &m.Fields[i]
	switch {
	case f.f.use == useIDs || f.f.form == formMessage:
		return false
	case f.f.use == useRaw:
		return true // with its raw entry
	case f.f.use != useValue && f.f.use != useElement, f.pos == f.value.off:
		return true
	}
	_, _, tag := protowire.ConsumeTag(b[f.pos:])
	if tag < 0 {
		return false
	}
	g := gap{pos: f.pos + int32(tag), end: int32(f.value.end()), f: f.f, field: i, kind: gapNumber, stays: true}
	if f.f.form == formText {
		length, off, ok := shortLength(b, int(g.pos))
		if !ok || off != int(f.value.off) || length != int(f.value.n) {
			return false
		}
		g.kind, g.stays = gapText, names(f.f.role)
	}
	s.gaps = append(s.gaps, g)
	return true
}

// names reports whether a field of the role names the inference or what serves it.
func names(r Role) bool {
	return r == Model || r == ModelVersion || r == RequestID || r == SequenceID
}

// learnRaw finds the gap that a raw entry is.
func (s *shape) learnRaw(m *Message, b []byte, i int32) bool {
	r := &m.raws[i]
	length, off, ok := shortLength(b, int(r.size))
	if !ok || off != int(r.value.off) || length != int(r.value.n) {
		return false
	}
	g := gap{pos: r.size, end: int32(r.value.end()), kind: gapRaw, f: r.f, raw: i, num: uint64(length)}
	for j := range m.nodes {
		if n := &m.nodes[j]; n.f == r.f && n.pos == r.pos { // its elements are read
			g.kind, g.node, g.field = gapElement, int32(j), -1
		}
	}
	for j := range m.Fields {
		if g.kind != gapElement || m.Fields[j].node != g.node {
			continue
		}
		if g.field >= 0 {
			return false
		}
		g.field = int32(j)
	}
	if g.kind == gapElement && (g.field < 0 || m.Fields[g.field].value.n != r.value.n-4) {
		return false
	}
	s.gaps = append(s.gaps, g)
	return true
}

// keep copies what was read, with the bytes but for texts.
func (s *shape) keep(m *Message, b []byte) {
	s.wire = append(s.wire[:0], b...)
	for k := range s.few {
		clear(s.wire[s.few[k].pos:s.few[k].end])
	}
	like := &s.like
	like.Fields = append(like.Fields[:0], m.Fields...)
	like.Tensors = append(like.Tensors[:0], m.Tensors...)
	like.nodes = append(like.nodes[:0], m.nodes...)
	like.raws = append(like.raws[:0], m.raws...)
	like.runs = append(like.runs[:0], m.runs...)
	like.Unknown, like.left = m.Unknown, m.left
	for i := range like.Fields {
		s.own(&like.Fields[i].value)
	}
	for i := range like.Tensors {
		s.own(&like.Tensors[i].datatype)
	}
	for i := range like.nodes {
		s.own(&like.nodes[i].label)
	}
	for i := range like.raws {
		s.own(&like.raws[i].value)
	}
}

// own has a span lie in wire.
func (s *shape) own(v *span) {
	if v.n > 0 {
		v.first = &s.wire[v.off]
	}
}
