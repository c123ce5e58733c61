package budget

import (
	"maps"
	"strings"
	"sync"
	"sync/atomic"
)

// estimates learn how much output the inferences of a model write: an amount
// that nine in ten do not exceed. Looking one up takes no lock, for tenants share
// it who share no account.
type estimates struct {
	mu     sync.Mutex // for making one
	models atomic.Pointer[map[string]*atomic.Int64]
}

// maxEstimates bounds what is learned: model names are the callers'. Chosen.
const maxEstimates = 1024

func (e *estimates) find(model string) *atomic.Int64 {
	if all := e.models.Load(); all != nil {
		return (*all)[model]
	}
	return nil
}

// get is 0 for a model of which nothing is known.
func (e *estimates) get(model string) int64 {
	if n := e.find(model); n != nil {
		return n.Load()
	}
	return 0
}

// learn moves the estimate towards the ninth decile: nine steps up for every
// step down, in steps of a 64th (chosen: settled after some hundred inferences).
// Of two at once one may be lost.
func (e *estimates) learn(model string, output int64) {
	n := e.find(model)
	if n == nil {
		if n = e.add(model); n == nil {
			return
		}
	}
	old := n.Load()
	switch step := max(1, old/64); {
	case output > old:
		n.Store(min(old+9*step, output))
	case output < old:
		n.Store(max(old-step, output, 1))
	}
}

func (e *estimates) add(model string) *atomic.Int64 {
	e.mu.Lock()
	defer e.mu.Unlock()
	var all map[string]*atomic.Int64
	if now := e.models.Load(); now != nil {
		all = *now
	}
	if n := all[model]; n != nil || len(all) >= maxEstimates || len(model) > maxName {
		return n
	}
	next := make(map[string]*atomic.Int64, len(all)+1)
	maps.Copy(next, all)
	n := new(atomic.Int64)
	n.Store(defaultOutput)
	next[strings.Clone(model)] = n
	e.models.Store(&next)
	return n
}
