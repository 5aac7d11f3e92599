package envd_test

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"sort"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/internal/guest"
	"github.com/nestbox/nestbox/internal/guest/envd"
)

func TestMeasure(t *testing.T) {
	if os.Getenv("MEASURE") == "" {
		return
	}
	ctx := context.Background()
	const total = 2 << 30
	dd := []string{"if=/dev/zero", "bs=64k", fmt.Sprint("count=", total/65536), "status=none"}
	for range 2 {
		cmd := exec.Command("dd", dd...)
		out, _ := cmd.StdoutPipe()
		began := time.Now()
		require.NoError(t, cmd.Start())
		buf := make([]byte, 256<<10)
		for {
			if _, err := out.Read(buf); err != nil {
				break
			}
		}
		cmd.Wait()
		t.Logf("plain pipe: %.0f MB/s", total/1e6/time.Since(began).Seconds())
		for name, lim := range map[string]envd.Limits{"default": {}, "no disk": {LogDisk: -1}} {
			e, err := envd.New(envd.Config{Limits: lim})
			require.NoError(t, err)
			for _, lossless := range []bool{true, false} {
				began = time.Now()
				_, r, err := e.Processes().Start(ctx, nestbox.ProcessSpec{Cmd: "dd", Args: dd}, &guest.Attach{Lossless: lossless})
				require.NoError(t, err)
				n, events, gaps := 0, 0, 0
				for {
					ev, err := r.Next(ctx)
					if err == io.EOF {
						break
					}
					require.NoError(t, err)
					n += len(ev.Data)
					events++
					if ev.Kind == nestbox.EventGap {
						gaps++
					}
				}
				t.Logf("envd %s lossless=%v: %.0f MB/s, %d events %d gaps %d", name, lossless, total/1e6/time.Since(began).Seconds(), n, events, gaps)
			}
			e.Close()
		}
	}
	e, _ := envd.New(envd.Config{})
	var a, b, c []float64
	for range 300 {
		began := time.Now()
		cmd := exec.Command("/bin/true")
		cmd.Run()
		a = append(a, time.Since(began).Seconds()*1e3)
		began = time.Now()
		p, _, _ := e.Processes().Start(ctx, nestbox.ProcessSpec{Cmd: "/bin/true"}, nil)
		b = append(b, time.Since(began).Seconds()*1e3)
		e.Processes().Wait(ctx, nestbox.Selector{PID: p.PID})
		c = append(c, time.Since(began).Seconds()*1e3)
	}
	q := func(x []float64) string {
		sort.Float64s(x)
		return fmt.Sprintf("p50 %.2f p99 %.2f ms", x[len(x)/2], x[len(x)*99/100])
	}
	t.Log("os/exec Run", q(a))
	t.Log("Start", q(b))
	t.Log("Start+Wait", q(c))
	var k []float64
	for range 100 {
		p, _, _ := e.Processes().Start(ctx, nestbox.ProcessSpec{Cmd: "sleep", Args: []string{"1000"}}, nil)
		began := time.Now()
		e.Processes().Kill(ctx, nestbox.Selector{PID: p.PID}, guest.Kill{})
		k = append(k, time.Since(began).Seconds()*1e3)
	}
	t.Log("Kill", q(k))
	mem := func() uint64 {
		runtime.GC()
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return m.HeapInuse + m.StackInuse
	}
	before := mem()
	const n = 1000
	var tags []string
	began := time.Now()
	for range n {
		p, _, err := e.Processes().Start(ctx, nestbox.ProcessSpec{Cmd: "sh", Args: []string{"-c", "echo hello; exec sleep 1000"}}, nil)
		require.NoError(t, err)
		tags = append(tags, p.Tag)
	}
	t.Logf("%d starts in %v", n, time.Since(began))
	time.Sleep(time.Second)
	t.Logf("memory per process: %d B", (mem()-before)/n)
	k = nil
	for _, tag := range tags[:200] {
		began := time.Now()
		e.Processes().Kill(ctx, nestbox.Selector{Tag: tag}, guest.Kill{})
		k = append(k, time.Since(began).Seconds()*1e3)
	}
	t.Log("Kill among 1000", q(k))
	for _, tag := range tags[200:] {
		e.Processes().Kill(ctx, nestbox.Selector{Tag: tag}, guest.Kill{})
	}
	t.Logf("memory per ended process: %d B", (int64(mem())-int64(before))/n)
	e.Close()
}
