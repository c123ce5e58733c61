package telemetry

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"slices"
	"strconv"
	"sync"
	"syscall"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/sluicegate/sluice/interceptors"
	"go.opentelemetry.io/otel/trace"
	"google.golang.org/grpc/codes"
)

// record is what a log record is made of.
type record struct {
	what, outcome string
	err           error
	denial        *interceptors.Denial
	code          codes.Code
	call          *call
	inference     *interceptors.Inference // nil for a call
	span          trace.SpanContext
	seconds       float64
	input, output int64
}

// warningsPerSecond is how many warnings of one kind are written in a second.
// Chosen: enough to see who is refused and why, and so few that a flood of
// refusals costs nothing to speak of and does not push the rest out of the log.
const warningsPerSecond = 10

// warning is a kind of warning: who refused and why, or the code of a failure.
// Programs make these names, callers do not: they are few.
type warning struct {
	policy string
	reason interceptors.Reason
	code   codes.Code
}

// throttle bounds how often each kind of warning is written. Metrics and spans
// know nothing of it: they count all.
type throttle struct {
	mu   sync.Mutex
	seen map[warning]*window
}

// window is the second at hand of one kind of warning.
type window struct {
	began      time.Time
	written    int
	suppressed int64 // since the last one that was written
}

// take says whether a warning is to be written, and how many of its kind were not
// since the last one that was.
func (t *throttle) take(kind warning) (suppressed int64, ok bool) {
	now := time.Now()
	t.mu.Lock()
	defer t.mu.Unlock()
	w := t.seen[kind]
	if w == nil {
		w = new(window)
		if t.seen == nil {
			t.seen = make(map[warning]*window)
		}
		t.seen[kind] = w
	}
	if now.Sub(w.began) >= time.Second {
		w.began, w.written = now, 0
	}
	if w.written == warningsPerSecond {
		w.suppressed++
		return 0, false
	}
	w.written++
	suppressed, w.suppressed = w.suppressed, 0
	return suppressed, true
}

// record writes a log record: a warning for what was refused, cut or failed; for
// debugging what was served or given up by its caller. Of warnings of one kind it
// writes ten in a second; the next one says how many there were beside
// ("suppressed").
func (p *Policy) record(ctx context.Context, r *record) {
	level := slog.LevelWarn
	if r.outcome == outcomeServed || r.outcome == outcomeCancelled {
		level = slog.LevelDebug
	}
	if !p.log.Enabled(ctx, level) {
		return
	}
	var suppressed int64
	if level == slog.LevelWarn {
		kind := warning{code: r.code}
		if d := r.denial; d != nil {
			kind.policy, kind.reason = d.Policy, d.Reason
		}
		var ok bool
		if suppressed, ok = p.throttle.take(kind); !ok {
			return
		}
	}
	c := r.call.call
	attrs := make([]slog.Attr, 0, 20)
	text := func(key, value string) {
		if value != "" {
			attrs = append(attrs, slog.String(key, value))
		}
	}
	if r.span.IsValid() {
		text("trace_id", r.span.TraceID().String())
		text("span_id", r.span.SpanID().String())
	}
	if d := r.denial; d != nil {
		text("policy", d.Policy)
		text("reason", string(d.Reason))
	}
	text("code", codeName(r.code))
	text("method", clean(c.FullMethod))
	if i := r.inference; i != nil {
		text("model", clean(i.Model))
		if i.Backend != nil {
			text("backend", i.Backend.Name)
		}
		attrs = append(attrs, slog.Int64("input_tokens", r.input), slog.Int64("output_tokens", r.output))
	}
	text("principal", clean(principal(c)))
	text("tenant", clean(c.Tenant))
	if a := c.Peer.Addr; a != nil {
		text("peer", clean(a.String()))
	}
	attrs = append(attrs, slog.Float64("seconds", r.seconds))
	if d := r.denial; d != nil {
		text("field", clean(d.Field))
		if len(d.Metadata) > 0 {
			attrs = append(attrs, slog.Any("metadata", metadataGroup(d.Metadata)))
		}
		if d.Cause != nil {
			attrs = append(attrs, cause(d.Cause)...)
		}
	} else if r.outcome == outcomeFailed {
		attrs = append(attrs, cause(r.err)...)
	}
	if suppressed > 0 {
		attrs = append(attrs, slog.Int64("suppressed", suppressed))
	}
	p.log.LogAttrs(ctx, level, r.what+" "+r.outcome, attrs...)
}

func metadataGroup(md map[string]string) slog.Value {
	keys := make([]string, 0, len(md))
	for k := range md {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	keys = keys[:min(len(keys), attributesPerSource)]
	attrs := make([]slog.Attr, len(keys))
	for n, k := range keys {
		attrs[n] = slog.String(clean(k), clean(md[k]))
	}
	return slog.GroupValue(attrs...)
}

// maxStack bounds the stack of a panic in a log record, in bytes.
const maxStack = 8 << 10

// cause says what is behind a denial or a failure. An error's text may quote a
// prompt; so it is written only if the network, the operating system or the
// context is its author. Of any other error the type alone is.
func cause(err error) []slog.Attr {
	var p *interceptors.Panic
	if errors.As(err, &p) {
		return []slog.Attr{
			slog.String("cause", "panic"), slog.String("cause_type", p.Type),
			slog.String("stack", string(p.Stack[:min(len(p.Stack), maxStack)])),
		}
	}
	attrs := []slog.Attr{slog.String("cause_type", fmt.Sprintf("%T", err))}
	if known := outside(err); known != nil {
		attrs = append(attrs, slog.String("cause", clean(known.Error())))
	}
	return attrs
}

// outside finds the error of the network, the system or the context in a chain.
func outside(err error) error {
	var (
		op   *net.OpError
		dns  *net.DNSError
		path *fs.PathError
		no   syscall.Errno
	)
	switch {
	case errors.As(err, &op):
		return op
	case errors.As(err, &dns):
		return dns
	case errors.As(err, &path):
		return path
	case errors.As(err, &no):
		return no
	case errors.Is(err, context.DeadlineExceeded):
		return context.DeadlineExceeded
	case errors.Is(err, context.Canceled):
		return context.Canceled
	}
	return nil
}

// maxText bounds text from a peer, in bytes.
const maxText = 128

// clean makes text from a peer safe to write down: cut to 128 bytes, valid
// UTF-8, and with a backslash sequence for what is not printable. Text that is
// so already is returned as it is.
func clean(s string) string {
	if len(s) <= maxText {
		n := 0
		for n < len(s) && s[n] >= ' ' && s[n] <= '~' && s[n] != '\\' {
			n++
		}
		if n == len(s) {
			return s
		}
	}
	const more = "..."
	out := make([]byte, 0, maxText)
	fits := 0 // bytes of out that leave room for more
	for len(s) > 0 {
		r, size := utf8.DecodeRuneInString(s)
		switch {
		case r == utf8.RuneError && size == 1:
			out = append(out, '\\', 'x', hex(s[0]>>4), hex(s[0]))
		case r == '\\':
			out = append(out, `\\`...)
		case unicode.IsPrint(r):
			out = utf8.AppendRune(out, r)
		default:
			quoted := strconv.QuoteRuneToASCII(r)
			out = append(out, quoted[1:len(quoted)-1]...)
		}
		if len(out) > maxText {
			return string(append(out[:fits], more...))
		}
		if len(out) <= maxText-len(more) {
			fits = len(out)
		}
		s = s[size:]
	}
	return string(out)
}

func hex(b byte) byte { return "0123456789abcdef"[b&15] }
