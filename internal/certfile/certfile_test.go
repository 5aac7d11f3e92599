package certfile

import (
	"log/slog"
	"os"
	"path/filepath"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/nestbox/nestbox/internal/testcert"
)

func TestRenewal(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	certFile, keyFile := filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")
	version := time.Now()
	write := func(path string, data []byte) {
		version = version.Add(time.Minute)
		require.NoError(t, os.WriteFile(path, data, 0o600))
		require.NoError(t, os.Chtimes(path, version, version))
	}
	_, err := Open(certFile, keyFile, slog.New(slog.DiscardHandler))
	require.ErrorIs(t, err, os.ErrNotExist)

	cert1, key1 := testcert.Make(t, 1)
	cert2, key2 := testcert.Make(t, 2)
	write(certFile, cert1)
	write(keyFile, key1)
	synctest.Test(t, func(t *testing.T) {
		p, err := Open(certFile, keyFile, slog.New(slog.DiscardHandler))
		require.NoError(t, err)
		serves := func(serial int64, why string) {
			t.Helper()
			time.Sleep(lookEvery)
			cert, err := p.Config().GetCertificate(nil)
			require.NoError(t, err)
			require.Equal(t, serial, cert.Leaf.SerialNumber.Int64(), why)
		}
		serves(1, "as it was opened")
		write(certFile, cert2)
		serves(1, "the key is not there yet")
		write(keyFile, key2)
		serves(2, "both are there")
		write(certFile, []byte("garbage"))
		serves(2, "nothing that can be used")
		require.NoError(t, os.Remove(certFile))
		serves(2, "nothing at all")
		write(certFile, cert1)
		write(keyFile, key1)
		serves(1, "another one again")
	})
}
