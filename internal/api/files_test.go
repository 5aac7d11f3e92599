package api

import (
	"context"
	"encoding/json"
	"io"
	"net/http"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/nestbox/nestbox"
)

const (
	boundary = "b0undary"
	formType = "multipart/form-data; boundary=" + boundary
)

func field(name, value string) string {
	return "--" + boundary + "\r\nContent-Disposition: form-data; name=\"" + name + "\"\r\n\r\n" + value + "\r\n"
}

func file(content string) string {
	return "--" + boundary + "\r\nContent-Disposition: form-data; name=\"file\"; filename=\"f\"\r\n" +
		"Content-Type: application/octet-stream\r\n\r\n" + content + "\r\n"
}

func form(parts ...string) string { return strings.Join(parts, "") + "--" + boundary + "--\r\n" }

func small(c *Config) { c.MaxUploadBytes = 1 << 20 }

func TestWriteForm(t *testing.T) {
	t.Parallel()
	big := strings.Repeat("x", 1<<20)
	whole := form(field("path", "/f"), file("new"))
	for name, c := range map[string]struct {
		body   string
		stream bool // to files/stream/write
		status int
		says   string
		want   string
	}{
		"path first":                {whole, false, 204, "", "new"},
		"file first":                {form(file("new"), field("path", "/f")), false, 204, "", "new"},
		"stream, path first":        {whole, true, 204, "", "new"},
		"stream, file first":        {form(file("new"), field("path", "/f")), true, 204, "", "new"},
		"empty":                     {form(field("path", "/f"), file("")), false, 204, "", ""},
		"at the limit":              {form(field("path", "/f"), file(big)), false, 204, "", big},
		"over the limit":            {form(field("path", "/f"), file(big+"x")), false, 413, "file exceeds 1 MB limit", "old"},
		"far over the limit":        {form(field("path", "/f"), file(big+big+big)), false, 413, "file exceeds 1 MB limit", "old"},
		"over, file first":          {form(file(big+"x"), field("path", "/f")), false, 413, "file exceeds 1 MB limit", "old"},
		"stream has no limit":       {form(field("path", "/f"), file(big+big)), true, 204, "", big + big},
		"stream, over and first":    {form(file(big+"x"), field("path", "/f")), true, 413, "file exceeds 1 MB limit", "old"},
		"no path":                   {form(file("new")), false, 400, "path is required", "old"},
		"no file":                   {form(field("path", "/f")), false, 400, "file is required", "old"},
		"nothing":                   {form(), false, 400, "path is required", "old"},
		"relative path":             {form(field("path", "f"), file("new")), false, 400, "not absolute", "old"},
		"relative path last":        {form(file("new"), field("path", "f")), false, 400, "not absolute", "old"},
		"long path":                 {form(field("path", "/"+strings.Repeat("a", 9999)), file("new")), false, 400, "longer than", "old"},
		"two paths":                 {form(field("path", "/f"), field("path", "/g"), file("new")), false, 400, "twice", "old"},
		"two files":                 {form(file("new"), file("newer"), field("path", "/f")), false, 400, "twice", "old"},
		"another field":             {form(field("path", "/f"), field("owner", "me"), file("new")), false, 400, `"owner"`, "old"},
		"something after":           {form(field("path", "/f"), file("new"), field("path", "/g")), false, 400, "unexpected form field", "old"},
		"cut in the file":           {strings.TrimSuffix(whole, "w\r\n--"+boundary+"--\r\n"), false, 400, "upload broke off", "old"},
		"cut before the end":        {strings.TrimSuffix(whole, "--"+boundary+"--\r\n"), false, 400, "broke off", "old"},
		"cut, file first":           {strings.TrimSuffix(form(file("new"), field("path", "/f")), "--"+boundary+"--\r\n"), false, 400, "cut or malformed", "old"},
		"no form":                   {"new", false, 400, "path is required", "old"},
		"no body":                   {"", false, 400, "path is required", "old"},
		"a file's part has no name": {strings.Replace(whole, `; name="file"`, "", 1), false, 400, "unexpected form field", "old"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := newRig(t, small)
			r.guest.files.content["/f"] = "old"
			path := "/v1/capsules/{id}/files/write"
			if c.stream {
				path = "/v1/capsules/{id}/files/stream/write"
			}
			got := r.request(http.MethodPost, path, strings.NewReader(c.body), "Content-Type", formType)
			if c.status == http.StatusNoContent {
				got.expect(c.status)
			} else {
				code := map[int]string{400: "invalid_request", 413: "too_large"}[c.status]
				require.Contains(t, got.fails(c.status, code), c.says)
			}
			content, _ := r.guest.files.get("/f")
			require.Equal(t, c.want, content)
			require.Len(t, r.guest.files.content, 1)
		})
	}
}

func TestSpoolLeavesNothing(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	r := newRig(t, small, func(c *Config) { c.SpoolDir, c.MaxSpools = dir, 1 })
	for range 3 { // more than may spool at a time
		r.request(http.MethodPost, "/v1/capsules/{id}/files/write", strings.NewReader(form(file("new"), field("path", "/f"))), "Content-Type", formType).
			expect(http.StatusNoContent)
	}
	left, err := os.ReadDir(dir)
	require.NoError(t, err)
	require.Empty(t, left)
}

func TestPlainUpload(t *testing.T) {
	t.Parallel()
	r := newRig(t, small)
	content := strings.Repeat("\x00\xffx", 1<<20) // no limit but the disk's
	r.request(http.MethodPut, "/v1/capsules/{id}/files?path=/a%20b&mode=0755&user=user", strings.NewReader(content)).expect(http.StatusNoContent)
	got, _ := r.guest.files.get("/a b")
	require.Equal(t, content, got)
	for _, how := range []*answer{
		r.request(http.MethodGet, "/v1/capsules/{id}/files?path=/a%20b", nil),
		r.call(http.MethodPost, "/v1/capsules/{id}/files/read", `{"path":"/a b"}`),
	} {
		require.Equal(t, content, string(how.expect(http.StatusOK).body))
		require.Equal(t, int64(len(content)), how.res.ContentLength)
		require.Equal(t, "application/octet-stream", how.res.Header.Get("Content-Type"))
	}
	streamed := r.call(http.MethodPost, "/v1/capsules/{id}/files/stream/read", `{"path":"/a b"}`).expect(http.StatusOK)
	require.Equal(t, content, string(streamed.body))
	require.Equal(t, int64(-1), streamed.res.ContentLength)
}

func TestUploadThatBreaksOff(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	r.guest.files.content["/f"] = "old"
	pr, pw := io.Pipe()
	req := r.newRequest(http.MethodPut, "/v1/capsules/{id}/files?path=/f", pr)
	done := make(chan error)
	go func() {
		res, err := r.server.Client().Do(req)
		if err == nil {
			err = res.Body.Close()
		}
		done <- err
	}()
	_, err := pw.Write([]byte("half"))
	require.NoError(t, err)
	require.NoError(t, pw.CloseWithError(io.ErrClosedPipe))
	require.Error(t, <-done)
	require.Eventually(t, func() bool { return strings.Contains(r.log.String(), "status=400") }, patience, time.Millisecond)
	content, _ := r.guest.files.get("/f")
	require.Equal(t, "old", content)
}

func TestFileThatIsNotWhatItSays(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	r.guest.files.content["/proc/cpuinfo"] = "cpu"
	r.guest.files.content["/shrinks"] = "short"
	require.Equal(t, "cpu", string(r.request(http.MethodGet, "/v1/capsules/{id}/files?path=/proc/cpuinfo", nil).expect(http.StatusOK).body))
	res, err := r.server.Client().Do(r.newRequest(http.MethodGet, "/v1/capsules/{id}/files?path=/shrinks", nil))
	if err == nil { // else it broke off before its first byte came
		_, err = io.ReadAll(res.Body)
		require.NoError(t, res.Body.Close())
	}
	require.Error(t, err)
}

func TestDirectories(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	mkdir := func() *answer { return r.call(http.MethodPost, "/v1/capsules/{id}/files/mkdir", `{"path":"/src"}`) }
	var one oneFile
	mkdir().expect(http.StatusOK).decode(&one)
	require.Equal(t, "/src", one.Entry.Path)
	mkdir().fails(http.StatusConflict, "conflict")
	r.guest.files.content["/dev/null"] = ""
	var list fileList
	r.call(http.MethodPost, "/v1/capsules/{id}/files/list", `{"path":"/dev"}`).expect(http.StatusOK).decode(&list)
	require.Equal(t, []fileEntry{{
		Name: "null", Path: "/dev/null", Type: "file", Mode: 0o4755, Permissions: "urwxr-xr-x", Owner: "root", Group: "root", ModifiedAt: 1700000000,
	}}, list.Entries)
	got := r.call(http.MethodPost, "/v1/capsules/{id}/files/list", `{"path":"/empty"}`).expect(http.StatusOK)
	require.JSONEq(t, `{"entries":[]}`, string(got.body))
	r.call(http.MethodPost, "/v1/capsules/{id}/files/stat", `{"path":"/src"}`).expect(http.StatusOK).decode(&one)
	for range 2 { // also when it is gone
		r.call(http.MethodPost, "/v1/capsules/{id}/files/remove", `{"path":"/src"}`).expect(http.StatusNoContent)
	}
}

func TestPermissions(t *testing.T) {
	t.Parallel()
	for want, f := range map[string]nestbox.FileInfo{
		"-rw-r--r--":  {Mode: 0o644, Type: nestbox.FileTypeFile},
		"dtrwxrwxrwx": {Mode: 0o1777, Type: nestbox.FileTypeDirectory},
		"Lrwxrwxrwx":  {Mode: 0o777, Type: nestbox.FileTypeSymlink},
	} {
		require.Equal(t, want, permissions(f))
	}
}

func TestPortURL(t *testing.T) {
	t.Parallel()
	r := newRig(t, func(c *Config) {
		c.PortURL = func(_ context.Context, id string, port uint16, token string) string {
			return "http://80-" + id + ".localhost/?nestbox_token=" + token
		}
	})
	var out portURL
	r.call(http.MethodPost, "/v1/capsules/{id}/ports/80/url", `{"expires_sec":60}`).expect(http.StatusOK).decode(&out)
	require.NotEmpty(t, out.Token)
	require.Equal(t, "nestbox_token="+out.Token, out.Query)
	require.Equal(t, "http://80-"+r.capsule+".localhost/?nestbox_token="+out.Token, out.URL)
	r.call(http.MethodPost, "/v1/capsules/{id}/ports/80/url", "").expect(http.StatusOK)
	b, err := json.Marshal(portURL{})
	require.NoError(t, err)
	require.NotContains(t, string(b), "url")
}

func TestPortSettings(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	const path = "/v1/capsules/{id}/ports"
	var one portSettings
	r.call(http.MethodGet, path+"/5173", "").expect(http.StatusOK).decode(&one)
	require.Equal(t, portSettings{Port: 5173, CORSOrigins: []string{}}, one, "nothing is set")
	r.call(http.MethodPut, path+"/5173", `{"public":true,"host_header":"localhost:5173","protocol":"h2c","cors_origins":["https://app.example"]}`).expect(http.StatusOK).decode(&one)
	want := portSettings{Port: 5173, Public: true, HostHeader: "localhost:5173", Protocol: "h2c", CORSOrigins: []string{"https://app.example"}}
	require.Equal(t, want, one)
	var list []portSettings
	r.call(http.MethodGet, path, "").expect(http.StatusOK).decode(&list)
	require.Equal(t, []portSettings{want}, list)
	var shown capsule
	r.call(http.MethodGet, "/v1/capsules/{id}", "").expect(http.StatusOK).decode(&shown)
	require.Equal(t, list, shown.Ports)
	for _, bad := range []string{`{"protocol":"ftp"}`, `{"host_header":"a/b"}`, `{"host_header":"localhost:0"}`, `{"cors_origins":["app.example"]}`, `{"cors_origins":["https://app.example/x"]}`, `{"publik":true}`, `[]`} {
		r.call(http.MethodPut, path+"/5173", bad).fails(http.StatusBadRequest, "invalid_request")
	}
	r.call(http.MethodPut, path+"/49983", `{"public":true}`).fails(http.StatusForbidden, "forbidden")
	r.call(http.MethodPut, path+"/05173", `{}`).fails(http.StatusBadRequest, "invalid_request")
	r.call(http.MethodGet, path+"/5173", "").expect(http.StatusOK).decode(&one)
	require.Equal(t, want, one, "what is refused changes nothing")
	for range 2 {
		r.call(http.MethodDelete, path+"/5173", "").expect(http.StatusNoContent)
	}
	require.JSONEq(t, `[]`, string(r.call(http.MethodGet, path, "").expect(http.StatusOK).body))
}

// FuzzParsePort: a port has one spelling.
func FuzzParsePort(f *testing.F) {
	for _, s := range []string{"", "0", "1", "80", "65535", "65536", "080", "+80", " 80", "80 ", "8_0", "0x50", "٨٠"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		port, err := parsePort(s)
		if err != nil {
			require.Equal(t, nestbox.CodeInvalid, nestbox.CodeOf(err))
			return
		}
		require.NotZero(t, port)
		require.Equal(t, s, strconv.Itoa(int(port)))
	})
}

// TestSlowBodies: what is wrong is said without addresses of ours.
func TestSlowBodies(t *testing.T) {
	t.Parallel()
	r := newRig(t, func(c *Config) { c.BodyTimeout = 50 * time.Millisecond })
	for path, method := range map[string]string{
		"/v1/capsules/{id}/exec":               http.MethodPost,
		"/v1/capsules/{id}/files?path=/root/a": http.MethodPut,
		"/v1/capsules/{id}/processes/x/stdin":  http.MethodPost,
		"/v1/capsules/{id}/files/write":        http.MethodPost,
		"/v1/capsules/{id}/files/stream/write": http.MethodPost,
		"/v1/capsules/{id}/files/mkdir":        http.MethodPost,
		"/v1/capsules/{id}/ports/80/url":       http.MethodPost,
		"/v1/capsules/{id}/processes/x/signal": http.MethodPost,
		"/v1/capsules":                         http.MethodPost,
	} {
		body, writer := io.Pipe()
		go func() { _, _ = writer.Write([]byte("--x\r\n")) }()
		media := "application/json"
		if strings.HasSuffix(path, "write") {
			media = "multipart/form-data; boundary=x"
		}
		a := r.request(method, path, body, "Content-Type", media)
		require.Contains(t, []int{http.StatusBadRequest, http.StatusNotFound}, a.res.StatusCode, "%s: %s", path, a.body)
		require.NotContains(t, string(a.body), "127.0.0.1", path)
		require.NoError(t, writer.Close())
	}
}

// TestUnreadableFile: what fails before its first byte is answered with the reason.
func TestUnreadableFile(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	for _, path := range []string{"/proc/1/mem", "/empty"} {
		r.guest.files.put(path, "")
	}
	got := r.call(http.MethodGet, "/v1/capsules/{id}/files?path=/proc/1/mem", "").expect(http.StatusBadGateway)
	require.JSONEq(t, `{"error":{"code":"agent_error","message":"/proc/1/mem: input/output error"}}`, string(got.body))
	got = r.call(http.MethodPost, "/v1/capsules/{id}/files/read", `{"path":"/proc/1/mem"}`).expect(http.StatusBadGateway)
	require.Contains(t, string(got.body), "input/output error")
	require.Empty(t, r.call(http.MethodGet, "/v1/capsules/{id}/files?path=/empty", "").expect(http.StatusOK).body)
}
