package budget

import (
	"fmt"
	"math/big"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/sluicegate/sluice/interceptors"
	configv1 "github.com/sluicegate/sluice/proto/gen/sluice/config/v1"
)

const (
	minute = configv1.Calendar_CALENDAR_MINUTE
	hour   = configv1.Calendar_CALENDAR_HOUR
	day    = configv1.Calendar_CALENDAR_DAY
	month  = configv1.Calendar_CALENDAR_MONTH
)

func TestCalendarEnds(t *testing.T) {
	for _, test := range []struct {
		name, zone string
		calendar   configv1.Calendar
		at, want   string
	}{
		{"minute", "UTC", minute, "2026-01-31T23:59:30Z", "2026-02-01T00:00:00Z"},
		{"hour", "UTC", hour, "2026-01-31T23:00:00Z", "2026-02-01T00:00:00Z"},
		{"hour in a zone that is off by a half", "Asia/Kolkata", hour, "2026-01-31T00:29:59Z", "2026-01-31T00:30:00Z"},
		{"hour that comes twice, the first", "Europe/Zurich", hour, "2026-10-25T00:30:00Z", "2026-10-25T01:00:00Z"},
		{"hour that comes twice, the second", "Europe/Zurich", hour, "2026-10-25T01:30:00Z", "2026-10-25T02:00:00Z"},
		{"day", "UTC", day, "2026-02-28T23:59:59Z", "2026-03-01T00:00:00Z"},
		{"day in a zone", "America/New_York", day, "2026-01-01T04:59:59Z", "2026-01-01T05:00:00Z"},
		{"day of 23 hours", "Europe/Zurich", day, "2026-03-28T23:00:00Z", "2026-03-29T22:00:00Z"},
		{"day of 25 hours", "Europe/Zurich", day, "2026-10-24T22:00:00Z", "2026-10-25T23:00:00Z"},
		{"day before one without midnight", "America/Sao_Paulo", day, "2018-11-03T12:00:00Z", "2018-11-04T03:00:00Z"},
		{"day that was left out", "Pacific/Apia", day, "2011-12-29T20:00:00Z", "2011-12-30T10:00:00Z"},
		{"month", "UTC", month, "2026-12-31T23:59:59Z", "2027-01-01T00:00:00Z"},
		{"month in a zone", "Asia/Tokyo", month, "2026-01-31T15:00:00Z", "2026-02-28T15:00:00Z"},
	} {
		t.Run(test.name, func(t *testing.T) {
			at, err := time.Parse(time.RFC3339, test.at)
			if err != nil {
				t.Fatal(err)
			}
			w := calendarWindow(t, test.calendar, test.zone)
			if got := time.Unix(0, w.end(at.UnixNano())).UTC().Format(time.RFC3339); got != test.want {
				t.Errorf("got %s, want %s", got, test.want)
			}
		})
	}
}

func calendarWindow(t *testing.T, c configv1.Calendar, zone string) *window {
	t.Helper()
	w := new(window)
	if err := w.read(&configv1.Budget{Calendar: c, TimeZone: zone, Tokens: 1}, 1); err != nil {
		t.Fatal(err)
	}
	return w
}

// Windows follow each other without a gap: the end is after the moment, no
// further than a window is long, and the same for every moment before it.
func TestCalendarsTile(t *testing.T) {
	r := rand.New(rand.NewPCG(5, 6))
	for _, zone := range []string{"UTC", "Europe/Zurich", "America/Sao_Paulo", "America/Havana", "Asia/Kathmandu",
		"Australia/Lord_Howe", "Pacific/Apia", "Africa/Casablanca", "Asia/Beirut"} {
		for _, c := range []configv1.Calendar{minute, hour, day, month} {
			w := calendarWindow(t, c, zone)
			for range 3000 {
				at := time.Date(1990, 1, 1, 0, 0, 0, 0, time.UTC).UnixNano() + r.Int64N(int64(60*365*24*time.Hour))
				end := w.end(at)
				if end <= at || end-at > int64(w.length) {
					t.Fatalf("%s, %v: at %v the window ends at %v", zone, c, time.Unix(0, at).UTC(), time.Unix(0, end).UTC())
				}
				if between := at + r.Int64N(end-at); w.end(between) != end && c != hour && c != minute {
					t.Fatalf("%s, %v: at %v the window ends at %v, at %v at %v", zone, c, time.Unix(0, at).UTC(),
						time.Unix(0, end).UTC(), time.Unix(0, between).UTC(), time.Unix(0, w.end(between)).UTC())
				}
			}
		}
	}
}

// However often a bucket is looked at, it gains what the time is worth: no more
// and no less, to the unit.
func TestRefillIsExact(t *testing.T) {
	r := rand.New(rand.NewPCG(7, 8))
	for range 300 {
		w := window{length: time.Duration(1 + r.Int64N(int64(time.Hour)))}
		amount := 1 + r.Int64N(1<<uint(1+r.IntN(50)))
		var sum, left int64
		var passed time.Duration
		for range 50 {
			d := time.Duration(r.Int64N(int64(w.length)))
			var gain int64
			gain, left = w.refill(amount, d, left, 1<<62-sum)
			sum, passed = sum+gain, passed+d
		}
		want := new(big.Int).Mul(big.NewInt(amount), big.NewInt(int64(passed)))
		if want.Div(want, big.NewInt(int64(w.length))).Cmp(big.NewInt(sum)) != 0 {
			t.Fatalf("%d in %v, after %v: %d, want %v", amount, w.length, passed, sum, want)
		}
		need := 1 + r.Int64N(min(1<<30, amount*1000)) // else it is more than can be waited
		wait := w.wait(amount, need, left)
		if gain, _ := w.refill(amount, wait, left, 1<<62); gain < need {
			t.Fatalf("after the wait of %v there are %d, want %d", wait, gain, need)
		}
		if gain, _ := w.refill(amount, wait-1, left, 1<<62); gain >= need {
			t.Fatalf("1 ns before the end of the wait of %v there are %d already", wait, gain)
		}
	}
}

// jumping is a clock whose wall can be set while time goes by.
type jumping struct{ at instant }

func (j *jumping) pass(d time.Duration) { j.at.mono, j.at.wall = j.at.mono+d, j.at.wall+int64(d) }

// burn spends what it can of an account, and says how much that was and how long
// to wait for more.
func burn(t *testing.T, l *Ledger) (spent int, wait time.Duration) {
	t.Helper()
	for {
		i := infer(caller("a", "p"), "m", 0, 1)
		v, d := start(t, l.Tokens(), i)
		if d != nil {
			return spent, d.RetryAfter
		}
		i.Handed, i.OutputTokens = true, 1
		v.End(interceptors.Outcome{})
		spent++
	}
}

// F8: a clock that jumps never gives more than one budget, and no wait is negative.
func TestClockJumps(t *testing.T) {
	for _, test := range []struct {
		name   string
		budget *configv1.Budget
		length time.Duration
	}{
		{"window", &configv1.Budget{Window: durationpb.New(time.Minute)}, time.Minute},
		{"bucket", &configv1.Budget{Window: durationpb.New(time.Minute), Burst: 50}, time.Minute},
		{"minute", &configv1.Budget{Calendar: minute}, time.Minute},
		{"hour", &configv1.Budget{Calendar: hour}, time.Hour},
		{"day", &configv1.Budget{Calendar: day}, 24 * time.Hour},
	} {
		for _, jump := range []time.Duration{time.Hour, -time.Hour, time.Second, -time.Second, 1000 * time.Hour, -1000 * time.Hour} {
			t.Run(fmt.Sprint(test.name, " ", jump), func(t *testing.T) {
				b := test.budget
				b.Name, b.Tokens = "b", 50
				l := ledger(t, b)
				clock := &jumping{instant{mono: time.Hour, wall: time.Date(2026, 5, 5, 12, 30, 30, 0, time.UTC).UnixNano()}}
				l.clock = func() instant { return clock.at }
				if spent, wait := burn(t, l); spent != 50 || wait <= 0 {
					t.Fatalf("%d spent, wait %v", spent, wait)
				}
				total := 0
				for n := range 6 { // there, and back, and there
					to := jump
					if n%2 == 1 {
						to = -jump
					}
					clock.at.wall += int64(to)
					spent, wait := burn(t, l)
					if wait <= 0 {
						t.Errorf("after a jump of %v: wait %v", to, wait)
					}
					if spent > 50 {
						t.Errorf("after a jump of %v: %d at once, of a budget of 50", to, spent)
					}
					total += spent
				}
				// To and fro it begins the window it jumped into once; the windows of
				// lengths and buckets do not see it at all.
				most := 0
				if b.GetCalendar() != 0 {
					most = 50
				}
				if test.length*2 < jump.Abs() { // so far that the clock must have been wrong before
					most *= 3
				}
				if total > most {
					t.Errorf("%d spent in no time, want no more than %d", total, most)
				}
				clock.pass(2*test.length + time.Second)
				if spent, _ := burn(t, l); spent != 50 {
					t.Errorf("%d spent after two windows, want 50", spent)
				}
			})
		}
	}
}

func TestBucket(t *testing.T) {
	l := ledger(t, &configv1.Budget{Name: "b", Tokens: 60, Window: durationpb.New(time.Minute), Burst: 100})
	clock := &jumping{}
	l.clock = func() instant { return clock.at }
	if spent, wait := burn(t, l); spent != 100 || wait != time.Second {
		t.Errorf("%d at once and then a wait of %v, want 100 and 1 s", spent, wait)
	}
	clock.pass(10 * time.Second)
	if spent, _ := burn(t, l); spent != 10 {
		t.Errorf("%d after 10 s, want 10", spent)
	}
	clock.pass(1500 * time.Millisecond)
	if spent, wait := burn(t, l); spent != 1 || wait != 500*time.Millisecond {
		t.Errorf("%d after 1.5 s and a wait of %v, want 1 and 0.5 s", spent, wait)
	}
	clock.pass(time.Hour)
	if spent, _ := burn(t, l); spent != 100 {
		t.Errorf("%d after an hour, want 100", spent)
	}
	_, d := start(t, l.Tokens(), infer(caller("a", "p"), "m", 1, 100))
	if d == nil || d.RetryAfter != interceptors.NoRetry || !strings.Contains(d.Message, "ask for less") {
		t.Errorf("%+v, want a refusal for ever", d)
	}
	_, d = start(t, l.Tokens(), infer(caller("a", "p"), "m", 0, 30))
	if d == nil || d.RetryAfter != 30*time.Second {
		t.Errorf("%+v, want a refusal for 30 s", d)
	}
}
