//go:build linux

// Package peers runs real model servers and their own Python clients: NVIDIA Triton with
// tritonclient, MLServer, and KServe's Python server; and the real stubs of TGIS and of vLLM's gRPC
// server, without an engine. setup.sh installs them. servers/ has their models, and
// clients/ the cases: each asserts what it got, and prints what came over the wire.
package peers

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"slices"
	"testing"
	"time"

	"go.uber.org/goleak"
)

// scratch is where the servers run and log. It is kept when a test fails.
var scratch string

func TestMain(m *testing.M) {
	os.Exit(testMain(m))
}

func testMain(m *testing.M) (code int) {
	var err error
	if scratch, err = os.MkdirTemp("", "sluice-peers-"); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer func() {
		if code == 0 {
			_ = os.RemoveAll(scratch)
		} else {
			fmt.Fprintln(os.Stderr, "the servers' logs are in", scratch)
		}
	}()
	defer func() {
		for _, s := range servers {
			s.stop()
		}
		if err := goleak.Find(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			code = 1
		}
	}()
	return m.Run()
}

// result is what one case got, as clients/cases.py prints it.
type result struct {
	Case       string
	Failed     string
	Concurrent bool
	RPCs       []rpc
}

type rpc struct {
	Method   string
	Code     string
	Details  string
	Trailers [][2]string
	Answers  []answer
}

type answer struct {
	ID     string
	Bytes  int
	SHA256 string
}

// run runs all cases of a server's client against an address and reports those that failed. If the
// server crashed meanwhile it is started again, and so are the cases: the crashes that Triton is known
// for are not what is tested here, and a server that always crashes still fails.
func run(t *testing.T, s *server, address string, options ...string) []result {
	t.Helper()
	for range 3 {
		offset := s.logSize(t)
		results := drive(t, s, address, options...)
		failed := slices.ContainsFunc(results, func(r result) bool { return r.Failed != "" })
		if failed && s.crashed() {
			t.Logf("%s crashed and is started again:\n%s", s.name, s.tail())
			if err := s.start(); err != nil {
				t.Fatal(err)
			}
			continue
		}
		for _, r := range results {
			if r.Failed != "" {
				t.Errorf("%s: %s", r.Case, r.Failed)
			}
		}
		checkCancels(t, s, offset)
		return results
	}
	t.Fatalf("%s crashes each time", s.name)
	return nil
}

// drive runs the cases once. Where inferences share a stream the answers are sorted: their order is
// nobody's promise, and that within one id is asserted by the case.
func drive(t *testing.T, s *server, address string, options ...string) []result {
	t.Helper()
	return driveWith(t, s, "drive_"+s.name+".py", address, options...)
}

func driveWith(t *testing.T, s *server, file, address string, options ...string) []result {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	program := filepath.Join("clients", file)
	cmd := exec.CommandContext(ctx, s.python, append([]string{program, "--address", address}, options...)...)
	var stderr bytes.Buffer
	cmd.Env, cmd.Stderr = pythonEnv(), &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%s: %v\n%s", program, err, stderr.Bytes())
	}
	var results []result
	for lines := json.NewDecoder(bytes.NewReader(out)); lines.More(); {
		var r result
		if err := lines.Decode(&r); err != nil {
			t.Fatalf("%s printed what is no result: %v", program, err)
		}
		if r.Concurrent {
			for _, rpc := range r.RPCs {
				slices.SortFunc(rpc.Answers, func(a, b answer) int {
					return cmp.Or(cmp.Compare(a.ID, b.ID), cmp.Compare(a.SHA256, b.SHA256))
				})
			}
		}
		results = append(results, r)
	}
	if len(results) == 0 {
		t.Fatalf("%s ran no case\n%s", program, stderr.Bytes())
	}
	return results
}

// differences says in which cases two runs got something else.
func differences(want, got []result) []string {
	var out []string
	for i := range max(len(want), len(got)) {
		var w, g result
		if i < len(want) {
			w = want[i]
		}
		if i < len(got) {
			g = got[i]
		}
		if !reflect.DeepEqual(w, g) {
			out = append(out, fmt.Sprintf("%s:\n got  %+v\n want %+v", cmp.Or(w.Case, g.Case), g, w))
		}
	}
	return out
}

// checkCancels fails unless Triton's model noticed that the calls of two cases ended early.
func checkCancels(t *testing.T, s *server, offset int64) {
	t.Helper()
	if s.name != "triton" {
		return
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	for _, id := range []string{"cancelled-1", "deadline-1"} {
		if err := s.logged(ctx, offset, "of 2000 words: "+id); err != nil {
			t.Error(err)
		}
	}
}

// TestDirect checks the cases themselves: without a gateway they hold, and two runs get the same bytes.
func TestDirect(t *testing.T) {
	for name := range servers {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := running(t, name)
			want := run(t, s, s.address)
			for _, d := range differences(want, run(t, s, s.address)) {
				t.Error(d)
			}
		})
	}
}

// TestDifferences checks that a comparison can fail.
func TestDifferences(t *testing.T) {
	run := func() []result {
		return []result{{Case: "a", RPCs: []rpc{{
			Code: "OK", Trailers: [][2]string{{"k", "v"}}, Answers: []answer{{"1", 2, "x"}, {"2", 2, "y"}},
		}}}}
	}
	for name, change := range map[string]func(r []result) []result{
		"code":    func(r []result) []result { r[0].RPCs[0].Code = "INTERNAL"; return r },
		"details": func(r []result) []result { r[0].RPCs[0].Details = "more"; return r },
		"trailer": func(r []result) []result { r[0].RPCs[0].Trailers = nil; return r },
		"id":      func(r []result) []result { r[0].RPCs[0].Answers[0].ID = ""; return r },
		"bytes":   func(r []result) []result { r[0].RPCs[0].Answers[1].SHA256 = "z"; return r },
		"order":   func(r []result) []result { slices.Reverse(r[0].RPCs[0].Answers); return r },
		"missing": func(r []result) []result { r[0].RPCs[0].Answers = r[0].RPCs[0].Answers[:1]; return r },
		"no case": func([]result) []result { return nil },
		"a case":  func(r []result) []result { return append(r, result{Case: "b"}) },
	} {
		t.Run(name, func(t *testing.T) {
			if got := differences(run(), change(run())); len(got) != 1 {
				t.Errorf("%d differences, want 1: %v", len(got), got)
			}
		})
	}
	if got := differences(run(), run()); len(got) != 0 {
		t.Errorf("equal runs differ: %v", got)
	}
}
