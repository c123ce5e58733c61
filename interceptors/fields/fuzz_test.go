package fields

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/dynamicpb"
)

// mutate changes a message as somebody would who wants decoders to disagree:
// fields twice, in another order, over-long, split, nested, packed or not.
func mutate(r *rand.Rand, b []byte) []byte {
	type piece struct {
		num protowire.Number
		typ protowire.Type
		b   []byte // with its tag
		v   []byte // the value; of bytes, without the length
	}
	var ps []piece
	for rest := b; len(rest) > 0; {
		num, typ, t := protowire.ConsumeTag(rest)
		if t < 0 {
			return b
		}
		n := protowire.ConsumeFieldValue(num, typ, rest[t:])
		if n < 0 {
			return b
		}
		p := piece{num, typ, rest[:t+n], rest[t : t+n]}
		if typ == protowire.BytesType {
			p.v, _ = protowire.ConsumeBytes(p.v)
		}
		ps, rest = append(ps, p), rest[t+n:]
	}
	if len(ps) == 0 {
		return append(protowire.AppendTag(nil, protowire.Number(1+r.IntN(30)), protowire.BytesType), 0)
	}
	i := r.IntN(len(ps))
	p := &ps[i]
	field := func(num protowire.Number, v []byte) []byte {
		return protowire.AppendBytes(protowire.AppendTag(nil, num, protowire.BytesType), v)
	}
	overlong := func(v uint64) []byte {
		x := protowire.AppendVarint(nil, v)
		for k := 1 + r.IntN(3); k > 0 && len(x) < 10; k-- {
			x[len(x)-1] |= 0x80
			x = append(x, 0)
		}
		return x
	}
	switch r.IntN(13) {
	case 0: // twice
		ps = slices.Insert(ps, r.IntN(len(ps)+1), *p)
	case 1: // another order
		j := r.IntN(len(ps))
		ps[i], ps[j] = ps[j], ps[i]
	case 2:
		ps = slices.Delete(ps, i, i+1)
	case 3: // an over-long tag
		tag := protowire.EncodeTag(p.num, p.typ)
		p.b = append(overlong(tag), p.b[protowire.SizeVarint(tag):]...)
	case 4: // an over-long value or length
		switch p.typ {
		case protowire.VarintType:
			if v, n := protowire.ConsumeVarint(p.v); n > 0 {
				p.b = append(protowire.AppendTag(nil, p.num, p.typ), overlong(v)...)
			}
		case protowire.BytesType:
			p.b = append(append(protowire.AppendTag(nil, p.num, p.typ), overlong(uint64(len(p.v)))...), p.v...)
		}
	case 5: // split in two
		if p.typ == protowire.BytesType {
			k := r.IntN(len(p.v) + 1)
			p.b = append(field(p.num, p.v[:k]), field(p.num, p.v[k:])...)
		}
	case 6: // nested
		p.b = field(protowire.Number(1+r.IntN(16)), p.b)
	case 7: // in a group
		n := protowire.Number(1 + r.IntN(40))
		p.b = protowire.AppendTag(append(protowire.AppendTag(nil, n, protowire.StartGroupType), p.b...), n, protowire.EndGroupType)
	case 8: // another number
		n := protowire.Number(1 + r.IntN(27))
		p.b = append(protowire.AppendTag(nil, n, p.typ), p.b[protowire.SizeTag(p.num):]...)
	case 9: // packed varints one by one
		if p.typ == protowire.BytesType {
			var out []byte
			for v := p.v; len(v) > 0; {
				_, n := protowire.ConsumeVarint(v)
				if n < 0 {
					return b
				}
				out = append(append(out, protowire.AppendTag(nil, p.num, protowire.VarintType)...), v[:n]...)
				v = v[n:]
			}
			p.b = out
		}
	case 10: // another value
		switch p.typ {
		case protowire.VarintType:
			p.b = protowire.AppendVarint(protowire.AppendTag(nil, p.num, p.typ), r.Uint64()>>r.IntN(64))
		case protowire.BytesType:
			v := slices.Clone(p.v)
			if len(v) > 0 {
				v[r.IntN(len(v))] = byte(r.Uint32())
			}
			p.b = field(p.num, v)
		}
	case 11: // a new field
		n := protowire.Number(1 + r.IntN(26))
		p.b = append(slices.Clone(p.b), [][]byte{
			field(n, []byte("x")),
			field(n, nil),
			field(n, []byte{8, 1}),
			append(protowire.AppendTag(nil, n, protowire.VarintType), 1),
			protowire.AppendFixed32(protowire.AppendTag(nil, n, protowire.Fixed32Type), 7),
			protowire.AppendFixed64(protowire.AppendTag(nil, n, protowire.Fixed64Type), 7),
		}[r.IntN(6)]...)
	case 12: // deeper
		if p.typ == protowire.BytesType {
			p.b = field(p.num, mutate(r, p.v))
		}
	}
	var out []byte
	for _, p := range ps {
		out = append(out, p.b...)
	}
	return out
}

// subjects are the messages that the fuzz tests read, lenient and strict.
type subject struct {
	desc            protoreflect.MessageDescriptor
	lenient, strict *Program
}

func subjects(t testing.TB) []subject {
	var all []subject
	for _, md := range []protoreflect.MessageDescriptor{inference("ModelInferRequest"), inference("ModelInferResponse"),
		inference("ModelStreamInferResponse"), file(t, zoo).Messages().ByName("Zoo")} {
		all = append(all, subject{md, compile(t, md, Options{Text: Prompt}), compile(t, md, Options{Text: Prompt, Strict: true})})
	}
	return all
}

// zooMessage has every field of the zoo.
func zooMessage(md protoreflect.MessageDescriptor, depth int) *dynamicpb.Message {
	m := dynamicpb.NewMessage(md)
	n := uint64(depth + 1)
	value := func(fd protoreflect.FieldDescriptor) protoreflect.Value {
		n++
		switch fd.Kind() {
		case protoreflect.StringKind:
			return protoreflect.ValueOfString(fmt.Sprint("text ", n))
		case protoreflect.BytesKind:
			return protoreflect.ValueOfBytes([]byte(fmt.Sprint("bytes ", n)))
		case protoreflect.MessageKind:
			return protoreflect.ValueOfMessage(zooMessage(fd.Message(), depth-1))
		}
		return valueOf(fd.Kind(), n%2+n&1)
	}
	for i := range md.Fields().Len() {
		fd := md.Fields().Get(i)
		if fd.Kind() == protoreflect.MessageKind && !fd.IsMap() && depth == 0 {
			continue
		}
		switch {
		case fd.IsMap():
			for range 2 {
				v := value(fd.MapValue())
				m.Mutable(fd).Map().Set(value(fd.MapKey()).MapKey(), v)
			}
		case fd.IsList():
			m.Mutable(fd).List().Append(value(fd))
			m.Mutable(fd).List().Append(value(fd))
		default:
			m.Set(fd, value(fd))
		}
	}
	return m
}

// seeds calls add with the messages that mutations start from.
func seeds(t testing.TB, all []subject, add func(which byte, b []byte)) {
	for which, s := range all {
		for _, r := range recordings() {
			if r.descriptor() == s.desc && r.Size < 2000 {
				add(byte(which), r.bytes())
			}
		}
	}
	for depth := range 3 {
		b, err := proto.MarshalOptions{Deterministic: true}.Marshal(zooMessage(all[3].desc, depth))
		if err != nil {
			t.Fatal(err)
		}
		add(3, b)
	}
}

func corpus(f *testing.F, all []subject) {
	seeds(f, all, func(which byte, b []byte) {
		for seed := range uint64(4) {
			f.Add(which, seed, b)
		}
	})
}

// What the fuzz tests check, on many mutations of every recorded message.
func TestMutations(t *testing.T) {
	all := subjects(t)
	seeds(t, all, func(which byte, b []byte) {
		for seed := range uint64(40) {
			if which == 3 {
				seed *= 101 // the zoo has more ways to go wrong
			}
			checkScan(t, all[which], seed, b)
			checkEdit(t, all[which], seed, b)
		}
	})
}

// mutated is the message that a fuzz input stands for.
func mutated(seed uint64, b []byte) ([]byte, *rand.Rand) {
	r := rand.New(rand.NewPCG(seed, 0))
	for range seed % 7 {
		b = mutate(r, b)
	}
	return b, r
}

// decode is what google.golang.org/protobuf makes of the bytes. ok is false
// where it panics: dynamicpb does for some map entries with a key of the wrong
// wire type.
func decode(md protoreflect.MessageDescriptor, b []byte) (msg *dynamicpb.Message, err error, ok bool) {
	defer func() { ok = recover() == nil }()
	msg = dynamicpb.NewMessage(md)
	err = proto.Unmarshal(b, msg)
	return msg, err, true
}

// The scanner accepts what the decoder accepts and reads the same from it, in
// every layout; strict mode accepts only what has one reading.
func FuzzScan(f *testing.F) {
	all := subjects(f)
	corpus(f, all)
	f.Fuzz(func(t *testing.T, which byte, seed uint64, b []byte) { checkScan(t, all[int(which)%len(all)], seed, b) })
}

func checkScan(t *testing.T, s subject, seed uint64, b []byte) {
	b, r := mutated(seed, b)
	msg, derr, ok := decode(s.desc, b)
	if !ok {
		return
	}
	var m Message
	err := s.lenient.Scan(&m, one(b))
	if kindOf(err) == TooLarge {
		return
	}
	if (err == nil) != (derr == nil) {
		t.Fatalf("scanner: %v, decoder: %v\n%x", err, derr, b)
	}
	var strict, parts Message
	serr := s.strict.Scan(&strict, one(b))
	if err != nil && serr == nil {
		t.Fatalf("strict accepts what lenient refuses: %x", b)
	}
	layout := cutRandomly(r, b)
	if e := s.strict.Scan(&parts, layout); fmt.Sprint(e) != fmt.Sprint(serr) {
		t.Fatalf("strict: %v in pieces, %v in one: %x", e, serr, b)
	}
	if e := s.lenient.Scan(&parts, layout); fmt.Sprint(e) != fmt.Sprint(err) {
		t.Fatalf("%v in pieces, %v in one: %x", e, err, b)
	}
	if err != nil {
		return
	}
	if got, want := strings.Join(show(&parts), "\n"), strings.Join(show(&m), "\n"); got != want {
		t.Fatalf("in pieces\n%s\nin one\n%s", got, want)
	}
	same(t, s.lenient, b, msg)
	if serr != nil {
		return
	}
	if strict.Unknown > 0 || slices.ContainsFunc(strict.Fields, func(f Field) bool { return f.Shadowed }) {
		t.Fatalf("strict accepts what has two readings: %x", b)
	}
	same(t, s.strict, b, msg)
	again, err := proto.MarshalOptions{Deterministic: true}.Marshal(msg)
	if err != nil {
		t.Fatal(err)
	}
	same(t, s.strict, again, msg)
}

// Edits of the bytes and of the Go message give the same message.
func FuzzEdit(f *testing.F) {
	all := subjects(f)
	corpus(f, all)
	f.Fuzz(func(t *testing.T, which byte, seed uint64, b []byte) { checkEdit(t, all[int(which)%len(all)], seed, b) })
}

func checkEdit(t *testing.T, s subject, seed uint64, b []byte) {
	b, r := mutated(seed, b)
	msg, err, ok := decode(s.desc, b)
	if !ok || err != nil {
		return
	}
	p := s.strict
	if seed%3 == 0 {
		p = s.lenient
	}
	var scanned, walked Message
	if p.Scan(&scanned, cutRandomly(r, b)) != nil || p.Walk(&walked, msg) != nil {
		return
	}
	before := proto.Clone(msg)
	bytesBefore := slices.Clone(b)

	twin := make(map[string][]*Field)
	key := func(m *Message, f *Field) string {
		return fmt.Sprintf("%s|%s|%t|%t|%t", m.Path(f), f.f.name, f.f.use == useKey, m.IsElement(f), f.bare)
	}
	comparable := func(m *Message, f *Field) bool {
		// Not what only one of them has: losers, and defaults without presence.
		return (!f.Shadowed || f.f.use == useRaw) &&
			(f.f.desc.IsList() || f.f.desc.HasPresence() || m.nodeOf(f) != nil || !isDefault(m, f))
	}
	for i := range walked.Fields {
		if f := &walked.Fields[i]; comparable(&walked, f) {
			twin[key(&walked, f)] = append(twin[key(&walked, f)], f)
		}
	}
	type pair struct{ a, b *Field }
	var pairs []pair
	for i := range scanned.Fields {
		f := &scanned.Fields[i]
		if !comparable(&scanned, f) {
			continue
		}
		k := key(&scanned, f)
		if len(twin[k]) == 0 {
			t.Fatalf("%s was scanned but not walked", k)
		}
		pairs = append(pairs, pair{f, twin[k][0]})
		twin[k] = twin[k][1:]
	}
	careful := true // no edit can make a sound message unsound
	for i := range 1 + r.IntN(4) {
		if len(pairs) == 0 {
			break
		}
		x := pairs[r.IntN(len(pairs))]
		// A field that is gone is not edited again.
		if x.a.Shadowed && x.a.gone || x.b.gone || scanned.nodes[x.a.node].dead {
			continue
		}
		if x.a.f.use == useDatatype || x.a.f.use == useKey {
			careful = false
		}
		if r.IntN(3) == 0 {
			scanned.Delete(x.a)
			walked.Delete(x.b)
			if !x.a.Shadowed || !x.b.Shadowed {
				t.Fatal("a deleted field is not marked")
			}
			continue
		}
		v := []byte(strings.Repeat("v", r.IntN(300)))
		if x.a.f.use == useKey {
			v = fmt.Append(nil, "renamed", i)
		}
		if !scanned.IsString(x.a) {
			v = fmt.Append(nil, r.IntN(2))
		} else if r.IntN(8) == 0 {
			v = append(v, "\xff \u00e9"...)
		}
		if x.a.f.use == useKey && (!scanned.IsString(x.a) || scanned.nodes[x.a.node].dead) {
			continue
		}
		scanned.Set(x.a, v)
		walked.Set(x.b, v)
	}
	if r.IntN(3) == 0 && s.desc.Name() == "ModelInferRequest" {
		careful = false // the id may be there already
		extra := protowire.AppendString(protowire.AppendTag(nil, 3, protowire.BytesType), "appended")
		scanned.Append(extra)
		walked.Append(extra)
	}
	if scanned.Edited() != walked.Edited() {
		t.Fatal("one is edited, the other is not")
	}
	out := scanned.Encode().Materialize()
	got, err, _ := decode(s.desc, out)
	if err != nil {
		t.Fatalf("what was edited cannot be decoded: %v\nbefore %x\nafter  %x", err, b, out)
	}
	typed := walked.Typed()
	if scanned.Edited() {
		// Fields that the descriptor does not have keep their place on the
		// wire, and are not what this test is about.
		discard(got.ProtoReflect())
		discard(typed.ProtoReflect())
	}
	if !proto.Equal(got, typed) {
		t.Fatalf("edited bytes\n%v\nedited message\n%v\nbefore %x\nafter  %x", got, typed, b, out)
	}
	if !proto.Equal(msg, before) || !slices.Equal(b, bytesBefore) {
		if scanned.Edited() {
			t.Fatal("the message that was read has changed")
		}
	}
	if p == s.strict && careful {
		var m Message
		if err := s.strict.Scan(&m, one(out)); kindOf(err) == Ambiguous {
			t.Fatalf("what was edited is %v\nbefore %x\nafter  %x", err, b, out)
		}
	}
}

// discard drops unknown fields, at every depth.
func discard(m protoreflect.Message) {
	m.SetUnknown(nil)
	m.Range(func(fd protoreflect.FieldDescriptor, v protoreflect.Value) bool {
		switch {
		case fd.IsMap() && fd.MapValue().Kind() == protoreflect.MessageKind:
			v.Map().Range(func(_ protoreflect.MapKey, v protoreflect.Value) bool {
				discard(v.Message())
				return true
			})
		case fd.IsList() && fd.Kind() == protoreflect.MessageKind:
			for i := range v.List().Len() {
				discard(v.List().Get(i).Message())
			}
		case fd.Kind() == protoreflect.MessageKind && !fd.IsMap() && !fd.IsList():
			discard(v.Message())
		}
		return true
	})
}
