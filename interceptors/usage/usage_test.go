package usage

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"go.opentelemetry.io/otel/trace"
	"go.uber.org/goleak"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/sluicegate/sluice/interceptors"
	"github.com/sluicegate/sluice/interceptors/dialect"
	configv1 "github.com/sluicegate/sluice/proto/gen/sluice/config/v1"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// opened is a policy with its file and its log.
func opened(t *testing.T, path string) (*Policy, *buffer) {
	t.Helper()
	log := new(buffer)
	p, err := Open(&configv1.Usage{File: path}, slog.New(slog.NewTextHandler(log, nil)))
	if err != nil {
		t.Fatal(err)
	}
	return p, log
}

// buffer is a log for many goroutines.
type buffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *buffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *buffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

func infer(model string) *interceptors.Inference {
	c := &interceptors.Call{Method: &dialect.Method{Kind: dialect.Inference}, Principal: "spiffe://example.org/a", Tenant: "a"}
	c.FullMethod = "/s/M"
	c.SetContext(context.Background())
	return &interceptors.Inference{Call: c, Model: model}
}

// run is a whole inference.
func run(t *testing.T, p *Policy, i *interceptors.Inference, err error, events ...interceptors.Event) {
	t.Helper()
	c, fail := p.Begin(i.Call)
	if fail != nil {
		t.Fatal(fail)
	}
	n, fail := c.Start(i)
	if fail != nil {
		t.Fatal(fail)
	}
	for _, e := range events {
		n.(interceptors.Observer).Observe(e)
	}
	n.End(interceptors.Outcome{Err: err})
	c.End(interceptors.Outcome{Err: err})
}

// lines are the records of a file.
func lines(t *testing.T, path string) (out []map[string]any) {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		var r map[string]any
		if err := json.Unmarshal([]byte(line), &r); err != nil {
			t.Fatalf("%v: %q", err, line)
		}
		out = append(out, r)
	}
	return out
}

func TestARecordSaysAll(t *testing.T) {
	path := filepath.Join(t.TempDir(), "usage.jsonl")
	p, _ := opened(t, path)
	id := trace.TraceID{1, 2, 3}
	i := infer("llama")
	i.Call.SetContext(trace.ContextWithSpanContext(context.Background(), trace.NewSpanContext(trace.SpanContextConfig{TraceID: id})))
	i.Backend, i.Version = &interceptors.Backend{Name: "triton"}, "3"
	i.Handed, i.InputTokens, i.OutputTokens, i.ReportedOutput = true, 7, 20, 22
	run(t, p, i, interceptors.Deny("budget", interceptors.BudgetCut, "a text that stays out"),
		interceptors.Event{Policy: "budget", Name: "threshold", Attributes: []string{"budget", "other"}},
		interceptors.Event{Policy: "budget", Name: "charged", Attributes: []string{"budget", "purse", "unit", "money", "amount", "0.000123"}},
		interceptors.Event{Policy: "budget", Name: "charged", Attributes: []string{"budget", "day", "unit", "tokens", "amount", "25", "excess", "4"}})
	p.Close()
	all := lines(t, path)
	if len(all) != 1 {
		t.Fatalf("%d lines", len(all))
	}
	r := all[0]
	if at, err := time.Parse(time.RFC3339Nano, fmt.Sprint(r["time"])); err != nil || time.Since(at) > time.Hour {
		t.Errorf("time %v", r["time"])
	}
	if s, ok := r["seconds"].(float64); !ok || s < 0 {
		t.Errorf("seconds %v", r["seconds"])
	}
	delete(r, "time")
	delete(r, "seconds")
	want := map[string]any{
		"trace_id": id.String(), "principal": "spiffe://example.org/a", "tenant": "a", "method": "/s/M", "model": "llama", "version": "3",
		"backend": "triton", "handed": true, "input_tokens": 7.0, "output_tokens": 20.0, "reported_output_tokens": 22.0,
		"outcome": "cut", "policy": "budget", "reason": "BUDGET_CUT",
	}
	charges, _ := json.Marshal(r["charges"])
	if want := `[{"amount":0.000123,"budget":"purse","unit":"money"},{"amount":25,"budget":"day","excess":4,"unit":"tokens"}]`; string(charges) != want {
		t.Errorf("charges %s, want %s", charges, want)
	}
	delete(r, "charges")
	if !maps.Equal(r, want) {
		t.Errorf("got  %v\nwant %v", r, want)
	}
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v: it is not for us alone", info.Mode(), err)
	}
}

func TestOutcomes(t *testing.T) {
	path := filepath.Join(t.TempDir(), "usage.jsonl")
	p, _ := opened(t, path)
	var want []string
	for _, tc := range []struct {
		err    error
		handed bool
		want   string
	}{
		{nil, true, "served"},
		{interceptors.Deny("x", interceptors.PromptRejected, "x"), false, "refused"},
		{interceptors.Deny("x", interceptors.OutputRejected, "x"), true, "cut"},
		{context.Canceled, true, "cancelled"},
		{status.Error(codes.Canceled, "x"), true, "cancelled"},
		{context.DeadlineExceeded, true, "failed"},
		{errors.New("a text that stays out"), true, "failed"},
	} {
		i := infer("m")
		i.Handed = tc.handed
		run(t, p, i, tc.err)
		want = append(want, tc.want)
	}
	// One that the chain refused.
	i := infer(strings.Repeat("é", 1000))
	c, _ := p.Begin(i.Call)
	c.(interceptors.Witness).Refused(i, interceptors.NoModel("identity", "m"))
	want = append(want, "refused")
	// And a call that is no inference.
	if c, err := p.Begin(&interceptors.Call{Method: &dialect.Method{Kind: dialect.Health}}); c != nil || err != nil {
		t.Errorf("%v, %v", c, err)
	}
	p.Close()
	var got []string
	all := lines(t, path)
	for _, r := range all {
		got = append(got, fmt.Sprint(r["outcome"]))
	}
	if !slices.Equal(got, want) {
		t.Errorf("got  %v\nwant %v", got, want)
	}
	if model := fmt.Sprint(all[len(all)-1]["model"]); len(model) > maxName || !strings.HasSuffix(model, "é...") {
		t.Errorf("a long name is %q", model)
	}
	text, _ := os.ReadFile(path)
	if strings.Contains(string(text), "stays out") {
		t.Errorf("a text got in:\n%s", text)
	}
}

// A file that is moved away is followed by a new one, and nothing is lost.
func TestTheFileMayBeMovedAway(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "usage.jsonl")
		p, _ := opened(t, path)
		run(t, p, infer("a"), nil)
		synctest.Wait()
		if err := os.Rename(path, path+".1"); err != nil {
			t.Fatal(err)
		}
		run(t, p, infer("b"), nil) // may yet go to the old one
		time.Sleep(look + time.Millisecond)
		synctest.Wait()
		run(t, p, infer("c"), nil)
		p.Close()
		if n := len(lines(t, path+".1")); n != 2 {
			t.Errorf("%d records in the old file", n)
		}
		if all := lines(t, path); len(all) != 1 || all[0]["model"] != "c" {
			t.Errorf("the new file has %v", all)
		}
		if p.Lost() != 0 {
			t.Errorf("%d lost", p.Lost())
		}
	})
}

// What another process left unfinished does not spoil what follows.
func TestATornLineIsEnded(t *testing.T) {
	path := filepath.Join(t.TempDir(), "usage.jsonl")
	if err := os.WriteFile(path, []byte(`{"model":"x"}`+"\n"+`{"mod`), 0o600); err != nil {
		t.Fatal(err)
	}
	p, _ := opened(t, path)
	run(t, p, infer("a"), nil)
	p.Close()
	text, _ := os.ReadFile(path)
	if got := strings.Split(string(text), "\n"); len(got) != 4 || got[1] != `{"mod` || !strings.HasPrefix(got[2], `{"time"`) || got[3] != "" {
		t.Errorf("%q", got)
	}
}

// A disk that is full, or a folder that is gone, costs records, which are counted,
// and nothing else; when it is well again records are written again.
func TestADiskThatFails(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir := filepath.Join(t.TempDir(), "d")
		if err := os.Mkdir(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		path := filepath.Join(dir, "usage.jsonl")
		if err := os.Symlink("/dev/full", path); err != nil {
			t.Fatal(err)
		}
		p, log := opened(t, path)
		for range 3 {
			run(t, p, infer("a"), nil)
			synctest.Wait()
		}
		if p.Lost() != 3 {
			t.Errorf("%d lost on a full disk, want 3", p.Lost())
		}
		if n := strings.Count(log.String(), "usage records are lost"); n != 1 || !strings.Contains(log.String(), "no space left") {
			t.Errorf("the log has %d lines of it:\n%s", n, log)
		}
		if err := os.RemoveAll(dir); err != nil {
			t.Fatal(err)
		}
		time.Sleep(told)
		run(t, p, infer("b"), nil)
		synctest.Wait()
		if p.Lost() != 4 || strings.Count(log.String(), "usage records are lost") != 2 {
			t.Errorf("%d lost\n%s", p.Lost(), log)
		}
		if err := os.Mkdir(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		time.Sleep(look + time.Millisecond)
		synctest.Wait()
		run(t, p, infer("c"), nil)
		p.Close()
		if all := lines(t, path); len(all) != 1 || all[0]["model"] != "c" || p.Lost() != 4 {
			t.Errorf("%v, %d lost", all, p.Lost())
		}
	})
}

// A disk that takes nothing holds nobody up: the queue fills, the rest is lost.
func TestADiskThatHangs(t *testing.T) {
	path := filepath.Join(t.TempDir(), "pipe")
	if err := syscall.Mkfifo(path, 0o600); err != nil {
		t.Skip(err)
	}
	p, log := opened(t, path)
	const records = 2 * queued
	for range records {
		run(t, p, infer("a"), nil)
	}
	// A pipe holds 64 KiB, and a block is being written.
	if lost := p.Lost(); lost < records-queued-2000 || lost > records-queued {
		t.Errorf("%d of %d lost", lost, records)
	}
	if !strings.Contains(log.String(), "usage records are lost") {
		t.Errorf("the log does not say so:\n%s", log)
	}
	in, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	got := make(chan int64)
	go func() {
		n, lines := int64(0), bufio.NewReader(in)
		for n < records-p.Lost() {
			if _, err := lines.ReadString('\n'); err != nil {
				break
			}
			n++
		}
		got <- n
	}()
	p.Close()
	if n := <-got; n+p.Lost() != records {
		t.Errorf("%d written and %d lost of %d", n, p.Lost(), records)
	}
	_ = in.Close()
}

func TestAFileThatCannotBeOpened(t *testing.T) {
	if _, err := Open(&configv1.Usage{File: filepath.Join(t.TempDir(), "none", "usage.jsonl")}, slog.New(slog.NewTextHandler(io.Discard, nil))); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("%v", err)
	}
}

func BenchmarkRecord(b *testing.B) {
	p, err := Open(&configv1.Usage{File: filepath.Join(b.TempDir(), "usage.jsonl")}, slog.New(slog.NewTextHandler(io.Discard, nil)))
	if err != nil {
		b.Fatal(err)
	}
	defer p.Close()
	i := infer("llama")
	c, _ := p.Begin(i.Call)
	b.ReportAllocs()
	for b.Loop() {
		n, _ := c.Start(i)
		n.End(interceptors.Outcome{})
	}
	b.ReportMetric(float64(p.Lost()), "lost")
}
