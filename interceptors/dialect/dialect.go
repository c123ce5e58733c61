// Package dialect knows the inference APIs: which methods there are and what
// they are for, which messages begin, continue and end an inference, and how an
// API tells its caller that one inference of several failed.
//
// Three servers speak inference.GRPCInferenceService under the same paths with
// different messages and habits, so a dialect belongs to a back end and is
// named in its configuration.
//
// The descriptors of the Open Inference Protocol are embedded and live in a
// registry of their own: a program that links the chain may link its own
// generated copy of the same API.
package dialect

import "github.com/sluicegate/sluice/interceptors/fields"

// Kind is what a method is for.
type Kind uint8

const (
	// Management changes or reveals the server: load, unload, shared memory,
	// trace and log settings, statistics. Also any method whose use is unknown.
	Management Kind = iota
	// Metadata describes a model or the server.
	Metadata
	// Health says whether the server or a model is ready.
	Health
	// Inference is model work.
	Inference
)

// Dialect is what is known of one back end's API. It is immutable.
type Dialect struct {
	// Name is its name in the configuration, in lower case.
	Name string
	// Methods by full name, "/package.Service/Method".
	Methods map[string]*Method

	tensors map[string]fields.Role
	texts   map[string]bool // tensors that the configuration says are text
	model   string          // of requests that cannot name one
}

// Method is what is known of one RPC.
type Method struct {
	// Name is the full name, "/package.Service/Method".
	Name string
	Kind Kind
	// ClientStreams and ServerStreams say which sides send many messages.
	ClientStreams, ServerStreams bool
	// Request and Response read its messages.
	Request, Response *fields.Program
	// RequestType and ResponseType are the full names of its messages.
	RequestType, ResponseType string
	// NamesModel says that requests can name a model. One that does not then means
	// whichever the model server takes, or all.
	NamesModel bool
	// ListsModels says that responses can list models.
	ListsModels bool
	// Multiplexed says that one stream carries many inferences, told apart by
	// their ids. Otherwise a call is one inference, and later messages extend it.
	Multiplexed bool

	dialect *Dialect
	// triton: an end can be hidden, and an inference can be refused in band.
	triton bool
	// batched: a message has the counts of several answers.
	batched bool
}

// Request is what a request message says of its inference.
type Request struct {
	Model, Version, ID, Sequence string
	// MaxTokens is how many tokens the model may write, over all choices; 0 if
	// the message does not say.
	MaxTokens int64
	// WantsFinal says that the caller asked for the empty final response.
	WantsFinal bool
	// PromptIDs is the index of a field with the prompt as token ids, or -1.
	PromptIDs int
	// ModelField and IDField are the indices of the fields that hold them, or -1.
	ModelField, IDField int

	finalField int   // index of the parameter that asks for the empty final response, or -1
	choices    int64 // answers asked for
	prompts    int64 // in a batch
}

// Response is what a response message says of its inference.
type Response struct {
	// ID is a view into the message.
	ID []byte
	// IDField is the index of the field that holds it, or -1.
	IDField int
	// Final says that no further message of this inference follows.
	Final bool
	// Empty says that the message holds nothing but the end.
	Empty bool
	// Failed says that the model server reports an error of this inference.
	Failed bool
	// InputTokens and OutputTokens are what the server reports in this message;
	// OutputTotal is what it reports for the inference so far. 0 if it does not.
	InputTokens, OutputTokens, OutputTotal int64
	// IDs is how many token ids the model wrote in this message, IDsTotal in the
	// inference so far.
	IDs, IDsTotal int64
	// Choice is which of the answers that the caller asked for the message is of:
	// its counts of output are that answer's.
	Choice int64
}
