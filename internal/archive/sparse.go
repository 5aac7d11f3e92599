package archive

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"path"
	"strconv"

	"golang.org/x/sys/unix"
)

// extent is a part of a file that holds data.
type extent struct{ offset, length int64 }

// maxExtents bounds the map of a file. One with more parts is packed whole.
const maxExtents = 64 << 10

// extentsOf returns where a file has data. The last one ends where the file does,
// and may be empty, since that is how the format says how long the file is.
func extentsOf(fd int, size int64) ([]extent, error) {
	var data []extent
	for at := int64(0); at < size; {
		start, err := unix.Seek(fd, at, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) { // a hole to the end
			break
		}
		if errors.Is(err, unix.EINVAL) || len(data) == maxExtents { // the file system does not tell
			return []extent{{0, size}}, nil
		}
		if err != nil {
			return nil, err
		}
		end, err := unix.Seek(fd, start, unix.SEEK_HOLE)
		if err != nil {
			return nil, err
		}
		if start, end = min(start, size), min(end, size); start < end {
			data = append(data, extent{start, end - start})
		}
		at = end
	}
	if len(data) == 0 || data[len(data)-1].offset+data[len(data)-1].length < size {
		data = append(data, extent{size, 0})
	}
	return data, nil
}

// block is the unit of a tar archive.
const block = 512

// sparseHeader begins an entry with holes, as GNU tar's format PAX 1.0 has it:
// https://www.gnu.org/software/tar/manual/html_node/PAX-1.html. archive/tar reads
// it and does not write it, so its extended header is written here, before a
// plain one of the entry.
func (k *packer) sparseHeader(h *tar.Header, data []extent) error {
	layout := sparseMap(data)
	stored := int64(len(layout))
	for _, e := range data {
		stored += e.length
	}
	pairs := []string{
		"GNU.sparse.major", "1",
		"GNU.sparse.minor", "0",
		"GNU.sparse.name", h.Name,
		"GNU.sparse.realsize", strconv.FormatInt(h.Size, 10),
		"mtime", fmt.Sprintf("%d.%09d", h.ModTime.Unix(), h.ModTime.Nanosecond()),
		"path", path.Join(path.Dir(h.Name), "GNUSparseFile.0", path.Base(h.Name)),
		"size", strconv.FormatInt(stored, 10),
		"uid", strconv.Itoa(h.Uid),
		"gid", strconv.Itoa(h.Gid),
	}
	if h.Uname != "" {
		pairs = append(pairs, "uname", h.Uname)
	}
	if h.Gname != "" {
		pairs = append(pairs, "gname", h.Gname)
	}
	records := paxRecords(pairs...)
	if err := k.tar.Flush(); err != nil {
		return err
	}
	if _, err := k.raw.Write(extendedHeader(records)); err != nil {
		return err
	}
	// Everything that is not plain is in the extended header. Sizes that do not fit
	// into a plain header are in base 256 then, which every reader takes.
	plain := &tar.Header{Typeflag: tar.TypeReg, Name: "GNUSparseFile.0", Size: stored, Mode: h.Mode, Format: tar.FormatUSTAR}
	if stored > 1<<33-1 {
		plain.Format = tar.FormatGNU
	}
	if err := k.tar.WriteHeader(plain); err != nil {
		return pathError(h.Name, err)
	}
	if k.opts.Progress != nil {
		k.opts.Progress(h.Name, h.Size)
	}
	_, err := k.tar.Write(layout)
	return err
}

// extendedHeader is an entry of tar that describes the one after it.
func extendedHeader(records []byte) []byte {
	extended := make([]byte, block, block+len(records)+block)
	copy(extended, "PaxHeaders.0/sparse")
	fill := func(at, width int, value int64) { copy(extended[at:], fmt.Sprintf("%0*o\x00", width-1, value)) }
	fill(100, 8, 0o644)
	fill(108, 8, 0)
	fill(116, 8, 0)
	fill(124, 12, int64(len(records)))
	fill(136, 12, 0)
	extended[156] = tar.TypeXHeader
	copy(extended[257:], "ustar\x0000")
	copy(extended[148:], "        ")
	sum := int64(0)
	for _, b := range extended {
		sum += int64(b)
	}
	copy(extended[148:], fmt.Sprintf("%06o\x00 ", sum))
	extended = append(extended, records...)
	extended = append(extended, make([]byte, padding(len(extended)))...)
	return extended
}

// sparseMap is the list of extents that an entry's content begins with.
func sparseMap(data []extent) []byte {
	var b bytes.Buffer
	fmt.Fprintf(&b, "%d\n", len(data))
	for _, e := range data {
		fmt.Fprintf(&b, "%d\n%d\n", e.offset, e.length)
	}
	b.Write(make([]byte, padding(b.Len())))
	return b.Bytes()
}

func padding(n int) int { return (block - n%block) % block }

// paxRecords are pairs of keys and values as an extended header has them: each
// begins with its own length in bytes.
func paxRecords(pairs ...string) []byte {
	var b bytes.Buffer
	for i := 0; i < len(pairs); i += 2 {
		rest := " " + pairs[i] + "=" + pairs[i+1] + "\n"
		size := len(rest) + len(strconv.Itoa(len(rest)))
		if len(strconv.Itoa(size)) > len(strconv.Itoa(len(rest))) {
			size++
		}
		b.WriteString(strconv.Itoa(size) + rest)
	}
	return b.Bytes()
}
