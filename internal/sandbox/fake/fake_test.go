package fake_test

import (
	"errors"
	"flag"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/internal/image"
	"github.com/nestbox/nestbox/internal/sandbox"
	"github.com/nestbox/nestbox/internal/sandbox/fake"
	"github.com/nestbox/nestbox/internal/sandbox/sandboxtest"
	"github.com/nestbox/nestbox/internal/testbin"
)

// envdOf keeps the path of envd with the directory of a driver, for the helper
// process of the suite.
const envdOf = "envd"

func TestMain(m *testing.M) {
	sandboxtest.MaybeHelper(open)
	flag.Parse()
	goleak.VerifyTestMain(m)
}

func open(dir string) (sandbox.Driver, error) {
	envd, err := os.Readlink(filepath.Join(dir, envdOf))
	if err != nil {
		return nil, err
	}
	return fake.New(filepath.Join(dir, "sandboxes"), envd)
}

func newDir(t *testing.T) string {
	dir := t.TempDir()
	require.NoError(t, os.Symlink(testbin.Envd(t), filepath.Join(dir, envdOf)))
	return dir
}

func TestSuite(t *testing.T) {
	t.Parallel()
	sandboxtest.Run(t, sandboxtest.Suite{
		Dir:  newDir,
		Open: open,
		Root: image.Root{Dir: "/"},
		Crash: func(t *testing.T, dir, id string) {
			d, err := open(dir)
			require.NoError(t, err)
			require.NoError(t, d.(*fake.Driver).Crash(id))
		},
		Traces: func(t *testing.T, dir string) []string {
			sandboxes := filepath.Join(dir, "sandboxes")
			files, err := filepath.Glob(filepath.Join(sandboxes, "*"))
			require.NoError(t, err)
			return append(files, sandboxtest.ProcessesWith(t, sandboxes)...)
		},
	})
}

func spec() sandbox.Spec {
	return sandbox.Spec{ID: nestbox.NewID(nestbox.PrefixCapsule), Resources: nestbox.DefaultResources, Env: map[string]string{sandbox.EnvToken: "t"}}
}

func newDriver(t *testing.T) *fake.Driver {
	d, err := open(newDir(t))
	require.NoError(t, err)
	return d.(*fake.Driver)
}

func TestFailNextCreate(t *testing.T) {
	t.Parallel()
	d := newDriver(t)
	boom := errors.New("boom")
	d.FailNextCreate(boom)
	s := spec()
	_, err := d.Create(t.Context(), s)
	require.ErrorIs(t, err, boom)
	ids, err := d.List(t.Context())
	require.NoError(t, err)
	require.Empty(t, ids)

	sb, err := d.Create(t.Context(), s)
	require.NoError(t, err)
	sandboxtest.Answers(t, sb)
	require.NoError(t, d.Destroy(t.Context(), s.ID))
	require.NoError(t, sb.Close())
}

func TestBlockCreate(t *testing.T) {
	t.Parallel()
	d := newDriver(t)
	release := make(chan struct{})
	d.BlockCreate(release)
	created := make(chan error)
	s := spec()
	go func() {
		sb, err := d.Create(t.Context(), s)
		if err == nil {
			err = sb.Close()
		}
		created <- err
	}()
	require.Eventually(t, func() bool {
		ids, err := d.List(t.Context())
		return err == nil && len(ids) == 1
	}, time.Minute, time.Millisecond)
	require.NoError(t, d.Destroy(t.Context(), s.ID))
	require.Equal(t, nestbox.CodeCanceled, nestbox.CodeOf(<-created))

	close(release)
	sb, err := d.Create(t.Context(), s)
	require.NoError(t, err)
	require.NoError(t, d.Destroy(t.Context(), s.ID))
	require.NoError(t, sb.Close())
}
