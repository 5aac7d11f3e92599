package cgroup

import (
	"encoding/binary"
	"errors"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// notifier tells of changed files. All groups share one inotify instance, of
// which a user may have 128 by default; it is there while something is watched
// (inotify(7)).
type notifier struct {
	mu      sync.Mutex
	file    *os.File // nil = nothing is watched
	watches map[int32]chan struct{}
}

// add watches a file. A change, or several, is one element of the channel, which
// is closed when the watching has failed.
func (n *notifier) add(path string) (id int32, changed <-chan struct{}, err error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.file == nil {
		fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
		if err != nil {
			return 0, nil, err
		}
		n.file, n.watches = os.NewFile(uintptr(fd), "inotify"), map[int32]chan struct{}{}
		go n.run(n.file)
	}
	wd, err := n.addWatch(path)
	if err != nil {
		n.closeIfIdle()
		return 0, nil, err
	}
	ch := make(chan struct{}, 1)
	n.watches[wd] = ch
	return wd, ch, nil
}

func (n *notifier) addWatch(path string) (id int32, err error) {
	err = n.control(func(fd int) error {
		wd, err := unix.InotifyAddWatch(fd, path, unix.IN_MODIFY)
		id = int32(wd)
		return err
	})
	if _, twice := n.watches[id]; err == nil && twice {
		return 0, errors.New("it is watched already")
	}
	return id, err
}

func (n *notifier) control(f func(fd int) error) error {
	raw, err := n.file.SyscallConn()
	if err != nil {
		return err
	}
	var inner error
	err = raw.Control(func(fd uintptr) { inner = f(int(fd)) })
	return errors.Join(err, inner)
}

// remove ends a watch.
func (n *notifier) remove(id int32) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if _, found := n.watches[id]; !found {
		return
	}
	delete(n.watches, id)
	_ = n.control(func(fd int) error { // fails for a file that is gone
		_, err := unix.InotifyRmWatch(fd, uint32(id))
		return err
	})
	n.closeIfIdle()
}

func (n *notifier) closeIfIdle() {
	if len(n.watches) == 0 {
		_ = n.file.Close()
		n.file = nil
	}
}

// run hands on events until the file is closed.
func (n *notifier) run(file *os.File) {
	buf := make([]byte, 16<<10)
	for {
		size, err := file.Read(buf)
		if err != nil {
			n.failed(file)
			return
		}
		for rest := buf[:size]; len(rest) >= unix.SizeofInotifyEvent; {
			id := int32(binary.NativeEndian.Uint32(rest))
			name := binary.NativeEndian.Uint32(rest[12:])
			rest = rest[min(len(rest), unix.SizeofInotifyEvent+int(name)):]
			n.tell(id)
		}
	}
}

// tell marks a file as changed, or all files if events were lost (id -1).
func (n *notifier) tell(id int32) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if id != -1 {
		mark(n.watches[id])
		return
	}
	for _, changed := range n.watches {
		mark(changed)
	}
}

func mark(changed chan struct{}) {
	select {
	case changed <- struct{}{}:
	default: // it is marked, or not watched any more
	}
}

// failed ends all watches of a file that cannot be read any more, unless it was
// closed for want of watches.
func (n *notifier) failed(file *os.File) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.file != file {
		return
	}
	for _, changed := range n.watches {
		close(changed)
	}
	clear(n.watches)
	n.closeIfIdle()
}
