package inspect

import (
	"maps"
	"sync"
	"sync/atomic"
)

// What names remembers: enough for the models and tensors of a cluster. Chosen.
const (
	longestName = 64 // bytes
	maxNames    = 512
)

// names remembers what was found in names of models and tensors, which are the same
// in nearly every request. Reads take no lock and allocate nothing. When it is full,
// what is not in it is read anew each time. The zero value is ready.
type names struct {
	entries atomic.Pointer[map[readAs]uint64]
	mu      sync.Mutex // one writer
}

// readAs is a name that was read, with the detectors of a mask.
type readAs struct {
	text string
	mask uint64
}

// name is whole for a name of a model or a tensor.
func (s *scratch) name(n *names, text []byte, mask uint64) {
	known := n.entries.Load()
	if known != nil {
		if found, ok := (*known)[readAs{string(text), mask}]; ok {
			s.found, s.spans, s.over = found, s.spans[:0], false
			return
		}
	}
	if s.whole(text, mask); s.over || len(text) > longestName || known != nil && len(*known) >= maxNames {
		return
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	next := make(map[readAs]uint64)
	if known = n.entries.Load(); known != nil {
		maps.Copy(next, *known)
	}
	next[readAs{string(text), mask}] = s.found
	n.entries.Store(&next)
}
