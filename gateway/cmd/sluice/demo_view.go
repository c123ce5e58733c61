package main

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"sync"
	"time"
	"unicode/utf8"

	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	semconv "go.opentelemetry.io/otel/semconv/v1.41.0"
	"go.opentelemetry.io/otel/trace"
	"google.golang.org/genproto/googleapis/rpc/code"
	"google.golang.org/grpc/codes"

	"github.com/sluicegate/sluice/interceptors"
)

// width is the widest line that the demo writes, in columns.
const width = 100

// view writes the demo's account.
type view struct {
	out   io.Writer
	color bool
}

// terminal reports whether what is written is shown to somebody at once.
func terminal(w io.Writer) bool {
	f, ok := w.(*os.File)
	if !ok {
		return false
	}
	info, err := f.Stat()
	return err == nil && info.Mode()&os.ModeCharDevice != 0
}

func (v *view) printf(format string, args ...any) { fmt.Fprintf(v.out, format, args...) }

func (v *view) ansi(code, s string) string {
	if !v.color {
		return s
	}
	return "\x1b[" + code + "m" + s + "\x1b[0m"
}

func (v *view) bold(s string) string { return v.ansi("1", s) }
func (v *view) dim(s string) string  { return v.ansi("2", s) }

func (v *view) mark(ok bool) string {
	if ok {
		return v.ansi("32", "✔")
	}
	return v.ansi("1;31", "✘")
}

// cut shortens a text to so many columns; what is not printable becomes visible.
func cut(s string, columns int) string {
	s = strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f || r >= 0x200b && r <= 0x200f || r >= 0xe0000 && r <= 0xe007f {
			return '·'
		}
		return r
	}, s)
	if utf8.RuneCountInString(s) <= columns {
		return s
	}
	return string([]rune(s)[:columns-1]) + "…"
}

// took is a duration as people read it.
func took(d time.Duration) string {
	switch {
	case d < time.Millisecond:
		return fmt.Sprintf("%d µs", d.Microseconds())
	case d < time.Second:
		return fmt.Sprintf("%.1f ms", float64(d)/float64(time.Millisecond))
	}
	return fmt.Sprintf("%.2f s", d.Seconds())
}

// codeName is a code as gRPC's documents write it.
func codeName(c codes.Code) string { return code.Code(c).String() }

func (d *demo) head(started time.Duration) {
	d.printf("%s  %s\n\n", d.bold("Sluice: a model, guarded"), d.dim("started in "+took(started)))
	d.printf("  gateway  %-22s  spiffe://sluice.dev/gateway\n", d.address)
	d.printf("  model    %-22s  spiffe://sluice.dev/model     %s\n", d.modelAt, strings.Join(d.model.Models(), ", "))
	d.printf("  callers  alice of acme, bob of umbrella, mallory, and nobody (without a certificate)\n")
	d.printf("  files    %s\n", d.folder)
	d.printf("           sluice.yaml is the gateway's configuration; the folder is yours alone, and\n")
	d.printf("           goes when the demo ends\n")
}

func (d *demo) trace(id trace.TraceID) { d.printf("  trace    %s\n", id) }

func (d *demo) title(n int, text string) {
	head := fmt.Sprintf("── %d ─ %s ", n, text)
	d.printf("\n%s\n", d.bold(head+strings.Repeat("─", max(0, width-utf8.RuneCountInString(head)))))
}

// expect shows what was sent and what became of it, and holds it against the
// promise.
func (d *demo) expect(who, what string, r result, c codes.Code, reason interceptors.Reason) {
	ok := r.code == c && r.reason == reason
	d.failed = d.failed || !ok
	d.printf("  %s\n", d.bold(cut(who+" → "+what, width-2)))
	tokens := "-"
	if r.in >= 0 {
		tokens = fmt.Sprintf("in %d, out %d", r.in, r.out)
	}
	d.printf("  %s %-18s %-20s tokens %-13s %9s  span %s\n",
		d.mark(ok), codeName(r.code), r.reason, tokens, took(r.took), r.span.SpanID())
	text := r.message
	if r.code == codes.OK {
		text = "“" + r.text + "”"
	}
	text = strings.TrimPrefix(text, string(r.reason)+": ")
	d.printf("    %s\n", d.dim(cut(text, width-4)))
	if !ok {
		d.printf("    %s\n", d.ansi("31", fmt.Sprintf("expected %s %s", codeName(c), reason)))
	}
}

// check shows a fact, and holds it against the promise.
func (d *demo) check(ok bool, format string, args ...any) {
	d.failed = d.failed || !ok
	d.printf("  %s %s\n", d.mark(ok), cut(fmt.Sprintf(format, args...), width-4))
}

func (d *demo) summary() bool {
	d.printf("\n%s\n", d.bold(strings.Repeat("═", width)))
	kept := 0
	for n, p := range d.promises {
		if p.kept {
			kept++
		}
		d.printf("  %s %2d  %s\n", d.mark(p.kept), n+1, p.title)
	}
	all := kept == len(d.script())
	d.printf("\n  %s %s\n", d.mark(all), d.bold(fmt.Sprintf("%d of %d promises kept", kept, len(d.script()))))
	return all
}

// tree shows a span and what is below it.
func (d *demo) tree(root trace.SpanID) {
	for _, s := range d.collector.all() {
		if s.SpanContext().SpanID() == root {
			d.branch(s, "  ", "")
		}
	}
}

func (d *demo) branch(s sdktrace.ReadOnlySpan, indent, joint string) {
	var note []string
	for _, a := range s.Attributes() {
		switch a.Key {
		case semconv.RPCResponseStatusCodeKey, "sluice.outcome":
			note = append(note, a.Value.AsString())
		case semconv.GenAIUsageInputTokensKey:
			note = append(note, "in "+a.Value.String())
		case semconv.GenAIUsageOutputTokensKey:
			note = append(note, "out "+a.Value.String())
		}
	}
	left := fmt.Sprintf("%s%s%-8s %s", indent, joint, service(s), s.Name())
	d.printf("%s %s %9s\n", pad(left, 65), pad(strings.Join(note, ", "), 22), took(s.EndTime().Sub(s.StartTime())))
	below := d.collector.children(s.SpanContext().SpanID(), "")
	for n, c := range below {
		next := "├─ "
		if n == len(below)-1 {
			next = "└─ "
		}
		d.branch(c, indent+strings.Repeat(" ", utf8.RuneCountInString(joint)), next)
	}
}

// pad is %-*s that counts characters.
func pad(s string, columns int) string {
	s = cut(s, columns)
	return s + strings.Repeat(" ", columns-utf8.RuneCountInString(s))
}

// collector keeps the spans of all three programs. It takes the place of an
// OpenTelemetry collector.
type collector struct {
	mu    sync.Mutex
	spans []sdktrace.ReadOnlySpan
}

// ExportSpans keeps spans.
func (c *collector) ExportSpans(_ context.Context, spans []sdktrace.ReadOnlySpan) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.spans = append(c.spans, spans...)
	return nil
}

// Shutdown does nothing: three providers share the collector.
func (c *collector) Shutdown(context.Context) error { return nil }

// all are the spans that have ended so far, by their beginning.
func (c *collector) all() []sdktrace.ReadOnlySpan {
	c.mu.Lock()
	defer c.mu.Unlock()
	spans := slices.Clone(c.spans)
	slices.SortStableFunc(spans, func(a, b sdktrace.ReadOnlySpan) int {
		return cmp.Compare(a.StartTime().UnixNano(), b.StartTime().UnixNano())
	})
	return spans
}

// children are the spans right below one, of a service or, with "", of all.
func (c *collector) children(parent trace.SpanID, of string) (out []sdktrace.ReadOnlySpan) {
	for _, s := range c.all() {
		if s.Parent().SpanID() == parent && (of == "" || service(s) == of) {
			out = append(out, s)
		}
	}
	return out
}

// await waits for a service's span right below one; nil if none comes. A server
// ends its span a little after its client has the answer.
func (c *collector) await(ctx context.Context, parent trace.SpanID, of string) (found sdktrace.ReadOnlySpan) {
	until(ctx, func() bool {
		if s := c.children(parent, of); len(s) > 0 {
			found = s[0]
		}
		return found != nil
	})
	return found
}

func service(s sdktrace.ReadOnlySpan) string {
	v, _ := s.Resource().Set().Value(semconv.ServiceNameKey)
	return v.AsString()
}

// until waits for something that is about to become true, for 5 s at most.
func until(ctx context.Context, condition func() bool) bool {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for !condition() {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return condition()
		}
	}
	return true
}
