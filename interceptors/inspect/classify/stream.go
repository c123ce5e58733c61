package classify

// Stream scores a text that comes in pieces. They may be cut anywhere, also
// within a rune: the score is that of the whole, but for what is written
// backwards or with letters moved: only Score reads that twice. The zero value is ready. It is
// not safe for concurrent use.
type Stream struct{ s scanner }

// Reset forgets the text.
func (t *Stream) Reset() { t.s = scanner{} }

// Write takes the next piece of a normalised text. It keeps nothing of it.
func (t *Stream) Write(normalised []byte) {
	t.s.use(shipped())
	t.s.write(normalised)
}

// Score judges the text so far, for which rules of these classes fired, as if it
// ended here. It may go on.
func (t *Stream) Score(hits Classes) float32 {
	s := t.s
	s.use(shipped())
	s.end()
	return s.sums.model.Calibrate(s.logit(hits))
}

func (s *scanner) use(m *Model) { s.words, s.sums.model = m.words, m }
