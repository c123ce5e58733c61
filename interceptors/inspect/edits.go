package inspect

import (
	"bytes"
	"math"
)

// goOn sees whether what is replaced ends with this character.
func (f *flow) goOn(c byte, class uint8, at, next int64) {
	switch {
	case f.cutKind != kindPrivateKey:
		if class == foreign || !tokenChar(c) && c != '.' && c != '=' && c != '~' {
			f.edit(f.cutFrom, at, "", true)
			f.cutFrom = -1
		}
	case c == '-':
		line := f.text(next-64, next)
		if bytes.Contains(line, []byte("-----END ")) && bytes.HasSuffix(line, []byte("-----")) {
			f.edit(f.cutFrom, next, "", true)
			f.cutFrom = -1
		}
	}
}

// edit has a part of the text replaced, where it was not delivered yet. on says that
// it goes on with what was replaced before.
func (f *flow) edit(from, to int64, with string, on bool) {
	for i := range f.pieces {
		p := &f.pieces[i]
		a, b := max(from, p.start), min(to, p.end)
		if a < b {
			f.part.cuts = append(f.part.cuts, cut{p.response, p.field, int(a - p.start), int(b - p.start), with, on})
			with, on = "", true
		}
	}
}

// truncate has all that follows a place replaced.
func (f *flow) truncate(from int64, with string) {
	f.edit(from, f.pieces[len(f.pieces)-1].end, with, false)
	f.ended, f.cutFrom = true, -1
}

// first is the first response that must not be delivered yet, as far as this output
// is concerned.
func (f *flow) first() int {
	from, n := f.held(), 0
	for n < len(f.pieces) && f.pieces[n].end <= from {
		n++
	}
	if n > 0 {
		f.pieces = f.pieces[:copy(f.pieces, f.pieces[n:])]
	}
	if len(f.pieces) == 0 {
		return math.MaxInt
	}
	return f.pieces[0].response
}

// text is what is still there of the text from one place to another.
func (f *flow) text(from, to int64) []byte {
	return f.buf[max(0, from-f.base):max(0, to-f.base)]
}

// flush leaves out what is to be left out so far.
func (f *flow) flush() {
	if f.cutFrom >= 0 {
		f.edit(f.cutFrom, f.pos, "", true)
		f.cutFrom = f.pos
	}
}

// trim forgets text that nothing looks back at.
func (f *flow) trim() {
	keep := f.segment.at
	switch {
	case f.ended:
		keep = f.pos
	case !f.plan.segments:
		keep = f.pos
	}
	if len(f.windows) > 0 {
		keep = min(keep, f.windows[0])
	}
	if n := keep - lookBack - f.base; n > 1024 {
		f.buf = f.buf[:copy(f.buf, f.buf[n:])]
		f.base += n
	}
}
