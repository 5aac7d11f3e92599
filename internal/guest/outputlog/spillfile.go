package outputlog

import (
	"encoding/binary"
	"fmt"
	"os"
	"slices"

	"golang.org/x/sys/unix"
)

// spillFile holds the older slabs of one output log in an unlinked temporary
// file of equal slots, which are used again in turn. It is guarded by the
// log's writing lock, but for load.
type spillFile struct {
	file     *os.File
	slotSize int64
	maxSlots int
	slots    int   // that the file has
	free     []int // of these
	budget   *Budget
	scratch  []byte // runs on their way to the file
}

// newSpillFile makes the file. It has no name, so that it is gone with the
// daemon.
func newSpillFile(b *Budget, slotSize int, maxSlots int) (*spillFile, error) {
	fd, err := unix.Open(b.limits.Dir, unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o600)
	if err == nil {
		return &spillFile{file: os.NewFile(uintptr(fd), "spilled output"), slotSize: int64(slotSize), maxSlots: maxSlots, budget: b}, nil
	}
	file, err := os.CreateTemp(b.limits.Dir, "nestbox-output-*")
	if err != nil {
		return nil, fmt.Errorf("make a file for spilled output: %w", err)
	}
	if err := os.Remove(file.Name()); err != nil {
		_ = file.Close()
		return nil, fmt.Errorf("unlink the file for spilled output: %w", err)
	}
	return &spillFile{file: file, slotSize: int64(slotSize), maxSlots: maxSlots, budget: b}, nil
}

// take returns a slot that is free, and false if there is none and there may
// not be more.
func (f *spillFile) take() (int, bool) {
	if n := len(f.free); n > 0 {
		slot := f.free[n-1]
		f.free = f.free[:n-1]
		return slot, true
	}
	if f.slots >= f.maxSlots || !f.budget.takeDisk(f.slotSize) {
		return 0, false
	}
	f.slots++
	return f.slots - 1, true
}

func (f *spillFile) put(slot int) { f.free = append(f.free, slot) }

// store writes a slab's bytes and runs into a slot.
func (f *spillFile) store(slot int, s *slab) error {
	at := int64(slot) * f.slotSize
	if _, err := f.file.WriteAt(s.buf, at); err != nil {
		return err
	}
	f.scratch = f.scratch[:0]
	for _, r := range s.runs {
		f.scratch = binary.LittleEndian.AppendUint32(f.scratch, uint32(r))
	}
	_, err := f.file.WriteAt(f.scratch, at+int64(len(s.buf)))
	return err
}

// load reads a slab of size bytes and runs back into buf, growing it. It is
// safe to call without a lock; what it returns may be of another slab if the
// slot was used again meanwhile.
func (f *spillFile) load(slot, size, runs int, buf []byte) ([]byte, []run, error) {
	whole := slices.Grow(buf[:0], size+4*runs)[:size+4*runs]
	if _, err := f.file.ReadAt(whole, int64(slot)*f.slotSize); err != nil {
		return whole[:0], nil, err
	}
	index := make([]run, runs)
	for i := range index {
		index[i] = run(binary.LittleEndian.Uint32(whole[size+4*i:]))
	}
	return whole[:size], index, nil
}

// close frees the disk.
func (f *spillFile) close() {
	f.budget.disk.Add(-int64(f.slots) * f.slotSize)
	_ = f.file.Close()
}

// forsake gives up the slot that was taken last, because it could not be
// written, and any growth.
func (f *spillFile) forsake() { f.maxSlots = f.slots }
