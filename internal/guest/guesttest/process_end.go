package guesttest

import (
	"context"
	"crypto/sha256"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/internal/guest"
)

func testStdin(t *testing.T, g guest.Processes) {
	data := make([]byte, 3<<20)
	_, _ = rand.NewChaCha8([32]byte{1}).Read(data)
	p, r := startAttached(t, g, nestbox.ProcessSpec{Cmd: "cat", Stdin: true}, &guest.Attach{Lossless: true})
	writes := make(chan error, 1)
	go func() {
		for i := 0; i < len(data); i += 1 << 20 {
			if err := g.WriteStdin(waiting(t), exact(p), data[i:i+1<<20], false); err != nil {
				writes <- err
				return
			}
		}
		writes <- g.WriteStdin(waiting(t), exact(p), nil, true)
	}()
	tr := &transcript{}
	tr.readAll(t, r)
	require.NoError(t, <-writes)
	require.Equal(t, sha256.Sum256(data), sha256.Sum256(tr.stdout))
	require.Zero(t, tr.exit.Code)
	ended, err := g.Get(waiting(t), exact(p))
	require.NoError(t, err)
	require.False(t, ended.Stdin)
}

func testStdinFull(t *testing.T, g guest.Processes) {
	spec := shell("echo up; trap 'cat >/dev/null; exit 0' USR1; while :; do sleep 1000 & wait; done")
	spec.Stdin = true
	p, r := startAttached(t, g, spec, &guest.Attach{})
	(&transcript{}).readUntil(t, r, "up")
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	err := g.WriteStdin(ctx, exact(p), make([]byte, nestbox.MaxStdin), false)
	requireError(t, nestbox.CodeTimeout, err)
	again, err := g.Get(waiting(t), exact(p))
	require.NoError(t, err)
	require.True(t, again.Running())
	require.True(t, again.Stdin)
}

func testStdinNotOpen(t *testing.T, g guest.Processes) {
	p := start(t, g, shell("cat; exec sleep 1000"))
	err := g.WriteStdin(waiting(t), exact(p), []byte("x"), false)
	requireError(t, nestbox.CodeInvalidState, err)

	p = start(t, g, nestbox.ProcessSpec{Cmd: "cat", Stdin: true})
	require.NoError(t, g.WriteStdin(waiting(t), exact(p), []byte("x"), true))
	err = g.WriteStdin(waiting(t), exact(p), []byte("y"), false)
	requireError(t, nestbox.CodeInvalidState, err)
	_, err = g.Wait(waiting(t), exact(p))
	require.NoError(t, err)

	p = start(t, g, nestbox.ProcessSpec{Cmd: "true", Stdin: true})
	_, err = g.Wait(waiting(t), exact(p))
	require.NoError(t, err)
	err = g.WriteStdin(waiting(t), exact(p), []byte("x"), false)
	requireError(t, nestbox.CodeInvalidState, err)

	err = g.WriteStdin(waiting(t), exact(p), make([]byte, nestbox.MaxStdin+1), false)
	requireError(t, nestbox.CodeTooLarge, err)
}

func testSignals(t *testing.T, g guest.Processes) {
	// python reports each signal that it gets, and so does its child, which is
	// in the same process group.
	p, r := startAttached(t, g, python(`
import os, signal
names = ["HUP", "INT", "QUIT", "USR1", "USR2", "PIPE", "ALRM", "TERM", "CONT", "WINCH", "URG"]
who = "child" if os.fork() == 0 else "leader"
for name in names:
    signal.signal(getattr(signal, "SIG" + name), lambda n, frame: os.write(1, f"<{who} {n}>".encode()))
# pause() would sleep on if a signal came just before it.
woken, wake = os.pipe()
os.set_blocking(wake, False)
signal.set_wakeup_fd(wake)
os.write(1, f"<{who} up>".encode())
while True:
    os.read(woken, 1)
`), &guest.Attach{})
	tr := &transcript{}
	tr.readUntil(t, r, "<leader up>")
	tr.readUntil(t, r, "<child up>")
	for _, name := range []string{"SIGHUP", "int", "Quit", "USR1", "SIGUSR2", "PIPE", "ALRM", "TERM", "CONT", "WINCH", "URG"} {
		sig, err := nestbox.ParseSignal(name)
		require.NoError(t, err)
		require.NoError(t, g.Signal(waiting(t), exact(p), sig))
		tr.readUntil(t, r, fmt.Sprintf("<leader %d>", sig))
		tr.readUntil(t, r, fmt.Sprintf("<child %d>", sig))
	}
	for _, sig := range []syscall.Signal{0, -1, 65} {
		requireError(t, nestbox.CodeInvalid, g.Signal(waiting(t), exact(p), sig))
	}
	require.NoError(t, g.Signal(waiting(t), exact(p), syscall.SIGKILL))
	tr.readAll(t, r)
	require.Equal(t, 137, tr.exit.Code)
	require.Equal(t, "SIGKILL", tr.exit.Signal)
	require.Equal(t, nestbox.ReasonSignalled, tr.exit.Reason)
}

func testSignalEnded(t *testing.T, g guest.Processes) {
	p := start(t, g, nestbox.ProcessSpec{Cmd: "true"})
	_, err := g.Wait(waiting(t), exact(p))
	require.NoError(t, err)
	requireError(t, nestbox.CodeInvalidState, g.Signal(waiting(t), exact(p), syscall.SIGTERM))
}

// trees are scripts that make a tree, write the PIDs of its members to
// $PIDS, say "up" and stay.
var trees = map[string]string{
	"plain children": `for i in 1 2 3; do sleep 1000 & echo $! >>$PIDS; done; echo $$ >>$PIDS; echo up; wait`,
	"grandchildren": `sh -c 'sh -c "sleep 1000 & echo \$! >>$PIDS; echo \$\$ >>$PIDS; wait" & echo $! >>$PIDS; wait' & echo $! >>$PIDS
		while [ $(wc -l <$PIDS) -lt 4 ]; do sleep 0.01; done; echo up; wait`,
	"setsid child":           `setsid sh -c 'echo $$ >>$PIDS; echo up; exec sleep 1000' & wait`,
	"double fork":            `(sleep 1000 & echo $! >>$PIDS) & wait; echo up; sleep 1000`,
	"daemon":                 `(setsid sh -c 'echo $$ >>$PIDS; (sleep 1000 & echo $! >>$PIDS); echo up; exec sleep 1000' &) ; exec sleep 1000`,
	"daemon, no parent":      `(setsid sh -c 'echo $$ >>$PIDS; echo up; exec sleep 1000' &) ; exit 0`,
	"cleared env":            `env -i sleep 1000 & echo $! >>$PIDS; echo up; wait`,
	"cleared env, setsid":    `setsid env -i PIDS=$PIDS /bin/sh -c 'echo $$ >>$PIDS; echo up; exec sleep 1000' & wait`,
	"cleared env, no parent": `(env -i sleep 1000 & echo $! >>$PIDS) & wait; echo up; exit 0`,
	"closed output":          `(setsid sleep 1000 >/dev/null 2>&1 & echo $! >>$PIDS); echo up; exit 0`,
	// Nothing of the group may exit meanwhile: gVisor then has a stopped group hang up.
	"stopped":         `sh -c 'echo $$ >>$PIDS; kill -STOP $$' & while read pid name state rest </proc/$!/stat && [ $state != T ]; do :; done; echo up; wait`,
	"ignores signals": `trap '' TERM INT HUP; sleep 1000 & echo $! >>$PIDS; setsid sleep 1000 & sleep 1000 & echo $! >>$PIDS; echo up; wait`,
	"other user": `python3 -c 'import os
os.setgid(65534); os.setuid(65534); os.setsid()
os.write(1, b"up\n"); os.execvp("sleep", ["sleep", "1000"])' & echo $! >>$PIDS; wait`,
}

func testKillTree(t *testing.T, g guest.Processes) {
	for name, script := range trees {
		for how, kill := range map[string]guest.Kill{
			"KILL": {},
			"TERM": {Signal: syscall.SIGTERM, Grace: 200 * time.Millisecond},
		} {
			t.Run(name+" "+how, func(t *testing.T) {
				dir := scratch(t, g)
				spec := shell(script)
				spec.Env = map[string]string{"PIDS": dir + "/pids"}
				p, r := startAttached(t, g, spec, &guest.Attach{})
				(&transcript{}).readUntil(t, r, "up")
				pids := strings.Fields(output(t, g, "cat "+dir+"/pids"))
				require.NotEmpty(t, pids)
				require.Len(t, strings.Split(existing(t, g, pids), "\n"), len(pids), "all live before the kill")

				killed, err := g.Kill(waiting(t), exact(p), kill)
				require.NoError(t, err)
				require.Empty(t, existing(t, g, pids))
				require.NotNil(t, killed.Exit)
				if !strings.HasSuffix(name, "no parent") && name != "closed output" {
					require.Equal(t, nestbox.ReasonKilled, killed.Exit.Reason)
				}
			})
		}
	}
}

// testKillForkBomb kills a tree that fills all room it has with processes that
// go on forking.
func testKillForkBomb(t *testing.T, g guest.Processes) {
	uid := itoa(1_000_000_000 + rand.IntN(1_000_000_000)) // whose limit nobody else uses up
	p, r := startAttached(t, g, python(`
import os, resource, time
end = time.time() + 600  # should the test die before it kills
resource.setrlimit(resource.RLIMIT_NPROC, (64, 64))
os.setgid(`+uid+`); os.setuid(`+uid+`)
full = False
while time.time() < end:
    try:
        if os.fork() == 0 and not full:
            os.setsid()
    except OSError:
        if not full:
            os.write(1, b"full\n")
        full = True
`), &guest.Attach{})
	(&transcript{}).readUntil(t, r, "full")
	killed, err := g.Kill(waiting(t), exact(p), guest.Kill{})
	require.NoError(t, err)
	require.Equal(t, nestbox.ReasonKilled, killed.Exit.Reason)
	require.Equal(t, "0", output(t, g, "grep -l '^Uid:.*"+uid+"' /proc/[0-9]*/status 2>/dev/null | wc -l"))
}

// testKillHoppingTree kills a tree that is one process which goes on as its
// own child, in a new session, all the time.
func testKillHoppingTree(t *testing.T, g guest.Processes) {
	uid := itoa(1_000_000_000 + rand.IntN(1_000_000_000))
	p, r := startAttached(t, g, python(`
import os, time
os.setgid(`+uid+`); os.setuid(`+uid+`)
os.write(1, b"up\n")
end = time.time() + 600  # should the test die before it kills
while time.time() < end:
    if os.fork():
        os._exit(0)
    os.setsid()
    time.sleep(0.002)
`), &guest.Attach{})
	(&transcript{}).readUntil(t, r, "up")
	_, err := g.Wait(waiting(t), exact(p))
	require.NoError(t, err)
	_, err = g.Kill(waiting(t), exact(p), guest.Kill{})
	require.NoError(t, err)
	require.Equal(t, "0", output(t, g, "grep -l '^Uid:.*"+uid+"' /proc/[0-9]*/status 2>/dev/null | wc -l"))
	tr := &transcript{}
	tr.readAll(t, r) // the output is closed: really none is left
}

func testKillGrace(t *testing.T, g guest.Processes) {
	p, r := startAttached(t, g, shell("trap 'echo no' TERM; echo up; while :; do sleep 0.01; done"), &guest.Attach{})
	tr := &transcript{}
	tr.readUntil(t, r, "up")
	began := time.Now()
	const grace = 300 * time.Millisecond
	killed, err := g.Kill(waiting(t), exact(p), guest.Kill{Signal: syscall.SIGTERM, Grace: grace})
	require.NoError(t, err)
	require.GreaterOrEqual(t, time.Since(began), grace)
	require.Equal(t, nestbox.ReasonKilled, killed.Exit.Reason)
	require.Equal(t, "SIGKILL", killed.Exit.Signal)
	tr.readAll(t, r)
	require.Contains(t, string(tr.stdout), "no\n")

	// Who heeds the signal does not wait for the end of the grace.
	p, r = startAttached(t, g, shell("trap 'exit 12' HUP; echo up; while :; do sleep 0.01; done"), &guest.Attach{})
	(&transcript{}).readUntil(t, r, "up")
	killed, err = g.Kill(waiting(t), exact(p), guest.Kill{Signal: syscall.SIGHUP, Grace: 10 * patience})
	require.NoError(t, err)
	require.Equal(t, 12, killed.Exit.Code)
	require.Equal(t, nestbox.ReasonKilled, killed.Exit.Reason)
}

func testKillLastWords(t *testing.T, g guest.Processes) {
	for range 20 {
		p, r := startAttached(t, g, shell("trap 'echo last words; exit 0' TERM; echo up; while :; do sleep 0.01; done"), &guest.Attach{})
		tr := &transcript{}
		tr.readUntil(t, r, "up")
		killed, err := g.Kill(waiting(t), exact(p), guest.Kill{Signal: syscall.SIGTERM, Grace: patience})
		require.NoError(t, err)
		require.Equal(t, nestbox.ReasonKilled, killed.Exit.Reason)
		require.Zero(t, killed.Exit.Code)
		tr.readAll(t, r)
		require.Equal(t, "up\nlast words\n", string(tr.stdout))
	}
}

func testKillEnded(t *testing.T, g guest.Processes) {
	p := start(t, g, shell("exit 6"))
	ended, err := g.Wait(waiting(t), exact(p))
	require.NoError(t, err)
	for range 2 {
		killed, err := g.Kill(waiting(t), exact(p), guest.Kill{Signal: syscall.SIGTERM})
		require.NoError(t, err)
		require.Equal(t, ended.Exit.Code, killed.Exit.Code)
		require.Equal(t, nestbox.ReasonExited, killed.Exit.Reason)
	}
}

func testKillConcurrently(t *testing.T, g guest.Processes) {
	p := start(t, g, shell("for i in 1 2 3 4 5; do setsid sleep 1000 & done; wait"))
	var wg sync.WaitGroup
	for i := range 10 {
		wg.Go(func() {
			how := guest.Kill{}
			if i%2 == 0 {
				how = guest.Kill{Signal: syscall.SIGTERM, Grace: time.Minute}
			}
			killed, err := g.Kill(waiting(t), exact(p), how)
			if err != nil || killed.Exit == nil || killed.Exit.Reason != nestbox.ReasonKilled {
				t.Errorf("kill: %v %+v", err, killed.Exit)
			}
		})
	}
	wg.Wait()
}

// testKillManyAtOnce kills many trees at the same time: every kill answers when
// all of its own tree is gone, and none gives up because of the others.
func testKillManyAtOnce(t *testing.T, g guest.Processes) {
	dir := scratch(t, g)
	var begun []nestbox.Process
	for i := range 100 {
		spec := shell(`setsid sleep 1000 & echo $! >>$PIDS; sleep 1000 & echo $! $$ >>$PIDS; echo up; wait`)
		spec.Env = map[string]string{"PIDS": dir + "/" + itoa(i)}
		p, r := startAttached(t, g, spec, &guest.Attach{})
		(&transcript{}).readUntil(t, r, "up")
		begun = append(begun, p)
	}
	var wg sync.WaitGroup
	for _, p := range begun {
		wg.Go(func() {
			killed, err := g.Kill(t.Context(), exact(p), guest.Kill{})
			if err != nil || killed.Exit == nil || killed.Exit.Reason != nestbox.ReasonKilled {
				t.Errorf("kill: %v %+v", err, killed.Exit)
			}
		})
	}
	wg.Wait()
	pids := strings.Fields(output(t, g, "cat "+dir+"/*"))
	require.Len(t, pids, 3*len(begun))
	require.Empty(t, existing(t, g, pids))
}

func testKillSparesOthers(t *testing.T, g guest.Processes) {
	spec := shell("setsid cat & cat; wait")
	spec.Stdin = true
	bystander := start(t, g, spec)
	for range 5 {
		p := start(t, g, shell("(setsid sleep 1000 &); sleep 1000 & exit 0"))
		_, err := g.Kill(waiting(t), exact(p), guest.Kill{})
		require.NoError(t, err)
	}
	again, err := g.Get(waiting(t), exact(bystander))
	require.NoError(t, err)
	require.True(t, again.Running())
	require.NoError(t, g.WriteStdin(waiting(t), exact(bystander), nil, true))
	ended, err := g.Wait(waiting(t), exact(bystander))
	require.NoError(t, err)
	require.Equal(t, nestbox.ReasonExited, ended.Exit.Reason)
	require.Zero(t, ended.Exit.Code)
}

func testKillInvalid(t *testing.T, g guest.Processes) {
	p := start(t, g, nestbox.ProcessSpec{Cmd: "cat", Stdin: true})
	for _, how := range []guest.Kill{{Signal: -1}, {Signal: 65}, {Grace: -1}} {
		_, err := g.Kill(waiting(t), exact(p), how)
		requireError(t, nestbox.CodeInvalid, err)
	}
	again, err := g.Get(waiting(t), exact(p))
	require.NoError(t, err)
	require.True(t, again.Running())
}

func testTimeout(t *testing.T, g guest.Processes) {
	dir := scratch(t, g)
	spec := shell("echo before; setsid sleep 1000 & echo $! >" + dir + "/pids; sleep 1000 & echo $! >>" + dir + "/pids; echo up; wait")
	spec.Timeout = 1500 * time.Millisecond
	began := time.Now()
	p, r := startAttached(t, g, spec, &guest.Attach{})
	tr := &transcript{}
	tr.readAll(t, r)
	require.GreaterOrEqual(t, time.Since(began), spec.Timeout)
	require.Equal(t, "before\nup\n", string(tr.stdout))
	require.Equal(t, nestbox.ReasonTimeout, tr.exit.Reason)
	require.Equal(t, 137, tr.exit.Code)
	pids := strings.Fields(output(t, g, "cat "+dir+"/pids"))
	require.Len(t, pids, 2)
	eventually(t, func() bool { return existing(t, g, pids) == "" }, "the whole tree is dead")
	ended, err := g.Get(waiting(t), exact(p))
	require.NoError(t, err)
	require.Equal(t, nestbox.ReasonTimeout, ended.Exit.Reason)
}

// testIdleTimeout: output keeps a process alive, its silence does not.
func testIdleTimeout(t *testing.T, g guest.Processes) {
	spec := shell("for i in 1 2 3 4 5 6; do sleep 0.5; echo $i; done; setsid sleep 1000; echo never")
	spec.IdleTimeout = 2 * time.Second
	began := time.Now()
	p, r := startAttached(t, g, spec, &guest.Attach{})
	tr := &transcript{}
	tr.readAll(t, r)
	require.GreaterOrEqual(t, time.Since(began), 5*time.Second)
	require.Equal(t, "1\n2\n3\n4\n5\n6\n", string(tr.stdout))
	require.Equal(t, nestbox.ReasonIdle, tr.exit.Reason)
	ended, err := g.Get(waiting(t), exact(p))
	require.NoError(t, err)
	require.Equal(t, nestbox.ReasonIdle, ended.Exit.Reason)
}

// testMerge: what is written to two streams keeps its order if they are one.
func testMerge(t *testing.T, g guest.Processes) {
	spec := shell("i=0; while [ $i -lt 2000 ]; do echo $i; i=$((i+1)); echo $i >&2; i=$((i+1)); done; echo closed >&2")
	spec.Merge = true
	_, r := startAttached(t, g, spec, &guest.Attach{})
	tr := &transcript{}
	tr.readAll(t, r)
	var want strings.Builder
	for i := range 2000 {
		fmt.Fprintln(&want, i)
	}
	require.Equal(t, want.String()+"closed\n", string(tr.stdout))
	require.Empty(t, tr.stderr)
	spec.Terminal = &nestbox.Terminal{}
	_, _, err := g.Start(waiting(t), spec, nil)
	requireError(t, nestbox.CodeInvalid, err)
}

func testTimeoutNotUsed(t *testing.T, g guest.Processes) {
	spec := shell("exit 2")
	spec.Timeout = time.Hour
	tr := run(t, g, spec)
	require.Equal(t, 2, tr.exit.Code)
	require.Equal(t, nestbox.ReasonExited, tr.exit.Reason)
}

// testKillBiggest kills the tree that holds the most, here in a child of its
// leader, and no other.
func testKillBiggest(t *testing.T, g guest.Processes) {
	hold := func(mb string) string {
		return `python3 -c 'b = bytearray(` + mb + `<<20); print("up", flush=True); import time; time.sleep(1000)'; exit 0`
	}
	small, smallOut := startAttached(t, g, shell(hold("1")), &guest.Attach{})
	big, bigOut := startAttached(t, g, shell(hold("150")), &guest.Attach{})
	(&transcript{}).readUntil(t, smallOut, "up")
	(&transcript{}).readUntil(t, bigOut, "up")

	victim, err := g.KillBiggest(waiting(t), 0)
	require.NoError(t, err)
	require.Equal(t, big.ID, victim.Process.ID)
	require.GreaterOrEqual(t, victim.Memory, int64(150<<20))
	ended, err := g.Wait(waiting(t), exact(big))
	require.NoError(t, err)
	require.Equal(t, nestbox.ReasonOOM, ended.Exit.Reason)
	require.Equal(t, "SIGKILL", ended.Exit.Signal)
	left, err := g.Get(waiting(t), exact(small))
	require.NoError(t, err)
	require.True(t, left.Running())
}
