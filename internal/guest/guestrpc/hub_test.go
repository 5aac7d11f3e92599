package guestrpc_test

import (
	"context"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/internal/guest"
)

// counting counts the readers that reach a guest.
type counting struct {
	guest.Guest
	attached atomic.Int64
}

func (c *counting) Processes() guest.Processes { return countingProcesses{c.Guest.Processes(), c} }

type countingProcesses struct {
	guest.Processes
	c *counting
}

func (p countingProcesses) Attach(ctx context.Context, sel nestbox.Selector, how guest.Attach) (guest.OutputReader, error) {
	p.c.attached.Add(1)
	return p.Processes.Attach(ctx, sel, how)
}

// readOutput reads a log to its end and returns what came, exactly.
func readOutput(ctx context.Context, r guest.OutputReader, from int64, each func()) (sum string, size int64, err error) {
	h := crc32.NewIEEE()
	at, exits := from, 0
	for {
		e, err := r.Next(ctx)
		if errors.Is(err, io.EOF) {
			if exits != 1 {
				return "", 0, fmt.Errorf("%d exits", exits)
			}
			return fmt.Sprintf("%x", h.Sum(nil)), at - from, nil
		}
		if err != nil {
			return "", 0, err
		}
		if e.Offset != at || e.Kind == nestbox.EventGap {
			return "", 0, fmt.Errorf("%s at %d after %d", e.Kind, e.Offset, at)
		}
		if e.Kind == nestbox.EventExit {
			exits++
		}
		h.Write(e.Data)
		at = e.End()
		each()
	}
}

const writes = "import os; input(); [os.write(1, bytes([33 + i % 90]) * 40000) for i in range(600)]"

// TestReadersShareAStream: many readers of one process, that come at any time and
// at any offset, are fast or stall, each get all of it, and the daemon has few.
func TestReadersShareAStream(t *testing.T) {
	t.Parallel()
	for _, lossless := range []bool{false, true} {
		t.Run(fmt.Sprintf("lossless=%v", lossless), func(t *testing.T) {
			t.Parallel()
			testReadersShareAStream(t, lossless)
		})
	}
}

func testReadersShareAStream(t *testing.T, lossless bool) {
	c := &counting{Guest: newMachine(t)}
	g := hop(t, c).Processes()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	p, _, err := g.Start(ctx, nestbox.ProcessSpec{Cmd: "python3", Args: []string{"-c", writes}, Stdin: true}, nil)
	require.NoError(t, err)
	const readers, total = 40, 600 * 40000
	exact := nestbox.Selector{ID: p.ID}
	var all sync.WaitGroup
	sums := make([]string, readers)
	release := make(chan struct{})
	for i := range readers {
		r, err := g.Attach(ctx, exact, guest.Attach{Lossless: lossless})
		require.NoError(t, err)
		all.Go(func() {
			defer r.Close()
			stalled := sync.OnceFunc(func() {
				if i%20 == 3 {
					<-release // while more is written than is shared
				}
			})
			sum, size, err := readOutput(ctx, r, 0, stalled)
			if err != nil || size != total {
				t.Errorf("reader %d: %d bytes, %v", i, size, err)
			}
			sums[i] = sum
		})
	}
	require.LessOrEqual(t, c.attached.Load(), int64(2), "all but the first share one")
	require.NoError(t, g.WriteStdin(ctx, exact, []byte("\n"), true))
	if lossless { // which holds the process up
		waiting, stop := context.WithTimeout(ctx, 200*time.Millisecond)
		_, err := g.Wait(waiting, exact)
		stop()
		close(release)
		require.Error(t, err)
	}
	_, err = g.Wait(ctx, exact)
	require.NoError(t, err)
	if !lossless {
		close(release)
	}
	for _, from := range []int64{0, 1, total / 2, total} { // late ones
		all.Go(func() {
			r, err := g.Attach(ctx, exact, guest.Attach{Since: nestbox.Since{Offset: from}})
			if err != nil {
				t.Errorf("from %d: %v", from, err)
				return
			}
			defer r.Close()
			if _, size, err := readOutput(ctx, r, from, func() {}); err != nil || size != total-from {
				t.Errorf("from %d: %d bytes, %v", from, size, err)
			}
		})
	}
	all.Wait()
	for i := range sums {
		require.Equal(t, sums[0], sums[i], "reader %d", i)
	}
	_, err = g.Attach(ctx, exact, guest.Attach{Since: nestbox.Since{Offset: total + 1}})
	require.Equal(t, nestbox.CodeInvalid, nestbox.CodeOf(err))
}

// TestSharingReadersLeave: readers come and go in any order, and a client that is
// closed ends those that are left.
func TestSharingReadersLeave(t *testing.T) {
	t.Parallel()
	g := hop(t, newMachine(t))
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	p, _, err := g.Processes().Start(ctx, nestbox.ProcessSpec{Cmd: "sh", Args: []string{"-c", "while :; do echo line; done"}}, nil)
	require.NoError(t, err)
	exact := nestbox.Selector{ID: p.ID}
	var readers sync.WaitGroup
	for i := range 200 {
		readers.Go(func() {
			r, err := g.Processes().Attach(ctx, exact, guest.Attach{})
			if err != nil {
				t.Errorf("reader %d: %v", i, err)
				return
			}
			for range i % 30 {
				if _, err := r.Next(ctx); err != nil {
					t.Errorf("reader %d: %v", i, err)
				}
			}
			if err := errors.Join(r.Close(), r.Close()); err != nil {
				t.Errorf("reader %d: %v", i, err)
			}
			if _, err := r.Next(ctx); err == nil {
				t.Errorf("reader %d reads on after its end", i)
			}
		})
	}
	readers.Wait()
	left := make([]guest.OutputReader, 3)
	for i := range left {
		left[i], err = g.Processes().Attach(ctx, exact, guest.Attach{})
		require.NoError(t, err)
	}
	leaving, leave := context.WithCancel(ctx)
	leave()
	_, err = left[1].Next(leaving)
	if err != nil { // there may have been something to read
		require.Equal(t, nestbox.CodeCanceled, nestbox.CodeOf(err))
	}
	_, err = g.Processes().Kill(ctx, exact, guest.Kill{})
	require.NoError(t, err)
	g.(interface{ Close() }).Close()
	for _, r := range left {
		for err = nil; err == nil; {
			_, err = r.Next(ctx)
		}
		require.NotErrorIs(t, err, context.DeadlineExceeded)
		require.NoError(t, r.Close())
	}
}
