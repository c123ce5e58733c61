package fields

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"slices"
	"strconv"
	"strings"
	"testing"

	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/reflect/protoreflect"
)

// FuzzShape: whatever came before, a message is read as a scan reads it, records
// and all: those that are like the one before, and those that nearly are. Those
// that repeat the one before say the same of themselves.
func FuzzShape(f *testing.F) {
	all := subjects(f)
	corpus(f, all)
	f.Fuzz(func(t *testing.T, which byte, seed uint64, b []byte) {
		checkShape(t, all[int(which)%len(all)], seed, b)
	})
}

func TestShapes(t *testing.T) {
	all := subjects(t)
	like, repeat := 0, 0
	seeds(t, all, func(which byte, b []byte) {
		for seed := range uint64(12) {
			l, r := checkShape(t, all[int(which)%len(all)], seed, b)
			like, repeat = like+l, repeat+r
		}
	})
	t.Logf("%d messages were like the one before, %d repeated it", like, repeat)
	if like < 600 || repeat < 300 {
		t.Errorf("only %d messages were like the one before, and %d repeated it: next to nothing was tested", like, repeat)
	}
}

// checkShape returns how many messages were like the one before, and how many
// repeated it.
func checkShape(t *testing.T, s subject, seed uint64, b []byte) (like, repeat int) {
	r := rand.New(rand.NewPCG(seed, 1))
	if seed%2 == 1 {
		b, r = mutated(seed, b)
	}
	p := s.strict
	if seed%3 == 0 {
		p = s.lenient
	}
	var (
		next   Message
		before string
		roles  []Role
		keeps  bool
	)
	talk := r.IntN(2) == 0 // of other prompts and outputs only
	for range 12 {
		var whole Message
		remembers := next.shape != nil && next.shape.prog != nil
		if next.shape != nil {
			next.shape.misses, next.shape.moods = 1, 0 // remember each
		}
		err, want := p.ScanNext(&next, one(b)), p.Scan(&whole, one(b))
		if fmt.Sprint(err) != fmt.Sprint(want) {
			t.Fatalf("%v, and a scan says %v: %x", err, want, b)
		}
		if err != nil {
			b = nearly(r, b)
			continue
		}
		if remembers && next.shape.misses == 0 {
			like++
		}
		says := gist(&whole)
		if next.Repeats() {
			if repeat++; says != before {
				t.Fatalf("it does not repeat the one before: %s\n%s\n%x", before, says, b)
			}
			for i := range roles {
				whole.Fields[i].Role = roles[i]
			}
		} else {
			keeps = false
		}
		before = says
		sameRecords(t, &next, &whole, b)
		b = another(r, p, b, talk)
		abuse(r, &next)
		if r.IntN(2) == 0 {
			next.KeepRoles()
			keeps = true
		}
		roles = roles[:0]
		for i := range next.Fields {
			if keeps {
				roles = append(roles, next.Fields[i].Role)
			}
		}
		if r.IntN(4) > 0 {
			next.Release()
		}
	}
	return like, repeat
}

// gist is what a message says, but for prompts and outputs.
func gist(m *Message) string {
	var b strings.Builder
	for i := range m.Fields {
		f := &m.Fields[i]
		fmt.Fprintf(&b, "%s %v %t %d ", m.Path(f), f.Role, f.Shadowed, f.Tensor)
		if !said(f.Role) {
			fmt.Fprintf(&b, "%q", m.AppendText(nil, f))
		}
		b.WriteByte('\n')
	}
	for i := range m.Tensors {
		x := &m.Tensors[i]
		fmt.Fprintf(&b, "%q %q %d %t %v\n", m.Name(x), m.Datatype(x), x.Elements, x.SharedMemory, m.Ints(nil, x, 64))
	}
	return b.String()
}

// abuse does with a message what is done before the next is read.
func abuse(r *rand.Rand, m *Message) {
	for i := range m.Fields {
		f := &m.Fields[i]
		switch r.IntN(20) {
		case 0:
			f.Role = ErrorText
		case 1:
			m.Delete(f)
		case 2:
			if m.IsString(f) && !f.Shadowed {
				m.Set(f, []byte("another"))
			}
		}
	}
	if r.IntN(4) == 0 {
		m.Append([]byte{0x0a, 0})
	}
	if r.IntN(4) > 0 {
		m.Encode().Free()
	}
}

// another is a message with other values, or one that is nearly like it. Talk
// says that only prompts and outputs may be others, mostly.
func another(r *rand.Rand, p *Program, b []byte, talk bool) []byte {
	if r.IntN(5) == 0 {
		return nearly(r, b)
	}
	var m Message
	if err := p.Scan(&m, one(b)); err != nil {
		return b
	}
	for i := range m.Fields {
		f := &m.Fields[i]
		switch {
		case r.IntN(2) == 0, f.Shadowed, talk && !said(f.Role) && r.IntN(20) > 0:
		case m.IsString(f):
			m.Set(f, bytes.Repeat([]byte("ü"), []int{0, 1, 3, 60, 100, 600}[r.IntN(6)]))
		case f.f.kind == protoreflect.BoolKind:
			m.Set(f, strconv.AppendBool(nil, r.IntN(2) == 0))
		default:
			m.Set(f, strconv.AppendInt(nil, []int64{0, 1, 7, 127, 128, 1 << 20}[r.IntN(6)], 10))
		}
	}
	if !m.Edited() {
		return b
	}
	out := m.Encode()
	defer out.Free()
	return out.Materialize()
}

// nearly is a message with a byte that is another, or too many, or too few; or
// one that decoders may differ on.
func nearly(r *rand.Rand, b []byte) []byte {
	b = slices.Clone(b)
	if len(b) == 0 {
		return mutate(r, b)
	}
	i := r.IntN(len(b))
	switch r.IntN(5) {
	case 0:
		b[i] ^= 1 << r.IntN(8)
	case 1:
		b = slices.Insert(b, i, byte(r.IntN(256)))
	case 2:
		b = slices.Delete(b, i, i+1)
	case 3:
		b = b[:i]
	default:
		b = mutate(r, b)
	}
	return b
}

// sameRecords compares all that is read from a message.
func sameRecords(t *testing.T, got, want *Message, b []byte) {
	t.Helper()
	if g, w := records(got), records(want); g != w {
		t.Fatalf("read\n%s\na scan reads\n%s\n%x", g, w, b)
	}
}

func records(m *Message) string {
	var s strings.Builder
	text := func(v span) string { return fmt.Sprintf("%d+%d %x", v.off, v.n, m.bytes(&v)) }
	for _, f := range m.Fields {
		v := f.value
		f.value = span{}
		fmt.Fprintf(&s, "%+v %s\n", f, text(v))
	}
	for _, x := range m.Tensors {
		v := x.datatype
		x.datatype = span{}
		fmt.Fprintf(&s, "%+v %s\n", x, text(v))
	}
	for _, n := range m.nodes {
		v := n.label
		n.label = span{}
		fmt.Fprintf(&s, "%+v %s\n", n, text(v))
	}
	for _, x := range m.raws {
		v := x.value
		x.value = span{}
		fmt.Fprintf(&s, "%+v %s\n", x, text(v))
	}
	for _, x := range m.runs {
		v := x.value
		x.value = span{}
		fmt.Fprintf(&s, "%+v %s\n", x, text(v))
	}
	fmt.Fprintln(&s, m.Unknown, m.left, m.size, m.killed, m.prog == nil, m.Edited())
	return s.String()
}

// The chunks of an answer are like each other, with other texts, ids and flags.
// What only looks like one is not.
func TestAlike(t *testing.T) {
	lenient, err := Compile(inference("ModelStreamInferResponse"), Options{Text: Output})
	if err != nil {
		t.Fatal(err)
	}
	strict, err := Compile(inference("ModelInferRequest"), Options{Text: Prompt, Strict: true})
	if err != nil {
		t.Fatal(err)
	}
	words := chunk("a", "one", false)
	numbers := request("X", "FP32", 1, make([]byte, 4))
	count := func(n uint64, longer int) []byte { // parameters {key: "n" value {uint64_param: n}}
		value := protowire.AppendVarint([]byte{5 << 3}, n)
		value = append([]byte{2<<3 | 2, byte(len(value) - longer)}, value...)
		entry := append([]byte{1<<3 | 2, 1, 'n'}, value...)
		return append([]byte{4<<3 | 2, byte(len(entry) - longer)}, entry...)
	}
	replaced := func(b []byte, old, with string) []byte {
		if !bytes.Contains(b, []byte(old)) {
			t.Fatalf("%x has no %x", b, old)
		}
		return bytes.Replace(b, []byte(old), []byte(with), 1)
	}
	for _, test := range []struct {
		name     string
		p        *Program
		first, b []byte
		like     bool
	}{
		{"the same", lenient, words, words, true},
		{"another text", lenient, words, chunk("a", " and two", false), true},
		{"no text", lenient, words, chunk("a", "", false), true},
		{"a long text", lenient, words, chunk("a", strings.Repeat("long ", 100), false), true},
		{"another id", lenient, words, chunk("another", "one", false), true},
		{"the last", lenient, words, chunk("a", "one", true), true},
		{"an id that is not UTF-8", lenient, words, replaced(words, "\x1a\x01a", "\x1a\x01\xff"), false},
		{"another parameter", lenient, words, replaced(words, "triton_final", "triton_vinal"), false},
		{"another datatype", lenient, words, replaced(words, "BYTES", "UINT8"), false},
		{"an element that lies about its length", lenient, words, replaced(words, "\x03\x00\x00\x00one", "\x02\x00\x00\x00one"), false},
		{"cut off", lenient, words, words[:len(words)-1], false},
		{"a byte too many", lenient, words, append(slices.Clone(words), 0), false},
		{"nothing", lenient, words, nil, false},
		{"other numbers", strict, numbers, request("X", "FP32", 1, []byte("1234")), true},
		{"more numbers than the shape has", strict, numbers, request("X", "FP32", 1, make([]byte, 8)), false},
		{"a length with a byte too many", strict, numbers, replaced(numbers, "\x1a\x04id-1", "\x1a\x84\x00id-1"), false},
		{"another count", strict, count(5, 0), count(6, 0), true},
		{"a longer count", strict, count(5, 0), count(300, 0), false},
		{"a count that its message has no room for", strict, count(5, 0), count(300, 1), false},
		{"a count with a byte too many", strict, count(300, 0), replaced(count(300, 0), "\xac\x02", "\x85\x00"), false},
	} {
		t.Run(test.name, func(t *testing.T) {
			var m Message
			if err := test.p.ScanNext(&m, one(test.first)); err != nil {
				t.Fatal(err)
			}
			if m.shape.prog == nil {
				t.Fatal("nothing was remembered")
			}
			if bytes.Contains(m.shape.wire, []byte("one")) {
				t.Error("a text was remembered")
			}
			if got := m.shape.resembles(test.b); got != test.like {
				t.Errorf("like the one before: %t, want %t", got, test.like)
			}
			var whole Message
			want := test.p.Scan(&whole, one(test.b))
			if err := test.p.ScanNext(&m, one(test.b)); fmt.Sprint(err) != fmt.Sprint(want) {
				t.Fatalf("got %v, want %v", err, want)
			} else if err == nil {
				sameRecords(t, &m, &whole, test.b)
			}
		})
	}
}

// A message that repeats the one before differs from it in outputs alone. What
// was remembered of it need not be read again, but after one that did not.
func TestRepeats(t *testing.T) {
	p, err := Compile(inference("ModelStreamInferResponse"), Options{Text: Output})
	if err != nil {
		t.Fatal(err)
	}
	failed := append([]byte{1<<3 | 2, 3}, "bad"...)
	var m Message
	for n, step := range []struct {
		b    []byte
		want bool
		edit bool
	}{
		{chunk("a", "one", false), false, false},        // is remembered
		{chunk("a", " and two", false), false, false},   // the records are not yet those that are remembered
		{chunk("a", " and three", false), true, false},  // and now they are
		{chunk("a", "", false), true, false},            //
		{chunk("a", " and four", true), false, false},   // the end
		{chunk("a", " and five", false), false, false},  // after which they are to be read again
		{chunk("a", " and six", false), true, false},    //
		{chunk("b", " and seven", false), false, false}, // another id
		{chunk("a", " and eight", false), false, false}, //
		{chunk("a", " and nine", false), true, true},    //
		{chunk("a", " and ten", false), false, false},   // the one before was edited
		{chunk("a", " and eleven", false), true, false}, //
		{append(chunk("a", "no", false), failed...), false, false},
		{append(chunk("a", "no", false), failed...), false, false}, // an error's text counts
		{append(chunk("a", "no", false), failed...), false, false},
	} {
		if n >= 12 {
			m.Afresh()
		}
		if err := p.ScanNext(&m, one(step.b)); err != nil {
			t.Fatal(err)
		}
		if got := m.Repeats(); got != step.want {
			t.Errorf("message %d repeats the one before: %t, want %t", n, got, step.want)
		}
		if step.edit {
			m.Set(&m.Fields[0], []byte("another"))
			m.Encode().Free()
		}
		m.Release()
		if m.Repeats() {
			t.Error("a message that was released repeats another")
		}
	}
}
