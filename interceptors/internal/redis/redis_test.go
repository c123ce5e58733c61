package redis

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/sluicegate/sluice/interceptors/internal/redistest"
	configv1 "github.com/sluicegate/sluice/proto/gen/sluice/config/v1"
)

func TestMain(m *testing.M) {
	// The library looks for a cluster again a second after it found none, and then ends.
	goleak.VerifyTestMain(m, goleak.IgnoreAnyFunction("github.com/redis/rueidis.(*call).DelayDo.func1"))
}

func TestNew(t *testing.T) {
	file := func(text string) string {
		name := filepath.Join(t.TempDir(), "f")
		if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return name
	}
	somewhere := []string{"127.0.0.1:1"}
	for name, test := range map[string]struct {
		c    *configv1.Redis
		want string
	}{
		"no address":     {&configv1.Redis{}, "addresses: there are none"},
		"no password":    {&configv1.Redis{Addresses: somewhere, PasswordFile: "none"}, "password_file: "},
		"no authorities": {&configv1.Redis{Addresses: somewhere, CaFile: "none"}, "ca_file: "},
		"none in it":     {&configv1.Redis{Addresses: somewhere, CaFile: file("x")}, "ca_file: "},
		"good":           {&configv1.Redis{Addresses: somewhere, PasswordFile: file("secret\n")}, ""},
	} {
		t.Run(name, func(t *testing.T) {
			r, err := New(test.c)
			if (err == nil) != (test.want == "") || err != nil && !strings.HasPrefix(err.Error(), test.want) {
				t.Errorf("%v, want %q", err, test.want)
			}
			if err == nil && (r.options.Password != "secret" || r.Timeout != DefaultTimeout) {
				t.Errorf("%+v", r.options)
			}
		})
	}
}

// A server that is not there yet is tried again, and one connection serves all until
// it is made anew.
func TestConnect(t *testing.T) {
	s := redistest.New(t, "../../budget/testdata/redis.sh")
	way := s.Proxy(t)
	r, err := New(&configv1.Redis{Addresses: []string{way.Address()}, Timeout: durationpb.New(5 * time.Second)})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	way.Cut(true)
	if _, err := r.Connect(); err == nil {
		t.Error("connected to nothing")
	}
	way.Cut(false)
	first, err := r.Connect()
	if err != nil {
		t.Fatal(err)
	}
	if again, err := r.Connect(); err != nil || again != first {
		t.Errorf("a second connection, %v", err)
	}
	r.Reset()
	next, err := r.Connect()
	if err != nil || next == first {
		t.Fatalf("no new connection, %v", err)
	}
	if err := next.Do(t.Context(), next.B().Ping().Build()).Error(); err != nil {
		t.Error(err)
	}
}
