package client_test

import (
	"archive/tar"
	"bytes"
	"io"
	"net"
	"os"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/client"
)

func TestArchive(t *testing.T) {
	t.Parallel()
	ctx := testContext(t)
	capsule, server := newCapsule(t)
	dir := t.TempDir()
	require.NoError(t, os.MkdirAll(dir+"/tree/sub", 0o700))
	require.NoError(t, os.WriteFile(dir+"/tree/sub/f", []byte("content"), 0o600))
	socket, err := net.Listen("unix", dir+"/tree/ü")
	require.NoError(t, err)
	defer socket.Close()
	for _, opts := range []client.PackOptions{{}, {Contents: true}, {Compression: nestbox.CompressionGzip}, {Compression: nestbox.CompressionZstd, Contents: true}} {
		packed, err := capsule.Files.Pack(ctx, dir+"/tree", opts)
		require.NoError(t, err)
		var b bytes.Buffer
		_, err = b.ReadFrom(packed)
		require.NoError(t, err)
		require.NoError(t, packed.Close())
		name := "tree/ü"
		if opts.Contents {
			name = "ü"
		}
		require.Equal(t, []string{name + " is a socket and was left out"}, packed.Warnings())
		to := t.TempDir() + "/to"
		done, err := capsule.Files.Unpack(ctx, to, &b, client.UnpackOptions{KeepKind: true})
		require.NoError(t, err)
		require.Equal(t, nestbox.Unpacked{Entries: 3, Bytes: 7, Warnings: []string{}}, done)
	}
	_, err = capsule.Files.Pack(ctx, dir+"/missing", client.PackOptions{})
	require.Equal(t, nestbox.CodeNotFound, nestbox.CodeOf(err))
	_, err = capsule.Files.Unpack(ctx, dir+"/x", bytes.NewReader([]byte("no archive, surely, as this is too short")), client.UnpackOptions{})
	require.Equal(t, nestbox.CodeInvalid, nestbox.CodeOf(err))

	// An archive whose connection is lost is not taken for a short one.
	require.NoError(t, os.WriteFile(dir+"/tree/large", make([]byte, 64<<20), 0o600))
	packed, err := capsule.Files.Pack(ctx, dir+"/tree", client.PackOptions{})
	require.NoError(t, err)
	defer packed.Close()
	_, err = tar.NewReader(packed).Next()
	require.NoError(t, err)
	server.Cut()
	_, err = io.Copy(io.Discard, packed)
	require.Error(t, err)
}
