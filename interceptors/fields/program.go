package fields

import (
	"cmp"
	"fmt"
	"math"
	"slices"

	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/reflect/protoreflect"

	fieldsv1 "github.com/sluicegate/sluice/proto/gen/sluice/fields/v1"
)

// Defaults of [Options].
const (
	// DefaultMaxFields holds a batch of some 5,000 named tensors, or 16,000
	// strings, and bounds what a message can make us remember to about 4 MB.
	DefaultMaxFields = 16384
	// DefaultMaxDepth is far above what inference APIs nest (6 in the Open
	// Inference Protocol).
	DefaultMaxDepth = 32
)

// Options say how a [Program] reads messages. The zero value is lenient,
// without an overlay, and with the default limits.
type Options struct {
	// Overlay gives roles to fields by full name, such as
	// "acme.v1.AskRequest.question". It wins over the option in the descriptor.
	Overlay map[protoreflect.FullName]Role
	// Text is the role of the elements of BYTES tensors: Prompt for requests,
	// Output for responses. Zero is Parameter.
	Text Role
	// Omit are roles of fields that the caller does not read: they are checked as
	// all others are, but are not among Message.Fields. A tensor's name names it
	// all the same. Elements of tensors are never left out.
	Omit []Role
	// Bytes are names of tensors whose UINT8 or INT8 elements are the bytes of a
	// text: one field, with the role Text. Other numbers are never text.
	Bytes map[string]bool
	// Strict refuses what decoders are known to read differently, and tensors
	// whose data do not fit their shape. It is for requests.
	Strict bool
	// MaxFields is the most fields, messages and tensors that are remembered of
	// one message. Zero is DefaultMaxFields.
	MaxFields int
	// MaxDepth is how deep messages and groups may nest; the message itself is
	// depth 1. Zero is DefaultMaxDepth.
	MaxDepth int
}

// Program reads messages of one type. It is safe for concurrent use.
type Program struct {
	desc  protoreflect.MessageDescriptor
	opts  Options
	root  *table
	roles map[Role]bool
}

// Descriptor is the message type that the program was compiled from.
func (p *Program) Descriptor() protoreflect.MessageDescriptor { return p.desc }

// Strict reports whether the program refuses ambiguous messages.
func (p *Program) Strict() bool { return p.opts.Strict }

// Reports tells whether a message can have fields of the role.
func (p *Program) Reports(r Role) bool { return p.roles[r] }

// table is a message type in one place of the program: its fields by number.
type table struct {
	name  protoreflect.FullName
	place place
	low   [32]*field // by number
	high  map[protowire.Number]*field
	all   []*field // in ascending order of number
	slots int      // singular fields and oneofs
	lists bool     // it has a field with ROLE_LISTED_MODEL
}

func (t *table) field(n protowire.Number) *field {
	if int(n) < len(t.low) {
		return t.low[n]
	}
	return t.high[n]
}

// place is what a message is to the message around it. The same type may stand
// in several places, and has a table for each.
type place uint8

const (
	plain     place = iota
	item            // element of any other repeated field
	tensor          // element of a field with ROLE_TENSOR
	requested       // element of a field with ROLE_REQUESTED_OUTPUT
	contents        // value of a field with ROLE_TENSOR_CONTENTS
	entry           // entry of a map
)

// use is what the scanner does with a field, beyond checking it.
type use uint8

const (
	useNone     use = iota
	useValue        // report it
	useName         // report it, and name the message around it
	useDatatype     // report it, and type the tensor around it
	useKey          // report it if it is text, and name the map entry
	useShape        // multiply the tensor's dimensions
	useRaw          // elements of a tensor, known when the message has been read
	useElement      // report it as an element of the tensor
	useNumbers      // count it as elements of the tensor
	useIDs          // report it once, with how many numbers there are
	useBytes        // the text that useNumbers are, where they are bytes of one
)

// form is how a field lies on the wire.
type form uint8

const (
	formNumber  form = iota // a single number
	formNumbers             // repeated numbers
	formText                // a string or bytes, single or repeated
	formMessage
	formMap
)

// field is one field of a table.
type field struct {
	desc   protoreflect.FieldDescriptor
	num    protowire.Number
	name   string
	kind   protoreflect.Kind
	wire   protowire.Type
	list   bool // repeated, and not a map
	isMap  bool
	packed bool // serialisers write it packed
	utf8   bool // decoders refuse what is not UTF-8
	oneof  bool
	slot   int // of a singular field, shared by the members of a oneof
	role   Role
	use    use
	form   form
	sub    *table // of a message; of a map, its entry
	text   *field // of token ids: the text that they stand for; of numbers: the text whose bytes they may be
}

// RoleOf is the role of a field: the overlay's, else that of the option in its
// descriptor, else Parameter for a string or bytes field, because text that
// reaches a model server is never left unread, else None.
func RoleOf(fd protoreflect.FieldDescriptor, overlay map[protoreflect.FullName]Role) Role {
	if r := explicitRole(fd, overlay); r != None {
		return r
	}
	switch fd.Kind() {
	case protoreflect.StringKind, protoreflect.BytesKind:
		return Parameter
	}
	return None
}

// explicitRole is the role that somebody gave to the field.
func explicitRole(fd protoreflect.FieldDescriptor, overlay map[protoreflect.FullName]Role) Role {
	if r, ok := overlay[fd.FullName()]; ok {
		return r
	}
	opts := fd.Options()
	if opts == nil || !opts.ProtoReflect().IsValid() {
		return None
	}
	// The extension's Go type depends on who parsed the descriptor: ours, a
	// dynamic one, or none at all, in which case it is an unknown field.
	want := fieldsv1.E_Role.TypeDescriptor()
	role := None
	opts.ProtoReflect().Range(func(x protoreflect.FieldDescriptor, v protoreflect.Value) bool {
		if x.IsExtension() && x.FullName() == want.FullName() && x.Kind() == protoreflect.EnumKind {
			role = Role(v.Enum())
			return false
		}
		return true
	})
	for b := opts.ProtoReflect().GetUnknown(); role == None && len(b) > 0; {
		num, _, n := protowire.ConsumeField(b)
		if n < 0 {
			break
		}
		if num == want.Number() {
			_, typ, t := protowire.ConsumeTag(b)
			if v, k := protowire.ConsumeVarint(b[t:]); typ == protowire.VarintType && k > 0 {
				role = Role(int32(v))
			}
		}
		b = b[n:]
	}
	return role
}

// Compile makes the program that reads messages of type md. It fails if a role
// stands on a field that cannot have it; the error names the field.
func Compile(md protoreflect.MessageDescriptor, opts Options) (*Program, error) {
	if opts.Text == None {
		opts.Text = Parameter
	}
	if opts.MaxFields <= 0 {
		opts.MaxFields = DefaultMaxFields
	}
	opts.MaxFields = min(opts.MaxFields, math.MaxInt32/2)
	if opts.MaxDepth <= 0 {
		opts.MaxDepth = DefaultMaxDepth
	}
	c := compiler{opts: opts, done: make(map[site]*table)}
	root, err := c.message(md, plain, None)
	if err != nil {
		return nil, err
	}
	p := &Program{desc: md, opts: opts, root: root, roles: make(map[Role]bool)}
	for _, t := range c.done {
		for _, f := range t.all {
			p.roles[f.role] = true
		}
	}
	return p, nil
}

// site is a message type in its place, with the role that the map around it
// gives to what has none of its own.
type site struct {
	name    protoreflect.FullName
	place   place
	inherit Role
}

type compiler struct {
	opts Options
	done map[site]*table
}

func (c *compiler) message(md protoreflect.MessageDescriptor, pl place, inherit Role) (*table, error) {
	key := site{md.FullName(), pl, inherit}
	if t := c.done[key]; t != nil {
		return t, nil
	}
	t := &table{name: md.FullName(), place: pl}
	c.done[key] = t // before its fields: types may be recursive

	var tensors, raws protoreflect.FieldDescriptor
	oneofs := make(map[protoreflect.Name]int)
	for i := range md.Fields().Len() {
		fd := md.Fields().Get(i)
		f, err := c.field(fd, pl, inherit)
		if err != nil {
			return nil, err
		}
		if !f.list && !f.isMap {
			f.slot = t.slots
			if o := fd.ContainingOneof(); o != nil && !o.IsSynthetic() {
				f.oneof = true
				if slot, ok := oneofs[o.Name()]; ok {
					f.slot = slot
				}
				oneofs[o.Name()] = f.slot
			}
			t.slots = max(t.slots, f.slot+1)
		}
		for _, only := range []struct {
			is   bool
			seen *protoreflect.FieldDescriptor
		}{{f.use == useRaw, &raws}, {f.sub != nil && f.sub.place == tensor, &tensors}} {
			if !only.is {
				continue
			}
			if *only.seen != nil {
				return nil, fmt.Errorf("fields: %s: %s has the same role already; a message has one such field",
					fd.FullName(), (*only.seen).Name())
			}
			*only.seen = fd
		}
		t.lists = t.lists || f.role == ListedModel
		t.all = append(t.all, f)
		if int(f.num) < len(t.low) {
			t.low[f.num] = f
		} else {
			if t.high == nil {
				t.high = make(map[protowire.Number]*field)
			}
			t.high[f.num] = f
		}
	}
	if raws != nil && tensors == nil {
		return nil, fmt.Errorf("fields: %s: ROLE_TENSOR_RAW needs a field with ROLE_TENSOR in the same message", raws.FullName())
	}
	slices.SortFunc(t.all, func(a, b *field) int { return cmp.Compare(a.num, b.num) })
	return t, nil
}

func (c *compiler) field(fd protoreflect.FieldDescriptor, pl place, inherit Role) (*field, error) {
	f := &field{
		desc: fd, num: fd.Number(), name: string(fd.Name()), kind: fd.Kind(), wire: wireType(fd.Kind()),
		list: fd.IsList(), isMap: fd.IsMap(), packed: fd.IsPacked(), utf8: enforcesUTF8(fd), slot: -1,
	}
	given := explicitRole(fd, c.opts.Overlay)
	if _, ok := fieldsv1.Role_name[int32(given)]; !ok {
		return nil, fmt.Errorf("fields: %s: unknown role %d; is the option of a newer Sluice?", fd.FullName(), given)
	}
	if f.kind == protoreflect.GroupKind {
		return nil, fmt.Errorf("fields: %s: groups (delimited messages) are not supported", fd.FullName())
	}
	if why := misfit(fd, given, pl); why != "" {
		return nil, fmt.Errorf("fields: %s: %s cannot stand here: %s", fd.FullName(), given, why)
	}

	var err error
	switch {
	case f.isMap:
		f.form = formMap
		f.sub, err = c.mapEntry(fd, cmp.Or(given, inherit))
		return f, err
	case f.kind == protoreflect.MessageKind:
		f.form = formMessage
		sub := plain
		if f.list {
			sub = item
		}
		switch given {
		case fieldsv1.Role_ROLE_TENSOR:
			sub = tensor
		case fieldsv1.Role_ROLE_REQUESTED_OUTPUT:
			sub = requested
		case fieldsv1.Role_ROLE_TENSOR_CONTENTS:
			sub = contents
		}
		if given == Forbidden && !slices.Contains(c.opts.Omit, given) || given == Batch {
			f.role = given // it is reported for being there
		}
		f.sub, err = c.message(fd.Message(), sub, inherit)
		return f, err
	}

	text := f.kind == protoreflect.StringKind || f.kind == protoreflect.BytesKind
	switch {
	case text:
		f.form = formText
	case f.list:
		f.form = formNumbers
	}
	f.role, f.use = given, useValue
	switch {
	case given == fieldsv1.Role_ROLE_TENSOR_NAME, given == Identifier && pl == requested && !f.list:
		f.role, f.use = Identifier, useName
	case (given == ListedModel || given == ListedVersion) && pl != item:
		f.role = Identifier // of one model, not of a list
	case given == fieldsv1.Role_ROLE_TENSOR_DATATYPE:
		f.role, f.use = Identifier, useDatatype
	case given == fieldsv1.Role_ROLE_TENSOR_SHAPE:
		f.role, f.use = None, useShape
	case given == fieldsv1.Role_ROLE_TENSOR_RAW:
		f.role, f.use = c.opts.Text, useRaw
	case pl == contents && f.list && text:
		f.role, f.use = cmp.Or(given, c.opts.Text), useElement
	case pl == contents && f.list:
		f.role, f.use = None, useNumbers
		if len(c.opts.Bytes) > 0 && (f.kind == protoreflect.Int32Kind || f.kind == protoreflect.Uint32Kind) {
			f.text = &field{desc: fd, num: f.num, name: f.name, kind: protoreflect.BytesKind, list: true, slot: -1,
				role: c.opts.Text, use: useBytes, form: formText}
		}
	case f.form == formNumbers && given != None:
		f.use = useIDs
		f.text = &field{desc: fd, num: f.num, name: f.name, kind: protoreflect.StringKind, slot: -1, use: useValue, form: formText}
	case given != None:
	case inherit != None && (text || !f.list):
		f.role = inherit
	case text:
		f.role = Parameter
	default:
		f.use = useNone
	}
	if slices.Contains(c.opts.Omit, f.role) {
		switch f.use {
		case useValue:
			f.role, f.use = None, useNone
		case useName, useDatatype:
			f.role = None
		}
	}
	return f, nil
}

// mapEntry is the table of a map's entries. The key is an Identifier if it is
// text; the value has the map's role.
func (c *compiler) mapEntry(fd protoreflect.FieldDescriptor, role Role) (*table, error) {
	t, err := c.message(fd.Message(), entry, role)
	if err != nil {
		return nil, err
	}
	k := t.low[1]
	k.role, k.use = None, useKey
	if k.kind == protoreflect.StringKind && !slices.Contains(c.opts.Omit, Identifier) {
		k.role = Identifier
	}
	return t, nil
}

// misfit says why a field cannot have a role; "" if it can.
func misfit(fd protoreflect.FieldDescriptor, r Role, pl place) string {
	kind := fd.Kind()
	if fd.IsMap() {
		kind = fd.MapValue().Kind()
		switch r {
		case None, Parameter:
			return ""
		case Prompt, Output:
			if kind == protoreflect.StringKind || kind == protoreflect.BytesKind {
				return ""
			}
		}
		return "a map is ROLE_PARAMETER, or ROLE_PROMPT or ROLE_OUTPUT if its values are strings or bytes"
	}
	var (
		str     = kind == protoreflect.StringKind
		text    = str || kind == protoreflect.BytesKind
		message = kind == protoreflect.MessageKind
		integer bool
	)
	switch kind {
	case protoreflect.Int32Kind, protoreflect.Int64Kind, protoreflect.Sint32Kind, protoreflect.Sint64Kind,
		protoreflect.Sfixed32Kind, protoreflect.Sfixed64Kind, protoreflect.Uint32Kind, protoreflect.Uint64Kind,
		protoreflect.Fixed32Kind, protoreflect.Fixed64Kind:
		integer = true
	}
	need := func(ok bool, what string) string {
		if ok {
			return ""
		}
		return "it needs " + what
	}
	one := !fd.IsList()
	switch r {
	case None, Forbidden:
		return ""
	case Prompt, Output, OutputCopy:
		return need(text, "a string or bytes field")
	case Parameter:
		return need(text || one && !message, "a string, bytes or map field, or a single number or bool")
	case ErrorText, Identifier:
		return need(str, "a string field")
	case Model, ModelVersion, RequestID:
		// Lists of models are names to show (ModelMetadata), not the model in use.
		return need(str, "a string field")
	case ListedModel, ListedVersion:
		return need(str && one, "a single string field")
	case SequenceID:
		return need(one && (str || integer), "a single string or integer field")
	case PromptIDs, OutputIDs, OutputIDsTotal:
		return need(!one && integer, "a repeated integer field")
	case Batch:
		return need(!one && message, "a repeated message field")
	case MaxTokens, InputTokens, OutputTokens, OutputTokensTotal, Choices, Choice:
		return need(one && integer, "a single integer field")
	case Final:
		return need(one && kind == protoreflect.BoolKind, "a single bool field")
	case Opaque:
		return need(kind == protoreflect.BytesKind, "a bytes field")
	case fieldsv1.Role_ROLE_TENSOR, fieldsv1.Role_ROLE_REQUESTED_OUTPUT:
		return need(message && !one && pl <= item, "a repeated message field, outside of a tensor")
	case fieldsv1.Role_ROLE_TENSOR_NAME:
		return need(str && one && (pl == tensor || pl == requested), "a single string field in a tensor or requested output")
	case fieldsv1.Role_ROLE_TENSOR_DATATYPE:
		return need(str && one && pl == tensor, "a single string field in a tensor")
	case fieldsv1.Role_ROLE_TENSOR_SHAPE:
		return need(integer && !one && pl == tensor, "a repeated integer field in a tensor")
	case fieldsv1.Role_ROLE_TENSOR_CONTENTS:
		return need(message && one && pl == tensor && fd.ContainingOneof() == nil, "a single message field in a tensor")
	case fieldsv1.Role_ROLE_TENSOR_RAW:
		return need(kind == protoreflect.BytesKind && !one && pl <= item, "a repeated bytes field beside the tensors")
	}
	return "it is not a role for a field"
}

func wireType(k protoreflect.Kind) protowire.Type {
	switch k {
	case protoreflect.StringKind, protoreflect.BytesKind, protoreflect.MessageKind:
		return protowire.BytesType
	case protoreflect.Fixed32Kind, protoreflect.Sfixed32Kind, protoreflect.FloatKind:
		return protowire.Fixed32Type
	case protoreflect.Fixed64Kind, protoreflect.Sfixed64Kind, protoreflect.DoubleKind:
		return protowire.Fixed64Type
	}
	return protowire.VarintType
}

// enforcesUTF8 reports whether decoders refuse a string field that is not
// UTF-8: proto3 does, proto2 does not, editions say so.
func enforcesUTF8(fd protoreflect.FieldDescriptor) bool {
	if fd.Kind() != protoreflect.StringKind {
		return false
	}
	if x, ok := fd.(interface{ EnforceUTF8() bool }); ok {
		return x.EnforceUTF8()
	}
	return fd.Syntax() == protoreflect.Proto3
}
