package envd

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/internal/guest"
	"github.com/nestbox/nestbox/internal/guest/outputlog"
)

func newEnvd(t *testing.T, limits Limits) *Envd {
	t.Helper()
	e, err := New(Config{Limits: limits})
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, e.Close()) })
	return e
}

func waiting(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	t.Cleanup(cancel)
	return ctx
}

func runShell(t *testing.T, e *Envd, script string) nestbox.Process {
	t.Helper()
	p, r, err := e.Processes().Start(waiting(t), nestbox.ProcessSpec{Cmd: "/bin/sh", Args: []string{"-c", script}}, &guest.Attach{})
	require.NoError(t, err)
	for err == nil {
		_, err = r.Next(waiting(t))
	}
	require.ErrorIs(t, err, io.EOF)
	require.NoError(t, r.Close())
	p, err = e.Processes().Get(waiting(t), nestbox.Selector{Tag: p.Tag})
	require.NoError(t, err)
	return p
}

// TestMemoryOfIdleProcesses does not run beside other tests, because it looks
// at the memory of all of them.
func TestMemoryOfIdleProcesses(t *testing.T) {
	e := newEnvd(t, Limits{})
	used := func() int64 {
		runtime.GC()
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return int64(m.HeapInuse + m.StackInuse)
	}
	const n = 200
	before := used()
	processes := make([]nestbox.Process, n)
	readers := make([]guest.OutputReader, n)
	for i := range processes {
		var err error
		spec := nestbox.ProcessSpec{Cmd: "/bin/sh", Args: []string{"-c", "echo hello; exec cat"}, Stdin: true}
		processes[i], readers[i], err = e.Processes().Start(waiting(t), spec, &guest.Attach{})
		require.NoError(t, err)
		_, err = readers[i].Next(waiting(t))
		require.NoError(t, err)
	}
	require.LessOrEqual(t, (used()-before)/n, int64(40<<10), "bytes of each live process")
	for i, p := range processes {
		require.NoError(t, readers[i].Close())
		require.NoError(t, e.Processes().WriteStdin(waiting(t), nestbox.Selector{PID: p.PID}, nil, true))
		_, err := e.Processes().Wait(waiting(t), nestbox.Selector{PID: p.PID})
		require.NoError(t, err)
	}
	require.Eventually(t, func() bool { return (used()-before)/n <= 16<<10 }, time.Minute, 100*time.Millisecond, "memory of ended processes is given back")
}

func TestExitedAreForgotten(t *testing.T) {
	t.Parallel()
	e := newEnvd(t, Limits{Exited: 5})
	var records []nestbox.Process
	for i := range 12 {
		records = append(records, runShell(t, e, fmt.Sprint("echo ", i)))
	}
	last := records[11]
	attached, err := e.Processes().Attach(waiting(t), nestbox.Selector{Tag: records[7].Tag}, guest.Attach{Lossless: true})
	require.NoError(t, err)
	all, err := e.Processes().List(waiting(t), true)
	require.NoError(t, err)
	require.Len(t, all, 5)
	require.Equal(t, last.Tag, all[4].Tag)
	_, err = e.Processes().Get(waiting(t), nestbox.Selector{Tag: records[0].Tag})
	require.Equal(t, nestbox.CodeNotFound, nestbox.CodeOf(err))
	for range 5 {
		runShell(t, e, "true")
	}
	_, err = e.Processes().Get(waiting(t), nestbox.Selector{Tag: records[7].Tag})
	require.Equal(t, nestbox.CodeNotFound, nestbox.CodeOf(err))
	event, err := attached.Next(waiting(t)) // who has it may read on
	require.NoError(t, err)
	require.Equal(t, "7\n", string(event.Data))
	require.NoError(t, attached.Close())
}

// TestTotals has many processes write more than all of them may keep.
func TestTotals(t *testing.T) {
	t.Parallel()
	limits := Limits{Output: outputlog.Limits{Memory: 256 << 10, Disk: 1 << 20, TotalMemory: 1 << 20, TotalDisk: 3 << 20, Dir: t.TempDir()}}
	e := newEnvd(t, limits)
	var wg sync.WaitGroup
	for range 16 {
		wg.Go(func() {
			for range 2 {
				spec := nestbox.ProcessSpec{Cmd: "head", Args: []string{"-c", "2000000", "/dev/zero"}}
				p, _, err := e.Processes().Start(waiting(t), spec, nil)
				if err != nil {
					t.Errorf("start: %v", err)
					return
				}
				if p, err = e.Processes().Wait(waiting(t), nestbox.Selector{PID: p.PID}); err != nil || p.Output.End != 2_000_000 {
					t.Errorf("wait: %v %+v", err, p.Output)
				}
			}
		})
	}
	wg.Wait()
	last := runShell(t, e, "head -c 600000 /dev/zero")
	require.LessOrEqual(t, e.table.budget.Memory(), limits.Output.TotalMemory)
	require.LessOrEqual(t, e.table.budget.Disk(), limits.Output.TotalDisk)
	require.Zero(t, last.Output.Start, "the newest is kept, at the cost of the oldest")
	records, err := e.Processes().List(waiting(t), true)
	require.NoError(t, err)
	require.Len(t, records, 33, "no record is lost to the output of others")
	for _, p := range records {
		require.NotNil(t, p.Exit)
	}
}

// TestOtherChildren: children of this program that were not started by envd
// are not taken from who started them.
func TestOtherChildren(t *testing.T) {
	t.Parallel()
	e := newEnvd(t, Limits{})
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for range 25 {
				cmd := exec.Command("/bin/sh", "-c", "exit 7")
				err := cmd.Run()
				if code := cmd.ProcessState.ExitCode(); err == nil || code != 7 {
					t.Errorf("%v, exit code %d", err, code)
				}
			}
		})
	}
	zombie := exec.Command("/bin/true") // stands in the way of the reaper all the time
	require.NoError(t, zombie.Start())
	for i := range 25 {
		require.Equal(t, i, runShell(t, e, fmt.Sprint("exit ", i)).Exit.Code)
	}
	wg.Wait()
	require.NoError(t, zombie.Wait())
}

func TestTwoEnvds(t *testing.T) {
	t.Parallel()
	a, b := newEnvd(t, Limits{}), newEnvd(t, Limits{})
	var wg sync.WaitGroup
	for _, e := range []*Envd{a, b} {
		wg.Go(func() {
			for i := range 20 {
				p, _, err := e.Processes().Start(waiting(t), nestbox.ProcessSpec{Cmd: "sh", Args: []string{"-c", fmt.Sprint("exit ", i)}, Tag: "same"}, nil)
				if err != nil {
					t.Errorf("start: %v", err)
					return
				}
				if p, err = e.Processes().Wait(waiting(t), nestbox.Selector{PID: p.PID}); err != nil || p.Exit.Code != i {
					t.Errorf("wait: %v %+v", err, p.Exit)
				}
			}
		})
	}
	wg.Wait()
}

// TestClose closes an Envd under everything that may wait for it.
func TestClose(t *testing.T) {
	t.Parallel()
	e, err := New(Config{Version: "v1"})
	require.NoError(t, err)
	info, err := e.Ping(t.Context())
	require.NoError(t, err)
	require.Equal(t, "v1", info.Version)
	p, r, err := e.Processes().Start(waiting(t), nestbox.ProcessSpec{Cmd: "sleep", Args: []string{"1000"}, Stdin: true, Timeout: time.Hour}, &guest.Attach{Lossless: true})
	require.NoError(t, err)
	sel := nestbox.Selector{PID: p.PID}
	errs := make(chan error, 3)
	go func() { _, err := r.Next(waiting(t)); errs <- err }()
	go func() { _, err := e.Processes().Wait(waiting(t), sel); errs <- err }()
	go func() { errs <- e.Processes().WriteStdin(waiting(t), sel, make([]byte, nestbox.MaxStdin), false) }()
	require.NoError(t, e.Close())
	for range 3 {
		require.Error(t, <-errs)
	}
	_, _, err = e.Processes().Start(waiting(t), nestbox.ProcessSpec{Cmd: "true"}, nil)
	require.Equal(t, nestbox.CodeUnavailable, nestbox.CodeOf(err))
	_, err = e.Processes().Kill(waiting(t), sel, guest.Kill{})
	require.Equal(t, nestbox.CodeUnavailable, nestbox.CodeOf(err))
	require.NoError(t, e.Close())

	require.NoError(t, unix.Kill(p.PID, 0), "it lives on")
	require.NoError(t, unix.Kill(p.PID, unix.SIGKILL))
	_, err = unix.Wait4(p.PID, nil, 0, nil)
	if err != nil {
		require.ErrorIs(t, err, unix.ECHILD) // the reaper of another test was faster
	}
}

// TestWrongPIDIsNotHit: a signal to a process that was seen goes to no other
// that has its number now.
func TestWrongPIDIsNotHit(t *testing.T) {
	t.Parallel()
	e := newEnvd(t, Limits{})
	p, _, err := e.Processes().Start(waiting(t), nestbox.ProcessSpec{Cmd: "cat", Stdin: true}, nil)
	require.NoError(t, err)
	stat, err := readStat(p.PID)
	require.NoError(t, err)
	stat.start-- // an earlier process of the same number
	k := &treeKill{table: e.table}
	k.signal(stat, unix.SIGKILL)
	e.table.reaper.signalSeen(stat, unix.SIGKILL)
	sel := nestbox.Selector{PID: p.PID}
	require.NoError(t, e.Processes().WriteStdin(waiting(t), sel, nil, true))
	p, err = e.Processes().Wait(waiting(t), sel)
	require.NoError(t, err)
	require.Zero(t, p.Exit.Code)
}

func TestReadStat(t *testing.T) {
	t.Parallel()
	self, err := readStat(os.Getpid())
	require.NoError(t, err)
	require.Equal(t, os.Getppid(), self.ppid)
	require.Equal(t, ownSession(), self.session)
	require.False(t, self.dead())
	require.Positive(t, self.start)

	// A name that looks like the end of itself.
	path := filepath.Join(t.TempDir(), "a) Z 1 (")
	require.NoError(t, os.Symlink("/bin/cat", path)) // a copy might still be open for writing in a fork of another test
	e := newEnvd(t, Limits{})
	p, _, err := e.Processes().Start(waiting(t), nestbox.ProcessSpec{Cmd: path, Stdin: true}, nil)
	require.NoError(t, err)
	stat, err := readStat(p.PID)
	require.NoError(t, err)
	require.Equal(t, p.PID, stat.session)
	require.Equal(t, os.Getpid(), stat.ppid)
	require.False(t, stat.dead())
	_, err = e.Processes().Kill(waiting(t), nestbox.Selector{PID: p.PID}, guest.Kill{})
	require.NoError(t, err)
	_, err = readStat(p.PID)
	require.Error(t, err)
}

// TestMarkInExec: a process that goes on as other programs all the time is never
// taken for one without a mark.
func TestMarkInExec(t *testing.T) {
	t.Parallel()
	if os.Getenv("NESTBOX_TEST_NAMESPACE") == "" {
		// Where the leader of the session is outside the PID namespace, as for
		// what was started from outside a container, the session reads as 0.
		self, err := os.Executable()
		require.NoError(t, err)
		again := exec.Command("unshare", "--pid", "--fork", "--mount-proc",
			"sh", "-c", `"$0" "$@"; exit $?`, self, "-test.run=^TestMarkInExec$", "-test.v")
		again.Env = append(os.Environ(), "NESTBOX_TEST_NAMESPACE=1")
		out, err := again.CombinedOutput()
		require.NoError(t, err, "%s", out)
		require.Contains(t, string(out), "PASS: TestMarkInExec")
	}
	script := filepath.Join(t.TempDir(), "loop")
	require.NoError(t, os.WriteFile(script, []byte("exec /bin/sh $0\n"), 0o600))
	cmd := exec.Command("/bin/sh", script)
	cmd.Env = []string{markVariable + "=mine"}
	require.NoError(t, cmd.Start())
	defer func() { _ = cmd.Process.Kill(); _ = cmd.Wait() }()
	seen := map[processMark]int{}
	for range 20_000 {
		seen[readMark(cmd.Process.Pid)]++
	}
	require.Positive(t, seen[processMark{mark: "mine"}])
	require.Zero(t, seen[processMark{}], "%v", seen)

	for _, env := range [][]string{{}, {"OTHER=x"}} {
		bare := exec.Command("/bin/sleep", "1000")
		bare.Env = env
		require.NoError(t, bare.Start())
		defer func() { _ = bare.Process.Kill(); _ = bare.Wait() }()
		// Start returns when the exec has begun.
		require.Eventually(t, func() bool { return readMark(bare.Process.Pid) == processMark{unknown: len(env) == 0} },
			time.Minute, time.Millisecond)
	}
}

// TestArgsAreBounded: large arguments of many processes are not kept whole for
// ever, and those of the newest are.
func TestArgsAreBounded(t *testing.T) {
	t.Parallel()
	e := newEnvd(t, Limits{})
	args := slices.Repeat([]string{strings.Repeat("x", 100_000)}, 10)
	var last nestbox.Process
	for range 30 {
		p, _, err := e.Processes().Start(t.Context(), nestbox.ProcessSpec{Cmd: "true", Args: args}, nil)
		require.NoError(t, err)
		last, err = e.Processes().Wait(t.Context(), nestbox.Selector{ID: p.ID})
		require.NoError(t, err)
	}
	require.Equal(t, args, last.Args)
	require.False(t, last.ArgsCut)
	total, whole := 0, 0
	for id := nestbox.ProcessID(1); id <= last.ID; id++ {
		p, err := e.Processes().Get(t.Context(), nestbox.Selector{ID: id})
		require.NoError(t, err)
		total += argBytes(p.Args)
		if !p.ArgsCut {
			whole++
			continue
		}
		require.Zero(t, whole, "the oldest are cut first")
		require.LessOrEqual(t, argBytes(p.Args), nestbox.MaxListedArgs+16)
	}
	require.LessOrEqual(t, total, maxArgBytes)
	require.Greater(t, whole, 10)
}
