package gateway

import (
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"

	"github.com/sluicegate/sluice/interceptors/config"
	"github.com/sluicegate/sluice/interceptors/identity"
	"github.com/sluicegate/sluice/proto/gen/inference"
)

// accounts are the tokens and requests that were spent.
func (g *gate) spent() (n int64) {
	for _, a := range g.Guard().Budgets().Snapshot() {
		n += a.Spent
	}
	return n
}

func TestReload(t *testing.T) {
	_, behind := modelServer(t)
	const pooled = "pools: [{name: gpu, capacity: 4, models: [{model: \"*\"}]}]\n"
	const budget = "budgets: [{name: calls, requests: 100}]\n"
	g := open(t, base+pooled+budget, behind)
	c := g.client()
	infer := func() error {
		_, err := c.ModelInfer(ctx(t), ask("echo", "a", "hello"))
		return err
	}
	expect(t, "before", infer(), "OK")

	// Something else changes: the accounts and the permits stay.
	s, err := c.ModelStreamInfer(ctx(t))
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Send(ask("words", "a", words(2), number("delay_ms", 1))); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Recv(); err != nil {
		t.Fatal(err)
	}
	g.eventually("the stream holds a permit", func() bool { return g.Guard().Pools().Snapshot()[0].InUse <= 1 })
	denied := strings.Replace(base, "rules: [", "rules: [{principals: [anonymous], methods: [inference], models: [sum], deny: true}, ", 1)
	if err := g.Reload(parse(t, denied+pooled+budget, behind)); err != nil {
		t.Fatal(err)
	}
	if n := g.spent(); n != 2 {
		t.Errorf("after a reload %d requests are spent, want 2", n)
	}
	expect(t, "what is denied now", func() error { _, err := c.ModelInfer(ctx(t), ask("sum", "a", "hello")); return err }(), "PermissionDenied MODEL_DENIED")
	// The stream goes on, but what its caller may use is judged by the new rules.
	if err := s.Send(ask("sum", "b", "hello")); err != nil {
		t.Fatal(err)
	}
	_ = s.CloseSend()
	refused := 0
	for {
		r, err := s.Recv()
		if err != nil {
			if !errors.Is(err, io.EOF) {
				t.Error(err)
			}
			break
		}
		if r.GetErrorMessage() != "" {
			refused++
			if r.GetInferResponse().GetId() != "b" || !strings.Contains(r.GetErrorMessage(), "MODEL_DENIED") {
				t.Error(r)
			}
		}
	}
	if refused != 1 {
		t.Errorf("%d inferences were refused, want the one of the model that is denied now", refused)
	}
	// Budgets change: they begin anew.
	if err := g.Reload(parse(t, base+pooled+"budgets: [{name: calls, requests: 1}]", behind)); err != nil {
		t.Fatal(err)
	}
	expect(t, "of the new budget", infer(), "OK")
	expect(t, "past the new budget", infer(), "ResourceExhausted RATE_EXCEEDED")
}

// A bad configuration changes nothing, and the error says where it is bad.
func TestBadReloadKeepsTheOldOne(t *testing.T) {
	_, behind := modelServer(t)
	g := open(t, base, behind)
	c := g.client()
	dir := t.TempDir()
	for name, tc := range map[string]struct {
		text string
		want []string
	}{
		"no such file":  {want: []string{"sluice.yaml"}},
		"half written":  {text: base[:len(base)-30], want: []string{"sluice.yaml:4:"}},
		"unknown field": {text: base + "pols: []\n", want: []string{"sluice.yaml:6", "pols"}},
		"empty":         {text: "{}", want: []string{"sluice.yaml", "identity"}},
		"bad value":     {text: base + "pools: [{name: gpu, capacity: 0}]\n", want: []string{"sluice.yaml:6", "capacity"}},
		"two back ends of a name": {text: strings.Replace(base, "plaintext: true}]", "plaintext: true, address: x}, {name: model, dialect: DIALECT_TRITON}]", 1),
			want: []string{"backends[1].name"}},
		"no address":                    {text: base, want: []string{"backends[0]", "address"}},
		"TLS without an identity":       {text: strings.Replace(base, "plaintext: true", "address: x", 1), want: []string{"backends[0]", "plaintext"}},
		"a rule file that is not there": {text: strings.Replace(base, "plaintext: true", "plaintext: true, address: x", 1) + "inspect: {rule_files: [nothing.conf]}\n", want: []string{"nothing.conf"}},
	} {
		t.Run(name, func(t *testing.T) {
			before := g.Guard()
			file := filepath.Join(dir, "sluice.yaml")
			_ = os.Remove(file)
			if tc.text != "" {
				if err := os.WriteFile(file, []byte(tc.text), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			cfg, err := config.Read(file)
			if err == nil {
				err = g.Reload(cfg)
			}
			if err == nil {
				t.Fatal("it was taken")
			}
			for _, want := range tc.want {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("the error does not say %q: %v", want, err)
				}
			}
			if g.Guard() != before {
				t.Error("the configuration in force is another")
			}
			if _, err := c.ModelInfer(ctx(t), ask("echo", "a", "hello")); err != nil {
				t.Error(err)
			}
		})
	}
}

// A hundred reloads under load: no call fails, each sees one configuration (the
// back end that its rules go with), and the connections of those that are gone
// are closed.
func TestReloadUnderLoad(t *testing.T) {
	var a, b conns
	_, first := modelServer(t)
	_, second := modelServer(t)
	first, second = a.proxy(t, first), b.proxy(t, second)
	g := open(t, limited, first)
	var done atomic.Bool
	var wg sync.WaitGroup
	var calls atomic.Int64
	for n := range 8 {
		c := g.client()
		wg.Go(func() {
			for !done.Load() {
				var err error
				if n%2 == 0 {
					_, err = c.ModelInfer(ctx(t), ask("echo", "a", "hello"))
				} else {
					_, _, err = kinds["stream"](ctx(t), c)
				}
				if err != nil {
					t.Errorf("a call failed: %v", err)
					return
				}
				calls.Add(1)
			}
		})
	}
	for n := range 100 {
		address := first
		if n%2 == 0 {
			address = second
		}
		before := calls.Load()
		if err := g.Reload(parse(t, limited, address)); err != nil {
			t.Fatal(err)
		}
		g.eventually("calls are made", func() bool { return calls.Load() > before || t.Failed() })
	}
	done.Store(true)
	wg.Wait()
	g.eventually("the old connections are closed", func() bool { return a.open.Load()+b.open.Load() <= 1 })
	g.idle()
	spent := int64(0)
	for _, account := range g.Guard().Budgets().Snapshot() {
		if account.Metric == "requests" {
			spent = account.Spent
		}
	}
	if spent != calls.Load() {
		t.Errorf("%d requests are on the books, %d calls were made", spent, calls.Load())
	}
}

// conns counts the connections to an address.
type conns struct{ open, all atomic.Int64 }

// proxy passes bytes on to the address, and counts.
func (c *conns) proxy(t *testing.T, address string) string {
	t.Helper()
	l := listen(t)
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			in, err := l.Accept()
			if err != nil {
				return
			}
			out, err := net.Dial("tcp", address)
			if err != nil {
				_ = in.Close()
				continue
			}
			c.open.Add(1)
			c.all.Add(1)
			copyTo := func(to, from net.Conn) {
				buf := make([]byte, 32<<10)
				for {
					n, err := from.Read(buf)
					if _, fail := to.Write(buf[:n]); err != nil || fail != nil {
						break
					}
				}
				_ = to.Close()
				_ = from.Close()
			}
			wg.Go(func() { copyTo(in, out) })
			wg.Go(func() {
				copyTo(out, in)
				c.open.Add(-1)
			})
		}
	})
	t.Cleanup(func() {
		_ = l.Close()
		wg.Wait()
	})
	return l.Addr().String()
}

// A connection is kept until the last call on it has ended.
func TestOldConnectionOutlivesItsCalls(t *testing.T) {
	_, behind := modelServer(t)
	var a conns
	behind = a.proxy(t, behind)
	g := open(t, base, behind)
	s, err := g.client().ModelStreamInfer(ctx(t))
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Send(ask("words", "a", words(3))); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Recv(); err != nil {
		t.Fatal(err)
	}
	changed := strings.Replace(base, "plaintext: true", "plaintext: true, mask_errors: true", 1)
	if err := g.Reload(parse(t, changed, behind)); err != nil {
		t.Fatal(err)
	}
	if err := s.Send(ask("words", "b", words(3))); err != nil {
		t.Fatal(err)
	}
	_ = s.CloseSend()
	if n, err := drainStream(s); n != 5 || err != nil {
		t.Errorf("%d messages, %v", n, err)
	}
	g.eventually("its connection is closed", func() bool { return a.open.Load() == 0 })
}

// A back end that does not change keeps its connections, and what is known of its
// servers.
func TestReloadKeepsConnections(t *testing.T) {
	_, behind := modelServer(t)
	var a conns
	behind = a.proxy(t, behind)
	g := open(t, base, behind)
	c := g.client()
	for range 5 {
		if _, err := c.ModelInfer(ctx(t), ask("echo", "a", "hello")); err != nil {
			t.Fatal(err)
		}
		if err := g.Reload(parse(t, base+"budgets: [{name: n, requests: 1000}]\n", behind)); err != nil {
			t.Fatal(err)
		}
	}
	if n := a.all.Load(); n != 1 {
		t.Errorf("%d connections were made", n)
	}
}

// Who we are, and whom we trust, may change too: also in the listener.
func TestReloadChangesTheIdentity(t *testing.T) {
	dir := t.TempDir()
	domain := spiffeid.RequireTrustDomainFromString("gate.test")
	_, behind := modelServer(t)
	text := func(name string) (string, *identity.Authority) {
		authority, err := identity.NewAuthority(domain)
		if err != nil {
			t.Fatal(err)
		}
		sub := filepath.Join(dir, name)
		svid, err := authority.Issue("/gateway", 0)
		if err == nil {
			err = authority.WriteFiles(sub, "gateway", svid)
		}
		if err != nil {
			t.Fatal(err)
		}
		return `
identity:
  files: {certificate: ` + sub + `/gateway.pem, key: ` + sub + `/gateway-key.pem, bundle: ` + sub + `/bundle.pem}
  rules: [{principals: ["spiffe://gate.test/client"], methods: [inference], models: ["*"]}]
backends: [{name: model, dialect: DIALECT_TRITON, plaintext: true}]
`, authority
	}
	one, first := text("one")
	two, second := text("two")
	g := open(t, one, behind)
	client := func(a *identity.Authority) inference.GRPCInferenceServiceClient {
		source, err := a.Source("/client")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = source.Close() })
		return g.client(grpc.WithTransportCredentials(identity.ClientCredentials(source, spiffeid.MatchAny(), nil)))
	}
	old := client(first)
	_, err := old.ModelInfer(ctx(t), ask("echo", "a", "hello"))
	expect(t, "before", err, "OK")
	if err := g.Reload(parse(t, two, behind)); err != nil {
		t.Fatal(err)
	}
	_, err = client(second).ModelInfer(ctx(t), ask("echo", "a", "hello"))
	expect(t, "of the new authority", err, "OK")
	_, err = client(first).ModelInfer(ctx(t), ask("echo", "a", "hello"))
	expect(t, "of the old authority, on a new connection", err, "Unavailable")
	if _, err = old.ModelInfer(ctx(t), ask("echo", "a", "hello")); err == nil {
		t.Error("of the old authority, on an old connection: it is served")
	}
}

// Reload and Shutdown may come at once.
func TestReloadAndShutdownTogether(t *testing.T) {
	_, behind := modelServer(t)
	for range 20 {
		g := open(t, base, behind)
		var wg sync.WaitGroup
		for range 4 {
			wg.Go(func() { _ = g.Reload(parse(t, base, behind)) })
		}
		wg.Go(g.Shutdown)
		wg.Wait()
		if err := g.Reload(parse(t, base, behind)); err == nil {
			t.Error("a gateway that is shut down took a configuration")
		}
	}
}
