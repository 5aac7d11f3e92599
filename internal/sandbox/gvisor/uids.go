package gvisor

import (
	"errors"
	"fmt"
	"hash/fnv"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"

	"github.com/nestbox/nestbox"
)

// Each sandbox has 65536 user and group ids of the host to itself, so that
// neither its processes nor its files are those of another sandbox or of a
// user of the host, even for a sandbox that broke out.
const (
	uidsEach = 1 << 16
	// firstUID follows the ranges that systemd sets aside for containers
	// (524288-1879048191); up to 2^31 there is room for this many ranges before
	// those that systemd uses again ("Users, Groups, UIDs and GIDs on systemd
	// systems").
	firstUID  = 1879048192
	uidRangeN = 4000
)

// uidRanges hands out ranges. A range in use is a link in dir, named by its
// number, that leads to the directory of the sandbox that has it: making a
// link is atomic, for all processes of the machine.
type uidRanges struct {
	dir  string
	base uint32
}

// claim takes a free range for a sandbox and returns its first id.
func (u uidRanges) claim(id, owner string) (uint32, error) {
	h := fnv.New32a()
	h.Write([]byte(id))
	start := h.Sum32() % uidRangeN // spreads them, so that the first try nearly always works
	for i := range uint32(uidRangeN) {
		n := (start + i) % uidRangeN
		err := os.Symlink(owner, u.link(n))
		if err == nil {
			return u.base + n*uidsEach, nil
		}
		if !errors.Is(err, fs.ErrExist) {
			return 0, nestbox.Errorf(nestbox.CodeInternal, "claim user ids for sandbox %s: %w", id, err)
		}
	}
	return 0, nestbox.Errorf(nestbox.CodeExhausted, "all %d ranges of user ids are in use", uidRangeN)
}

// release gives back all ranges of the sandbox with this directory.
func (u uidRanges) release(owner string) error {
	entries, err := os.ReadDir(u.dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		link := filepath.Join(u.dir, e.Name())
		target, err := os.Readlink(link)
		if errors.Is(err, fs.ErrNotExist) {
			continue // another sandbox gave it back meanwhile
		}
		if err != nil {
			return err
		}
		if target != owner {
			continue
		}
		if err := os.Remove(link); err != nil {
			return fmt.Errorf("release user ids: %w", err)
		}
	}
	return nil
}

func (u uidRanges) link(n uint32) string {
	return filepath.Join(u.dir, strconv.FormatUint(uint64(n), 10))
}
