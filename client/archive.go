package client

import (
	"context"
	"encoding/json"
	"io"
	"net/http"
	"strings"

	"github.com/nestbox/nestbox"
)

// PackOptions say what is packed, and how.
type PackOptions struct {
	// Contents packs a directory as "./", and what is in it without the directory's
	// name. It follows a symlink to one.
	Contents    bool
	Compression nestbox.Compression // "" = none
}

// Archive is a tar archive that is read as it is packed. A Read fails, rather than
// ends, if the archive does not arrive whole.
type Archive struct {
	res *http.Response
}

// Pack packs a file, a symlink itself, or a directory with all below it. The archive
// must be closed. CodeNotFound: nothing is there.
func (f *Files) Pack(ctx context.Context, path string, opts PackOptions) (*Archive, error) {
	if opts.Contents {
		path = strings.TrimSuffix(path, "/") + "/."
	}
	q := pathQuery(path)
	if opts.Compression != "" {
		q.Set("compression", string(opts.Compression))
	}
	res, err := f.c.send(ctx, request{method: http.MethodGet, path: capsulePath(f.capsule, "/archive"), query: q})
	if err != nil {
		return nil, err
	}
	return &Archive{res}, nil
}

// Read implements io.Reader.
func (a *Archive) Read(p []byte) (int, error) { return a.res.Body.Read(p) }

// Close implements io.Closer.
func (a *Archive) Close() error { return a.res.Body.Close() }

// Warnings returns, once all was read, what could not be packed as it was.
func (a *Archive) Warnings() []string {
	var list []string
	_ = json.Unmarshal([]byte(a.res.Trailer.Get("X-Archive-Warnings")), &list) // none, if there is no such trailer
	return list
}

// UnpackOptions say how an archive is unpacked.
type UnpackOptions struct {
	Owner      string // user who owns everything; "" = root
	KeepOwners bool   // those that the archive names, by their numbers
	// KeepKind refuses (CodeConflict) to put a file where a directory is, or a
	// directory where a file is. Without, what is there is removed.
	KeepKind bool
}

// Unpack unpacks a tar archive, plain or compressed by gzip or zstd, into a directory,
// which is made if it is missing. Nothing outside of it is made or changed. What was
// unpacked before an error stays, and the error says what that is.
func (f *Files) Unpack(ctx context.Context, path string, r io.Reader, opts UnpackOptions) (nestbox.Unpacked, error) {
	q := pathQuery(path)
	if opts.Owner != "" {
		q.Set("owner", opts.Owner)
	}
	if opts.KeepOwners {
		q.Set("copyUIDGID", "true")
	}
	if opts.KeepKind {
		q.Set("noOverwriteDirNonDir", "true")
	}
	header := http.Header{"Content-Type": {"application/x-tar"}, "Expect": {"100-continue"}}
	res, err := f.c.send(ctx, request{
		method: http.MethodPut, path: capsulePath(f.capsule, "/archive"), query: q, header: header, body: io.NopCloser(r), length: sizeOf(r),
	})
	if err != nil {
		return nestbox.Unpacked{}, err
	}
	var out unpackedBody
	err = decode(res, &out)
	return out.domain(), err
}

type unpackedBody struct {
	Entries  int64    `json:"entries"`
	Bytes    int64    `json:"bytes"`
	Warnings []string `json:"warnings"`
}

func (b unpackedBody) domain() nestbox.Unpacked {
	return nestbox.Unpacked{Entries: b.Entries, Bytes: b.Bytes, Warnings: b.Warnings}
}
