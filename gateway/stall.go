package gateway

import (
	"context"
	"math"
	"sync/atomic"
	"time"
)

// stall notices a caller that does not read. A message costs it two additions;
// a timer for each would be a tenth of what a chunk of a stream costs in all.
// The zero value is ready.
type stall struct {
	turns atomic.Uint64 // odd while a message is being sent
	timer *time.Timer
}

func (s *stall) begin() { s.turns.Add(1) }
func (s *stall) end()   { s.turns.Add(1) }

// watch calls stalled once, if sending one message takes longer than limit: at
// the latest a quarter later than that. It ends with ctx.
func (s *stall) watch(ctx context.Context, limit time.Duration, stalled func()) {
	const looks = 4
	var seen uint64
	var same int // looks that found seen
	s.timer = time.AfterFunc(math.MaxInt64, func() {
		now := s.turns.Load()
		switch {
		case ctx.Err() != nil:
			return
		case now%2 == 0 || now != seen:
			seen, same = now, 0
		case same == looks-1:
			stalled()
			return
		default:
			same++
		}
		s.timer.Reset(limit / looks)
	})
	s.timer.Reset(limit / looks)
}

// stop ends the watch.
func (s *stall) stop() { s.timer.Stop() }
