package image

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/internal/durable"
	"github.com/nestbox/nestbox/internal/image/rootfs"
)

// An image that was made is a directory of the store, named by what is in it.
const (
	erofsFile = "root.erofs"
	upperFile = "upper.tar" // if there is any need of one
)

// MaxBytes is how much there may be in all files of an image.
const MaxBytes = 64 << 30

// Info describes an image that was made.
type Info struct {
	Name string
	Size int64 // bytes on disk
}

// Make makes an image of what fill puts into a tree, unless it is there already. fill has
// a directory for what it needs until Make returns. The image is written whole or not at
// all, and used once more: by the caller, until Release.
//
// CodeExhausted: no space is left on the disk. Errors of fill are passed on.
func (s *Store) Make(ctx context.Context, fill func(ctx context.Context, tree *rootfs.Tree, scratch string) error) (Info, error) {
	dir, err := os.MkdirTemp(s.cfg.Dir, unfinished)
	if err != nil {
		return Info{}, noSpace(err)
	}
	defer os.RemoveAll(dir) // no longer there if all went well, and it was new
	scratch := filepath.Join(dir, "scratch")
	if err := os.Mkdir(scratch, 0o700); err != nil {
		return Info{}, noSpace(err)
	}
	tree := rootfs.New(MaxBytes)
	if err := fill(ctx, tree, scratch); err != nil {
		return Info{}, noSpace(err)
	}
	if err := tree.Complete(); err != nil {
		return Info{}, err
	}
	info, err := write(ctx, dir, tree)
	if err != nil {
		return Info{}, noSpace(err)
	}
	if err := os.RemoveAll(scratch); err != nil {
		return Info{}, err
	}
	return info, noSpace(s.keep(dir, info))
}

// write writes the files of an image.
func write(ctx context.Context, dir string, tree *rootfs.Tree) (Info, error) {
	sum := sha256.New()
	root, err := os.OpenFile(filepath.Join(dir, erofsFile), os.O_CREATE|os.O_EXCL|os.O_RDWR, 0o600)
	if err != nil {
		return Info{}, err
	}
	defer root.Close()
	if err := tree.WriteEROFS(ctx, root, filepath.Join(dir, "scratch")); err != nil {
		return Info{}, err
	}
	size, err := io.Copy(sum, io.NewSectionReader(root, 0, rootfs.MaxImage))
	if err != nil {
		return Info{}, err
	}
	upper, err := os.OpenFile(filepath.Join(dir, upperFile), os.O_CREATE|os.O_EXCL|os.O_RDWR, 0o600)
	if err != nil {
		return Info{}, err
	}
	defer upper.Close()
	entries, err := tree.WriteUpper(ctx, io.MultiWriter(upper, sum))
	if err != nil {
		return Info{}, err
	}
	if entries == 0 {
		err = os.Remove(upper.Name())
	} else if more, statErr := upper.Stat(); statErr == nil {
		size += more.Size()
	}
	return Info{Name: nestbox.ImageName(hex.EncodeToString(sum.Sum(nil))), Size: size}, err
}

// keep makes what is in dir the image that it is, once it is on disk for good.
func (s *Store) keep(dir string, info Info) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := unix.Syncfs(int(f.Fd())); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	final := filepath.Join(s.cfg.Dir, info.Name)
	// The name says what is in it: one that is there is this one.
	if err := os.Rename(dir, final); err != nil && !errors.Is(err, fs.ErrExist) && !errors.Is(err, syscall.ENOTEMPTY) {
		return err
	}
	if err := durable.SyncDir(s.cfg.Dir); err != nil {
		return err
	}
	s.uses[info.Name]++
	return nil
}

// made returns the root that an image is. CodeNotFound. Needs mu.
func (s *Store) made(name string) (Root, error) {
	dir := filepath.Join(s.cfg.Dir, name)
	root := Root{Image: name, EROFS: filepath.Join(dir, erofsFile), Upper: filepath.Join(dir, upperFile)}
	if _, err := os.Stat(root.EROFS); err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return Root{}, nestbox.Errorf(nestbox.CodeNotFound, "the image is not on this host")
		}
		return Root{}, fmt.Errorf("find the image %s: %w", name, err)
	}
	if _, err := os.Stat(root.Upper); err != nil {
		root.Upper = ""
	}
	return root, nil
}

// noSpace says when a disk is full.
func noSpace(err error) error {
	if errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) {
		return &nestbox.Error{Code: nestbox.CodeExhausted, Message: "no space is left on the disk of the host", Err: err}
	}
	return err
}
