package conformance

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"io"
	"log"
	"net/http/httptest"
	"os"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	"github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/stretchr/testify/require"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/internal/guest"
	"github.com/nestbox/nestbox/internal/image/oci"
	"github.com/nestbox/nestbox/internal/image/rootfs"
)

// busyboxLayer is a small system.
func busyboxLayer(t *testing.T) v1.Layer {
	t.Helper()
	program, err := os.ReadFile("/usr/bin/busybox")
	require.NoError(t, err)
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	add := func(h tar.Header, text string) {
		h.Size = int64(len(text))
		require.NoError(t, w.WriteHeader(&h))
		_, err := io.WriteString(w, text)
		require.NoError(t, err)
	}
	add(tar.Header{Name: "bin/busybox", Typeflag: tar.TypeReg, Mode: 0o4755}, string(program))
	for _, applet := range []string{"sh", "id", "cat", "ls", "stat", "touch"} {
		add(tar.Header{Name: "bin/" + applet, Typeflag: tar.TypeLink, Linkname: "bin/busybox"}, "")
	}
	add(tar.Header{Name: "etc/passwd", Typeflag: tar.TypeReg, Mode: 0o644}, "root:x:0:0::/root:/bin/sh\napp:x:1000:1000::/home/app:/bin/sh\n")
	add(tar.Header{Name: "etc/group", Typeflag: tar.TypeReg, Mode: 0o644}, "root:x:0:\nstaff:x:50:app\n")
	require.NoError(t, w.Close())
	layer, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(b.Bytes())), nil })
	require.NoError(t, err)
	return layer
}

// TestImageFromRegistry takes an image the whole way: registry, EROFS file, capsule, its
// processes.
func TestImageFromRegistry(t *testing.T) {
	t.Parallel()
	server := httptest.NewServer(registry.New(registry.Logger(log.New(io.Discard, "", 0))))
	t.Cleanup(server.Close)
	reference := strings.TrimPrefix(server.URL, "http://") + "/small:1"
	img, err := mutate.AppendLayers(empty.Image, busyboxLayer(t))
	require.NoError(t, err)
	img, err = mutate.Config(img, v1.Config{User: "app", WorkingDir: "/srv/app", Env: []string{"GREETING=hello", "PATH=/bin", "COLOUR=red"}})
	require.NoError(t, err)
	ref, err := name.ParseReference(reference)
	require.NoError(t, err)
	require.NoError(t, remote.Write(ref, img))

	local, images := newHost(t)
	host := overRPC(t, local) // so that all of a spec goes over the wire
	found, err := oci.Registry{Blobs: t.TempDir()}.Open(t.Context(), reference, oci.Options{})
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, found.Close()) })
	made, err := images.Make(t.Context(), func(ctx context.Context, tree *rootfs.Tree, scratch string) error {
		return found.Fill(ctx, tree, scratch, nil)
	})
	require.NoError(t, err)

	create := func() guest.Processes {
		status, err := host.Create(t.Context(), nestbox.NewID(nestbox.PrefixCapsule), nestbox.CapsuleSpec{
			Template: "small", Image: made.Name, Defaults: found.Defaults, Env: map[string]string{"COLOUR": "blue"},
		}.WithDefaults())
		require.NoError(t, err)
		g, err := host.Guest(t.Context(), status.ID)
		require.NoError(t, err)
		return g.Processes()
	}
	procs := create()
	require.Equal(t, "app /srv/app hello blue\n", say(t, procs, "", `echo $(id -un) $PWD $GREETING $COLOUR`))
	require.Equal(t, "4755 7\n", say(t, procs, "", "stat -c '%a %h' /bin/sh"), "setuid, and hard links")
	require.Equal(t, "rw\n", say(t, procs, "root", "echo rw > /etc/new && cat /etc/new"))

	// Whoever has given the image up, capsules keep it.
	images.Release(made.Name)
	require.Equal(t, "ls: /etc/new: No such file or directory\n", say(t, create(), "", "ls /etc/new 2>&1"))
	status, err := host.List(t.Context())
	require.NoError(t, err)
	require.Len(t, status, 2)
	for _, s := range status {
		require.NoError(t, host.Destroy(t.Context(), s.ID))
	}
	_, err = host.Create(t.Context(), nestbox.NewID(nestbox.PrefixCapsule), nestbox.CapsuleSpec{Template: "small", Image: made.Name}.WithDefaults())
	require.Equal(t, nestbox.CodeNotFound, nestbox.CodeOf(err), "with the last capsule it is gone")
}

// say runs a script to its end and returns what it wrote.
func say(t *testing.T, procs guest.Processes, user, script string) string {
	t.Helper()
	_, reader, err := procs.Start(t.Context(), nestbox.ProcessSpec{Cmd: "sh", Args: []string{"-c", script}, User: user}, &guest.Attach{Lossless: true})
	require.NoError(t, err)
	defer reader.Close()
	var text []byte
	for {
		event, err := reader.Next(t.Context())
		if errors.Is(err, io.EOF) {
			return string(text)
		}
		require.NoError(t, err)
		text = append(text, event.Data...)
	}
}
