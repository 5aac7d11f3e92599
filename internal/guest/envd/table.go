package envd

import (
	"cmp"
	"context"
	"log/slog"
	"maps"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/internal/guest"
	"github.com/nestbox/nestbox/internal/guest/outputlog"
)

// table is the processes that were started by the API: the live ones, and the
// ended ones that are remembered.
type table struct {
	limits      Limits
	slog        *slog.Logger
	budget      *outputlog.Budget
	accounts    *accounts
	env         map[string]string // of all processes; never changed
	reaper      *reaper
	groups      *treeGroups
	looks       looks
	opaque      opaque
	devNull     int    // a descriptor of /dev/null
	marks       string // what all marks begin with
	group       group
	ctx         context.Context // ends with the table
	cancel      context.CancelFunc
	relief      sync.Mutex   // held while memory is relieved
	biggestKill sync.Mutex   // held while the biggest tree is killed
	victims     atomic.Int32 // of KillBiggest that are not gone yet
	lastMark    atomic.Uint64
	treeTurn    chan struct{} // holds a token while somebody looks at all processes

	mu       sync.Mutex
	lastID   nestbox.ProcessID
	live     map[nestbox.ProcessID]*process
	exited   []*process                     // oldest first
	byID     map[nestbox.ProcessID]*process // live and exited
	byPID    map[int]*process               // the newest of each number
	byTag    map[string]*process            // the newest of each name
	starting map[string]chan struct{}       // names of starts that are going on; closed when they are done
	requests map[string]*request            // by RequestKey, as long as their processes are remembered
	argBytes int                            // of arguments that are kept
	argsCut  int                            // of exited, the first so many have theirs cut
}

var _ guest.Processes = (*table)(nil)

func newTable(limits Limits, cgroups string, log *slog.Logger) (*table, error) {
	devNull, err := unix.Open(os.DevNull, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, os.NewSyscallError("open /dev/null", err)
	}
	groups, err := newTreeGroups(cgroups, limits.Pids)
	if err != nil {
		_ = unix.Close(devNull)
		return nil, err
	}
	reaper, err := acquireReaper()
	if err != nil {
		_ = unix.Close(devNull)
		return nil, err
	}
	t := &table{
		limits:   limits,
		slog:     log,
		accounts: newAccounts("/etc"),
		reaper:   reaper,
		groups:   groups,
		devNull:  devNull,
		marks:    nestbox.RandomHex(8),
		live:     map[nestbox.ProcessID]*process{},
		byID:     map[nestbox.ProcessID]*process{},
		byPID:    map[int]*process{},
		byTag:    map[string]*process{},
		starting: map[string]chan struct{}{},
		requests: map[string]*request{},
		treeTurn: make(chan struct{}, 1),
	}
	t.budget = outputlog.NewBudget(limits.Output, t.forgetOldestOutput)
	t.ctx, t.cancel = context.WithCancel(context.Background())
	return t, nil
}

func (t *table) close() {
	t.group.close()
	t.cancel()
	t.mu.Lock()
	all := slices.Concat(slices.Collect(maps.Values(t.live)), t.exited)
	t.mu.Unlock()
	for _, p := range all {
		p.shutDown()
	}
	t.group.wait()
	releaseReaper()
	_ = unix.Close(t.devNull)
}

// Start starts a process.
func (t *table) Start(ctx context.Context, spec nestbox.ProcessSpec, attach *guest.Attach) (nestbox.Process, guest.OutputReader, error) {
	if err := spec.Validate(); err != nil {
		return nestbox.Process{}, nil, err
	}
	if spec.Terminal != nil {
		spec.Terminal = new(spec.Terminal.WithDefaults())
	}
	if !t.group.enter() {
		return nestbox.Process{}, nil, errClosed()
	}
	defer t.group.leave()
	if spec.RequestKey != "" {
		return t.startOnce(ctx, spec, attach)
	}
	_, record, reader, err := t.startTagged(ctx, spec, attach)
	return record, reader, err
}

// startTagged starts a process, or finds the one that has its tag, if that is asked for.
func (t *table) startTagged(ctx context.Context, spec nestbox.ProcessSpec, attach *guest.Attach) (*process, nestbox.Process, guest.OutputReader, error) {
	tag, there, err := t.takeTag(ctx, spec)
	if err != nil {
		return nil, nestbox.Process{}, nil, err
	}
	if there != nil {
		record, reader, err := existing(there, attach)
		return there, record, reader, err
	}
	defer t.releaseTag(tag)

	p := &process{
		tag: tag, mark: t.newMark(), spec: spec, args: spec.Args,
		log:     outputlog.New(t.budget, streamsOf(spec)),
		started: make(chan struct{}),
		done:    make(chan struct{}),
	}
	p.spec.Env, p.spec.Args = nil, nil // not needed again, and may hold secrets; see keepArgs
	var reader guest.OutputReader
	if attach != nil {
		r, err := p.log.Attach(*attach)
		if err != nil {
			return nil, nestbox.Process{}, nil, err
		}
		reader = r
	}
	if err := t.exec(p, spec); err != nil {
		return nil, nestbox.Process{}, nil, err
	}
	return p, p.record(), reader, nil
}

// newMark returns a name for a tree that no other has on this machine.
func (t *table) newMark() string {
	return t.marks + "-" + strconv.FormatUint(t.lastMark.Add(1), 10)
}

// exec starts the program and makes p part of the table.
func (t *table) exec(p *process, spec nestbox.ProcessSpec) error {
	plan, err := t.accounts.plan(spec, t.env, p.mark)
	if err != nil {
		return err
	}
	streams, err := t.openStreams(spec, plan.user.credential())
	if err != nil {
		return err
	}
	defer streams.closeTheirs()
	p.user, p.out, p.stdin, p.terminal = plan.user.name, streams.out, newStdinPipe(streams.stdin), streams.terminal
	p.group = t.groups.create(p.mark)
	p.startedAt = time.Now()
	p.child, err = t.reaper.start(
		func() (int, error) { return plan.start(spec, streams.files, t.groups, p.group) },
		func(status unix.WaitStatus) {
			at := time.Now()
			t.group.run(func() { t.finish(p, status, at) })
		})
	if err != nil {
		streams.closeOurs()
		t.groups.discard(p.group)
		return err
	}
	p.pid, p.cwd = p.child.pid, plan.cwd
	if spec.Timeout > 0 {
		p.timer = time.AfterFunc(spec.Timeout, func() { t.group.run(func() { t.expire(p, nestbox.ReasonTimeout) }) })
	}
	if spec.IdleTimeout > 0 {
		p.idle = newIdleTimer(spec.IdleTimeout, func() { t.group.run(func() { t.expire(p, nestbox.ReasonIdle) }) })
	}
	t.add(p)
	close(p.started)
	for _, o := range p.out {
		t.group.run(func() { t.follow(p, o) })
	}
	if t.ctx.Err() != nil {
		p.shutDown() // close did not see it
	}
	t.slog.Debug("process started", "pid", p.pid, "tag", p.tag, "cmd", spec.Cmd)
	return nil
}

// streamsOf returns how many streams a process has.
func streamsOf(spec nestbox.ProcessSpec) int {
	if spec.Terminal != nil || spec.Merge {
		return 1
	}
	return 2
}

func (t *table) openStreams(spec nestbox.ProcessSpec, owner *syscall.Credential) (*stdio, error) {
	if spec.Terminal != nil {
		return openTerminal(*spec.Terminal, owner)
	}
	return openStdio(spec.Stdin, spec.Merge, t.devNull, owner)
}

// reserveTag makes sure that no live or starting process has the tag, or
// finds a new one.
func (t *table) reserveTag(tag string) (string, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	taken := func(tag string) bool {
		_, starting := t.starting[tag]
		p := t.byTag[tag]
		return starting || p != nil && !p.ended()
	}
	if tag != "" && taken(tag) {
		return "", nestbox.Errorf(nestbox.CodeConflict, "a live process already has the tag %s", tag)
	}
	for tag == "" || t.byTag[tag] != nil && taken(tag) {
		tag = nestbox.NewTag()
	}
	t.starting[tag] = make(chan struct{})
	return tag, nil
}

func (t *table) releaseTag(tag string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	close(t.starting[tag])
	delete(t.starting, tag)
}

func (t *table) add(p *process) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.lastID++
	p.id = t.lastID
	t.live[p.id] = p
	t.byID[p.id] = p
	t.byPID[p.pid] = p
	t.byTag[p.tag] = p
	t.keepArgs(p)
}

// follow reads one stream to its end.
func (t *table) follow(p *process, o output) {
	p.pump(o, t.relieveMemory)
	if p.log.CloseStream() && p.ended() {
		p.stdin.close() // nobody is left to read it, or at least to answer
	}
}

// finish records the leader's end.
func (t *table) finish(p *process, status unix.WaitStatus, at time.Time) {
	<-p.started
	p.stopTimers()
	p.recordExit(status, at)
	if output, _ := p.log.State(); output.Closed {
		p.stdin.close()
	}
	t.retire(p)
	close(p.done)
	t.groups.discard(p.group)
	t.slog.Debug("process ended", "pid", p.pid, "tag", p.tag, "status", uint32(status))
}

// expire is the end of a process's time, or of our patience with its silence.
func (t *table) expire(p *process, reason nestbox.ExitReason) {
	<-p.started
	if p.ended() {
		return
	}
	p.intend(reason)
	if err := t.killTree(t.ctx, p, guest.Kill{Signal: unix.SIGKILL}); err != nil {
		t.slog.Warn("process tree outlives its timeout", "pid", p.pid, "tag", p.tag, "error", err)
	}
}

// find returns the newest process that sel names.
func (t *table) find(sel nestbox.Selector) (*process, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	p := t.byPID[sel.PID]
	switch {
	case sel.ID != 0:
		p = t.byID[sel.ID]
	case sel.Tag != "":
		p = t.byTag[sel.Tag]
	}
	if p == nil {
		return nil, nestbox.Errorf(nestbox.CodeNotFound, "no process %s in the capsule", sel)
	}
	return p, nil
}

// List returns the processes in the order of their start.
func (t *table) List(_ context.Context, all bool) ([]nestbox.Process, error) {
	t.mu.Lock()
	processes := slices.Collect(maps.Values(t.live))
	if all {
		processes = append(processes, t.exited...)
	}
	t.mu.Unlock()
	slices.SortFunc(processes, func(a, b *process) int { return cmp.Compare(a.id, b.id) })
	records := make([]nestbox.Process, 0, len(processes))
	for _, p := range processes {
		if r := p.record(); all || r.Running() {
			var cut bool
			r.Args, cut = cutArgs(r.Args, min(nestbox.MaxListedArgs, maxListedArgs/len(processes)))
			r.ArgsCut = r.ArgsCut || cut
			records = append(records, r)
		}
	}
	return records, nil
}

// maxListedArgs bounds the arguments of all records of a list, in bytes.
const maxListedArgs = 8 << 20

// cutArgs returns the first arguments, as far as there is room for them.
func cutArgs(args []string, room int) (_ []string, cut bool) {
	for i, arg := range args {
		if room -= len(arg) + 1; room < 0 {
			kept := slices.Clone(args[:i])
			if left := room + len(arg); left > 0 {
				kept = append(kept, strings.Clone(strings.ToValidUTF8(arg[:left], ""))) // not the rest of it
			}
			return kept, true
		}
	}
	return args, false
}

// Get returns one record.
func (t *table) Get(_ context.Context, sel nestbox.Selector) (nestbox.Process, error) {
	p, err := t.find(sel)
	if err != nil {
		return nestbox.Process{}, err
	}
	return p.record(), nil
}

// Wait returns the record when the process has ended.
func (t *table) Wait(ctx context.Context, sel nestbox.Selector) (nestbox.Process, error) {
	p, err := t.find(sel)
	if err != nil {
		return nestbox.Process{}, err
	}
	select {
	case <-p.done:
		return p.record(), nil
	default:
	}
	select {
	case <-p.done:
		return p.record(), nil
	case <-ctx.Done():
		return nestbox.Process{}, guest.ContextError(ctx)
	case <-t.ctx.Done():
		return nestbox.Process{}, errClosed()
	}
}

// Locate implements guest.Processes.
func (t *table) Locate(_ context.Context, sel nestbox.Selector, since nestbox.Since, stream nestbox.Stream) (int64, error) {
	p, err := t.find(sel)
	if err != nil {
		return 0, err
	}
	return p.log.Locate(since, stream)
}

// Attach returns a reader of a process's output.
func (t *table) Attach(_ context.Context, sel nestbox.Selector, attach guest.Attach) (guest.OutputReader, error) {
	p, err := t.find(sel)
	if err != nil {
		return nil, err
	}
	return p.log.Attach(attach)
}

// WriteStdin writes to a process's standard input.
func (t *table) WriteStdin(ctx context.Context, sel nestbox.Selector, data []byte, eof bool) error {
	if len(data) > nestbox.MaxStdin {
		return nestbox.Errorf(nestbox.CodeTooLarge, "more than %d bytes for standard input at once", nestbox.MaxStdin)
	}
	p, err := t.find(sel)
	if err != nil {
		return err
	}
	switch {
	case p.stdin == nil:
		return errNoStdin()
	case p.terminal != nil && eof:
		return nestbox.Errorf(nestbox.CodeInvalidState, "the input of a terminal has no end: send Ctrl-D (byte 4), or a hang-up (SIGHUP)")
	}
	return p.stdin.write(ctx, data, eof)
}

// Signal sends a signal to the leader and its process group.
func (t *table) Signal(_ context.Context, sel nestbox.Selector, sig syscall.Signal) error {
	if sig <= 0 || sig > 64 {
		return nestbox.Errorf(nestbox.CodeInvalid, "%d is not a signal", int(sig))
	}
	p, err := t.find(sel)
	if err != nil {
		return err
	}
	switch err := t.reaper.signalGroup(p.child, sig); err {
	case nil:
		return nil
	case unix.ESRCH:
		return nestbox.Errorf(nestbox.CodeInvalidState, "process %s has ended", sel)
	default:
		return nestbox.Errorf(nestbox.CodeGuest, "send signal %d to process %s: %w", int(sig), sel, err)
	}
}

// Kill ends the whole tree. Once begun it goes on without its caller, so that
// no tree is left half killed.
func (t *table) Kill(ctx context.Context, sel nestbox.Selector, how guest.Kill) (nestbox.Process, error) {
	if how.Signal < 0 || how.Signal > 64 || how.Grace < 0 {
		return nestbox.Process{}, nestbox.Errorf(nestbox.CodeInvalid, "signal %d with a grace of %s is not valid", int(how.Signal), how.Grace)
	}
	p, err := t.find(sel)
	if err != nil {
		return nestbox.Process{}, err
	}
	if !p.ended() {
		p.intend(nestbox.ReasonKilled)
	}
	answer := make(chan error, 1)
	if !t.group.run(func() { answer <- t.killTree(t.ctx, p, how) }) {
		return nestbox.Process{}, errClosed()
	}
	select {
	case err := <-answer:
		return p.record(), err
	case <-ctx.Done():
		return nestbox.Process{}, guest.ContextError(ctx)
	}
}
