package guestrpc

import (
	"bytes"
	"context"
	"errors"
	"io"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/internal/guest"
)

// readFrom is a guest that has content in every file.
func readFrom(content io.Reader) *scripted {
	return &scripted{read: func(context.Context, string) (io.ReadCloser, nestbox.FileInfo, error) {
		return io.NopCloser(content), aFile(), nil
	}}
}

// endless gives zeros until it is cut.
type endless struct{ cut chan struct{} }

func (e endless) Read(p []byte) (int, error) {
	select {
	case <-e.cut:
		return 0, errors.New("secret")
	default:
		clear(p)
		return len(p), nil
	}
}

// TestCutDownload requires that a download that breaks is no short file.
func TestCutDownload(t *testing.T) {
	t.Parallel()
	s := serve(t, readFrom(endless{}))
	r, info, err := s.client(t).Files().Read(t.Context(), "/f", 0)
	require.NoError(t, err)
	require.Equal(t, "f", info.Name)
	defer r.Close()
	_, err = io.CopyN(io.Discard, r, 3<<20)
	require.NoError(t, err)
	require.NoError(t, s.http.Close())
	_, err = io.Copy(io.Discard, r)
	requireCode(t, err, nestbox.CodeGuest)

	source := endless{cut: make(chan struct{})}
	r, _, err = serve(t, readFrom(source)).client(t).Files().Read(t.Context(), "/f", 0)
	require.NoError(t, err)
	defer r.Close()
	close(source.cut)
	_, err = io.Copy(io.Discard, struct{ io.Reader }{r}) // by Read, not WriteTo
	requireCode(t, err, nestbox.CodeGuest)
	require.NotContains(t, err.Error(), "secret")
}

// TestCutUpload requires that whatever ends an upload early ends the content
// with an error, so that nothing is replaced.
func TestCutUpload(t *testing.T) {
	t.Parallel()
	for name, cut := range map[string]func(s *server, c *Client, cancel context.CancelFunc, content *io.PipeWriter){
		"canceled":    func(_ *server, _ *Client, cancel context.CancelFunc, _ *io.PipeWriter) { cancel() },
		"server lost": func(s *server, _ *Client, _ context.CancelFunc, _ *io.PipeWriter) { _ = s.http.Close() },
		"client lost": func(_ *server, c *Client, _ context.CancelFunc, _ *io.PipeWriter) { c.Close() },
		"content lost": func(_ *server, _ *Client, _ context.CancelFunc, w *io.PipeWriter) {
			w.CloseWithError(io.ErrUnexpectedEOF)
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			begun, got := make(chan struct{}), make(chan error, 1)
			s := serve(t, &scripted{write: func(_ context.Context, _ string, r io.Reader, _ guest.WriteOptions) (nestbox.FileInfo, error) {
				close(begun)
				_, err := io.Copy(io.Discard, r)
				got <- err
				return nestbox.FileInfo{}, err
			}})
			c := s.client(t)
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			content, feed := io.Pipe()
			defer content.Close()
			result := make(chan error, 1)
			go func() {
				_, err := c.Files().Write(ctx, "/f", content, guest.WriteOptions{})
				result <- err
			}()
			_, err := feed.Write(make([]byte, 3<<20))
			require.NoError(t, err)
			<-begun
			cut(s, c, cancel, feed)
			require.Error(t, <-got, "the content is taken for whole")
			go func() { _, _ = feed.Write(make([]byte, 1<<20)); _ = feed.Close() }()
			var e *nestbox.Error
			require.ErrorAs(t, <-result, &e)
		})
	}
}

// TestEarlyAnswer requires that an upload which is refused midway says why,
// and does not just break.
func TestEarlyAnswer(t *testing.T) {
	t.Parallel()
	c := serve(t, &scripted{write: func(_ context.Context, _ string, r io.Reader, _ guest.WriteOptions) (nestbox.FileInfo, error) {
		_, _ = io.CopyN(io.Discard, r, 1<<20)
		return nestbox.FileInfo{}, nestbox.Errorf(nestbox.CodeExhausted, "disk full")
	}}).client(t)
	for range 10 {
		_, err := c.Files().Write(t.Context(), "/f", bytes.NewReader(make([]byte, 64<<20)), guest.WriteOptions{})
		requireCode(t, err, nestbox.CodeExhausted)
		require.EqualError(t, err, "disk full")
	}
}

func TestWriteOptions(t *testing.T) {
	t.Parallel()
	c := serve(t, &scripted{write: func(_ context.Context, path string, r io.Reader, opts guest.WriteOptions) (nestbox.FileInfo, error) {
		content, err := io.ReadAll(struct{ io.Reader }{r}) // by Read, not WriteTo
		return nestbox.FileInfo{Path: path, Type: nestbox.FileTypeFile, Mode: opts.Mode, Owner: opts.User, Size: int64(len(content))}, err
	}}).client(t)
	for _, size := range []int{0, 1, minUpload, fileChunk, 3*fileChunk + 1} {
		info, err := c.Files().Write(t.Context(), "/f", strings.NewReader(strings.Repeat("x", size)), guest.WriteOptions{Mode: 0o4711, User: "u"})
		require.NoError(t, err)
		require.Equal(t, nestbox.FileInfo{Path: "/f", Type: nestbox.FileTypeFile, Mode: 0o4711, Owner: "u", Size: int64(size)}, info)
	}
	info, err := c.Files().Write(t.Context(), "/\xff", strings.NewReader(""), guest.WriteOptions{})
	require.NoError(t, err)
	require.Equal(t, "/\U0010FEFF", info.Path)
	_, err = c.Files().Write(t.Context(), "/f", stalled{}, guest.WriteOptions{})
	requireCode(t, err, nestbox.CodeCanceled)
}

// stalled is a reader that neither reads nor fails.
type stalled struct{}

func (stalled) Read([]byte) (int, error) { return 0, nil }

func TestListIsBounded(t *testing.T) {
	t.Parallel()
	for n, ok := range map[int]bool{0: true, listChunk: true, nestbox.MaxListEntries: true, nestbox.MaxListEntries + 1: false} {
		c := serve(t, &scripted{list: func(context.Context, string, int) ([]nestbox.FileInfo, error) {
			return slices.Repeat([]nestbox.FileInfo{aFile()}, n), nil
		}}).client(t)
		got, err := c.Files().List(t.Context(), "/", 1)
		if !ok {
			requireCode(t, err, nestbox.CodeTooLarge)
			continue
		}
		require.NoError(t, err)
		require.Len(t, got, n)
	}
}
