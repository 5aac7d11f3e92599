package control

import (
	"bytes"
	"context"
	"errors"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/internal/guest"
)

// script makes an output log of chunks; "2:…" is stderr, "" cuts the reader,
// and the exit follows.
func script(chunks ...string) (events []*nestbox.OutputEvent) {
	offset := int64(0)
	for _, chunk := range chunks {
		if chunk == "" {
			events = append(events, nil)
			continue
		}
		e := &nestbox.OutputEvent{Kind: nestbox.EventData, Stream: nestbox.Stdout, Offset: offset, Data: []byte(chunk)}
		if rest, ok := bytes.CutPrefix(e.Data, []byte("2:")); ok {
			e.Stream, e.Data = nestbox.Stderr, rest
		}
		offset = e.End()
		events = append(events, e)
	}
	return append(events, &nestbox.OutputEvent{
		Kind: nestbox.EventExit, Offset: offset, Exit: &nestbox.Exit{Code: 3, Reason: nestbox.ReasonExited},
	})
}

func newExecWorld(t *testing.T, events []*nestbox.OutputEvent) (*world, *fakeProcesses, string) {
	w := newWorld(t)
	g := &fakeGuest{}
	g.processes.script = events
	w.host.guest = g
	return w, &g.processes, w.create(t).ID
}

// executed is a result with its output.
type executed struct {
	ExecResult
	Stdout, Stderr []byte
}

func execute(ctx context.Context, w *world, id string, spec nestbox.ProcessSpec) (executed, error) {
	var stdout, stderr bytes.Buffer
	res, err := w.Processes.Exec(ctx, w.me, id, spec, nil, &stdout, &stderr)
	return executed{res, stdout.Bytes(), stderr.Bytes()}, err
}

func TestExec(t *testing.T) {
	t.Parallel()
	// The exit is not the end of the output: a grandchild holds it open.
	w, p, id := newExecWorld(t, script("out ", "2:err ", "more", "2:last"))
	spec := nestbox.ProcessSpec{Cmd: "make", Args: []string{"all"}, Timeout: time.Minute}
	got, err := execute(t.Context(), w, id, spec)
	require.NoError(t, err)
	require.Equal(t, spec, p.started)
	require.Equal(t, []guest.Attach{{Lossless: true}}, p.attached)
	require.Zero(t, p.open, "readers are closed")
	require.Equal(t, "out more", string(got.Stdout))
	require.Equal(t, "err last", string(got.Stderr))
	require.False(t, got.Truncated)
	require.Equal(t, 3, got.Process.Exit.Code)
	require.Equal(t, 7, got.Process.PID)
	require.Equal(t, nestbox.OutputState{End: 16, Stdout: 8, Stderr: 8}, got.Process.Output)
}

func TestExecAttachesAgain(t *testing.T) {
	t.Parallel()
	w, p, id := newExecWorld(t, script("abc", "", "2:de", "", "", "", "f"))
	got, err := execute(t.Context(), w, id, nestbox.ProcessSpec{Cmd: "x"})
	require.NoError(t, err)
	require.Equal(t, "abcf", string(got.Stdout))
	require.Equal(t, "de", string(got.Stderr))
	at := func(offset int64) guest.Attach {
		return guest.Attach{Since: nestbox.Since{Offset: offset}, Lossless: true}
	}
	require.Equal(t, []guest.Attach{at(0), at(3), at(5), at(5), at(5)}, p.attached)
	require.Zero(t, p.open)

	w, p, id = newExecWorld(t, script("abc", "", "", "", ""))
	_, err = execute(t.Context(), w, id, nestbox.ProcessSpec{Cmd: "x"})
	requireCode(t, nestbox.CodeGuest, err)
	require.Zero(t, p.open)
}

func TestExecTruncates(t *testing.T) {
	t.Parallel()
	chunk := string(bytes.Repeat([]byte("x"), MaxExecOutput/4))
	w, _, id := newExecWorld(t, script(chunk, "2:"+chunk, chunk, chunk))
	got, err := execute(t.Context(), w, id, nestbox.ProcessSpec{Cmd: "x"})
	require.NoError(t, err)
	require.False(t, got.Truncated, "exactly the limit")
	require.Len(t, got.Stdout, 3*len(chunk))

	w, _, id = newExecWorld(t, script(chunk, "2:"+chunk, chunk, chunk[1:], "2:ab", "c"))
	got, err = execute(t.Context(), w, id, nestbox.ProcessSpec{Cmd: "x"})
	require.NoError(t, err)
	require.True(t, got.Truncated)
	require.Equal(t, MaxExecOutput, len(got.Stdout)+len(got.Stderr))
	require.Equal(t, byte('a'), got.Stderr[len(got.Stderr)-1])
	require.NotNil(t, got.Process.Exit, "it was read to the end")
	require.EqualValues(t, MaxExecOutput+2, got.Process.Output.End)

	gap := []*nestbox.OutputEvent{{Kind: nestbox.EventGap, Offset: 0, To: 10}}
	w, _, id = newExecWorld(t, append(gap, script()...))
	got, err = execute(t.Context(), w, id, nestbox.ProcessSpec{Cmd: "x"})
	require.NoError(t, err)
	require.True(t, got.Truncated)
}

func TestExecOfACallerThatLeaves(t *testing.T) {
	t.Parallel()
	w, p, id := newExecWorld(t, nil)
	p.waiting = make(chan struct{})
	ctx, leave := context.WithCancel(t.Context())
	go func() {
		<-p.waiting
		leave()
	}()
	_, err := execute(ctx, w, id, nestbox.ProcessSpec{Cmd: "x"})
	requireCode(t, nestbox.CodeCanceled, err)
	require.Zero(t, p.open, "the process does not wait for a reader that is gone")
}

func TestExecWithoutAnExit(t *testing.T) {
	t.Parallel()
	w, p, id := newExecWorld(t, []*nestbox.OutputEvent{{Kind: nestbox.EventClosed}})
	_, err := execute(t.Context(), w, id, nestbox.ProcessSpec{Cmd: "x"})
	requireCode(t, nestbox.CodeGuest, err)
	require.Zero(t, p.open)
}

// TestExecAsksTheRecord: output that breaks off is asked about, and never taken for
// a good end.
func TestExecAsksTheRecord(t *testing.T) {
	t.Parallel()
	w, p, id := newExecWorld(t, script("abc", "", "", "", ""))
	p.record = &nestbox.Exit{Code: 9, Reason: nestbox.ReasonExited}
	got, err := execute(t.Context(), w, id, nestbox.ProcessSpec{Cmd: "x"})
	require.NoError(t, err)
	require.Equal(t, 9, got.Process.Exit.Code)
	require.True(t, got.Truncated)
	require.Equal(t, "abc", string(got.Stdout))
}

// TestExecWithoutRoom: where the output cannot be put, the process still runs to
// its end.
func TestExecWithoutRoom(t *testing.T) {
	t.Parallel()
	w, _, id := newExecWorld(t, script("some", "more"))
	r, err := w.Processes.Exec(t.Context(), w.me, id, nestbox.ProcessSpec{Cmd: "x"}, nil, full{}, full{})
	require.NoError(t, err)
	require.True(t, r.Truncated)
	require.Equal(t, 3, r.Process.Exit.Code)
}

type full struct{}

func (full) Write([]byte) (int, error) { return 0, errors.New("full") }
