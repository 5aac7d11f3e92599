package image

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/internal/durable"
	"github.com/nestbox/nestbox/internal/image/rootfs"
)

// The template shows the host's programs (/usr, read-only) under an /etc, a
// /root and a /home/user of its own. Nothing else of the host is in it but what its
// packages have brought (packages.go), and what is named one by one below and holds no
// secrets. What a site adds to its machine, /usr/local and /usr/src, is masked.

const userID = 1000 // of "user", also its group

// EnvdPath is where a driver shows envd in a sandbox. Every root has an empty
// file there.
const EnvdPath = rootfs.EnvdPath

// merged are the directories that are links into /usr on a merged-/usr host.
var merged = []string{"bin", "sbin", "lib", "lib32", "lib64", "libx32"}

// emptyDirs are made with these permissions, owned by root.
var emptyDirs = []struct {
	path string
	mode fs.FileMode
}{
	{"dev", 0o755}, {"etc", 0o755}, {"home", 0o755}, {"mnt", 0o755}, {"media", 0o755},
	{"opt", 0o755}, {"proc", 0o555}, {"root", 0o700}, {"run", 0o755}, {"run/lock", 0o777 | fs.ModeSticky},
	{"srv", 0o755}, {"sys", 0o555}, {"usr", 0o755},
	{"tmp", 0o777 | fs.ModeSticky},
	// gVisor puts a tmpfs, which counts as memory, over a /tmp that is empty.
	// A directory that X makes there too keeps /tmp on the disk layer.
	{"tmp/.X11-unix", 0o777 | fs.ModeSticky},
	{"var", 0o755}, {"var/backups", 0o755}, {"var/cache", 0o755}, {"var/lib", 0o755}, {"var/lib/dpkg", 0o755},
	{"var/lib/misc", 0o755}, {"var/local", 0o775}, {"var/log", 0o755}, {"var/mail", 0o775}, {"var/opt", 0o755},
	{"var/spool", 0o755}, {"var/tmp", 0o777 | fs.ModeSticky},
}

// copied are the files and directories of the host's /etc that programs need
// and that say nothing of the host but which packages it has.
var copied = []string{
	"ld.so.cache", "ld.so.conf", "ld.so.conf.d", "debian_version", "mime.types", "protocols", "services",
	"rpc", "ethertypes", "inputrc", "shells", "terminfo", "magic", "magic.mime", "ssl/certs", "ssl/openssl.cnf",
	"ca-certificates", "ca-certificates.conf", "python3", "python3.11", "python3.12", "python3.13", "perl",
	"dpkg/origins", "fonts", "alternatives",
}

// masked are directories below /usr that a site fills itself. They are shown
// with these sub-directories only.
var masked = map[string][]string{
	"usr/local": {"bin", "etc", "games", "include", "lib", "sbin", "share", "src"},
	"usr/src":   nil,
}

// scratch is in memory: whether a template is there already can be found out
// when the disk is full.
const scratch = "/run"

// buildMinimal makes the template from the programs of the machine whose root
// is host, in a sub-directory of store that is named by the content. The same
// content is built once. A version that is there is never changed, since capsules run
// on it, but for one that is not what its name says, which a power cut may have left.
// left are the files of /etc that it could have had, and are not as they were shipped.
func buildMinimal(store, host string, ca []byte) (_ Root, left []string, err error) {
	b, hash, err := buildIn(scratch, host, ca)
	if b != nil {
		defer os.RemoveAll(b.dir)
	}
	if err == nil {
		if final := version(store, hash); b.is(final, hash) {
			return b.root(final), b.changed, nil
		}
	}
	b, hash, err = buildIn(store, host, ca)
	if b != nil {
		defer os.RemoveAll(b.dir) // no longer there if all went well
	}
	if err != nil {
		return Root{}, nil, err
	}
	final := version(store, hash)
	if !b.is(final, hash) {
		if err := b.keep(store, final); err != nil {
			return Root{}, nil, err
		}
	}
	return b.root(final), b.changed, nil
}

func version(store, hash string) string {
	return filepath.Join(store, nestbox.TemplateMinimal+"-"+hash)
}

// buildIn builds the template in a new sub-directory of dir, which the caller
// removes, also on error.
func buildIn(dir, host string, ca []byte) (b *builder, hash string, err error) {
	tmp, err := os.MkdirTemp(dir, unfinished)
	if err != nil {
		return nil, "", err
	}
	b = &builder{host: host, dir: tmp, ca: ca}
	if err := b.build(); err != nil {
		return b, "", err
	}
	hash, err = b.hash()
	return b, hash, err
}

// is reports whether a directory has what b has built.
func (b *builder) is(dir, hash string) bool {
	there, err := (&builder{dir: dir, binds: b.binds}).hash()
	return err == nil && there == hash
}

// keep makes what is built the version that it is, once it is on disk for good.
func (b *builder) keep(store, final string) error {
	dir, err := os.Open(b.dir)
	if err != nil {
		return err
	}
	defer dir.Close()
	if err := unix.Syncfs(int(dir.Fd())); err != nil {
		return err
	}
	broken := filepath.Join(store, unfinished+filepath.Base(final)) // goes with the next start
	if err := os.Rename(final, broken); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := os.Rename(b.dir, final); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return durable.SyncDir(store)
}

// builder fills one directory: root/ is the base, masks/ what is shown in
// place of the masked directories.
type builder struct {
	host, dir string
	ca        []byte   // certificates to trust besides
	binds     []string // of the host, absolute
	changed   []string // what the operator has changed, and is left out
}

func (b *builder) build() error {
	if err := os.Chmod(b.dir, 0o755); err != nil {
		return err
	}
	for _, step := range []func() error{b.makeDirs, b.linkPrograms, b.makeMasks, b.copyEtc, b.writeEtc, b.copyPackages, b.linkPython, b.addCertificates, b.makeHomes} {
		if err := step(); err != nil {
			return err
		}
	}
	return nil
}

func (b *builder) base(path string) string { return filepath.Join(b.dir, "root", path) }

func (b *builder) makeDirs() error {
	if err := makeDir(b.base(""), 0o755); err != nil {
		return err
	}
	for _, d := range emptyDirs {
		if err := makeDir(b.base(d.path), d.mode); err != nil {
			return err
		}
	}
	if err := os.Symlink("/run", b.base("var/run")); err != nil {
		return err
	}
	if err := os.Symlink("/run/lock", b.base("var/lock")); err != nil {
		return err
	}
	return writeFile(b.base(EnvdPath), "", 0o755)
}

// linkPrograms repeats the host's links into /usr; on a host where /bin is a
// directory of its own, that is shown too.
func (b *builder) linkPrograms() error {
	b.binds = []string{"/usr"}
	for _, name := range merged {
		info, err := os.Lstat(filepath.Join(b.host, name))
		switch {
		case errors.Is(err, fs.ErrNotExist):
		case err != nil:
			return err
		case info.Mode().Type() == fs.ModeSymlink:
			target, err := os.Readlink(filepath.Join(b.host, name))
			if err != nil {
				return err
			}
			if err := os.Symlink(target, b.base(name)); err != nil {
				return err
			}
		case info.IsDir():
			if err := makeDir(b.base(name), 0o755); err != nil {
				return err
			}
			b.binds = append(b.binds, "/"+name)
		}
	}
	return nil
}

func (b *builder) makeMasks() error {
	for dir, subs := range masked {
		if _, err := os.Stat(filepath.Join(b.host, dir)); errors.Is(err, fs.ErrNotExist) {
			continue
		} else if err != nil {
			return err
		}
		mask := filepath.Join(b.dir, "masks", filepath.Base(dir))
		if err := os.MkdirAll(filepath.Dir(mask), 0o755); err != nil {
			return err
		}
		if err := makeDir(mask, 0o755); err != nil {
			return err
		}
		for _, sub := range subs {
			if err := makeDir(filepath.Join(mask, sub), 0o755); err != nil {
				return err
			}
		}
	}
	return nil
}

func (b *builder) makeHomes() error {
	files := map[string]string{".bashrc": bashrc, ".profile": dotProfile}
	for name, text := range files {
		if err := writeFile(b.base("root/"+name), text, 0o644); err != nil {
			return err
		}
	}
	home := b.base("home/user")
	if err := makeDir(home, 0o755); err != nil {
		return err
	}
	if err := os.Chown(home, userID, userID); err != nil {
		return err
	}
	for name, text := range files {
		path := filepath.Join(home, name)
		if err := writeFile(path, text, 0o644); err != nil {
			return err
		}
		if err := os.Chown(path, userID, userID); err != nil {
			return err
		}
	}
	return nil
}

// root describes the finished template in dir.
func (b *builder) root(dir string) Root {
	r := Root{Image: filepath.Base(dir), Dir: filepath.Join(dir, "root")}
	for _, path := range b.binds {
		r.Binds = append(r.Binds, Bind{Source: filepath.Join(b.host, path), Target: path})
	}
	for _, target := range slices.Sorted(maps.Keys(masked)) {
		source := filepath.Join(dir, "masks", filepath.Base(target))
		if _, err := os.Stat(source); err == nil {
			r.Binds = append(r.Binds, Bind{Source: source, Target: "/" + target})
		}
	}
	return r
}

// hash names the content: every path with its type, permissions, link target
// or bytes.
func (b *builder) hash() (string, error) {
	sum := sha256.New()
	fmt.Fprintln(sum, b.binds)
	err := filepath.WalkDir(b.dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := e.Info()
		if err != nil {
			return err
		}
		fmt.Fprintln(sum, strings.TrimPrefix(path, b.dir), info.Mode())
		var content []byte
		switch info.Mode().Type() {
		case fs.ModeSymlink:
			target, err := os.Readlink(path)
			if err != nil {
				return err
			}
			content = []byte(target)
		case 0:
			if content, err = os.ReadFile(path); err != nil {
				return err
			}
		}
		fmt.Fprintln(sum, len(content))
		sum.Write(content)
		return nil
	})
	return hex.EncodeToString(sum.Sum(nil))[:16], err
}
