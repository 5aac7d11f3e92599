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

	"github.com/spf13/cobra"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/client"
)

func newCopy(a *app) *cobra.Command {
	var recursive bool
	cmd := &cobra.Command{
		Use:   "cp [-r] <source> <target>",
		Short: "Copy files between here and a capsule",
		Long: `Copy a file, or with -r a directory, between here and a capsule. A path in a
capsule is written <capsule>:/absolute/path; - is standard input or output. As
with cp, a target that is a directory, or ends with a slash, takes the source
in under its own name; dir/. is all that is in dir. A file appears whole or not at all.`,
		Example: `  nestbox cp model.bin cl-4f:/srv/
  nestbox cp -r cl-4f:/root/results .
  nestbox cp cl-4f:/etc/os-release -`,
		Args: cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			src, err := a.place(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			dst, err := a.place(cmd.Context(), args[1])
			if err != nil {
				return err
			}
			switch {
			case src.files != nil && dst.files == nil:
				return a.download(cmd.Context(), src, dst.path, recursive)
			case src.files == nil && dst.files != nil:
				return a.upload(cmd.Context(), src.path, dst, recursive)
			case src.files != nil:
				return errors.New("cannot copy between capsules: copy to here first, or through a pipe with -")
			}
			return errors.New("neither side is in a capsule: write <capsule>:<path>")
		},
	}
	cmd.Flags().BoolVarP(&recursive, "recursive", "r", false, "copy directories with all that is in them")
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
func (a *app) upload(ctx context.Context, src string, dst place, recursive bool) error {
	if src == "-" {
		return dst.files.Write(ctx, dst.path, a.In, client.WriteOptions{})
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
		return uploadFile(ctx, dst.files, src, target)
	}
	if !recursive {
		return fmt.Errorf("%s is a directory: use -r", src)
	}
	return a.uploadTree(ctx, dst.files, src, target)
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

func uploadFile(ctx context.Context, files *client.Files, src, dst string) error {
	f, err := os.Open(src)
	if err != nil {
		return err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return err
	}
	return files.Write(ctx, dst, f, client.WriteOptions{Mode: uint32(info.Mode().Perm())})
}

// uploadTree copies a directory. What is neither a file nor a directory is
// named, and makes the copy fail in the end.
func (a *app) uploadTree(ctx context.Context, files *client.Files, src, dst string) error {
	skipped := 0
	err := filepath.WalkDir(src, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(src, p)
		if err != nil {
			return err
		}
		target := path.Join(dst, filepath.ToSlash(rel))
		switch {
		case d.IsDir():
			_, err := files.Mkdir(ctx, target)
			if nestbox.CodeOf(err) == nestbox.CodeConflict {
				return nil // it, or something that a file below it will clash with, exists
			}
			return err
		case d.Type().IsRegular():
			return uploadFile(ctx, files, p, target)
		}
		skipped++
		a.warn("not copied, since it is neither a file nor a directory: %s", p)
		return nil
	})
	return errors.Join(err, skippedError(skipped))
}

func skippedError(n int) error {
	if n == 0 {
		return nil
	}
	return fmt.Errorf("%d entries were not copied", n)
}

// download copies from a capsule to here.
func (a *app) download(ctx context.Context, src place, dst string, recursive bool) error {
	if dst == "-" {
		return copyOut(ctx, src.files, src.path, a.Out)
	}
	info, err := src.files.Stat(ctx, src.path)
	if err != nil {
		return err
	}
	if st, err := os.Stat(dst); strings.HasSuffix(dst, "/") || (err == nil && st.IsDir()) {
		dst = filepath.Join(dst, ownName(src.path))
	}
	if info.Type != nestbox.FileTypeDirectory {
		root, err := os.OpenRoot(filepath.Dir(dst))
		if err != nil {
			return err
		}
		defer root.Close()
		return downloadFile(ctx, src.files, src.path, root, filepath.Base(dst), info)
	}
	if !recursive {
		return fmt.Errorf("%s is a directory: use -r", src.path)
	}
	return a.downloadTree(ctx, src, dst)
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
	return root.Rename(part, dst)
}

// downloadTree copies a directory. Symlinks are made anew, as they are.
func (a *app) downloadTree(ctx context.Context, src place, dst string) error {
	if err := os.MkdirAll(dst, 0o755); err != nil {
		return err
	}
	root, err := os.OpenRoot(dst)
	if err != nil {
		return err
	}
	defer root.Close()
	base := path.Clean(src.path)
	skipped := 0
	err = walk(ctx, src.files, base, func(e nestbox.FileInfo) error {
		rel, err := filepath.Rel(base, e.Path)
		if err != nil || !filepath.IsLocal(rel) {
			return fmt.Errorf("the capsule lists %q, which is not below %s", e.Path, base)
		}
		switch e.Type {
		case nestbox.FileTypeDirectory:
			return root.MkdirAll(rel, 0o755)
		case nestbox.FileTypeFile:
			return downloadFile(ctx, src.files, e.Path, root, rel, e)
		case nestbox.FileTypeSymlink:
			return relink(root, e.SymlinkTarget, rel)
		}
		skipped++
		a.warn("not copied, since it is neither file, directory nor symlink: %s", e.Path)
		return nil
	})
	return errors.Join(err, skippedError(skipped))
}

func relink(root *os.Root, target, name string) error {
	if err := root.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return root.Symlink(target, name)
}

// walk calls visit with everything below a directory, parents first, however
// deep.
func walk(ctx context.Context, files *client.Files, dir string, visit func(nestbox.FileInfo) error) error {
	entries, err := files.List(ctx, dir, 1)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if err := visit(e); err != nil {
			return err
		}
		if e.Type == nestbox.FileTypeDirectory {
			if err := walk(ctx, files, e.Path, visit); err != nil {
				return err
			}
		}
	}
	return nil
}
