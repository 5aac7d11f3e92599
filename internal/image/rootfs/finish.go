package rootfs

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"maps"
	"math"
	"os"
	"path"
	"slices"

	"golang.org/x/sys/unix"
)

// finish makes two things in a file that go-erofs has written that it has no means for.
// The format is that of docs.kernel.org, "EROFS", as far as go-erofs writes it.
//
// Hard links: an entry of a directory names an inode by its number, and may name any.
//
// Small files that can be mapped into memory: go-erofs puts what is in them behind their
// inodes, and gVisor, which maps the file of the image itself, ends a program that maps
// such a file with SIGBUS. (Programs map small files of their locale at each start.) They
// get blocks of their own at the end.
func finish(file *os.File, links []link) error {
	e, err := openEROFS(file)
	if err != nil {
		return fmt.Errorf("finish the image: %w", err)
	}
	for _, l := range links {
		if err := e.makeLink(l); err != nil {
			return fmt.Errorf("make the hard link %s: %w", l.name, err)
		}
	}
	if err := e.alignFiles(); err != nil {
		return fmt.Errorf("finish the image: %w", err)
	}
	return nil
}

// link is a second name of a file.
type link struct{ name, target string } // absolute paths

// erofsFile is an EROFS file whose directories are read and changed.
type erofsFile struct {
	file      *os.File
	blockBits uint8
	meta      int64 // where the inodes begin, in bytes
	root      uint64
	entries   map[uint64]map[string]entry // of directories that were read, by number
}

// entry is one entry of a directory.
type entry struct {
	nid  uint64
	kind byte  // of what it names, as in a dirent
	at   int64 // where it is in the file
}

// Sizes and places in the format, in bytes.
const (
	superblockAt  = 1024
	erofsMagic    = 0xe0f5e1e2
	inodeUnit     = 32
	extendedInode = 64
	direntSize    = 12
	direntType    = 10 // within a dirent
	blocksAt      = superblockAt + 36
	addressAt     = 16 // within an inode: its first block
)

const (
	kindFile = 1
	kindDir  = 2

	layoutPlain  = 0
	layoutInline = 2
)

func openEROFS(file *os.File) (*erofsFile, error) {
	var sb [128]byte
	if _, err := file.ReadAt(sb[:], superblockAt); err != nil {
		return nil, err
	}
	if binary.LittleEndian.Uint32(sb[:]) != erofsMagic {
		return nil, errors.New("it is no EROFS file")
	}
	e := &erofsFile{file: file, blockBits: sb[12], entries: map[uint64]map[string]entry{}}
	e.root = uint64(binary.LittleEndian.Uint16(sb[14:]))
	e.meta = int64(binary.LittleEndian.Uint32(sb[40:])) << e.blockBits
	return e, nil
}

func (e *erofsFile) makeLink(l link) error {
	target, err := e.find(l.target)
	if err != nil {
		return err
	}
	name, err := e.find(l.name)
	if err != nil {
		return err
	}
	var number [8]byte
	binary.LittleEndian.PutUint64(number[:], target.nid)
	if _, err := e.file.WriteAt(number[:], name.at); err != nil {
		return err
	}
	if _, err := e.file.WriteAt([]byte{target.kind}, name.at+direntType); err != nil {
		return err
	}
	// What was read of the directory is what is there.
	dir, err := e.dir(path.Dir(l.name))
	if err != nil {
		return err
	}
	name.nid, name.kind = target.nid, target.kind
	dir[path.Base(l.name)] = name
	return nil
}

// alignFiles gives every file blocks of its own.
func (e *erofsFile) alignFiles() error {
	info, err := e.file.Stat()
	if err != nil {
		return err
	}
	block := int64(1) << e.blockBits
	out := &appender{file: e.file, end: (info.Size() + block - 1) / block, block: block}
	if err := e.alignBelow(e.root, out); err != nil {
		return err
	}
	if err := out.flush(); err != nil {
		return err
	}
	if out.end > math.MaxUint32 {
		return errors.New("the image is larger than EROFS can be")
	}
	if err := e.file.Truncate(out.end << e.blockBits); err != nil {
		return err
	}
	_, err = e.file.WriteAt(binary.LittleEndian.AppendUint32(nil, uint32(out.end)), blocksAt)
	return err
}

func (e *erofsFile) alignBelow(nid uint64, out *appender) error {
	entries, err := e.list(nid)
	if err != nil {
		return err
	}
	for _, name := range slices.Sorted(maps.Keys(entries)) {
		entry := entries[name]
		switch {
		case name == "." || name == "..":
		case entry.kind == kindDir:
			err = e.alignBelow(entry.nid, out)
		case entry.kind == kindFile:
			err = e.alignFile(entry.nid, out)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func (e *erofsFile) alignFile(nid uint64, out *appender) error {
	in, err := e.inode(nid)
	if err != nil || in.layout != layoutInline || in.size == 0 {
		return err
	}
	data := make([]byte, in.size)
	if _, err := e.file.ReadAt(data, in.behind); err != nil {
		return err
	}
	address, err := out.add(data)
	if err != nil {
		return err
	}
	format := binary.LittleEndian.AppendUint16(nil, in.format&^(7<<1)|layoutPlain<<1)
	if _, err := e.file.WriteAt(format, in.at); err != nil {
		return err
	}
	_, err = e.file.WriteAt(binary.LittleEndian.AppendUint32(nil, uint32(address)), in.at+addressAt)
	return err
}

// appender adds blocks to a file, many at a time.
type appender struct {
	file       *os.File
	block, end int64 // of bytes, and in blocks
	waiting    []byte
}

const appendAtOnce = 1 << 20

// add returns the number of the first block.
func (a *appender) add(data []byte) (int64, error) {
	at := a.end
	blocks := (int64(len(data)) + a.block - 1) / a.block
	a.waiting = append(a.waiting, data...)
	a.waiting = append(a.waiting, make([]byte, blocks*a.block-int64(len(data)))...)
	a.end += blocks
	if len(a.waiting) < appendAtOnce {
		return at, nil
	}
	return at, a.flush()
}

func (a *appender) flush() error {
	_, err := a.file.WriteAt(a.waiting, a.end*a.block-int64(len(a.waiting)))
	a.waiting = a.waiting[:0]
	return err
}

func (e *erofsFile) find(p string) (entry, error) {
	entries, err := e.dir(path.Dir(p))
	if err != nil {
		return entry{}, err
	}
	found, ok := entries[path.Base(p)]
	if !ok {
		return entry{}, fmt.Errorf("%s: %w", p, os.ErrNotExist)
	}
	return found, nil
}

// dir returns the entries of the directory with a path.
func (e *erofsFile) dir(p string) (map[string]entry, error) {
	if p == "/" {
		return e.list(e.root)
	}
	dir, err := e.find(p)
	if err != nil {
		return nil, err
	}
	return e.list(dir.nid)
}

// diskInode is what is needed of an inode.
type diskInode struct {
	at      int64 // where it is in the file
	behind  int64 // what follows it
	format  uint16
	layout  uint16
	mode    uint16
	size    int64
	address int64 // of its data, in bytes
}

// inode reads an inode. It has no attributes.
func (e *erofsFile) inode(nid uint64) (diskInode, error) {
	at := e.meta + int64(nid)*inodeUnit
	head := make([]byte, extendedInode)
	if _, err := e.file.ReadAt(head, at); err != nil && !errors.Is(err, io.EOF) {
		return diskInode{}, err
	}
	in := diskInode{
		at: at, behind: at + inodeUnit, format: binary.LittleEndian.Uint16(head), mode: binary.LittleEndian.Uint16(head[4:]),
		size:    int64(binary.LittleEndian.Uint32(head[8:])),
		address: int64(binary.LittleEndian.Uint32(head[addressAt:])) << e.blockBits,
	}
	in.layout = in.format >> 1 & 7
	if in.format&1 != 0 {
		in.behind, in.size = at+extendedInode, int64(binary.LittleEndian.Uint64(head[8:]))
	}
	if binary.LittleEndian.Uint16(head[2:]) != 0 {
		return diskInode{}, errors.New("an inode has attributes")
	}
	return in, nil
}

// list returns the entries of a directory.
func (e *erofsFile) list(nid uint64) (map[string]entry, error) {
	if known := e.entries[nid]; known != nil {
		return known, nil
	}
	in, err := e.inode(nid)
	if err != nil {
		return nil, err
	}
	if in.mode&unix.S_IFMT != unix.S_IFDIR {
		return nil, errors.New("it is no directory")
	}
	whole := in.size
	if in.layout == layoutInline { // what does not fill a block is behind the inode
		whole = in.size >> e.blockBits << e.blockBits
	}
	entries := map[string]entry{}
	for done := int64(0); done < in.size; {
		from, n := in.address+done, min(in.size-done, 1<<e.blockBits)
		if done >= whole {
			from = in.behind + done - whole
		}
		if err := e.readBlock(from, n, entries); err != nil {
			return nil, err
		}
		done += n
	}
	e.entries[nid] = entries
	return entries, nil
}

// readBlock reads one block of a directory: entries, and then their names.
func (e *erofsFile) readBlock(at, size int64, into map[string]entry) error {
	block := make([]byte, size)
	if _, err := e.file.ReadAt(block, at); err != nil {
		return err
	}
	if size < direntSize {
		return errors.New("a block of a directory is too short")
	}
	nameAt := func(i int) int { return int(binary.LittleEndian.Uint16(block[i*direntSize+8:])) }
	count := nameAt(0) / direntSize
	if count*direntSize > len(block) {
		return errors.New("a block of a directory has more entries than it can")
	}
	for i := range count {
		end := len(block)
		if i+1 < count {
			end = nameAt(i + 1)
		}
		if nameAt(i) > end || end > len(block) {
			return errors.New("a block of a directory has a name outside it")
		}
		name, _, _ := bytes.Cut(block[nameAt(i):end], []byte{0})
		into[string(name)] = entry{nid: binary.LittleEndian.Uint64(block[i*direntSize:]), kind: block[i*direntSize+direntType], at: at + int64(i*direntSize)}
	}
	return nil
}
