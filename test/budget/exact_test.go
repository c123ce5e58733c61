//go:build unix

package budget

import (
	"fmt"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
)

// buildSluice makes the program.
func buildSluice(t *testing.T) string {
	t.Helper()
	sluice := filepath.Join(t.TempDir(), "sluice")
	if out, err := exec.Command("go", "build", "-tags=no_fs_access", "-o", sluice, "../../gateway/cmd/sluice").CombinedOutput(); err != nil {
		t.Fatalf("go build: %v\n%s", err, out)
	}
	return sluice
}

// Many callers at once, on a budget for so many inferences: exactly those are served, by
// one gateway and by two that share a store.
func TestExactlyWhatFits(t *testing.T) {
	if testing.Short() {
		t.Skip("builds the program")
	}
	const fits, words = 23, 4
	sluice, model := buildSluice(t), newModel(t)
	budget := func(store string) string {
		return fmt.Sprintf("budgets: [{name: few, tokens: %d, models: [words], share: 1}]\n%s", fits*2*words+1, store)
	}
	run := func(t *testing.T, gateways ...*gateway) {
		var all sync.WaitGroup
		var mu sync.Mutex
		outcomes := map[string]int{}
		for n := range 3 * fits {
			conn := connect(t, gateways[n%len(gateways)].address())
			all.Go(func() {
				heard, outcome := stream(t.Context(), conn, "a", words, 0, words, 0, nil)
				mu.Lock()
				defer mu.Unlock()
				if outcomes[outcome]++; outcome == "served" && heard != words {
					t.Errorf("%d of %d words were served", heard, words)
				}
			})
		}
		all.Wait()
		if outcomes["served"] != fits || outcomes["BUDGET_EXHAUSTED"] != 2*fits {
			t.Errorf("%v, want %d served and all else refused", outcomes, fits)
		}
		for _, g := range gateways {
			g.stop()
		}
	}
	t.Run("one gateway", func(t *testing.T) { run(t, newGateway(t, sluice, model, budget(""))) })
	t.Run("two gateways", func(t *testing.T) {
		store := budget(fmt.Sprintf("budget_store: {redis: {addresses: [%q], timeout: 5s}}\n", newStore(t).address))
		run(t, newGateway(t, sluice, model, store), newGateway(t, sluice, model, store))
	})
}

// An inference that asks for more than is left is clamped: the model server is asked for what
// is left, by a gateway alone and by one that shares a store with another.
func TestClampedToWhatIsLeft(t *testing.T) {
	if testing.Short() {
		t.Skip("builds the program")
	}
	const words, left = 8, 4
	sluice, model := buildSluice(t), newModel(t)
	budget := func(store string) string {
		return fmt.Sprintf("budgets: [{name: few, tokens: %d, models: [words], clamp: true}]\n%s", words+left, store)
	}
	run := func(t *testing.T, gateways ...*gateway) {
		for n, g := range gateways {
			heard, outcome := stream(t.Context(), connect(t, g.address()), "a", words, 0, 100, 0, nil)
			switch {
			case n == 0 && (heard != left || outcome != "served"):
				t.Errorf("%d words were %s, want %d served", heard, outcome, left)
			case n > 0 && (heard != 0 || outcome != "BUDGET_EXHAUSTED"):
				t.Errorf("%d words were %s by another gateway when nothing was left", heard, outcome)
			}
		}
		for _, g := range gateways {
			g.stop()
		}
	}
	t.Run("one gateway", func(t *testing.T) { run(t, newGateway(t, sluice, model, budget(""))) })
	t.Run("two gateways", func(t *testing.T) {
		store := budget(fmt.Sprintf("budget_store: {redis: {addresses: [%q], timeout: 5s}}\n", newStore(t).address))
		run(t, newGateway(t, sluice, model, store), newGateway(t, sluice, model, store))
	})
}
