package cli

import (
	"context"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"golang.org/x/term"

	"github.com/nestbox/nestbox/client"
	"github.com/nestbox/nestbox/internal/archive"
)

// uploadTree copies a directory into a capsule, as one stream.
func (c *copying) uploadTree(ctx context.Context, files *client.Files, src, dst string) error {
	progress := c.progress()
	defer progress.done()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	r, w := io.Pipe()
	type packed struct {
		warnings []string
		err      error
	}
	packing := make(chan packed, 1)
	go func() {
		warnings, err := archive.Pack(ctx, src, archive.PackOptions{Contents: true, Progress: progress.entry}, io.MultiWriter(w, progress), nil)
		_ = w.CloseWithError(err)
		packing <- packed{warnings, err}
	}()
	done, err := files.Unpack(ctx, dst, r, client.UnpackOptions{Owner: c.owner, KeepOwners: c.keepOwners, KeepKind: true})
	_ = r.CloseWithError(io.ErrClosedPipe)
	here := <-packing
	progress.done()
	if here.err != nil && here.err != io.ErrClosedPipe { // why the stream broke off
		return fmt.Errorf("%w; the copy is not complete", here.err)
	}
	if err != nil {
		return err
	}
	return c.notAsItWas(append(here.warnings, done.Warnings...))
}

// downloadTree copies a directory from a capsule, as one stream. A capsule is not
// trusted: nothing that it sends is made outside of dst.
func (c *copying) downloadTree(ctx context.Context, src place, dst string) error {
	progress := c.progress()
	defer progress.done()
	packed, err := src.files.Pack(ctx, src.path, client.PackOptions{Contents: true})
	if err != nil {
		return err
	}
	defer packed.Close()
	_, err = os.Stat(dst)
	isNew := os.IsNotExist(err)
	if err := os.MkdirAll(dst, 0o755); err != nil {
		return err
	}
	done, err := archive.Unpack(ctx, dst, io.TeeReader(packed, progress), archive.UnpackOptions{
		KeepOwners: c.keepOwners, KeepKind: true, New: isNew, TempPrefix: ".nestbox-part-", Progress: progress.entry,
	})
	progress.done()
	if err != nil {
		return err
	}
	return c.notAsItWas(append(packed.Warnings(), done.Warnings...))
}

// notAsItWas names what was not copied as it was, which makes the copy fail in the end.
func (c *copying) notAsItWas(warnings []string) error {
	for _, w := range warnings {
		c.warn("%s", printable(w))
	}
	if len(warnings) == 0 {
		return nil
	}
	return fmt.Errorf("not everything was copied as it was")
}

// progress shows a person how far a copy is. It is used by one goroutine.
type progress struct {
	w       io.Writer // nil = nobody is there
	begun   time.Time
	shown   time.Time // zero = not yet
	entries int64
	bytes   int64
	width   int // of what is shown
}

// Nothing is shown of what is quick, and nothing more often than can be read.
const (
	showAfter = time.Second
	showEvery = 200 * time.Millisecond
)

func (c *copying) progress() *progress {
	p := &progress{begun: time.Now()}
	if file, ok := c.Err.(*os.File); ok && term.IsTerminal(int(file.Fd())) {
		p.w = file
	}
	return p
}

// entry counts a file, a directory or a link.
func (p *progress) entry(string, int64) { p.entries++ }

// Write implements io.Writer: it counts what is copied.
func (p *progress) Write(b []byte) (int, error) {
	p.bytes += int64(len(b))
	if now := time.Now(); p.w != nil && now.Sub(p.begun) >= showAfter && now.Sub(p.shown) >= showEvery {
		p.shown = now
		p.show(fmt.Sprintf("%d entries, %.1f MB", p.entries, float64(p.bytes)/1e6))
	}
	return len(b), nil
}

func (p *progress) show(text string) {
	fmt.Fprintf(p.w, "\r%s%s", text, strings.Repeat(" ", max(0, p.width-len(text))))
	p.width = len(text)
}

// done clears the line.
func (p *progress) done() {
	if p.width > 0 {
		p.show("")
		fmt.Fprint(p.w, "\r")
		p.width = 0
	}
}
