package envd_test

import (
	"context"
	"fmt"
	"io"
	"os"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/internal/guest"
	"github.com/nestbox/nestbox/internal/guest/envd"
)

func TestProf(t *testing.T) {
	if os.Getenv("MEASURE") == "" {
		return
	}
	ctx := context.Background()
	const total = 8 << 30
	e, err := envd.New(envd.Config{})
	require.NoError(t, err)
	defer e.Close()
	began := time.Now()
	_, r, err := e.Processes().Start(ctx, nestbox.ProcessSpec{Cmd: "dd", Args: []string{"if=/dev/zero", "bs=64k", fmt.Sprint("count=", total/65536), "status=none"}}, &guest.Attach{Lossless: true})
	require.NoError(t, err)
	n, events := 0, 0
	for {
		ev, err := r.Next(ctx)
		if err == io.EOF {
			break
		}
		require.NoError(t, err)
		n += len(ev.Data)
		events++
	}
	t.Logf("%.0f MB/s, %d events", total/1e6/time.Since(began).Seconds(), events)
}
