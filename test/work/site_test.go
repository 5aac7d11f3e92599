package work

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/nestbox/nestbox/internal/testbin"
	"github.com/nestbox/nestbox/internal/testcert"
)

// patience bounds every wait. It is long because the machine may be busy; no test waits
// for it to pass.
const patience = 3 * time.Minute

// domain is that of the server and of capsule ports, and elsewhere that of another site.
const (
	domain    = "boxes.example"
	elsewhere = "elsewhere.example"
)

// site is a server that speaks TLS, and what its users have.
type site struct {
	t    *testing.T
	bin  string
	dir  string
	addr string // where it listens
	cert tls.Certificate
	pem  string // file of the certificate
	key  string // API key
}

func newSite(t *testing.T) *site {
	t.Helper()
	s := &site{t: t, bin: testbin.Nestbox(t)}
	var err error
	s.dir, err = os.MkdirTemp("", "nestbox-work-*")
	require.NoError(t, err)
	require.NoError(t, os.Chmod(s.dir, 0o711))
	t.Cleanup(func() { require.NoError(t, os.RemoveAll(s.dir)) })
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	s.addr = l.Addr().String()
	require.NoError(t, l.Close())
	keyFile := filepath.Join(s.dir, "key.pem")
	s.pem = filepath.Join(s.dir, "cert.pem")
	testcert.Write(t, 1, s.pem, keyFile, domain, "*."+domain, elsewhere)
	s.cert, err = tls.LoadX509KeyPair(s.pem, keyFile)
	require.NoError(t, err)

	cmd := exec.Command(s.bin, "up", "--dir", s.dir, "--listen", s.addr, "--public-url", s.url(),
		"--tls-cert", s.pem, "--tls-key", keyFile, "--egress", "deny")
	cmd.Stdout, cmd.Stderr = t.Output(), t.Output()
	require.NoError(t, cmd.Start())
	t.Cleanup(func() {
		_ = cmd.Process.Signal(syscall.SIGTERM)
		_ = cmd.Wait()
	})
	require.Eventually(t, func() bool {
		res, err := s.http().Get(s.url() + "/health")
		return err == nil && res.Body.Close() == nil && res.StatusCode == http.StatusOK
	}, patience, 20*time.Millisecond)
	key, err := os.ReadFile(filepath.Join(s.dir, "api-key"))
	require.NoError(t, err)
	s.key = strings.TrimSpace(string(key))
	return s
}

// url is the public address of the API.
func (s *site) url() string {
	_, port, _ := net.SplitHostPort(s.addr)
	return "https://" + net.JoinHostPort(domain, port)
}

// http returns a client that finds every name at the server.
func (s *site) http() *http.Client {
	roots := x509.NewCertPool()
	roots.AddCert(s.cert.Leaf)
	dial := func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "tcp", s.addr)
	}
	return &http.Client{Transport: &http.Transport{DialContext: dial, TLSClientConfig: &tls.Config{RootCAs: roots}, ForceAttemptHTTP2: true}}
}

// in is the site for a subtest.
func (s *site) in(t *testing.T) *site {
	c := *s
	c.t = t
	return &c
}

// command is one of the client's, ready to run.
func (s *site) command(ctx context.Context, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, s.bin, args...)
	cmd.Env = append(os.Environ(), "NESTBOX_URL=https://"+s.addr, "NESTBOX_API_KEY="+s.key, "SSL_CERT_FILE="+s.pem)
	return cmd
}

// nestbox runs a command that must succeed, and returns what it prints.
func (s *site) nestbox(args ...string) string {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(context.WithoutCancel(s.t.Context()), patience)
	defer cancel()
	var said strings.Builder
	cmd := s.command(ctx, args...)
	cmd.Stderr = &said
	out, err := cmd.Output()
	require.NoError(s.t, err, "nestbox %v\n%s\n%s", args, out, said.String())
	return strings.TrimSpace(string(out))
}

// capsule makes one that ends with the test.
func (s *site) capsule(memoryMB string) string {
	s.t.Helper()
	id := s.nestbox("capsule", "create", "--memory", memoryMB)
	s.t.Cleanup(func() { s.nestbox("capsule", "rm", id) })
	return id
}

// ask sends a GET until the program answers, and returns status and body.
func (s *site) ask(url string) (status int, body string) {
	s.t.Helper()
	require.Eventually(s.t, func() bool {
		res, err := s.http().Get(url)
		if err != nil {
			return false
		}
		defer res.Body.Close()
		text, err := io.ReadAll(res.Body)
		status, body = res.StatusCode, string(text)
		return err == nil && res.Header.Get("Nestbox-Error") == ""
	}, patience, 50*time.Millisecond, "%s does not answer", url)
	return status, body
}

// write makes the files of a project in a new directory.
func (s *site) write(files map[string]string) (dir string) {
	s.t.Helper()
	dir = filepath.Join(s.t.TempDir(), "project")
	for name, text := range files {
		path := filepath.Join(dir, name)
		require.NoError(s.t, os.MkdirAll(filepath.Dir(path), 0o755))
		require.NoError(s.t, os.WriteFile(path, []byte(text), 0o644))
	}
	return dir
}

// run runs a program of this machine that must succeed.
func (s *site) run(dir, name string, args ...string) string {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(s.t.Context(), patience)
	defer cancel()
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir = dir
	out, err := cmd.CombinedOutput()
	require.NoError(s.t, err, "%s %v\n%s", name, args, out)
	return strings.TrimSpace(string(out))
}
