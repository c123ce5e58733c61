package budget

import (
	"testing"

	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/sluicegate/sluice/interceptors"
	configv1 "github.com/sluicegate/sluice/proto/gen/sluice/config/v1"
)

// A budget that is the same in the next configuration keeps its accounts, whatever
// became of the others; and what began under the one before is in the same books.
func TestALedgerGoesOnWithTheOneBefore(t *testing.T) {
	same := func() *configv1.Budget { return &configv1.Budget{Name: "same", Tokens: 100} }
	before := ledger(t, &configv1.Budget{Name: "gone", Tokens: 100, Window: durationpb.New(1e12)}, same(),
		&configv1.Budget{Name: "changed", Tokens: 100})
	i := infer(caller("a", "p"), "m", 10, 20)
	v, d := start(t, before.Tokens(), i)
	if d != nil {
		t.Fatal(d)
	}
	next, err := New([]*configv1.Budget{{Name: "changed", Tokens: 90}, same(), {Name: "new", Tokens: 100}}, WithBefore(before))
	if err != nil {
		t.Fatal(err)
	}
	before.Retire(next)
	w, d := start(t, next.Tokens(), infer(caller("a", "p"), "m", 5, 5))
	if d != nil {
		t.Fatal(d)
	}
	i.Handed, i.OutputTokens = true, 15
	v.End(interceptors.Outcome{})
	remaining := map[string]int64{}
	for _, a := range next.Snapshot() {
		remaining[a.Budget] = a.Remaining
	}
	for name, want := range map[string]int64{"same": 65, "changed": 80, "new": 90} {
		if remaining[name] != want || len(remaining) != 3 {
			t.Errorf("%v, want %d of %s", remaining, want, name)
		}
	}
	w.End(interceptors.Outcome{})
	now := next.clock()
	for n := range next.table.shards {
		s := &next.table.shards[n]
		for range 100 {
			s.evict(next.table, now)
		}
	}
	next.table.all(func(a *account) {
		if a.limit.name == "gone" || a.limit.capacity() == 100 && a.limit.name == "changed" {
			t.Errorf("an account of budget %s, which is no more, is kept", a.limit.name)
		}
	})
	atRest(t, next)
}
