// Package reach tests the way out of a capsule with the clients that people use, against
// what they really talk to: Debian's packages and npm's registry. What the host itself
// cannot reach is left out.
package reach

import (
	"context"
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

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/client"
	"github.com/nestbox/nestbox/internal/testbin"
)

const patience = 2 * time.Minute

// newServer starts the built binary, and returns a client of it.
func newServer(t *testing.T) *client.Client {
	t.Helper()
	dir, err := os.MkdirTemp("", "nestbox-reach-*")
	require.NoError(t, err)
	require.NoError(t, os.Chmod(dir, 0o711))
	t.Cleanup(func() { require.NoError(t, os.RemoveAll(dir)) })
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	addr := l.Addr().String()
	require.NoError(t, l.Close())
	cmd := exec.Command(testbin.Nestbox(t), "up", "--dir", dir, "--listen", addr)
	cmd.Stdout, cmd.Stderr = t.Output(), t.Output()
	require.NoError(t, cmd.Start())
	t.Cleanup(func() {
		_ = cmd.Process.Signal(syscall.SIGTERM)
		_ = cmd.Wait()
	})
	require.Eventually(t, func() bool {
		res, err := http.Get("http://" + addr + "/health")
		if err != nil {
			return false
		}
		return res.Body.Close() == nil && res.StatusCode == http.StatusOK
	}, patience, 20*time.Millisecond)
	key, err := os.ReadFile(filepath.Join(dir, "api-key"))
	require.NoError(t, err)
	c, err := client.New(client.Config{BaseURL: "http://" + addr, APIKey: string(key)})
	require.NoError(t, err)
	return c
}

// hostReaches reports whether the host gets an answer from a URL.
func hostReaches(t *testing.T, url string) bool {
	t.Helper()
	http := http.Client{Timeout: 20 * time.Second}
	res, err := http.Get(url)
	if err != nil {
		t.Logf("the host does not reach %s: %v", url, err)
		return false
	}
	return res.Body.Close() == nil
}

const fromDebian = `
. /etc/os-release
mkdir -p /etc/apt/apt.conf.d /etc/apt/preferences.d /etc/apt/trusted.gpg.d /var/lib/apt/lists/partial /var/cache/apt/archives/partial
echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] http://deb.debian.org/debian $VERSION_CODENAME main" > /etc/apt/sources.list
apt-get -q update
cd /var/tmp
apt-get -q download hello
dpkg-deb -x hello_*.deb hello
hello/usr/bin/hello`

const fromNPM = `
mkdir /var/tmp/app && cd /var/tmp/app
npm install --no-audit --no-fund left-pad@1.3.0
node -e 'console.log(require("left-pad")("x", 5, "-"))'`

// TestPackages updates from Debian's archive and installs from npm's registry: with all of
// the internet, and with no more than the names that this takes.
func TestPackages(t *testing.T) {
	debian := hostReaches(t, "http://deb.debian.org/debian/")
	registry, err := exec.Command("npm", "config", "get", "registry").Output()
	npm := err == nil && hostReaches(t, strings.TrimSpace(string(registry)))
	if !debian && !npm {
		t.Skip("the host reaches neither Debian's archive nor npm's registry")
	}
	c := newServer(t)
	host := strings.Trim(strings.TrimPrefix(strings.TrimPrefix(strings.TrimSpace(string(registry)), "https://"), "http://"), "/")
	host, _, _ = strings.Cut(host, "/")
	for what, policy := range map[string]*nestbox.NetworkPolicy{
		"the default": nil,
		"by name":     {Allow: []string{"deb.debian.org", "*.debian.org", host}},
	} {
		t.Run(what, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), patience)
			defer cancel()
			capsule, err := c.Capsules.Create(ctx, nestbox.CapsuleSpec{Network: policy, Resources: nestbox.Resources{MemoryMB: 1024}})
			require.NoError(t, err)
			defer func() { require.NoError(t, capsule.Destroy(context.WithoutCancel(ctx))) }()
			sh := func(script string) string {
				t.Helper()
				out, err := capsule.CommandContext(ctx, "sh", "-ec", script).CombinedOutput()
				require.NoError(t, err, "%s", out)
				return string(out)
			}
			if debian {
				require.Contains(t, sh(fromDebian), "Hello, world!")
			}
			if npm {
				require.Contains(t, sh("npm config set registry "+strings.TrimSpace(string(registry))+"\n"+fromNPM), "----x")
			}
			if policy != nil {
				out, err := capsule.CommandContext(ctx, "curl", "-sS", "-m", "20", "http://security.example.org/").CombinedOutput()
				require.Error(t, err, "%s", out)
			}
		})
	}
}
