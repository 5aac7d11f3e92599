// Package sandboxtest is the suite that every driver passes. It is for tests
// only; it may import the root package, internal/sandbox, leaf packages and
// test libraries.
package sandboxtest

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sync/errgroup"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/internal/image"
	"github.com/nestbox/nestbox/internal/sandbox"
)

// Suite is a driver under test.
type Suite struct {
	// Dir returns a new directory for a Driver, which is removed after the test.
	Dir func(t *testing.T) string
	// Open makes a Driver over a directory; so does any later process.
	Open func(dir string) (sandbox.Driver, error)
	Root image.Root
	// Crash ends a sandbox from outside, behind the driver's back.
	Crash func(t *testing.T, dir, id string)
	// Traces looks, without the driver's help, for anything on the machine that
	// belongs to the sandboxes of a directory: processes, mounts, files, ….
	Traces func(t *testing.T, dir string) []string
}

// patience is how long anything may take on a busy machine.
const patience = 2 * time.Minute

// Run runs the suite.
func Run(t *testing.T, s Suite) {
	for name, test := range map[string]func(*testing.T, Suite){
		"Life":           testLife,
		"TakenUpAgain":   testTakenUpAgain,
		"OnlyOnce":       testOnlyOnce,
		"BadSpec":        testBadSpec,
		"Death":          testDeath,
		"Cancel":         testCancel,
		"DestroyInStart": testDestroyInStart,
		"Many":           testMany,
		"Killed":         testKilled,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			test(t, s)
		})
	}
}

// world is a directory with a Driver over it.
type world struct {
	sandbox.Driver
	s   Suite
	dir string
}

// newWorld checks, when the test ends, that nothing is left of it.
func newWorld(t *testing.T, s Suite) *world {
	t.Helper()
	w := &world{s: s, dir: s.Dir(t)}
	w.reopen(t)
	t.Cleanup(func() {
		ctx := context.Background()
		ids, err := w.List(ctx)
		require.NoError(t, err)
		for _, id := range ids {
			require.NoError(t, w.Destroy(ctx, id))
		}
		w.empty(t)
		require.NoError(t, w.Close())
	})
	return w
}

// reopen makes a Driver over the directory.
func (w *world) reopen(t *testing.T) {
	t.Helper()
	d, err := w.s.Open(w.dir)
	require.NoError(t, err)
	w.Driver = d
}

// empty checks that there is no trace of a sandbox.
func (w *world) empty(t *testing.T) {
	t.Helper()
	ids, err := w.List(context.Background())
	require.NoError(t, err)
	require.Empty(t, ids)
	// A network namespace and the like end a moment after their last user.
	require.Eventually(t, func() bool { return len(w.s.Traces(t, w.dir)) == 0 }, patience, 20*time.Millisecond,
		"traces: %v", lazy(func() any { return w.s.Traces(t, w.dir) }))
}

type lazy func() any

func (l lazy) String() string { return fmt.Sprint(l()) }

func (w *world) spec() sandbox.Spec {
	return sandbox.Spec{
		ID:        nestbox.NewID(nestbox.PrefixCapsule),
		Root:      w.s.Root,
		Resources: nestbox.Resources{VCPUs: 1, MemoryMB: 256, DiskMB: 64, PidsMax: 256},
		Env:       map[string]string{sandbox.EnvToken: "secret-of-the-test"},
	}
}

func (w *world) create(t *testing.T) sandbox.Sandbox {
	t.Helper()
	sb, err := w.Create(t.Context(), w.spec())
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, sb.Close()) })
	return sb
}

// Answers waits until envd answers HTTP, with whatever status.
func Answers(t *testing.T, sb sandbox.Sandbox) {
	t.Helper()
	require.NoError(t, answers(t.Context(), sb))
}

func answers(ctx context.Context, sb sandbox.Sandbox) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	transport := &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) { return sb.Dial(ctx, sandbox.EnvdPort) },
	}
	defer transport.CloseIdleConnections()
	for {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://envd/health", nil)
		if err != nil {
			return err
		}
		resp, err := transport.RoundTrip(req)
		if err == nil {
			return resp.Body.Close()
		}
		select {
		case <-time.After(5 * time.Millisecond):
		case <-sb.Done():
			return fmt.Errorf("the sandbox ended: %s", sb.Reason())
		case <-ctx.Done():
			return err
		}
	}
}

// Ended waits until the sandbox has ended and returns the reason.
func Ended(t *testing.T, sb sandbox.Sandbox) string {
	t.Helper()
	select {
	case <-sb.Done():
	case <-time.After(patience):
		require.Fail(t, "the end of the sandbox was not seen")
	}
	require.NotEmpty(t, sb.Reason())
	return sb.Reason()
}

func alive(t *testing.T, sb sandbox.Sandbox) {
	t.Helper()
	select {
	case <-sb.Done():
		require.Fail(t, "the sandbox ended", sb.Reason())
	default:
	}
	require.Empty(t, sb.Reason())
	Answers(t, sb)
}

func testLife(t *testing.T, s Suite) {
	w := newWorld(t, s)
	w.empty(t)
	sb := w.create(t)
	alive(t, sb)
	_, err := sb.Dial(t.Context(), 1) // nothing listens there
	require.Equal(t, nestbox.CodeUnavailable, nestbox.CodeOf(err))
	ids, err := w.List(t.Context())
	require.NoError(t, err)
	require.Equal(t, []string{sb.ID()}, ids)
	require.NotEmpty(t, s.Traces(t, w.dir), "Traces finds nothing of a running sandbox")

	require.NoError(t, w.Destroy(t.Context(), sb.ID()))
	require.Equal(t, "destroyed", Ended(t, sb))
	w.empty(t)
	require.NoError(t, w.Destroy(t.Context(), sb.ID()), "again")
	require.NoError(t, w.Destroy(t.Context(), nestbox.NewID(nestbox.PrefixCapsule)), "never was")
}

func testTakenUpAgain(t *testing.T, s Suite) {
	w := newWorld(t, s)
	first, err := w.Create(t.Context(), w.spec())
	require.NoError(t, err)
	Answers(t, first)
	require.NoError(t, first.Close())
	require.NoError(t, w.Close())

	w.reopen(t)
	again, err := w.Open(t.Context(), first.ID())
	require.NoError(t, err)
	defer again.Close()
	require.Equal(t, first.ID(), again.ID())
	alive(t, again)
	_, err = w.Open(t.Context(), nestbox.NewID(nestbox.PrefixCapsule))
	require.Equal(t, nestbox.CodeNotFound, nestbox.CodeOf(err))

	s.Crash(t, w.dir, first.ID())
	Ended(t, again)
	_, err = w.Open(t.Context(), first.ID())
	require.Equal(t, nestbox.CodeNotFound, nestbox.CodeOf(err), "dead")
}

func testOnlyOnce(t *testing.T, s Suite) {
	w := newWorld(t, s)
	sb := w.create(t)
	spec := w.spec()
	spec.ID = sb.ID()
	_, err := w.Create(t.Context(), spec)
	require.Equal(t, nestbox.CodeConflict, nestbox.CodeOf(err))
	alive(t, sb)
}

func testBadSpec(t *testing.T, s Suite) {
	w := newWorld(t, s)
	for _, id := range []string{"", "x", "../cl-0000000000000000000000000", "cl-000000000000000000000000/", "cl-000000000000000000000000A"} {
		spec := w.spec()
		spec.ID = id
		_, err := w.Create(t.Context(), spec)
		require.Equal(t, nestbox.CodeInvalid, nestbox.CodeOf(err), "%q", id)
		_, err = w.Open(t.Context(), id)
		require.Equal(t, nestbox.CodeInvalid, nestbox.CodeOf(err), "%q", id)
		require.Equal(t, nestbox.CodeInvalid, nestbox.CodeOf(w.Destroy(t.Context(), id)), "%q", id)
	}
	spec := w.spec()
	spec.Resources = nestbox.Resources{}
	_, err := w.Create(t.Context(), spec)
	require.Equal(t, nestbox.CodeInvalid, nestbox.CodeOf(err), "no limits")
	w.empty(t)
}

func testDeath(t *testing.T, s Suite) {
	w := newWorld(t, s)
	dies, lives := w.create(t), w.create(t)
	Answers(t, dies)
	s.Crash(t, w.dir, dies.ID())
	require.NotEqual(t, "destroyed", Ended(t, dies))
	alive(t, lives)
	ids, err := w.List(t.Context())
	require.NoError(t, err)
	require.Contains(t, ids, dies.ID(), "a dead sandbox stays until Destroy")
	require.NoError(t, w.Destroy(t.Context(), dies.ID()))
	alive(t, lives)
}

func testCancel(t *testing.T, s Suite) {
	w := newWorld(t, s)
	whole := w.timeCreate(t)
	const steps = 6
	for i := range steps {
		ctx, cancel := context.WithTimeout(t.Context(), whole*time.Duration(i)/steps)
		sb, err := w.Create(ctx, w.spec())
		cancel()
		if err == nil {
			require.NoError(t, w.Destroy(t.Context(), sb.ID()))
			require.NoError(t, sb.Close())
		}
		w.empty(t)
	}
}

// timeCreate returns how long a Create takes.
func (w *world) timeCreate(t *testing.T) time.Duration {
	t.Helper()
	begun := time.Now()
	sb := w.create(t)
	took := time.Since(begun)
	require.NoError(t, w.Destroy(t.Context(), sb.ID()))
	return took
}

func testDestroyInStart(t *testing.T, s Suite) {
	w := newWorld(t, s)
	whole := w.timeCreate(t)
	const steps = 6
	for i := range steps {
		spec := w.spec()
		created := make(chan error, 1)
		go func() {
			sb, err := w.Create(t.Context(), spec)
			if err == nil {
				err = sb.Close()
			} else {
				err = nil // cancelled, as it should be
			}
			created <- err
		}()
		<-time.After(whole * time.Duration(i+1) / steps)
		require.Eventually(t, func() bool { return len(created) > 0 || len(w.s.Traces(t, w.dir)) > 0 }, patience, time.Millisecond,
			"a Destroy that comes before the Create has nothing to end")
		require.NoError(t, w.Destroy(t.Context(), spec.ID))
		require.NoError(t, <-created)
		w.empty(t)
	}
}

func testMany(t *testing.T, s Suite) {
	w := newWorld(t, s)
	const n = 8
	boxes := make([]sandbox.Sandbox, n)
	g, ctx := errgroup.WithContext(t.Context())
	for i := range n {
		g.Go(func() error {
			sb, err := w.Create(ctx, w.spec())
			if err != nil {
				return err
			}
			boxes[i] = sb
			return answers(ctx, sb)
		})
	}
	require.NoError(t, g.Wait())
	ids, err := w.List(t.Context())
	require.NoError(t, err)
	require.Len(t, ids, n)
	for _, sb := range boxes {
		g.Go(func() error { return w.Destroy(t.Context(), sb.ID()) })
	}
	require.NoError(t, g.Wait())
	for _, sb := range boxes {
		require.Equal(t, "destroyed", Ended(t, sb))
		require.NoError(t, sb.Close())
	}
	w.empty(t)
}

// helperEnv hands the helper process what it is to do.
const helperEnv = "NESTBOX_SANDBOXTEST_HELPER"

type helperTask struct {
	Dir  string
	Spec sandbox.Spec
}

// MaybeHelper becomes the helper process of a test, and never returns, if it
// was started as such. TestMain calls it.
func MaybeHelper(open func(dir string) (sandbox.Driver, error)) {
	text, ok := os.LookupEnv(helperEnv)
	if !ok {
		return
	}
	if err := help(text, open); err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	select {} // until it is killed
}

func help(text string, open func(dir string) (sandbox.Driver, error)) error {
	var task helperTask
	if err := json.Unmarshal([]byte(text), &task); err != nil {
		return err
	}
	d, err := open(task.Dir)
	if err != nil {
		return err
	}
	fmt.Println("begun")
	if _, err := d.Create(context.Background(), task.Spec); err != nil {
		return err
	}
	fmt.Println("created")
	return nil
}

// testKilled kills a process with -9 at many moments of its Create.
func testKilled(t *testing.T, s Suite) {
	w := newWorld(t, s)
	whole := w.timeCreate(t)
	const steps = 12
	for i := range steps + 1 {
		spec := w.spec()
		created := killInCreate(t, w.dir, spec, whole*time.Duration(i)/steps, i == steps)
		sb, err := w.Open(t.Context(), spec.ID)
		if created {
			require.NoError(t, err, "a sandbox that was made must be found again")
		}
		if err == nil {
			alive(t, sb)
			require.NoError(t, sb.Close())
		} else {
			require.Equal(t, nestbox.CodeNotFound, nestbox.CodeOf(err))
		}
		require.NoError(t, w.Destroy(t.Context(), spec.ID))
		w.empty(t)
	}
}

// killInCreate kills a helper some time after its Create began, or, if whole,
// after it returned. It reports whether it had returned.
func killInCreate(t *testing.T, dir string, spec sandbox.Spec, after time.Duration, whole bool) bool {
	t.Helper()
	task, err := json.Marshal(helperTask{dir, spec})
	require.NoError(t, err)
	self, err := os.Executable()
	require.NoError(t, err)
	cmd := exec.Command(self)
	cmd.Env = append(os.Environ(), helperEnv+"="+string(task))
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	require.NoError(t, err)
	require.NoError(t, cmd.Start())
	buf := make([]byte, len("begun\n"))
	_, err = io.ReadFull(out, buf)
	require.NoError(t, err)
	require.Equal(t, "begun\n", string(buf))
	said := ""
	if whole {
		line := make([]byte, len("created\n"))
		_, err := io.ReadFull(out, line)
		require.NoError(t, err)
		said = string(line)
	} else {
		<-time.After(after)
	}
	require.NoError(t, cmd.Process.Kill())
	rest, err := io.ReadAll(out)
	require.NoError(t, err)
	require.Error(t, cmd.Wait(), "killed")
	said += string(rest)
	require.Contains(t, []string{"", "created\n"}, said)
	return said != ""
}

// ProcessesWith returns the processes whose command line or control groups
// mention text, but not this one.
func ProcessesWith(t *testing.T, text string) []string {
	t.Helper()
	entries, err := os.ReadDir("/proc")
	require.NoError(t, err)
	var found []string
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil || pid == os.Getpid() {
			continue
		}
		for _, file := range []string{"cmdline", "cgroup"} {
			content, err := os.ReadFile("/proc/" + e.Name() + "/" + file)
			if err == nil && strings.Contains(string(content), text) {
				found = append(found, "process "+e.Name()+": "+strings.ReplaceAll(string(content), "\x00", " "))
				break
			}
		}
	}
	return found
}
