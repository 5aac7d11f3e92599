// Package spool holds bytes that are collected before they can be sent: the first
// few in memory, the rest in a file without a name, within a budget that all
// share. It is a leaf: it imports the standard library only.
package spool

import (
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"unicode/utf8"
)

// inMemory is how many bytes of a spool are kept in memory.
const inMemory = 64 << 10

// ErrFull is what writing more than there is room for ends with.
var ErrFull = errors.New("there is no room for more spooled bytes")

// Pool is where spools are.
type Pool struct {
	dir     string
	max     int64
	perTeam int64

	mu    sync.Mutex
	used  int64 // bytes of files
	teams map[string]int64
}

// NewPool returns a Pool of files in dir that may have so many bytes together,
// and those of each team.
func NewPool(dir string, maxBytes, perTeam int64) *Pool {
	return &Pool{dir: dir, max: maxBytes, perTeam: min(perTeam, maxBytes), teams: map[string]int64{}}
}

// take counts bytes of a team's files; negative ones are given back. It reports
// false if there is no room.
func (p *Pool) take(team string, n int64) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if n > 0 && (p.used+n > p.max || p.teams[team]+n > p.perTeam) {
		return false
	}
	p.used += n
	if p.teams[team] += n; p.teams[team] == 0 {
		delete(p.teams, team)
	}
	return true
}

// Spool collects bytes, to be read once they all are there. It is used by one
// goroutine at a time. Close frees it.
type Spool struct {
	pool *Pool
	team string
	mem  []byte
	file *os.File // holds what mem did too, once it is there
	size int64
	text utf8Checker
}

// New returns an empty Spool of a team, which uses nothing yet.
func (p *Pool) New(team string) *Spool { return &Spool{pool: p, team: team} }

// Write implements io.Writer. On ErrFull nothing was written, and what was
// written before can still be read.
func (s *Spool) Write(b []byte) (int, error) {
	if s.file == nil && len(s.mem)+len(b) <= inMemory {
		s.mem = append(s.mem, b...)
		s.took(b)
		return len(b), nil
	}
	grow := int64(len(b))
	if s.file == nil {
		grow += s.size
	}
	if !s.pool.take(s.team, grow) {
		return 0, ErrFull
	}
	if s.file == nil {
		if err := s.open(); err != nil {
			s.pool.take(s.team, -grow)
			return 0, err
		}
	}
	if _, err := s.file.WriteAt(b, s.size); err != nil {
		s.pool.take(s.team, -int64(len(b)))
		return 0, fmt.Errorf("%w: %w", ErrFull, err) // a full disk is one way of it
	}
	s.took(b)
	return len(b), nil
}

func (s *Spool) took(b []byte) {
	s.size += int64(len(b))
	s.text.add(b)
}

// open moves what is in memory to a file.
func (s *Spool) open() error {
	f, err := os.CreateTemp(s.pool.dir, "nestbox-spool-*")
	if err != nil {
		return fmt.Errorf("make a spool file: %w", err)
	}
	err = os.Remove(f.Name()) // gone with its last user, whatever happens
	if err == nil {
		_, err = f.WriteAt(s.mem, 0)
	}
	if err != nil {
		return errors.Join(fmt.Errorf("make a spool file: %w", err), f.Close())
	}
	s.file, s.mem = f, nil
	return nil
}

// Len returns how many bytes there are.
func (s *Spool) Len() int64 { return s.size }

// UTF8 reports whether all of it is valid UTF-8.
func (s *Spool) UTF8() bool { return s.text.valid() }

// Reader returns a reader of all that was written.
func (s *Spool) Reader() io.Reader {
	if s.file != nil {
		return io.NewSectionReader(s.file, 0, s.size)
	}
	return &memReader{s.mem}
}

type memReader struct{ rest []byte }

// Read implements io.Reader.
func (m *memReader) Read(p []byte) (int, error) {
	if len(m.rest) == 0 {
		return 0, io.EOF
	}
	n := copy(p, m.rest)
	m.rest = m.rest[n:]
	return n, nil
}

// Close frees what the spool uses. It may be called more than once.
func (s *Spool) Close() error {
	s.mem = nil
	if s.file == nil {
		return nil
	}
	s.pool.take(s.team, -s.size)
	f := s.file
	s.file, s.size = nil, 0
	return f.Close()
}

// utf8Checker checks bytes that come in pieces.
type utf8Checker struct {
	bad  bool
	rest []byte // the beginning of a rune
}

func (c *utf8Checker) add(b []byte) {
	for len(c.rest) > 0 && len(b) > 0 && !utf8.FullRune(c.rest) {
		c.rest = append(c.rest, b[0])
		b = b[1:]
	}
	if len(c.rest) > 0 && utf8.FullRune(c.rest) {
		c.bad = c.bad || !utf8.Valid(c.rest)
		c.rest = c.rest[:0]
	}
	end := len(b)
	for i := 1; i < utf8.UTFMax && i <= len(b); i++ {
		if utf8.RuneStart(b[len(b)-i]) {
			if !utf8.FullRune(b[len(b)-i:]) {
				end = len(b) - i
			}
			break
		}
	}
	c.bad = c.bad || !utf8.Valid(b[:end])
	c.rest = append(c.rest, b[end:]...)
}

func (c *utf8Checker) valid() bool { return !c.bad && len(c.rest) == 0 }
