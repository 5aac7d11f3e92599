package cgroup

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

// OneCPU has the group run on one CPU only, or, with false, on all those of its
// parent again. Where there is no cpuset controller it does nothing.
func (g *Group) OneCPU(one bool) error {
	dir := filepath.Dir(g.file("cpuset", "cpuset.cpus"))
	name := "cpuset.cpus"
	if g.m.unified {
		name = "cpuset.cpus.effective"
	} else if _, mounted := g.m.dirs["cpuset"]; !mounted {
		return nil
	}
	text, err := os.ReadFile(filepath.Join(filepath.Dir(dir), name))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	cpus := strings.TrimSpace(string(text))
	if one {
		cpus = cpus[:strings.IndexAny(cpus+",", ",-")]
	} else if g.m.unified {
		cpus = "\n" // those of the parent, whatever they come to be
	}
	err = write(filepath.Join(dir, "cpuset.cpus"), cpus)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}
