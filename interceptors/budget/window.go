package budget

import (
	"errors"
	"fmt"
	"math"
	"math/bits"
	"time"

	configv1 "github.com/sluicegate/sluice/proto/gen/sluice/config/v1"
)

// window says when an account gets what again.
//
// Lengths and rates go by the monotonic clock, which never jumps. Calendars go
// by the wall clock, as they must.
type window struct {
	length   time.Duration // 0: never
	calendar configv1.Calendar
	zone     *time.Location
	burst    int64 // above 0: a token bucket of this capacity
}

// instant is a moment on both clocks.
type instant struct {
	mono time.Duration // since the ledger began
	wall int64         // Unix time in nanoseconds
}

// clock reads both clocks.
type clock func() instant

func systemClock() clock {
	began := time.Now()
	return func() instant {
		now := time.Now()
		return instant{now.Sub(began), now.UnixNano()}
	}
}

// read reads the window of a budget whose amount is known.
func (w *window) read(b *configv1.Budget, amount int64) error {
	if d := b.GetWindow(); d != nil {
		if err := d.CheckValid(); err != nil {
			return fmt.Errorf("window: %w", err)
		}
		w.length = d.AsDuration()
		if w.length < 0 || w.length > math.MaxInt64/2 { // so that the end of a window is a Duration too
			return fmt.Errorf("window: it is %v; it must be positive and under 146 years, or absent for one that never ends", w.length)
		}
	}
	if b.GetTimeZone() != "" && b.GetCalendar() == configv1.Calendar_CALENDAR_UNSPECIFIED {
		return errors.New("time_zone: it is for a calendar; set calendar, or leave it out")
	}
	if b.GetCalendar() != configv1.Calendar_CALENDAR_UNSPECIFIED {
		if w.length != 0 || b.GetBurst() != 0 {
			return errors.New("calendar: a window is of the calendar, or has a length; for both make two budgets")
		}
		w.calendar = b.GetCalendar()
		if w.length = lengths[w.calendar]; w.length == 0 {
			return fmt.Errorf("calendar: %v is no calendar", w.calendar)
		}
		var err error
		if w.zone, err = time.LoadLocation(b.GetTimeZone()); err != nil || b.GetTimeZone() == "Local" {
			return fmt.Errorf("time_zone: %q is not known here; write it as in \"Europe/Zurich\", or leave it out for UTC", b.GetTimeZone())
		}
	}
	if n := b.GetBurst(); n > 0 {
		if w.length == 0 {
			return errors.New("burst: say in window how long the amount takes to be refilled")
		}
		units, _ := metricOf(b).unit()
		w.burst = int64(n) * units
		if w.burst > math.MaxInt64/2 || amount > math.MaxInt64/2 {
			return errors.New("burst: it is too large to be counted")
		}
	}
	return nil
}

func metricOf(b *configv1.Budget) metric {
	switch {
	case b.GetMoneyMicros() > 0:
		return money
	case b.GetGpuSeconds() > 0:
		return gpuTime
	}
	return tokens
}

// lengths are the longest that windows of calendars last.
var lengths = map[configv1.Calendar]time.Duration{
	configv1.Calendar_CALENDAR_MINUTE: time.Minute,
	configv1.Calendar_CALENDAR_HOUR:   time.Hour,
	configv1.Calendar_CALENDAR_DAY:    25 * time.Hour,
	configv1.Calendar_CALENDAR_MONTH:  31*24*time.Hour + time.Hour,
}

// ends reports whether a window follows on a window.
func (w *window) ends() bool { return w.length > 0 }

// end is when the window of a calendar ends in which a moment lies, both in Unix
// nanoseconds. It is after the moment, whatever the zone does to its clocks.
func (w *window) end(wall int64) int64 {
	t := time.Unix(0, wall).In(w.zone)
	var next time.Time
	switch w.calendar {
	case configv1.Calendar_CALENDAR_MINUTE, configv1.Calendar_CALENDAR_HOUR:
		// By the offset of now: a minute or an hour that comes twice is two.
		_, offset := t.Zone()
		length := int64(w.length)
		local := wall + int64(offset)*int64(time.Second)
		into := ((local % length) + length) % length
		return wall - into + length
	case configv1.Calendar_CALENDAR_DAY:
		next = time.Date(t.Year(), t.Month(), t.Day()+1, 0, 0, 0, 0, w.zone)
	default:
		next = time.Date(t.Year(), t.Month()+1, 1, 0, 0, 0, 0, w.zone)
	}
	if next.UnixNano() <= wall || next.Hour() == 23 {
		// The zone has no midnight on that day: it begins when the clocks change.
		_, next = next.ZoneBounds()
	}
	return next.UnixNano()
}

// refill is what a bucket gains in a time, of which a part may be left over from
// before, in units × nanoseconds. It does not gain more than most.
func (w *window) refill(amount int64, d time.Duration, left, most int64) (gain, rest int64) {
	hi, lo := bits.Mul64(uint64(amount), uint64(d))
	lo, carry := bits.Add64(lo, uint64(left), 0)
	hi += carry
	if hi >= uint64(w.length) {
		return most, 0
	}
	n, r := bits.Div64(hi, lo, uint64(w.length))
	if n >= uint64(most) {
		return most, 0
	}
	return int64(n), int64(r)
}

// wait is how long a bucket takes to gain need units.
func (w *window) wait(amount, need, left int64) time.Duration {
	hi, lo := bits.Mul64(uint64(need), uint64(w.length))
	lo, borrow := bits.Sub64(lo, uint64(left), 0)
	hi -= borrow
	if hi >= uint64(amount) {
		return math.MaxInt64
	}
	d, r := bits.Div64(hi, lo, uint64(amount))
	if r > 0 {
		d++
	}
	return time.Duration(min(d, math.MaxInt64))
}
