package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/client"
)

// copying is how files are copied.
type copying struct {
	*app
	recursive  bool
	keepOwners bool
	owner      string
}

func newCopy(a *app) *cobra.Command {
	c := &copying{app: a}
	cmd := &cobra.Command{
		Use:   "cp [-r] [-a] <source> <target>",
		Short: "Copy files between here and a capsule",
		Long: `Copy a file, or with -r a directory, between here and a capsule. A path in a
capsule is written <capsule>:/absolute/path; - is standard input or output. As
with cp, a target that is a directory, or ends with a slash, takes the source
in under its own name; dir/. is all that is in dir. A file appears whole or not at all.

What is copied keeps its links, mode and times; it belongs to
root in a capsule, and to you here, unless --owner or -a says otherwise.`,
		Example: `  nestbox cp model.bin cl-4f:/srv/
  nestbox cp -r --owner app project cl-4f:/srv/
  nestbox cp -r cl-4f:/root/results .
  nestbox cp cl-4f:/etc/os-release -`,
		Args: usual,
		RunE: func(cmd *cobra.Command, args []string) error {
			if c.owner != "" && c.keepOwners {
				return nestbox.Errorf(nestbox.CodeInvalid, "--owner and -a say different things")
			}
			c.recursive = c.recursive || c.keepOwners
			src, err := a.place(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			dst, err := a.place(cmd.Context(), args[1])
			if err != nil {
				return err
			}
			switch {
			case src.files != nil && dst.files == nil && c.owner != "":
				return nestbox.Errorf(nestbox.CodeInvalid, "--owner is for copies into a capsule: here, what is copied is yours")
			case src.files != nil && dst.files == nil:
				return c.download(cmd.Context(), src, dst.path)
			case src.files == nil && dst.files != nil:
				return c.upload(cmd.Context(), src.path, dst)
			case src.files != nil:
				return errors.New("cannot copy between capsules: copy to here first, or through a pipe with -")
			}
			return errors.New("neither side is in a capsule: write <capsule>:<path>")
		},
	}
	f := cmd.Flags()
	f.BoolVarP(&c.recursive, "recursive", "r", false, "copy directories with all that is in them")
	f.BoolVarP(&c.keepOwners, "archive", "a", false, "as -r, and keep owners, by their numbers")
	f.StringVar(&c.owner, "owner", "", "user of the capsule who owns what is copied into it (default root)")
	return cmd
}

// place is one side of a copy.
type place struct {
	files *client.Files // nil = here
	path  string        // "-" here = standard input or output
}

// place reads <capsule>:<path>. A path here that contains a colon is written
// with a slash before it, as for scp.
func (a *app) place(ctx context.Context, arg string) (place, error) {
	name, p, ok := strings.Cut(arg, ":")
	if !ok || name == "" || strings.Contains(name, "/") {
		return place{path: arg}, nil
	}
	if err := nestbox.ValidatePath(p); err != nil {
		return place{}, fmt.Errorf("%s: %w", arg, err)
	}
	capsule, err := a.capsule(ctx, name)
	if err != nil {
		return place{}, err
	}
	return place{capsule.Files, p}, nil
}

// upload copies from here into a capsule.
func (c *copying) upload(ctx context.Context, src string, dst place) error {
	if src == "-" {
		return dst.files.Write(ctx, dst.path, c.In, client.WriteOptions{User: c.owner})
	}
	info, err := os.Stat(src)
	if err != nil {
		return err
	}
	target, err := dst.under(ctx, ownName(src))
	if err != nil {
		return err
	}
	if !info.IsDir() {
		return c.uploadFile(ctx, dst.files, src, target)
	}
	if !c.recursive {
		return fmt.Errorf("%s is a directory: use -r", src)
	}
	return c.uploadTree(ctx, dst.files, src, target)
}

// ownName returns the name that a source has in the directory that it is copied
// into. That of dir/. is a dot, so that what is in dir is copied.
func ownName(p string) string {
	name := path.Base(filepath.ToSlash(p))
	if name != ".." {
		return name
	}
	abs, err := filepath.Abs(p)
	if err != nil {
		return "."
	}
	return filepath.Base(abs)
}

// under returns the path in the capsule that a source of this name is copied
// to.
func (p place) under(ctx context.Context, name string) (string, error) {
	if strings.HasSuffix(p.path, "/") {
		return path.Join(p.path, name), nil
	}
	info, err := p.files.Stat(ctx, p.path)
	switch {
	case nestbox.CodeOf(err) == nestbox.CodeNotFound:
		return p.path, nil
	case err != nil:
		return "", err
	case info.Type == nestbox.FileTypeDirectory:
		return path.Join(p.path, name), nil
	}
	return p.path, nil
}

func (c *copying) uploadFile(ctx context.Context, files *client.Files, src, dst string) error {
	f, err := os.Open(src)
	if err != nil {
		return err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return err
	}
	return files.Write(ctx, dst, f, client.WriteOptions{Mode: uint32(info.Mode().Perm()), User: c.owner, ModifiedAt: modifiedAt(info)})
}

// modifiedAt is when a file was modified; zero for a time that the API does not have.
func modifiedAt(info fs.FileInfo) time.Time {
	if info.ModTime().Unix() < 0 {
		return time.Time{}
	}
	return info.ModTime()
}

// download copies from a capsule to here.
func (c *copying) download(ctx context.Context, src place, dst string) error {
	if dst == "-" {
		return copyOut(ctx, src.files, src.path, c.Out)
	}
	info, err := src.files.Stat(ctx, src.path)
	if err != nil {
		return err
	}
	if st, err := os.Stat(dst); strings.HasSuffix(dst, "/") || (err == nil && st.IsDir()) {
		dst = filepath.Join(dst, ownName(src.path))
	}
	directory := info.Type == nestbox.FileTypeDirectory
	if info.Type == nestbox.FileTypeSymlink {
		directory, err = isDirectory(ctx, src)
		if err != nil {
			return err
		}
	}
	if !directory {
		root, err := os.OpenRoot(filepath.Dir(dst))
		if err != nil {
			return err
		}
		defer root.Close()
		return downloadFile(ctx, src.files, src.path, root, filepath.Base(dst), info)
	}
	if !c.recursive {
		return fmt.Errorf("%s is a directory: use -r", src.path)
	}
	return c.downloadTree(ctx, src, dst)
}

// isDirectory reports whether a symlink leads to a directory.
func isDirectory(ctx context.Context, p place) (bool, error) {
	packed, err := p.files.Pack(ctx, p.path, client.PackOptions{Contents: true})
	switch nestbox.CodeOf(err) {
	case nestbox.CodeInvalid, nestbox.CodeUnsupported: // it is none; the capsule's daemon is too old to say
		return false, nil
	}
	if err != nil {
		return false, err
	}
	return true, packed.Close()
}

func copyOut(ctx context.Context, files *client.Files, src string, w io.Writer) error {
	r, err := files.Read(ctx, src)
	if err != nil {
		return err
	}
	defer r.Close()
	_, err = io.Copy(w, r)
	return err
}

// partSuffix ends the name of a file that has not arrived whole yet.
const partSuffix = ".nestbox-part"

// downloadFile writes one file. A capsule is not trusted: a name that it made
// up cannot lead out of root.
func downloadFile(ctx context.Context, files *client.Files, src string, root *os.Root, dst string, info nestbox.FileInfo) (err error) {
	mode := fs.FileMode(info.Mode).Perm()
	if info.Type == nestbox.FileTypeSymlink {
		mode = 0o644 // what it points to is copied
	}
	part := dst + partSuffix
	f, err := root.OpenFile(part, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			_ = root.Remove(part)
		}
	}()
	if err := errors.Join(copyOut(ctx, files, src, f), f.Chmod(mode), f.Close()); err != nil {
		return err
	}
	if info.Type == nestbox.FileTypeFile {
		_ = root.Chtimes(part, info.ModifiedAt, info.ModifiedAt) // in whole seconds: the API has no more
	}
	return root.Rename(part, dst)
}
