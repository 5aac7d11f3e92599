package client

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"time"

	"github.com/nestbox/nestbox"
)

// Files are the files of one capsule. Paths are absolute, and any bytes.
type Files struct {
	c       *Client
	capsule string
}

// Read opens a file. The reader streams it; it fails, rather than ends, if the
// file does not arrive whole. CodeNotFound: no such file.
func (f *Files) Read(ctx context.Context, path string) (io.ReadCloser, error) {
	res, err := f.c.send(ctx, request{
		method: http.MethodGet, path: capsulePath(f.capsule, "/files"), query: pathQuery(path),
	})
	if err != nil {
		return nil, err
	}
	return res.Body, nil
}

// ReadFrom is Read from an offset on, in bytes. Behind the file's end there is nothing.
func (f *Files) ReadFrom(ctx context.Context, path string, from int64) (io.ReadCloser, error) {
	res, err := f.c.send(ctx, request{
		method: http.MethodGet, path: capsulePath(f.capsule, "/files"), query: pathQuery(path),
		header: http.Header{"Range": {fmt.Sprintf("bytes=%d-", from)}},
	})
	if e, ok := errors.AsType[*Error](err); ok && e.Status == http.StatusRequestedRangeNotSatisfiable {
		return http.NoBody, nil
	}
	if err != nil {
		return nil, err
	}
	if res.StatusCode != http.StatusPartialContent { // it has no parts, as files of /proc
		if _, err := io.CopyN(io.Discard, res.Body, from); err != nil && !errors.Is(err, io.EOF) {
			_ = res.Body.Close()
			return nil, &Error{Status: res.StatusCode, Err: nestbox.Errorf(nestbox.CodeUnavailable, "the answer was cut off: %w", err)}
		}
	}
	return res.Body, nil
}

// WriteOptions say how a file is written.
type WriteOptions struct {
	Mode       uint32    // permission bits; 0 = those of the file that is there, 0644 of a new one
	User       string    // owner, also of directories that are made; "" = that of the file that is there, else root
	ModifiedAt time.Time // zero = now
	// Append adds to the end of the file rather than replace it. What breaks off adds
	// nothing.
	Append bool
	// IfAbsent is CodePrecondition if something is there.
	IfAbsent bool
}

func (o WriteOptions) query(path string) url.Values {
	q := pathQuery(path)
	if o.Mode != 0 {
		q.Set("mode", fmt.Sprintf("%04o", o.Mode))
	}
	if o.User != "" {
		q.Set("user", o.User)
	}
	if !o.ModifiedAt.IsZero() {
		q.Set("modified_at", fmt.Sprintf("%d.%09d", o.ModifiedAt.Unix(), o.ModifiedAt.Nanosecond()))
	}
	if o.Append {
		q.Set("append", "true")
	}
	return q
}

// Write replaces a file with all of r, making missing directories. The old
// file stays as it was until all of r has arrived.
func (f *Files) Write(ctx context.Context, path string, r io.Reader, opts WriteOptions) error {
	// Expect makes the server judge key and capsule before the bytes are sent.
	header := http.Header{"Content-Type": {octetStream}}
	if n := sizeOf(r); n < 0 || n > smallFile { // for little it takes longer than it spares
		header.Set("Expect", "100-continue")
	}
	if opts.IfAbsent {
		header.Set("If-None-Match", "*")
	}
	res, err := f.c.send(ctx, request{
		method: http.MethodPut, path: capsulePath(f.capsule, "/files"), query: opts.query(path), header: header,
		body: io.NopCloser(r), length: sizeOf(r),
	})
	if err != nil {
		return err
	}
	return decode(res, nil)
}

// smallFile is how many bytes are sent without asking first.
const smallFile = 64 << 10

// sizeOf returns how many bytes are left in r, or -1 if it cannot tell.
func sizeOf(r io.Reader) int64 {
	if s, ok := r.(interface{ Len() int }); ok {
		return int64(s.Len())
	}
	return -1
}

// Stat describes one path itself: a symlink is not followed.
func (f *Files) Stat(ctx context.Context, path string) (nestbox.FileInfo, error) {
	var out entryAnswer
	err := f.c.call(ctx, http.MethodPost, capsulePath(f.capsule, "/files/stat"), nil, pathBody{Path: nestbox.PathText(path)}, &out)
	return out.Entry.domain(), err
}

// List returns the entries below a directory, depth levels deep (0 = 1),
// sorted by path.
func (f *Files) List(ctx context.Context, path string, depth int) ([]nestbox.FileInfo, error) {
	var out struct {
		Entries []entryBody `json:"entries"`
	}
	in := pathBody{Path: nestbox.PathText(path), Depth: depth}
	if err := f.c.call(ctx, http.MethodPost, capsulePath(f.capsule, "/files/list"), nil, in, &out); err != nil {
		return nil, err
	}
	infos := make([]nestbox.FileInfo, len(out.Entries))
	for i, e := range out.Entries {
		infos[i] = e.domain()
	}
	return infos, nil
}

// Mkdir makes a directory and its missing parents. CodeConflict if path exists
// already.
func (f *Files) Mkdir(ctx context.Context, path string) (nestbox.FileInfo, error) {
	var out entryAnswer
	err := f.c.call(ctx, http.MethodPost, capsulePath(f.capsule, "/files/mkdir"), nil, pathBody{Path: nestbox.PathText(path)}, &out)
	return out.Entry.domain(), err
}

// Remove removes path and everything below it. Nothing there is no error.
func (f *Files) Remove(ctx context.Context, path string) error {
	return f.c.call(ctx, http.MethodPost, capsulePath(f.capsule, "/files/remove"), nil, pathBody{Path: nestbox.PathText(path)}, nil)
}

func pathQuery(path string) url.Values { return url.Values{"path": {nestbox.PathText(path)}} }

type pathBody struct {
	Path  string `json:"path"`
	Depth int    `json:"depth,omitempty"`
}

type entryAnswer struct {
	Entry entryBody `json:"entry"`
}

type entryBody struct {
	Name          string `json:"name"`
	Path          string `json:"path"`
	Type          string `json:"type"`
	Size          int64  `json:"size"`
	Mode          uint32 `json:"mode"`
	Owner         string `json:"owner"`
	Group         string `json:"group"`
	ModifiedAt    int64  `json:"modified_at"`
	SymlinkTarget string `json:"symlink_target"`
}

func (b entryBody) domain() nestbox.FileInfo {
	return nestbox.FileInfo{
		Name: nestbox.PathBytes(b.Name), Path: nestbox.PathBytes(b.Path), Type: nestbox.FileType(b.Type), Size: b.Size, Mode: b.Mode,
		Owner: b.Owner, Group: b.Group, ModifiedAt: time.Unix(b.ModifiedAt, 0).UTC(), SymlinkTarget: nestbox.PathBytes(b.SymlinkTarget),
	}
}
