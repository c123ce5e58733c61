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
	case "3.4.4.2": // AHV, Switzerland
		return value(d[:3]) == 756 && sum(d, "1313131313131")%10 == 0
	case "4 6": // SVNR, Austria
		return dayAndMonth(d[4:8]) && sum(d, "3790584216")%11 == int(d[3])
	case "6/4": // rodné číslo, Czechia and Slovakia: women's months have 50 more, some 20
		month := int(d[2]*10 + d[3])
		return monthAndDay([]byte{byte(month % 50 % 20 / 10), byte(month % 50 % 20 % 10), d[4], d[5]}) && value(d)%11 == 0
	case "6 5": // fødselsnummer, Norway
		return norway(d)
	case "6-5": // personas kods, Latvia
		return dayAndMonth(d[:4]) && (1101-sum(d, "1637905842")-10*int(d[5]))%11 == int(d[10])
	case "2-8-1": // CUIT, Argentina
		return (11-sum(d, "5432765432")%11)%11 == int(d[10])
	case "2.3.3-1": // RUT, Chile
		return (11-sum(d, "32765432")%11)%11 == int(d[8])
	case "1-4-5-2-1": // Thailand
		return (11-weighted(d[:12], 13)%11)%10 == int(d[12])
	case "":
		switch len(d) {
		case 11:
			return pesel(d) || turkey(d) || norway(d) || baltic(d) || dayAndMonth(d[:4]) && luhn(d) // AMKA, Greece
		case 13:
			return romania(d) || monthAndDay(d[2:6]) && d[10] <= 1 && luhn(d) // South Africa
		case 15:
			return france(d)
		case 18:
			return china(d, d[17])
		}
	}
	return false
}

// sum is that of the digits times the weights, single digits; those without one do not count.
func sum(d []byte, weights string) (sum int) {
	for i := range weights {
		sum += int(d[i]) * int(weights[i]-'0')
	}
	return sum
}

func dayAndMonth(d []byte) bool { return monthAndDay([]byte{d[2], d[3], d[0], d[1]}) }

// norway checks a day, a month and two check digits; ids that are given for a while have
// 4 more in the first digit or the third one.
func norway(d []byte) bool {
	day, month := d[0], d[2]
	if day > 3 {
		day -= 4
	}
	if month > 3 {
		month -= 4
	}
	return dayAndMonth([]byte{day, d[1], month, d[3]}) && sum(d, "3761894521")%11 == 0 && sum(d, "54327654321")%11 == 0
}

// baltic checks an isikukood of Estonia or Lithuania.
func baltic(d []byte) bool {
	check := sum(d, "1234567891") % 11
	if check == 10 {
		check = sum(d, "3456789123") % 11 % 10
	}
	return d[0] >= 1 && d[0] <= 6 && monthAndDay(d[3:7]) && check == int(d[10])
}

func romania(d []byte) bool {
	check := sum(d, "279146358279") % 11
	if check == 10 {
		check = 1
	}
	return d[0] >= 1 && d[0] <= 8 && monthAndDay(d[3:7]) && check == int(d[12])
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
