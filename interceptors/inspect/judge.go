package inspect

import (
	"container/list"
	"context"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"sync"
	"time"

	configv1 "github.com/sluicegate/sluice/proto/gen/sluice/config/v1"
)

// After so many failures in a row the guard model is left alone for so long. Chosen:
// a server that restarts is not missed for long, and one that hangs costs nothing.
const (
	guardFailures = 5
	guardPause    = 5 * time.Second
)

// judge keeps what is asked of a guard model within bounds: equal texts are asked about
// once, answers are remembered, and a model that fails is left alone for a while. It is
// safe for concurrent use.
type judge struct {
	timeout time.Duration
	rate    float64 // questions a second; 0 for any number
	burst   float64
	entries int
	ttl     time.Duration
	key     [sha256.Size]byte

	mu       sync.Mutex
	answers  map[digest]*list.Element
	order    list.List // of *learned, the last used first
	asked    map[digest]*asking
	left     float64 // questions that may be asked now
	filled   time.Time
	failures int       // in a row
	closed   time.Time // until when it is left alone
}

// digest is a keyed hash of a text.
type digest [sha256.Size]byte

// learned is an answer that is remembered.
type learned struct {
	of     digest
	unsafe bool
	until  time.Time
}

// asking is a question that is being asked.
type asking struct {
	done      chan struct{} // closed when the rest is known
	unsafe    bool
	err       error
	abandoned bool // nobody waited for the answer: who still does asks again
}

func newJudge(cfg *configv1.Guard) *judge {
	j := &judge{
		timeout: guardTimeout, entries: guardAnswers, ttl: guardLifetime,
		rate: float64(cfg.GetPerSecond()), burst: float64(cfg.GetBurst()),
		answers: make(map[digest]*list.Element), asked: make(map[digest]*asking),
		filled: time.Now(),
	}
	if j.burst == 0 {
		j.burst = j.rate
	}
	j.left = j.burst
	if d := cfg.GetTimeout(); d != nil {
		j.timeout = d.AsDuration()
	}
	if cfg.CacheEntries != nil {
		j.entries = int(cfg.GetCacheEntries())
	}
	if d := cfg.GetCacheTtl(); d != nil {
		j.ttl = d.AsDuration()
	}
	_, _ = rand.Read(j.key[:]) // never fails
	return j
}

func (j *judge) digest(text []byte) (d digest) {
	h := hmac.New(sha256.New, j.key[:])
	_, _ = h.Write(text)
	h.Sum(d[:0])
	return d
}

// about judges a text: by an answer that is known ("cached"), with somebody who is
// asking ("shared"), or by asking ("asked"). The error is a *failure ("failed", or
// "skipped" where nothing was asked), or the context's, if that has ended.
func (j *judge) about(ctx context.Context, text []byte, ask func(context.Context, []byte) (bool, error)) (unsafe bool, how string, err error) {
	d := j.digest(text)
	caller := ctx
	ctx, cancel := context.WithTimeout(ctx, j.timeout)
	defer cancel()
	for {
		j.mu.Lock()
		now := time.Now()
		if a := j.known(d, now); a != nil {
			unsafe = a.unsafe
			j.mu.Unlock()
			return unsafe, "cached", nil
		}
		other := j.asked[d]
		if other == nil {
			if f := j.skip(now); f != nil {
				j.mu.Unlock()
				return false, "skipped", f
			}
			mine := &asking{done: make(chan struct{})}
			j.asked[d] = mine
			j.mu.Unlock()
			j.ask(ctx, caller, d, mine, func() (bool, error) { return ask(ctx, text) })
			return mine.result(caller, "asked")
		}
		j.mu.Unlock()
		select {
		case <-other.done:
		case <-ctx.Done():
			if caller.Err() != nil {
				return false, "failed", caller.Err()
			}
			return false, "failed", &failure{why: "DeadlineExceeded"}
		}
		if !other.abandoned {
			return other.result(caller, "shared")
		}
	}
}

func (a *asking) result(caller context.Context, how string) (bool, string, error) {
	switch {
	case a.err == nil:
		return a.unsafe, how, nil
	case caller.Err() != nil:
		return false, "failed", caller.Err()
	}
	return false, "failed", a.err
}

// ask asks, and tells all who wait. What a caller did not wait for says nothing of the
// model.
func (j *judge) ask(ctx, caller context.Context, d digest, a *asking, ask func() (bool, error)) {
	a.err = &failure{why: "panic"}
	defer func() {
		now := time.Now()
		j.mu.Lock()
		defer j.mu.Unlock()
		delete(j.asked, d)
		switch {
		case a.err == nil:
			j.failures = 0
			j.remember(&learned{d, a.unsafe, now.Add(j.ttl)})
		case caller.Err() != nil:
			a.abandoned = true
		default:
			if j.failures++; j.failures >= guardFailures {
				j.closed = now.Add(guardPause)
			}
		}
		close(a.done)
	}()
	unsafe, err := ask()
	if err == nil && ctx.Err() != nil {
		err = &failure{why: "DeadlineExceeded"} // too late
	}
	a.unsafe, a.err = unsafe, err
}

// skip says why the model is not to be asked now; nil if it is. mu is held.
func (j *judge) skip(now time.Time) *failure {
	if j.failures >= guardFailures {
		if now.Before(j.closed) {
			return &failure{why: "breaker", retry: j.closed.Sub(now)}
		}
		j.closed = now.Add(guardPause) // one tries it, the others wait for what becomes of that
	}
	if j.rate == 0 {
		return nil
	}
	j.left = min(j.burst, j.left+j.rate*now.Sub(j.filled).Seconds())
	j.filled = now
	if j.left < 1 {
		return &failure{why: "budget", retry: time.Duration((1 - j.left) / j.rate * float64(time.Second))}
	}
	j.left--
	return nil
}

// known is an answer that is remembered, or nil. mu is held.
func (j *judge) known(d digest, now time.Time) *learned {
	e := j.answers[d]
	if e == nil {
		return nil
	}
	a := e.Value.(*learned)
	if !now.Before(a.until) {
		j.order.Remove(e)
		delete(j.answers, d)
		return nil
	}
	j.order.MoveToFront(e)
	return a
}

// remember keeps an answer in the place of the one that nobody asked for for longest.
// mu is held.
func (j *judge) remember(a *learned) {
	if j.entries == 0 {
		return
	}
	j.answers[a.of] = j.order.PushFront(a)
	if j.order.Len() > j.entries {
		delete(j.answers, j.order.Remove(j.order.Back()).(*learned).of)
	}
}
