// Package fields reads inference messages field by field without decoding
// them.
//
// A [Program] is compiled once from a message descriptor and the roles of its
// fields. It fills a [Message] either from wire bytes ([Program.Scan]), which
// stay where they are, or from a Go struct ([Program.Walk]). Either way a
// policy sees the same thing: the fields that have a role, each with its value
// and its path, and the tensors with their names, types and elements. What a
// policy changes is recorded as splices and applied when the message is
// forwarded.
package fields

import (
	fieldsv1 "github.com/sluicegate/sluice/proto/gen/sluice/fields/v1"
)

// Role is what a field means. See proto/sluice/fields/v1/fields.proto.
type Role = fieldsv1.Role

// The roles, without the prefix that protobuf wants.
const (
	None              = fieldsv1.Role_ROLE_UNSPECIFIED
	Prompt            = fieldsv1.Role_ROLE_PROMPT
	Output            = fieldsv1.Role_ROLE_OUTPUT
	Parameter         = fieldsv1.Role_ROLE_PARAMETER
	ErrorText         = fieldsv1.Role_ROLE_ERROR
	Model             = fieldsv1.Role_ROLE_MODEL
	ModelVersion      = fieldsv1.Role_ROLE_MODEL_VERSION
	RequestID         = fieldsv1.Role_ROLE_REQUEST_ID
	SequenceID        = fieldsv1.Role_ROLE_SEQUENCE_ID
	Identifier        = fieldsv1.Role_ROLE_IDENTIFIER
	MaxTokens         = fieldsv1.Role_ROLE_MAX_TOKENS
	InputTokens       = fieldsv1.Role_ROLE_INPUT_TOKENS
	OutputTokens      = fieldsv1.Role_ROLE_OUTPUT_TOKENS
	OutputTokensTotal = fieldsv1.Role_ROLE_OUTPUT_TOKENS_TOTAL
	Final             = fieldsv1.Role_ROLE_FINAL
	Opaque            = fieldsv1.Role_ROLE_OPAQUE
	ListedModel       = fieldsv1.Role_ROLE_LISTED_MODEL
	ListedVersion     = fieldsv1.Role_ROLE_LISTED_VERSION
	PromptIDs         = fieldsv1.Role_ROLE_PROMPT_IDS
	OutputIDs         = fieldsv1.Role_ROLE_OUTPUT_IDS
	OutputIDsTotal    = fieldsv1.Role_ROLE_OUTPUT_IDS_TOTAL
	OutputCopy        = fieldsv1.Role_ROLE_OUTPUT_COPY
	Choices           = fieldsv1.Role_ROLE_CHOICES
	Choice            = fieldsv1.Role_ROLE_CHOICE
	Batch             = fieldsv1.Role_ROLE_BATCH
	Forbidden         = fieldsv1.Role_ROLE_FORBIDDEN
)

// IsText reports whether inspection reads fields of this role as text that a
// model reads or wrote.
func IsText(r Role) bool {
	switch r {
	case Prompt, Output, OutputCopy, Parameter, ErrorText:
		return true
	}
	return false
}
