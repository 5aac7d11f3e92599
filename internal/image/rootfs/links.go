package rootfs

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path"

	"golang.org/x/sys/unix"
)

// go-erofs writes no hard links. makeLinks makes them in a file that it has written: an
// entry of a directory names an inode by its number, and may name any. The format is that
// of docs.kernel.org, "EROFS", as far as go-erofs writes it.

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
	nid uint64
	at  int64 // where it is in the file
}

// Sizes and places in the format, in bytes.
const (
	superblockAt  = 1024
	erofsMagic    = 0xe0f5e1e2
	inodeUnit     = 32
	extendedInode = 64
	direntSize    = 12
	direntType    = 10 // within a dirent
)

// makeLinks makes the names of links, which are empty files, names of their targets.
func makeLinks(file *os.File, links []link) error {
	if len(links) == 0 {
		return nil
	}
	e, err := openEROFS(file)
	if err != nil {
		return fmt.Errorf("make hard links: %w", err)
	}
	for _, l := range links {
		if err := e.makeLink(l); err != nil {
			return fmt.Errorf("make the hard link %s: %w", l.name, err)
		}
	}
	return nil
}

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
	var kind [1]byte
	if _, err := e.file.ReadAt(kind[:], target.at+direntType); err != nil {
		return err
	}
	if _, err := e.file.WriteAt(number[:], name.at); err != nil {
		return err
	}
	_, err = e.file.WriteAt(kind[:], name.at+direntType)
	return err
}

func (e *erofsFile) find(p string) (entry, error) {
	dir := entry{nid: e.root}
	if parent := path.Dir(p); parent != "/" {
		var err error
		if dir, err = e.find(parent); err != nil {
			return entry{}, err
		}
	}
	entries, err := e.list(dir.nid)
	if err != nil {
		return entry{}, err
	}
	found, ok := entries[path.Base(p)]
	if !ok {
		return entry{}, fmt.Errorf("%s: %w", p, os.ErrNotExist)
	}
	return found, nil
}

// list returns the entries of a directory.
func (e *erofsFile) list(nid uint64) (map[string]entry, error) {
	if known := e.entries[nid]; known != nil {
		return known, nil
	}
	at := e.meta + int64(nid)*inodeUnit
	head := make([]byte, extendedInode)
	if _, err := e.file.ReadAt(head, at); err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	format := binary.LittleEndian.Uint16(head)
	size, own := int64(binary.LittleEndian.Uint32(head[8:])), int64(inodeUnit)
	if format&1 != 0 {
		size, own = int64(binary.LittleEndian.Uint64(head[8:])), extendedInode
	}
	if binary.LittleEndian.Uint16(head[4:])&unix.S_IFMT != unix.S_IFDIR || binary.LittleEndian.Uint16(head[2:]) != 0 {
		return nil, errors.New("it is no directory without attributes")
	}
	data := int64(binary.LittleEndian.Uint32(head[16:])) << e.blockBits
	whole := size
	if format>>1&7 == 2 { // inline: what does not fill a block is behind the inode
		whole = size >> e.blockBits << e.blockBits
	}
	entries := map[string]entry{}
	for done := int64(0); done < size; {
		from, n := data+done, min(size-done, 1<<e.blockBits)
		if done >= whole {
			from = at + own + done - whole
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
		into[string(name)] = entry{nid: binary.LittleEndian.Uint64(block[i*direntSize:]), at: at + int64(i*direntSize)}
	}
	return nil
}
