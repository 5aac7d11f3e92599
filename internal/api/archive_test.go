package api

import (
	"encoding/json"
	"io"
	"net/http"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

const archivePath = "/v1/capsules/{id}/archive?path="

func (f *scriptedFiles) put(path, content string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.content[path] = content
}

func TestArchive(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	r.guest.files.put("/d", "packed")
	got := r.call(http.MethodGet, archivePath+"/d", "").expect(http.StatusOK)
	require.Equal(t, "packed", string(got.body))
	require.Equal(t, "application/x-tar", got.res.Header.Get("Content-Type"))
	require.Equal(t, `["of /d"]`, got.res.Trailer.Get(headerWarnings))
	got = r.call(http.MethodGet, archivePath+"/d/.&compression=zstd", "").expect(http.StatusOK)
	require.Equal(t, "application/zstd", got.res.Header.Get("Content-Type"))

	var done unpackedBody
	r.call(http.MethodPut, archivePath+"/in&owner=me&noOverwriteDirNonDir=true", "tar").expect(http.StatusOK).decode(&done)
	require.Equal(t, unpackedBody{Entries: 1, Bytes: 3, Warnings: []string{"{User:me KeepOwners:false KeepKind:true}"}}, done)
	r.call(http.MethodPut, archivePath+"/in&copyUIDGID=true", "tar").expect(http.StatusOK).decode(&done)
	require.Equal(t, []string{"{User: KeepOwners:true KeepKind:false}"}, done.Warnings)
	content, _ := r.guest.files.get("/in")
	require.Equal(t, "tar", content)
}

func TestArchiveFails(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	for query, status := range map[string]int{
		"": http.StatusBadRequest, "relative": http.StatusBadRequest, "/missing": http.StatusNotFound, "/x&compression=rot13": http.StatusBadRequest,
	} {
		r.call(http.MethodGet, archivePath+query, "").expect(status)
	}
	for query, status := range map[string]int{
		"": http.StatusBadRequest, "relative": http.StatusBadRequest, "/full": http.StatusInsufficientStorage, "/x&owner=a&copyUIDGID=true": http.StatusBadRequest,
	} {
		r.call(http.MethodPut, archivePath+query, "tar").expect(status)
	}
	r.call(http.MethodGet, archivePath+"/d", "", apiKeyHeader, r.other).expect(http.StatusNotFound)
	r.call(http.MethodPut, archivePath+"/d", "", apiKeyHeader, "").expect(http.StatusUnauthorized)

	r.guest.files.put("/breaks", "half")
	res, err := r.server.Client().Do(r.newRequest(http.MethodGet, archivePath+"/breaks", nil))
	require.NoError(t, err)
	defer res.Body.Close()
	_, err = io.ReadAll(res.Body)
	require.ErrorIs(t, err, io.ErrUnexpectedEOF)
}

// TestWarningsFit: what is told in a trailer is short and ASCII, whatever it is about.
func TestWarningsFit(t *testing.T) {
	t.Parallel()
	for _, count := range []int{1, 3, 200} {
		list := make([]string, count)
		for i := range list {
			list[i] = "ü😀\n\"\\" + strings.Repeat("x", 100)
		}
		header := warningsHeader(list)
		require.LessOrEqual(t, len(header), maxTrailer+32)
		for _, c := range []byte(header) {
			require.True(t, c >= ' ' && c < 0x7f, "%q", header)
		}
		var back []string
		require.NoError(t, json.Unmarshal([]byte(header), &back))
		require.Equal(t, list[0], back[0])
		if count == 200 {
			require.Contains(t, back[len(back)-1], " more")
		}
	}
}
