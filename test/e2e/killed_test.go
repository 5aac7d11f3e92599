package e2e

import (
	"context"
	"crypto/sha256"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// The long form of TestKilledUnderLoad: 50 capsules, 20 processes, 10 kills.
var (
	soakCapsules  = flag.Int("capsules", 4, "capsules of TestKilledUnderLoad")
	soakProcesses = flag.Int("processes", 5, "background processes of each")
	soakKills     = flag.Int("kills", 3, "times the server is killed with -9")
)

// lines and pad make up what each process of TestKilledUnderLoad writes, in
// bursts with pauses, so that it lives through several kills.
const (
	bursts       = 8
	linesPerStep = 40
)

func script(tag string) string {
	return fmt.Sprintf(`i=0; while [ $i -lt %d ]; do j=0; while [ $j -lt %d ]; do echo "%s $i $j"; echo "%s $i $j err" >&2; j=$((j+1)); done; i=$((i+1)); sleep 1; done; exit 7`,
		bursts, linesPerStep, tag, tag)
}

// written is what script must have written, by stream; how the two interleave
// is the kernel's business, so they are compared apart.
func written(tag string) (stdout, stderr string) {
	var out, err strings.Builder
	for i := range bursts {
		for j := range linesPerStep {
			fmt.Fprintf(&out, "%s %d %d\n", tag, i, j)
			fmt.Fprintf(&err, "%s %d %d err\n", tag, i, j)
		}
	}
	return out.String(), err.String()
}

// TestKilledUnderLoad starts processes in capsules, reads all of them with
// readers that are cut at random, and kills the server with -9 again and
// again meanwhile. No capsule, process or byte may be lost or doubled.
func TestKilledUnderLoad(t *testing.T) {
	t.Parallel()
	s := newServer(t)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Minute)
	defer cancel()

	type process struct{ capsule, tag string }
	var processes []process
	for c := range *soakCapsules {
		id := s.newCapsule()
		for p := range *soakProcesses {
			tag := fmt.Sprintf("c%dp%d", c, p)
			s.background(id, tag, script(tag))
			processes = append(processes, process{id, tag})
		}
		t.Logf("capsule %d of %d runs", c+1, *soakCapsules)
	}

	var readers sync.WaitGroup
	logs := make([]string, len(processes))
	for i, p := range processes {
		readers.Add(1)
		go func() {
			defer readers.Done()
			logs[i] = s.readCutting(ctx, p.capsule, p.tag)
		}()
	}
	for k := range *soakKills {
		s.kill9()
		s.start()
		t.Logf("kill %d of %d survived", k+1, *soakKills)
	}
	readers.Wait()
	require.NoError(t, ctx.Err())

	for i, p := range processes {
		requireWritten(t, p.tag, logs[i])
		rec := call[processJSON](s, http.MethodGet, path(p.capsule, p.tag)+"?wait=60s", nil, 200)
		require.Equal(t, "exited", rec.State)
		require.Equal(t, 7, rec.Exit.Code)
		require.Equal(t, "exited", rec.Exit.Reason)
	}
}

func requireWritten(t *testing.T, tag, log string) {
	t.Helper()
	var out, err strings.Builder
	for line := range strings.Lines(log) {
		if strings.HasSuffix(line, " err\n") {
			err.WriteString(line)
		} else {
			out.WriteString(line)
		}
	}
	wantOut, wantErr := written(tag)
	require.Equal(t, sum(wantOut), sum(out.String()), "stdout of %s: %d bytes for %d", tag, out.Len(), len(wantOut))
	require.Equal(t, sum(wantErr), sum(err.String()), "stderr of %s: %d bytes for %d", tag, err.Len(), len(wantErr))
}

func sum(s string) string { return fmt.Sprintf("%x", sha256.Sum256([]byte(s))) }

// readCutting follows a log to its end through plain HTTP, hanging up at
// random and resuming at the byte it reached.
func (s *server) readCutting(ctx context.Context, id, tag string) string {
	var got strings.Builder
	key := s.key()
	for ctx.Err() == nil {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet,
			fmt.Sprintf("http://%s%s/logs?follow=true&since=%d", s.addr, path(id, tag), got.Len()), nil)
		if err != nil {
			s.t.Error(err)
			return ""
		}
		req.Header.Set("X-API-Key", key)
		res, err := http.DefaultClient.Do(req)
		if err != nil { // the server is being killed
			pause(ctx, 50*time.Millisecond)
			continue
		}
		if res.StatusCode != http.StatusOK {
			body, _ := io.ReadAll(res.Body)
			res.Body.Close()
			if res.StatusCode < 500 {
				s.t.Errorf("logs of %s: %d %s", tag, res.StatusCode, body)
				return ""
			}
			pause(ctx, 50*time.Millisecond)
			continue
		}
		limit := rand.Int64N(6000)
		n, err := io.Copy(&got, io.LimitReader(res.Body, limit))
		res.Body.Close()
		if err == nil && n < limit {
			return got.String() // a clean end
		}
	}
	return got.String()
}

// pause waits between two tries at a server that is down.
func pause(ctx context.Context, d time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
}
