package edge

import (
	"context"
	"crypto/tls"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/nestbox/nestbox"
)

// TestPretendedHost: a program that refuses foreign hosts sees one that it likes, in all
// that a request says of it, and a browser sees nothing of that.
func TestPretendedHost(t *testing.T) {
	t.Parallel()
	r := newRig(t, http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		if to := req.URL.Query().Get("to"); to != "" {
			w.Header().Set("Location", to)
			w.WriteHeader(http.StatusFound)
		}
		echo(w, req)
	}))
	r.ports.settings.HostHeader = "localhost:5173"
	r.client.CheckRedirect = func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }
	_, body := r.do(t, http.MethodPost, "/", nil, "X-API-Key", goodKey, "Origin", r.url, "Referer", r.url+"/page?a=b")
	for _, want := range []string{
		"host=localhost:5173\n", "Origin: http://localhost:5173\r\n", "Referer: http://localhost:5173/page?a=b\r\n", "X-Forwarded-Host: localhost:5173\r\n",
	} {
		require.Contains(t, body, want)
	}
	_, body = r.do(t, http.MethodPost, "/", nil, "X-API-Key", goodKey, "Origin", "https://elsewhere.example", "Referer", r.url+"1/")
	require.Contains(t, body, "Origin: https://elsewhere.example\r\n", "of another page")
	require.Contains(t, body, "Referer: "+r.url+"1/\r\n")
	for to, want := range map[string]string{
		"http://localhost:5173/a?b=c#d": r.url + "/a?b=c#d",
		"/a%2Fb":                        "/a%2Fb",
		"a":                             "a",
		"https://elsewhere.example/":    "https://elsewhere.example/",
		"http://localhost:5174/":        "http://localhost:5174/",
		"http://0.0.0.0:3000/a":         r.url + "/a", // its own address, whatever it was told
		"http://[::1]:3000/":            r.url + "/",
	} {
		res, _ := r.do(t, http.MethodGet, "/?to="+url.QueryEscape(to), nil, "X-API-Key", goodKey)
		require.Equal(t, want, res.Header.Get("Location"), to)
	}
}

// TestPublicPort: nobody needs to show anything.
func TestPublicPort(t *testing.T) {
	t.Parallel()
	r := newRig(t, echo)
	r.ports.settings.Public = true
	res, body := r.do(t, http.MethodGet, "/", nil, "Authorization", "Bearer "+goodKey, "Cookie", "nestbox-token="+goodToken)
	require.Equal(t, http.StatusOK, res.StatusCode)
	require.NotContains(t, body, goodKey)
	require.NotContains(t, body, goodToken)
}

// TestProtocols: programs that speak TLS or HTTP/2 in clear are reached too, and gRPC
// without being told.
func TestProtocols(t *testing.T) {
	t.Parallel()
	program := http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		w.Header().Set("Trailer", "Grpc-Status")
		w.Header().Set("Seen", req.Proto)
		_ = http.NewResponseController(w).Flush() // there is no Content-Length, as gRPC has it
		_, _ = w.Write([]byte("body"))
		w.Header().Set("Grpc-Status", "0")
	})
	secure := httptest.NewUnstartedServer(program)
	secure.EnableHTTP2 = true
	secure.StartTLS()
	t.Cleanup(secure.Close)
	clear := httptest.NewUnstartedServer(program)
	clear.Config.Protocols = new(http.Protocols)
	clear.Config.Protocols.SetHTTP1(true)
	clear.Config.Protocols.SetUnencryptedHTTP2(true)
	clear.Start()
	t.Cleanup(clear.Close)
	old := httptest.NewUnstartedServer(program)
	old.TLS = &tls.Config{NextProtos: []string{"http/1.1"}}
	old.StartTLS()
	t.Cleanup(old.Close)

	for name, c := range map[string]struct {
		upstream *httptest.Server
		protocol nestbox.PortProtocol
		kind     string
		want     string
	}{
		"http":           {clear, "", "", "HTTP/1.1"},
		"said so":        {clear, nestbox.PortHTTP, "application/grpc", "HTTP/1.1"},
		"h2c":            {clear, nestbox.PortH2C, "", "HTTP/2.0"},
		"gRPC":           {clear, "", "application/grpc", "HTTP/2.0"},
		"gRPC, JSON":     {clear, "", "application/grpc+json; charset=utf-8", "HTTP/2.0"},
		"gRPC-Web":       {clear, "", "application/grpc-web", "HTTP/1.1"},
		"https":          {secure, nestbox.PortHTTPS, "", "HTTP/2.0"},
		"https, version": {old, nestbox.PortHTTPS, "", "HTTP/1.1"},
	} {
		r := newRig(t, echo)
		r.ports.upstream, r.ports.settings.Protocol = c.upstream.Listener.Addr().String(), c.protocol
		res, body := r.do(t, http.MethodPost, "/", nil, "X-API-Key", goodKey, "Content-Type", c.kind)
		require.Equal(t, http.StatusOK, res.StatusCode, "%s: %s", name, body)
		require.Equal(t, c.want, res.Header.Get("Seen"), name)
		require.Equal(t, "0", res.Trailer.Get("Grpc-Status"), name)
	}
	r := newRig(t, echo)
	r.ports.settings.Protocol = nestbox.PortHTTPS
	res, body := r.do(t, http.MethodGet, "/", nil, "X-API-Key", goodKey)
	require.Equal(t, http.StatusBadGateway, res.StatusCode, body)
}

// TestCORS: pages of other origins may read what somebody has said they may, and
// nothing else.
func TestCORS(t *testing.T) {
	t.Parallel()
	const app, other = "https://app.example", "https://other.example"
	preflight := func(r *rig, origin string) (*http.Response, string) {
		return r.do(t, http.MethodOptions, "/", nil, "Origin", origin,
			"Access-Control-Request-Method", "PUT", "Access-Control-Request-Headers", "content-type,x-api-key")
	}
	allowed := func(res *http.Response) string { return res.Header.Get("Access-Control-Allow-Origin") }
	program := http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		w.Header().Set("Access-Control-Allow-Origin", "https://of.the.program")
		echo(w, req)
	})

	r := newRig(t, program)
	r.url = "http://localhost" // the API
	res, body := preflight(r, app)
	require.Equal(t, app, allowed(res))
	require.Equal(t, "content-type,x-api-key", res.Header.Get("Access-Control-Allow-Headers"))
	require.Empty(t, body, "the API is not asked")
	res, body = r.do(t, http.MethodGet, "/", nil, "Origin", app)
	require.Equal(t, app, allowed(res))
	require.Contains(t, res.Header.Get("Vary"), "Origin")
	require.Empty(t, res.Header.Get("Access-Control-Allow-Credentials"))
	require.Contains(t, body, "the API")
	for _, origin := range []string{other, "null", app + ".evil.example"} {
		res, _ = preflight(r, origin)
		require.Empty(t, allowed(res))
	}

	r = newRig(t, program)
	res, _ = preflight(r, app)
	require.Equal(t, http.StatusUnauthorized, res.StatusCode, "a port of which nobody has said anything")
	require.Empty(t, allowed(res))
	res, _ = r.do(t, http.MethodGet, "/", nil, "Origin", app, "X-API-Key", goodKey)
	require.Equal(t, "https://of.the.program", allowed(res), "what the program says counts")

	r.ports.settings.CORSOrigins = []string{"https://*.example"}
	res, body = preflight(r, other)
	require.Equal(t, http.StatusNoContent, res.StatusCode)
	require.Equal(t, other, allowed(res))
	require.Empty(t, body)
	res, body = r.do(t, http.MethodGet, "/", nil, "Origin", app, "X-API-Key", goodKey)
	require.Equal(t, []string{app}, res.Header.Values("Access-Control-Allow-Origin"))
	require.Equal(t, "true", res.Header.Get("Access-Control-Allow-Credentials"))
	require.Contains(t, body, "Origin: "+app)
	res, _ = r.do(t, http.MethodGet, "/", nil, "Origin", app)
	require.Equal(t, http.StatusUnauthorized, res.StatusCode, "it is still private")
	require.Equal(t, app, allowed(res), "and the page may know")
	res, _ = r.do(t, http.MethodGet, "/", nil, "Origin", app, "Cookie", "nestbox-token="+goodToken)
	require.Equal(t, http.StatusUnauthorized, res.StatusCode, "our cookie is for its own pages")
	r.ports.settings.CORSOrigins = []string{"*"}
	res, _ = r.do(t, http.MethodGet, "/", nil, "Origin", other, "X-API-Key", goodKey)
	require.Equal(t, "*", allowed(res))
	require.Empty(t, res.Header.Get("Access-Control-Allow-Credentials"))
}

// TestEndOfCall: an answer of HTTP/2 that is a header and no more stays so, as a call of
// gRPC that failed needs it.
func TestEndOfCall(t *testing.T) {
	t.Parallel()
	inTwo := func(s *httptest.Server) *httptest.Server {
		s.Config.Protocols = new(http.Protocols)
		s.Config.Protocols.SetUnencryptedHTTP2(true)
		s.Start()
		t.Cleanup(s.Close)
		return s
	}
	program := inTwo(httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Grpc-Status", "5")
	})))
	r := newRig(t, echo)
	r.ports.upstream = program.Listener.Addr().String()
	front := inTwo(httptest.NewUnstartedServer(r.edge))
	transport := &http.Transport{Protocols: new(http.Protocols), DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "tcp", front.Listener.Addr().String())
	}}
	transport.Protocols.SetUnencryptedHTTP2(true)
	t.Cleanup(transport.CloseIdleConnections)
	r.client = &http.Client{Transport: transport}
	for range 200 {
		res, _ := r.do(t, http.MethodPost, "/", nil, "X-API-Key", goodKey, "Content-Type", "application/grpc")
		require.Equal(t, 2, res.ProtoMajor)
		require.Equal(t, "5", res.Header.Get("Grpc-Status"))
		require.Zero(t, res.ContentLength, "the header is not the end")
	}
}
