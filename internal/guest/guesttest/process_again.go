package guesttest

import (
	"sync"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/internal/guest"
)

// testTagConflict: a start whose tag is taken replaces or returns the process that has it,
// also when several do so at once.
func testTagConflict(t *testing.T, g guest.Processes) {
	spec := nestbox.ProcessSpec{Cmd: "cat", Stdin: true, Tag: "conflict-" + nestbox.RandomHex(4)}
	t.Cleanup(func() { killLeft(t, g, nestbox.Process{Tag: spec.Tag}) })
	start := func(how nestbox.TagConflict) nestbox.Process {
		t.Helper()
		spec := spec
		spec.OnConflict = how
		p, _, err := g.Start(waiting(t), spec, nil)
		require.NoError(t, err)
		return p
	}
	first := start(nestbox.ConflictReturn)
	require.Equal(t, first.ID, start(nestbox.ConflictReturn).ID)
	second := start(nestbox.ConflictReplace)
	require.NotEqual(t, first.ID, second.ID)
	old, err := g.Get(waiting(t), nestbox.Selector{ID: first.ID})
	require.NoError(t, err)
	require.NotNil(t, old.Exit)
	require.Equal(t, nestbox.ReasonKilled, old.Exit.Reason)
	_, _, err = g.Start(waiting(t), spec, nil)
	requireError(t, nestbox.CodeConflict, err)

	var wg sync.WaitGroup
	ids := make([]nestbox.ProcessID, 8)
	errs := make([]error, len(ids))
	for i := range ids {
		how := []nestbox.TagConflict{nestbox.ConflictReplace, nestbox.ConflictReturn}[i%2]
		spec := spec
		spec.OnConflict = how
		wg.Go(func() {
			p, _, err := g.Start(waiting(t), spec, nil)
			ids[i], errs[i] = p.ID, err
		})
	}
	wg.Wait()
	for _, err := range errs {
		require.NoError(t, err)
	}
	now, err := g.Get(waiting(t), nestbox.Selector{Tag: spec.Tag})
	require.NoError(t, err)
	require.Nil(t, now.Exit, "one of them lives")
	require.Contains(t, ids, now.ID)

	for _, bad := range []nestbox.ProcessSpec{{Cmd: "true", OnConflict: "return"}, {Cmd: "true", Tag: "t", OnConflict: "restart"}} {
		_, _, err := g.Start(waiting(t), bad, nil)
		requireError(t, nestbox.CodeInvalid, err)
	}
}

// testRequestKey: of all starts with one key one starts a process.
func testRequestKey(t *testing.T, g guest.Processes) {
	spec := shell("echo once; exit 3")
	spec.RequestKey = "key-" + nestbox.RandomHex(8)
	var wg sync.WaitGroup
	ids := make([]nestbox.ProcessID, 8)
	errs := make([]error, len(ids))
	for i := range ids {
		wg.Go(func() {
			p, _, err := g.Start(waiting(t), spec, nil)
			ids[i], errs[i] = p.ID, err
		})
	}
	wg.Wait()
	for i := range ids {
		require.NoError(t, errs[i])
		require.Equal(t, ids[0], ids[i])
	}
	ended, err := g.Wait(waiting(t), nestbox.Selector{ID: ids[0]})
	require.NoError(t, err)
	require.Equal(t, 3, ended.Exit.Code)
	again, _, err := g.Start(waiting(t), spec, nil)
	require.NoError(t, err)
	require.Equal(t, ids[0], again.ID, "also when it has ended")
	require.NotNil(t, again.Exit)

	other := spec
	other.Args = []string{"-c", "echo twice"}
	_, _, err = g.Start(waiting(t), other, nil)
	requireError(t, nestbox.CodeConflict, err)

	failing := nestbox.ProcessSpec{Cmd: "/no/such/program", RequestKey: "key-" + nestbox.RandomHex(8)}
	_, _, err = g.Start(waiting(t), failing, nil)
	requireError(t, nestbox.CodeInvalid, err)
	failing.Cmd = "true"
	_, _, err = g.Start(waiting(t), failing, nil)
	require.NoError(t, err, "what started nothing leaves its key free")
	_, _, err = g.Start(waiting(t), nestbox.ProcessSpec{Cmd: "true", RequestKey: "a\nb"}, nil)
	requireError(t, nestbox.CodeInvalid, err)
}
