package api

import (
	"net/http"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestDownloadParts(t *testing.T) {
	t.Parallel()
	const size = 5 << 20
	content := strings.Repeat("0123456789abcdef", size/16)
	r := newRig(t)
	r.guest.files.content["/f"] = content
	r.guest.files.content["/empty"] = ""
	r.guest.files.content["/proc/cpuinfo"] = "processor: 0"
	const path = "/v1/capsules/{id}/files?path="
	whole := r.request(http.MethodGet, path+"/f", nil).expect(http.StatusOK)
	require.Equal(t, content, string(whole.body))
	require.Equal(t, "bytes", whole.res.Header.Get("Accept-Ranges"))
	etag, modified := whole.res.Header.Get("ETag"), whole.res.Header.Get("Last-Modified")
	require.NotEmpty(t, etag)
	require.Equal(t, "Tue, 14 Nov 2023 22:13:20 GMT", modified)
	for name, c := range map[string]struct {
		path    string
		header  []string
		status  int
		content string
	}{
		"begin":              {"/f", []string{"Range", "bytes=0-9"}, 206, content[:10]},
		"middle":             {"/f", []string{"Range", "bytes=4000001-4000002"}, 206, content[4000001:4000003]},
		"rest":               {"/f", []string{"Range", "bytes=3145728-"}, 206, content[3145728:]},
		"tail":               {"/f", []string{"Range", "bytes=-3"}, 206, "def"},
		"behind":             {"/f", []string{"Range", "bytes=5242880-"}, 416, ""},
		"of nothing":         {"/empty", []string{"Range", "bytes=1-"}, 200, ""},
		"no range":           {"/f", []string{"Range", "bytes=x"}, 416, ""},
		"another unit":       {"/f", []string{"Range", "lines=1-2"}, 416, ""},
		"if it is the same":  {"/f", []string{"Range", "bytes=1-2", "If-Range", etag}, 206, content[1:3]},
		"if it were another": {"/f", []string{"Range", "bytes=1-2", "If-Range", `"1-2"`}, 200, content},
		"not new":            {"/f", []string{"If-None-Match", etag}, 304, ""},
		"not newer":          {"/f", []string{"If-Modified-Since", modified}, 304, ""},
		"new":                {"/f", []string{"If-None-Match", `"1-2"`}, 200, content},
		"matches":            {"/f", []string{"If-Match", `"1-2", ` + etag}, 200, content},
		"does not match":     {"/f", []string{"If-Match", `"1-2"`}, 412, ""},
		"was newer":          {"/f", []string{"If-Unmodified-Since", "Tue, 14 Nov 2023 22:13:19 GMT"}, 412, ""},
		"of the kernel's":    {"/proc/cpuinfo", []string{"Range", "bytes=1-2"}, 200, "processor: 0"},
		"empty":              {"/empty", nil, 200, ""},
	} {
		got := r.request(http.MethodGet, path+c.path, nil, c.header...)
		switch c.status {
		case http.StatusPreconditionFailed:
			require.NotEmpty(t, got.fails(c.status, "precondition_failed"), name)
		case http.StatusRequestedRangeNotSatisfiable:
			require.NotEmpty(t, got.fails(c.status, "invalid_request"), name)
		default:
			require.Equal(t, c.content, string(got.expect(c.status).body), name)
		}
		head := r.request(http.MethodHead, path+c.path, nil, c.header...).expect(c.status)
		require.Empty(t, head.body)
		if c.status < 400 {
			for _, name := range []string{"Content-Length", "Content-Range", "ETag", "Last-Modified", "Accept-Ranges"} {
				require.Equal(t, got.res.Header.Get(name), head.res.Header.Get(name), name)
			}
		}
	}
	several := r.request(http.MethodGet, path+"/f", nil, "Range", "bytes=1-2,4000001-4000002,0-0").expect(http.StatusPartialContent)
	require.Contains(t, several.res.Header.Get("Content-Type"), "multipart/byteranges")
	require.Contains(t, string(several.body), "Content-Range: bytes 4000001-4000002/5242880\r\nContent-Type: application/octet-stream\r\n\r\n12\r\n")
	r.request(http.MethodHead, path+"/missing", nil).expect(http.StatusNotFound)
}

func TestUploadOptions(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	const path = "/v1/capsules/{id}/files?path=/f"
	put := func(query string, header ...string) *answer {
		return r.request(http.MethodPut, path+query, strings.NewReader("x"), header...)
	}
	got := put("").expect(http.StatusNoContent)
	require.Equal(t, r.request(http.MethodHead, path, nil).expect(http.StatusOK).res.Header.Get("ETag"), got.res.Header.Get("ETag"))
	require.Equal(t, "Tue, 14 Nov 2023 22:13:20 GMT", got.res.Header.Get("Last-Modified"))
	for _, c := range []struct {
		query  string
		header []string
		says   string
	}{
		{"&mode=9", nil, "octal"},
		{"&modified_at=x", nil, "Unix seconds"},
		{"&modified_at=-1", nil, "Unix seconds"},
		{"&modified_at=1.-5", nil, "Unix seconds"},
		{"&modified_at=99999999999", nil, "Unix seconds"},
		{"&append=perhaps", nil, "invalid boolean"},
		{"", []string{"If-Match", "abc"}, "If-Match"},
		{"", []string{"If-Match", `W/"abc"`}, "If-Match"},
		{"", []string{"If-Match", strings.Repeat(`"a",`, 17)}, "more than 16"},
		{"", []string{"If-None-Match", `"abc"`}, "must be *"},
		{"", []string{"If-Unmodified-Since", "Tue, 14 Nov 2023 22:13:20 GMT"}, "not possible here"},
		{"", []string{"Content-Range", "bytes 0-1/2"}, "not possible here"},
	} {
		require.Contains(t, put(c.query, c.header...).fails(http.StatusBadRequest, "invalid_request"), c.says)
	}
	put("&mode=0600&user=u&modified_at=1700000000.5&append=true").expect(http.StatusNoContent)
	require.Equal(t, `{Mode:384 User:u ModifiedAt:2023-11-14 22:13:20.5 +0000 UTC Append:true IfAbsent:false IfVersion:[]}`, r.guest.files.lastWrite())
	put("", "If-None-Match", "*").expect(http.StatusNoContent)
	require.Contains(t, r.guest.files.lastWrite(), "IfAbsent:true")
	put("", "If-Match", `"a", "b-c" ,*`).expect(http.StatusNoContent)
	require.Contains(t, r.guest.files.lastWrite(), "IfVersion:[a b-c *]")
}
