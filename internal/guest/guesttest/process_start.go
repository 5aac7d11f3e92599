package guesttest

import (
	"bytes"
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/internal/guest"
)

func testStartRecord(t *testing.T, g guest.Processes) {
	before := time.Now().Add(-time.Hour) // clocks may differ a little
	p, r := startAttached(t, g, nestbox.ProcessSpec{Cmd: "cat", Args: []string{"-u", "-"}, Cwd: "/tmp", Stdin: true, Tag: "cat.of:7"}, nil)
	require.Nil(t, r)
	require.Positive(t, p.PID)
	require.Equal(t, "cat.of:7", p.Tag)
	require.Equal(t, "cat", p.Cmd)
	require.Equal(t, []string{"-u", "-"}, p.Args)
	require.Equal(t, "/tmp", p.Cwd)
	require.Equal(t, "root", p.User)
	require.True(t, p.Stdin)
	require.True(t, p.Running())
	require.True(t, p.StartedAt.After(before))
	require.Equal(t, nestbox.OutputState{}, p.Output)

	untagged := start(t, g, shell("exit 0"))
	require.Regexp(t, `^proc-[0-9a-f]{8}$`, untagged.Tag)
	require.Equal(t, "true", output(t, g, "[ $$ -eq $(cut -d' ' -f6 /proc/self/stat) ] && echo true"), "the process leads its session")
}

func testStartErrors(t *testing.T, g guest.Processes) {
	dir := scratch(t, g)
	output(t, g, "cd "+dir+` && echo hello >data && printf '#!/no/such/interpreter\n' >script && printf 'no program' >garbage && chmod 755 script garbage`)
	details := map[string]nestbox.Detail{
		"no such program": nestbox.DetailNoProgram, "no such path": nestbox.DetailNoProgram, "path in a file": nestbox.DetailNoProgram,
		"no interpreter": nestbox.DetailNoProgram, "a directory": nestbox.DetailNotExecutable,
		"not executable": nestbox.DetailNotExecutable, "no format": nestbox.DetailNotExecutable,
	}
	for name, c := range map[string]struct {
		spec nestbox.ProcessSpec
		says string
	}{
		"no command":       {nestbox.ProcessSpec{}, "cmd"},
		"no such program":  {nestbox.ProcessSpec{Cmd: "no-such-program-here"}, "no-such-program-here: no such program"},
		"no such path":     {nestbox.ProcessSpec{Cmd: "/no/such/path"}, "/no/such/path: no such program"},
		"path in a file":   {nestbox.ProcessSpec{Cmd: dir + "/data/x"}, "no such program"},
		"a directory":      {nestbox.ProcessSpec{Cmd: "/tmp"}, "directory"},
		"not executable":   {nestbox.ProcessSpec{Cmd: dir + "/data"}, "permission denied"},
		"no interpreter":   {nestbox.ProcessSpec{Cmd: dir + "/script"}, "interpreter"},
		"no format":        {nestbox.ProcessSpec{Cmd: dir + "/garbage"}, "not a program"},
		"no such cwd":      {nestbox.ProcessSpec{Cmd: "true", Cwd: "/no/such/cwd"}, `cwd "/no/such/cwd" does not exist`},
		"cwd is a file":    {nestbox.ProcessSpec{Cmd: "true", Cwd: dir + "/data"}, "not a directory"},
		"relative cwd":     {nestbox.ProcessSpec{Cmd: "true", Cwd: "tmp"}, "absolute"},
		"no such user":     {nestbox.ProcessSpec{Cmd: "true", User: "no-such-user"}, "no-such-user"},
		"no such uid":      {nestbox.ProcessSpec{Cmd: "true", User: "4294967295"}, "4294967295"},
		"no such group":    {nestbox.ProcessSpec{Cmd: "true", User: "0:no-such-group"}, "no-such-group"},
		"numeric tag":      {nestbox.ProcessSpec{Cmd: "true", Tag: "8080"}, "8080"},
		"tag with a slash": {nestbox.ProcessSpec{Cmd: "true", Tag: "a/b"}, "tag"},
		"bad variable":     {nestbox.ProcessSpec{Cmd: "true", Env: map[string]string{"A=B": "c"}}, "A=B"},
		"NUL in args":      {nestbox.ProcessSpec{Cmd: "true", Args: []string{"a\x00b"}}, "NUL"},
		"negative timeout": {nestbox.ProcessSpec{Cmd: "true", Timeout: -1}, "timeout"},
	} {
		_, _, err := g.Start(waiting(t), c.spec, nil)
		e := requireError(t, nestbox.CodeInvalid, err)
		require.Contains(t, e.Message, c.says, name)
		require.Equal(t, details[name], e.Detail, name)
	}
	// A failed start leaves nothing behind: its tag is free.
	_, _, err := g.Start(waiting(t), nestbox.ProcessSpec{Cmd: "/no/such/path", Tag: "failed-start"}, nil)
	requireError(t, nestbox.CodeInvalid, err)
	_, err = g.Get(waiting(t), nestbox.Selector{Tag: "failed-start"})
	requireError(t, nestbox.CodeNotFound, err)
	_, _, err = g.Start(waiting(t), nestbox.ProcessSpec{Cmd: "true"}, &guest.Attach{Since: nestbox.Since{Offset: 1}})
	requireError(t, nestbox.CodeInvalid, err)
}

func testStartOutlivesContext(t *testing.T, g guest.Processes) {
	ctx, cancel := context.WithCancel(t.Context())
	spec := shell("read line; echo got $line")
	spec.Stdin = true
	p, r, err := g.Start(ctx, spec, &guest.Attach{})
	require.NoError(t, err)
	t.Cleanup(func() { killLeft(t, g, p) })
	cancel()
	require.NoError(t, r.Close())
	require.NoError(t, g.WriteStdin(waiting(t), exact(p), []byte("it\n"), false))
	tr := &transcript{}
	tr.readAll(t, attach(t, g, p, guest.Attach{}))
	require.Equal(t, "got it\n", string(tr.stdout))
	require.Equal(t, nestbox.ReasonExited, tr.exit.Reason)
}

func testEnvironment(t *testing.T, g guest.Processes) {
	spec := nestbox.ProcessSpec{Cmd: "env", Cwd: "/usr", Env: map[string]string{
		"LANG": "de_DE.UTF-8", "GREETING": "a = b\nc", "EMPTY": "", "NESTBOX_PROCESS": "forged",
	}}
	env := "\n" + string(run(t, g, spec).stdout)
	for _, line := range []string{
		"HOME=/root", "USER=root", "LOGNAME=root", "NESTBOX=true", "LANG=de_DE.UTF-8", "GREETING=a = b\nc", "EMPTY=", "PYTHONUNBUFFERED=1",
	} {
		require.Contains(t, env, "\n"+line+"\n")
	}
	require.Contains(t, env, "\nSHELL=/")
	require.Contains(t, env, "\nPATH=/")
	require.Contains(t, env, "\nNESTBOX_PROCESS=")
	require.NotContains(t, env, "forged")

	spec = nestbox.ProcessSpec{Cmd: "pwd", Cwd: "/usr"}
	require.Equal(t, "/usr\n", string(run(t, g, spec).stdout))
	spec.Cwd = ""
	require.Equal(t, "/root\n", string(run(t, g, spec).stdout), "the default is the user's home")
	require.Equal(t, "C.UTF-8", output(t, g, "echo $LANG"))
}

func testPathLookup(t *testing.T, g guest.Processes) {
	dir := scratch(t, g)
	output(t, g, "cd "+dir+` && mkdir bin && printf '#!/bin/sh\necho mine $0 $*' >bin/tool && chmod 755 bin/tool && echo data >nothing`)
	path := map[string]string{"PATH": dir + ":" + dir + "/bin:/usr/bin:/bin"}
	tr := run(t, g, nestbox.ProcessSpec{Cmd: "tool", Args: []string{"a b", "$HOME"}, Env: path})
	require.Equal(t, "mine "+dir+"/bin/tool a b $HOME\n", string(tr.stdout))
	for _, relative := range []nestbox.ProcessSpec{
		{Cmd: "./bin/tool", Cwd: dir},
		{Cmd: "bin/tool", Cwd: dir},
		{Cmd: "tool", Cwd: dir, Env: map[string]string{"PATH": "bin:/bin"}},
		{Cmd: "tool", Cwd: dir + "/bin", Env: map[string]string{"PATH": ":/bin"}},
	} {
		require.Contains(t, string(run(t, g, relative).stdout), "mine", "%+v", relative)
	}
	_, _, err := g.Start(waiting(t), nestbox.ProcessSpec{Cmd: "nothing", Env: path}, nil)
	require.Contains(t, requireError(t, nestbox.CodeInvalid, err).Message, "permission denied")
	_, _, err = g.Start(waiting(t), nestbox.ProcessSpec{Cmd: "sh", Env: map[string]string{"PATH": ""}, Cwd: dir}, nil)
	require.Contains(t, requireError(t, nestbox.CodeInvalid, err).Message, "no such program")
}

func testUser(t *testing.T, g guest.Processes) {
	entry := strings.Split(output(t, g, `grep '^[a-z]' /etc/passwd | grep -v ^root: | tail -n 1`), ":")
	require.Len(t, entry, 7, "the guest has a user beside root")
	name, uid, gid, home := entry[0], entry[2], entry[3], entry[5]
	for _, user := range []string{name, uid} {
		spec := shell(`echo $(id -u) $(id -g) $USER $LOGNAME $HOME; grep ^CapEff /proc/self/status`)
		spec.User, spec.Cwd = user, "/"
		p, r := startAttached(t, g, spec, &guest.Attach{})
		require.Equal(t, name, p.User)
		tr := &transcript{}
		tr.readAll(t, r)
		want := strings.Join([]string{uid, gid, name, name, home}, " ")
		require.Contains(t, string(tr.stdout), want+"\n")
		require.Regexp(t, `CapEff:\s+0+\n`, string(tr.stdout))
	}
	require.Equal(t, output(t, g, "id -G "+name), strings.TrimSpace(string(run(t, g, nestbox.ProcessSpec{Cmd: "id", Args: []string{"-G"}, User: name, Cwd: "/"}).stdout)))

	named := run(t, g, nestbox.ProcessSpec{
		Cmd: "sh", Args: []string{"-c", "echo out > /dev/stdout; echo err > /dev/stderr; cat /dev/stdin"}, User: name, Cwd: "/",
	})
	require.Equal(t, "out\n", string(named.stdout), "%s", named.stderr)
	require.Equal(t, "err\n", string(named.stderr))

	dir := scratch(t, g)
	output(t, g, "mkdir -m 700 "+dir+"/private")
	_, _, err := g.Start(waiting(t), nestbox.ProcessSpec{Cmd: "true", User: name, Cwd: dir + "/private"}, nil)
	require.Contains(t, requireError(t, nestbox.CodeInvalid, err).Message, "permission denied")
}

func testTags(t *testing.T, g guest.Processes) {
	const n = 100
	prefix := "t" + nestbox.RandomHex(4) + "."
	pids := map[string]int{}
	for i := range n {
		spec := nestbox.ProcessSpec{Cmd: "cat", Stdin: true, Tag: prefix + itoa(i)}
		pids[spec.Tag] = start(t, g, spec).PID
	}
	for tag, pid := range pids {
		p, err := g.Get(waiting(t), nestbox.Selector{Tag: tag})
		require.NoError(t, err)
		require.Equal(t, pid, p.PID)
		p, err = g.Get(waiting(t), nestbox.Selector{PID: pid})
		require.NoError(t, err)
		require.Equal(t, tag, p.Tag)
	}
	for tag := range pids {
		require.NoError(t, g.WriteStdin(waiting(t), nestbox.Selector{Tag: tag}, []byte(tag), true))
		p, err := g.Wait(waiting(t), nestbox.Selector{Tag: tag})
		require.NoError(t, err)
		require.Zero(t, p.Exit.Code)
		tr := &transcript{}
		tr.readAll(t, attach(t, g, p, guest.Attach{}))
		require.Equal(t, tag, string(tr.stdout))
	}
}

func testTagReuse(t *testing.T, g guest.Processes) {
	spec := nestbox.ProcessSpec{Cmd: "cat", Stdin: true, Tag: "again-" + nestbox.RandomHex(4)}
	sel := nestbox.Selector{Tag: spec.Tag}
	first := start(t, g, spec)
	_, _, err := g.Start(waiting(t), spec, nil)
	require.Contains(t, requireError(t, nestbox.CodeConflict, err).Message, spec.Tag)
	for range 20 { // the tag is free as soon as a reader, or Wait, tells of the exit
		r := attach(t, g, first, guest.Attach{})
		require.NoError(t, g.WriteStdin(waiting(t), sel, nil, true))
		tr := &transcript{}
		for ctx := waiting(t); tr.exit == nil; {
			tr.read(t, ctx, r)
		}
		second := start(t, g, spec)
		newest, err := g.Get(waiting(t), sel)
		require.NoError(t, err)
		require.Equal(t, second.PID, newest.PID)
		require.True(t, newest.Running())
		old, err := g.Get(waiting(t), exact(first))
		require.NoError(t, err)
		require.False(t, old.Running())
		first = second
	}
}

// testIDs: an id is of one process for ever, in whatever form it is asked for.
func testIDs(t *testing.T, g guest.Processes) {
	tag := "ids-" + nestbox.RandomHex(4)
	spec := nestbox.ProcessSpec{Cmd: "cat", Stdin: true, Tag: tag}
	var all []nestbox.Process
	for range 5 {
		p := start(t, g, spec)
		require.True(t, p.ID.Valid())
		require.NoError(t, g.WriteStdin(waiting(t), exact(p), []byte(p.ID.String()), true))
		ended, err := g.Wait(waiting(t), exact(p))
		require.NoError(t, err)
		require.Equal(t, p.ID, ended.ID)
		all = append(all, p)
	}
	list, err := g.List(waiting(t), true)
	require.NoError(t, err)
	for i, p := range all {
		require.True(t, i == 0 || p.ID > all[i-1].ID, "an id is never used again")
		got, err := g.Get(waiting(t), exact(p))
		require.NoError(t, err)
		require.Equal(t, p.PID, got.PID)
		require.Equal(t, p.StartedAt.UnixNano(), got.StartedAt.UnixNano())
		tr := &transcript{}
		tr.readAll(t, attach(t, g, p, guest.Attach{}))
		require.Equal(t, p.ID.String(), string(tr.stdout))
		require.True(t, slices.ContainsFunc(list, func(l nestbox.Process) bool { return l.ID == p.ID }))
		killed, err := g.Kill(waiting(t), exact(p), guest.Kill{}) // the old one, not the newest of the tag
		require.NoError(t, err)
		require.Equal(t, p.ID, killed.ID)
		requireError(t, nestbox.CodeInvalidState, g.Signal(waiting(t), exact(p), 15))
	}
	last := all[len(all)-1]
	for name, sel := range map[string]nestbox.Selector{"a PID is no id": {ID: nestbox.ProcessID(1<<40 + uint64(last.PID))}, "none": {}} {
		t.Log(name)
		_, err := g.Get(waiting(t), sel)
		requireError(t, nestbox.CodeNotFound, err)
	}
}

// testListArgs: a list of processes with as many arguments as can be is short.
func testListArgs(t *testing.T, g guest.Processes) {
	long := slices.Repeat([]string{strings.Repeat("ä", 50_000)}, 9)
	p := start(t, g, nestbox.ProcessSpec{Cmd: "sh", Args: append([]string{"-c", "exec sleep 1000", "sh"}, long...)})
	list, err := g.List(waiting(t), true)
	require.NoError(t, err)
	i := slices.IndexFunc(list, func(l nestbox.Process) bool { return l.ID == p.ID })
	require.GreaterOrEqual(t, i, 0)
	require.True(t, list[i].ArgsCut)
	require.Equal(t, "-c", list[i].Args[0])
	size := len(strings.Join(list[i].Args, " "))
	require.LessOrEqual(t, size, nestbox.MaxListedArgs)
	require.Greater(t, size, nestbox.MaxListedArgs/2)
	whole, err := g.Get(waiting(t), exact(p))
	require.NoError(t, err)
	require.Equal(t, p.Args, whole.Args)
	require.False(t, whole.ArgsCut)
}

func testTagRace(t *testing.T, g guest.Processes) {
	spec := nestbox.ProcessSpec{Cmd: "cat", Stdin: true, Tag: "race-" + nestbox.RandomHex(4)}
	t.Cleanup(func() { killLeft(t, g, nestbox.Process{Tag: spec.Tag}) })
	var wg sync.WaitGroup
	errs := make([]error, 8)
	for i := range errs {
		wg.Go(func() { _, _, errs[i] = g.Start(waiting(t), spec, nil) })
	}
	wg.Wait()
	won := 0
	for _, err := range errs {
		if err == nil {
			won++
			continue
		}
		requireError(t, nestbox.CodeConflict, err)
	}
	require.Equal(t, 1, won)
}

func testUnknown(t *testing.T, g guest.Processes) {
	for _, sel := range []nestbox.Selector{{Tag: "no-such-tag"}, {PID: 1 << 30}, {ID: 1 << 50}} {
		_, err := g.Get(waiting(t), sel)
		require.Contains(t, requireError(t, nestbox.CodeNotFound, err).Message, sel.String())
		_, err = g.Wait(waiting(t), sel)
		requireError(t, nestbox.CodeNotFound, err)
		_, err = g.Attach(waiting(t), sel, guest.Attach{})
		requireError(t, nestbox.CodeNotFound, err)
		_, err = g.Kill(waiting(t), sel, guest.Kill{})
		requireError(t, nestbox.CodeNotFound, err)
		requireError(t, nestbox.CodeNotFound, g.Signal(waiting(t), sel, 15))
		requireError(t, nestbox.CodeNotFound, g.WriteStdin(waiting(t), sel, []byte("x"), false))
	}
	// A process that is not ours is none of the API's.
	_, err := g.Kill(waiting(t), nestbox.Selector{PID: 1}, guest.Kill{})
	requireError(t, nestbox.CodeNotFound, err)
}

func testListOrder(t *testing.T, g guest.Processes) {
	var mine []string
	for i := range 6 {
		spec := nestbox.ProcessSpec{Cmd: "cat", Stdin: i%2 == 0}
		p := start(t, g, spec)
		mine = append(mine, p.Tag)
		if !spec.Stdin {
			_, err := g.Wait(waiting(t), exact(p))
			require.NoError(t, err)
		}
	}
	list := func(all bool) (tags []string) {
		records, err := g.List(waiting(t), all)
		require.NoError(t, err)
		for _, p := range records {
			require.True(t, all || p.Running())
			for _, tag := range mine {
				if p.Tag == tag {
					tags = append(tags, tag)
				}
			}
		}
		return tags
	}
	require.Equal(t, mine, list(true))
	require.Equal(t, []string{mine[0], mine[2], mine[4]}, list(false))
}

func testWait(t *testing.T, g guest.Processes) {
	p := start(t, g, nestbox.ProcessSpec{Cmd: "cat", Stdin: true})
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	_, err := g.Wait(ctx, exact(p))
	requireError(t, nestbox.CodeTimeout, err)
	ctx, cancel = context.WithCancel(t.Context())
	time.AfterFunc(50*time.Millisecond, cancel)
	_, err = g.Wait(ctx, exact(p))
	requireError(t, nestbox.CodeCanceled, err)

	var wg sync.WaitGroup
	for range 10 {
		wg.Go(func() {
			p, err := g.Wait(waiting(t), exact(p))
			if err != nil || p.Exit == nil || p.Exit.Code != 0 {
				t.Errorf("wait: %v %+v", err, p.Exit)
			}
		})
	}
	require.NoError(t, g.WriteStdin(waiting(t), exact(p), nil, true))
	wg.Wait()
}

func testExitRecord(t *testing.T, g guest.Processes) {
	for script, want := range map[string]nestbox.Exit{
		"exit 0":                 {Code: 0, Reason: nestbox.ReasonExited},
		"echo out; exit 7":       {Code: 7, Reason: nestbox.ReasonExited},
		"exit 255":               {Code: 255, Reason: nestbox.ReasonExited},
		"kill -KILL $$":          {Code: 137, Signal: "SIGKILL", Reason: nestbox.ReasonSignalled},
		"kill -USR1 $$; exit 1":  {Code: 138, Signal: "SIGUSR1", Reason: nestbox.ReasonSignalled},
		"exec 1>&- 2>&-; exit 5": {Code: 5, Reason: nestbox.ReasonExited},
	} {
		p := start(t, g, shell(script))
		waited, err := g.Wait(waiting(t), exact(p))
		require.NoError(t, err)
		require.NotNil(t, waited.Exit)
		require.False(t, waited.Exit.At.IsZero())
		require.False(t, waited.Exit.At.Before(p.StartedAt))
		at := waited.Exit.At
		exit := *waited.Exit
		exit.At = time.Time{}
		require.Equal(t, want, exit, script)
		for range 2 { // and later, too
			again, err := g.Get(waiting(t), nestbox.Selector{Tag: p.Tag})
			require.NoError(t, err)
			require.True(t, again.Exit.At.Equal(at))
			tr := &transcript{}
			tr.readAll(t, attach(t, g, p, guest.Attach{}))
			require.Equal(t, want.Code, tr.exit.Code)
			require.Equal(t, strings.Contains(script, "echo"), len(tr.stdout) > 0)
		}
	}
}

// testExitWhileOutputIsHeld is the classic `sleep 8 & exit 3`, with a
// background process that waits for the test instead of the clock.
func testExitWhileOutputIsHeld(t *testing.T, g guest.Processes) {
	dir := scratch(t, g)
	output(t, g, "mkfifo "+dir+"/gate")
	p, r := startAttached(t, g, shell("echo first; { read x <"+dir+"/gate; echo last; } & exit 3"), &guest.Attach{})
	ended, err := g.Wait(waiting(t), exact(p))
	require.NoError(t, err)
	require.Equal(t, 3, ended.Exit.Code)
	require.False(t, ended.Output.Closed)
	require.EqualValues(t, len("first\n"), ended.Output.End)
	tr := &transcript{}
	for ctx := waiting(t); tr.exit == nil; {
		tr.read(t, ctx, r)
	}
	require.Equal(t, "first\n", string(tr.stdout))

	output(t, g, "echo go >"+dir+"/gate")
	tr.readAll(t, r)
	require.Equal(t, "first\nlast\n", string(tr.stdout))
	again, err := g.Get(waiting(t), exact(p))
	require.NoError(t, err)
	require.True(t, again.Output.Closed)
	require.Equal(t, nestbox.OutputState{End: 11, Stdout: 11, Closed: true}, again.Output)
}

// testExitWhileOthersWrite has a background process that never stops to write:
// it must not delay the exit, nor what the leader wrote before.
func testExitWhileOthersWrite(t *testing.T, g guest.Processes) {
	for range 5 {
		p := start(t, g, shell("yes >&2 & echo last words; exit 4"))
		ended, err := g.Wait(waiting(t), exact(p))
		require.NoError(t, err)
		require.Equal(t, 4, ended.Exit.Code)
		require.EqualValues(t, len("last words\n"), ended.Output.Stdout)
		_, err = g.Kill(waiting(t), exact(p), guest.Kill{})
		require.NoError(t, err)
	}
}

func testNoZombies(t *testing.T, g guest.Processes) {
	// The parent of what we start reaps all orphans that we make.
	daemon := output(t, g, "echo $PPID")
	pids := strings.Fields(output(t, g, `for i in $(seq 200); do (true & echo $!); done`))
	require.Len(t, pids, 200)
	eventually(t, func() bool {
		for stat := range strings.Lines(existing(t, g, pids)) {
			fields := strings.Fields(stat[strings.LastIndex(stat, ")")+1:])
			if len(fields) > 2 && fields[0] == "Z" && fields[1] == daemon {
				return false
			}
		}
		return true
	}, "all orphans are reaped")
}

func testManyProcesses(t *testing.T, g guest.Processes) {
	const n = 200
	processes := make([]nestbox.Process, n)
	for i := range processes {
		spec := shell("echo begun; read x; echo ended $x")
		spec.Stdin = true
		processes[i] = start(t, g, spec)
	}
	for i, p := range processes {
		require.NoError(t, g.WriteStdin(waiting(t), exact(p), fmt.Appendf(nil, "%d\n", i), false))
	}
	for i, p := range processes {
		ended, err := g.Wait(waiting(t), nestbox.Selector{Tag: p.Tag})
		require.NoError(t, err)
		require.Zero(t, ended.Exit.Code)
		tr := &transcript{}
		r, err := g.Attach(waiting(t), nestbox.Selector{Tag: p.Tag}, guest.Attach{})
		require.NoError(t, err)
		tr.readAll(t, r)
		require.NoError(t, r.Close())
		require.Equal(t, fmt.Sprintf("begun\nended %d\n", i), string(tr.stdout))
	}
}

func testConcurrentProcesses(t *testing.T, g guest.Processes) {
	var wg sync.WaitGroup
	for worker := range 8 {
		wg.Go(func() {
			for round := range 10 {
				if err := lifecycle(waiting(t), g, worker, round); err != nil {
					t.Errorf("worker %d, round %d: %v", worker, round, err)
					return
				}
			}
		})
	}
	wg.Wait()
}

// lifecycle does everything once with one process.
func lifecycle(ctx context.Context, g guest.Processes, worker, round int) error {
	spec := shell("cat; sleep 1000 & echo done; exit " + itoa(round))
	spec.Stdin, spec.Tag = true, fmt.Sprintf("life-%d-%d-%s", worker, round, nestbox.RandomHex(3))
	sel := nestbox.Selector{Tag: spec.Tag}
	_, r, err := g.Start(ctx, spec, &guest.Attach{Lossless: round%2 == 0})
	if err != nil {
		return err
	}
	defer func() { _ = r.Close() }()
	if _, err := g.List(ctx, round%2 == 0); err != nil {
		return err
	}
	if err := g.WriteStdin(ctx, sel, bytes.Repeat([]byte("x"), 1000), true); err != nil {
		return err
	}
	ended, err := g.Wait(ctx, sel)
	if err != nil {
		return err
	}
	if ended.Exit.Code != round || ended.Output.Stdout != 1005 {
		return fmt.Errorf("exit %+v, output %+v", ended.Exit, ended.Output)
	}
	killed, err := g.Kill(ctx, sel, guest.Kill{})
	if err != nil {
		return err
	}
	if *killed.Exit != *ended.Exit {
		return fmt.Errorf("kill changed the record: %+v, was %+v", killed.Exit, ended.Exit)
	}
	for {
		e, err := r.Next(ctx)
		if err != nil {
			return err
		}
		if e.Kind == nestbox.EventClosed {
			return nil
		}
	}
}
