// Package interceptors is the chain that guards an inference.
//
// A [Policy] is one concern: who may call, what may be said, what it may cost,
// how much of the GPU it may hold, what is seen of it. It is a small state
// machine over the life of an inference and knows nothing of transports:
//
//	call begins       Policy.Begin            metadata only, nothing was read yet
//	inference begins  Authorizer.Authorize    its first message is read, its model known
//	                  CallPolicy.Start
//	request text      InferencePolicy.Request
//	                  Waiter.Wait             a permit is taken last of all
//	response text     InferencePolicy.Response
//	inference ends    InferencePolicy.End
//	call ends         CallPolicy.End
//
// Requests pass the policies in the order of the chain, responses and ends in
// the reverse order. Whatever was opened is ended exactly once, also when a
// later policy refuses, the caller goes away or a policy panics.
//
// Work is accounted for by inference, not by RPC: one ModelStreamInfer call
// carries many inferences, for several models, in flight at once. Only the
// chain matches messages with inferences; what it needs to know of an API it
// has from package dialect.
//
// A door turns a transport into these events. The doors for grpc-go servers and
// clients are in this package (see [UnaryServer], [StreamServer], [UnaryClient]
// and [StreamClient]); the gateway is another. The life of an inference is in
// chain.go, call.go and inference.go; that of a stream, the same for every
// door, in stream.go.
package interceptors
