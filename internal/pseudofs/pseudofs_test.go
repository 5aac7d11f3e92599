package pseudofs

import (
	"os"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestAt(t *testing.T) {
	t.Parallel()
	for path, want := range map[string]bool{"/proc": true, "/proc/self/status": true, "/sys": true, t.TempDir(): false, "/nowhere": false} {
		require.Equal(t, want, At(path), path)
		if f, err := os.Open(path); err == nil {
			require.Equal(t, want, Open(int(f.Fd())), path)
			require.NoError(t, f.Close())
		}
	}
}
