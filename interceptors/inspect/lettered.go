package inspect

import "bytes"

// findLetteredIDs finds the ids that have letters: Spain's, Italy's, Finland's, Mexico's,
// Singapore's, Taiwan's, and China's that end in X. What has no check of its own, as the
// numbers of passports and licences, is one after a word that says so.
func findLetteredIDs(dst []span, text []byte) []span {
	for i := 0; i < len(text); {
		if !alnum(text[i]) {
			i++
			continue
		}
		end, letters, digits := i, 0, 0
		for end < len(text) && (alnum(text[end]) || (text[end] == '-' || text[end] == '+') && end+1 < len(text) && alnum(text[end+1])) {
			if digit(text[end]) {
				digits++
			} else {
				letters++
			}
			end++
		}
		if w := text[i:end]; letters > 0 && (digits >= 7 && len(w) <= 18 && (spain(w) || italy(w) || finland(w) || singapore(w) || taiwan(w) || curp(w) || len(w) == 18 && digits == 17 && chinaX(w)) ||
			digits >= 5 && len(w) >= 6 && len(w) <= 20 && introduced(text, i, 5, documentWords)) {
			dst = append(dst, span{i, end, kindID})
		}
		i = end
	}
	return dst
}

// numbers are the values of a text of digits; nil if it has anything else.
func numbers(w []byte) []byte {
	d := make([]byte, len(w))
	for i, c := range w {
		if !digit(c) {
			return nil
		}
		d[i] = c - '0'
	}
	return d
}

// spain checks a DNI, eight digits and a letter, or a NIE, which begins with X,
// Y or Z.
func spain(w []byte) bool {
	last := w[len(w)-1] &^ 0x20
	body := w[:len(w)-1]
	if n := len(body); n > 1 && body[n-1] == '-' {
		body = body[:n-1]
	}
	if len(body) != 8 {
		return false
	}
	d := numbers(body[1:])
	if d == nil {
		return false
	}
	first := body[0]
	switch {
	case digit(first):
		first -= '0'
	case first|0x20 >= 'x' && first|0x20 <= 'z':
		first = first | 0x20 - 'x'
	default:
		return false
	}
	return "TRWAGMYFPDXBNJZSQVHLCKE"[(uint64(first)*10_000_000+value(d))%23] == last
}

// italy checks a codice fiscale.
func italy(w []byte) bool {
	if len(w) != 16 {
		return false
	}
	odd := [26]int{1, 0, 5, 7, 9, 13, 15, 17, 19, 21, 2, 4, 18, 20, 11, 3, 6, 8, 12, 14, 16, 10, 22, 25, 24, 23}
	sum := 0
	for i, c := range w[:15] {
		if digit(c) == (i < 6 || i == 8 || i == 11) || !alnum(c) {
			return false
		}
		v := int(c - '0')
		if letter(c) {
			v = int(c&^0x20 - 'A')
		}
		if i%2 == 0 {
			v = odd[v]
		}
		sum += v
	}
	return w[15]&^0x20 == byte('A'+sum%26)
}

// finland checks a henkilötunnus: "131052-308T".
func finland(w []byte) bool {
	if len(w) != 11 || w[6] != '-' && w[6] != '+' && (w[6] < 'A' || w[6] > 'F') {
		return false
	}
	d := numbers(append(append(make([]byte, 0, 9), w[:6]...), w[7:10]...))
	if d == nil || !monthAndDay([]byte{d[2], d[3], d[0], d[1]}) {
		return false
	}
	return "0123456789ABCDEFHJKLMNPRSTUVWXY"[value(d)%31] == w[10]
}

func chinaX(w []byte) bool {
	d := numbers(w[:17])
	return d != nil && w[17]|0x20 == 'x' && china(d, 10)
}

// singapore checks an NRIC or FIN: "S1234567D".
func singapore(w []byte) bool {
	if len(w) != 9 {
		return false
	}
	d := numbers(w[1:8])
	if d == nil {
		return false
	}
	n := sum(d, "2765432")
	switch first, last := w[0]&^0x20, w[8]&^0x20; first {
	case 'S':
		return "JZIHGFEDCBA"[n%11] == last
	case 'T':
		return "JZIHGFEDCBA"[(n+4)%11] == last
	case 'F':
		return "XWUTRQPNMLK"[n%11] == last
	case 'G':
		return "XWUTRQPNMLK"[(n+4)%11] == last
	}
	return false
}

// taiwan checks a letter, 1 or 2, and eight digits: "A123456789".
func taiwan(w []byte) bool {
	if len(w) != 10 || !letter(w[0]) || w[1] != '1' && w[1] != '2' {
		return false
	}
	d := numbers(w[1:])
	if d == nil {
		return false
	}
	region := 10 + bytes.IndexByte([]byte("ABCDEFGHJKLMNPQRSTUVXYWZIO"), w[0]&^0x20)
	return (region/10+region%10*9+sum(d, "876543211"))%10 == 0
}

// curp checks the one of Mexico: letters, a date, letters, and a check digit.
func curp(w []byte) bool {
	if len(w) != 18 || !digit(w[17]) {
		return false
	}
	sum := 0
	for i, c := range w[:17] {
		if digit(c) != (i >= 4 && i < 10) && i != 16 || !alnum(c) {
			return false
		}
		v := int(c - '0')
		if letter(c) {
			if v = int(c&^0x20-'A') + 10; c&^0x20 > 'N' {
				v++ // after the N with a tilde
			}
		}
		sum += v * (18 - i)
	}
	d := numbers(w[6:10])
	return monthAndDay(d) && (10-sum%10)%10 == int(w[17]-'0')
}
