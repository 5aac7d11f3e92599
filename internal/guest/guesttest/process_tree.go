package guesttest

import (
	"strconv"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/internal/guest"
)

// testTree: what a process leaves behind is seen, with what it uses and whose it is.
func testTree(t *testing.T, g guest.Processes) {
	dir := scratch(t, g)
	p, _, err := g.Start(waiting(t), shell("sh -c 'sleep 1000 & echo $! >"+dir+"/left' & setsid sleep 1001 & echo $! >"+dir+"/session; "+
		"i=0; while [ $i -lt 100000 ]; do i=$((i+1)); done; touch "+dir+"/busy; sleep 1002"), nil)
	require.NoError(t, err)
	eventually(t, func() bool { return strings.TrimSpace(output(t, g, "ls "+dir+" | wc -l")) == "3" }, "it has started all")
	pidIn := func(name string) int {
		pid, err := strconv.Atoi(strings.TrimSpace(output(t, g, "cat "+dir+"/"+name)))
		require.NoError(t, err)
		return pid
	}
	tree, err := g.Tree(waiting(t))
	require.NoError(t, err)
	byPID := map[int]nestbox.SystemProcess{}
	for i, one := range tree {
		byPID[one.PID] = one
		require.True(t, i == 0 || tree[i-1].PID < one.PID, "by PID")
		require.NotEmpty(t, one.Cmd)
		require.NotEmpty(t, one.State)
	}
	for pid, cmd := range map[int]string{pidIn("left"): "sleep 1000", pidIn("session"): "sleep 1001"} {
		require.Contains(t, byPID, pid)
		require.Equal(t, cmd, byPID[pid].Cmd)
		require.Equal(t, p.ID, byPID[pid].Process, "also where its parent is gone, or its session another")
		require.Positive(t, byPID[pid].Memory)
	}
	leader := byPID[p.PID]
	require.Equal(t, p.ID, leader.Process)
	require.Equal(t, p.User, leader.User)
	require.Positive(t, leader.CPU)
	_, err = g.Kill(waiting(t), exact(p), guest.Kill{})
	require.NoError(t, err)
	tree, err = g.Tree(waiting(t))
	require.NoError(t, err)
	for _, one := range tree {
		require.NotEqual(t, p.ID, one.Process, "%+v", one)
	}
}
