package edge

import (
	"net/http"
	"net/netip"
	"net/url"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// TestPortURL: the address that is told works where its client is.
func TestPortURL(t *testing.T) {
	t.Parallel()
	const byName, byPath = "3000-" + testCapsule + ".", "/v1/capsules/" + testCapsule + "/ports/3000/proxy/?nestbox-token=t%2F"
	for name, c := range map[string]struct {
		base, domain string
		everywhere   bool
		host         string // of the request
		forwarded    string // its scheme, by a trusted proxy
		want         string
	}{
		"this machine":               {host: "localhost:8080", want: "http://" + byName + "localhost:8080/?nestbox-token=t%2F"},
		"by its address":             {host: "127.0.0.1:8080", want: "http://" + byName + "localhost:8080/?nestbox-token=t%2F"},
		"the other":                  {host: "[::1]:80", want: "http://" + byName + "localhost/?nestbox-token=t%2F"},
		"another machine":            {host: "192.0.2.7:8080", want: "http://192.0.2.7:8080" + byPath},
		"a foreign name":             {host: "box.lan", want: "http://box.lan" + byPath},
		"a domain":                   {domain: "boxes.example", everywhere: true, host: "192.0.2.7:8080", want: "http://" + byName + "boxes.example:8080/?nestbox-token=t%2F"},
		"behind TLS":                 {domain: "boxes.example", everywhere: true, host: "boxes.example", forwarded: "https", want: "https://" + byName + "boxes.example/?nestbox-token=t%2F"},
		"behind TLS, odd port":       {domain: "boxes.example", everywhere: true, host: "boxes.example:8443", forwarded: "https", want: "https://" + byName + "boxes.example:8443/?nestbox-token=t%2F"},
		"as the operator says":       {base: "https://api.boxes.example", domain: "boxes.example", everywhere: true, host: "10.0.0.1:8080", want: "https://" + byName + "boxes.example/?nestbox-token=t%2F"},
		"an address of the operator": {base: "https://192.0.2.7:8443", host: "localhost:8080", want: "https://192.0.2.7:8443" + byPath},
	} {
		r := newRig(t, echo, func(o *Outside) {
			if c.base != "" {
				o.Base, _ = url.Parse(c.base)
			}
			if c.domain != "" {
				o.Domain, o.Everywhere = c.domain, c.everywhere
			}
			o.Trusted = []netip.Prefix{netip.MustParsePrefix("127.0.0.0/8")}
		})
		r.url = "http://" + c.host
		headers := []string{}
		if c.forwarded != "" {
			headers = []string{"X-Forwarded-Proto", c.forwarded}
		}
		_, body := r.do(t, http.MethodGet, "/", nil, headers...)
		require.Equal(t, "the API: "+c.want, body, name)
	}
}

// TestForwarded: a program sees who asked and how, and from nobody's word but that of
// proxies which the operator trusts.
func TestForwarded(t *testing.T) {
	t.Parallel()
	spoofed := []string{
		"X-API-Key", goodKey, "X-Forwarded-For", "203.0.113.9, 198.51.100.4:1234, 10.1.1.1", "X-Forwarded-Proto", "https",
		"X-Forwarded-Host", "elsewhere.example", "X-Real-Ip", "203.0.113.9", "Forwarded", "for=203.0.113.9", "X-Forwarded-Prefix", "/x", "X-Forwarded-Port", "1",
	}
	r := newRig(t, echo)
	_, body := r.do(t, http.MethodGet, "/", nil, spoofed...)
	require.Contains(t, body, "X-Forwarded-For: 127.0.0.1\r\n")
	require.Contains(t, body, "X-Forwarded-Proto: http\r\n")
	require.Contains(t, body, "X-Forwarded-Host: "+r.host+"\r\n")
	for _, not := range []string{"203.0.113.9", "elsewhere", "X-Real-Ip", "Prefix", "Forwarded-Port"} {
		require.NotContains(t, body, not)
	}

	trusting := func(o *Outside) {
		o.Trusted = []netip.Prefix{netip.MustParsePrefix("127.0.0.0/8"), netip.MustParsePrefix("10.0.0.0/8")}
	}
	r = newRig(t, echo, trusting)
	r.url = "http://backend.internal"
	spoofed[7] = r.host
	_, body = r.do(t, http.MethodGet, "/", nil, spoofed...)
	require.Contains(t, body, "host="+r.host, "the proxy says which host was asked")
	require.Contains(t, body, "X-Forwarded-For: 198.51.100.4\r\n", "the last one that is no proxy")
	require.Contains(t, body, "X-Forwarded-Proto: https\r\n")
	for _, wrong := range [][]string{{"X-Forwarded-Proto", "gopher"}, {"X-Forwarded-Host", "a b/c"}} {
		res, _ := r.do(t, http.MethodGet, "/", nil, wrong...)
		require.Equal(t, http.StatusBadRequest, res.StatusCode)
	}
	_, body = r.do(t, http.MethodGet, "/", nil, "X-API-Key", goodKey, "X-Forwarded-Host", r.host, "X-Forwarded-For", "garbage, 10.1.1.1")
	require.Contains(t, body, "X-Forwarded-For: 10.1.1.1\r\n")

	r = newRig(t, echo, func(o *Outside) { o.Base, _ = url.Parse("https://box.example") })
	_, body = r.do(t, http.MethodGet, "/", nil, "X-API-Key", goodKey)
	require.Contains(t, body, "X-Forwarded-Proto: https\r\n", "there is no other address")
}

// TestFramedVisit: in a frame of another site the cookie is one of that frame alone.
func TestFramedVisit(t *testing.T) {
	t.Parallel()
	r := newRig(t, echo, func(o *Outside) { o.Base, _ = url.Parse("https://localhost") })
	visit := func(dest string) string {
		res, _ := r.do(t, http.MethodGet, "/?nestbox-token="+goodToken, nil, "Accept", "text/html", "Sec-Fetch-Dest", dest, "Sec-Fetch-Site", "cross-site")
		require.Equal(t, http.StatusOK, res.StatusCode)
		require.NotContains(t, res.Header.Get("Content-Security-Policy"), "frame-ancestors")
		return res.Header.Get("Set-Cookie")
	}
	framed := visit("iframe")
	for _, want := range []string{"Secure", "Partitioned", "SameSite=None", "HttpOnly"} {
		require.Contains(t, framed, want)
	}
	top := visit("document")
	require.NotContains(t, top, "Partitioned")
	require.Contains(t, top, "SameSite=Strict")
	require.Contains(t, top, "Secure")
}

// TestPathForm: a port is reached by a path too, where host names do not lead here.
func TestPathForm(t *testing.T) {
	t.Parallel()
	const prefix = "/v1/capsules/" + testCapsule + "/ports/3000/proxy"
	r := newRig(t, http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		w.Header().Add("Set-Cookie", "a=1; Domain=localhost; Path=/x; HttpOnly")
		w.Header().Add("Set-Cookie", "b=2")
		w.Header().Set(errorHeader, "made up")
		if to := req.URL.Query().Get("to"); to != "" {
			w.Header().Set("Location", to)
			w.WriteHeader(http.StatusFound)
		}
		echo(w, req)
	}))
	r.url = "http://192.0.2.7:8080"
	r.client.CheckRedirect = func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }
	key := []string{"X-API-Key", goodKey}
	res, body := r.do(t, http.MethodPost, prefix+"/a%2Fb/c?x=1", strings.NewReader("body"), key...)
	require.Equal(t, http.StatusOK, res.StatusCode, body)
	require.Contains(t, body, "POST /a%2Fb/c?x=1 host=192.0.2.7:8080")
	require.Contains(t, body, "X-Forwarded-Prefix: "+prefix+"\r\n")
	require.Contains(t, res.Header.Get("Content-Security-Policy"), "sandbox", "its pages are of no origin")
	require.NotContains(t, res.Header.Get("Content-Security-Policy"), "allow-same-origin")
	require.Equal(t, []string{"a=1; HttpOnly; Path=" + prefix + "/x", "b=2; Path=" + prefix + "/"}, res.Header.Values("Set-Cookie"))
	require.Empty(t, res.Header.Get(errorHeader))

	for to, want := range map[string]string{
		"/login?a=b":                   prefix + "/login?a=b",
		"http://192.0.2.7:8080/login":  prefix + "/login",
		"login":                        "login",
		"http://127.0.0.1:3000/login":  prefix + "/login",
		prefix + "/login":              prefix + "/login",
		"https://elsewhere.example/in": "https://elsewhere.example/in",
	} {
		res, _ := r.do(t, http.MethodGet, prefix+"/?to="+url.QueryEscape(to), nil, key...)
		require.Equal(t, want, res.Header.Get("Location"))
	}
	res, _ = r.do(t, http.MethodGet, prefix+"?a=1", nil, key...)
	require.Equal(t, http.StatusPermanentRedirect, res.StatusCode)
	require.Equal(t, prefix+"/?a=1", res.Request.URL.ResolveReference(mustParse(t, res.Header.Get("Location"))).RequestURI())

	for name, c := range map[string]struct {
		path    string
		headers []string
		want    int
	}{
		"a token":              {prefix + "/?nestbox-token=" + goodToken, []string{"Accept", "text/html"}, 200},
		"nothing":              {prefix + "/", nil, 401},
		"a cookie":             {prefix + "/", []string{"Cookie", "nestbox-token=" + goodToken}, 401},
		"an odd port":          {strings.Replace(prefix, "3000", "03000", 1) + "/", key, 400},
		"an odd capsule":       {strings.Replace(prefix, testCapsule, "cl-1", 1) + "/", key, 400},
		"what only looks like": {prefix + "ed/", key, 200}, // the API's
	} {
		res, body := r.do(t, http.MethodGet, c.path, nil, c.headers...)
		require.Equal(t, c.want, res.StatusCode, "%s: %s", name, body)
		if c.want >= 400 {
			require.NotEmpty(t, res.Header.Get(errorHeader), "it shows who answers")
		}
		require.Equal(t, name == "what only looks like", strings.HasPrefix(body, "the API"), name)
	}
}

func mustParse(t *testing.T, text string) *url.URL {
	t.Helper()
	u, err := url.Parse(text)
	require.NoError(t, err)
	return u
}

// TestHeaderForm: clients with one base URL for all name the target in headers.
func TestHeaderForm(t *testing.T) {
	t.Parallel()
	r := newRig(t, echo)
	r.url = "http://192.0.2.7:8080"
	res, body := r.do(t, http.MethodGet, "/a?b=c", nil, "E2b-Sandbox-Id", testCapsule, "E2b-Sandbox-Port", "3000", "X-API-Key", goodKey)
	require.Equal(t, http.StatusOK, res.StatusCode, body)
	require.Contains(t, body, "GET /a?b=c ")
	require.NotContains(t, body, "E2b-")
	for name, headers := range map[string][]string{
		"no port":    {"E2b-Sandbox-Id", testCapsule},
		"no capsule": {"E2b-Sandbox-Port", "3000"},
		"two":        {"E2b-Sandbox-Id", testCapsule, "E2b-Sandbox-Id", testCapsule, "E2b-Sandbox-Port", "3000"},
		"garbage":    {"E2b-Sandbox-Id", "x", "E2b-Sandbox-Port", "3000"},
		"odd port":   {"E2b-Sandbox-Id", testCapsule, "E2b-Sandbox-Port", "03000"},
	} {
		res, _ := r.do(t, http.MethodGet, "/", nil, append(headers, "X-API-Key", goodKey)...)
		require.Equal(t, http.StatusBadRequest, res.StatusCode, name)
	}
	res, _ = r.do(t, http.MethodGet, "/", nil, "E2b-Sandbox-Id", testCapsule, "E2b-Sandbox-Port", "3000")
	require.Equal(t, http.StatusUnauthorized, res.StatusCode)
	res, _ = r.do(t, http.MethodGet, "/", nil, "E2b-Sandbox-Id", testCapsule, "E2b-Sandbox-Port", "3000", "Cookie", "nestbox-token="+goodToken)
	require.Equal(t, http.StatusUnauthorized, res.StatusCode, "cookies are of an origin of its own")
}
