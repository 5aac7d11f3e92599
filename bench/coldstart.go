package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/client"
)

// coldStart compares creating a capsule and running /bin/true in it with what
// `runsc run` takes for /bin/true on the same root file system, alternating.
func (b *bench) coldStart(ctx context.Context) error {
	bundle, err := b.bundle()
	if err != nil {
		return err
	}
	var ours, theirs []time.Duration
	for i := range b.rounds {
		var c *client.Capsule
		t, err := timed(func() (err error) {
			c, err = b.createAndRun(ctx)
			return err
		})
		if err != nil {
			return err
		}
		ours = append(ours, t)
		if err := c.Destroy(ctx); err != nil { // not part of the measurement
			return err
		}
		t, err = timed(func() error { return b.runscRun(ctx, bundle, i) })
		if err != nil {
			return err
		}
		theirs = append(theirs, t)
	}
	r := ratio(median(ours), median(theirs))
	b.rows = append(b.rows, row{
		"create → first command done (cold, p50)", ms(median(ours)), "runsc run: " + ms(median(theirs)),
		fmt.Sprintf("%.2f", r), "≤ 1.20", r <= 1.2,
	})
	return nil
}

func (b *bench) createAndRun(ctx context.Context) (*client.Capsule, error) {
	c, err := b.client.Capsules.Create(ctx, nestbox.CapsuleSpec{})
	if err != nil {
		return nil, err
	}
	_, err = c.Exec(ctx, nestbox.ProcessSpec{Cmd: "/bin/true"})
	return c, err
}

// bundle writes an OCI bundle for runsc: /usr of this machine and /bin/true.
func (b *bench) bundle() (string, error) {
	dir := filepath.Join(b.dir, "bundle")
	root := filepath.Join(dir, "rootfs")
	for _, d := range []string{"usr", "proc", "dev", "tmp"} {
		if err := os.MkdirAll(filepath.Join(root, d), 0o755); err != nil {
			return "", err
		}
	}
	for _, d := range []string{"bin", "lib", "lib64"} {
		if err := os.Symlink("usr/"+d, filepath.Join(root, d)); err != nil {
			return "", err
		}
	}
	spec, err := json.Marshal(map[string]any{
		"ociVersion": "1.0.0",
		"process":    map[string]any{"args": []string{"/bin/true"}, "cwd": "/", "user": map[string]int{"uid": 0, "gid": 0}},
		"root":       map[string]any{"path": "rootfs", "readonly": false},
		"mounts":     []map[string]any{{"destination": "/usr", "type": "bind", "source": "/usr", "options": []string{"ro", "rbind"}}},
		"linux": map[string]any{"namespaces": []map[string]string{
			{"type": "pid"}, {"type": "mount"}, {"type": "ipc"}, {"type": "uts"}, {"type": "network"},
		}},
	})
	if err != nil {
		return "", err
	}
	return dir, os.WriteFile(filepath.Join(dir, "config.json"), spec, 0o600)
}

// runscRun runs the bundle with the runsc that is linked into nestbox.
func (b *bench) runscRun(ctx context.Context, bundle string, i int) error {
	cmd := exec.CommandContext(ctx, b.nestbox,
		"--root="+filepath.Join(b.dir, "runsc"), "--network=sandbox", "--platform=systrap",
		"--overlay2=root:dir="+b.dir, "run", "--bundle="+bundle, fmt.Sprintf("bench-%04d", i))
	cmd.Args[0] = "runsc"
	cmd.Env = []string{}
	out, err := cmd.CombinedOutput()
	if err != nil {
		return fmt.Errorf("runsc run: %w: %s", err, out)
	}
	return nil
}
