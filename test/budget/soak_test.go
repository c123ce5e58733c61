//go:build unix

// Package budget soaks the budgets of real gateways: sluice serve, with a real Redis
// where they share one, callers that go away, and kills.
package budget

import (
	"context"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/sluicegate/sluice/proto/gen/inference"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const (
	// callers at once.
	callers = 12
	// share and lease are what a gateway takes for itself at once, and for how long.
	share, lease = 500, 3 * time.Second
)

// soak is a run: what it found goes into the report.
type soak struct {
	length time.Duration
	sluice string
	model  string
	lines  []string
}

func (s *soak) say(format string, args ...any) {
	s.lines = append(s.lines, fmt.Sprintf(format, args...))
}

// TestSoak runs for SLUICE_SOAK (make soak), or some seconds, and writes its report to
// SLUICE_SOAK_OUT if that is set.
func TestSoak(t *testing.T) {
	if testing.Short() {
		t.Skip("takes half a minute")
	}
	s := &soak{length: 12 * time.Second, sluice: buildSluice(t), model: newModel(t)}
	if text := os.Getenv("SLUICE_SOAK"); text != "" {
		var err error
		if s.length, err = time.ParseDuration(text); err != nil {
			t.Fatal(err)
		}
	}
	for _, phase := range []struct {
		name  string
		title string
		part  float64 // of the run
		run   func(*testing.T, time.Duration)
	}{
		{"file", "A gateway alone, with a state file, killed again and again (F4)", 0.25, s.stateFile},
		{"faults", "Two gateways share one Redis, over a connection that fails (F4)", 0.3, s.failingStore},
		{"kills", "Two gateways share one Redis, and are killed again and again (F4)", 0.35, s.killedGateways},
		{"lost", "A store that does not answer, seen by callers (F4)", 0.1, s.lostStore},
	} {
		s.say("\n## %s\n", phase.title)
		passed := t.Run(phase.name, func(t *testing.T) {
			phase.run(t, time.Duration(phase.part*float64(s.length)))
		})
		s.say("- %s", map[bool]string{true: "passed", false: "**FAILED**"}[passed])
	}
	text := fmt.Sprintf("# Budgets under load, faults and kills\n\n%s: %v in all, %d callers, %s, %d CPUs, %s. A budget of %d tokens for each team; "+
		"of all inferences a fifth is left by its caller, and a tenth by a caller that crashes.\n%s\n",
		map[bool]string{false: "passed", true: "FAILED"}[t.Failed()], s.length, callers, runtime.GOOS, runtime.NumCPU(), runtime.Version(), amount,
		strings.Join(s.lines, "\n"))
	t.Log(text)
	if file := os.Getenv("SLUICE_SOAK_OUT"); file != "" {
		if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

// budgets is the part of a configuration with the budget of each team.
func budgets(store string) string {
	return fmt.Sprintf(`
budgets:
- {name: team, tokens: %d, key: 'metadata["x-team"][0]', default_output_tokens: 8, share: %d, models: [words]}
budget_store: %s
`, amount, share, store)
}

func shared(address string) string {
	return budgets(fmt.Sprintf(`{redis: {addresses: [%q], lease: %v}}`, address, lease))
}

// summary says what the callers saw.
func (s *soak) summary(l *load) {
	teams, all, worst, _ := l.spent()
	var outcomes []string
	n := 0
	for _, name := range slices.Sorted(maps.Keys(l.counts)) {
		n += l.counts[name]
		outcomes = append(outcomes, fmt.Sprintf("%s %d", name, l.counts[name]))
	}
	s.say("- %d inferences: %s", n, strings.Join(outcomes, ", "))
	s.say("- %d budgets used up; %d tokens delivered; the most beyond a budget of %d: %d", teams, all, amount, max(0, worst))
}

// stateFile: whatever is killed, nothing is spent twice.
func (s *soak) stateFile(t *testing.T, length time.Duration) {
	g := newGateway(t, s.sluice, s.model, budgets(`{file: budgets.state}`))
	l := &load{t: t, addresses: []string{g.address()}}
	ctx, cancel := context.WithTimeout(t.Context(), length)
	defer cancel()
	wait := l.start(ctx, callers)
	kills := 0
	for pause(ctx, 2*time.Second); ctx.Err() == nil; pause(ctx, 2*time.Second) {
		g.kill()
		kills++
		g.start()
	}
	wait()
	g.stop()
	s.summary(l)
	charged, records := g.charges()
	s.say("- %d SIGKILLs; %d usage records survived them, with %d tokens charged", kills, records, charged)
	if teams, _, worst, _ := l.spent(); worst > 0 {
		t.Errorf("overspent by %d", worst)
	} else if teams == 0 {
		t.Error("no budget was used up: the run says little")
	}
}

// failingStore: with faults, and nobody killed, nothing is overspent, and in the end the
// store knows to the token what was charged.
func (s *soak) failingStore(t *testing.T, length time.Duration) {
	redis := newStore(t)
	proxy := newToxiproxy(t, redis.address)
	gateways := []*gateway{newGateway(t, s.sluice, s.model, shared(proxy.address)), newGateway(t, s.sluice, s.model, shared(proxy.address))}
	l := &load{t: t, addresses: []string{gateways[0].address(), gateways[1].address()}}
	ctx, cancel := context.WithTimeout(t.Context(), length)
	defer cancel()
	wait := l.start(ctx, callers)
	n := 0
	for pause(ctx, time.Second); ctx.Err() == nil; pause(ctx, 2*time.Second) {
		proxy.set(faults[n%len(faults)])
		n++
		pause(ctx, 1500*time.Millisecond)
		proxy.heal()
	}
	wait()
	charged := int64(0)
	for _, g := range gateways {
		g.stop()
		of, _ := g.charges()
		charged += of
	}
	s.summary(l)
	gone, held := redis.books()
	s.say("- %d faults of %d kinds; usage records: %d tokens charged; the store: %d gone, %d of that still held", n, len(faults), charged, gone, outstanding(held, nil))
	if teams, _, worst, _ := l.spent(); worst > 0 {
		t.Errorf("overspent by %d", worst)
	} else if teams == 0 {
		t.Error("no budget was used up: the run says little")
	}
	if gone != charged || outstanding(held, nil) != 0 {
		t.Errorf("%d were charged, and the store says that %d are gone, %d of that held", charged, gone, outstanding(held, nil))
	}
}

// outstanding is what was granted and is not used, as far as the store was told: by
// some gateways, or by all.
func outstanding(held map[string]map[string]holding, by map[string]bool) (n int64) {
	for _, of := range held {
		for who, h := range of {
			if by == nil || by[who] {
				n += h.granted - h.used
			}
		}
	}
	return n
}

// latest is when the last lease of each gateway ends.
func latest(held map[string]map[string]holding) map[string]int64 {
	out := map[string]int64{}
	for _, of := range held {
		for who, h := range of {
			out[who] = max(out[who], h.until)
		}
	}
	return out
}

// killedGateways: what is overspent after a kill is no more than the lost one held, and
// all of that is back when its lease has ended.
func (s *soak) killedGateways(t *testing.T, length time.Duration) {
	redis := newStore(t)
	gateways := []*gateway{newGateway(t, s.sluice, s.model, shared(redis.address)), newGateway(t, s.sluice, s.model, shared(redis.address))}
	l := &load{t: t, addresses: []string{gateways[0].address(), gateways[1].address()}}
	ctx, cancel := context.WithTimeout(t.Context(), length)
	defer cancel()
	wait := l.start(ctx, callers)
	var atDeath []map[string]map[string]holding
	n := 0
	for pause(ctx, 1500*time.Millisecond); ctx.Err() == nil; pause(ctx, 4*time.Second) {
		g := gateways[n%2]
		g.kill()
		n++
		_, held := redis.books()
		atDeath = append(atDeath, held)
		pause(ctx, time.Second)
		g.start()
	}
	wait()
	for _, g := range gateways {
		g.stop()
	}
	_, end := redis.books()
	lost := int64(0)
	for _, held := range atDeath {
		dead := map[string]bool{}
		for who, until := range latest(held) {
			dead[who] = latest(end)[who] == until // nothing was heard of it since
		}
		lost += outstanding(held, dead)
	}
	// Whoever asks next for an account finds what the dead held.
	pause(t.Context(), lease+time.Second)
	g := newGateway(t, s.sluice, s.model, shared(redis.address))
	conn := connect(t, g.address())
	for team := range l.team.Load() + 1 {
		_, _ = stream(t.Context(), conn, fmt.Sprint("team-", team), 1, 0, 1, 0, nil)
	}
	g.stop()
	_, end = redis.books()
	s.summary(l)
	_, _, _, over := l.spent()
	s.say("- %d SIGKILLs; the killed held %d tokens; overspent by %d in all; of what they held %d is not back", n, lost, over, outstanding(end, nil))
	if over > lost {
		t.Errorf("overspent by %d, more than the %d that the killed held", over, lost)
	}
	if rest := outstanding(end, nil); rest != 0 {
		t.Errorf("%d are not back after the leases", rest)
	}
}

func connect(t *testing.T, address string) *grpc.ClientConn {
	t.Helper()
	conn, err := grpc.NewClient("passthrough:///"+address, grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithDisableRetry())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return conn
}

// lostStore measures what callers see of a store that does not answer: refusals, and
// calls that have no budget.
func (s *soak) lostStore(t *testing.T, length time.Duration) {
	redis := newStore(t)
	proxy := newToxiproxy(t, redis.address)
	g := newGateway(t, s.sluice, s.model, strings.Replace(shared(proxy.address), "share:", "store_lost: STORE_LOST_CLOSED, share:", 1))
	conn := connect(t, g.address())
	free := func() time.Duration {
		began := time.Now()
		if _, err := inference.NewGRPCInferenceServiceClient(conn).ModelInfer(t.Context(), request("echo", "hello")); err != nil {
			t.Errorf("a call without a budget: %v", err)
		}
		return time.Since(began)
	}
	each := max(time.Second, length/time.Duration(2*len(faults)))
	s.say("The store's timeout is 50 ms. Times are of callers: a refusal, and a call that has no budget, beside the refusals and without a fault.\n")
	s.say("| fault | refused | 50 %% | 99 %% | longest | without a budget 99 %% | without a fault | served again after |")
	s.say("| --- | --- | --- | --- | --- | --- | --- | --- |")
	ask := func() (string, time.Duration) {
		began := time.Now()
		_, outcome := stream(t.Context(), conn, fmt.Sprint("lost-", began.UnixNano()), 1, 0, 1, 0, nil)
		return outcome, time.Since(began)
	}
	for _, f := range faults[:4] {
		within(t, 20*time.Second, "the store to be reached", func() bool { outcome, _ := ask(); return outcome == "served" })
		var calm, beside, refused []time.Duration
		for until := time.Now().Add(each); time.Now().Before(until); {
			calm = append(calm, free())
			_, _ = ask()
		}
		proxy.set(f)
		for until := time.Now().Add(each); time.Now().Before(until); {
			outcome, took := ask()
			beside = append(beside, free())
			if outcome == "POLICY_UNAVAILABLE" {
				refused = append(refused, took)
			}
		}
		proxy.heal()
		healed := time.Now()
		within(t, 20*time.Second, "the store to be reached", func() bool { outcome, _ := ask(); return outcome == "served" })
		again := time.Since(healed)
		if len(refused) == 0 {
			t.Errorf("%s: nothing was refused", f.name)
			continue
		}
		s.say("| %s | %d | %s | %s | %s | %s | %s | %s |", f.name, len(refused), at(refused, 50), at(refused, 99), at(refused, 100), at(beside, 99), at(calm, 99),
			again.Round(time.Millisecond))
	}
	g.stop()
}

// at is a percentile.
func at(of []time.Duration, percent int) time.Duration {
	slices.Sort(of)
	return of[min(len(of)-1, len(of)*percent/100)].Round(10 * time.Microsecond)
}
