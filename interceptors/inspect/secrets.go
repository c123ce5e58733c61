package inspect

import (
	"bytes"
	"math"
	"strings"
)

// format is how a vendor writes its keys: what they begin with, and how much
// follows.
type format struct {
	prefix      string
	least, most int
	dots        bool // dots, equals signs and tildes are part of it
	kind        int
}

// formats are those of well-known vendors, by the first byte of the prefix.
// The lengths are those that the vendors document or issue, with room to grow.
var formats = func() (table [256][]format) {
	add := func(kind int, dots bool, least, most int, prefixes string) {
		for _, p := range strings.Fields(prefixes) {
			table[p[0]] = append(table[p[0]], format{p, least, most, dots, kind})
		}
	}
	add(kindAWS, false, 16, 16, "AKIA ASIA ABIA ACCA")
	add(kindAWS, true, 60, 400, "ABSK bedrock-api-key-")
	add(kindGitHub, false, 36, 255, "ghp_ gho_ ghu_ ghs_ ghr_ github_pat_")
	add(kindToken, true, 20, 400, "glpat- gldt- glrt- glcbt- glptt- glft- glagent- glimt- gloas- glffct- glsoat- GR1348941 xoxe. xapp- sk-ant- sk-proj- sk-svcacct- sk-admin-")
	add(kindToken, false, 20, 255, "xoxb- xoxp- xoxa- xoxr- xoxs- xoxe- sk_live_ sk_test_ sk_prod_ rk_live_ rk_test_ rk_prod_ whsec_ "+
		"AIza GOCSPX- hf_ api_org_ npm_ rubygems_ dckr_pat_ dckr_oat_ dop_v1_ doo_v1_ dor_v1_ shpat_ shpss_ shpca_ shppa_ xkeysib- "+
		"sq0atp- sq0csp- lin_api_ ntn_ PMAK- pul- rdme_ sgp_ NRAK- NRJS- NRII- tk-us- fio-u- sntrys_ sntryu_ squ_ sqp_ sqa_ "+
		"shippo_live_ shippo_test_ EZAK EZTK duffel_test_ duffel_live_ ico- s-s4t2ud- s-s4t2af- pplx- r8_ gsk_ xai- tvly- AKCp cmVmdGtu "+
		"AGE-SECRET-KEY-1 ops_eyJ CLOJARS_ figd_ pnu_ tskey- tfp_ CFPAT- ATATT3 ATCTT3 HRKU- FLWSECK FLWPUBK "+
		"EAACEdEose0cBA EAAC EAAA1 AQVN lsv2_pt_ lsv2_sk_ nvapi- phc_ phx_ sbp_ dp.pt. dp.st. dp.ct. sha256~ "+
		"v1.0- secret_ hvs. hvb. hvr. glsa_ glc_ sm_sat_ sm_pat_ sm_aat_ aio_ ory_at_ prv_ waka_ LTAI key- live_pub_ test_pub_ "+
		"pscale_tkn_ pscale_pw_ pscale_oauth_ pypi-AgEIcHlwaS5vcmc sk-or-v1- sk-lf- fm1_ fm2_ fo1_ fm1r_ fm2r_ sk- pat- sat. oy2 dapi")
	add(kindToken, true, 30, 400, "SG. ya29. dt0c01. pk.eyJ sk.eyJ pat. sc_ ext_ scauth_ authress_ sumo_ fc- jfrt@")
	return table
}()

// findSecrets finds the keys of well-known vendors, private keys, tokens of
// authorization, and what is assigned to a name that says it is secret.
func findSecrets(dst []span, text []byte, mask uint64) []span {
	at := len(dst)
	dst = findPrivateKeys(dst, text, kindPrivateKey)
	for i := 0; i < len(text); {
		if !secretChar(text[i]) {
			i++
			continue
		}
		start, digits := i, 0
		for i < len(text) && secretChar(text[i]) {
			if digit(text[i]) {
				digits++
			}
			i++
		}
		if i-start < leastSecret || digits == 0 && i-start < 20 {
			continue
		}
		dst = findToken(dst, text, start, i, digits)
	}
	n := at
	for _, s := range dst[at:] {
		if mask>>s.kind&1 != 0 {
			dst[n] = s
			n++
		}
	}
	return dst[:n]
}

// leastSecret is the shortest word that may be a secret, longestSecret the
// longest value that is taken for one without a vendor's prefix.
const leastSecret, longestSecret = 8, 512

// secretChar tells the characters of keys, and those of passwords that do not
// end a word in a program.
func secretChar(c byte) bool { return secretChars[c] }

var secretChars = func() (t [256]bool) {
	for c := range 256 {
		t[c] = alnum(byte(c)) || strings.IndexByte("_-./+=~|:@$!%^*#", byte(c)) >= 0
	}
	return t
}()

// findToken looks for a secret in one word.
func findToken(dst []span, text []byte, start, end, digits int) []span {
	w := text[start:end]
	for p := 0; p < len(w); p++ {
		if p > 0 && (alnum(w[p-1]) || w[p-1] == '-' && p > 1) {
			continue
		}
		for i := range formats[w[p]] {
			f := &formats[w[p]][i]
			if !bytes.HasPrefix(w[p:], []byte(f.prefix)) {
				continue
			}
			n := p + len(f.prefix)
			body := n
			for n < len(w) && n-body <= f.most && (tokenChar(w[n]) || f.dots && (w[n] == '.' || w[n] == '=' || w[n] == '~')) {
				n++
			}
			if size := n - body; size < f.least || size > f.most || !random(w[body:n]) || bytes.HasSuffix(w[body:n], []byte("EXAMPLE")) {
				continue
			}
			return append(dst, span{start + p, start + n, f.kind})
		}
		if w[p] == 'e' && bytes.HasPrefix(w[p:], []byte("eyJ")) {
			n, dots := p, 0
			for n < len(w) && (tokenChar(w[n]) || w[n] == '=' || w[n] == '.' && dots < 4) {
				if w[n] == '.' {
					dots++
				}
				n++
			}
			if dots >= 1 && n-p >= 40 {
				return append(dst, span{start + p, start + n, kindToken})
			}
		}
	}
	if at := bytes.Index(w, []byte("://")); at > 0 {
		return findURLPassword(dst, w, start, at+3)
	}
	if at := bytes.Index(w, []byte("hooks.slack.com/")); at >= 0 && len(w)-at > 50 {
		return append(dst, span{start + at, end, kindToken})
	}
	if at := bytes.Index(w, []byte("Q~")); at == 4 && digit(w[3]) && len(w) >= 36 && len(w) <= 42 { // Entra ID's
		return append(dst, span{start, end, kindToken})
	}
	if digits >= 15 && len(w) > 15 && w[15] == '|' || len(w) > 20 && bytes.Contains(w, []byte(":AA")) && digits >= 8 {
		if b := bytes.IndexAny(w, "|:"); b >= 8 && allDigits(w[:b]) && len(w)-b > 26 { // Facebook's, Telegram's
			return append(dst, span{start, end, kindToken})
		}
	}
	return findAssigned(dst, text, start, end)
}

func allDigits(w []byte) bool {
	for _, c := range w {
		if !digit(c) {
			return false
		}
	}
	return len(w) > 0
}

// findURLPassword finds the password of "scheme://user:password@host".
func findURLPassword(dst []span, w []byte, start, from int) []span {
	host := bytes.IndexByte(w[from:], '@')
	if host < 0 {
		return dst
	}
	colon := bytes.IndexByte(w[from:from+host], ':')
	if colon < 0 || host-colon < 6 || bytes.IndexByte(w[from:from+colon], '/') >= 0 || placeholder(w[from+colon+1:from+host]) {
		return dst
	}
	return append(dst, span{start + from + colon + 1, start + from + host, kindAssigned})
}

// findAssigned takes a word for a secret if it looks drawn at random, and stands
// after a name that says what it is and a sign of assignment, or in a header of
// authorization.
func findAssigned(dst []span, text []byte, start, end int) []span {
	// The sign may be in the word: name=value, name:value.
	w := text[start:end]
	var name []byte
	if at := assignment(w); at > 0 {
		name = w[:at]
		for at < len(w) && (w[at] == '=' || w[at] == ':') {
			at++
		}
		if at < len(w) {
			start += at
			w = w[at:]
		} else {
			return dst
		}
	} else {
		name = nameBefore(text, start)
	}
	if len(name) == 0 {
		return dst
	}
	for len(w) > 0 && strings.IndexByte(".:!,", w[len(w)-1]) >= 0 {
		w, end = w[:len(w)-1], end-1
	}
	least := 10
	switch secretName(name) {
	case 0:
		return dst
	case 2: // a header: any value is one
		least = 8
	}
	if len(w) < least || len(w) > longestSecret || !random(w) || placeholder(w) || least > 8 && words(w) {
		return dst
	}
	return append(dst, span{start, end, kindAssigned})
}

// assignment is where the sign in "name=value" is, or -1. A name has no other
// signs in it than those of names.
func assignment(w []byte) int {
	for i, c := range w {
		switch {
		case c == '=' || c == ':':
			if i == 0 || i+1 == len(w) || i > 64 {
				return -1
			}
			return i
		case !tokenChar(c) && c != '.':
			return -1
		}
	}
	return -1
}

// nameBefore is the name in front of the sign of assignment in front of the
// word at start; nil without either.
func nameBefore(text []byte, start int) []byte {
	i := start
	sign := false
	least := max(0, start-24)
	for i > least {
		c := text[i-1]
		if c == '=' || c == ':' || c == '>' || c == ',' {
			sign = true
		} else if strings.IndexByte(" \t\"'`{[(|\\", c) < 0 {
			break
		}
		i--
	}
	end := i
	if !sign { // "Bearer x", "--token x", "-u x"
		if i == start {
			return nil
		}
	}
	for i > 0 && end-i < 48 && (tokenChar(text[i-1]) || text[i-1] == '.') {
		i--
	}
	name := text[i:end]
	if sign {
		return name
	}
	for _, flag := range []string{"bearer", "basic", "-u", "--user", "--token", "--password", "--api-key", "--secret"} {
		if strings.EqualFold(string(name), flag) {
			return name
		}
	}
	return nil
}

// secretNames are what names of secrets have in them.
var secretNames = [][]byte{[]byte("secret"), []byte("token"), []byte("passw"), []byte("passphrase"), []byte("pwd"), []byte("apikey"), []byte("api_key"), []byte("api-key"),
	[]byte("access_key"), []byte("accesskey"), []byte("access-key"), []byte("private_key"), []byte("privatekey"), []byte("private-key"), []byte("credential"),
	[]byte("auth_key"), []byte("authkey"), []byte("encryption_key"), []byte("signing_key"), []byte("master_key"), []byte("client_id_key"), []byte("license_key"),
	[]byte("account_key"), []byte("accountkey"), []byte("sharedkey"), []byte("access_id"), []byte("webhook_key"), []byte("login"), []byte("_key"), []byte(".key"),
	[]byte("session")}

// notSecret are what names end with that only speak of a secret.
var notSecret = [][]byte{[]byte("id"), []byte("ids"), []byte("name"), []byte("length"), []byte("size"), []byte("file"), []byte("path"), []byte("url"), []byte("type"), []byte("count"), []byte("limit")}

// secretName tells whether a name is one of a secret: 1, or of a header or flag
// whose value is always one: 2.
func secretName(name []byte) int {
	var low [64]byte
	n := low[:copy(low[:], name)]
	for i, c := range n {
		if c >= 'A' && c <= 'Z' {
			n[i] = c | 0x20
		}
	}
	switch string(n) {
	case "authorization", "bearer", "basic", "x-api-key", "-u", "--user", "--token", "--password", "--api-key", "--secret", "apikey", "api_key":
		return 2
	case "key":
		return 1
	}
	for _, s := range notSecret {
		if bytes.HasSuffix(n, s) {
			return 0
		}
	}
	if bytes.Contains(n, []byte("public")) {
		return 0
	}
	for _, s := range secretNames {
		if bytes.Contains(n, s) {
			return 1
		}
	}
	return 0
}

// words reports whether a value is made of words, numbers and versions with signs between
// them: the name of a file, a package or a machine.
func words(w []byte) bool {
	for len(w) > 0 {
		letters, digits, turns := 0, 0, 0
		i := 0
		for ; i < len(w) && alnum(w[i]); i++ {
			if digit(w[i]) {
				digits++
			} else {
				if letters++; digits > 0 {
					turns++
				}
			}
		}
		if i > 4 && letters > 0 && (turns > 0 || digits > 2) || letters > 24 || digits > 12 {
			return false
		}
		if i < len(w) && strings.IndexByte("-_./:", w[i]) < 0 {
			return false
		}
		w = w[min(i+1, len(w)):]
	}
	return true
}

// placeholder reports whether a value only stands for one.
func placeholder(w []byte) bool {
	low := bytes.ToLower(w)
	for _, s := range []string{"${", "$(", "%(", "xxxx", "....", "****", "example", "your", "changeme", "placeholder", "process.env", "os.environ", "getenv", "secrets.", "vault:", "localhost", "://", "password", "redacted"} {
		if bytes.Contains(low, []byte(s)) {
			return true
		}
	}
	return w[0] == '$' || w[0] == '%' || w[0] == '#'
}

// random reports whether a token looks drawn at random: digits and letters (or,
// if long, letters of both cases), with at least 3 bits of entropy in each.
func random(w []byte) bool {
	var digits, upper, lower int
	for _, c := range w {
		switch {
		case digit(c):
			digits++
		case c >= 'a' && c <= 'z':
			lower++
		case c >= 'A' && c <= 'Z':
			upper++
		}
	}
	if digits == 0 && (upper == 0 || lower == 0 || len(w) < 32) || upper+lower == 0 {
		return false
	}
	return mixed(w)
}

func findPrivateKeys(dst []span, text []byte, kind int) []span {
	begin, end := []byte("-----BEGIN "), []byte("-----END ")
	for at := 0; ; {
		n := bytes.Index(text[at:], begin)
		if n < 0 {
			return dst
		}
		start := at + n
		at = start + len(begin)
		head := text[at:min(len(text), at+40)]
		n = bytes.Index(head, []byte("PRIVATE KEY"))
		if n < 0 {
			continue
		}
		at += n
		stop := len(text) // without an end, all that follows
		if n := bytes.Index(text[at:], end); n >= 0 {
			stop = at + n
			if bytes.IndexFunc(text[at+len("PRIVATE KEY"):stop], func(r rune) bool { return r < 0x80 && alnum(byte(r)) }) < 0 {
				continue // none is there
			}
			if line := bytes.Index(text[stop+len(end):], []byte("-----")); line >= 0 && line < 40 {
				stop += len(end) + line + 5
			}
		}
		dst = append(dst, span{start, stop, kind})
		at = stop
	}
}

// mixed reports whether a token looks drawn at random: its characters have at
// least 3 bits of entropy each, which words and placeholders do not reach.
func mixed(token []byte) bool {
	var count [256]uint16
	token = token[:min(len(token), longestSecret)]
	for _, c := range token {
		count[c]++
	}
	bits := 0.0
	for _, n := range count {
		if n > 0 {
			p := float64(n) / float64(len(token))
			bits -= p * math.Log2(p)
		}
	}
	return bits >= 3
}
