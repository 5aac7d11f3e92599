package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"time"
)

const (
	treeDirs  = 50
	treeFiles = 5000
	wholeMiB  = 1024
)

// trees compares nestbox cp -r, in and out, with tar at both ends of nestbox exec:
// many small files, and one large one.
func (b *bench) trees(ctx context.Context) error {
	c, free, err := b.capsule(ctx, 2048)
	if err != nil {
		return err
	}
	defer free()
	for _, tree := range []struct {
		name   string
		make   func(dir string) error
		rounds int
	}{
		{fmt.Sprintf("%d files of 4 KiB", treeFiles), makeSmall, max(1, b.rounds/5)},
		{"one file of 1 GiB", makeWhole, max(1, b.rounds/20)},
	} {
		dir, err := os.MkdirTemp(b.dir, "trees-*")
		if err != nil {
			return err
		}
		if err := tree.make(dir + "/tree"); err != nil {
			return err
		}
		if err := b.compareTrees(ctx, c.ID, dir, tree.name, tree.rounds); err != nil {
			return err
		}
		if err := os.RemoveAll(dir); err != nil {
			return err
		}
	}
	return nil
}

// compareTrees takes what is in dir/tree in and out.
func (b *bench) compareTrees(ctx context.Context, capsule, dir, name string, rounds int) error {
	ways := []struct{ way, ours, theirs string }{
		{"in", `"$N" cp -r tree "$C":/t/`, `tar -c tree | "$N" exec -i "$C" -- sh -c 'mkdir -p /t && tar -x -C /t'`},
		{"out", `"$N" cp -r "$C":/t/tree out/`, `mkdir -p out && "$N" exec "$C" -- tar -c -C /t tree | tar -x -C out`},
	}
	for _, w := range ways {
		var ours, theirs []time.Duration
		for i := range 2 * rounds {
			script, times := w.ours, &ours
			if i%2 == 1 {
				script, times = w.theirs, &theirs
			}
			clean := `rm -rf out`
			if w.way == "in" {
				clean = `"$N" exec "$C" -- rm -rf /t`
			}
			if err := b.shell(ctx, capsule, dir, clean); err != nil {
				return err
			}
			t, err := timed(func() error { return b.shell(ctx, capsule, dir, script) })
			if err != nil {
				return err
			}
			*times = append(*times, t)
		}
		faster := ratio(median(theirs), median(ours))
		b.rows = append(b.rows, row{
			"nestbox cp -r, " + w.way + ": " + name, inSeconds(ours), "tar through exec: " + inSeconds(theirs), fmt.Sprintf("%.2f", faster), "≥ 1", faster >= 1,
		})
	}
	return nil
}

func inSeconds(times []time.Duration) string { return fmt.Sprintf("%.2f s", median(times).Seconds()) }

// shell runs a script here, in dir, with the program as $N and the capsule as $C.
func (b *bench) shell(ctx context.Context, capsule, dir, script string) error {
	cmd := exec.CommandContext(ctx, "sh", "-c", script)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "NESTBOX_URL="+b.server.url, "NESTBOX_API_KEY="+b.server.key, "N="+b.nestbox, "C="+capsule)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w: %s", script, err, out)
	}
	return nil
}

func makeSmall(dir string) error {
	for i := range treeFiles {
		if err := makeFile(filepath.Join(dir, fmt.Sprintf("d%d/f%d", i%treeDirs, i)), smallBytes); err != nil {
			return err
		}
	}
	return nil
}

func makeWhole(dir string) error { return makeFile(dir+"/whole", wholeMiB<<20) }

func makeFile(path string, size int64) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	_, err = io.CopyN(f, pattern{}, size)
	return errors.Join(err, f.Close())
}
