package usage

import (
	"bytes"
	"encoding/json"
	"errors"
	"log/slog"
	"math"
	"os"
	"strconv"
	"sync/atomic"
	"time"

	configv1 "github.com/sluicegate/sluice/proto/gen/sluice/config/v1"
)

const (
	// queued is how many records may wait for the disk: some 4 MB. Chosen: what a
	// gateway at its limits makes in a second.
	queued = 8192
	// block is how many bytes are written at once at most. Chosen.
	block = 64 << 10
	// look is how often it is seen whether the file is still in its place, and a disk
	// that failed is tried again. Chosen.
	look = time.Second
	// told is how often the loss of records is logged. Chosen.
	told = 10 * time.Second
	// defaultKeep is how many rotated files there are. Chosen.
	defaultKeep = 5
	// patience is how long Close waits for the disk. Chosen.
	patience = 5 * time.Second
)

// file is the file of records and those that wait to be written. One goroutine, run,
// has all but the queue and the counters.
type file struct {
	path  string
	most  int64 // bytes; above them it is rotated. 0: it is not
	keep  int   // rotated ones
	log   *slog.Logger
	count func(int64) // of lost records
	queue chan record
	stop  chan struct{}
	done  chan struct{}

	lost   atomic.Int64
	logged atomic.Int64 // when, in Unix nanoseconds

	out  *os.File // nil: it could not be opened
	size int64
	torn bool // the last line has no end
	buf  bytes.Buffer
	enc  *json.Encoder
}

func openFile(c *configv1.Usage, log *slog.Logger, count func(int64)) (*file, error) {
	f := &file{path: c.GetFile(), most: int64(min(c.GetMaxBytes(), math.MaxInt64)), keep: int(c.GetKeep()), log: log, count: count}
	if f.keep == 0 {
		f.keep = defaultKeep
	}
	f.queue = make(chan record, queued)
	f.stop, f.done = make(chan struct{}), make(chan struct{})
	if err := f.open(); err != nil {
		return nil, err
	}
	f.enc = json.NewEncoder(&f.buf)
	f.enc.SetEscapeHTML(false)
	go f.run()
	return f, nil
}

// open opens the file. What another process left without its end is ended first.
func (f *file) open() error {
	out, err := os.OpenFile(f.path, os.O_APPEND|os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return err
	}
	f.out, f.torn, f.size = out, false, 0
	if info, err := out.Stat(); err == nil && info.Mode().IsRegular() && info.Size() > 0 {
		f.size = info.Size()
		var last [1]byte
		_, err := out.ReadAt(last[:], info.Size()-1)
		f.torn = err == nil && last[0] != '\n'
	}
	return nil
}

// put queues a record. It does not wait.
func (f *file) put(r record) {
	select {
	case f.queue <- r:
	default:
		f.lose(1, nil)
	}
}

// lose counts records that are lost, and logs it now and then.
func (f *file) lose(n int64, err error) {
	f.count(n)
	all, now, last := f.lost.Add(n), time.Now().UnixNano(), f.logged.Load()
	if now-last < int64(told) || !f.logged.CompareAndSwap(last, now) {
		return
	}
	args := []any{"file", f.path, "lost", all}
	if err != nil {
		args = append(args, "error", err)
	}
	f.log.Error("usage records are lost: the disk is full, too slow or gone", args...)
}

func (f *file) run() {
	defer close(f.done)
	tick := time.NewTicker(look)
	defer tick.Stop()
	for {
		select {
		case r := <-f.queue:
			f.line(r)
		case <-tick.C:
			f.follow()
		case <-f.stop:
			for len(f.queue) > 0 {
				f.line(<-f.queue)
			}
			if f.out != nil {
				_ = f.out.Close()
			}
			return
		}
	}
}

// line adds a line, and writes if there is enough, or nothing more for now.
func (f *file) line(r record) {
	_ = f.enc.Encode(&r) // nothing in it can fail
	if f.buf.Len() >= block || len(f.queue) == 0 {
		f.write()
	}
}

// write writes the lines that there are. What the disk does not take is lost.
func (f *file) write() {
	defer f.buf.Reset()
	lines, err := f.buf.Bytes(), os.ErrClosed
	if f.out != nil && f.torn {
		if _, err = f.out.Write([]byte{'\n'}); err == nil {
			f.torn = false
		}
	}
	n := 0
	if f.out != nil && !f.torn {
		if n, err = f.out.Write(lines); err == nil {
			if f.size += int64(n); f.most > 0 && f.size >= f.most {
				f.rotate()
			}
			return
		}
	}
	f.lose(int64(bytes.Count(lines[n:], []byte{'\n'})), err)
	if f.out != nil {
		_ = f.out.Close()
		f.out = nil // until the next look
	}
}

// rotate moves the file to FILE.1, that to FILE.2 and so on; the oldest goes. What fails
// is tried again after the next write.
func (f *file) rotate() {
	for n := f.keep - 1; n > 0; n-- {
		if err := os.Rename(f.numbered(n), f.numbered(n+1)); err != nil && !errors.Is(err, os.ErrNotExist) {
			f.lose(0, err)
			return
		}
	}
	if err := os.Rename(f.path, f.numbered(1)); err != nil {
		f.lose(0, err)
		return
	}
	_ = f.out.Close()
	if err := f.open(); err != nil {
		f.out = nil // until the next look
		f.lose(0, err)
	}
}

func (f *file) numbered(n int) string { return f.path + "." + strconv.Itoa(n) }

// follow opens the file anew if it was moved away, or could not be written.
func (f *file) follow() {
	if f.out != nil {
		ours, err := f.out.Stat()
		if err == nil {
			var there os.FileInfo
			if there, err = os.Stat(f.path); err == nil && os.SameFile(ours, there) {
				return
			}
		}
		_ = f.out.Close()
		f.out = nil
	}
	if err := f.open(); err != nil {
		f.out = nil
		f.lose(0, err)
	}
}

func (f *file) close() {
	close(f.stop)
	late := time.NewTimer(patience)
	defer late.Stop()
	select {
	case <-f.done:
	case <-late.C:
		f.log.Error("usage records are lost: the disk does not take them", "file", f.path, "lost", len(f.queue))
	}
}
