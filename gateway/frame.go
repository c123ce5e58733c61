package gateway

import (
	"google.golang.org/grpc/encoding"
	_ "google.golang.org/grpc/encoding/gzip" // callers may compress; what is inspected is what they meant
	"google.golang.org/grpc/encoding/proto"
	"google.golang.org/grpc/mem"
)

// frame is a message that stays as it came: the buffers that grpc-go read it
// into. It owns one reference to them, until it is sent or freed.
type frame struct{ data mem.BufferSlice }

func (f *frame) free() {
	f.data.Free()
	f.data = nil
}

// codec passes frames through as they are. Any other message (health,
// reflection) goes to the protobuf codec, whose name it has.
type codec struct{ proto encoding.CodecV2 }

func newCodec() encoding.CodecV2 { return codec{encoding.GetCodecV2(proto.Name)} }

// Marshal hands the frame's reference to grpc-go, which frees it once sent.
func (c codec) Marshal(v any) (mem.BufferSlice, error) {
	f, ok := v.(*frame)
	if !ok {
		return c.proto.Marshal(v)
	}
	data := f.data
	f.data = nil
	return data, nil
}

// Unmarshal takes a reference of its own: grpc-go frees its one on return. A
// server that answers twice where it may answer once is read into one frame twice.
func (c codec) Unmarshal(data mem.BufferSlice, v any) error {
	f, ok := v.(*frame)
	if !ok {
		return c.proto.Unmarshal(data, v)
	}
	f.data.Free()
	data.Ref()
	f.data = data
	return nil
}

func (codec) Name() string { return proto.Name }
