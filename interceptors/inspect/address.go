package inspect

import (
	"bytes"
	"strings"
)

// Words of addresses, in lower case without dots.
var (
	streetFirst = vocabularyOf("rua rúa rue via viale vicolo piazza piazzetta corso calle avenida avda carrer plaza paseo travessa praça ulica ul")
	streetLast  = vocabularyOf("street st road rd avenue ave drive dr lane ln boulevard blvd court ct terrace crescent parkway pkwy")
	streetEnds  = strings.Fields("straße strasse straat gasse platz allee gata gatan vägen vej vænget veien katu kuja laan gracht utca weg tänav")
	particles   = vocabularyOf("de del do da dos das di della la le les du des of the van von der den")
	// addressWords say that an address in the English order is somebody's: such are those of
	// houses in the news and in stories, too.
	addressWords = vocabularyOf("address live lives lived living reside resides residing home deliver delivered ship shipped moved mail billing meet taxi")
	posts        = vocabularyOf("psc unit cmr")
)

// placeWord is a word of an address.
type placeWord struct{ start, end int }

func (p placeWord) lower(text []byte) string {
	return string(bytes.ReplaceAll(bytes.ToLower(text[p.start:p.end]), []byte("."), nil))
}

// capital reports whether a word begins as names do, or is a number.
func (p placeWord) capital(text []byte) bool {
	c := text[p.start]
	return c >= 'A' && c <= 'Z' || c >= 0x80 || digit(c)
}

func addressChar(c byte) bool { return alnum(c) || c >= 0x80 || c == '.' || c == '\'' || c == '-' }

// mostWords of an address are looked at, of wordLength bytes at most. Chosen.
const mostWords, wordLength = 6, 32

// before is the word before a place; lines is how many ends of lines may lie between.
func before(text []byte, at, least int, lines *int) (p placeWord, ok bool) {
	i := at
	for i > least && at-i < 4 && (text[i-1] == ' ' || text[i-1] == ',' || text[i-1] == '\n') {
		if i--; text[i] == '\n' {
			*lines--
		}
	}
	end := i
	for i > least && end-i < wordLength && addressChar(text[i-1]) {
		i--
	}
	return placeWord{i, end}, i < end && end < at && *lines >= 0
}

// findAddresses finds addresses of houses and post boxes by their numbers: "12 High
// Street", "Kesk 53, Suite 343", "Rua Ana Caciola 1159", "Gartenstraße 7", "PSC 0272, Box
// 1651", "APO AE 83700". A number that only follows a name is none.
func findAddresses(dst []span, text []byte) []span {
	least := 0
	for i := 0; i < len(text); i++ {
		if !digit(text[i]) {
			continue
		}
		start := i
		for i < len(text) && digit(text[i]) {
			i++
		}
		end := i
		if end < len(text) && letter(text[end]) { // 12a
			end++
		}
		if i-start > 5 || start > 0 && addressChar(text[start-1]) || end < len(text) && (alnum(text[end]) || text[end] >= 0x80) {
			continue
		}
		if from, to := address(text, start, end, least); to > 0 {
			dst = append(dst, span{from, to, kindAddress})
			least, i = to, to-1
		}
	}
	return dst
}

// address is where the address of a number begins and ends; it ends at 0 if there is none.
func address(text []byte, start, end, least int) (int, int) {
	lines := 1
	if w, ok := before(text, start, least, &lines); ok {
		switch word := w.lower(text); word {
		case "apt", "apartment", "suite", "unit":
			switch at := house(text, w.start, least); {
			case at >= 0:
				return at, end
			case strings.HasPrefix(word, "ap"):
				return w.start, end
			}
		case "box":
			if post, ok := before(text, w.start, least, &lines); ok {
				if post.lower(text) == "po" {
					return post.start, end
				}
				if unit, ok := before(text, post.start, least, &lines); ok && posts[unit.lower(text)] && digit(text[post.start]) {
					return unit.start, end
				}
			}
		case "ae", "ap", "aa":
			if post, ok := before(text, w.start, least, &lines); ok && end-start == 5 {
				switch post.lower(text) {
				case "apo", "fpo", "dpo":
					return post.start, end
				}
			}
		default:
			if w.capital(text) && !digit(text[w.start]) && text[start-1] == ' ' && endsAsStreet(word) {
				return w.start, end
			}
		}
		if at := street(text, start, least); at >= 0 {
			return at, end
		}
	}
	if !introduced(text, start, 5, addressWords) {
		return 0, 0
	}
	return start, ahead(text, end)
}

func endsAsStreet(word string) bool {
	for _, s := range streetEnds {
		if len(word) > len(s)+2 && strings.HasSuffix(word, s) {
			return true
		}
	}
	return false
}

// street is where the kind of street is that a number follows, as in "Rua Ana Caciola 9"; -1
// if it follows none.
func street(text []byte, at, least int) int {
	lines := 0
	for n := range mostWords {
		w, ok := before(text, at, least, &lines)
		if !ok || bytes.IndexByte(text[w.end:at], ',') >= 0 {
			return -1
		}
		word := w.lower(text)
		if n > 0 && streetFirst[word] && (w.capital(text) || word == "rue") {
			return w.start
		}
		if !w.capital(text) && !particles[word] || digit(text[w.start]) {
			return -1
		}
		at = w.start
	}
	return -1
}

// house is where the number of a house is, with names alone between it and a place; -1 if
// there is none.
func house(text []byte, at, least int) int {
	lines, found := 1, -1
	for range mostWords {
		w, ok := before(text, at, least, &lines)
		if !ok || !w.capital(text) && !particles[w.lower(text)] {
			break
		}
		if digit(text[w.start]) {
			found = w.start
		}
		at = w.start
	}
	return found
}

// ahead is where an address ends whose number ends at a place, as in "12 High Street": up to
// three names and the kind of street; 0 if there is none.
func ahead(text []byte, at int) int {
	for n := range 4 {
		if at >= len(text) || text[at] != ' ' {
			return 0
		}
		w := placeWord{at + 1, at + 1}
		for w.end < len(text) && w.end-w.start < wordLength && addressChar(text[w.end]) {
			w.end++
		}
		if w.start == w.end || !w.capital(text) {
			return 0
		}
		if n > 0 && streetLast[w.lower(text)] {
			if text[w.end-1] == '.' {
				w.end--
			}
			return w.end
		}
		at = w.end
	}
	return 0
}
