package image

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

// etc are the files of /etc that are written and not copied.
var etc = map[string]string{
	"passwd": `root:x:0:0:root:/root:/bin/bash
daemon:x:1:1:daemon:/usr/sbin:/usr/sbin/nologin
bin:x:2:2:bin:/bin:/usr/sbin/nologin
sys:x:3:3:sys:/dev:/usr/sbin/nologin
sync:x:4:65534:sync:/bin:/bin/sync
man:x:6:12:man:/var/cache/man:/usr/sbin/nologin
mail:x:8:8:mail:/var/mail:/usr/sbin/nologin
www-data:x:33:33:www-data:/var/www:/usr/sbin/nologin
_apt:x:42:65534::/nonexistent:/usr/sbin/nologin
user:x:1000:1000:user:/home/user:/bin/bash
nobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin
`,
	"group": `root:x:0:
daemon:x:1:
bin:x:2:
sys:x:3:
adm:x:4:
tty:x:5:
disk:x:6:
mail:x:8:
man:x:12:
sudo:x:27:user
www-data:x:33:
utmp:x:43:
staff:x:50:
games:x:60:
users:x:100:
user:x:1000:
nogroup:x:65534:
`,
	// su works for root, and for nobody else; no account has a password.
	"shadow":          "root:*:19000:0:99999:7:::\nuser:*:19000:0:99999:7:::\n",
	"gshadow":         "",
	"pam.d/su":        "auth sufficient pam_rootok.so\nauth required pam_deny.so\naccount required pam_permit.so\nsession required pam_permit.so\n",
	"pam.d/su-l":      "auth sufficient pam_rootok.so\nauth required pam_deny.so\naccount required pam_permit.so\nsession required pam_permit.so\n",
	"pam.d/runuser":   "auth sufficient pam_rootok.so\naccount required pam_permit.so\nsession required pam_permit.so\n",
	"pam.d/runuser-l": "auth sufficient pam_rootok.so\naccount required pam_permit.so\nsession required pam_permit.so\n",
	"pam.d/other":     "auth required pam_deny.so\naccount required pam_deny.so\npassword required pam_deny.so\nsession required pam_deny.so\n",
	"hostname":        "capsule\n",
	"hosts":           "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n",
	"resolv.conf":     "# There is no name server in reach.\n",
	"host.conf":       "multi on\n",
	"fstab":           "",
	"nsswitch.conf":   "passwd: files\ngroup: files\nshadow: files\nhosts: files dns\nnetworks: files\nprotocols: files\nservices: files\nrpc: files\n",
	// A login shell keeps the PATH that its capsule was made with.
	"profile": `export PATH="${PATH:-/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin}"
if [ -n "${BASH-}" ] && [ "$BASH" != /bin/sh ] && [ -r /etc/bash.bashrc ]; then
  . /etc/bash.bashrc
fi
`,
	"bash.bashrc": `[ -z "$PS1" ] && return
shopt -s checkwinsize
PS1='\u@\h:\w\$ '
`,
	"login.defs": "UID_MIN 1000\nUID_MAX 60000\nGID_MIN 1000\nGID_MAX 60000\nUMASK 022\nENCRYPT_METHOD YESCRYPT\n",
}

const bashrc = `[ -z "$PS1" ] && return
HISTCONTROL=ignoreboth
alias ls='ls --color=auto'
alias ll='ls -l'
`

const dotProfile = `if [ -n "$BASH_VERSION" ] && [ -f "$HOME/.bashrc" ]; then
  . "$HOME/.bashrc"
fi
`

func (b *builder) writeEtc() error {
	for name, text := range etc {
		mode := fs.FileMode(0o644)
		if strings.HasSuffix(name, "shadow") {
			mode = 0o600
		}
		path := b.base("etc/" + name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			return err
		}
		if err := writeFile(path, text, mode); err != nil {
			return err
		}
	}
	for link, target := range map[string]string{
		"etc/mtab":       "/proc/mounts",
		"etc/os-release": "../usr/lib/os-release",
		"etc/localtime":  "/usr/share/zoneinfo/UTC",
	} {
		if err := os.Symlink(target, b.base(link)); err != nil {
			return err
		}
	}
	return writeFile(b.base("var/lib/dpkg/status"), "", 0o644)
}

func (b *builder) copyEtc() error {
	for _, name := range copied {
		from := filepath.Join(b.host, "etc", name)
		err := filepath.WalkDir(from, func(path string, e fs.DirEntry, err error) error {
			if err != nil {
				return err
			}
			rel, err := filepath.Rel(b.host, path)
			if err != nil {
				return err
			}
			return b.copyEntry(path, b.base(rel), e)
		})
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}

// copyEntry copies a directory, a link or a file that anybody may read.
func (b *builder) copyEntry(from, to string, e fs.DirEntry) error {
	info, err := e.Info()
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
		return err
	}
	switch info.Mode().Type() {
	case fs.ModeDir:
		return makeDir(to, 0o755)
	case fs.ModeSymlink:
		target, err := os.Readlink(from)
		if err != nil {
			return err
		}
		// What leads into the masked or the private would only dangle.
		if filepath.IsAbs(target) && (!strings.HasPrefix(target, "/usr/") || strings.HasPrefix(target, "/usr/local/")) {
			return nil
		}
		return os.Symlink(target, to)
	case 0:
		if info.Mode().Perm()&0o004 == 0 {
			return nil
		}
		text, err := os.ReadFile(from)
		if err != nil {
			return err
		}
		return writeFile(to, string(text), info.Mode().Perm()&0o755)
	}
	return nil
}

// makeDir makes a directory, or takes one that is there, with exactly this
// mode, whatever the umask.
func makeDir(path string, mode fs.FileMode) error {
	if err := os.Mkdir(path, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return os.Chmod(path, mode)
}

func writeFile(path, text string, mode fs.FileMode) error {
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		return err
	}
	return os.Chmod(path, mode)
}

// CertificatesPath is where programs find the certificates that they trust.
const CertificatesPath = "/etc/ssl/certs/ca-certificates.crt"

// addCertificates adds to what the host trusts.
func (b *builder) addCertificates() error {
	if len(b.ca) == 0 {
		return nil
	}
	path := b.base(CertificatesPath)
	there, err := os.ReadFile(path)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if len(there) > 0 && there[len(there)-1] != '\n' {
		there = append(there, '\n')
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) { // it may be a link
		return err
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	return writeFile(path, string(there)+string(b.ca), 0o644)
}
