package api

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/nestbox/nestbox"
	"github.com/nestbox/nestbox/internal/fieldtest"
)

// TestEveryFieldIsShown: a field that is added to a type of the product and
// forgotten on the wire of the API fails here.
func TestEveryFieldIsShown(t *testing.T) {
	t.Parallel()
	fieldtest.Matters(t, func(c nestbox.Capsule) any {
		for _, at := range []*time.Time{&c.CreatedAt, &c.StartedAt, &c.LastActiveAt, &c.UpdatedAt} {
			*at = at.Truncate(time.Second)
		}
		return toCapsule(c)
	}, "Capsule.TeamID", "Capsule.HostID", // of no use to a caller, who has one team and no say in hosts
		"Capsule.CapsuleSpec.Env",                                                                                                                // EnvNames are shown
		"Capsule.CapsuleSpec.Image", "Capsule.CapsuleSpec.Defaults.Env", "Capsule.CapsuleSpec.Defaults.User", "Capsule.CapsuleSpec.Defaults.Cwd", // the template is shown
		"Capsule.CapsuleSpec.Defaults.Entrypoint", "Capsule.CapsuleSpec.Defaults.Cmd", "Capsule.CapsuleSpec.Defaults.Labels",
		"Capsule.Request.Key", "Capsule.Request.Sum") // of whoever asked
	fieldtest.Matters(t, func(p nestbox.Process) any { return toProcess(p) })
	fieldtest.Matters(t, func(p nestbox.SystemProcess) any { return toSystemProcess(p) })
	fieldtest.Matters(t, func(f nestbox.FileInfo) any { return toFileEntry(f) })
	fieldtest.Matters(t, func(b createCapsuleBody) any { return b.spec(nestbox.NetworkPolicy{}) })
	fieldtest.Matters(t, func(s nestbox.PortSettings) any { return toPortSettings(80, s) })
	fieldtest.Matters(t, func(b portSettingsBody) any { return b.domain() })
	fieldtest.Matters(t, func(r nestbox.NetworkReport) any { return toNetworkLog(r) })
	fieldtest.Matters(t, func(f nestbox.NetworkFlow) any { return toFlow(f) }, "NetworkFlow.Verdict.ByName")  // the rule says it
	fieldtest.Matters(t, func(c Command) any { return c.spec() }, "Command.Stdin.Data", "Command.Stdin.Open") // each says that there is a standard input
	require.True(t, Command{Stdin: stdinField{Open: true}}.spec().Stdin)
	require.True(t, Command{Stdin: stdinField{Data: []byte{}}}.spec().Stdin)
}
