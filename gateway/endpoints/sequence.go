package endpoints

import (
	"errors"
	"sync"

	"google.golang.org/grpc/connectivity"
)

// maxSequences is how many sequences are remembered at most: of the generation at
// hand and the one before, half each. What is forgotten is found again by its hash,
// unless servers came or went since it began. Chosen: some megabytes.
const maxSequences = 1 << 16

// sequences remembers which server has which sequence. Where one begins is decided
// by the highest of a hash of its name and each server's address (rendezvous
// hashing: Thaler and Ravishankar, 1998), so that gateways that know the same
// servers agree without asking one another. The zero value is ready.
type sequences struct {
	mu         sync.Mutex
	young, old map[string]*endpoint
}

// ErrElsewhere says that a sequence is at another server than the stream that it
// was sent on.
var ErrElsewhere = errors.New("the sequence is at another server")

// ErrLost says that the server of a sequence is gone, and the sequence with it.
var ErrLost = errors.New("the server of the sequence is gone")

// home is the server of a sequence; one of homes, which is not empty, if it begins.
// The sequence of a server that is gone is forgotten, and ErrLost says so
// once.
func (s *sequences) home(key string, homes []*endpoint) (*endpoint, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch e := s.find(key); {
	case e == nil:
	case gone(e):
		s.forget(key)
		return nil, ErrLost
	default:
		return e, nil
	}
	var best *endpoint
	var most uint64
	for _, e := range homes {
		if h := hash(key, e.address); best == nil || h > most {
			best, most = e, h
		}
	}
	s.keep(key, best)
	return best, nil
}

// Join has a sequence be where the RPC is, for an inference on a stream that began
// with another. The error is ErrElsewhere or ErrLost.
func (c *Call) Join(sequence string) error {
	c.mu.Lock()
	at := c.at
	c.mu.Unlock()
	if at == nil {
		return nil
	}
	s := &at.set.sequences
	s.mu.Lock()
	defer s.mu.Unlock()
	switch e := s.find(sequence); {
	case e == at:
	case e == nil:
		s.keep(sequence, at)
	case gone(e):
		s.forget(sequence)
		return ErrLost
	default:
		return ErrElsewhere
	}
	return nil
}

// gone reports whether a server has been taken away, or cannot be reached.
func gone(e *endpoint) bool {
	return e.is(connectivity.Shutdown) || e.is(connectivity.TransientFailure)
}

func (s *sequences) find(key string) *endpoint {
	e := s.young[key]
	if e == nil {
		if e = s.old[key]; e != nil {
			s.keep(key, e)
		}
	}
	return e
}

func (s *sequences) keep(key string, e *endpoint) {
	if s.young == nil || len(s.young) >= maxSequences/2 {
		s.turn()
	}
	s.young[key] = e
}

func (s *sequences) forget(key string) {
	delete(s.young, key)
	delete(s.old, key)
}

func (s *sequences) turn() { s.old, s.young = s.young, make(map[string]*endpoint) }

// age forgets what was not used since the last time.
func (s *sequences) age() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.turn()
}

// count is how many are at each address.
func (s *sequences) count() map[string]int {
	s.mu.Lock()
	defer s.mu.Unlock()
	at := make(map[string]int)
	for _, e := range s.young {
		if !e.is(connectivity.Shutdown) {
			at[e.address]++
		}
	}
	for key, e := range s.old {
		if s.young[key] == nil && !e.is(connectivity.Shutdown) {
			at[e.address]++
		}
	}
	return at
}

// hash is FNV-1a of both, mixed so that every bit of them counts in the highest
// (the last steps of SplitMix64: Steele, Lea and Flood, 2014). It is the same in
// every process.
func hash(key, address string) uint64 {
	h := uint64(14695981039346656037)
	for _, text := range [...]string{key, address} {
		for n := range len(text) {
			h = (h ^ uint64(text[n])) * 1099511628211
		}
		h *= 1099511628211 // where one ends and the other begins
	}
	h = (h ^ h>>30) * 0xbf58476d1ce4e5b9
	h = (h ^ h>>27) * 0x94d049bb133111eb
	return h ^ h>>31
}
