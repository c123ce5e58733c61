//go:build linux

package peers

import (
	"strings"
	"testing"
)

// redacts is a gateway that replaces other things in prompts than in outputs, so that what a
// model repeats tells what it was given.
const redacts = `
listener: {address: 127.0.0.1:0}
identity:
  insecure: {}
  rules:
    - {principals: [anonymous], methods: [inference, metadata, health], models: ["*"]}
backends:
  - name: server
    address: "{server}"
    dialect: DIALECT_TRITON
    plaintext: true
    tensors:
      - {tensor: CODES, role: ROLE_PROMPT}
      - {tensor: CODES_OUT, role: ROLE_OUTPUT}
inspect:
  no_starter_rules: true
  responses: true
  rules: |
    SecRule ARGS_POST|ARGS_GET "@sluicePersonal card" "id:1,phase:2,pass,nolog,redact"
    SecRule ARGS_POST "@sluicePersonal email" "id:2,phase:2,pass,nolog"
    SecRule RESPONSE_ARGS "@sluicePersonal email,iban" "id:3,phase:4,pass,nolog,redact"
budgets:
  - {name: tokens, tokens: 1000000000}
`

// TestRedaction has a real Triton and its client take messages that were edited on the way, in
// both directions: they are whole, and nothing beside the texts has changed.
func TestRedaction(t *testing.T) {
	s := running(t, "triton")
	address := startGateway(t, strings.ReplaceAll(redacts, "{server}", s.address))
	for _, r := range driveWith(t, s, "redact_triton.py", address) {
		if r.Failed != "" {
			t.Errorf("%s: %s", r.Case, r.Failed)
		}
	}
}

// TestRedactionCanFail: without the gateway the same cases fail, but for the one that has nothing
// to redact.
func TestRedactionCanFail(t *testing.T) {
	s := running(t, "triton")
	for _, r := range driveWith(t, s, "redact_triton.py", s.address) {
		if passes := r.Case == "untouched" || r.Case == "parameters"; (r.Failed == "") != passes {
			t.Errorf("%s: failed %q", r.Case, r.Failed)
		}
	}
}
