package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/tarball"

	"github.com/nestbox/nestbox/internal/image"
	"github.com/nestbox/nestbox/internal/image/oci"
	"github.com/nestbox/nestbox/internal/image/rootfs"
)

// imageImport is the argument with which this program imports one image and ends, so that
// its memory can be told.
const imageImport = "import-image"

// imageBytes is about how large the image is when it is unpacked.
const imageBytes = 500 << 20

// importImage imports an image from a registry on this machine, and compares that with
// skopeo and umoci, or, where those are missing, with tar, which only unpacks.
func (b *bench) importImage(ctx context.Context) error {
	dir := filepath.Join(b.dir, "import")
	if err := os.MkdirAll(filepath.Join(dir, "blobs"), 0o700); err != nil {
		return err
	}
	server := httptest.NewServer(registry.New(registry.Logger(log.New(io.Discard, "", 0)), registry.WithBlobHandler(registry.NewDiskBlobHandler(filepath.Join(dir, "blobs")))))
	defer server.Close()
	reference := strings.TrimPrefix(server.URL, "http://") + "/bench:1"
	layer := filepath.Join(dir, "layer.tar.gz")
	if err := pushImage(ctx, reference, layer); err != nil {
		return err
	}
	var ours, theirs []time.Duration
	var memory int64
	what := "skopeo copy + umoci unpack"
	for i := range 3 {
		at := filepath.Join(dir, fmt.Sprint(i))
		var used int64
		t, err := timed(func() (err error) {
			used, err = importApart(ctx, reference, at)
			return err
		})
		if err != nil {
			return err
		}
		ours, memory = append(ours, t), max(memory, used)
		t, err = timed(func() error { return unpackTheirs(ctx, reference, at+"-theirs") })
		if errors.Is(err, exec.ErrNotFound) {
			what = "tar x"
			t, err = timed(func() error {
				return exec.CommandContext(ctx, "tar", "-xzf", layer, "--one-top-level="+at+"-tar").Run()
			})
		}
		if err != nil {
			return err
		}
		theirs = append(theirs, t)
	}
	r := ratio(median(ours), median(theirs))
	b.rows = append(b.rows,
		row{"import of a 500 MB image (p50)", ms(median(ours)), what + ": " + ms(median(theirs)), fmt.Sprintf("%.2f", r), "≤ 1.00", r <= 1},
		row{"memory of it, at most", fmt.Sprintf("%d MiB", memory>>20), "", "", "≤ 150 MiB", memory <= 150<<20})
	return nil
}

// pushImage makes an image of some of this machine's programs.
func pushImage(ctx context.Context, reference, layer string) error {
	script := fmt.Sprintf(`find /usr -xdev -type f -size -20M -print0 2>/dev/null | head -z -n 60000 | tar --null --no-recursion -T - -C / -cf - 2>/dev/null | head -c %d | gzip -1 > %s`, imageBytes/512*512, layer)
	// What head leaves is an archive without its end, whose last file may be cut: tar mends it.
	if out, err := exec.CommandContext(ctx, "sh", "-c", script+fmt.Sprintf(` && mkdir %[1]s.d && (tar -xzf %[1]s -C %[1]s.d 2>/dev/null; tar -C %[1]s.d -cf - . | gzip -1 > %[1]s.new) && mv %[1]s.new %[1]s`, layer)).CombinedOutput(); err != nil {
		return fmt.Errorf("pack an image: %w: %s", err, out)
	}
	l, err := tarball.LayerFromFile(layer)
	if err != nil {
		return err
	}
	img, err := mutate.AppendLayers(empty.Image, l)
	if err != nil {
		return err
	}
	config, err := img.ConfigFile()
	if err != nil {
		return err
	}
	config = config.DeepCopy()
	config.OS, config.Architecture = "linux", runtime.GOARCH // umoci wants to know
	if img, err = mutate.ConfigFile(img, config); err != nil {
		return err
	}
	ref, err := name.ParseReference(reference)
	if err != nil {
		return err
	}
	return remote.Write(ref, img, remote.WithContext(ctx))
}

// importApart imports in a process of its own, and returns the most memory that it had.
func importApart(ctx context.Context, reference, dir string) (bytes int64, err error) {
	self, err := os.Executable()
	if err != nil {
		return 0, err
	}
	cmd := exec.CommandContext(ctx, self, imageImport, reference, dir)
	cmd.Stderr = os.Stderr
	// It says so itself: what wait4(2) tells includes what this process has.
	out, err := cmd.Output()
	if err != nil {
		return 0, err
	}
	kib, err := strconv.ParseInt(strings.TrimSpace(string(out)), 10, 64)
	return kib << 10, err
}

// importHere is what that process does.
func importHere(ctx context.Context, reference, dir string) error {
	blobs := filepath.Join(dir, "blobs")
	if err := os.MkdirAll(blobs, 0o700); err != nil {
		return err
	}
	store, err := image.NewStore(image.Config{Dir: filepath.Join(dir, "images")})
	if err != nil {
		return err
	}
	img, err := oci.Registry{Blobs: blobs}.Open(ctx, reference, oci.Options{})
	if err != nil {
		return err
	}
	defer img.Close()
	if _, err := store.Make(ctx, func(ctx context.Context, tree *rootfs.Tree, scratch string) error {
		return img.Fill(ctx, tree, scratch, nil)
	}); err != nil {
		return err
	}
	status, err := os.ReadFile("/proc/self/status")
	if err != nil {
		return err
	}
	_, peak, _ := strings.Cut(string(status), "VmHWM:") // proc_pid_status(5)
	peak, _, ok := strings.Cut(peak, "kB")
	if !ok {
		return errors.New("the system tells no use of memory")
	}
	fmt.Println(strings.TrimSpace(peak))
	return nil
}

func unpackTheirs(ctx context.Context, reference, dir string) error {
	for _, args := range [][]string{
		{"skopeo", "copy", "--quiet", "--src-tls-verify=false", "docker://" + reference, "oci:" + dir + ":1"},
		{"umoci", "unpack", "--image", dir + ":1", dir + "-bundle"},
	} {
		if out, err := exec.CommandContext(ctx, args[0], args[1:]...).CombinedOutput(); err != nil {
			return fmt.Errorf("%s: %w: %s", args[0], err, out)
		}
	}
	return nil
}
