package interceptors

import (
	"context"
	"errors"
	"io"
	"reflect"
	"slices"
	"sync"

	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/tap"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
)

// Tap refuses calls on their headers, before a stream is made for them or a
// body is read: the gates of the chain decide. It never waits.
func Tap(c *Chain) tap.ServerInHandle {
	return func(ctx context.Context, info *tap.Info) (context.Context, error) {
		err := c.Allow(ctx, CallInfo{FullMethod: info.FullMethodName, Peer: PeerFrom(ctx), Metadata: info.Header})
		return ctx, err
	}
}

// UnaryServer guards the unary methods of a grpc-go server. Messages are the
// server's own Go types: grpc-go has decoded them already, and answers itself
// for a message that cannot be decoded.
func UnaryServer(c *Chain) grpc.UnaryServerInterceptor {
	return func(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (_ any, err error) {
		call, err := c.Begin(ctx, incoming(ctx, info.FullMethod))
		if err != nil {
			return nil, refused(ctx, err)
		}
		var resp any
		defer call.tell(ctx)
		defer endCall(call, &err)
		req, err = call.takeRequest(req)
		if err != nil {
			return nil, refused(ctx, err)
		}
		resp, err = handler(call.reportingContext(call.incomingContext()), req)
		if err = call.answer(ctx, err); err != nil {
			return nil, trailed(ctx, err)
		}
		if resp, err = call.takeResponse(resp); err != nil {
			return nil, refused(ctx, err)
		}
		return resp, nil
	}
}

// UnaryClient puts the chain around the unary calls of a grpc-go client.
func UnaryClient(c *Chain) grpc.UnaryClientInterceptor {
	return func(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoker grpc.UnaryInvoker, opts ...grpc.CallOption) (err error) {
		call, err := c.Begin(ctx, outgoing(ctx, method))
		if err != nil {
			return err
		}
		defer endCall(call, &err)
		req, err = call.takeRequest(req)
		if err != nil {
			return err
		}
		var header, trailer metadata.MD
		if call.reports() {
			opts = append(slices.Clip(opts), grpc.Header(&header), grpc.Trailer(&trailer))
		}
		err = invoker(call.outgoingContext(), method, req, reply, cc, opts...)
		call.Reported(header)
		call.Reported(trailer)
		if err = call.answer(ctx, err); err != nil {
			return err
		}
		out, err := call.takeResponse(reply)
		if err != nil {
			proto.Reset(reply.(proto.Message))
			return err
		}
		if out != reply {
			move(reply.(proto.Message), out.(proto.Message))
		}
		return nil
	}
}

// StreamServer guards the streaming methods of a grpc-go server.
func StreamServer(c *Chain) grpc.StreamServerInterceptor {
	return func(srv any, ss grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler) (err error) {
		call, err := c.Begin(ss.Context(), incoming(ss.Context(), info.FullMethod))
		if err != nil {
			return refused(ss.Context(), err)
		}
		s := &serverStream{ServerStream: ss, call: call, ctx: call.incomingContext(), many: info.IsClientStream, requests: make(chan proto.Message), over: make(chan struct{})}
		s.stream = NewStream(call, s)
		defer s.stream.End()
		defer call.tell(ss.Context())
		defer endCall(call, &err)
		err = handler(srv, s)
		if refused := s.stream.Finish(); refused != nil {
			call.Abort(refused)
			err = StatusOf(refused)
		}
		if err == nil {
			s.stream.End()
		}
		return trailed(ss.Context(), call.answer(ss.Context(), err))
	}
}

// StreamClient puts the chain around the streaming calls of a grpc-go client. A
// refusal ends the stream: it comes back from SendMsg or RecvMsg.
func StreamClient(c *Chain) grpc.StreamClientInterceptor {
	return func(ctx context.Context, desc *grpc.StreamDesc, cc *grpc.ClientConn, method string, streamer grpc.Streamer, opts ...grpc.CallOption) (grpc.ClientStream, error) {
		call, err := c.Begin(ctx, outgoing(ctx, method))
		if err != nil {
			return nil, err
		}
		cs, err := streamer(call.outgoingContext(), desc, cc, method, opts...)
		if err != nil {
			call.End(err)
			return nil, err
		}
		s := &clientStream{ClientStream: cs, call: call, many: desc.ServerStreams}
		context.AfterFunc(call.ctx, func() { s.end(call.Cause()) }) // the caller may just go away
		return s, nil
	}
}

func incoming(ctx context.Context, method string) CallInfo {
	md, _ := metadata.FromIncomingContext(ctx)
	return CallInfo{FullMethod: method, Peer: PeerFrom(ctx), Metadata: md}
}

func outgoing(ctx context.Context, method string) CallInfo {
	md, _ := metadata.FromOutgoingContext(ctx)
	return CallInfo{FullMethod: method, Metadata: md, Client: true}
}

// outgoingContext carries what the policies send on.
func (c *Call) outgoingContext() context.Context {
	if len(c.Outgoing) == 0 {
		return c.ctx
	}
	md := c.Metadata.Copy()
	c.send(md)
	return metadata.NewOutgoingContext(c.ctx, md)
}

// answer is the error that a call ends with: the handler's, unless the chain
// ended the call. Then it does not count what the handler made of that.
func (c *Call) answer(caller context.Context, err error) error {
	cause := c.Cause()
	if cause == nil {
		return err
	}
	var d *Denial
	switch {
	case errors.Is(cause, ErrServed):
		return nil
	case caller.Err() != nil && !errors.As(cause, &d): // the caller is gone
		return err
	}
	return StatusOf(cause)
}

// refused makes an error of the chain ready for grpc-go.
func refused(ctx context.Context, err error) error { return trailed(ctx, StatusOf(err)) }

// trailed sends the trailer that belongs to a denial; any other error is left as
// it is.
func trailed(ctx context.Context, err error) error {
	var d *Denial
	if errors.As(err, &d) {
		if t := d.Trailer(); t != nil {
			_ = grpc.SetTrailer(ctx, t)
		}
	}
	return err
}

// tell sends the trailer of a call that has ended.
func (c *Call) tell(ctx context.Context) {
	if t := c.Trailer(); t != nil {
		_ = grpc.SetTrailer(ctx, t)
	}
}

// endCall ends a call with the error that its handler returns, also if the
// handler panics: the panic goes on.
func endCall(call *Call, err *error) {
	if v := recover(); v != nil {
		call.End(Recovered("handler", v))
		panic(v)
	}
	call.End(*err)
}

// takeRequest runs a unary call's request through the chain, waiting included.
func (c *Call) takeRequest(req any) (_ any, err error) {
	defer recovered(&err)
	m, ok := req.(proto.Message)
	if !ok {
		return nil, notProto(req)
	}
	e := TypedEnvelope(m)
	i, err := c.Request(e)
	if err == nil {
		err = i.Wait(c.ctx)
	}
	if err == nil && !i.Hand() {
		err = hasEnded()
	}
	if err != nil {
		e.Release()
		return nil, err
	}
	return e.Typed(), nil
}

// takeResponse runs a unary call's response through the chain.
func (c *Call) takeResponse(resp any) (_ any, err error) {
	defer recovered(&err)
	m, ok := resp.(proto.Message)
	if !ok {
		return nil, notProto(resp)
	}
	e := TypedEnvelope(m)
	if _, _, err := c.Response(e); err != nil {
		e.Release()
		return nil, err
	}
	return e.Typed(), nil
}

func notProto(v any) *Denial {
	return Deny("chain", Internal, "the message is not a protobuf message but %T; only protobuf can be guarded", v)
}

// serverStream is the door of a streaming method of a grpc-go server. The
// handler is the model server: what it receives was forwarded, and what it
// sends is a response.
type serverStream struct {
	grpc.ServerStream
	call   *Call
	ctx    context.Context // the handler's
	stream *Stream
	many   bool // the caller streams

	start    sync.Once
	requests chan proto.Message // forwarded, for the handler to receive
	over     chan struct{}      // closed when no more will come
	err      error              // why; nil at half-close
}

func (s *serverStream) Context() context.Context { return s.ctx }

// RecvMsg gives the handler the next message that may go on.
func (s *serverStream) RecvMsg(m any) error {
	into, ok := m.(proto.Message)
	if !ok {
		return notProto(m)
	}
	if !s.many {
		return s.recvOne(into)
	}
	s.start.Do(func() {
		go func() {
			s.err = s.stream.Requests()
			close(s.over)
		}()
	})
	select {
	case msg := <-s.requests:
		move(into, msg)
		return nil
	case <-s.call.ctx.Done(): // and the caller may send nothing more
		if err := StatusOf(s.call.Cause()); err != nil {
			return err
		}
		return context.Canceled
	case <-s.over:
		if s.err != nil {
			return StatusOf(s.err)
		}
		return io.EOF
	}
}

// recvOne receives the only request of a method whose server alone streams.
func (s *serverStream) recvOne(into proto.Message) error {
	if err := s.ServerStream.RecvMsg(into); err != nil {
		return err
	}
	m, err := s.call.takeRequest(into)
	if err != nil {
		s.call.Abort(err)
		return StatusOf(err)
	}
	if out := m.(proto.Message); out != into {
		move(into, out)
	}
	return nil
}

// SetTrailer reads what the handler says of the usage.
func (s *serverStream) SetTrailer(md metadata.MD) {
	s.call.Reported(md)
	s.ServerStream.SetTrailer(md)
}

// SendMsg takes a response from the handler.
func (s *serverStream) SendMsg(m any) error {
	msg, ok := m.(proto.Message)
	if !ok {
		return notProto(m)
	}
	err := s.stream.Response(TypedEnvelope(msg))
	if errors.Is(err, io.EOF) {
		s.call.Abort(ErrServed)
		return context.Canceled
	}
	var d *Denial
	switch {
	case errors.As(err, &d):
		s.call.Abort(err)
		return StatusOf(err)
	case errors.Is(err, ErrServed):
		return context.Canceled
	}
	return err
}

// Receive implements Door.
func (s *serverStream) Receive() (*Envelope, error) {
	m, err := newMessage(s.call.Method.RequestType)
	if err != nil {
		return nil, err
	}
	if err := s.ServerStream.RecvMsg(m); err != nil {
		return nil, err
	}
	return TypedEnvelope(m), nil
}

// Forward implements Door: it blocks until the handler receives.
func (s *serverStream) Forward(e *Envelope, _ *Inference) error {
	select {
	case s.requests <- e.Typed():
		return nil
	case <-s.call.ctx.Done():
		return s.call.ctx.Err()
	}
}

// CloseForward implements Door: RecvMsg sees that no more will come.
func (s *serverStream) CloseForward() error { return nil }

// Deliver implements Door.
func (s *serverStream) Deliver(e *Envelope) error { return s.ServerStream.SendMsg(e.Typed()) }

// Encoded implements Door.
func (s *serverStream) Encoded(b []byte) (*Envelope, error) {
	m, err := newMessage(s.call.Method.ResponseType)
	if err != nil {
		return nil, err
	}
	return TypedEnvelope(m), proto.Unmarshal(b, m)
}

// clientStream is the chain around a streaming call of a grpc-go client.
type clientStream struct {
	grpc.ClientStream
	call *Call
	many bool
	once sync.Once

	due  []proto.Message // held until now
	last error           // what RecvMsg returns when nothing is due any more, if something was
}

func (s *clientStream) end(err error) {
	if errors.Is(err, io.EOF) {
		err = nil
	}
	s.once.Do(func() { s.call.End(err) })
}

// SendMsg sends a request if the chain lets it. It blocks while the inference
// has to wait.
func (s *clientStream) SendMsg(m any) error {
	req, err := s.call.takeRequest(m)
	if err != nil {
		s.call.Abort(err)
		s.end(err)
		return err
	}
	return s.ClientStream.SendMsg(req)
}

// RecvMsg receives the next response that the chain lets through.
func (s *clientStream) RecvMsg(m any) error {
	into, ok := m.(proto.Message)
	if !ok {
		return notProto(m)
	}
	for {
		if len(s.due) > 0 {
			move(into, s.due[0])
			s.due = s.due[1:]
			return nil
		}
		if s.last != nil {
			return s.last
		}
		msg := into
		if s.call.holds.Load() { // the caller's message cannot be held
			msg = into.ProtoReflect().New().Interface()
		}
		if err := s.ClientStream.RecvMsg(msg); err != nil {
			s.call.Reported(s.Trailer())
			if err = s.finish(err); len(s.due) > 0 {
				s.last = err
				continue
			}
			return err
		}
		e := TypedEnvelope(msg)
		i, verdict, err := s.call.Response(e)
		if i != nil && len(i.due) > 0 {
			s.take(i)
		}
		switch {
		case verdict == Last: // and err comes after it
			s.call.Abort(err)
			s.end(err)
			s.last = err
		case err != nil:
			e.Release()
			proto.Reset(into)
			s.call.Abort(err)
			s.end(err)
			s.last = err
			continue
		case verdict == Drop:
			e.Release()
			proto.Reset(msg)
			continue
		case verdict == Hold:
			continue
		}
		out := e.Typed()
		if !s.many {
			s.end(nil)
		}
		if len(s.due) > 0 {
			s.due = append(s.due, out)
			continue
		}
		if out != into {
			move(into, out)
		}
		return nil
	}
}

// take takes over what an inference held until now.
func (s *clientStream) take(i *Inference) {
	for _, e := range i.due {
		s.due = append(s.due, e.Typed())
	}
	clear(i.due)
	i.due = i.due[:0]
}

// finish ends the stream with an error, io.EOF among them, unless what was held is
// refused. It returns what the stream has ended with.
func (s *clientStream) finish(err error) error {
	if cause := s.call.Cause(); cause != nil {
		var d *Denial
		if errors.As(cause, &d) {
			err = d
		}
		s.end(err)
		return err
	}
	if s.call.holds.Load() {
		_, open := s.call.Open()
		for _, i := range open {
			refused := i.finish()
			s.take(i)
			if refused != nil {
				err = refused
			}
		}
	}
	s.end(err)
	return err
}

// newMessage makes an empty message of a type that the program links.
func newMessage(name string) (proto.Message, error) {
	t, err := protoregistry.GlobalTypes.FindMessageByName(protoreflect.FullName(name))
	if err != nil {
		return nil, Deny("chain", Internal, "the program has no Go type for %s", name)
	}
	return t.New().Interface(), nil
}

// move makes dst what src is; src is not used afterwards. Messages of one Go
// type are moved as they are: a copy of a large tensor would cost more than all
// the rest of the chain.
func move(dst, src proto.Message) {
	d, s := reflect.ValueOf(dst), reflect.ValueOf(src)
	if d.Type() == s.Type() && d.Kind() == reflect.Pointer {
		d.Elem().Set(s.Elem())
		return
	}
	proto.Reset(dst)
	proto.Merge(dst, src)
}
