package hostagent

import (
	"os"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/internal/fieldtest"
)

// TestEveryFieldOfARecordIsKept: a setting that is added to a capsule and
// forgotten on disk fails here.
func TestEveryFieldOfARecordIsKept(t *testing.T) {
	t.Parallel()
	rs, err := openRecords(t.TempDir())
	require.NoError(t, err)
	r := fieldtest.Fill[record](t)
	r.Version, r.ID = recordVersion, nestbox.NewID(nestbox.PrefixCapsule)
	require.NoError(t, rs.put(r))
	back, err := rs.read(r.ID)
	require.NoError(t, err)
	require.Equal(t, r, back)
}

// TestRecordVersions: the form without a version is still read, a later one is
// refused rather than guessed at.
func TestRecordVersions(t *testing.T) {
	t.Parallel()
	rs, err := openRecords(t.TempDir())
	require.NoError(t, err)
	id := nestbox.NewID(nestbox.PrefixCapsule)
	write := func(text string) { require.NoError(t, os.WriteFile(rs.path(id), []byte(text), 0o600)) }

	write(`{"id":"` + id + `","template":"minimal","resources":{"VCPUs":2,"MemoryMB":300,"DiskMB":400,"PidsMax":500},"token":"x","state":"running"}`)
	r, err := rs.read(id)
	require.NoError(t, err)
	require.Equal(t, nestbox.CapsuleSpec{Template: "minimal", Resources: nestbox.Resources{VCPUs: 2, MemoryMB: 300, DiskMB: 400, PidsMax: 500}}, r.Spec)
	require.Equal(t, StateRunning, r.State)

	write(`{"version":99,"id":"` + id + `"}`)
	_, err = rs.read(id)
	require.ErrorContains(t, err, "version 99")
}
