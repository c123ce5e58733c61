package budget

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"
)

// acquire makes the accounts of holds have what these lack, if the store has it.
// An error says that there was no answer. Nothing is locked. begun says that it is for an
// inference that has begun.
func (s *shared) acquire(ctx context.Context, l *Ledger, holds []hold, begun bool) error {
	return s.exchange(ctx, l, holds, func(asks []ask) bool {
		lacks := false
		for n := range holds {
			h := &holds[n]
			room := h.account.held()
			asks[n].want = max(0, h.want-room, h.account.limit.share()-room)
			if !h.account.limit.soft {
				asks[n].least = max(0, h.least-room)
			}
			if begun {
				asks[n].overdraft = h.account.limit.overdraft
			}
			// Somebody may have brought enough while we waited for the gate.
			lacks = lacks || asks[n].least > 0 || !h.account.lease.known
		}
		return lacks
	})
}

// ask is what a gateway asks of an account beyond what it holds, and what becomes of
// the account itself.
type ask struct {
	want, least int64
	overdraft   int64 // how far beyond what there is least may go
	gift        int64 // to be added to it, or reset
}

// reset as a gift makes an account full.
const reset = -1

// exchange tells the store of accounts, and asks for more of them. What it asks for
// is found with the accounts locked; false: nothing.
func (s *shared) exchange(ctx context.Context, l *Ledger, holds []hold, plan func([]ask) bool) error {
	ctx, cancel := context.WithTimeout(ctx, s.timeout)
	defer cancel()
	for n := range holds { // always in the same order, so that nobody waits in a circle
		gate := holds[n].account.lease.gate
		select {
		case gate <- struct{}{}:
			defer func() { <-gate }()
		case <-ctx.Done():
			return errStore
		}
	}
	asks := make([]ask, len(holds))
	now := l.lock(holds)
	if !plan(asks) {
		unlock(holds)
		return nil
	}
	if !s.allowed(now.wall) {
		unlock(holds)
		return errStore
	}
	keys, args := l.message(holds, asks, now)
	unlock(holds)
	reply, err := s.askWithin(ctx, keys, args)
	if err != nil {
		s.failed(now.wall)
		l.lock(holds)
		for n := range holds {
			holds[n].account.lease.stored = -1 // it may have granted all the same
		}
		unlock(holds)
		return fmt.Errorf("%w: %w", errStore, err)
	}
	s.failures.Store(0)
	l.lock(holds)
	defer unlock(holds)
	for n := range holds {
		holds[n].account.answer(reply[1+n*repliesPerKey:], now, s.lease)
	}
	return nil
}

// message is what the script wants to know. The accounts are locked; what is told of
// their usage is noted.
func (l *Ledger) message(holds []hold, asks []ask, now instant) (keys, args []string) {
	args = []string{l.shared.gateway, strconv.FormatInt(l.shared.number.Add(1), 10),
		strconv.FormatInt(l.shared.lease.Milliseconds(), 10)}
	for n, ask := range asks {
		a := holds[n].account
		e, w := a.lease, &a.limit.window
		keys = append(keys, l.storeKey(a.key))
		known, kind, amount := int64(0), "", a.limit.amount
		if e.known {
			known = 1
		}
		var end1, end2 int64
		switch {
		case w.burst > 0:
			kind = "b"
		case w.zone != nil:
			kind = "c"
			end := w.end(now.wall)
			end1, end2 = end/int64(time.Millisecond), w.end(end)/int64(time.Millisecond)
		case w.ends():
			kind = "w"
		}
		e.told = a.used
		for _, v := range []int64{e.window, known, max(e.granted, a.used), a.used, ask.want, ask.least,
			a.limit.capacity(), amount, max(1, w.length.Milliseconds()), ask.gift} {
			args = append(args, strconv.FormatInt(v, 10))
		}
		args = append(args, kind, strconv.FormatInt(end1, 10), strconv.FormatInt(end2, 10), strconv.FormatInt(e.books, 10),
			strconv.FormatInt(min(a.reserved, a.used), 10), strconv.FormatInt(ask.overdraft, 10))
	}
	return keys, args
}

// askWithin is ask that gives up when the context ends: the client does not while it
// makes a connection. An answer that comes later is dropped, and does no harm.
func (s *shared) askWithin(ctx context.Context, keys, args []string) ([]string, error) {
	type answer struct {
		reply []string
		err   error
	}
	got := make(chan answer, 1)
	s.background.Go(func() {
		reply, err := s.ask(ctx, keys, args)
		got <- answer{reply, err}
	})
	select {
	case a := <-got:
		return a.reply, a.err
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// ask runs the script, and checks that the answer is to what was asked.
func (s *shared) ask(ctx context.Context, keys, args []string) ([]string, error) {
	client, err := s.store.Connect()
	if err != nil {
		return nil, err
	}
	reply, err := s.script.Exec(ctx, client, keys, args).AsStrSlice()
	if err != nil {
		return nil, err
	}
	if len(reply) != 1+repliesPerKey*len(keys) || reply[0] != "enough" && reply[0] != "short" {
		return nil, fmt.Errorf("the store says %q", strings.Join(reply[:min(1, len(reply))], ""))
	}
	for n, k := range keys {
		if reply[1+n*repliesPerKey] != k {
			return nil, errors.New("the store answers another question")
		}
	}
	return reply, nil
}

// answer takes over what the store says of an account. Sent is when it was asked:
// what it grants for a time is granted from then.
func (a *account) answer(reply []string, sent instant, lasts time.Duration) {
	var n [repliesPerKey]int64
	for k := 1; k < repliesPerKey; k++ {
		n[k], _ = strconv.ParseInt(reply[k], 10, 64) // the script writes nothing else
	}
	e := a.lease
	granted, base, window, rest, left := n[1], n[2], n[3], n[4], n[5]
	if e.known && window != e.window {
		a.over()
	}
	if !e.known {
		a.used += base
		e.told += base
	}
	e.known, e.window, e.left = true, window, left
	e.passed = cmp.Or(passed(a.limit.capacity(), n[6], n[7]), e.passed)
	e.granted, e.stored = max(granted, a.used), granted
	e.until = sent.mono + lasts
	if e.ends = 0; rest >= 0 {
		e.ends = sent.mono + time.Duration(rest)*time.Millisecond
	}
}
