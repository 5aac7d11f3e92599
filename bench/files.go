package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strconv"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/nestbox/nestbox/client"
)

const (
	transferMiB = 256
	smallFiles  = 500
	smallBytes  = 4 << 10
	uploaders   = 8
)

// transfers compares one large file up and down through all hops with writing
// and reading such a file inside the same capsule.
func (b *bench) transfers(ctx context.Context) error {
	c, free, err := b.capsule(ctx, 2048)
	if err != nil {
		return err
	}
	defer free()
	var up, down, write, read []time.Duration
	for range max(1, b.rounds/10) {
		t, err := probeNumber(ctx, c, "writefile", transferMiB)
		if err != nil {
			return err
		}
		write = append(write, t)
		if t, err = probeNumber(ctx, c, "readfile", transferMiB); err != nil {
			return err
		}
		read = append(read, t)
		t, err = timed(func() error {
			return c.Files.Write(ctx, "/root/large", io.LimitReader(pattern{}, transferMiB<<20), client.WriteOptions{})
		})
		if err != nil {
			return err
		}
		up = append(up, t)
		t, err = timed(func() error { return download(ctx, c, "/root/large", transferMiB<<20) })
		if err != nil {
			return err
		}
		down = append(down, t)
	}
	b.rows = append(b.rows,
		transferRow("file upload", up, "write inside", write),
		transferRow("file download", down, "read inside", read))
	return nil
}

func transferRow(name string, ours []time.Duration, base string, theirs []time.Duration) row {
	rate := func(times []time.Duration) string {
		return fmt.Sprintf("%.0f MiB/s", transferMiB/median(times).Seconds())
	}
	speed := ratio(median(theirs), median(ours))
	return row{name, rate(ours), base + ": " + rate(theirs), fmt.Sprintf("%.2f", speed), "–", true}
}

func download(ctx context.Context, c *client.Capsule, path string, size int64) error {
	r, err := c.Files.Read(ctx, path)
	if err != nil {
		return err
	}
	defer r.Close()
	n, err := io.Copy(io.Discard, r)
	if err == nil && n != size {
		err = fmt.Errorf("%d of %d bytes of %s came", n, size, path)
	}
	return err
}

// pattern is endless content.
type pattern struct{}

func (pattern) Read(p []byte) (int, error) {
	for i := range p {
		p[i] = byte(i)
	}
	return len(p), nil
}

// smallTransfers compares writing many small files, several at a time, through
// all hops with writing as many inside the capsule.
func (b *bench) smallTransfers(ctx context.Context) error {
	c, free, err := b.capsule(ctx, 1024)
	if err != nil {
		return err
	}
	defer free()
	var ours, theirs []time.Duration
	for range max(1, b.rounds/10) {
		t, err := probeNumber(ctx, c, "smallfiles", smallFiles)
		if err != nil {
			return err
		}
		theirs = append(theirs, t)
		if t, err = timed(func() error { return uploadSmall(ctx, c) }); err != nil {
			return err
		}
		ours = append(ours, t)
	}
	rate := func(times []time.Duration) string {
		return fmt.Sprintf("%.0f files/s", smallFiles/median(times).Seconds())
	}
	b.rows = append(b.rows, row{
		fmt.Sprintf("files of %d KiB written, %d at a time", smallBytes>>10, uploaders), rate(ours),
		"inside, one at a time: " + rate(theirs), fmt.Sprintf("%.2f", ratio(median(theirs), median(ours))), "–", true,
	})
	return nil
}

func uploadSmall(ctx context.Context, c *client.Capsule) error {
	var next atomic.Int64
	group, ctx := errgroup.WithContext(ctx)
	for range uploaders {
		group.Go(func() error {
			for {
				i := next.Add(1)
				if i > smallFiles {
					return nil
				}
				content := io.LimitReader(pattern{}, smallBytes)
				err := c.Files.Write(ctx, "/root/small/"+strconv.FormatInt(i, 10), content, client.WriteOptions{})
				if err != nil {
					return errors.Join(err, ctx.Err())
				}
			}
		})
	}
	return group.Wait()
}
