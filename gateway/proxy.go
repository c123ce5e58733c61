package gateway

import (
	"context"
	"errors"
	"io"
	"strings"
	"sync"

	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/tap"

	"github.com/sluicegate/sluice/gateway/endpoints"
	"github.com/sluicegate/sluice/interceptors"
)

// handle serves every call that no registered service takes: the life of a
// call through the gateway. It runs when the headers have come; nothing of the
// body was read.
func (g *Gateway) handle(_ any, ss grpc.ServerStream) (err error) {
	ctx := ss.Context()
	w, err := wireOf(ctx)
	if err != nil {
		return err
	}
	method, _ := grpc.MethodFromServerStream(ss)
	rt := g.acquire()
	defer rt.release()

	call, err := rt.guard.Chain.Begin(ctx, interceptors.CallInfo{
		FullMethod: method,
		Peer:       interceptors.PeerFrom(ctx),
		Metadata:   headerOf(ctx),
		Cancel:     func(why error) { finish(w, why) }, // which ends the stream's context
	})
	if err != nil {
		finish(w, err)
		return err
	}
	c := &forwarding{g: g, rt: rt, call: call, ss: ss}
	c.in = receiver{wire: w, limit: rt.guard.MaxMessageBytes(), pool: g.pool}
	defer func() {
		if v := recover(); v != nil {
			err = interceptors.Recovered("gateway", v)
		}
		err = c.outcome(err)
		call.End(err)
		if t := call.Trailer(); t != nil {
			_ = w.SetTrailer(t)
		}
		finish(w, err)
		c.requests.Wait() // nothing of the call is at work when its handler returns
		c.at.End(c.ended)
		if c.flow != nil {
			c.flow.End()
		}
	}()
	if err := checkEncoding(w.RecvCompress()); err != nil {
		return err
	}
	if call.Method.ClientStreams || call.Method.ServerStreams {
		return c.stream()
	}
	return c.unary()
}

// headerKey is the key of a call's header in its context.
type headerKey struct{}

// keepHeader keeps the header of a call as grpc-go read it, which is not to be
// changed. metadata.FromIncomingContext copies it for everybody who asks.
func keepHeader(ctx context.Context, info *tap.Info) (context.Context, error) {
	return context.WithValue(ctx, headerKey{}, info.Header), nil
}

func headerOf(ctx context.Context) metadata.MD {
	md, _ := ctx.Value(headerKey{}).(metadata.MD)
	return md
}

// outcome is what a call ends with. If it was aborted, or the caller has gone,
// that is why, and whatever error that led to is not.
func (c *forwarding) outcome(err error) error {
	var d *interceptors.Denial
	cause := c.call.Cause()
	switch {
	case err == nil || cause == nil:
		return err
	case errors.Is(cause, interceptors.ErrServed):
		return nil
	case errors.As(cause, &d):
		return d
	case errors.As(err, &d):
		return err
	}
	return cause
}

// forwarding is one call on its way through the gateway, and the gateway's end
// of a stream (interceptors.Door).
type forwarding struct {
	g    *Gateway
	rt   *runtime
	call *interceptors.Call
	ss   grpc.ServerStream
	in   receiver

	flow     *interceptors.Stream // nil for a unary method
	requests sync.WaitGroup       // the goroutine that reads the caller's stream
	received bool
	stall    stall

	back, out frame // the response that is being received, and sent: not one for each message

	opened chan struct{} // closed once the stream to the model server is open, or will not be
	up     *upstream
	at     endpoints.Call // which of its servers
	ended  endpoints.Outcome
	cs     grpc.ClientStream
	err    error
}

// unary serves a method with one request and one response.
func (c *forwarding) unary() error {
	call, ss := c.call, c.ss
	e, err := c.first()
	if errors.Is(err, io.EOF) {
		return noMessage()
	}
	if err != nil {
		return err
	}
	i, err := call.Request(e)
	if err == nil {
		err = i.Wait(call.Context())
	}
	if err == nil && !i.Hand() {
		err = call.Cause()
	}
	if err != nil {
		e.Release()
		return err
	}
	up := c.rt.upstreams[i.Backend]
	var header, trailer metadata.MD
	req, resp := frame{e.Encode()}, frame{}
	c.place(i)
	err = up.servers.Invoke(&c.at, call.FullMethod, &req, &resp,
		grpc.ForceCodecV2(up.codec), acceptGzip, grpc.Header(&header), grpc.Trailer(&trailer))
	req.free()
	i.Place(c.at.Address(), nil)
	call.Reported(header)
	call.Reported(trailer)
	if err != nil {
		resp.free() // there is one if a second came
		err = up.failed(c, err, header, trailer)
		c.at.End(c.ended)
		return err
	}
	c.served(header, trailer)
	c.at.End(c.ended)
	out := interceptors.RawAnswer(resp.data)
	if _, _, err := call.Response(out); err != nil {
		out.Release()
		return err
	}
	if h := passable(header); h != nil {
		_ = ss.SetHeader(h)
	}
	passTrailer(ss, trailer)
	resp.data = out.Encode()
	if err = call.Cause(); err == nil {
		call.End(nil) // before the answer, so that answer and status go out in one write
		err = ss.SendMsg(&resp)
	}
	resp.free()
	return err
}

func noMessage() error {
	return interceptors.Deny("gateway", interceptors.MessageMalformed, "the method takes one message, and none came")
}

// stream serves a method with several requests or responses.
func (c *forwarding) stream() (err error) {
	call, ss := c.call, c.ss
	c.opened = make(chan struct{})
	c.stall.watch(call.Context(), c.g.stall, func() {
		call.Abort(interceptors.Deny("gateway", interceptors.MessageTimeout,
			"the caller read nothing for %v while there was more for it", c.g.stall))
	})
	defer c.stall.stop()
	s := interceptors.NewStream(call, c)
	c.flow = s
	defer func() {
		if err == nil {
			s.End()
		}
	}()
	if err := s.Begin(); errors.Is(err, io.EOF) {
		return nil // nothing is opened at the model server before a request may go there
	} else if err != nil {
		return err
	}
	if call.Method.ClientStreams {
		c.requests.Go(func() { _ = s.Requests() }) // an error aborts the call
	} else if err := s.Requests(); err != nil {
		return err
	}
	select {
	case <-c.opened:
	case <-call.Context().Done():
		return call.Cause()
	}
	switch {
	case c.err != nil:
		return c.up.failed(c, c.err, nil, nil)
	case c.cs == nil:
		return nil // all was refused
	}
	// Headers go on when they come; a client may wait for them. A server that
	// only refuses sends none, and neither do we then.
	if h, err := c.cs.Header(); err == nil && len(h) > 0 {
		_ = ss.SendHeader(passable(h))
	}
	for responses := 0; ; responses++ {
		f := &c.back
		if err := c.cs.RecvMsg(f); err != nil {
			f.free()
			if refused := s.Finish(); refused != nil {
				return refused
			}
			trailer := c.cs.Trailer()
			call.Reported(trailer)
			if !errors.Is(err, io.EOF) {
				header, _ := c.cs.Header()
				return c.up.failed(c, err, header, trailer)
			}
			if cause := call.Cause(); cause != nil {
				return cause
			}
			if responses == 0 && !call.Method.ServerStreams {
				return c.up.invalid("the model server said that all went well, and gave no answer")
			}
			c.served(nil, trailer)
			passTrailer(ss, trailer)
			return nil
		}
		if responses > 0 && !call.Method.ServerStreams {
			f.free()
			return c.up.invalid("the model server gave two answers where the method has one")
		}
		data := f.data
		f.data = nil
		if err := s.Response(s.Answer(data)); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return err
		}
	}
}

// Receive implements interceptors.Door.
func (c *forwarding) Receive() (*interceptors.Envelope, error) {
	switch many := c.call.Method.ClientStreams; {
	case c.received && many:
		return c.in.message()
	case c.received:
		return nil, io.EOF
	default:
		c.received = true
		e, err := c.first()
		if errors.Is(err, io.EOF) && !many {
			err = noMessage()
		}
		return e, err
	}
}

// first reads the first message, and the end of the request if the method takes
// only one. endSilent sets it a limit of time.
func (c *forwarding) first() (*interceptors.Envelope, error) {
	c.call.Expect(true)
	defer c.call.Expect(false)
	e, err := c.in.message()
	if err != nil || c.call.Method.ClientStreams {
		return e, err
	}
	if err := c.in.end(); err != nil {
		e.Release()
		return nil, err
	}
	return e, nil
}

// Forward implements interceptors.Door.
func (c *forwarding) Forward(e *interceptors.Envelope, i *interceptors.Inference) error {
	if c.cs == nil && c.err == nil {
		c.up = c.rt.upstreams[i.Backend]
		desc := &grpc.StreamDesc{ClientStreams: true, ServerStreams: true}
		weight := c.place(i)
		c.cs, c.err = c.up.servers.NewStream(&c.at, desc, c.call.FullMethod, grpc.ForceCodecV2(c.up.codec), acceptGzip)
		c.placed(i, weight)
		close(c.opened)
	} else if err := c.joined(i); err != nil {
		e.Release()
		c.call.Abort(err)
		return err
	}
	if c.err != nil {
		e.Release()
		return c.err
	}
	f := frame{e.Encode()}
	err := c.cs.SendMsg(&f)
	f.free()
	return err
}

// CloseForward implements interceptors.Door.
func (c *forwarding) CloseForward() error {
	switch {
	case c.err != nil:
		return nil
	case c.cs == nil:
		close(c.opened)
		return nil
	}
	return c.cs.CloseSend()
}

// Deliver implements interceptors.Door. It blocks while the caller does not
// read, which holds the model server back, but not for ever: the caller may be
// holding a GPU.
func (c *forwarding) Deliver(e *interceptors.Envelope) error {
	c.out.data = e.Encode()
	c.stall.begin()
	err := c.ss.SendMsg(&c.out)
	c.stall.end()
	c.out.free()
	return err
}

// Encoded implements interceptors.Door.
func (c *forwarding) Encoded(b []byte) (*interceptors.Envelope, error) {
	return interceptors.RawEnvelope(bufferOf(b)), nil
}

// forwarded is the context of the call to the model server: what the caller
// sent, without what only we may say, and what the policies add.
func forwarded(call *interceptors.Call) context.Context {
	return metadata.NewOutgoingContext(call.Context(), call.Forwarded())
}

// passable is what of a model server's header or trailer goes on to the caller;
// nil if nothing does. grpc-go writes its own; and what we tell callers is ours to say.
func passable(md metadata.MD) metadata.MD {
	var out metadata.MD
	for k, v := range md {
		if k == "content-type" || strings.HasPrefix(k, "x-sluice-") || strings.HasPrefix(k, "grpc-") && k != "grpc-retry-pushback-ms" {
			continue
		}
		if out == nil {
			out = make(metadata.MD, len(md))
		}
		out[k] = v
	}
	return out
}

func passTrailer(ss grpc.ServerStream, md metadata.MD) {
	if t := passable(md); t != nil {
		ss.SetTrailer(t)
	}
}
