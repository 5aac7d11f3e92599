package e2e

import (
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/nestbox/nestbox/internal/testbin"
	"github.com/nestbox/nestbox/internal/testcert"
)

// TestDoctor: a machine on which capsules work is well, beside a server too and
// without a trace; what is wrong is named, with what to do, and fails the command.
func TestDoctor(t *testing.T) {
	t.Parallel()
	s := newServer(t)
	free, base := freeAddr(t), stateDir(t)

	code, found := doctor(t, "--dir", filepath.Join(base, "new"), "--listen", free)
	require.Zero(t, code, "%v", found)
	require.Equal(t, "ok", found["first capsule"].Status)
	require.Equal(t, "ok", found["port"].Status)
	entries, err := os.ReadDir(base)
	require.NoError(t, err)
	require.Empty(t, entries, "nothing is left, and nothing made")

	code, found = doctor(t, "--dir", s.dir, "--listen", s.addr)
	require.Zero(t, code, "%v", found)
	require.Contains(t, found["port"].Detail, "a server of this directory runs")
	c := s.newCapsule()
	require.Equal(t, "alive\n", s.sh(c, "echo alive").Stdout, "the server is not disturbed")

	code, found = doctor(t, "--dir", filepath.Join(base, "new"), "--listen", s.addr)
	require.Equal(t, 1, code)
	require.Equal(t, "fail", found["port"].Status)
	require.Contains(t, found["port"].Fix, "--listen")

	cert, key := filepath.Join(base, "cert.pem"), filepath.Join(base, "key.pem")
	testcert.Write(t, 1, cert, key, "*.boxes.invalid")
	withTLS := []string{"--dir", filepath.Join(base, "new"), "--listen", free, "--tls-cert", cert, "--tls-key", key}
	_, found = doctor(t, append(withTLS, "--domain", "boxes.invalid")...)
	require.Equal(t, "warn", found["certificate"].Status)
	require.Contains(t, found["certificate"].Fix, "renew", "it is valid for a day only")
	_, found = doctor(t, append(withTLS, "--domain", "others.invalid")...)
	require.Equal(t, "it is not for 8000-example.others.invalid", found["certificate"].Detail)
	code, found = doctor(t, "--dir", filepath.Join(base, "new"), "--listen", free, "--tls-cert", cert, "--tls-key", cert)
	require.Equal(t, 1, code)
	require.Equal(t, "fail", found["certificate"].Status)
	require.NoError(t, errors.Join(os.Remove(cert), os.Remove(key)))

	file := filepath.Join(base, "file")
	require.NoError(t, os.WriteFile(file, nil, 0o600))
	code, found = doctor(t, "--dir", file, "--listen", free, "--domain", "boxes.invalid")
	require.Equal(t, 1, code)
	require.Equal(t, "fail", found["state directory"].Status)
	require.Contains(t, found["first capsule"].Detail, "not tried")
	require.Equal(t, "warn", found["domain"].Status)
	require.Contains(t, found["domain"].Fix, "*.boxes.invalid")

	_, found = doctor(t, "--dir", filepath.Join(base, "new"), "--listen", "0.0.0.0:0")
	require.Equal(t, "warn", found["port"].Status)
	require.Contains(t, found["port"].Detail, "without TLS")

	said, err := exec.Command(testbin.Nestbox(t), "doctor", "--dir", file, "--listen", free).CombinedOutput()
	require.Error(t, err)
	require.Regexp(t, `(?m)^FAIL  state directory +the state directory .* is no directory$`, string(said))
	require.Regexp(t, `(?m)^\d+ checks: 1 fail, `, string(said))
}

type finding struct{ Check, Status, Detail, Fix string }

// doctor runs `nestbox doctor` and returns what it found, by check.
func doctor(t *testing.T, args ...string) (code int, found map[string]finding) {
	t.Helper()
	cmd := exec.Command(testbin.Nestbox(t), append([]string{"doctor", "--json"}, args...)...)
	out, err := cmd.Output()
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) {
		code = exit.ExitCode()
	} else {
		require.NoError(t, err)
	}
	var all []finding
	require.NoError(t, json.Unmarshal(out, &all))
	found = map[string]finding{}
	for _, f := range all {
		found[f.Check] = f
	}
	return code, found
}
