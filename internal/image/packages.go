package image

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// What packages keep outside /usr. Of /etc that is what they have shipped, byte for byte: a
// file that the operator has changed may hold anything, and is left out, and so is what
// not everybody may read. Of /var it is empty directories. In /opt sites keep much of their
// own: it is left out.

// withheld are places of which nothing is copied: what is in them decides who gets in, or
// is of the host's packages, and the template has its own.
var withheld = []string{"etc/pam.d", "etc/ssh", "etc/ssl/private", "etc/sudoers", "etc/sudoers.d", "etc/security", "etc/crontab", "etc/shadow", dpkgDir}

// maxShipped bounds what is copied of one file, in bytes.
const maxShipped = 4 << 20

// copyPackages copies what the host's packages own of /etc and /var.
func (b *builder) copyPackages() error {
	o, err := readOwned(b.host)
	if err != nil {
		return err
	}
	accounts := map[int]bool{}
	for _, path := range slices.Sorted(maps.Keys(o)) {
		info, err := os.Lstat(filepath.Join(b.host, path))
		if err != nil { // of a package, but removed
			continue
		}
		if isWithheld(path) || !b.free(path) {
			continue
		}
		if strings.HasPrefix(path, "etc/") {
			err = b.copyShipped(path, info, o[path])
		} else {
			err = b.makeOwned(path, info, accounts)
		}
		if err != nil {
			return err
		}
	}
	return b.addAccounts(accounts)
}

func isWithheld(path string) bool {
	return slices.ContainsFunc(withheld, func(dir string) bool { return path == dir || strings.HasPrefix(path, dir+"/") })
}

// free reports whether nothing is at a path yet, and no link on the way there: it could
// lead out of the template.
func (b *builder) free(path string) bool {
	for dir := filepath.Dir(path); dir != "."; dir = filepath.Dir(dir) {
		if info, err := os.Lstat(b.base(dir)); err == nil && !info.IsDir() {
			return false
		}
	}
	_, err := os.Lstat(b.base(path))
	return errors.Is(err, fs.ErrNotExist)
}

// copyShipped copies a path below /etc, if it is as its package has it.
func (b *builder) copyShipped(path string, info fs.FileInfo, sum string) error {
	from, to := filepath.Join(b.host, path), b.base(path)
	if info.Mode().IsRegular() {
		if info.Mode().Perm()&0o004 == 0 || info.Size() > maxShipped || sum == "" {
			return nil
		}
		text, err := os.ReadFile(from)
		if err != nil {
			return err
		}
		if sumOf(text) != sum {
			b.changed = append(b.changed, "/"+path)
			return nil
		}
	}
	return b.copyEntry(from, to, fs.FileInfoToDirEntry(info))
}

// makeOwned makes a directory below /var, of the same owner.
func (b *builder) makeOwned(path string, info fs.FileInfo, accounts map[int]bool) error {
	stat, ok := info.Sys().(*syscall.Stat_t)
	if !ok || !info.IsDir() || stat.Uid > maxSystemID || stat.Gid > maxSystemID {
		return nil
	}
	to := b.base(path)
	if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
		return err
	}
	if err := os.Mkdir(to, 0o700); err != nil {
		return err
	}
	accounts[int(stat.Uid)], accounts[int(stat.Gid)] = true, true
	if err := os.Lchown(to, int(stat.Uid), int(stat.Gid)); err != nil {
		return err
	}
	return unix.Chmod(to, stat.Mode&0o7777)
}

// maxSystemID is the last id of accounts that packages make (Debian Policy 9.2.2).
const maxSystemID = 999

// addAccounts adds those accounts of the host that own a directory to the template's,
// unless it has them.
func (b *builder) addAccounts(ids map[int]bool) error {
	for _, file := range []string{"passwd", "group"} {
		names, taken := map[string]bool{}, map[string]bool{}
		for line := range strings.Lines(etc[file]) {
			fields := strings.Split(line, ":")
			names[fields[0]], taken[fields[2]] = true, true
		}
		text := etc[file]
		err := eachLine(filepath.Join(b.host, "etc", file), func(line string) {
			fields := strings.Split(line, ":")
			if len(fields) < 4 || names[fields[0]] || taken[fields[2]] {
				return
			}
			if id, err := strconv.Atoi(fields[2]); err != nil || !ids[id] || id == 0 {
				return
			}
			fields[1] = "x" // whatever it is there, none has a password
			if file == "group" {
				fields[3] = "" // who is in it
			}
			text += strings.Join(fields, ":") + "\n"
		})
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		if err := writeFile(b.base("etc/"+file), text, 0o644); err != nil {
			return err
		}
	}
	return nil
}

// python is what programs of the interpreter's old name start.
const python = "usr/bin/python3"

// linkPython has python beside python3, where the host has no package that does so.
func (b *builder) linkPython() error {
	if _, err := os.Stat(filepath.Join(b.host, python)); err != nil {
		return nil
	}
	if _, err := os.Lstat(filepath.Join(b.host, "usr/bin/python")); err == nil {
		return nil
	}
	err := os.Symlink("/"+python, filepath.Join(b.dir, "masks/local/bin/python"))
	if errors.Is(err, fs.ErrNotExist) { // there is no /usr/local
		return nil
	}
	return err
}

// hostVersion tells whether programs or packages of the host may have changed: it is
// another then.
func hostVersion(host string) string {
	var version []string
	for _, path := range []string{
		dpkgDir + "/status", dpkgDir + "/info", "etc/alternatives", "etc/ld.so.cache", "etc/ssl/certs", CertificatesPath, "usr/bin", "usr/sbin",
	} {
		var stat unix.Stat_t
		if err := unix.Stat(filepath.Join(host, path), &stat); err == nil {
			version = append(version, fmt.Sprintf("%s %d %d %d", path, stat.Ino, stat.Size, stat.Mtim.Nano()))
		}
	}
	return strings.Join(version, "\n")
}
