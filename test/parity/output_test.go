package parity_test

import (
	"context"
	"maps"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
)

const (
	redactsOutput = `
inspect:
  responses: true
  no_starter_rules: true
  rules: |
    SecRule RESPONSE_ARGS "@sluicePersonal email,card" "id:1,phase:4,pass,nolog,redact"
`
	refusesOutput = `
inspect:
  responses: true
  no_starter_rules: true
  canaries: [velvet octopus]
  rules: |
    SecRule RESPONSE_ARGS "@sluicePersonal email,card" "id:1,phase:4,deny"
    SecRule RESPONSE_ARGS "@sluicePhrases canary" "id:2,phase:4,pass,truncate:'(no more of this)'"
    SecRule RESPONSE_ARGS "@contains blue bird" "id:3,phase:4,deny"
`
)

// TestStreamedOutput has answers come word by word: what rules look for is found over
// words, nothing of it is delivered, and the other inferences of the stream go on.
func TestStreamedOutput(t *testing.T) {
	denied := outcome{Code: codes.PermissionDenied, Reason: "OUTPUT_REJECTED"}
	with := func(o outcome, text string) outcome {
		o.Text = text
		return o
	}
	for _, c := range []struct {
		name, config string
		stream       inferences
		wants        map[string]outcome
	}{
		{"redacted", redactsOutput, inferences{
			request("words", "a", prompt("pay 4111 1111 1111 1111 now or write to bob@example.com")),
			request("words", "b", prompt("one two three"))},
			map[string]outcome{"a": {Text: "pay [redacted:card] now or write to [redacted:email]"}, "b": {Text: "one two three"}, "stream": {}}},
		{"empty ids", redactsOutput, inferences{
			request("words", "", prompt("pay 4111 1111 1111 1111 now"))},
			map[string]outcome{"": {Text: "pay [redacted:card] now"}, "stream": {}}},
		{"refused", refusesOutput, inferences{
			request("words", "a", prompt("one two three four")),
			request("words", "b", prompt("you may pay with 4111 1111 1111 1111 now")),
			request("words", "c", prompt("five six seven eight"))},
			map[string]outcome{"a": {Text: "one two three four"}, "b": with(denied, ""), "c": {Text: "five six seven eight"}, "stream": {}}},
		{"truncated", refusesOutput, inferences{
			request("words", "a", prompt("it is the velvet octopus of course"))},
			map[string]outcome{"a": {Text: "it is the (no more of this)"}, "stream": {}}},
		{"another operator", refusesOutput, inferences{
			request("words", "a", prompt("it is the blue bird of course"))},
			map[string]outcome{"a": with(denied, ""), "stream": {}}},
		{"cut at its budget", redactsOutput + `
budgets: [{name: words, models: [words], tokens: 16, default_output_tokens: 4}]
`, inferences{request("words", "a", prompt(words(10)))},
			map[string]outcome{"a": {Code: codes.ResourceExhausted, Reason: "BUDGET_CUT", Text: words(6)}, "stream": {}}},
	} {
		t.Run(c.name, func(t *testing.T) {
			for door, open := range doors {
				t.Run(door, func(t *testing.T) {
					t.Parallel()
					w := open(t, base+c.config)
					ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
					defer cancel()
					got := converse(ctx, t, w.client("/acme/app"), c.stream...)
					for id, o := range got {
						// How much goes out before a refusal depends on how it was cut.
						if o.Reason == "OUTPUT_REJECTED" {
							if len(o.Text) > len("you may pay with ") {
								t.Errorf("%q was delivered", o.Text)
							}
							o.Text = ""
							got[id] = o
						}
					}
					if !maps.Equal(got, c.wants) {
						t.Errorf("got %+v, want %+v", got, c.wants)
					}
					w.quiet()
				})
			}
		})
	}
}

// TestHeldOutputIsCharged: what is held back was written by the model, and is paid
// for, whether it is delivered or not; and no more is delivered than was paid.
func TestHeldOutputIsCharged(t *testing.T) {
	const budget = "\nbudgets: [{name: all, tokens: 1000}]\n"
	text := "you may pay with 4111 1111 1111 1111 now"
	for door, open := range doors {
		t.Run(door, func(t *testing.T) {
			t.Parallel()
			spent := make(map[string]int64)
			for name, config := range map[string]string{"plain": "", "redacted": redactsOutput, "refused": refusesOutput} {
				w := open(t, base+config+budget)
				ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
				defer cancel()
				converse(ctx, t, w.client("/acme/app"), request("words", "a", prompt(text)))
				w.quiet()
				for _, a := range w.guard().Budgets().Snapshot() {
					spent[name] += a.Spent
					if a.Spent+a.Remaining != a.Limit {
						t.Errorf("%s: %+v", name, a)
					}
				}
			}
			// The input is charged too: the answer is the prompt.
			if spent["plain"] == 0 || spent["redacted"] != spent["plain"] || spent["refused"] <= spent["plain"]/2 || spent["refused"] > spent["plain"] {
				t.Errorf("%v", spent)
			}
		})
	}
}

// TestCancelWhileHeld: a caller that goes away while its answer is held back leaves
// nothing.
func TestCancelWhileHeld(t *testing.T) {
	for door, open := range doors {
		t.Run(door, func(t *testing.T) {
			t.Parallel()
			w := open(t, base+redactsOutput+twoPools+"\nbudgets: [{name: all, tokens: 1000}]\n")
			for n := range 5 {
				ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
				s, err := w.client("/acme/app").ModelStreamInfer(ctx)
				if err != nil {
					t.Fatal(err)
				}
				send(t, s, request("words", "a", prompt("so pay 1 2 3 4 5 6 7 8 9 1 2 3 4 5 6 7 8 9"), param("delay_ms", 5)))
				for range min(n, 1) { // the first word is all that comes before the numbers
					if _, err := s.Recv(); err != nil {
						t.Fatal(err)
					}
				}
				for w.model.Stats("words").Words < int64(n) {
					pause()
				}
				cancel()
				w.quiet()
			}
		})
	}
}
