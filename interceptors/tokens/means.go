package tokens

import "bytes"

// Means reports whether a text is what token ids say. Added tokens before it, such
// as that for the beginning of a text, and the space that some tokenizers put there need not
// be in the text.
func (t *Tokenizer) Means(ids []int64, text []byte) bool {
	said, err := t.Decode(ids, nil)
	if err != nil {
		return false
	}
	for _, id := range ids {
		if bytes.Equal(said, text) {
			return true
		}
		first := t.byID[id]
		if n, added, _ := t.added.at([]byte(first)); added == none || n != len(first) {
			break
		}
		said = said[len(first):]
	}
	if t.prefix != noPrefix {
		said = bytes.TrimPrefix(said, []byte{' '})
	}
	return bytes.Equal(said, text)
}
