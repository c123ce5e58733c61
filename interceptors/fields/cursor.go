package fields

import (
	"encoding/binary"
	"math"
	"unicode/utf8"

	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/reflect/protoreflect"
)

// cursor reads bytes that lie in several buffers.
type cursor struct {
	bufs mem.BufferSlice // not begun
	b    []byte          // rest of the buffer it stands in
	pos  int             // offset in the message
}

func (c *cursor) advance(n int) { c.b, c.pos = c.b[n:], c.pos+n }

// more reports whether a byte is left, and makes c.b hold it.
func (c *cursor) more() bool {
	for len(c.b) == 0 {
		if len(c.bufs) == 0 {
			return false
		}
		c.b, c.bufs = c.bufs[0].ReadOnlyData(), c.bufs[1:]
	}
	return true
}

// skip moves n bytes on, and reports whether there were so many.
func (c *cursor) skip(n int) bool {
	if n <= len(c.b) {
		c.advance(n)
		return true
	}
	left := n - len(c.b)
	for i, b := range c.bufs {
		k := b.Len()
		if left <= k {
			c.b, c.bufs = b.ReadOnlyData()[left:], c.bufs[i+1:]
			c.pos += n
			return true
		}
		left -= k
	}
	c.b, c.bufs = nil, nil
	c.pos += n - left
	return false
}

// take moves n bytes on. The span has a view if they lie in one buffer.
func (c *cursor) take(n int) (span, bool) {
	if n > 0 && len(c.b) == 0 {
		c.more()
	}
	if s, ok := c.view(n); ok {
		return s, true
	}
	s := span{off: int32(c.pos), n: int32(n)}
	return s, c.skip(n)
}

// view is take for what lies in the buffer that the cursor stands in.
func (c *cursor) view(n int) (s span, ok bool) {
	if n > len(c.b) {
		return s, false
	}
	s = spanOf(c.b[:n], c.pos)
	c.advance(n)
	return s, true
}

// short is length and value of what is shorter than 128 bytes and lies in the
// buffer at hand before end, as nearly every text does; nil if it is not so.
func (c *cursor) short(end int) []byte {
	if len(c.b) == 0 {
		return nil
	}
	n := 1 + int(c.b[0])
	if n > 0x80 || n > len(c.b) || n > end-c.pos {
		return nil
	}
	b := c.b[1:n]
	c.advance(n)
	return b
}

// varint reads a varint as protobuf-go does: of at most 10 bytes, the tenth at
// most 1. It returns the number of bytes too; 0 if there is no such varint.
func (c *cursor) varint() (v uint64, n int, ok bool) {
	if len(c.b) > 0 && c.b[0] < 0x80 {
		v = uint64(c.b[0])
		c.advance(1)
		return v, 1, true
	}
	if len(c.b) >= binary.MaxVarintLen64 {
		v, n = protowire.ConsumeVarint(c.b)
		if n < 0 {
			return 0, 0, false
		}
		c.advance(n)
		return v, n, true
	}
	for n = 0; n < binary.MaxVarintLen64 && c.more(); {
		x := c.b[0]
		c.advance(1)
		v |= uint64(x&0x7f) << (7 * n)
		n++
		if x < 0x80 {
			return v, n, n < binary.MaxVarintLen64 || x <= 1
		}
	}
	return 0, n, false
}

func (c *cursor) fixed32() (uint64, bool) {
	if len(c.b) >= 4 {
		v := binary.LittleEndian.Uint32(c.b)
		c.advance(4)
		return uint64(v), true
	}
	return c.fixedSlow(4)
}

func (c *cursor) fixed64() (uint64, bool) {
	if len(c.b) >= 8 {
		v := binary.LittleEndian.Uint64(c.b)
		c.advance(8)
		return v, true
	}
	return c.fixedSlow(8)
}

func (c *cursor) fixedSlow(n int) (v uint64, ok bool) {
	for i := range n {
		if !c.more() {
			return 0, false
		}
		v |= uint64(c.b[0]) << (8 * i)
		c.advance(1)
	}
	return v, true
}

// number reads the value of a numeric field as it is on the wire. minimal says
// that it is as short as it can be.
func (c *cursor) number(f *field) (v uint64, minimal, ok bool) {
	switch f.wire {
	case protowire.Fixed32Type:
		v, ok = c.fixed32()
		return v, true, ok
	case protowire.Fixed64Type:
		v, ok = c.fixed64()
		return v, true, ok
	}
	v, n, ok := c.varint()
	return v, n == 1 || n == protowire.SizeVarint(v), ok
}

// normal is the value that decoders make of the number v of a field of kind k:
// integers are sign-extended, floats are their bits. exact says that every
// decoder makes the same of it, because it needs no truncation.
func normal(k protoreflect.Kind, v uint64) (x uint64, exact bool) {
	switch k {
	case protoreflect.BoolKind:
		x = protowire.EncodeBool(protowire.DecodeBool(v))
		return x, x == v
	case protoreflect.Int32Kind, protoreflect.EnumKind:
		x = uint64(int64(int32(v)))
		return x, x == v
	case protoreflect.Uint32Kind:
		return uint64(uint32(v)), v <= math.MaxUint32
	case protoreflect.Sint32Kind:
		return uint64(int64(int32(protowire.DecodeZigZag(v & math.MaxUint32)))), v <= math.MaxUint32
	case protoreflect.Sint64Kind:
		return uint64(protowire.DecodeZigZag(v)), true
	case protoreflect.Sfixed32Kind:
		return uint64(int64(int32(v))), true
	}
	return v, true
}

// denormal is the inverse of normal.
func denormal(k protoreflect.Kind, x uint64) uint64 {
	switch k {
	case protoreflect.Sint32Kind, protoreflect.Sint64Kind:
		return protowire.EncodeZigZag(int64(x))
	}
	return x
}

// validUTF8 reports whether the n bytes at the cursor are UTF-8, wherever the
// buffers are cut.
func (c cursor) validUTF8(n int) bool {
	var part [utf8.UTFMax]byte // a rune that is not complete yet
	k := 0
	for n > 0 && c.more() {
		b := c.b[:min(n, len(c.b))]
		c.advance(len(b))
		n -= len(b)
		for k > 0 && len(b) > 0 {
			part[k], b = b[0], b[1:]
			k++
			if utf8.FullRune(part[:k]) {
				if r, size := utf8.DecodeRune(part[:k]); r == utf8.RuneError && size <= 1 {
					return false
				}
				k = 0
			}
		}
		tail := len(b)
		for i := 1; i < utf8.UTFMax && i <= len(b); i++ {
			if utf8.RuneStart(b[len(b)-i]) {
				if !utf8.FullRune(b[len(b)-i:]) {
					tail = len(b) - i
				}
				break
			}
		}
		if !utf8.Valid(b[:tail]) {
			return false
		}
		if tail < len(b) {
			k = copy(part[:], b[tail:])
		}
	}
	return k == 0
}
