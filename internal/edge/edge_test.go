package edge

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/cookiejar"
	"net/http/httptest"
	"slices"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/coder/websocket"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/internal/control"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const (
	testCapsule = "cl-0123456789abcdefghijklmno"

	goodKey   = "wrn_00112233445566778899aabbccddeeff"
	goodToken = "a-signed-token"
)

// scriptedPorts lets goodKey and goodToken into every capsule, and dials a
// server of the test.
type scriptedPorts struct {
	upstream string
	authErr  error
	dialErr  error
	checkErr error
	settings nestbox.PortSettings
}

func (p *scriptedPorts) Hold(ctx context.Context, _ control.Entry) (context.Context, func()) {
	return ctx, func() {}
}

func (p *scriptedPorts) Authorize(_ context.Context, _ string, _ uint16, cred control.PortCredential) (control.Entry, error) {
	if p.authErr != nil {
		return control.Entry{}, p.authErr
	}
	if p.settings.Public || slices.Contains(cred.APIKeys, goodKey) || slices.Contains(cred.Tokens, goodToken) {
		return control.Entry{Settings: p.settings}, nil
	}
	return control.Entry{Settings: p.settings}, nestbox.Errorf(nestbox.CodeUnauthenticated, "no valid credential")
}

func (p *scriptedPorts) Dial(ctx context.Context, _ string, _ uint16) (net.Conn, error) {
	if p.dialErr != nil {
		return nil, p.dialErr
	}
	var d net.Dialer
	return d.DialContext(ctx, "tcp", p.upstream)
}

func (p *scriptedPorts) Check(context.Context, string) error { return p.checkErr }

// rig is an edge in front of one program, and a client that finds every host
// name there.
type rig struct {
	ports  *scriptedPorts
	url    string
	client *http.Client
	host   string // of port 3000
	log    *strings.Builder
	edge   *Edge
	open   atomic.Int64 // idle connections of the program
}

// idle returns how many connections the program holds that nobody uses.
func (r *rig) idle() int { return int(r.open.Load()) }

func newRig(t *testing.T, program http.Handler, with ...func(*Outside)) *rig {
	t.Helper()
	r := &rig{}
	upstream := httptest.NewUnstartedServer(program)
	upstream.Config.ConnState = func(_ net.Conn, s http.ConnState) {
		switch s {
		case http.StateIdle:
			r.open.Store(1)
		case http.StateActive, http.StateClosed:
			r.open.Store(0)
		}
	}
	upstream.Start()
	t.Cleanup(upstream.Close)
	ports := &scriptedPorts{upstream: upstream.Listener.Addr().String()}
	log := &strings.Builder{} // read between requests only
	outside := Outside{Domain: "localhost"}
	for _, set := range with {
		set(&outside)
	}
	// The API tells the address of a port.
	api := http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		fmt.Fprint(w, "the API: ", outside.PortURL(req.Context(), testCapsule, 3000, "t/"))
	})
	e := New(Config{Outside: outside, Origins: []string{"https://app.example"}, Ports: ports, API: api, Log: slog.New(slog.NewTextHandler(log, nil))})
	t.Cleanup(e.LetGo)
	front := httptest.NewServer(e)
	t.Cleanup(front.Close)
	addr := front.Listener.Addr().String()
	_, port, err := net.SplitHostPort(addr)
	require.NoError(t, err)
	transport := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "tcp", addr)
	}}
	t.Cleanup(transport.CloseIdleConnections)
	host := "3000-" + testCapsule + ".localhost:" + port
	r.log, r.ports, r.url, r.client, r.host, r.edge = log, ports, "http://"+host, &http.Client{Transport: transport}, host, e
	return r
}

func (r *rig) do(t *testing.T, method, path string, body io.Reader, headers ...string) (*http.Response, string) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), method, r.url+path, body)
	require.NoError(t, err)
	for i := 0; i < len(headers); i += 2 {
		req.Header.Add(headers[i], headers[i+1])
	}
	res, err := r.client.Do(req)
	require.NoError(t, err)
	defer res.Body.Close()
	data, err := io.ReadAll(res.Body)
	require.NoError(t, err)
	return res, string(data)
}

// echo tells what a program in a capsule gets.
var echo = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
	fmt.Fprintf(w, "%s %s host=%s\n", r.Method, r.URL.RequestURI(), r.Host)
	_ = r.Header.Write(w)
})

func TestParseHost(t *testing.T) {
	t.Parallel()
	id := nestbox.NewID(nestbox.PrefixCapsule)
	for _, c := range []struct {
		host string
		port uint16 // 0 = not for a port
		bad  bool
	}{
		{host: "3000-" + id + ".localhost:8080", port: 3000},
		{host: "3000-" + id + ".localhost", port: 3000},
		{host: "65535-" + strings.ToUpper(id) + ".LocalHost.:8080", port: 65535},
		{host: "localhost:8080"},
		{host: "127.0.0.1:8080"},
		{host: "[::1]:8080"},
		{host: "example.com"},
		{host: id + ".localhost"},
		{host: "3000-" + id + ".localhost.example.com"},
		{host: "3000-" + id + ".otherlocalhost"},
		{host: "02280-" + id + ".localhost", bad: true},
		{host: "+80-" + id + ".localhost", bad: true},
		{host: "-" + id + ".localhost", bad: true},
		{host: " 80-" + id + ".localhost", bad: true},
		{host: "0-" + id + ".localhost", bad: true},
		{host: "65536-" + id + ".localhost", bad: true},
		{host: "99999999999-" + id + ".localhost", bad: true},
		{host: "http-" + id + ".localhost", bad: true},
		{host: "80-" + id + "x.localhost", bad: true},
		{host: "80-cl-.localhost", bad: true},
	} {
		got, ok, err := parseHost(c.host, "localhost")
		if c.bad {
			require.Equal(t, nestbox.CodeInvalid, nestbox.CodeOf(err), c.host)
			continue
		}
		require.NoError(t, err, c.host)
		require.Equal(t, c.port != 0, ok, c.host)
		if ok {
			require.Equal(t, target{id, c.port}, got, c.host)
		}
	}
}

func FuzzHost(f *testing.F) {
	f.Add("3000-cl-0123456789abcdefghijklmno.localhost:8080")
	f.Add("02280-cl-0123456789abcdefghijklmno.localhost")
	f.Add("[::1]:80")
	f.Fuzz(func(t *testing.T, host string) {
		got, ok, err := parseHost(host, "localhost")
		if !ok || err != nil {
			return
		}
		// What is taken for a port has one spelling only, but for letter case
		// and what follows the name.
		require.True(t, nestbox.ValidID(nestbox.PrefixCapsule, got.capsule))
		require.True(t, strings.HasPrefix(strings.ToLower(host), fmt.Sprintf("%d-%s.localhost", got.port, got.capsule)))
	})
}

func TestOtherHostsGoToTheAPI(t *testing.T) {
	t.Parallel()
	r := newRig(t, echo)
	r.url = "http://localhost"
	_, body := r.do(t, http.MethodGet, "/v1/capsules", nil)
	require.True(t, strings.HasPrefix(body, "the API"))
}

func TestCredentials(t *testing.T) {
	t.Parallel()
	r := newRig(t, echo)
	for name, c := range map[string]struct {
		path    string
		headers []string
		want    int
	}{
		"none":             {"/", nil, 401},
		"a key":            {"/", []string{"X-API-Key", goodKey}, 200},
		"a wrong key":      {"/", []string{"X-API-Key", "wrn_x"}, 401},
		"a bearer":         {"/", []string{"Authorization", "Bearer " + goodKey}, 200},
		"a foreign bearer": {"/", []string{"Authorization", "Bearer abc"}, 401}, // which is the program's own
		"a token":          {"/?nestbox-token=" + goodToken, nil, 200},
		"a wrong token":    {"/?nestbox-token=x", nil, 401},
		"a cookie":         {"/", []string{"Cookie", "nestbox-token=" + goodToken}, 200},
		"a wrong cookie":   {"/", []string{"Cookie", "nestbox-token=x"}, 401},
		"any one will do":  {"/?nestbox-token=" + goodToken, []string{"X-API-Key", "wrn_x"}, 200},
		"after ;":          {"/?a=1;nestbox-token=" + goodToken, nil, 200},
		"several cookies":  {"/", []string{"Cookie", "nestbox-token=x; nestbox-token=" + goodToken}, 200},

		"a cookie, of its own page":    {"/", []string{"Cookie", "nestbox-token=" + goodToken, "Origin", r.url, "Sec-Fetch-Site", "same-origin"}, 200},
		"a cookie, of the address bar": {"/", []string{"Cookie", "nestbox-token=" + goodToken, "Sec-Fetch-Site", "none"}, 200},
		"a cookie, of another capsule": {"/", []string{"Cookie", "nestbox-token=" + goodToken, "Sec-Fetch-Site", "same-site"}, 401},
		"a cookie, of another site":    {"/", []string{"Cookie", "nestbox-token=" + goodToken, "Sec-Fetch-Site", "cross-site"}, 401},
		"a cookie, of another origin":  {"/", []string{"Cookie", "nestbox-token=" + goodToken, "Origin", "http://3001-x.localhost"}, 401},
		"a cookie, of no origin":       {"/", []string{"Cookie", "nestbox-token=" + goodToken, "Origin", "null"}, 401},
		"a key, of another origin":     {"/", []string{"X-API-Key", goodKey, "Origin", "http://elsewhere.example"}, 200},
	} {
		res, body := r.do(t, http.MethodGet, c.path, nil, c.headers...)
		require.Equal(t, c.want, res.StatusCode, "%s: %s", name, body)
		if c.want == 401 {
			require.Contains(t, body, "nestbox url", "it says how to get in")
		}
	}
}

func TestCredentialsStayOutside(t *testing.T) {
	t.Parallel()
	r := newRig(t, echo)
	_, body := r.do(t, http.MethodGet, "/a%2Fb?x=1&nestbox%2Dtoken="+goodToken+"&y=%20;", nil,
		"X-API-Key", goodKey, "Cookie", `own="a b"; nestbox-token=`+goodToken+`; other=2`, "Authorization", "Basic dTpw")
	require.NotContains(t, body, goodKey)
	require.NotContains(t, body, goodToken)
	require.Contains(t, body, "GET /a%2Fb?x=1&y=%20; host="+r.host, "the rest is byte for byte what was sent")
	require.Contains(t, body, `Cookie: own="a b"; other=2`)
	require.Contains(t, body, "Authorization: Basic dTpw", "the program's own credential passes")
	for name, c := range map[string][]string{
		"bearer":       {"/", "Authorization", "Bearer " + goodKey},
		"odd bearer":   {"/", "Authorization", "  bearer   " + goodKey + " ", "X-API-Key", goodKey},
		"E2B's form":   {"/", "Authorization", "Bearer e2b_" + goodKey[4:], "X-API-Key", goodKey},
		"semicolons":   {"/?a=1;nestbox-token=" + goodToken + ";b=2"},
		"casing":       {"/?NestBox-Token=" + goodToken, "X-API-Key", goodKey},
		"twice":        {"/?nestbox-token=" + goodToken + "&nestbox-token=" + goodToken},
		"referer":      {"/", "Referer", r.url + "/p?x=1&nestbox-token=" + goodToken + "&y=2", "X-API-Key", goodKey},
		"odd referer":  {"/", "Referer", r.url + "/p#nestbox-token=" + goodToken, "X-API-Key", goodKey},
		"many cookies": {"/", "Cookie", "nestbox-token=" + goodToken + "; a=1; nestbox-token =" + goodToken, "Cookie", "nestbox-token=" + goodToken},
		"two keys":     {"/", "X-API-Key", goodKey, "X-API-Key", goodKey},
	} {
		res, body := r.do(t, http.MethodGet, c[0], nil, c[1:]...)
		require.Equal(t, 200, res.StatusCode, name)
		require.NotContains(t, body, goodKey[4:], name)
		require.NotContains(t, body, goodToken, name)
	}
	require.Contains(t, body, "X-Forwarded-Host: "+r.host)
}

func TestBrowserVisit(t *testing.T) {
	t.Parallel()
	r := newRig(t, echo)
	jar, err := cookiejar.New(nil)
	require.NoError(t, err)
	r.client.Jar = jar
	res, body := r.do(t, http.MethodGet, "/page?a=1&nestbox-token="+goodToken, nil, "Accept", "text/html")
	require.Equal(t, 200, res.StatusCode)
	require.NotContains(t, body, goodToken, "the address that it is sent to has no token")
	require.Contains(t, body, `content="0;url=/page?a=1"`)
	require.Equal(t, "no-referrer", res.Header.Get("Referrer-Policy"))
	require.Contains(t, res.Header.Get("Set-Cookie"), "SameSite=Strict")
	_, body = r.do(t, http.MethodGet, "/page?a=1", nil, "Accept", "text/html")
	require.Contains(t, body, "GET /page?a=1 ")
	res, _ = r.do(t, http.MethodGet, "/style.css", nil)
	require.Equal(t, 200, res.StatusCode, "the page's own requests work")
}

func TestVisitCannotBeSentElsewhere(t *testing.T) {
	t.Parallel()
	r := newRig(t, echo)
	for path, want := range map[string]string{
		"//evil.example/?nestbox-token=":         `url=/evil.example/"`,
		`/%22%3E%3Cscript%3E?nestbox-token=`:     `url=/%22%3E%3Cscript%3E"`,
		`/a?x=%22%3E"><script>&'&nestbox-token=`: `url=/a?x=%22%3E&#34;&gt;&lt;script&gt;&amp;%27"`,
	} {
		_, body := r.do(t, http.MethodGet, path+goodToken, nil, "Accept", "text/html")
		require.Contains(t, body, want)
	}
}

// TestAnswersAreConfined: a program cannot reach beyond its own host name.
func TestAnswersAreConfined(t *testing.T) {
	t.Parallel()
	r := newRig(t, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Add("Set-Cookie", "a=1; Domain=localhost; Path=/; HttpOnly")
		w.Header().Add("Set-Cookie", "b=2; path=/ ; dOmAiN = .localhost")
		w.Header().Add("Set-Cookie", "nestbox-token=evil; Path=/")
		w.Header().Add("Set-Cookie", "c=domain")
		w.Header().Set("Clear-Site-Data", `"cookies"`)
	}))
	res, _ := r.do(t, http.MethodGet, "/", nil, "X-API-Key", goodKey)
	require.Equal(t, []string{"a=1; Path=/; HttpOnly", "b=2; path=/", "c=domain"}, res.Header.Values("Set-Cookie"))
	require.Empty(t, res.Header.Get("Clear-Site-Data"))
}

// TestEndlessHeaders: what a program says before its body is bounded.
func TestEndlessHeaders(t *testing.T) {
	t.Parallel()
	r := newRig(t, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		conn, _, err := http.NewResponseController(w).Hijack()
		if err != nil {
			return
		}
		defer conn.Close()
		_, _ = io.WriteString(conn, "HTTP/1.1 200 OK\r\n")
		for err == nil {
			_, err = io.WriteString(conn, "X-A: "+strings.Repeat("b", 1000)+"\r\n")
		}
	}))
	res, _ := r.do(t, http.MethodGet, "/", nil, "X-API-Key", goodKey)
	require.Equal(t, http.StatusBadGateway, res.StatusCode)
}

func TestRefusals(t *testing.T) {
	t.Parallel()
	for code, want := range map[nestbox.Code]int{
		nestbox.CodeNotFound: 404, nestbox.CodeDenied: 403, nestbox.CodeInvalidState: 409,
		nestbox.CodeUnavailable: 503, nestbox.CodeInternal: 500,
	} {
		r := newRig(t, echo)
		r.ports.authErr = nestbox.Errorf(code, "because of %s", code)
		res, body := r.do(t, http.MethodGet, "/", nil)
		require.Equal(t, want, res.StatusCode)
		require.Equal(t, code == nestbox.CodeInternal, !strings.Contains(body, "because"), "what is internal is not shown: %s", body)
	}
}

func TestNothingListens(t *testing.T) {
	t.Parallel()
	r := newRig(t, echo)
	r.ports.dialErr = nestbox.Errorf(nestbox.CodeUnavailable, "nothing listens on port 3000 in the capsule")
	res, body := r.do(t, http.MethodGet, "/", nil, "X-API-Key", goodKey)
	require.Equal(t, 502, res.StatusCode)
	require.Contains(t, body, "nothing listens on port 3000")
}

// TestBrokenConnection: a connection that breaks before the answer is the program's
// fault, unless its capsule has come to its end.
func TestBrokenConnection(t *testing.T) {
	t.Parallel()
	r := newRig(t, http.HandlerFunc(func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }))
	res, body := r.do(t, http.MethodGet, "/", nil, "X-API-Key", goodKey)
	require.Equal(t, 502, res.StatusCode)
	require.Contains(t, body, "the program on this port broke the connection")
	require.NotEmpty(t, res.Header.Get("X-Request-Id"))
	require.Contains(t, r.log.String(), "request_id="+res.Header.Get("X-Request-Id"))

	r.ports.checkErr = nestbox.StateError.NotRunning("out of memory")
	res, body = r.do(t, http.MethodGet, "/", nil, "X-API-Key", goodKey)
	require.Equal(t, 409, res.StatusCode)
	require.Equal(t, "capsule died: out of memory\n", body)
}

func TestWebSocket(t *testing.T) {
	t.Parallel()
	r := newRig(t, http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		conn, err := websocket.Accept(w, req, nil)
		if err != nil {
			return
		}
		defer conn.CloseNow()
		kind, data, err := conn.Read(req.Context())
		if err == nil {
			_ = conn.Write(req.Context(), kind, bytes.ToUpper(data))
		}
		_ = conn.Close(websocket.StatusNormalClosure, "")
	}))
	conn, _, err := websocket.Dial(t.Context(), "ws"+strings.TrimPrefix(r.url, "http")+"/ws?nestbox-token="+goodToken, &websocket.DialOptions{HTTPClient: r.client})
	require.NoError(t, err)
	defer conn.CloseNow()
	require.NoError(t, conn.Write(t.Context(), websocket.MessageText, []byte("nest")))
	_, data, err := conn.Read(t.Context())
	require.NoError(t, err)
	require.Equal(t, "NEST", string(data))
}

// TestStreams sends a body piece by piece, each only after the program's answer
// to the one before: nothing is held back on the way, in either direction.
func TestStreams(t *testing.T) {
	t.Parallel()
	r := newRig(t, http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		rc := http.NewResponseController(w)
		_ = rc.EnableFullDuplex()
		_ = rc.Flush()
		buf := make([]byte, 100)
		for {
			n, err := req.Body.Read(buf)
			_, _ = w.Write(bytes.ToUpper(buf[:n]))
			_ = rc.Flush()
			if err != nil {
				return
			}
		}
	}))
	body, feed := io.Pipe()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, r.url+"/", body)
	require.NoError(t, err)
	req.Header.Set("X-API-Key", goodKey)
	go func() { _, _ = feed.Write([]byte("one")) }()
	res, err := r.client.Do(req)
	require.NoError(t, err)
	defer res.Body.Close()
	for i, want := range []string{"ONE", "TWO", "THREE"} {
		if i > 0 {
			_, err := feed.Write([]byte(strings.ToLower(want)))
			require.NoError(t, err)
		}
		got := make([]byte, len(want))
		_, err := io.ReadFull(res.Body, got)
		require.NoError(t, err)
		require.Equal(t, want, string(got))
	}
	require.NoError(t, feed.Close())
}

func TestLargeBodies(t *testing.T) {
	t.Parallel()
	const size = 32 << 20
	r := newRig(t, http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		n, _ := io.Copy(io.Discard, req.Body)
		_, _ = io.CopyN(w, zeros{}, n)
	}))
	req, err := http.NewRequestWithContext(t.Context(), http.MethodPut, r.url+"/", io.LimitReader(zeros{}, size))
	require.NoError(t, err)
	req.Header.Set("X-API-Key", goodKey)
	res, err := r.client.Do(req)
	require.NoError(t, err)
	defer res.Body.Close()
	n, err := io.Copy(io.Discard, res.Body)
	require.NoError(t, err)
	require.EqualValues(t, size, n)
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }
