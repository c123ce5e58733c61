package inspect

// trail remembers where in the text a matcher's phrases began, so that what may
// still become one can be held back, and what has become one replaced. Places are
// offsets from the beginning of the text.
type trail struct {
	at, next int64 // the character at hand
	chars    int64 // characters left of normalising, so far
	stop     int64 // where the last symbol ended
	n        uint32
	recent   [trailSymbols]place64 // where the last symbols began
	began    []place64             // where the phrase of a step began that was reached
	waiting  []uint32              // steps that were reached, and have another after them
	hits     []match
}

// trailSymbols is how far back a word may have begun, in symbols: words are shorter.
const trailSymbols = 256

// place64 is a place in a text, in bytes and in characters left of normalising.
type place64 struct{ at, chars int64 }

// match is what was found, and where.
type match struct {
	start, end int64
	found      uint64
	on         bool // it goes on with the match before
}

func newTrail(a *automaton) *trail { return &trail{began: make([]place64, a.steps)} }

// mark notes where a symbol begins. An edge has no length.
func (t *trail) mark(s byte) {
	t.recent[t.n%trailSymbols] = place64{t.at, t.chars}
	t.n++
	if t.stop = t.next; s == symEdge {
		t.stop = t.at
	}
}

// back is where the word began whose symbols are the last n.
func (t *trail) back(n uint8) place64 { return t.recent[(t.n-uint32(n))%trailSymbols] }

// reach notes that a step was reached.
func (t *trail) reach(r *reach) {
	from := t.back(r.size)
	if r.gap >= 0 {
		from = t.began[r.at-1]
	}
	if r.found < 64 {
		t.hits = append(t.hits, match{start: from.at, end: t.stop, found: 1 << r.found})
		return
	}
	t.began[r.at] = from
	for _, w := range t.waiting {
		if w == uint32(r.at) {
			return
		}
	}
	t.waiting = append(t.waiting, uint32(r.at))
}

// open is where the first phrase begins that the text may still go on with, and
// that is not longer than most characters; limit if there is none before it.
func (m *matcher) open(limit, most int64) int64 {
	t := m.trail
	if d := m.a.depth[m.state]; d > 0 {
		limit = min(limit, t.back(d).at)
	}
	n := 0
	for _, s := range t.waiting {
		b := t.began[s]
		if m.at-m.reached[s] >= m.a.within[s] || t.chars-b.chars > most {
			continue
		}
		t.waiting[n] = s
		n++
		limit = min(limit, b.at)
	}
	t.waiting = t.waiting[:n]
	return limit
}
