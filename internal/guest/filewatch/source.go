package filewatch

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"slices"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// errLost says that what is known of the tree is no longer true.
var errLost = errors.New("changes of the tree were lost")

// rawEvent is one event of inotify(7).
type rawEvent struct {
	wd     int32
	mask   uint32
	cookie uint32
	name   string // "" = of the watched directory itself
}

func (e rawEvent) is(mask uint32) bool { return e.mask&mask != 0 }

// ofDirectory are the events that a watched directory reports. Files that are
// open, but have no name any more, report none.
const ofDirectory = unix.IN_CREATE | unix.IN_MODIFY | unix.IN_ATTRIB | unix.IN_DELETE | unix.IN_MOVED_FROM | unix.IN_MOVED_TO |
	unix.IN_DELETE_SELF | unix.IN_MOVE_SELF | unix.IN_ONLYDIR | unix.IN_EXCL_UNLINK

// source is one inotify instance. It may be closed while it is used; otherwise
// it is for one goroutine.
type source struct {
	file   *os.File
	conn   syscall.RawConn
	buf    []byte
	events []rawEvent // read, but not taken yet
}

func newSource() (*source, error) {
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return nil, err
	}
	s := &source{file: os.NewFile(uintptr(fd), "inotify"), buf: make([]byte, 32<<10)}
	if s.conn, err = s.file.SyscallConn(); err != nil {
		s.close()
		return nil, err
	}
	return s, nil
}

// close ends a read that waits. s may be nil.
func (s *source) close() {
	if s != nil {
		_ = s.file.Close()
	}
}

// add watches a directory and returns its watch descriptor, which is the same for
// the same directory. It is named by what is open, because what a path leads to
// changes.
func (s *source) add(dir *os.File) (wd int32, err error) {
	path := fmt.Sprintf("/proc/self/fd/%d", dir.Fd())
	var n int
	if ctlErr := s.conn.Control(func(fd uintptr) {
		n, err = unix.InotifyAddWatch(int(fd), path, ofDirectory)
	}); ctlErr != nil {
		return 0, ctlErr
	}
	return int32(n), err
}

// remove ends the watch of a directory, which may have ended by itself.
func (s *source) remove(wd int32) {
	_ = s.conn.Control(func(fd uintptr) { _, _ = unix.InotifyRmWatch(int(fd), uint32(wd)) })
}

// next returns the next event, waiting for it.
func (s *source) next() (rawEvent, error) {
	for len(s.events) == 0 {
		if err := s.read(true); err != nil {
			return rawEvent{}, err
		}
	}
	e := s.events[0]
	s.events = s.events[1:]
	return e, nil
}

// empty reports whether all events have been taken that the kernel had so far.
func (s *source) empty() bool {
	if len(s.events) == 0 {
		_ = s.read(false) // an error is seen again by next
	}
	return len(s.events) == 0
}

// How the second half of a move is looked for.
const (
	partnerWithin = 64 // events
	partnerIn     = 100 * time.Millisecond
)

// partner takes the IN_MOVED_TO that belongs to an IN_MOVED_FROM. The kernel
// queues the one right after the other, but not atomically; there is none if the
// file went where nothing is watched.
func (s *source) partner(cookie uint32) (rawEvent, bool) {
	deadline := time.Now().Add(partnerIn)
	for looked := 0; ; {
		for ; looked < min(len(s.events), partnerWithin); looked++ {
			if e := s.events[looked]; e.is(unix.IN_MOVED_TO) && e.cookie == cookie {
				s.events = slices.Delete(s.events, looked, looked+1)
				return e, true
			}
		}
		if looked == partnerWithin || s.file.SetReadDeadline(deadline) != nil {
			return rawEvent{}, false
		}
		err := s.read(true)
		_ = s.file.SetReadDeadline(time.Time{})
		if err != nil {
			return rawEvent{}, false
		}
	}
}

// read adds what the kernel has, of which it waits for the first.
func (s *source) read(wait bool) error {
	var n int
	var err error
	connErr := s.conn.Read(func(fd uintptr) bool {
		n, err = unix.Read(int(fd), s.buf)
		for errors.Is(err, unix.EINTR) {
			n, err = unix.Read(int(fd), s.buf)
		}
		return !wait || !errors.Is(err, unix.EAGAIN)
	})
	if err = errors.Join(connErr, err); err != nil {
		return err
	}
	return s.parse(s.buf[:n])
}

func (s *source) parse(b []byte) error {
	for len(b) > 0 {
		if len(b) < unix.SizeofInotifyEvent {
			return errLost
		}
		e := rawEvent{
			wd:     int32(binary.NativeEndian.Uint32(b)),
			mask:   binary.NativeEndian.Uint32(b[4:]),
			cookie: binary.NativeEndian.Uint32(b[8:]),
		}
		size := unix.SizeofInotifyEvent + int(binary.NativeEndian.Uint32(b[12:]))
		if size > len(b) {
			return errLost
		}
		name, _, _ := bytes.Cut(b[unix.SizeofInotifyEvent:size], []byte{0})
		e.name = string(name)
		s.events = append(s.events, e)
		b = b[size:]
	}
	return nil
}
