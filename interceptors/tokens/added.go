package tokens

import "math"

// added are the tokens that stand for themselves wherever they are in a text, as
// those of chat templates do. Of several that begin at one place the longest counts.
type added struct {
	begins [256]bool
	next   map[uint64]int32 // node and byte to node; the root is 0
	ids    []int32          // of each node; none if no token ends there
}

func newAdded() *added { return &added{next: make(map[uint64]int32), ids: []int32{none}} }

func (a *added) add(text string, id int32) {
	a.begins[text[0]] = true
	node := int32(0)
	for n := range len(text) {
		step := uint64(node)<<8 | uint64(text[n])
		to, ok := a.next[step]
		if !ok {
			to = int32(len(a.ids))
			a.next[step] = to
			a.ids = append(a.ids, none)
		}
		node = to
	}
	a.ids[node] = id
}

// find is the first added token of a text; id is none, and start and end are the
// end of the text, if there is none. Up to clear, further text would not change that.
func (a *added) find(text []byte, known int) (start, end int, id int32, clear int) {
	clear = math.MaxInt
	for n, b := range text {
		if !a.begins[b] {
			continue
		}
		end, id, open := a.at(text[n:])
		if open && known <= len(text) {
			clear = min(clear, n)
		}
		if id != none {
			return n, n + end, id, clear
		}
	}
	return len(text), len(text), none, clear
}

// at is the longest added token at the beginning of text. open says that it may be another
// one if more follows.
func (a *added) at(text []byte) (end int, id int32, open bool) {
	id = none
	node := int32(0)
	for n, b := range text {
		to, ok := a.next[uint64(node)<<8|uint64(b)]
		if !ok {
			return end, id, false
		}
		if node = to; a.ids[node] != none {
			end, id = n+1, a.ids[node]
		}
	}
	return end, id, true
}
