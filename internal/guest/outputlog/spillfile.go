package outputlog

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"slices"

	"golang.org/x/sys/unix"
)

// spillFile holds the older slabs of one output log in an unlinked temporary
// file. A slab takes what its bytes and its index need, wherever there is room;
// since the oldest go first, free room is in one piece mostly. It is guarded by
// the log's writing lock, but for load.
type spillFile struct {
	file   *os.File
	size   int64
	free   []extent // below size, by offset, none next to another
	full   bool     // the disk is: the file does not grow any more
	budget *Budget
	index  []byte // on its way to the file
}

// extent is a piece of the file, in bytes.
type extent struct{ at, size int64 }

func (e extent) end() int64 { return e.at + e.size }

// newSpillFile makes the file. It has no name, so that it is gone with the
// daemon.
func newSpillFile(b *Budget) (*spillFile, error) {
	fd, err := unix.Open(b.limits.Dir, unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o600)
	if err == nil {
		return &spillFile{file: os.NewFile(uintptr(fd), "spilled output"), budget: b}, nil
	}
	file, err := os.CreateTemp(b.limits.Dir, "nestbox-output-*")
	if err != nil {
		return nil, fmt.Errorf("make a file for spilled output: %w", err)
	}
	if err := os.Remove(file.Name()); err != nil {
		_ = file.Close()
		return nil, fmt.Errorf("unlink the file for spilled output: %w", err)
	}
	return &spillFile{file: file, budget: b}, nil
}

// An entry of an index is a run: how many bytes it has, of which stream they are, and
// whether how many ticks later than the run before they were read follows.
const (
	entryBits  = streamBits + 1
	entryLater = 1 << streamBits
)

// store writes a slab's bytes, and its runs as an index, and returns where. It
// fails with errNoRoom if there is none and there may not be more, and with
// another error if the disk does not take it.
func (f *spillFile) store(s *slab) (extent, error) {
	f.index = f.index[:0]
	from, at := 0, tick(0)
	for _, r := range s.runs {
		entry := uint64(r.end()-from)<<entryBits | uint64(r.stream())
		if r.at != at {
			f.index = binary.AppendUvarint(f.index, entry|entryLater)
			f.index = binary.AppendUvarint(f.index, uint64(r.at-at))
		} else {
			f.index = binary.AppendUvarint(f.index, entry)
		}
		from, at = r.end(), r.at
	}
	where, err := f.take(int64(len(s.buf) + len(f.index)))
	if err != nil {
		return extent{}, err
	}
	if _, err = f.file.WriteAt(s.buf, where.at); err == nil {
		_, err = f.file.WriteAt(f.index, where.at+int64(len(s.buf)))
	}
	if err != nil {
		f.forsake(where)
		return extent{}, err
	}
	return where, nil
}

var errNoRoom = errors.New("no room for spilled output")

// take finds room, and makes some if it has to.
func (f *spillFile) take(size int64) (extent, error) {
	for i, e := range f.free {
		if e.size >= size {
			if f.free[i] = (extent{e.at + size, e.size - size}); f.free[i].size == 0 {
				f.free = slices.Delete(f.free, i, i+1)
			}
			return extent{e.at, size}, nil
		}
	}
	at := f.size
	last := len(f.free) - 1
	if last >= 0 && f.free[last].end() == f.size {
		at = f.free[last].at
	}
	if f.full || !f.budget.takeDisk(at+size-f.size) {
		return extent{}, errNoRoom
	}
	if at < f.size {
		f.free = f.free[:last]
	}
	f.size = at + size
	return extent{at, size}, nil
}

// put makes room that was taken free again.
func (f *spillFile) put(e extent) {
	i, _ := slices.BinarySearchFunc(f.free, e.at, func(e extent, at int64) int { return int(e.at - at) })
	if i < len(f.free) && f.free[i].at == e.end() {
		e.size += f.free[i].size
		f.free = slices.Delete(f.free, i, i+1)
	}
	if i > 0 && f.free[i-1].end() == e.at {
		f.free[i-1].size += e.size
		return
	}
	f.free = slices.Insert(f.free, i, e)
}

// forsake gives up room that could not be written, and any growth.
func (f *spillFile) forsake(e extent) {
	f.full = true
	if e.end() == f.size { // new, or as good as new
		f.size -= e.size
		f.budget.disk.Add(-e.size)
	}
}

// load reads the bytes from from to to of a slab of size bytes back into buf,
// growing it. It is safe to call without a lock; what it returns may be of other
// slabs, or nonsense, if the room was used again meanwhile.
func (f *spillFile) load(where extent, size, from, to int, buf []byte) ([]byte, []run, error) {
	index := make([]byte, int(where.size)-size)
	data := slices.Grow(buf[:0], to-from)[:to-from]
	_, err := f.file.ReadAt(data, where.at+int64(from))
	if err == nil {
		_, err = f.file.ReadAt(index, where.at+int64(size))
	}
	if err != nil {
		return data[:0], nil, err
	}
	var runs []run
	end, at := 0, tick(0)
	for len(index) > 0 {
		n, used := binary.Uvarint(index)
		if used <= 0 {
			break
		}
		if n&entryLater != 0 {
			later, more := binary.Uvarint(index[used:])
			if more <= 0 {
				break
			}
			at += tick(later)
			used += more
		}
		end += int(n >> entryBits)
		if end > from && (len(runs) == 0 || runs[len(runs)-1].end() < to-from) {
			runs = append(runs, newRun(min(end, to)-from, int(n&streamMask), at))
		}
		index = index[used:]
	}
	if end != size {
		return data[:0], nil, fmt.Errorf("the index of spilled output is of %d bytes, not of %d", end, size)
	}
	return data, runs, nil
}

// close frees the disk.
func (f *spillFile) close() {
	f.budget.disk.Add(-f.size)
	_ = f.file.Close()
}
