package store_test

import (
	"bufio"
	"context"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/internal/store"
)

// writerDSN names the environment variable that makes the test binary a
// process that writes to that database until it is killed.
const writerDSN = "NESTBOX_STORE_TEST_WRITER"

// writeForEver makes capsules run, and prints the id of each that it was told
// does.
func writeForEver(dsn string) int {
	ctx := context.Background()
	s, err := store.Open(ctx, dsn, slog.New(slog.DiscardHandler))
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	team := nestbox.Team{ID: nestbox.NewID(nestbox.PrefixTeam), Name: "writer", CreatedAt: epoch}
	if err := s.CreateTeam(ctx, team); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	for {
		c := newCapsule(team.ID, epoch)
		err := s.CreateCapsule(ctx, c, host)
		if err == nil {
			_, err = s.Transition(ctx, c.ID, nestbox.TriggerStarted, epoch, "")
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		fmt.Println(c.ID)
	}
}

// What a process was told is written is there after it was killed.
func TestKilledWriter(t *testing.T) {
	t.Parallel()
	forEachDB(t, func(t *testing.T, dsn string) {
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		for range 3 {
			writer := exec.CommandContext(ctx, os.Args[0])
			writer.Env = append(os.Environ(), writerDSN+"="+dsn)
			writer.Stderr = os.Stderr
			out, err := writer.StdoutPipe()
			require.NoError(t, err)
			require.NoError(t, writer.Start())
			var told []string
			for lines := bufio.NewScanner(out); lines.Scan(); {
				if told = append(told, lines.Text()); len(told) == 30 {
					require.NoError(t, writer.Process.Kill())
				}
			}
			require.Error(t, writer.Wait(), "killed")
			require.GreaterOrEqual(t, len(told), 30)
			s := open(t, dsn)
			for _, id := range told {
				if len(id) != len(nestbox.NewID(nestbox.PrefixCapsule)) {
					continue // cut in the middle by the kill
				}
				c, err := s.Capsule(t.Context(), id)
				require.NoError(t, err)
				require.Equal(t, nestbox.StateRunning, c.State)
			}
		}
	})
}
