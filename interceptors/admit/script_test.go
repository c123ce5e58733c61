package admit

import (
	"context"
	"strings"
	"testing"
	"time"

	"github.com/redis/rueidis"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/sluicegate/sluice/interceptors/internal/redis"
	configv1 "github.com/sluicegate/sluice/proto/gen/sluice/config/v1"
)

// What the script gives to whom, message by message, of a pool of 12 permits.
func TestSharedScript(t *testing.T) {
	s := store(t)
	c, err := redis.New(&configv1.Redis{Addresses: []string{s.Proxy(t).Address()}, Timeout: durationpb.New(10 * time.Second)})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	client, err := c.Connect()
	if err != nil {
		t.Fatal(err)
	}
	script := rueidis.NewLuaScript(sharedScript)
	// Gateway, number, epoch, good by its clock, permits held, in use, wanted, needed,
	// awake, what to do; and the answer: held, target, gateways, in use by all,
	// capacity, draining, epoch.
	for _, test := range []struct{ name, steps string }{
		{"what nobody wants is divided", `
			a 1 0 0 0 0 0 0 1 -  -> 12 12 1 0 12 0 1
			b 1 0 0 0 0 0 0 1 -  -> 0 6 2 0 12 0 2
			a 2 1 1 6 0 0 0 1 -  -> 6 6 2 0 12 0 1
			b 2 2 1 0 0 0 0 1 -  -> 6 6 2 0 12 0 2`},
		{"who wants nothing has none while another wants all", `
			a 1 0 0 0 0 0 0 1 -   -> 12 12 1 0 12 0 1
			b 1 0 0 0 0 20 0 1 -  -> 0 12 2 0 12 0 2
			a 2 1 1 0 0 0 0 1 -   -> 0 0 2 0 12 0 1
			b 2 2 1 0 0 20 0 1 -  -> 12 12 2 0 12 0 2`},
		{"who wants less than its part has it, and the rest is for the others", `
			a 1 0 0 0 0 2 0 1 -   -> 12 12 1 0 12 0 1
			b 1 0 0 0 0 20 0 1 -  -> 0 10 2 0 12 0 2
			c 1 0 0 0 0 20 0 1 -  -> 0 5 3 0 12 0 3
			a 2 1 1 2 2 2 0 1 -   -> 2 2 3 2 12 0 1
			b 2 2 1 0 0 20 0 1 -  -> 5 5 3 2 12 0 2
			c 2 3 1 0 0 20 0 1 -  -> 5 5 3 2 12 0 3`},
		{"who sleeps is counted, and has nothing", `
			a 1 0 0 0 0 0 0 0 -   -> 0 0 1 0 12 0 1
			b 1 0 0 0 0 0 0 1 -   -> 12 12 2 0 12 0 2`},
		{"what needs more than a part goes in turn", `
			a 1 0 0 0 0 8 8 1 -   -> 12 12 1 0 12 0 1
			a 2 1 1 8 8 16 0 1 -  -> 12 12 1 8 12 0 1
			b 1 0 0 0 0 8 8 1 -   -> 0 8 2 8 12 0 2
			a 3 1 1 12 8 16 0 1 - -> 12 4 2 8 12 0 1
			a 4 1 1 4 0 8 8 1 -   -> 4 4 2 0 12 0 1
			b 2 2 1 0 0 8 8 1 -   -> 8 8 2 0 12 0 2
			b 3 2 1 8 8 16 0 1 -  -> 8 4 2 8 12 0 2
			a 5 1 1 4 0 8 8 1 -   -> 4 8 2 8 12 0 1
			b 4 2 1 4 0 8 8 1 -   -> 4 4 2 0 12 0 2
			a 6 1 1 4 0 8 8 1 -   -> 8 8 2 0 12 0 1`},
		{"a message that comes late changes nothing", `
			a 5 0 0 0 0 9 0 1 -   -> 12 12 1 0 12 0 1
			a 4 0 0 0 0 0 0 1 -   -> late
			a 5 1 1 12 0 0 0 1 -  -> late
			a 6 1 1 12 9 9 0 1 -  -> 12 12 1 9 12 0 1`},
		{"an epoch that is over holds what is in use", `
			a 1 0 0 0 0 9 0 1 -   -> 12 12 1 0 12 0 1
			b 1 0 0 0 0 9 0 1 -   -> 0 6 2 0 12 0 2
			a 2 7 1 12 3 3 0 1 -  -> 3 3 2 3 12 0 3`},
		{"nobody holds more than was given", `
			a 1 0 0 0 0 9 0 1 -   -> 12 12 1 0 12 0 1
			a 2 1 1 3 3 3 0 1 -   -> 12 12 1 3 12 0 1
			b 1 0 0 0 0 9 0 1 -   -> 0 9 2 3 12 0 2
			a 3 1 1 3 3 3 0 1 -   -> 3 3 2 3 12 0 1
			b 2 2 1 9 0 9 0 1 -   -> 9 9 2 3 12 0 2
			a 4 1 1 12 3 3 0 1 -  -> 3 3 2 3 12 0 1`},
		{"what runs runs, though there are too many", `
			a 1 0 0 0 0 9 0 1 -    -> 12 12 1 0 12 0 1
			b 1 0 0 0 0 9 0 1 -    -> 0 6 2 0 12 0 2
			b 2 2 1 8 8 9 0 1 -    -> 8 6 2 8 12 0 2
			a 2 1 1 12 12 12 0 1 - -> 12 6 2 20 12 0 1`},
		{"who leaves leaves all", `
			a 1 0 0 0 0 9 0 1 -     -> 12 12 1 0 12 0 1
			b 1 0 0 0 0 9 0 1 -     -> 0 6 2 0 12 0 2
			a 3 1 1 12 0 0 0 1 leave -> left
			a 2 1 1 12 0 12 0 1 -   -> late
			b 2 2 1 0 0 9 0 1 -     -> 12 12 1 0 12 0 2`},
		{"a new capacity is for all, until the configured one changes", `
			a 1 0 0 0 0 9 0 1 -          -> 12 12 1 0 12 0 1
			b 1 0 0 0 0 9 0 1 resize:6   -> 0 3 2 0 6 0 2
			a 2 1 1 12 9 9 0 1 -         -> 12 3 2 9 6 0 1
			a 3 1 1 9 9 9 0 1 drain      -> 9 3 2 9 6 1 1
			b 2 2 1 0 0 9 0 1 -          -> 0 3 2 9 6 1 2
			b 3 2 1 0 0 9 0 1 resume     -> 0 3 2 9 6 0 2
			b 4 2 1 0 0 9 0 1 resize:12  -> 3 6 2 9 12 0 2`},
		{"a store that forgot waits for those who held something", `
			a 9 4 1 4 1 9 0 1 -   -> 4 12 1 1 12 0 1
			b 7 3 1 8 8 9 0 1 -   -> 8 6 2 9 12 0 2
			c 1 0 0 0 0 9 0 1 -   -> 0 4 3 9 12 0 3
			a 10 1 1 4 1 9 0 1 -  -> 4 4 3 9 12 0 1`},
	} {
		t.Run(test.name, func(t *testing.T) {
			key := "test:{" + test.name + "}"
			for _, step := range strings.Split(strings.TrimSpace(test.steps), "\n") {
				question, want, _ := strings.Cut(step, "->")
				f := strings.Fields(question)
				what, value, _ := strings.Cut(strings.TrimPrefix(f[9], "-"), ":")
				args := []string{f[0], f[1], f[2], f[3], "60000", "12", f[4], f[5], f[6], f[7], f[8], what, value}
				reply, err := script.Exec(context.Background(), client, []string{key}, args).AsStrSlice()
				if err != nil {
					t.Fatal(err)
				}
				got := reply[0]
				if got == "ok" {
					got = strings.Join(reply[3:], " ")
				}
				if got != strings.TrimSpace(want) || reply[1] != key {
					t.Errorf("%s: %s %s, want %s", strings.TrimSpace(question), reply[1], got, want)
				}
			}
		})
	}
}
