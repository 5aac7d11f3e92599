package certfile

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"log/slog"
	"math/big"
	"os"
	"path/filepath"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
)

// pair makes a certificate and key, in PEM form.
func pair(t *testing.T, serial int64) (cert, key []byte) {
	t.Helper()
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	require.NoError(t, err)
	template := &x509.Certificate{SerialNumber: big.NewInt(serial), NotAfter: time.Now().Add(time.Hour), DNSNames: []string{"localhost"}}
	der, err := x509.CreateCertificate(rand.Reader, template, template, private.Public(), private)
	require.NoError(t, err)
	pkcs8, err := x509.MarshalPKCS8PrivateKey(private)
	require.NoError(t, err)
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: pkcs8})
}

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

	cert1, key1 := pair(t, 1)
	cert2, key2 := pair(t, 2)
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
