package guesttest

import (
	"context"
	"errors"
	"io"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/internal/guest"
)

// patience is how long the suite waits for something that must happen. It is
// long because machines may be slow, and is never waited for in full.
const patience = 2 * time.Minute

// RunProcesses tests the Processes of what newGuest returns, which must have
// /bin/sh, coreutils and python3. All it sees is the interface: what goes on
// in the guest it learns from programs that it runs there. The guest keeps at
// most 80 MiB of output of a process, and every subtest may share it.
func RunProcesses(t *testing.T, newGuest func(t *testing.T) guest.Guest) {
	for name, test := range map[string]func(*testing.T, guest.Processes){
		"StartRecord":           testStartRecord,
		"StartErrors":           testStartErrors,
		"StartOutlivesContext":  testStartOutlivesContext,
		"Environment":           testEnvironment,
		"PathLookup":            testPathLookup,
		"User":                  testUser,
		"Tags":                  testTags,
		"Terminal":              testTerminal,
		"TerminalInput":         testTerminalInput,
		"TerminalResize":        testTerminalResize,
		"TerminalJobs":          testTerminalJobs,
		"TerminalHangUp":        testTerminalHangUp,
		"TerminalUser":          testTerminalUser,
		"TagReuse":              testTagReuse,
		"IDs":                   testIDs,
		"ListArgs":              testListArgs,
		"TagRace":               testTagRace,
		"Unknown":               testUnknown,
		"ListOrder":             testListOrder,
		"Wait":                  testWait,
		"ExitRecord":            testExitRecord,
		"ExitWhileOutputIsHeld": testExitWhileOutputIsHeld,
		"ExitWhileOthersWrite":  testExitWhileOthersWrite,
		"NoZombies":             testNoZombies,
		"ManyProcesses":         testManyProcesses,
		"Concurrent":            testConcurrentProcesses,

		"OutputUnattended":    testOutputUnattended,
		"OutputOfFastCommand": testOutputOfFastCommand,
		"OutputCutAndResumed": testOutputCutAndResumed,
		"OutputStalledReader": testOutputStalledReader,
		"OutputLossless":      testOutputLossless,
		"OutputReadersLeave":  testOutputReadersLeave,
		"AttachSince":         testAttachSince,
		"AttachToEnded":       testAttachToEnded,
		"NextContext":         testNextContext,

		"Stdin":            testStdin,
		"StdinFull":        testStdinFull,
		"StdinNotOpen":     testStdinNotOpen,
		"Signals":          testSignals,
		"SignalEnded":      testSignalEnded,
		"KillTree":         testKillTree,
		"KillForkBomb":     testKillForkBomb,
		"KillHoppingTree":  testKillHoppingTree,
		"KillGrace":        testKillGrace,
		"KillLastWords":    testKillLastWords,
		"KillEnded":        testKillEnded,
		"KillConcurrently": testKillConcurrently,
		"KillManyAtOnce":   testKillManyAtOnce,
		"KillSparesOthers": testKillSparesOthers,
		"KillInvalid":      testKillInvalid,
		"KillBiggest":      testKillBiggest,
		"Timeout":          testTimeout,
		"TimeoutNotUsed":   testTimeoutNotUsed,
		"IdleTimeout":      testIdleTimeout,
		"LocateLines":      testLocateLines,
		"LogTimes":         testLogTimes,
		"Tree":             testTree,
		"Merge":            testMerge,
		"TagConflict":      testTagConflict,
		"RequestKey":       testRequestKey,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			test(t, newGuest(t).Processes())
		})
	}
}

// shell is the spec of a script.
func shell(script string) nestbox.ProcessSpec {
	return nestbox.ProcessSpec{Cmd: "/bin/sh", Args: []string{"-c", script}}
}

// python is the spec of a Python program.
func python(program string) nestbox.ProcessSpec {
	return nestbox.ProcessSpec{Cmd: "python3", Args: []string{"-u", "-c", program}}
}

// waiting returns a context that ends when the suite has waited long enough.
func waiting(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	t.Cleanup(cancel)
	return ctx
}

// exact names p and no other process.
func exact(p nestbox.Process) nestbox.Selector { return nestbox.Selector{ID: p.ID} }

// start starts a process whose tree is killed when the test ends.
func start(t *testing.T, g guest.Processes, spec nestbox.ProcessSpec) nestbox.Process {
	t.Helper()
	p, _ := startAttached(t, g, spec, nil)
	return p
}

func startAttached(t *testing.T, g guest.Processes, spec nestbox.ProcessSpec, attach *guest.Attach) (nestbox.Process, guest.OutputReader) {
	t.Helper()
	p, r, err := g.Start(waiting(t), spec, attach)
	require.NoError(t, err)
	t.Cleanup(func() { killLeft(t, g, p) })
	if r != nil {
		t.Cleanup(func() { _ = r.Close() })
	}
	return p, r
}

// killLeft kills what is left of a process.
func killLeft(t *testing.T, g guest.Processes, p nestbox.Process) {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	sel := exact(p)
	if p.ID == 0 { // all that is known of it is its tag
		sel = nestbox.Selector{Tag: p.Tag}
	}
	if _, err := g.Kill(ctx, sel, guest.Kill{}); err != nil && nestbox.CodeOf(err) != nestbox.CodeNotFound {
		t.Errorf("kill what is left of %s: %v", p.Tag, err)
	}
}

// attach attaches a reader that is closed when the test ends.
func attach(t *testing.T, g guest.Processes, p nestbox.Process, how guest.Attach) guest.OutputReader {
	t.Helper()
	r, err := g.Attach(waiting(t), exact(p), how)
	require.NoError(t, err)
	t.Cleanup(func() { _ = r.Close() })
	return r
}

// transcript is what a reader has told, up to some point.
type transcript struct {
	begun  bool
	offset int64 // where it is
	stdout []byte
	stderr []byte
	pty    []byte
	gaps   [][2]int64
	exit   *nestbox.Exit
	closed bool
}

// read adds the next event, and checks that it may follow what came before.
func (tr *transcript) read(t *testing.T, ctx context.Context, r guest.OutputReader) nestbox.OutputEvent {
	t.Helper()
	e, err := r.Next(ctx)
	require.NoError(t, err)
	require.False(t, tr.closed, "an event after closed")
	if tr.begun {
		require.Equal(t, tr.offset, e.Offset, "offset of %s", e.Kind)
	}
	tr.begun, tr.offset = true, e.End()
	switch e.Kind {
	case nestbox.EventData:
		require.NotEmpty(t, e.Data)
		switch e.Stream {
		case nestbox.Stdout:
			tr.stdout = append(tr.stdout, e.Data...)
		case nestbox.Stderr:
			tr.stderr = append(tr.stderr, e.Data...)
		case nestbox.Pty:
			tr.pty = append(tr.pty, e.Data...)
		default:
			require.Fail(t, "unknown stream", "%q", e.Stream)
		}
	case nestbox.EventGap:
		require.Greater(t, e.To, e.Offset)
		tr.gaps = append(tr.gaps, [2]int64{e.Offset, e.To})
	case nestbox.EventExit:
		require.Nil(t, tr.exit, "a second exit")
		require.NotNil(t, e.Exit)
		tr.exit = e.Exit
	case nestbox.EventClosed:
		require.NotNil(t, tr.exit, "closed before exit")
		tr.closed = true
	default:
		require.Fail(t, "unknown event", "%q", e.Kind)
	}
	return e
}

// readAll reads to the end.
func (tr *transcript) readAll(t *testing.T, r guest.OutputReader) {
	t.Helper()
	ctx := waiting(t)
	for !tr.closed {
		tr.read(t, ctx, r)
	}
	_, err := r.Next(ctx)
	require.ErrorIs(t, err, io.EOF)
}

// readUntil reads until stdout contains text.
func (tr *transcript) readUntil(t *testing.T, r guest.OutputReader, text string) {
	t.Helper()
	ctx := waiting(t)
	for !strings.Contains(string(tr.stdout), text) {
		tr.read(t, ctx, r)
	}
}

// run runs a process to the end of its output.
func run(t *testing.T, g guest.Processes, spec nestbox.ProcessSpec) *transcript {
	t.Helper()
	_, r := startAttached(t, g, spec, &guest.Attach{Lossless: true})
	tr := &transcript{}
	tr.readAll(t, r)
	return tr
}

// output runs a script that must succeed and returns what it wrote to stdout,
// without space around it.
func output(t *testing.T, g guest.Processes, script string) string {
	t.Helper()
	tr := run(t, g, shell(script))
	require.Zero(t, tr.exit.Code, "%s\n%s", script, tr.stderr)
	return strings.TrimSpace(string(tr.stdout))
}

// scratch makes a directory in the guest.
func scratch(t *testing.T, g guest.Processes) string {
	t.Helper()
	dir := output(t, g, "dir=$(mktemp -d /tmp/nestbox-guesttest-XXXXXXXX) && chmod 755 $dir && echo $dir")
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		_, _, _ = g.Start(ctx, shell("rm -rf "+dir), nil)
	})
	return dir
}

// existing returns which of some PIDs still are in the guest's /proc, be it as
// zombies.
func existing(t *testing.T, g guest.Processes, pids []string) string {
	t.Helper()
	return output(t, g, "for p in "+strings.Join(pids, " ")+"; do [ ! -e /proc/$p/stat ] || cat /proc/$p/stat 2>/dev/null; done; true")
}

// eventually asks again and again until ok.
func eventually(t *testing.T, ok func() bool, what string) {
	t.Helper()
	deadline := time.Now().Add(patience)
	ticker := time.NewTicker(10 * time.Millisecond)
	defer ticker.Stop()
	for !ok() {
		require.True(t, time.Now().Before(deadline), "never happened: %s", what)
		<-ticker.C
	}
}

func requireError(t *testing.T, want nestbox.Code, err error) *nestbox.Error {
	t.Helper()
	require.Error(t, err)
	require.Equal(t, want, nestbox.CodeOf(err), "%v", err)
	var e *nestbox.Error
	require.True(t, errors.As(err, &e))
	require.NotEmpty(t, e.Message)
	return e
}

func itoa(n int) string { return strconv.Itoa(n) }
