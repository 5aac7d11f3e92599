package image

import (
	"bufio"
	"crypto/md5" //nolint:gosec // it is what dpkg has
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"
)

// owned is what the packages of a Debian host say is theirs: paths below /etc and /var,
// without the slash at the start. A path of a file leads to the MD5 of what the
// package ships, in hex; that of a directory or link to "". Files that a package lists
// and gives no sum of are not in it.
type owned map[string]string

const dpkgDir = "var/lib/dpkg"

// readOwned reads dpkg's database (deb(5), dpkg-query(1)); on a host without one it
// returns nothing.
func readOwned(host string) (owned, error) {
	lists, err := filepath.Glob(filepath.Join(host, dpkgDir, "info", "*.list"))
	if err != nil {
		return nil, err
	}
	o := owned{}
	for _, list := range lists {
		err := eachLine(list, func(line string) {
			if p, ok := inScope(line); ok {
				o[p] = ""
			}
		})
		if err != nil {
			return nil, err
		}
		sums := strings.TrimSuffix(list, ".list") + ".md5sums"
		err = eachLine(sums, func(line string) {
			sum, p, _ := strings.Cut(line, "  ")
			if p, ok := inScope("/" + p); ok {
				o[p] = sum
			}
		})
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, err
		}
	}
	err = o.addConffiles(filepath.Join(host, dpkgDir, "status"))
	if errors.Is(err, fs.ErrNotExist) {
		err = nil
	}
	return o, err
}

// addConffiles adds the sums of configuration files, as they were shipped.
func (o owned) addConffiles(status string) error {
	installed, conffiles := false, false
	return eachLine(status, func(line string) {
		if !strings.HasPrefix(line, " ") {
			conffiles = line == "Conffiles:"
			if value, ok := strings.CutPrefix(line, "Status: "); ok {
				installed = strings.HasSuffix(value, " installed")
			}
			return
		}
		fields := strings.Fields(line)
		if !conffiles || !installed || len(fields) != 2 { // more: it is obsolete
			return
		}
		if p, ok := inScope(fields[0]); ok {
			o[p] = fields[1]
		}
	})
}

// inScope returns a path in the form of owned, if it is one that matters.
func inScope(p string) (string, bool) {
	if path.Clean(p) != p {
		return "", false
	}
	for _, top := range []string{"/etc/", "/var/"} {
		if strings.HasPrefix(p, top) {
			return p[1:], true
		}
	}
	return "", false
}

func eachLine(name string, f func(line string)) error {
	file, err := os.Open(name)
	if err != nil {
		return err
	}
	defer file.Close()
	lines := bufio.NewScanner(file)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		f(lines.Text())
	}
	if err := lines.Err(); err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	return nil
}

func sumOf(text []byte) string {
	sum := md5.Sum(text) //nolint:gosec // see above
	return hex.EncodeToString(sum[:])
}
