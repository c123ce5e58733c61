package budget

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"sync"
)

const (
	// blocks is how many times what an account has is written ahead of use in
	// parts: a crash costs an account at most one part of it. Chosen.
	blocks = 100
	// compactAbove is the size of a state file, in bytes, above which it is written
	// anew once it has doubled. Chosen.
	compactAbove = 64 << 20
)

// journal is a file that says how far accounts may have been used. Every line is
// an account; the last of an account counts. A line is written before that much
// is granted, so that after a crash no account has more left than before. What the
// process had written survives its end, also by SIGKILL; that of the machine may
// cost the last seconds.
type journal struct {
	path    string
	holders int // ledgers; guarded by mu
	unlock  func()

	mu   sync.Mutex
	file *os.File
	size int64
	base int64 // the size after it was last written anew
}

// line is an account in the file.
type line struct {
	Budget string    `json:"budget"`
	Names  [5][]byte `json:"names"`           // trust domain, tenant, principal, model, own key
	Used   int64     `json:"used"`            // at most
	Owed   int64     `json:"owed,omitempty"`  // to take off the next window
	Extra  int64     `json:"extra,omitempty"` // granted beyond the amount
	Ends   int64     `json:"ends,omitempty"`  // the window, in Unix nanoseconds; of a bucket, when this was so
}

// errInUse says that another process has the state file.
var errInUse = errors.New("another process uses it; give every gateway its own, or share budgets through Redis")

// Open has the ledger keep its accounts in a file, and takes up what the file
// says. A ledger that follows one with the same file shares it. Close it.
func (l *Ledger) Open(file string) error {
	if j := l.earlier; j != nil && j.path == file {
		j.mu.Lock()
		defer j.mu.Unlock()
		j.holders++
		l.journal = j
		return nil
	}
	unlock, err := lockFile(file + ".lock")
	if err != nil {
		return fmt.Errorf("budget_store.file: %s: %w", file, err)
	}
	l.journal = &journal{path: file, holders: 1, unlock: unlock}
	if err := l.journal.load(l); err != nil {
		unlock()
		l.journal = nil
		return fmt.Errorf("budget_store.file: %w", err)
	}
	return nil
}

// Close writes to the state file, if there is one, what is used of every account, or
// tells the shared store: nothing is lost if all inferences have ended.
func (l *Ledger) Close() error {
	if l.shared != nil {
		l.shared.leave(l)
	}
	j := l.journal
	if j == nil {
		return nil
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.holders--; j.holders > 0 {
		return nil
	}
	defer j.unlock()
	return errors.Join(j.rewrite(l.lines(l.clock())), j.file.Close())
}

// line is what the file says of an account that may be used so far.
func (a *account) line(now instant, used int64) line {
	n := line{Budget: a.limit.name, Used: used, Owed: a.owed, Extra: a.extra,
		Names: [5][]byte{[]byte(a.key.trustDomain), []byte(a.key.tenant), []byte(a.key.principal), []byte(a.key.model), []byte(a.key.own)}}
	switch w := &a.limit.window; {
	case w.zone != nil:
		n.Ends = a.ends
	case w.ends():
		n.Ends = now.wall + a.ends - int64(now.mono)
	}
	return n
}

// restore makes an account what the file says of it.
func (n *line) restore(a *account, now instant) {
	a.used, a.owed, a.extra = n.Used, n.Owed, n.Extra
	switch w := &a.limit.window; {
	case w.zone != nil:
		a.ends = n.Ends
	case w.burst > 0: // a clock that went back refills nothing
		a.ends = int64(now.mono) - max(0, now.wall-n.Ends)
	case w.ends(): // nor does one that went back prolong a window
		a.ends = int64(now.mono) + min(n.Ends-now.wall, int64(w.length))
	}
}

// load reads the file, fills the table and writes the file anew.
func (j *journal) load(l *Ledger) error {
	b, err := os.ReadFile(j.path)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	last, order, err := read(bytes.NewReader(b))
	if err != nil {
		return fmt.Errorf("%s: %w; what was spent is not known: mend the line, or delete the file to begin with full budgets", j.path, err)
	}
	now := l.clock()
	for _, id := range order {
		n := last[id]
		at := slices.IndexFunc(l.limits, func(m *limit) bool { return m.name == n.Budget })
		if at < 0 {
			continue
		}
		m := l.limits[at]
		k := key{m, string(n.Names[0]), string(n.Names[1]), string(n.Names[2]), string(n.Names[3]), string(n.Names[4])}
		a := l.table.open(k, now, func(a *account) {
			m.fill(now)(a)
			n.restore(a, now)
		})
		if a == nil {
			return errFull
		}
		a.pins.Add(-1)
	}
	return j.rewrite(l.lines(now))
}

// lines are all accounts of which something is used, as the file has them.
func (l *Ledger) lines(now instant) (out []line) {
	l.table.all(func(a *account) {
		if !slices.Contains(l.limits, a.limit) {
			return
		}
		a.mu.Lock()
		defer a.mu.Unlock()
		a.roll(now)
		a.mark = max(0, a.used)
		if a.used > 0 || a.owed > 0 || a.extra > 0 {
			out = append(out, a.line(now, a.used))
		}
	})
	return out
}

// owes writes down what an account owes.
func (j *journal) owes(a *account, now instant) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.roll(now)
	if err := j.append([]line{a.line(now, max(a.mark, a.used))}); err != nil {
		return err
	}
	a.mark = max(a.mark, a.used)
	return nil
}

// account names the account of a line.
func (n *line) account() string { return fmt.Sprintf("%q%q", n.Budget, n.Names) }

// read reads lines; the last of each account counts. A last line without its end
// was being written when the process was killed: nothing was granted for it.
func read(r io.Reader) (last map[string]line, order []string, err error) {
	last = make(map[string]line)
	in := bufio.NewReader(r)
	for number := 1; ; number++ {
		text, err := in.ReadBytes('\n')
		if errors.Is(err, io.EOF) {
			return last, order, nil
		}
		if err != nil {
			return nil, nil, err
		}
		var n line
		dec := json.NewDecoder(bytes.NewReader(text))
		dec.DisallowUnknownFields()
		if err := dec.Decode(&n); err != nil || min(n.Used, n.Owed, n.Extra) < 0 || dec.More() {
			return nil, nil, fmt.Errorf("line %d is no account", number)
		}
		id := n.account()
		if _, known := last[id]; !known {
			order = append(order, id)
		}
		last[id] = n
	}
}

// rewrite replaces the file by one with these lines.
func (j *journal) rewrite(lines []line) (err error) {
	f, err := os.CreateTemp(filepath.Dir(j.path), filepath.Base(j.path)+".new-*") // for us alone to read
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			_ = f.Close()
			_ = os.Remove(f.Name())
		}
	}()
	out, size := bufio.NewWriter(f), int64(0)
	for n := range lines {
		b, err := json.Marshal(&lines[n])
		if err != nil {
			return err
		}
		k, _ := out.Write(append(b, '\n')) // Flush tells of errors
		size += int64(k)
	}
	if err := out.Flush(); err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return err
	}
	if err := os.Rename(f.Name(), j.path); err != nil {
		return err
	}
	if j.file != nil {
		_ = j.file.Close()
	}
	j.file, j.size, j.base = f, size, size
	return nil
}

// append writes lines with one system call: all of them, or none counts.
func (j *journal) append(lines []line) error {
	var b []byte
	for n := range lines {
		text, err := json.Marshal(&lines[n])
		if err != nil {
			return err
		}
		b = append(append(b, text...), '\n')
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	if n, err := j.file.Write(b); err != nil {
		// Half a line must not stand before a whole one.
		if n > 0 {
			err = errors.Join(err, j.file.Truncate(j.size))
			_, seek := j.file.Seek(j.size, io.SeekStart)
			err = errors.Join(err, seek)
		}
		return err
	}
	j.size += int64(len(b))
	if j.size > compactAbove && j.size > 2*j.base {
		return j.compact()
	}
	return nil
}

// compact leaves out the lines that later ones replaced.
func (j *journal) compact() error {
	b, err := os.ReadFile(j.path)
	if err != nil {
		return err
	}
	last, order, err := read(bytes.NewReader(b))
	if err != nil {
		return err
	}
	lines := make([]line, len(order))
	for n, id := range order {
		lines[n] = last[id]
	}
	return j.rewrite(lines)
}

// ahead writes how far the accounts of holds will be used, where that is further
// than was written before, and a block further than needed. The accounts are locked.
func (j *journal) ahead(holds []hold, all bool, now instant) error {
	var lines []line
	for n := range holds {
		h := &holds[n]
		a := h.account
		took := h.want
		if !all {
			took = h.least
		}
		if used := add(max(0, a.used), took); used > a.mark {
			h.mark = max(used, min(add(used, a.limit.capacity()/blocks), a.capacity()+a.limit.overdraft))
			lines = append(lines, a.line(now, h.mark))
		} else {
			h.mark = a.mark
		}
	}
	if lines == nil {
		return nil
	}
	if err := j.append(lines); err != nil {
		return err
	}
	for n := range holds {
		holds[n].account.mark = holds[n].mark
	}
	return nil
}
