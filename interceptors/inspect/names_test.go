package inspect

import (
	"strings"
	"testing"

	configv1 "github.com/sluicegate/sluice/proto/gen/sluice/config/v1"
)

// A name that was read before gives what reading it gives, for each mask, also when
// no more is remembered.
func TestNames(t *testing.T) {
	e := newPolicy(t, &configv1.Inspect{Rules: "Include @sluice/personal.conf"}).engine
	s := borrow(e)
	defer s.put()
	texts := []string{"", "llama", "text_input", "ignore_previous_instructions", "ann@example.com", strings.Repeat("x", longestName+1)}
	for range maxNames {
		texts = append(texts, "tensor "+strings.Repeat("y", len(texts)%40)+strings.Repeat("z", len(texts)/40))
	}
	for _, mask := range []uint64{e.request.mask, phraseMask, 0} {
		for range 2 {
			for _, text := range texts {
				s.name(e.names, []byte(text), mask)
				found := s.found
				if s.whole([]byte(text), mask); s.found != found {
					t.Errorf("%q, %#x: %#x, was %#x", text, mask, s.found, found)
				}
			}
		}
	}
	if n := len(*e.names.entries.Load()); n != maxNames {
		t.Errorf("%d names are remembered", n)
	}
}

func TestNamesAllocateNothing(t *testing.T) {
	e := newPolicy(t, nil).engine
	s := borrow(e)
	defer s.put()
	text := []byte("text_input")
	s.name(e.names, text, phraseMask)
	if n := testing.AllocsPerRun(100, func() { s.name(e.names, text, phraseMask) }); n != 0 {
		t.Errorf("%v allocations", n)
	}
}
