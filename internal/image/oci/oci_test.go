package oci

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"io/fs"
	"log"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/erofs/go-erofs"
	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	"github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/stretchr/testify/require"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/internal/image/rootfs"
)

func pack(t *testing.T, files ...string) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for i := 0; i < len(files); i += 2 {
		require.NoError(t, w.WriteHeader(&tar.Header{Name: files[i], Typeflag: tar.TypeReg, Mode: 0o644, Size: int64(len(files[i+1]))}))
		_, err := io.WriteString(w, files[i+1])
		require.NoError(t, err)
	}
	require.NoError(t, w.Close())
	return b.Bytes()
}

func compress(t *testing.T, with string, data []byte) []byte {
	t.Helper()
	var b bytes.Buffer
	var w io.WriteCloser
	switch with {
	case "gzip":
		w = gzip.NewWriter(&b)
	case "zstd":
		z, err := zstd.NewWriter(&b)
		require.NoError(t, err)
		w = z
	}
	_, err := w.Write(data)
	require.NoError(t, err)
	require.NoError(t, w.Close())
	return b.Bytes()
}

// stored is a layer as a registry has it: compressed in any way.
type stored struct {
	v1.Layer
	diffID v1.Hash
}

func (s stored) DiffID() (v1.Hash, error) { return s.diffID, nil }

func storedLayer(t *testing.T, with string, archive []byte) v1.Layer {
	t.Helper()
	kind := types.OCILayer
	if with == "zstd" {
		kind = types.OCILayerZStd
	}
	sum := sha256.Sum256(archive)
	return stored{static.NewLayer(compress(t, with, archive), kind), v1.Hash{Algorithm: "sha256", Hex: hex.EncodeToString(sum[:])}}
}

// noise does not compress: 1 MiB.
var noise = sync.OnceValue(func() string {
	b := make([]byte, 1<<20)
	_, _ = rand.NewChaCha8([32]byte{1}).Read(b)
	return string(b)
})

// testImage has layers of both compressions, a whiteout, and defaults.
func testImage(t *testing.T) v1.Image {
	t.Helper()
	img, err := mutate.AppendLayers(empty.Image,
		storedLayer(t, "gzip", pack(t, "etc/one", "old", "etc/two", "two", "noise", noise())),
		storedLayer(t, "zstd", pack(t, "etc/one", "new", "etc/.wh.two", "")))
	require.NoError(t, err)
	img, err = mutate.Config(img, v1.Config{
		Env: []string{"PATH=/opt/bin:/bin", "EMPTY="}, User: "app:staff", WorkingDir: "srv", Entrypoint: []string{"/bin/start"}, Cmd: []string{"-x"},
		Labels: map[string]string{"a": "b"},
	})
	require.NoError(t, err)
	return img
}

// read returns what is in an image.
func read(t *testing.T, img *Image) map[string]string {
	t.Helper()
	files, err := tryRead(t, img)
	require.NoError(t, err)
	return files
}

func tryRead(t *testing.T, img *Image) (map[string]string, error) {
	t.Helper()
	t.Cleanup(func() { require.NoError(t, img.Close()) })
	tree := rootfs.New(1 << 30)
	if err := img.Fill(t.Context(), tree, t.TempDir(), nil); err != nil {
		return nil, err
	}
	out, err := os.Create(filepath.Join(t.TempDir(), "out"))
	require.NoError(t, err)
	defer out.Close()
	require.NoError(t, tree.WriteEROFS(t.Context(), out, t.TempDir()))
	fsys, err := erofs.Open(out)
	require.NoError(t, err)
	files := map[string]string{}
	return files, fs.WalkDir(fsys, ".", func(path string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() {
			return err
		}
		data, err := fs.ReadFile(fsys, path)
		files[path] = string(data)
		return err
	})
}

func want() map[string]string { return map[string]string{"etc/one": "new", "noise": noise()} }

var wantDefaults = nestbox.ImageDefaults{
	Env: map[string]string{"PATH": "/opt/bin:/bin", "EMPTY": ""}, User: "app:staff", Cwd: "/srv",
	Entrypoint: []string{"/bin/start"}, Cmd: []string{"-x"}, Labels: map[string]string{"a": "b"},
}

// front is a registry behind something that a test puts before it.
type front struct {
	inner  http.Handler
	before func(w http.ResponseWriter, r *http.Request) (done bool)
	blobs  atomic.Int32 // requests for layers
}

func (f *front) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if strings.Contains(r.URL.Path, "/blobs/sha256:") && r.Method == http.MethodGet {
		f.blobs.Add(1)
	}
	if f.before != nil && f.before(w, r) {
		return
	}
	f.inner.ServeHTTP(w, r)
}

// serve starts a registry that has an image, and returns its name there.
func serve(t *testing.T, push func(ref name.Reference)) (*front, string) {
	t.Helper()
	f := &front{inner: registry.New(registry.Logger(log.New(io.Discard, "", 0)))}
	server := httptest.NewServer(f)
	t.Cleanup(server.Close)
	reference := strings.TrimPrefix(server.URL, "http://") + "/team/app:1.0"
	ref, err := name.ParseReference(reference)
	require.NoError(t, err)
	push(ref)
	f.blobs.Store(0)
	return f, reference
}

func serveImage(t *testing.T) (*front, string) {
	return serve(t, func(ref name.Reference) { require.NoError(t, remote.Write(ref, testImage(t))) })
}

func client(t *testing.T) Registry {
	return Registry{Blobs: t.TempDir(), Pause: time.Millisecond, Patience: 20 * time.Second}
}

func TestRegistry(t *testing.T) {
	t.Parallel()
	f, ref := serveImage(t)
	r := client(t)
	img, err := r.Open(t.Context(), ref, Options{})
	require.NoError(t, err)
	require.Equal(t, wantDefaults, img.Defaults)
	digest, err := testImage(t).Digest()
	require.NoError(t, err)
	require.Equal(t, ref+"@"+digest.String(), img.String())
	require.Equal(t, want(), read(t, img))

	f.blobs.Store(0)
	again, err := r.Open(t.Context(), ref, Options{})
	require.NoError(t, err)
	config := f.blobs.Load()
	require.Equal(t, want(), read(t, again))
	require.Equal(t, config, f.blobs.Load(), "layers are kept")
}

func TestRegistryByDigest(t *testing.T) {
	t.Parallel()
	_, ref := serveImage(t)
	digest, err := testImage(t).Digest()
	require.NoError(t, err)
	repo, _, _ := strings.Cut(ref, ":1.0")
	img, err := client(t).Open(t.Context(), repo+"@"+digest.String(), Options{})
	require.NoError(t, err)
	require.Equal(t, want(), read(t, img))
	_, err = client(t).Open(t.Context(), repo+"@sha256:"+strings.Repeat("0", 64), Options{})
	require.Equal(t, nestbox.CodeNotFound, nestbox.CodeOf(err))
}

func TestRegistryChoosesThePlatform(t *testing.T) {
	t.Parallel()
	_, ref := serve(t, func(ref name.Reference) {
		index := mutate.AppendManifests(empty.Index,
			mutate.IndexAddendum{Add: empty.Image, Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "linux", Architecture: "s390x"}}},
			mutate.IndexAddendum{Add: testImage(t), Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "linux", Architecture: "arm64", Variant: "v8"}}})
		require.NoError(t, remote.WriteIndex(ref, index))
	})
	img, err := client(t).Open(t.Context(), ref, Options{Platform: v1.Platform{OS: "linux", Architecture: "arm64"}})
	require.NoError(t, err)
	require.Equal(t, want(), read(t, img))
	_, err = client(t).Open(t.Context(), ref, Options{Platform: v1.Platform{OS: "linux", Architecture: "riscv64"}})
	require.Error(t, err)
}

func TestRegistryWithPassword(t *testing.T) {
	t.Parallel()
	f, ref := serveImage(t)
	f.before = func(w http.ResponseWriter, r *http.Request) bool {
		user, password, _ := r.BasicAuth()
		if user == "me" && password == "secret" {
			return false
		}
		w.Header().Set("WWW-Authenticate", `Basic realm="test"`)
		w.WriteHeader(http.StatusUnauthorized)
		return true
	}
	_, err := client(t).Open(t.Context(), ref, Options{})
	require.Equal(t, nestbox.CodeDenied, nestbox.CodeOf(err))
	r := client(t)
	r.Keychain = authn.NewKeychainFromHelper(keys{})
	img, err := r.Open(t.Context(), ref, Options{})
	require.NoError(t, err)
	require.Equal(t, want(), read(t, img))
}

// keys is a helper for credentials.
type keys struct{}

func (keys) Get(string) (user, password string, err error) { return "me", "secret", nil }

func TestRegistryThatBreaks(t *testing.T) {
	t.Parallel()
	for kind, before := range map[string]func(n int32, inner http.Handler, w http.ResponseWriter, r *http.Request){
		"half way": func(n int32, inner http.Handler, w http.ResponseWriter, r *http.Request) {
			inner.ServeHTTP(&cut{w, 100_000}, r)
		},
		"and knows no ranges": func(n int32, inner http.Handler, w http.ResponseWriter, r *http.Request) {
			r.Header.Del("Range")
			inner.ServeHTTP(&cut{w, 100_000 * int(n)}, r)
		},
		"by sending another part": func(n int32, inner http.Handler, w http.ResponseWriter, r *http.Request) {
			if n == 2 {
				r.Header.Set("Range", "bytes=7-")
			}
			inner.ServeHTTP(&cut{w, 300_000}, r)
		},
		"with 429 and 503": func(n int32, inner http.Handler, w http.ResponseWriter, r *http.Request) {
			if n%3 != 0 {
				w.Header().Set("Retry-After", "0")
				w.WriteHeader([]int{http.StatusTooManyRequests, http.StatusServiceUnavailable}[n%2])
				return
			}
			inner.ServeHTTP(w, r)
		},
	} {
		t.Run(kind, func(t *testing.T) {
			t.Parallel()
			f, ref := serveImage(t)
			first, err := testImage(t).Layers()
			require.NoError(t, err)
			digest, err := first[0].Digest()
			require.NoError(t, err)
			var n atomic.Int32
			f.before = func(w http.ResponseWriter, r *http.Request) bool {
				if !strings.HasSuffix(r.URL.Path, digest.String()) {
					return false
				}
				before(n.Add(1), withRanges(f.inner), w, r)
				return true
			}
			img, err := client(t).Open(t.Context(), ref, Options{})
			require.NoError(t, err)
			require.Equal(t, want(), read(t, img))
			require.Greater(t, n.Load(), int32(1))
		})
	}
}

// withRanges serves parts of what a handler serves whole.
func withRanges(inner http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		whole := httptest.NewRecorder()
		asked := r.Clone(r.Context())
		asked.Header.Del("Range")
		inner.ServeHTTP(whole, asked)
		http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(whole.Body.Bytes()))
	})
}

// cut breaks the connection after some bytes.
type cut struct {
	http.ResponseWriter
	left int
}

func (c *cut) Write(b []byte) (int, error) {
	if len(b) < c.left {
		c.left -= len(b)
		return c.ResponseWriter.Write(b)
	}
	_, _ = c.ResponseWriter.Write(b[:c.left])
	panic(http.ErrAbortHandler)
}

func TestRegistryGoesOnWhereAnEarlierProcessEnded(t *testing.T) {
	t.Parallel()
	f, ref := serveImage(t)
	r := client(t)
	layers, err := testImage(t).Layers()
	require.NoError(t, err)
	digest, err := layers[0].Digest()
	require.NoError(t, err)
	var ranges []string
	f.before = func(w http.ResponseWriter, q *http.Request) bool {
		if !strings.HasSuffix(q.URL.Path, digest.String()) {
			return false
		}
		ranges = append(ranges, q.Header.Get("Range"))
		withRanges(f.inner).ServeHTTP(w, q)
		return true
	}
	body, err := layers[0].Compressed()
	require.NoError(t, err)
	half := make([]byte, 500_000)
	_, err = io.ReadFull(body, half)
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(filepath.Join(r.Blobs, "sha256-"+digest.Hex+partial), half, 0o600))
	img, err := r.Open(t.Context(), ref, Options{})
	require.NoError(t, err)
	require.Equal(t, want(), read(t, img))
	require.Equal(t, []string{"bytes=500000-"}, ranges)
}

func TestRegistryThatLies(t *testing.T) {
	t.Parallel()
	f, ref := serveImage(t)
	layers, err := testImage(t).Layers()
	require.NoError(t, err)
	digest, err := layers[0].Digest()
	require.NoError(t, err)
	size, err := layers[0].Size()
	require.NoError(t, err)
	f.before = func(w http.ResponseWriter, r *http.Request) bool {
		if !strings.HasSuffix(r.URL.Path, digest.String()) {
			return false
		}
		_, _ = w.Write(bytes.Repeat([]byte("x"), int(size)))
		return true
	}
	r := client(t)
	img, err := r.Open(t.Context(), ref, Options{})
	require.NoError(t, err)
	_, err = tryRead(t, img)
	require.ErrorContains(t, err, digest.String())
	require.Equal(t, nestbox.CodeInvalid, nestbox.CodeOf(err))

	f.before = nil
	img, err = r.Open(t.Context(), ref, Options{})
	require.NoError(t, err)
	require.Equal(t, want(), read(t, img), "what was wrong is not kept")
}

func TestRegistryThatFails(t *testing.T) {
	t.Parallel()
	ended := make(chan struct{})
	t.Cleanup(func() { close(ended) })
	answer := func(status int) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(status) }
	}
	for kind, tt := range map[string]struct {
		answer http.HandlerFunc
		code   nestbox.Code
	}{
		"500 for ever": {answer(500), nestbox.CodeUnavailable},
		"429 for ever": {answer(429), nestbox.CodeUnavailable},
		"404":          {answer(404), nestbox.CodeNotFound},
		"403":          {answer(403), nestbox.CodeDenied},
		"silence": {func(_ http.ResponseWriter, r *http.Request) {
			select {
			case <-r.Context().Done():
			case <-ended:
			}
		}, nestbox.CodeUnavailable},
	} {
		t.Run(kind, func(t *testing.T) {
			t.Parallel()
			server := httptest.NewServer(tt.answer)
			t.Cleanup(server.Close)
			repo, err := name.NewRepository(strings.TrimPrefix(server.URL, "http://") + "/team/app")
			require.NoError(t, err)
			manifest, err := testImage(t).Manifest()
			require.NoError(t, err)
			r := Registry{Blobs: t.TempDir(), Pause: time.Millisecond, Patience: 50 * time.Millisecond}
			_, err = fetch{r.withDefaults(), repo, server.Client(), manifest.Layers[0]}.open(t.Context(), func(int64) {})
			require.Equal(t, tt.code, nestbox.CodeOf(err), "%v", err)
			require.Contains(t, nestbox.MessageOf(err), manifest.Layers[0].Digest.String())
		})
	}
}

func TestFolder(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	path, err := layout.Write(dir, empty.Index)
	require.NoError(t, err)
	require.NoError(t, path.AppendImage(testImage(t), layout.WithAnnotations(map[string]string{refName: "1.0"})))
	img, err := OpenFolder(dir, Options{})
	require.NoError(t, err)
	require.Equal(t, wantDefaults, img.Defaults)
	require.Equal(t, want(), read(t, img))

	require.NoError(t, path.AppendImage(empty.Image, layout.WithAnnotations(map[string]string{refName: "app:2.0"})))
	_, err = OpenFolder(dir, Options{})
	require.ErrorContains(t, err, "choose one by its tag: 1.0, app:2.0")
	img, err = OpenFolder(dir, Options{Tag: "1.0"})
	require.NoError(t, err)
	require.Equal(t, want(), read(t, img))
	_, err = OpenFolder(t.TempDir(), Options{})
	require.Equal(t, nestbox.CodeInvalid, nestbox.CodeOf(err))
}

func TestDockerFile(t *testing.T) {
	t.Parallel()
	for _, with := range []string{"", "gzip", "zstd"} {
		t.Run("compressed "+with, func(t *testing.T) {
			t.Parallel()
			file := filepath.Join(t.TempDir(), "image.tar")
			tag, err := name.NewTag("team/app:1.0")
			require.NoError(t, err)
			require.NoError(t, tarball.WriteToFile(file, tag, testImage(t)))
			if with != "" {
				data, err := os.ReadFile(file)
				require.NoError(t, err)
				require.NoError(t, os.WriteFile(file, compress(t, with, data), 0o600))
			}
			img, err := OpenFile(t.Context(), file, t.TempDir(), Options{})
			require.NoError(t, err)
			require.Equal(t, wantDefaults, img.Defaults)
			require.Equal(t, want(), read(t, img))
			_, err = OpenFile(t.Context(), file, t.TempDir(), Options{Tag: "2.0"})
			require.ErrorContains(t, err, "team/app:1.0")
		})
	}
}

func TestRootArchive(t *testing.T) {
	t.Parallel()
	for _, with := range []string{"", "gzip", "zstd"} {
		archive := pack(t, "etc/.wh.kept", "it is no whiteout here", "etc/one", "1")
		if with != "" {
			archive = compress(t, with, archive)
		}
		file := filepath.Join(t.TempDir(), "root.tar")
		require.NoError(t, os.WriteFile(file, archive, 0o600))
		img, err := OpenFile(t.Context(), file, t.TempDir(), Options{})
		require.NoError(t, err)
		require.Equal(t, map[string]string{"etc/.wh.kept": "it is no whiteout here", "etc/one": "1"}, read(t, img))
	}
}

func TestFilesThatAreNoImages(t *testing.T) {
	t.Parallel()
	good := compress(t, "gzip", pack(t, "a", noise()))
	for kind, data := range map[string][]byte{
		"nothing": {}, "text": []byte(strings.Repeat("text ", 1000)), "cut gzip": good[:len(good)/2],
		"xz": []byte("\xfd7zXZ\x00 and so on"), "no manifest": pack(t, "manifest.json", "{"), "an empty manifest": pack(t, "manifest.json", "[]"),
		"files that are missing": pack(t, "manifest.json", `[{"Config":"c","Layers":["l"]}]`),
		"other layers":           pack(t, "manifest.json", `[{"Config":"c","Layers":["l"]}]`, "c", `{"rootfs":{"type":"layers","diff_ids":["sha256:`+strings.Repeat("0", 64)+`"]}}`, "l", "x"),
	} {
		t.Run(kind, func(t *testing.T) {
			t.Parallel()
			file := filepath.Join(t.TempDir(), "image")
			require.NoError(t, os.WriteFile(file, data, 0o600))
			img, err := OpenFile(t.Context(), file, t.TempDir(), Options{})
			if err == nil {
				_, err = tryRead(t, img)
			}
			require.Equal(t, nestbox.CodeInvalid, nestbox.CodeOf(err), "%v", err)
		})
	}
}

func TestProgressAndCancel(t *testing.T) {
	t.Parallel()
	_, ref := serveImage(t)
	img, err := client(t).Open(t.Context(), ref, Options{})
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, img.Close()) })
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	seen := ""
	err = img.Fill(ctx, rootfs.New(1<<30), t.TempDir(), func(p Progress) {
		seen = fmt.Sprintf("%d/%d", p.Layer, p.Layers)
		if p.Done > 0 {
			cancel()
		}
	})
	require.Equal(t, nestbox.CodeCanceled, nestbox.CodeOf(err), "%v", err)
	require.Equal(t, "1/2", seen)
}
