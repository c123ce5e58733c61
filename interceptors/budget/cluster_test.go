package budget

import (
	"context"
	"fmt"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/redis/rueidis"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/sluicegate/sluice/interceptors"
	configv1 "github.com/sluicegate/sluice/proto/gen/sluice/config/v1"
)

// node is a server of a cluster.
type node struct {
	cmd    *exec.Cmd
	port   int
	bus    int
	id     string
	client rueidis.Client // to it alone
}

func (n *node) do(t testing.TB, args ...string) string {
	t.Helper()
	reply, err := n.client.Do(context.Background(), n.client.B().Arbitrary(args...).Build()).ToAny()
	if err != nil {
		t.Fatalf("%v: %v", args, err)
	}
	return fmt.Sprint(reply)
}

func (n *node) kill() {
	_ = n.cmd.Process.Kill()
	_ = n.cmd.Wait()
	n.client.Close()
}

// newCluster starts a cluster of three masters and a replica of each: nodes 0 to 2 and
// 3 to 5.
func newCluster(t testing.TB) []*node {
	t.Helper()
	single := newServer(t) // says where the program is, or skips the test
	single.kill()
	nodes := make([]*node, 6)
	for k := range nodes {
		n := &node{port: freePort(t), bus: freePort(t)}
		dir := t.TempDir()
		n.cmd = exec.Command(single.path, "--bind", "127.0.0.1", "--port", strconv.Itoa(n.port), "--cluster-port", strconv.Itoa(n.bus),
			"--cluster-enabled", "yes", "--cluster-config-file", filepath.Join(dir, "nodes.conf"), "--cluster-node-timeout", "500",
			"--cluster-replica-validity-factor", "0", "--repl-diskless-sync-delay", "0", "--save", "", "--appendonly", "no", "--dir", dir)
		if err := n.cmd.Start(); err != nil {
			t.Fatal(err)
		}
		nodes[k] = n
		t.Cleanup(n.kill)
		within(t, 20*time.Second, "a node to come up", func() (up bool) {
			var err error
			n.client, err = rueidis.NewClient(rueidis.ClientOption{InitAddress: []string{fmt.Sprintf("127.0.0.1:%d", n.port)},
				DisableCache: true, ForceSingleClient: true})
			return err == nil
		})
		n.id = n.do(t, "CLUSTER", "MYID")
	}
	for k, n := range nodes {
		if k < 3 {
			n.do(t, "CLUSTER", "ADDSLOTSRANGE", strconv.Itoa(k*16384/3), strconv.Itoa((k+1)*16384/3-1))
		}
		if k > 0 {
			nodes[0].do(t, "CLUSTER", "MEET", "127.0.0.1", strconv.Itoa(n.port), strconv.Itoa(n.bus))
		}
	}
	everybody := func(what, says string) {
		within(t, 30*time.Second, what, func() bool {
			for _, n := range nodes {
				if !strings.Contains(n.do(t, "CLUSTER", "INFO"), says) {
					return false
				}
			}
			return true
		})
	}
	everybody("all nodes to be known", "cluster_known_nodes:6")
	everybody("the cluster to be whole", "cluster_state:ok")
	for k, n := range nodes[3:] {
		n.do(t, "CLUSTER", "REPLICATE", nodes[k].id)
	}
	for k := range 3 {
		within(t, 30*time.Second, "a replica to be in step", func() bool {
			return strings.Contains(nodes[k].do(t, "INFO", "replication"), "state=online")
		})
	}
	return nodes
}

// within polls until something is so.
func within(t testing.TB, most time.Duration, what string, is func() bool) {
	t.Helper()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(most); !is(); <-tick.C {
		if time.Now().After(deadline) {
			t.Fatalf("waited in vain for %s", what)
		}
	}
}

// A cluster keeps tenants who share no budget at several of its masters; when one of
// them is lost and its replica takes over, gateways go on, and tell it what it missed:
// nothing is spent twice but what was held, and the cluster knows all to the token.
func TestCluster(t *testing.T) {
	if testing.Short() {
		t.Skip("takes some seconds")
	}
	nodes := newCluster(t)
	addresses := make([]string, 0, 3)
	for _, n := range nodes[:3] {
		addresses = append(addresses, fmt.Sprintf("127.0.0.1:%d", n.port))
	}
	budgets := []*configv1.Budget{
		{Name: "tenant", Tokens: 1000, Window: durationpb.New(time.Hour), DefaultOutputTokens: 5, Share: 20, Per: []configv1.BudgetKey{perTenant}},
		{Name: "model", Tokens: 600, DefaultOutputTokens: 5, Share: 20, Per: []configv1.BudgetKey{perTenant, perModel}},
	}
	m := &sharedMachine{t: t, counts: map[string]int{}}
	for range 2 {
		l := ledger(t, budgets...)
		if err := l.Share(&configv1.Redis{Addresses: addresses, Lease: durationpb.New(time.Minute), Timeout: durationpb.New(time.Second)}); err != nil {
			t.Fatal(err)
		}
		m.gateways = append(m.gateways, l)
		m.charged = append(m.charged, map[string]int64{})
	}
	var err error
	m.store, err = rueidis.NewClient(rueidis.ClientOption{InitAddress: addresses, DisableCache: true})
	if err != nil {
		t.Fatal(err)
	}
	defer m.store.Close()

	delivered := map[string]int64{}
	round := func(times int) (refused int) {
		for k := range times {
			tenant, g := fmt.Sprint("t", k%8), k%2
			i := infer(caller(tenant, "p"), "m", 2, 3)
			v, d := begin(t, m.gateways[g].Tokens(), i)
			if d != nil {
				refused++
				if d.Reason != interceptors.PolicyUnavailable {
					t.Fatal(d)
				}
				continue
			}
			i.Handed, i.OutputTokens = true, 3
			if d := denial(t, v.Response(nil)); d == nil {
				delivered[tenant] += 5
			}
			m.end(&flying{Inference: i, v: v.(*reservation), gateway: g, delivered: 3})
		}
		return refused
	}
	if refused := round(160); refused > 0 {
		t.Errorf("%d refused while the cluster is whole", refused)
	}
	at := map[string]bool{}
	for k, n := range nodes[:3] {
		if n.do(t, "DBSIZE") != "0" {
			at[fmt.Sprint(k)] = true
		}
	}
	if len(at) < 2 {
		t.Errorf("8 tenants are at the masters %v: want more than one", at)
	}

	victim := 0
	for !at[fmt.Sprint(victim)] {
		victim++
	}
	nodes[victim].kill()
	refused := round(160)
	within(t, 30*time.Second, "the replica to take over", func() bool {
		return strings.Contains(nodes[3+victim].do(t, "ROLE"), "master") &&
			strings.Contains(nodes[3+victim].do(t, "CLUSTER", "INFO"), "cluster_state:ok")
	})
	m.heard()
	if again := round(80); again > 0 {
		t.Errorf("%d refused after the failover", again)
	}
	m.heard()
	for tenant, n := range delivered {
		if n > 1000+2*20 {
			t.Errorf("%s: %d delivered of 1000", tenant, n)
		}
	}
	t.Logf("%d of 160 refused during the failover; tenants at %d masters", refused, len(at))
	for _, l := range m.gateways {
		atRest(t, l)
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	}
}
