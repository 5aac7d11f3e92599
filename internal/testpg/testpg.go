// Package testpg runs a private PostgreSQL for the tests of a package: started
// once by its TestMain, with a new database for each test, and gone at the end.
//
// It needs Debian's postgresql package and nothing else. It may import leaf
// packages only, and only tests import it.
package testpg

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"net/url"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	_ "github.com/jackc/pgx/v5/stdlib" // registers the driver "pgx"
)

// startIn bounds how long the server may take to answer, on a busy machine.
const startIn = 2 * time.Minute

// Server is a running PostgreSQL that listens on a Unix socket only. It keeps
// nothing: a crash of the machine would lose its data, and Stop removes it.
type Server struct {
	dir     string
	process *os.Process
	ended   chan error // the server's end
	names   atomic.Int64
	admin   *sql.DB
}

// Start makes a new database cluster and starts a server on it. The server
// ends with Stop, or with this process, however that ends.
func Start(ctx context.Context) (_ *Server, err error) {
	ctx, cancel := context.WithTimeout(ctx, startIn)
	defer cancel()
	bin, err := binaries()
	if err != nil {
		return nil, err
	}
	owner, err := owner()
	if err != nil {
		return nil, err
	}
	// Not TMPDIR: a socket's path has 107 bytes at most, and the server's owner
	// must be able to enter.
	dir, err := os.MkdirTemp("/tmp", "testpg-")
	if err != nil {
		return nil, err
	}
	s := &Server{dir: dir, ended: make(chan error, 1)}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.Stop())
		}
	}()
	if owner != nil {
		if err := os.Chown(dir, int(owner.Uid), int(owner.Gid)); err != nil {
			return nil, err
		}
	}
	if err := s.initialize(ctx, bin, owner); err != nil {
		return nil, err
	}
	if err := s.run(bin, owner); err != nil {
		return nil, err
	}
	s.admin, err = sql.Open("pgx", s.dsn("postgres"))
	if err != nil {
		return nil, err
	}
	return s, s.await(ctx)
}

// binaries returns the folder of the newest installed server.
func binaries() (string, error) {
	found, err := filepath.Glob("/usr/lib/postgresql/*/bin/postgres")
	if err != nil {
		return "", err
	}
	if len(found) == 0 {
		if path, err := exec.LookPath("postgres"); err == nil {
			return filepath.Dir(path), nil
		}
		return "", errors.New("PostgreSQL is not installed: `make test` installs it (Debian: apt-get install postgresql)")
	}
	newest := slices.MaxFunc(found, func(a, b string) int { return version(a) - version(b) })
	return filepath.Dir(newest), nil
}

func version(path string) int {
	n, _ := strconv.Atoi(filepath.Base(filepath.Dir(filepath.Dir(path)))) // 0 for what is no number
	return n
}

// owner returns whom the server runs as: PostgreSQL refuses to be root. nil is
// the user of this process.
func owner() (*syscall.Credential, error) {
	if os.Getuid() != 0 {
		return nil, nil
	}
	u, err := user.Lookup("postgres")
	if err != nil {
		return nil, fmt.Errorf("the package postgresql makes a user for its server: %w", err)
	}
	uid, err := strconv.ParseUint(u.Uid, 10, 32)
	if err != nil {
		return nil, err
	}
	gid, err := strconv.ParseUint(u.Gid, 10, 32)
	if err != nil {
		return nil, err
	}
	return &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}, nil
}

func (s *Server) data() string { return filepath.Join(s.dir, "data") }

func (s *Server) initialize(ctx context.Context, bin string, owner *syscall.Credential) error {
	cmd := exec.CommandContext(ctx, filepath.Join(bin, "initdb"), "--pgdata", s.data(), "--username", "postgres",
		"--auth", "trust", "--encoding", "UTF8", "--no-locale", "--no-sync")
	cmd.Dir = s.dir
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: owner}
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("initdb: %w\n%s", err, out)
	}
	return nil
}

// run starts the server. It stays a child of a thread that lives as long as
// it does, so that the kernel ends it with this process.
func (s *Server) run(bin string, owner *syscall.Credential) error {
	log, err := os.Create(s.logPath())
	if err != nil {
		return err
	}
	cmd := exec.Command(filepath.Join(bin, "postgres"), "-D", s.data(), "-k", s.dir, "-c", "listen_addresses=",
		"-c", "fsync=off", "-c", "full_page_writes=off", "-c", "synchronous_commit=off",
		"-c", "max_connections=300", "-c", "shared_buffers=64MB", "-c", "autovacuum=off")
	cmd.Dir, cmd.Stdout, cmd.Stderr = s.dir, log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: owner, Setpgid: true, Pdeathsig: syscall.SIGQUIT}
	started := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := errors.Join(cmd.Start(), log.Close())
		started <- err
		if err == nil {
			s.ended <- cmd.Wait()
		}
	}()
	if err := <-started; err != nil {
		return err
	}
	s.process = cmd.Process
	return nil
}

func (s *Server) logPath() string { return filepath.Join(s.dir, "log") }

// await returns when the server answers.
func (s *Server) await(ctx context.Context) error {
	retry := time.NewTicker(10 * time.Millisecond)
	defer retry.Stop()
	for {
		err := s.admin.PingContext(ctx)
		if err == nil {
			return nil
		}
		select {
		case <-retry.C:
		case end := <-s.ended:
			s.process = nil
			out, _ := os.ReadFile(s.logPath())
			return fmt.Errorf("PostgreSQL ended: %w\n%s", errors.Join(end, err), out)
		case <-ctx.Done():
			return fmt.Errorf("PostgreSQL does not answer: %w", err)
		}
	}
}

// Stop ends the server and removes all of it.
func (s *Server) Stop() error {
	var errs []error
	if s.admin != nil {
		errs = append(errs, s.admin.Close())
	}
	if s.process != nil {
		errs = append(errs, s.process.Signal(syscall.SIGQUIT)) // at once: nothing is kept
		<-s.ended
	}
	return errors.Join(append(errs, os.RemoveAll(s.dir))...)
}

func (s *Server) dsn(database string) string {
	q := url.Values{"host": {s.dir}, "user": {"postgres"}}
	return (&url.URL{Scheme: "postgres", Path: "/" + database, RawQuery: q.Encode()}).String()
}

// Template makes a database that Database copies, and calls prepare to fill
// it. prepare must leave no connection to it.
func (s *Server) Template(ctx context.Context, prepare func(dsn string) error) (name string, err error) {
	name = s.newName()
	if _, err := s.admin.ExecContext(ctx, "CREATE DATABASE "+name); err != nil {
		return "", err
	}
	return name, prepare(s.dsn(name))
}

// Database makes a new database for one test, a copy of a template ("" = an
// empty one), and returns its URL. It is dropped when the test ends.
func (s *Server) Database(t testing.TB, template string) string {
	t.Helper()
	name := s.newName()
	create := "CREATE DATABASE " + name
	if template != "" {
		create += " TEMPLATE " + template + " STRATEGY FILE_COPY" // PostgreSQL 15; ten times as fast for a small one
	}
	if _, err := s.admin.ExecContext(t.Context(), create); err != nil {
		t.Fatalf("testpg: %v", err)
	}
	t.Cleanup(func() {
		if _, err := s.admin.ExecContext(context.WithoutCancel(t.Context()), "DROP DATABASE "+name+" WITH (FORCE)"); err != nil {
			t.Errorf("testpg: %v", err)
		}
	})
	return s.dsn(name)
}

func (s *Server) newName() string { return "test_" + strconv.FormatInt(s.names.Add(1), 10) }
