package guesttest

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/internal/guest"
)

func testOutputUnattended(t *testing.T, g guest.Processes) {
	p := start(t, g, shell("echo one; echo two >&2; seq 1 20000; printf 'end'"))
	_, err := g.Wait(waiting(t), exact(p))
	require.NoError(t, err)
	for range 2 {
		tr := &transcript{}
		tr.readAll(t, attach(t, g, p, guest.Attach{}))
		require.True(t, strings.HasPrefix(string(tr.stdout), "one\n1\n2\n"))
		require.True(t, strings.HasSuffix(string(tr.stdout), "20000\nend"))
		require.Equal(t, "two\n", string(tr.stderr))
	}
	again, err := g.Get(waiting(t), exact(p))
	require.NoError(t, err)
	require.EqualValues(t, 4, again.Output.Stderr)
	require.Equal(t, again.Output.End, again.Output.Stdout+again.Output.Stderr)
	require.True(t, again.Output.Closed)
}

func testOutputOfFastCommand(t *testing.T, g guest.Processes) {
	for i := range 100 {
		tag := "fast-" + nestbox.RandomHex(6)
		spec := nestbox.ProcessSpec{Cmd: "echo", Args: []string{"ok"}, Tag: tag}
		var how *guest.Attach
		if i%2 == 0 {
			how = &guest.Attach{Lossless: i%4 == 0}
		}
		_, r, err := g.Start(waiting(t), spec, how)
		require.NoError(t, err)
		if r == nil {
			r, err = g.Attach(waiting(t), nestbox.Selector{Tag: tag}, guest.Attach{})
			require.NoError(t, err)
		}
		tr := &transcript{}
		tr.readAll(t, r)
		require.NoError(t, r.Close())
		require.Equal(t, "ok\n", string(tr.stdout))
		require.Zero(t, tr.exit.Code)
	}
}

// testOutputCutAndResumed cuts readers at random, sometimes within an event,
// and compares checksums of what they have put together.
func testOutputCutAndResumed(t *testing.T, g guest.Processes) {
	dir := scratch(t, g)
	p := start(t, g, python(`
import hashlib, os, random
rnd = random.Random(7)
sums = hashlib.sha256(), hashlib.sha256()
for _ in range(200):
    stream = rnd.choice((0, 0, 1))
    data = rnd.randbytes(rnd.choice((1, 3, 100, 5000, 20000)))
    sums[stream].update(data)
    while data:
        data = data[os.write(1 + stream, data):]
open("`+dir+`/sums", "w").write(sums[0].hexdigest() + " " + sums[1].hexdigest())
`))
	const readers = 4
	got := make([][2][sha256.Size]byte, readers)
	var wg sync.WaitGroup
	for i := range got {
		wg.Go(func() {
			var err error
			if got[i], err = readInPieces(waiting(t), g, exact(p), rand.New(rand.NewPCG(1, uint64(i)))); err != nil {
				t.Errorf("reader %d: %v", i, err)
			}
		})
	}
	wg.Wait()
	want := strings.Fields(output(t, g, "cat "+dir+"/sums"))
	for _, sums := range got {
		require.Equal(t, want, []string{hex.EncodeToString(sums[0][:]), hex.EncodeToString(sums[1][:])})
	}
}

// readInPieces reads everything, with a new reader every few events, and
// returns the checksums of stdout and stderr.
func readInPieces(ctx context.Context, g guest.Processes, sel nestbox.Selector, rnd *rand.Rand) (sums [2][sha256.Size]byte, err error) {
	hashes := map[nestbox.Stream]interface {
		io.Writer
		Sum([]byte) []byte
	}{nestbox.Stdout: sha256.New(), nestbox.Stderr: sha256.New()}
	var at int64
	for closed := false; !closed; {
		r, err := g.Attach(ctx, sel, guest.Attach{Since: nestbox.Since{Offset: at}, Lossless: rnd.IntN(3) == 0})
		if err != nil {
			return sums, err
		}
		for range 1 + rnd.IntN(8) {
			e, err := r.Next(ctx)
			if err != nil {
				return sums, errors.Join(err, r.Close())
			}
			if e.Offset != at || e.Kind == nestbox.EventGap {
				return sums, fmt.Errorf("%s at %d, expected %d", e.Kind, e.Offset, at)
			}
			if e.Kind == nestbox.EventData {
				n := 1 + rnd.IntN(len(e.Data))
				_, _ = hashes[e.Stream].Write(e.Data[:n])
				at += int64(n)
				if n < len(e.Data) {
					break // the rest is asked for again
				}
			}
			if closed = e.Kind == nestbox.EventClosed; closed {
				break
			}
		}
		if err := r.Close(); err != nil {
			return sums, err
		}
	}
	hashes[nestbox.Stdout].Sum(sums[0][:0])
	hashes[nestbox.Stderr].Sum(sums[1][:0])
	return sums, nil
}

// overflow is more than a guest keeps of one process.
const overflow = 128 << 20

const pattern = "0123456789abcde\n"

// flood writes overflow bytes of the pattern.
func flood() nestbox.ProcessSpec {
	return shell("yes 0123456789abcde | dd bs=64k iflag=fullblock count=" + itoa(overflow/(64<<10)) + " status=none")
}

// checkPattern reads to the end and checks every byte by its offset. It
// returns the gaps.
func checkPattern(ctx context.Context, r guest.OutputReader) (gaps [][2]int64, end int64, err error) {
	whole := strings.Repeat(pattern, 1+(1<<20)/len(pattern))
	at := int64(-1)
	for {
		e, err := r.Next(ctx)
		if errors.Is(err, io.EOF) {
			return gaps, at, nil
		}
		if err != nil {
			return gaps, at, err
		}
		if at >= 0 && e.Offset != at {
			return gaps, at, fmt.Errorf("%s at %d after %d", e.Kind, e.Offset, at)
		}
		for data, off := e.Data, e.Offset; len(data) > 0; {
			phase := int(off % int64(len(pattern)))
			n := min(len(data), len(whole)-phase)
			if string(data[:n]) != whole[phase:phase+n] {
				return gaps, at, fmt.Errorf("wrong bytes after %d", off)
			}
			data, off = data[n:], off+int64(n)
		}
		if e.Kind == nestbox.EventGap {
			gaps = append(gaps, [2]int64{e.Offset, e.To})
		}
		at = e.End()
	}
}

// testOutputStalledReader has two readers of a process that writes more than
// is kept. One stalls; the other is lossless.
func testOutputStalledReader(t *testing.T, g guest.Processes) {
	p, lossless := startAttached(t, g, flood(), &guest.Attach{Lossless: true})
	stalled := attach(t, g, p, guest.Attach{})
	first, err := stalled.Next(waiting(t))
	require.NoError(t, err)
	require.Equal(t, nestbox.EventData, first.Kind)
	at := first.End()

	gaps, end, err := checkPattern(waiting(t), lossless)
	require.NoError(t, err)
	require.Empty(t, gaps)
	require.EqualValues(t, overflow, end)
	ended, err := g.Wait(waiting(t), exact(p))
	require.NoError(t, err)
	require.Zero(t, ended.Exit.Code)
	require.EqualValues(t, overflow, ended.Output.Stdout)
	require.Greater(t, ended.Output.Start, at, "the log has overflowed")
	require.Less(t, ended.Output.Start, int64(overflow))

	gaps, end, err = checkPattern(waiting(t), stalled)
	require.NoError(t, err)
	require.EqualValues(t, overflow, end)
	require.NotEmpty(t, gaps, "what is gone is said; more than once if a connection in between has taken some")
	late := attach(t, g, p, guest.Attach{})
	gaps, end, err = checkPattern(waiting(t), late)
	require.NoError(t, err)
	require.EqualValues(t, overflow, end)
	require.Equal(t, [][2]int64{{0, ended.Output.Start}}, gaps, "what is gone is said, once")
}

func testOutputLossless(t *testing.T, g guest.Processes) {
	p, r := startAttached(t, g, flood(), &guest.Attach{Lossless: true})
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	_, err := g.Wait(ctx, exact(p))
	requireError(t, nestbox.CodeTimeout, err) // it waits for its reader
	gaps, end, err := checkPattern(waiting(t), r)
	require.NoError(t, err)
	require.Empty(t, gaps)
	require.EqualValues(t, overflow, end)

	p, r = startAttached(t, g, flood(), &guest.Attach{Lossless: true})
	_, err = r.Next(waiting(t))
	require.NoError(t, err)
	require.NoError(t, r.Close()) // that frees it
	ended, err := g.Wait(waiting(t), exact(p))
	require.NoError(t, err)
	require.Zero(t, ended.Exit.Code)
	require.EqualValues(t, overflow, ended.Output.End)
}

// testOutputReadersLeave has many readers of a busy process come and go.
func testOutputReadersLeave(t *testing.T, g guest.Processes) {
	p := start(t, g, shell("exec yes 0123456789abcde"))
	var wg sync.WaitGroup
	for i := range 20 {
		wg.Go(func() {
			r, err := g.Attach(waiting(t), exact(p), guest.Attach{Lossless: i%2 == 0, Since: nestbox.Since{Now: i%3 == 0}})
			if err != nil {
				t.Errorf("attach: %v", err)
				return
			}
			for range i {
				if _, err := r.Next(waiting(t)); err != nil {
					t.Errorf("next: %v", err)
				}
			}
			if err := r.Close(); err != nil {
				t.Errorf("close: %v", err)
			}
		})
	}
	wg.Wait()
	before, err := g.Get(waiting(t), exact(p))
	require.NoError(t, err)
	require.True(t, before.Running())
	eventually(t, func() bool {
		now, err := g.Get(waiting(t), exact(p))
		require.NoError(t, err)
		return now.Output.End > before.Output.End
	}, "the process writes on")
}

func testAttachSince(t *testing.T, g guest.Processes) {
	spec := shell("printf 0123456789; cat")
	spec.Stdin = true
	p, r := startAttached(t, g, spec, &guest.Attach{})
	tr := &transcript{}
	tr.readUntil(t, r, "0123456789")
	for _, c := range []struct {
		since nestbox.Since
		want  string
	}{
		{nestbox.Since{}, "0123456789ab"},
		{nestbox.Since{Offset: 4}, "456789ab"},
		{nestbox.Since{Offset: 10}, "ab"},
		{nestbox.Since{Now: true}, "ab"},
		{nestbox.Since{Tail: 3}, "789ab"},
		{nestbox.Since{Tail: 1000}, "0123456789ab"},
	} {
		r := attach(t, g, p, guest.Attach{Since: c.since})
		defer func() {
			tr := &transcript{}
			tr.readAll(t, r)
			require.Equal(t, c.want, string(tr.stdout), "%+v", c.since)
			require.Empty(t, tr.gaps)
		}()
	}
	for _, since := range []nestbox.Since{{Offset: 11}, {Offset: -1}, {Tail: -1}} {
		_, err := g.Attach(waiting(t), exact(p), guest.Attach{Since: since})
		requireError(t, nestbox.CodeInvalid, err)
	}
	require.NoError(t, g.WriteStdin(waiting(t), exact(p), []byte("ab"), true))
	tr.readAll(t, r)
	require.Equal(t, "0123456789ab", string(tr.stdout))
}

func testAttachToEnded(t *testing.T, g guest.Processes) {
	p := start(t, g, shell("printf out; exit 9"))
	_, err := g.Wait(waiting(t), exact(p))
	require.NoError(t, err)
	eventually(t, func() bool {
		now, err := g.Get(waiting(t), exact(p))
		require.NoError(t, err)
		return now.Output.Closed
	}, "output is closed")
	for since, want := range map[nestbox.Since]string{{}: "out", {Offset: 2}: "t", {Offset: 3}: "", {Now: true}: "", {Tail: 1}: "t"} {
		tr := &transcript{}
		tr.readAll(t, attach(t, g, p, guest.Attach{Since: since, Lossless: true}))
		require.Equal(t, want, string(tr.stdout))
		require.Equal(t, 9, tr.exit.Code)
		require.EqualValues(t, 3, tr.offset)
	}
}

func testNextContext(t *testing.T, g guest.Processes) {
	p := start(t, g, nestbox.ProcessSpec{Cmd: "cat", Stdin: true})
	r := attach(t, g, p, guest.Attach{})
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	_, err := r.Next(ctx)
	require.Error(t, err)
	require.NoError(t, r.Close())
	require.NoError(t, r.Close(), "closing twice is fine")
}
