package meter

import (
	"context"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/nestbox/nestbox"
)

func TestTake(t *testing.T) {
	t.Parallel()
	m := New(100, 60)
	a, endA := m.Begin(t.Context(), "a")
	b, endB := m.Begin(t.Context(), "b")
	require.NoError(t, Take(a, 60))
	require.NoError(t, Take(b, 40))
	require.Equal(t, nestbox.CodeTooLarge, nestbox.CodeOf(Take(a, 1)), "more than its team may ever have")
	require.NoError(t, Take(context.Background(), 1<<40))
	endA()
	endA()
	require.NoError(t, Take(b, 20))
	endB()
	require.Zero(t, m.used)
	require.Empty(t, m.teams)
	require.ErrorIs(t, Take(a, 1), context.Canceled, "after its end")
}

// TestWaits: a request waits for others, of its team and of all, and not for ever.
func TestWaits(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		m := New(100, 60)
		first, end := m.Begin(t.Context(), "a")
		require.NoError(t, Take(first, 50))
		second, endSecond := m.Begin(t.Context(), "a")
		defer endSecond()
		began := time.Now()
		require.Equal(t, nestbox.CodeExhausted, nestbox.CodeOf(Take(second, 20)))
		require.Equal(t, waitFor, time.Since(began))
		go func() { <-time.After(time.Second); end() }()
		require.NoError(t, Take(second, 20))
		third, endThird := m.Begin(t.Context(), "a")
		defer endThird()
		left, cancel := context.WithCancel(third)
		cancel()
		require.ErrorIs(t, Take(left, 60), context.Canceled)
	})
}

func TestNeverMoreThanThereIs(t *testing.T) {
	t.Parallel()
	m := New(1000, 300)
	var wg sync.WaitGroup
	for i := range 200 {
		wg.Go(func() {
			ctx, end := m.Begin(t.Context(), string(rune('a'+i%5)))
			defer end()
			if err := Take(ctx, int64(1+i)); err != nil {
				t.Error(err)
			}
			m.mu.Lock()
			defer m.mu.Unlock()
			if m.used > 1000 || m.teams["a"] > 300 {
				t.Errorf("%d %v", m.used, m.teams)
			}
		})
	}
	wg.Wait()
	require.Zero(t, m.used)
}
