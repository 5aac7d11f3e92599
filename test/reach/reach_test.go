package reach

import (
	"context"
	"net"
	"net/http"
	"net/url"
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

// archive is where the host has Debian's packages from.
type archive struct{ url, suite string }

// theArchive reads it from apt's configuration: the release itself, and not its updates,
// whose names are longer.
func theArchive(t *testing.T) (a archive) {
	t.Helper()
	out, err := exec.Command("apt-get", "indextargets", "--format", "$(SITE) $(RELEASE)", "Created-By: Packages", "Component: main").Output()
	require.NoError(t, err)
	for line := range strings.Lines(string(out)) {
		site, suite, _ := strings.Cut(strings.TrimSpace(line), " ")
		if a.suite == "" || len(suite) < len(a.suite) {
			a = archive{site, suite}
		}
	}
	require.NotEmpty(t, a.suite, "apt has no archive: %s", out)
	return a
}

// theRegistry is where the host has npm's packages from.
func theRegistry(t *testing.T) string {
	t.Helper()
	out, err := exec.Command("npm", "config", "get", "registry").Output()
	require.NoError(t, err)
	return strings.TrimSpace(string(out))
}

// hostName is the name in a URL.
func hostName(t *testing.T, text string) string {
	t.Helper()
	u, err := url.Parse(text)
	require.NoError(t, err)
	require.NotEmpty(t, u.Hostname(), text)
	return u.Hostname()
}

// fromArchive and fromRegistry are what a user would type.
func fromArchive(a archive) string {
	return `
mkdir -p /etc/apt/apt.conf.d /etc/apt/preferences.d /etc/apt/trusted.gpg.d /var/lib/apt/lists/partial /var/cache/apt/archives/partial
cp /usr/share/keyrings/*archive-keyring.gpg /etc/apt/trusted.gpg.d
echo "deb ` + a.url + ` ` + a.suite + ` main" > /etc/apt/sources.list
apt-get -q update
cd /var/tmp
apt-get -q download hello
dpkg-deb -x hello_*.deb hello
hello/usr/bin/hello`
}

func fromRegistry(registry string) string {
	return `
npm config set registry ` + registry + `
mkdir /var/tmp/app && cd /var/tmp/app
npm install --no-audit --no-fund left-pad@1.3.0
node -e 'console.log(require("left-pad")("x", 5, "-"))'`
}

// fetch is tried on the host and in the capsule, which reaches what its host does.
func fetch(url string) []string { return []string{"curl", "-sS", "-m", "20", "-o", "/dev/null", url} }

// TestPackages updates from Debian's archive and installs from npm's registry: with all of
// the internet, and with no more than the names that this takes.
func TestPackages(t *testing.T) {
	debian, registry := theArchive(t), theRegistry(t)
	c := newServer(t)
	for what, policy := range map[string]*nestbox.NetworkPolicy{
		"the default": nil,
		"by name":     {Allow: []string{hostName(t, debian.url), hostName(t, registry)}},
	} {
		t.Run(what, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), patience)
			defer cancel()
			capsule, err := c.Capsules.Create(ctx, nestbox.CapsuleSpec{Network: policy, Resources: nestbox.Resources{MemoryMB: 1024}})
			require.NoError(t, err)
			defer func() { require.NoError(t, capsule.Destroy(context.WithoutCancel(ctx))) }()
			for url, try := range map[string]struct{ script, want string }{
				debian.url: {fromArchive(debian), "Hello, world!"},
				registry:   {fromRegistry(registry), "----x"},
			} {
				f := fetch(url)
				outside := exec.CommandContext(ctx, f[0], f[1:]...).Run() == nil
				require.Equal(t, outside, capsule.CommandContext(ctx, f[0], f[1:]...).Run() == nil, "%s: host, capsule", url)
				if !outside {
					continue
				}
				out, err := capsule.CommandContext(ctx, "sh", "-ec", try.script).CombinedOutput()
				require.NoError(t, err, "%s", out)
				require.Contains(t, string(out), try.want)
			}
			if policy != nil {
				out, err := capsule.CommandContext(ctx, "curl", "-sS", "-m", "20", "http://other.example.org/").CombinedOutput()
				require.Error(t, err, "%s", out)
			}
		})
	}
}
