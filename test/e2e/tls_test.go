package e2e

import (
	"crypto/tls"
	"crypto/x509"
	"io"
	"net/http"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/nestbox/nestbox/internal/testbin"
	"github.com/nestbox/nestbox/internal/testcert"
)

// newTLSServer starts a server with TLS for ports below domain. renew replaces its
// certificate.
func newTLSServer(t *testing.T, domain string, args ...string) (s *server, renew func(serial int64)) {
	t.Helper()
	dir := t.TempDir()
	certFile, keyFile := filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")
	s = &server{
		t: t, bin: testbin.Nestbox(t), dir: stateDir(t), addr: freeAddr(t), tls: &tls.Config{RootCAs: x509.NewCertPool()},
		args: append([]string{"--tls-cert", certFile, "--tls-key", keyFile}, args...),
	}
	renew = func(serial int64) {
		s.tls.RootCAs.AppendCertsFromPEM(testcert.Write(t, serial, certFile, keyFile, domain, "*."+domain))
	}
	renew(1)
	s.start()
	t.Cleanup(s.finish)
	return s, renew
}

// TestTLS: the server speaks TLS itself, in both versions of HTTP, and all that it says
// of itself fits.
func TestTLS(t *testing.T) {
	t.Parallel()
	s, renew := newTLSServer(t, "boxes.example", "--public-url", "https://boxes.example:8443")
	id := s.newCapsule()
	s.background(id, "web", `exec python3 -c '
import http.server
class H(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = str(self.headers).encode()
        self.send_response(200); self.send_header("Content-Length", str(len(body))); self.end_headers(); self.wfile.write(body)
http.server.HTTPServer(("", 8000), H).serve_forever()'`)
	signed := call[struct {
		URL string `json:"url"`
	}](s, http.MethodPost, "/v1/capsules/"+id+"/ports/8000/url", none{}, 200)
	require.True(t, strings.HasPrefix(signed.URL, "https://8000-"+id+".boxes.example:8443/?"), signed.URL)

	get := func(url string, header ...string) (*http.Response, string) {
		var res *http.Response
		var body []byte
		require.Eventually(t, func() bool {
			req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, url, nil)
			require.NoError(t, err)
			for i := 0; i < len(header); i += 2 {
				req.Header.Set(header[i], header[i+1])
			}
			if res, err = s.client().Do(req); err != nil {
				return false
			}
			defer res.Body.Close()
			body, err = io.ReadAll(res.Body)
			return err == nil && res.StatusCode != http.StatusBadGateway // the program starts
		}, patience, 50*time.Millisecond)
		return res, string(body)
	}
	res, body := get(signed.URL)
	require.Equal(t, http.StatusOK, res.StatusCode, body)
	require.Equal(t, 2, res.ProtoMajor)
	require.Contains(t, body, "X-Forwarded-Proto: https")
	require.Contains(t, body, "Host: 8000-"+id+".boxes.example:8443")
	res, _ = get(signed.URL, "Accept", "text/html")
	require.Contains(t, res.Header.Get("Set-Cookie"), "; Secure")
	res, body = get(s.url()+"/v1/capsules/"+id+"/ports/8000/proxy/a?b=c", "X-API-Key", s.key())
	require.Equal(t, http.StatusOK, res.StatusCode, body)
	require.Contains(t, body, "X-Forwarded-Prefix: /v1/capsules/"+id+"/ports/8000/proxy")

	one := &http.Client{Transport: &http.Transport{TLSClientConfig: s.tls.Clone()}} // not told of version 2
	res, err := one.Get(s.url() + "/health")
	require.NoError(t, err)
	require.NoError(t, res.Body.Close())
	require.Equal(t, 1, res.ProtoMajor)

	renew(2)
	require.Eventually(t, func() bool {
		res, _ := get(s.url() + "/health")
		return res.TLS.PeerCertificates[0].SerialNumber.Int64() == 2
	}, patience, 100*time.Millisecond, "the new certificate is not used")
	require.Equal(t, "well\n", s.sh(id, "echo well").Stdout)
}
