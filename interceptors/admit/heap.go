package admit

// heap is a binary heap whose items know their place in it, so that any of them
// can move or leave in O(log n).
type heap[T any] struct {
	items []T
	less  func(a, b T) bool
	place func(T) *int // where an item keeps its place, counted from 1; 0 if it is not in the heap
}

// top is the least item, or zero if there is none.
func (h *heap[T]) top() (x T) {
	if len(h.items) > 0 {
		x = h.items[0]
	}
	return x
}

// put adds an item, or moves one that changed.
func (h *heap[T]) put(x T) {
	at := *h.place(x)
	if at == 0 {
		h.items = append(h.items, x)
		at = len(h.items)
		*h.place(x) = at
	}
	h.down(h.up(at))
}

// remove takes an item out, if it is in.
func (h *heap[T]) remove(x T) {
	at, last := *h.place(x), len(h.items)
	if at == 0 {
		return
	}
	h.swap(at, last)
	h.items[last-1] = *new(T)
	h.items = h.items[:last-1]
	*h.place(x) = 0
	if at < last {
		h.down(h.up(at))
	}
}

func (h *heap[T]) up(at int) int {
	for at > 1 && h.less(h.items[at-1], h.items[at/2-1]) {
		h.swap(at, at/2)
		at /= 2
	}
	return at
}

func (h *heap[T]) down(at int) {
	for {
		child := 2 * at
		if child > len(h.items) {
			return
		}
		if child < len(h.items) && h.less(h.items[child], h.items[child-1]) {
			child++
		}
		if !h.less(h.items[child-1], h.items[at-1]) {
			return
		}
		h.swap(at, child)
		at = child
	}
}

func (h *heap[T]) swap(a, b int) {
	h.items[a-1], h.items[b-1] = h.items[b-1], h.items[a-1]
	*h.place(h.items[a-1]), *h.place(h.items[b-1]) = a, b
}
