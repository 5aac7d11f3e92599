package guesttest

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/internal/guest"
)

// testLocateLines looks for lines in a log that is in memory for the smaller part.
func testLocateLines(t *testing.T, g guest.Processes) {
	const lines, width = 150_000, 20 // 3 MB
	spec := shell(fmt.Sprintf(`i=0; seq -f '%%0%d.0f' 1 %d; echo of stderr >&2; printf 'no end'`, width-1, lines))
	p, r := startAttached(t, g, spec, &guest.Attach{Lossless: true})
	tr := &transcript{}
	tr.readAll(t, r)
	p, err := g.Get(waiting(t), exact(p))
	require.NoError(t, err)
	end := p.Output.End
	require.EqualValues(t, lines*width+len("of stderr\n")+len("no end"), end)
	locate := func(n int64, stream nestbox.Stream) int64 {
		at, err := g.Locate(waiting(t), exact(p), nestbox.Since{Lines: n}, stream)
		require.NoError(t, err)
		return at
	}
	all := func(n int64) string {
		r, err := g.Attach(waiting(t), exact(p), guest.Attach{Since: nestbox.Since{Offset: locate(n, nestbox.Stdout)}})
		require.NoError(t, err)
		tr := &transcript{}
		tr.readAll(t, r)
		return string(tr.stdout)
	}
	require.Equal(t, "no end", all(1))
	require.Equal(t, fmt.Sprintf("%0*d\nno end", width-1, lines), all(2))
	for _, n := range []int64{1000, 60_000, 149_999, 150_000} {
		require.True(t, strings.HasPrefix(all(n), fmt.Sprintf("%0*d\n", width-1, lines-n+2)), n)
	}
	for _, n := range []int64{lines + 1, lines + 2, 1 << 40} {
		require.EqualValues(t, 0, locate(n, nestbox.Stdout))
	}
	whole, err := g.Attach(waiting(t), exact(p), guest.Attach{Since: nestbox.Since{Offset: locate(1, nestbox.Stderr)}})
	require.NoError(t, err)
	ev, err := whole.Next(waiting(t))
	require.NoError(t, err)
	for ev.Stream != nestbox.Stderr {
		ev, err = whole.Next(waiting(t))
		require.NoError(t, err)
	}
	require.Equal(t, "of stderr\n", string(ev.Data))
	require.NoError(t, whole.Close())
	_, err = g.Locate(waiting(t), nestbox.Selector{Tag: "nobody"}, nestbox.Since{Lines: 1}, "")
	requireError(t, nestbox.CodeNotFound, err)
}

// testLogTimes: what was read is found again by when that was.
func testLogTimes(t *testing.T, g guest.Processes) {
	const pieces = 6
	before := time.Now()
	spec := shell(fmt.Sprintf("for i in $(seq %d); do echo piece $i; sleep 0.3; done", pieces))
	p, r := startAttached(t, g, spec, &guest.Attach{Lossless: true})
	tr := &transcript{}
	tr.readAll(t, r)
	after := time.Now()
	timed, err := g.Attach(waiting(t), exact(p), guest.Attach{Times: true})
	require.NoError(t, err)
	var at []time.Time
	var begins []int64
	for len(at) < pieces {
		ev, err := timed.Next(waiting(t))
		require.NoError(t, err)
		if ev.Kind != nestbox.EventData {
			continue
		}
		require.Equal(t, fmt.Sprintf("piece %d\n", len(at)+1), string(ev.Data), "each piece has a time of its own")
		require.False(t, ev.At.IsZero())
		at, begins = append(at, ev.At), append(begins, ev.Offset)
	}
	require.NoError(t, timed.Close())
	// The clock of the guest may differ from ours.
	require.WithinDuration(t, before, at[0], after.Sub(before)+time.Minute)
	for i := range at {
		if i > 0 {
			require.GreaterOrEqual(t, at[i].Sub(at[i-1]), 250*time.Millisecond)
		}
		offset, err := g.Locate(waiting(t), exact(p), nestbox.Since{After: at[i]}, "")
		require.NoError(t, err)
		require.Equal(t, begins[i], offset)
		if i > 0 {
			offset, err = g.Locate(waiting(t), exact(p), nestbox.Since{After: at[i].Add(-100 * time.Millisecond), Lines: 100}, "")
			require.NoError(t, err)
			require.Equal(t, begins[i], offset)
		}
	}
	offset, err := g.Locate(waiting(t), exact(p), nestbox.Since{After: at[pieces-1].Add(time.Hour)}, "")
	require.NoError(t, err)
	require.EqualValues(t, len(tr.stdout), offset)
	_, err = g.Attach(waiting(t), exact(p), guest.Attach{Since: nestbox.Since{Lines: 1}})
	requireError(t, nestbox.CodeInvalid, err)
}
