package inspect

// nationalID reports whether digits, written in a shape, are a national id that
// proves itself. An id without a check of its own is none here.
func nationalID(d []byte, shape string) bool {
	switch shape {
	case "3.3.3-2": // CPF, Brazil
		return brazil(d, 9)
	case "2.3.3/4-2": // CNPJ, Brazil
		return brazil(d, 12)
	case "4 4 4": // Aadhaar, India
		return d[0] >= 2 && verhoeff(d)
	case "6-4": // personnummer, Sweden
		return monthAndDay(d[2:6]) && luhn(d)
	case "8-4":
		return monthAndDay(d[4:8]) && luhn(d[2:])
	case "6-7": // South Korea
		return monthAndDay(d[2:6]) && d[6] >= 1 && d[6] <= 8 && korea(d)
	case "2.2.2-3.2", "2 2 2 3 2": // rijksregisternummer, Belgium
		return monthAndDay(d[2:6]) && belgium(d)
	case "3 3 3", "3-3-3": // SIN, Canada
		return d[0] != 0 && d[0] != 8 && luhn(d)
	case "2 3 3 3": // Steuer-ID, Germany
		return d[0] != 0 && mod1110(d)
	case "3 3 4": // NHS, United Kingdom
		return d[0] >= 4 && d[0] != 5 && weighted(d[:9], 10)%11 == (11-int(d[9]))%11
	case "1 2 2 2 3 3 2":
		return france(d)
	case "":
		switch len(d) {
		case 11:
			return pesel(d) || turkey(d)
		case 15:
			return france(d)
		case 18:
			return china(d, d[17])
		}
	}
	return false
}

// weighted is the sum of digits times weights that fall from first on.
func weighted(d []byte, first int) (sum int) {
	for i, v := range d {
		sum += int(v) * (first - i)
	}
	return sum
}

// brazil checks the two digits after the first n, whose weights run from 2 to 9
// (to 11 for a person) from the right.
func brazil(d []byte, n int) bool {
	same := true
	for _, v := range d {
		same = same && v == d[0]
	}
	top := 9
	if n == 9 {
		top = 11
	}
	for m := n; m < n+2; m++ {
		sum, w := 0, 2
		for i := m - 1; i >= 0; i-- {
			sum += int(d[i]) * w
			if w++; w > top {
				w = 2
			}
		}
		if (11-sum%11)%11%10 != int(d[m]) {
			return false
		}
	}
	return !same
}

// Verhoeff's tables: the group of order ten, and the permutation.
var (
	verhoeffD = [10]string{"0123456789", "1234067895", "2340178956", "3401289567", "4012395678", "5987604321", "6598710432", "7659821043", "8765932104", "9876543210"}
	verhoeffP = [8]string{"0123456789", "1576283094", "5803796142", "8916043527", "9453126870", "4286573901", "2793806415", "7046913258"}
)

func verhoeff(d []byte) bool {
	c := byte(0)
	for i := range d {
		c = verhoeffD[c][verhoeffP[i%8][d[len(d)-1-i]]-'0'] - '0'
	}
	return c == 0
}

// monthAndDay checks a month and a day, two digits each.
func monthAndDay(d []byte) bool {
	m, day := int(d[0])*10+int(d[1]), int(d[2])*10+int(d[3])
	return m >= 1 && m <= 12 && day >= 1 && day <= 31
}

func korea(d []byte) bool {
	sum := 0
	for i, v := range d[:12] {
		sum += int(v) * (2 + i%8)
	}
	return (11-sum%11)%10 == int(d[12])
}

func value(d []byte) (v uint64) {
	for _, c := range d {
		v = v*10 + uint64(c)
	}
	return v
}

func belgium(d []byte) bool {
	n, check := value(d[:9]), value(d[9:])
	return 97-n%97 == check || 97-(2_000_000_000+n)%97 == check
}

func france(d []byte) bool {
	month := int(d[3])*10 + int(d[4])
	return (d[0] == 1 || d[0] == 2) && month >= 1 && (month <= 12 || month >= 20) && 97-value(d[:13])%97 == value(d[13:])
}

// mod1110 is ISO 7064's MOD 11,10.
func mod1110(d []byte) bool {
	p := 10
	for _, v := range d[:len(d)-1] {
		if p = (p + int(v)) % 10; p == 0 {
			p = 10
		}
		p = p * 2 % 11
	}
	return (11-p)%10 == int(d[len(d)-1])
}

func pesel(d []byte) bool {
	sum := 0
	for i, w := range []byte{1, 3, 7, 9, 1, 3, 7, 9, 1, 3, 1} {
		sum += int(d[i] * w)
	}
	month, day := (int(d[2])*10+int(d[3]))%20, int(d[4])*10+int(d[5])
	return sum%10 == 0 && month >= 1 && month <= 12 && day >= 1 && day <= 31
}

func turkey(d []byte) bool {
	odd := int(d[0]) + int(d[2]) + int(d[4]) + int(d[6]) + int(d[8])
	even := int(d[1]) + int(d[3]) + int(d[5]) + int(d[7])
	return d[0] != 0 && (odd*7-even+100)%10 == int(d[9]) && (odd+even+int(d[9]))%10 == int(d[10])
}

// china checks 17 digits by ISO 7064's MOD 11-2; the check may be 10, written X.
func china(d []byte, check byte) bool {
	sum, w := 0, 1
	for i := 16; i >= 0; i-- {
		w = w * 2 % 11
		sum += int(d[i]) * w
	}
	year := value(d[6:10])
	return year >= 1900 && year < 2100 && monthAndDay(d[10:14]) && (12-sum%11)%11 == int(check)
}

// findLetteredIDs finds the ids that have letters: Spain's, Italy's, Finland's,
// and China's that end in X.
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
		if w := text[i:end]; digits >= 7 && letters > 0 && len(w) <= 18 && (spain(w) || italy(w) || finland(w) || len(w) == 18 && digits == 17 && chinaX(w)) {
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
