package budget

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/sluicegate/sluice/interceptors"
	configv1 "github.com/sluicegate/sluice/proto/gen/sluice/config/v1"
)

// crashFile in the environment makes the test binary a process that spends the
// budgets of a state file until there is nothing left, or it is killed.
const crashFile = "SLUICE_TEST_BUDGET_FILE"

// crashStore is the address of a shared store to use instead.
const crashStore = "SLUICE_TEST_BUDGET_STORE"

const crashBudget = 20_000

func crashBudgets() []*configv1.Budget {
	return []*configv1.Budget{
		{Name: "life", Tokens: crashBudget},
		{Name: "day", Tokens: crashBudget * 2, Window: durationpb.New(24 * time.Hour), DefaultOutputTokens: 7, Per: []configv1.BudgetKey{perTenant}},
	}
}

// spendUntilKilled delivers tokens: a byte on the standard output each.
func spendUntilKilled(file string) int {
	l, err := New(crashBudgets())
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	if store := os.Getenv(crashStore); store != "" {
		err = l.Share(&configv1.Redis{Addresses: []string{store}, Lease: durationpb.New(time.Second), Timeout: durationpb.New(long)})
	} else {
		err = l.Open(file)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	p, _ := l.Tokens().Begin(caller("a", "p"))
	for n := 0; ; n++ {
		i := infer(caller("a", "p"), "m", 1, int64(n%2*20))
		i.Call.SetContext(context.Background())
		v, err := p.Start(i)
		if w, ok := v.(interceptors.Waiter); ok && err == nil && !w.Ready() {
			err = w.Wait(context.Background())
		}
		if err != nil {
			return 3 // nothing left
		}
		i.Handed = true
		_, _ = os.Stdout.Write([]byte{'i'})
		for i.OutputTokens < 30 {
			i.OutputTokens++
			if v.Response(nil) != nil {
				break
			}
			_, _ = os.Stdout.Write([]byte{'o'})
		}
		v.End(interceptors.Outcome{})
	}
}

// crash runs a process that spends, and kills it after some tokens, if it has so
// many. It says what was delivered and whether nothing was left.
func crash(t *testing.T, most int, env ...string) (delivered int, empty bool) {
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), env...)
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Error(err)
		return 0, true
	}
	if err := cmd.Start(); err != nil {
		t.Error(err)
		return 0, true
	}
	in := bufio.NewReader(out)
	for delivered < most {
		if _, err := in.ReadByte(); err != nil {
			break
		}
		delivered++
	}
	_ = cmd.Process.Kill()
	rest, _ := io.Copy(io.Discard, in)
	_ = cmd.Wait()
	code := cmd.ProcessState.ExitCode()
	if code != 3 && code != -1 {
		t.Errorf("exit status %d", code)
		return delivered + int(rest), true
	}
	return delivered + int(rest), code == 3
}

// Killed again and again at any moment, a process never delivers more than its
// budget, and loses no more than a block and what was in flight each time.
func TestKilledProcessesDoNotOverspend(t *testing.T) {
	file := filepath.Join(t.TempDir(), "state")
	delivered, kills := 0, 0
	for empty := false; !empty; kills++ {
		var n int
		n, empty = crash(t, rand.IntN(400), crashFile+"="+file)
		delivered += n
	}
	// A block is a hundredth; in flight are up to 1 token of input and a grant.
	if least := crashBudget - kills*(crashBudget/blocks+1+64); delivered > crashBudget || delivered < least {
		t.Errorf("%d tokens were delivered of %d, with %d kills; want at least %d", delivered, crashBudget, kills, least)
	}
	if kills < 3 {
		t.Errorf("only %d kills", kills)
	}
	t.Logf("%d of %d tokens delivered, %d kills", delivered, crashBudget, kills)
}

// Two processes with one store, killed again and again: what is overspent is no more
// than what the killed ones held, and all that they held comes back.
func TestKilledGatewaysOverspendNoMoreThanTheyHeld(t *testing.T) {
	s := newServer(t)
	var delivered, kills atomic.Int64
	var wg sync.WaitGroup
	deadline := time.Now().Add(30 * time.Second)
	for range 2 {
		wg.Go(func() {
			for time.Now().Before(deadline) && delivered.Load() < crashBudget-10 {
				n, empty := crash(t, 1000+rand.IntN(2000), crashFile+"=none", crashStore+"="+s.listener.Addr().String())
				delivered.Add(int64(n))
				if !empty {
					kills.Add(1)
				}
			}
		})
	}
	wg.Wait()
	// A gateway holds up to a share and what an inference asked for beside it.
	held := kills.Load() * (2*crashBudget/blocks + 64)
	if n := delivered.Load(); n > crashBudget+held || n < crashBudget-100 {
		t.Errorf("%d tokens were delivered of %d, with %d kills: want no more than %d beyond, and all", n, crashBudget, kills.Load(), held)
	}
	t.Logf("%d of %d tokens delivered, %d kills", delivered.Load(), crashBudget, kills.Load())
}

func TestStateFile(t *testing.T) {
	file := func(t *testing.T) string { return filepath.Join(t.TempDir(), "state") }
	open := func(t *testing.T, path string) *Ledger {
		t.Helper()
		l := ledger(t, crashBudgets()...)
		if err := l.Open(path); err != nil {
			t.Fatal(err)
		}
		return l
	}
	t.Run("nothing is lost when it is closed", func(t *testing.T) {
		path := file(t)
		for n := range 3 {
			l := open(t, path)
			i := infer(caller("a\xff", "p"), "m", 10, 20)
			v, d := start(t, l.Tokens(), i)
			if d != nil {
				t.Fatal(d)
			}
			i.Handed, i.OutputTokens = true, 5
			v.End(interceptors.Outcome{})
			for _, a := range l.Snapshot() {
				if a.Spent != int64(15*(n+1)) {
					t.Errorf("time %d: %+v", n, a)
				}
			}
			if err := l.Close(); err != nil {
				t.Fatal(err)
			}
		}
	})
	t.Run("one process at a time", func(t *testing.T) {
		path := file(t)
		l := open(t, path)
		if err := ledger(t, crashBudgets()...).Open(path); err == nil || !strings.Contains(err.Error(), "another process uses it") {
			t.Errorf("error %v", err)
		}
		next, err := New(crashBudgets(), WithBefore(l))
		if err != nil {
			t.Fatal(err)
		}
		if err := next.Open(path); err != nil {
			t.Errorf("a ledger that follows: %v", err)
		}
		_ = l.Close()
		if _, d := start(t, next.Tokens(), infer(caller("a", "p"), "m", 1, 1)); d != nil {
			t.Errorf("after the one before was closed: %v", d)
		}
		_ = next.Close()
		_ = open(t, path).Close()
	})
	t.Run("a file that a later configuration names", func(t *testing.T) {
		l := ledger(t, crashBudgets()...)
		i := infer(caller("a", "p"), "m", 10, 20)
		v, d := start(t, l.Tokens(), i)
		if d != nil {
			t.Fatal(d)
		}
		next, err := New(crashBudgets(), WithBefore(l))
		if err != nil {
			t.Fatal(err)
		}
		path := file(t)
		if err := next.Open(path); err != nil {
			t.Fatal(err)
		}
		b, _ := os.ReadFile(path)
		if n := strings.Count(string(b), `"used":30`); n != 2 {
			t.Errorf("the file has %d accounts with 30 used, want 2:\n%s", n, b)
		}
		v.End(interceptors.Outcome{})
		_ = next.Close()
	})
	t.Run("what cannot be written is not granted", func(t *testing.T) {
		l := open(t, file(t))
		_ = l.journal.file.Close()
		for _, p := range []interceptors.Policy{l.Tokens()} {
			if _, d := start(t, p, infer(caller("a", "p"), "m", 1, 1)); d == nil || d.Reason != interceptors.PolicyUnavailable {
				t.Errorf("%v, want POLICY_UNAVAILABLE", d)
			}
		}
		atRest(t, l)
		_ = l.Close()
	})
	for _, test := range []struct {
		name, text, want string
	}{
		{"empty", "", ""},
		{"torn at the end", `{"budget":"life","names":["","","",""],"used":7}` + "\n" + `{"budget":"life","na`, ""},
		{"of a budget that is no more", `{"budget":"old","names":["","","",""],"used":7}` + "\n", ""},
		{"broken", "nonsense\n", "line 1 is no account"},
		{"torn in the middle", `{"budget":"life"` + "\n" + `{"budget":"life","names":["","","",""],"used":7}` + "\n", "line 1 is no account"},
		{"less than nothing", `{"budget":"life","names":["","","",""],"used":-7}` + "\n", "line 1 is no account"},
	} {
		t.Run(test.name, func(t *testing.T) {
			path := file(t)
			if err := os.WriteFile(path, []byte(test.text), 0o600); err != nil {
				t.Fatal(err)
			}
			l := ledger(t, crashBudgets()...)
			err := l.Open(path)
			switch {
			case test.want != "" && (err == nil || !strings.Contains(err.Error(), test.want)):
				t.Errorf("error %v, want %q", err, test.want)
			case test.want == "" && err != nil:
				t.Error(err)
			case strings.HasPrefix(test.name, "torn at"):
				if got := only(t, l); got.Spent != 7 {
					t.Errorf("%+v, want 7 spent", got)
				}
			}
			_ = l.Close()
		})
	}
	t.Run("is written anew when it has grown", func(t *testing.T) {
		l := open(t, file(t))
		j := l.journal
		for n := range 3000 {
			if err := j.append([]line{{Budget: "life", Used: int64(n), Names: [5][]byte{make([]byte, 30_000)}}}); err != nil {
				t.Fatal(err)
			}
		}
		if j.size > compactAbove {
			t.Errorf("%d bytes", j.size)
		}
		b, err := os.ReadFile(j.path)
		if err != nil || int64(len(b)) != j.size {
			t.Errorf("%d bytes, want %d, %v", len(b), j.size, err)
		}
		_ = l.Close()
	})
}

func FuzzReadStateFile(f *testing.F) {
	f.Add(`{"budget":"life","names":["","","",""],"used":7,"owed":1,"ends":3}` + "\n" + `{"budget`)
	f.Fuzz(func(t *testing.T, text string) {
		last, order, err := read(strings.NewReader(text))
		if err == nil && len(last) != len(order) {
			t.Errorf("%d accounts, %d in order", len(last), len(order))
		}
	})
}

// BenchmarkStateFile is what the state file adds to an inference.
func BenchmarkStateFile(b *testing.B) {
	l := ledger(b, four(1<<40)...)
	if err := l.Open(filepath.Join(b.TempDir(), "state")); err != nil {
		b.Fatal(err)
	}
	call, i := benchInference(b, l.Tokens(), "p")
	i.Handed = true
	var n atomic.Int64
	for b.Loop() {
		n.Add(1)
		reserveSettle(b, call, i)
	}
	_ = l.Close()
}
