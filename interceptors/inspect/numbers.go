package inspect

import "bytes"

// number is a run of digits in groups, with what separates them.
type number struct {
	start   int
	digits  [20]byte // their values
	n       int
	groups  [20]group
	written [2 * mostGroups]byte // of the first ones, before each what separates it: their digits, as a digit
	count   int
	plus    bool // a plus sign, or two zeros of an exit code, come before it
}

type group struct {
	end  int  // in the text
	upTo int  // digits until here
	sep  byte // before the group: 0 for the first one
}

// readNumber reads the number that begins at i, a digit, or a bracket or a plus
// sign before one.
func readNumber(text []byte, i int) (num number) {
	num.start = i
	sep := byte(0)
	if text[i] == '+' {
		num.plus = true
		i++
	}
	if i < len(text) && text[i] == '(' {
		i++
	}
	for i < len(text) && digit(text[i]) {
		from := num.n
		for i < len(text) && digit(text[i]) && num.n < len(num.digits) {
			num.digits[num.n] = text[i] - '0'
			num.n++
			i++
		}
		if i < len(text) && digit(text[i]) { // too long: not the group
			num.n = from
			return num
		}
		num.groups[num.count] = group{end: i, upTo: num.n, sep: sep}
		if num.count < mostGroups {
			num.written[2*num.count], num.written[2*num.count+1] = sep, byte('0'+num.n-from)
		}
		num.count++
		if num.n == len(num.digits) || i+1 >= len(text) {
			return num
		}
		sep = text[i]
		switch {
		case sep == ')' && (text[i+1] == ' ' || text[i+1] == '-'):
			i++
		case sep == ' ' && text[i+1] == '(', sep == ' ' && text[i+1] == '-' && i+2 < len(text) && text[i+2] == ' ':
			i++
		case sep != ' ' && sep != '-' && sep != '.' && sep != '/' && sep != ')':
			return num
		}
		i++
	}
	return num
}

// shape is how the first count groups are written: "3-2-4".
func (num *number) shape(count int) string { return string(num.written[1 : 2*count]) }

// findNumbers finds cards, phones, addresses and the ids that are numbers. What
// can be checked is checked: a card by Luhn's digit, an id by its own.
//
// What is found already, in order, is passed over.
func findNumbers(dst []span, text []byte, mask uint64, taken []span) []span {
	for i := 0; i < len(text); i++ {
		c := text[i]
		if !digit(c) && c != '+' && c != '(' {
			continue
		}
		if !digit(c) && (i+1 == len(text) || !digit(text[i+1]) && text[i+1] != '(') ||
			i > 0 && (alnum(text[i-1]) || text[i-1] == '_' || digit(c) && (text[i-1] == '.' || text[i-1] == '+') && i > 1 && alnum(text[i-2])) {
			for digit(c) && i+1 < len(text) && alnum(text[i+1]) { // of a word
				i++
			}
			continue
		}
		for len(taken) > 0 && taken[0].end <= i {
			taken = taken[1:]
		}
		if len(taken) > 0 && taken[0].start <= i {
			i = taken[0].end - 1
			continue
		}
		num := readNumber(text, i)
		if num.count == 0 {
			for i+1 < len(text) && digit(text[i+1]) {
				i++
			}
			continue
		}
		next := num.groups[0].end - 1
		// The longest run of groups that is something: a number may follow it.
		for k := num.count; k > 0; k-- {
			end := num.groups[k-1].end
			if end < len(text) && (letter(text[end]) || text[end] == '_') && !extension(text[end:]) {
				continue
			}
			if kind, to := num.kind(text, k, mask); kind >= 0 {
				dst = append(dst, span{num.start, to, kind})
				next = to - 1
				break
			}
		}
		i = next
	}
	return dst
}

// mostGroups is how many groups an id or a telephone number may have.
const mostGroups = 7

// kind tells what the first k groups are, and where that ends; -1 if nothing.
func (num *number) kind(text []byte, k int, mask uint64) (kind, end int) {
	end = num.groups[k-1].end
	d := num.digits[:num.groups[k-1].upTo]
	if len(d) < 4 {
		return -1, end
	}
	before := byte(0)
	if num.start > 0 {
		before = text[num.start-1]
	}
	plain := !num.plus && text[num.start] != '(' && before != '-' && before != '.'
	switch {
	case mask&(1<<kindIP) != 0 && plain && k == 4 && num.address(text):
		return kindIP, end
	case mask&(1<<kindCard) != 0 && plain && len(d) >= 12 && (cardPrefix(d) || introduced(text, num.start, 3, cardWords)) && num.dashed(k) && luhn(d):
		return kindCard, end
	case mask&(1<<kindBirth) != 0 && plain && k == 3 && num.date() && introduced(text, num.start, 4, birthWords):
		return kindBirth, end
	case len(d) < 7:
		return -1, end
	}
	if k > mostGroups {
		return -1, end
	}
	shape := "" // of one group
	if k > 1 {
		shape = num.shape(k)
	}
	switch {
	case mask&(1<<kindSSN) != 0 && plain && (shape == "3-2-4" || shape == "3 2 4") && socialSecurity(d):
		return kindSSN, end
	case mask&(1<<kindID) != 0 && plain && (nationalID(d, shape) || num.dashed(k) && introduced(text, num.start, 5, documentWords)):
		return kindID, end
	case mask&(1<<kindPhone) != 0 && num.phone(text, d, shape, k):
		return kindPhone, end + extensionLength(text[end:])
	}
	return -1, end
}

// dashed reports whether spaces and hyphens alone separate the groups.
func (num *number) dashed(k int) bool {
	for _, g := range num.groups[1:k] {
		if g.sep != ' ' && g.sep != '-' {
			return false
		}
	}
	return true
}

// address reports whether it is an IPv4 address, but not one that stands for no
// particular machine (0, 127 and from 240 on) or a version's like.
func (num *number) address(text []byte) bool {
	at, end := 0, num.groups[3].end
	for i, g := range num.groups[:4] {
		d := num.digits[at:g.upTo]
		v := 0
		for _, c := range d {
			v = v*10 + int(c)
		}
		if len(d) > 3 || v > 255 || i > 0 && g.sep != '.' || len(d) > 1 && d[0] == 0 || i == 0 && (v == 0 || v == 127 || v >= 240) {
			return false
		}
		at = g.upTo
	}
	return num.groups[3].upTo >= 5 && (end+1 >= len(text) || text[end] != '.' || !digit(text[end+1]))
}

// date reports whether the first three groups are a date in numbers.
func (num *number) date() bool {
	var v [3]int
	at := 0
	for i, g := range num.groups[:3] {
		if i > 0 && (g.sep != num.groups[1].sep || g.sep != '/' && g.sep != '-' && g.sep != '.') || g.upTo-at > 4 {
			return false
		}
		v[i] = int(value(num.digits[at:g.upTo]))
		at = g.upTo
	}
	if v[0] > 31 { // the year comes first
		v[0], v[2] = v[2], v[0]
	}
	return v[0] >= 1 && v[1] >= 1 && v[0] <= 31 && v[1] <= 31 && min(v[0], v[1]) <= 12 && (v[2] < 100 || v[2] >= 1900 && v[2] < 2100)
}

// cardPrefix knows the ranges and lengths of the large issuers (ISO/IEC 7812).
func cardPrefix(d []byte) bool {
	four := int(d[0])*1000 + int(d[1])*100 + int(d[2])*10 + int(d[3])
	switch {
	case d[0] == 4:
		return len(d) == 13 || len(d) == 16 || len(d) == 19
	case four >= 5100 && four < 5600, four >= 2221 && four <= 2720:
		return len(d) == 16
	case four/100 == 34, four/100 == 37, four == 2131, four == 1800:
		return len(d) == 15
	case four == 6011, four/100 == 65, four >= 6440 && four < 6500, four/100 == 62, four >= 3528 && four < 3590:
		return len(d) >= 16
	case four >= 3000 && four < 3060, four/100 == 36, four/100 == 38, four/100 == 39:
		return len(d) == 14
	case four == 5018, four == 5020, four == 5038, four == 5893, four == 6304, four == 6759, four >= 6761 && four <= 6763: // Maestro
		return true
	case four/100 == 50, four >= 5600 && four < 5900, four/100 == 67:
		return len(d) >= 13
	}
	return false
}

func luhn(d []byte) bool {
	sum := 0
	for i := range d {
		v := int(d[len(d)-1-i])
		if i%2 == 1 {
			if v *= 2; v > 9 {
				v -= 9
			}
		}
		sum += v
	}
	return sum%10 == 0
}

func socialSecurity(d []byte) bool {
	area := int(d[0])*100 + int(d[1])*10 + int(d[2])
	return area != 0 && area != 666 && d[0] != 9 && d[3]|d[4] != 0 && d[5]|d[6]|d[7]|d[8] != 0
}

// phone reports whether it is written as telephone numbers are: with a country
// code, as in North America, with the trunk's zero, or after a word that says so.
func (num *number) phone(text, d []byte, shape string, k int) bool {
	n := len(d)
	if n < 7 || n > 15 {
		return false
	}
	if num.plus {
		return n >= 8 && d[0] != 0
	}
	if i := num.start; i > 1 && digit(text[i-2]) && text[i-1] != '\n' && text[i] != '(' {
		return false // the rest of a longer number
	}
	us := func(d []byte) bool { return d[0] >= 2 && d[3] >= 2 }
	switch shape {
	case "3-3-4", "3.3.4", "3)3-4", "3)3 4", "3)3.4", "3 3-4", "3 3 4", "3)7", "3-7":
		if us(d) {
			return true
		}
	case "1-3-3-4", "1.3.3.4", "1 3 3 4", "1 3)3-4", "1-3)3-4", "1 3-3-4":
		if d[0] == 1 && us(d[1:]) {
			return true
		}
	case "3-3-3-4", "3 3 3 4":
		if d[0] == 0 && d[1] == 0 {
			return true
		}
	}
	if text[num.start] == '(' && n >= 9 && k > 1 {
		return true
	}
	dated := len(shape) >= 5 && (shape[:5] == "2.2.4" || shape[:5] == "2-2-4" || shape[:5] == "2/2/4" || shape[:5] == "2 2 4" || shape[:5] == "4-2-2" || shape[:5] == "4/2/2")
	if dated || bytes.IndexByte([]byte(shape), '/') >= 0 {
		return false
	}
	if d[0] == 0 && d[1] != 0 && n >= 9 && n <= 11 && k > 1 {
		return true
	}
	return n <= 13 && introduced(text, num.start, 3, phoneWords)
}

// extension reports whether text begins with an extension, as in "x769".
func extension(text []byte) bool { return extensionLength(text) > 0 }

func extensionLength(text []byte) int {
	i := 0
	for i < len(text) && i < 2 && text[i] == ' ' {
		i++
	}
	switch {
	case bytes.HasPrefix(text[i:], []byte("ext. ")):
		i += 5
	case bytes.HasPrefix(text[i:], []byte("ext ")), bytes.HasPrefix(text[i:], []byte("ext.")):
		i += 4
	case bytes.HasPrefix(text[i:], []byte("x")):
		i++
	default:
		return 0
	}
	from := i
	for i < len(text) && i-from < 6 && digit(text[i]) {
		i++
	}
	if i == from || i < len(text) && alnum(text[i]) {
		return 0
	}
	return i
}
