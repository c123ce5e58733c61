package inspect

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
)

// ruleError says where a rule is wrong.
type ruleError struct {
	file string
	line int
	err  error
}

func (e *ruleError) Error() string { return fmt.Sprintf("%s:%d: %s", e.file, e.line, e.err) }
func (e *ruleError) Unwrap() error { return e.err }

// directive is where a directive begins, as a line, and ends, as an offset.
type directive struct {
	line, end int
	text      string
}

// directives cuts SecLang into directives: lines, joined by backslashes.
func directives(text []byte) (list []directive) {
	at, line, from := 0, 0, 0
	var open strings.Builder
	for _, l := range strings.SplitAfter(string(text), "\n") {
		line++
		at += len(l)
		l = strings.TrimSpace(l)
		if l == "" || l[0] == '#' {
			continue
		}
		if open.Len() == 0 {
			from = line
		}
		if rest, ok := strings.CutSuffix(l, "\\"); ok {
			open.WriteString(rest)
			continue
		}
		open.WriteString(l)
		list = append(list, directive{from, at, open.String()})
		open.Reset()
	}
	return list
}

// ours are directives that a rule file must leave alone: the first group would
// have Coraza read, buffer or write what it must not, the second would switch
// it off.
var ours = map[string]string{}

func init() {
	for _, d := range strings.Fields(`secrequestbodyaccess secrequestbodylimit secrequestbodyinmemorylimit
		secrequestbodynofileslimit secrequestbodylimitaction secresponsebodyaccess secresponsebodylimit
		secresponsebodylimitaction secauditengine secauditlog secauditlogdir secauditlogtype secauditlogformat
		secauditlogparts secauditlogrelevantstatus secauditlogdirmode secauditlogfilemode secauditlog2 secdebuglog
		secdebugloglevel secuploaddir secuploadkeepfiles secuploadfilemode secuploadfilelimit sectmpdir secdatadir`) {
		ours[d] = "leave it out: fields are read in memory, and nothing of a message is ever written"
	}
	ours["secargumentslimit"] = "leave it out: past Coraza's limit nothing would be inspected"
	ours["secruleengine"] = "leave it out: to watch without refusing, list rules under shadow"
}

// lint refuses directives that are not a rule file's business, and reports
// those that change other rules behind the plan's back: so that it no longer
// knows which detectors they ask for, or what they do.
func lint(name string, text []byte, outputs bool) (foreign, partial bool, err error) {
	var rule string // that the directive is, or is chained to
	chained := false
	for _, d := range directives(text) {
		if !chained {
			rule = d.text
		}
		chained = hasAction(strings.ToLower(d.text), "chain")
		if outputs {
			said, err := longest(ruleTag.FindAllString(rule, 1))
			if err == nil {
				err = bounded(d.text, said)
			}
			if err != nil {
				return false, false, &ruleError{name, d.line, fmt.Errorf("rule %s: %w", idIn(rule), err)}
			}
		}
		word, rest, _ := strings.Cut(d.text, " ")
		word = strings.ToLower(word)
		if why := ours[word]; why != "" {
			return false, false, &ruleError{name, d.line, fmt.Errorf("%s: %s", strings.SplitN(d.text, " ", 2)[0], why)}
		}
		if strings.HasPrefix(word, "secruleupdate") || word == "secdefaultaction" && transforms(rest) {
			foreign = true
		}
		if word != "secrule" && word != "include" && word != "seccomponentsignature" {
			partial = true
		}
	}
	return foreign, partial, nil
}

// transforms reports whether actions have a transformation.
func transforms(actions string) bool {
	for _, a := range strings.FieldsFunc(actions, func(r rune) bool { return r == ',' || r == '"' || r == ' ' || r == '\t' }) {
		if a = strings.ToLower(a); strings.HasPrefix(a, "t:") && a != "t:none" {
			return true
		}
	}
	return false
}

// embedded is where the rule files are that come with Sluice, for Include and
// rule_files.
const embedded = "@sluice/"

func readRules(name string) ([]byte, error) {
	if _, file, ok := strings.Cut(name, embedded); ok {
		return rulesFS.ReadFile("rules/" + file)
	}
	return os.ReadFile(name)
}

// ruleFS is where Coraza reads rule files: those in hand, those that come with
// Sluice, and the file system. Every one is linted.
type ruleFS struct {
	files   map[string][]byte
	foreign bool // see lint
	partial bool
	outputs bool // are read
	err     error
}

var (
	ruleID  = regexp.MustCompile(`\bid:'?(\d+)`)
	ruleTag = regexp.MustCompile(longestTag + `\d+`)
)

// idIn is the id of a rule.
func idIn(rule string) string {
	if m := ruleID.FindStringSubmatch(rule); m != nil {
		return m[1]
	}
	return "without an id"
}

func (f *ruleFS) Open(name string) (fs.File, error) { return os.Open(name) }

func (f *ruleFS) Glob(pattern string) ([]string, error) { return filepath.Glob(pattern) }

func (f *ruleFS) ReadFile(name string) ([]byte, error) {
	text, ok := f.files[strings.TrimPrefix(name, "/")]
	if ok {
		name = strings.TrimPrefix(name, "/")
	} else if text, ok = f.files[name]; !ok {
		if text, ok = f.files["/"+name]; !ok {
			var err error
			if text, err = readRules(name); err != nil {
				return nil, err
			}
		}
	}
	if !strings.HasSuffix(name, ".data") { // lists for @pmFromFile and the like
		foreign, partial, err := lint(name, text, f.outputs)
		if err != nil {
			f.err = err
			return nil, err
		}
		f.foreign, f.partial = f.foreign || foreign, f.partial || partial
	}
	return text, nil
}
